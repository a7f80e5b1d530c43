"""Narrower attention and MLP layers inside any timm transformer: where heads and hidden units lie, and how to cut them.

`branches` finds the attention and MLP of every block and names the slices of weights that belong to each head and each
hidden unit. `narrow` cuts them down in place. The rest of the network stays timm's own.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import ClassAttn, TalkingHeadAttn
from timm.models.eva import EvaAttention
from torch import nn

from ..arch import Part, Units

__all__ = [
    "Branch",
    "NarrowError",
    "Size",
    "branches",
    "check_head_dim",
    "first_units",
    "narrow",
    "owner_of",
    "prunable_class",
]


class NarrowError(ValueError):
    """A network, or widths, that cannot be narrowed; the message names the module."""


class Size(NamedTuple):
    """A number that a module keeps of its width.

    Attributes:
        module: Its name in the network.
        attribute: Of the module: ``"num_heads"``, ``"out_features"``, ``"normalized_shape"``, ...
        each: What one unit adds to it.
    """

    module: str
    attribute: str
    each: int


class Branch(NamedTuple):
    """The attention or the MLP of a block, with its norm and its layer scale.

    Attributes:
        kind: ``"attention"`` or ``"mlp"``.
        block: Name of the block.
        units: Its heads or hidden units; ``units.name`` is the name of the module.
        sizes: Numbers that follow the units.
        buffers: Slices of buffers that are the units' own.
        width: Entries of one unit where it is read: the head's dimension, or 1.
        whole: Whether the units work on each other, so that only all of them can be there, or none.
        normed: Whether a norm over the units stands before they are read; it is taken over those that are kept.
        entries: Whether heads can be of fewer entries: those without rotary embedding and norms.
    """

    kind: str
    block: str
    units: Units
    sizes: tuple[Size, ...]
    buffers: tuple[Part, ...]
    width: int
    whole: bool
    normed: bool
    entries: bool = False

    @property
    def number(self) -> str:
        """What the block's own norm and layer scale of this branch are numbered."""
        return "1" if self.kind == "attention" else "2"

    def owns(self, param: str) -> bool:
        """Whether a parameter of the network is gone where the branch is absent."""
        own = (f"{self.units.name}.", f"{self.block}.norm{self.number}.", f"{self.block}.ls{self.number}.")
        return param.startswith(own) or param == f"{self.block}.gamma_{self.number}"


# -- narrower forms of timm's classes whose forward takes the width of all heads for that of the tokens ----------------


class NarrowEvaAttention(EvaAttention):
    """timm's EvaAttention with any number of heads."""

    def forward(self, x, rope=None, attn_mask=None, is_causal: bool = False):
        """See `timm.models.eva.EvaAttention`. [B, N, dim] -> [B, N, dim]"""
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        if self.qkv is not None:
            bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
            qkv = F.linear(x, self.qkv.weight, bias)
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            k = self.k_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            v = self.v_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            n, half = self.num_prefix_tokens, self.rotate_half
            q = torch.cat([q[:, :, :n], apply_rot_embed_cat(q[:, :, n:], rope, half=half)], dim=2).type_as(v)
            k = torch.cat([k[:, :, :n], apply_rot_embed_cat(k[:, :, n:], rope, half=half)], dim=2).type_as(v)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        x = self.norm(x.transpose(1, 2).flatten(2))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


class NarrowBeitAttention(BeitAttention):
    """timm's Attention of Beit with any number of heads."""

    def forward(self, x, shared_rel_pos_bias=None):
        """See `timm.models.beit.Attention`. [B, N, dim] -> [B, N, dim]"""
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class NarrowClassAttn(ClassAttn):
    """timm's ClassAttn of CaiT with any number of heads."""

    def forward(self, x):
        """See `timm.models.cait.ClassAttn`. [B, 1 + N, dim] -> [B, 1, dim]"""
        q = self.q(x[:, :1]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, None, dropout)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Absent(nn.Module):
    """In place of an attention or MLP that is not there: adds nothing to the residual stream."""

    def forward(self, x, rope=None, attn_mask=None, is_causal: bool = False, shared_rel_pos_bias=None):
        """A zero that any tensor can be added to. [B, N, dim] -> []"""
        return x.new_zeros(())

    absent = True  # of `layer_starts`

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """As that of Beit's attention."""
        return


class Scaled(nn.Module):
    """In place of a norm of queries: keeps the scale of the logits where heads have fewer entries.

    Args:
        factor: What the queries are multiplied by.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        """[...] -> [...]"""
        return x * self.factor


_NARROW = {EvaAttention: NarrowEvaAttention, BeitAttention: NarrowBeitAttention, ClassAttn: NarrowClassAttn}
_ATTENTION = (Attention, AttentionRope, TalkingHeadAttn, *_NARROW, *_NARROW.values())
_MLP = (Mlp, GluMlp, SwiGLU)
_IN_BLOCK = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2", "drop_path"}


def prunable_class(module: nn.Module) -> type[nn.Module]:
    """The class that computes the module at any width, with the same attributes and weights."""
    return _NARROW.get(type(module), type(module))


# -- finding them ------------------------------------------------------------------------------------------------------


def branches(model: nn.Module) -> list[tuple[Branch, Branch]]:
    """Attention and MLP of each block of a timm model, in the order of the network.

    Known are timm's ``Attention``, ``AttentionRope``, ``EvaAttention``, Beit's attention, ``ClassAttn``,
    ``TalkingHeadAttn`` (all heads or none, for they are mixed), ``Mlp``, ``GluMlp`` and ``SwiGLU``; thus ViT, DeiT,
    DINOv2, SigLIP, CLIP's towers, Eva, DINOv3, Beit, CaiT, and ViT-ResNAS.

    Raises:
        NarrowError: A block has another module in it, or the model has no such blocks; the message names it.
    """
    found = []
    for name, block in model.named_modules():
        children = dict(block.named_children())
        if "attn" not in children or "mlp" not in children:
            continue
        if others := sorted(set(children) - _IN_BLOCK):
            raise NarrowError(
                f"{name} ({type(block).__name__}) of {type(model).__name__} has {', '.join(others)} beside attention "
                f"and MLP, so it cannot be narrowed"
            )
        found.append((_attention(model, name, block.attn), _mlp(model, name, block.mlp)))
    if not found:
        raise NarrowError(
            f"{type(model).__name__} has no blocks of attention and MLP (attn and mlp); expected a vision transformer "
            f"of timm, such as vit_small_patch16_224"
        )
    shared = [n for n in ("rel_pos_bias", "rope_mixed") if getattr(model, n, None)]
    if shared:
        raise NarrowError(f"{type(model).__name__} gives all blocks one {shared[0]} with a part for each head")
    return found


def _unknown(model: nn.Module, name: str, module: nn.Module, known: Sequence[type]) -> NarrowError:
    names = ", ".join(dict.fromkeys(c.__name__ for c in known if not c.__name__.startswith("Narrow")))
    return NarrowError(f"{name} of {type(model).__name__} is a {type(module).__name__}; known are timm's {names}")


class _Table:
    """Gathers parts and sizes of one module."""

    def __init__(self, name: str, module: nn.Module, width: int) -> None:
        self.name, self.module, self.width = name, module, width
        self.parts: list[Part] = []
        self.sizes: list[Size] = []
        self.buffers: list[Part] = []

    def tensor(self, name: str, dim: int = 0, runs: int = 1, width: int | None = None) -> None:
        """A parameter or buffer, unless there is none."""
        owner, _, own = name.rpartition(".")
        holder = self.module.get_submodule(owner)
        part = Part(f"{self.name}.{name}", dim, runs, self.width if width is None else width)
        if holder._parameters.get(own) is not None:
            self.parts.append(part)
        elif holder._buffers.get(own) is not None:
            self.buffers.append(part)

    def size(self, name: str, attribute: str, each: int) -> None:
        module = f"{self.name}.{name}" if name else self.name
        if hasattr(self.module.get_submodule(name), attribute):
            self.sizes.append(Size(module, attribute, each))

    def makes(self, *names: str, runs: int = 1) -> None:
        """Linear layers whose outputs are the units."""
        for name in names:
            if getattr(self.module, name, None) is not None:
                self.tensor(f"{name}.weight", 0, runs)
                self.tensor(f"{name}.bias", 0, runs)
                self.size(name, "out_features", runs * self.width)

    def norm(self) -> bool:
        """A norm over the units."""
        norm = getattr(self.module, "norm", None)
        if norm is None or isinstance(norm, nn.Identity):
            return False
        self.tensor("norm.weight")
        self.tensor("norm.bias")
        self.size("norm", "normalized_shape", self.width)
        return True

    def reads(self, name: str) -> None:
        """The linear layer whose inputs are the units; the last."""
        self.tensor(f"{name}.weight", 1)
        self.size(name, "in_features", self.width)


def _attention(model: nn.Module, block: str, attn: nn.Module) -> Branch:
    name = f"{block}.attn"
    if isinstance(attn, Absent):
        return Branch("attention", block, Units(name, 0, ()), (), (), 1, False, False)
    grouped = getattr(attn, "num_kv_groups", 1) > 1
    if type(attn) not in _ATTENTION or grouped:
        raise _unknown(model, name, attn, _ATTENTION)
    width = attn.proj.in_features // attn.num_heads
    table = _Table(name, attn, width)
    table.makes("qkv", runs=3)
    table.makes("q_proj", "k_proj", "v_proj", "q", "k", "v", "gate")
    for bias in ("q_bias", "k_bias", "v_bias"):
        table.tensor(bias) if hasattr(attn, bias) else None
    if hasattr(attn, "relative_position_bias_table"):
        table.tensor("relative_position_bias_table", 1, width=1)
    normed = table.norm()
    table.reads("proj")
    for attribute, each in (("num_heads", 1), ("num_kv_heads", 1), ("attn_dim", width)):
        table.size("", attribute, each)
    units = Units(name, attn.num_heads, tuple(table.parts))
    whole = isinstance(attn, TalkingHeadAttn)
    entries = type(attn) is Attention and not normed and isinstance(attn.k_norm, nn.Identity)
    return Branch("attention", block, units, tuple(table.sizes), tuple(table.buffers), width, whole, normed, entries)


def _mlp(model: nn.Module, block: str, mlp: nn.Module) -> Branch:
    name = f"{block}.mlp"
    if isinstance(mlp, Absent):
        return Branch("mlp", block, Units(name, 0, ()), (), (), 1, False, False)
    if type(mlp) not in _MLP or not isinstance(mlp.fc2, nn.Linear):
        raise _unknown(model, name, mlp, _MLP)
    table = _Table(name, mlp, 1)
    table.makes("fc1", runs=2 if isinstance(mlp, GluMlp) else 1)
    table.makes("fc1_g", "fc1_x")
    normed = table.norm()
    table.reads("fc2")
    units = Units(name, mlp.fc2.in_features, tuple(table.parts))
    return Branch("mlp", block, units, tuple(table.sizes), tuple(table.buffers), 1, False, normed)


# -- cutting -----------------------------------------------------------------------------------------------------------


def first_units(tensor: torch.Tensor, part: Part, keep: int) -> torch.Tensor:
    """The slices of the first ``keep`` units: a view where they are one stretch."""
    if part.runs == 1:
        return tensor.narrow(part.dim, 0, keep * part.width)
    tensor = tensor.unflatten(part.dim, (part.runs, -1)).narrow(part.dim + 1, 0, keep * part.width)
    return tensor.flatten(part.dim, part.dim + 1)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there."""
    owner, _, own = name.rpartition(".")
    return model.get_submodule(owner), own


@torch.no_grad()
def narrow(model: nn.Module, widths: Sequence[Sequence[int]]) -> None:
    """Reduce the heads and hidden units of each block to the first ones, in place.

    Args:
        model: See `branches`.
        widths: ``[num_heads, mlp_hidden]`` or ``[num_heads, mlp_hidden, head_dim]`` of each block; 0: that branch is
            absent.

    Raises:
        NarrowError: The model or the widths cannot be used; the message says where.
    """
    pairs = branches(model)
    if len(widths) != len(pairs):
        raise NarrowError(f"{type(model).__name__} has {len(pairs)} blocks, got widths of {len(widths)}")
    for i, own in enumerate(widths):
        if len(own) not in (2, 3):
            raise NarrowError(f"widths[{i}] must be [num_heads, mlp_hidden], or these and head_dim, got {own!r:.60}")
    for (attn, _), (_, _, *head_dim) in zip(pairs, widths, strict=True):
        if head_dim and attn.units.count:
            _cut_heads(model, attn, *head_dim)
    pairs = branches(model)
    for branch, keep in _paired(pairs, widths):
        count = branch.units.count
        if keep > count or (branch.whole and 0 < keep < count):
            allowed = f"0 or {count}" if branch.whole else f"at most {count}"
            raise NarrowError(f"{branch.units.name} has {count} units, {allowed} can be kept; got {keep}")
        if keep == 0 and count:
            _remove(model, branch)
        elif keep < count:
            _cut(model, branch, keep)


def _paired(pairs: Sequence[tuple[Branch, Branch]], widths: Sequence[Sequence[int]]) -> Iterator[tuple[Branch, int]]:
    for pair, counts in zip(pairs, widths, strict=True):
        yield from zip(pair, counts[:2], strict=True)


def check_head_dim(name: str, width: int, entries: bool, head_dim: int) -> None:
    """Whether the heads of an attention can be of ``head_dim`` entries.

    Args:
        name: Of the attention, for the message.
        width: Entries that they have.
        entries: See `Branch`.
        head_dim: Entries to keep.

    Raises:
        NarrowError: They cannot.
    """
    if head_dim > width or head_dim < 1:
        raise NarrowError(f"heads of {name} have {width} entries, 1 to {width} can be kept; got {head_dim}")
    if head_dim < width and not entries:
        raise NarrowError(f"heads of {name} are normed, rotated or mixed, so that each keeps its {width} entries")


def _cut_heads(model: nn.Module, branch: Branch, head_dim: int) -> None:
    """Reduce every head to its first entries."""
    check_head_dim(branch.units.name, branch.width, branch.entries, head_dim)
    if head_dim == branch.width:
        return
    for part in branch.units.parts:
        owner, own = owner_of(model, part.param)
        old = getattr(owner, own)
        new = old.unflatten(part.dim, (-1, part.width)).narrow(part.dim + 1, 0, head_dim)
        setattr(owner, own, nn.Parameter(new.flatten(part.dim, part.dim + 1).contiguous(), old.requires_grad))
    for size in branch.sizes:
        if size.each % branch.width == 0:  # all but the number of heads
            setattr(
                model.get_submodule(size.module),
                size.attribute,
                branch.units.count * size.each // branch.width * head_dim,
            )
    attn = model.get_submodule(branch.units.name)
    before = attn.q_norm.factor if isinstance(attn.q_norm, Scaled) else 1.0
    attn.q_norm = Scaled(before * attn.scale * head_dim**0.5)
    attn.head_dim, attn.scale = head_dim, head_dim**-0.5


def _cut(model: nn.Module, branch: Branch, keep: int) -> None:
    for part in (*branch.units.parts, *branch.buffers):
        owner, own = owner_of(model, part.param)
        old = getattr(owner, own)
        new = first_units(old, part, keep).clone(memory_format=torch.contiguous_format)
        if own in owner._parameters:
            setattr(owner, own, nn.Parameter(new, old.requires_grad))
        else:
            owner.register_buffer(own, new, persistent=own not in owner._non_persistent_buffers_set)
    for size in branch.sizes:
        value = keep * size.each
        setattr(model.get_submodule(size.module), size.attribute, _sized(size, value))
    module = model.get_submodule(branch.units.name)
    module.__class__ = prunable_class(module)


def _sized(size: Size, value: int) -> int | tuple[int]:
    return (value,) if size.attribute == "normalized_shape" else value


def _remove(model: nn.Module, branch: Branch) -> None:
    block = model.get_submodule(branch.block)
    setattr(block, branch.units.name.rpartition(".")[2], Absent())
    for name in (f"norm{branch.number}", f"ls{branch.number}", f"drop_path{branch.number}"):
        if hasattr(block, name):
            setattr(block, name, nn.Identity())
    scale = f"gamma_{branch.number}"
    if getattr(block, scale, None) is not None:
        delattr(block, scale)
        setattr(block, scale, 1.0)
