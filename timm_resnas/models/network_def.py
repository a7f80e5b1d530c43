"""Architectures of the ViT-ResNAS family: description, checks, and what their layers cost.

An architecture is written as the paper's own ``network_def`` ("Searching for Efficient Multi-Stage Vision
Transformers", arXiv 2109.00642, released code): a tuple of entries

======================================================  ===========================================================
``(0, C)``                                              patch embedding, one convolution to C channels
``(4, C)``, ``(5, C, mid)``                             convolutional stem with 24 (or ``mid``) channels, then C
``(1, (C, heads, head_dim), (C, mlp_hidden), exists)``  transformer block; skipped when ``exists`` is 0
``(3, C_in, C_out)``                                    residual spatial reduction
``(2, C, num_classes)``                                 head
======================================================  ===========================================================

In code it is a `NetworkDef`: typed, frozen, hashable, checked.

MACs are what the paper counts: convolutions, linear layers and the two products of attention. The released estimator
fixes the map of the convolutional stem at 112 x 112, which is too low away from 224 px. Here it is half the image, so
that the count equals half of torch's ``FlopCounterMode`` at any size; at 224 px both are equal.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

from ..arch import Arch, ArchError, Layer, attention, image_size, mlp

__all__ = ["Block", "Head", "NetworkDef", "PatchEmbed", "Reduction", "STEM_MID_CHANNELS", "head", "reduction", "stem"]

STEM_MID_CHANNELS = 24  # mid channels of patch embedding type 4

# Room for anything meant; an architecture may come from the net, so text and sizes are bounded before use.
_MAX_CHARS = 65536
_MAX_ENTRIES = 512
_MAX_SIZE = 1 << 16


@dataclass(frozen=True, slots=True)
class PatchEmbed:
    """Patch embedding: ``kind`` 0 (one convolution), 4 or 5 (convolutional stem of ``mid_dim`` channels)."""

    kind: int
    dim: int
    mid_dim: int = 0

    def to_def(self) -> tuple:
        return (5, self.dim, self.mid_dim) if self.kind == 5 else (self.kind, self.dim)


@dataclass(frozen=True, slots=True)
class Block:
    """Transformer block of width ``dim``; an absent block (``exists=False``) keeps its position."""

    dim: int
    num_heads: int
    head_dim: int
    mlp_hidden: int
    exists: bool = True

    @property
    def attn_dim(self) -> int:
        """Channels of the concatenated heads."""
        return self.num_heads * self.head_dim

    def to_def(self) -> tuple:
        return 1, (self.dim, self.num_heads, self.head_dim), (self.dim, self.mlp_hidden), int(self.exists)


@dataclass(frozen=True, slots=True)
class Reduction:
    """Residual spatial reduction: half the side, ``in_dim`` to ``out_dim`` channels."""

    in_dim: int
    out_dim: int

    def to_def(self) -> tuple:
        return 3, self.in_dim, self.out_dim


@dataclass(frozen=True, slots=True)
class Head:
    """Classifier on the last width."""

    dim: int
    num_classes: int

    def to_def(self) -> tuple:
        return 2, self.dim, self.num_classes


Entry: TypeAlias = PatchEmbed | Block | Reduction | Head


@dataclass(frozen=True, slots=True)
class NetworkDef(Arch):
    """An architecture of the ViT-ResNAS family.

    ``blocks`` holds transformer blocks and reductions in order, so that ``blocks[i]`` is the model's ``blocks.i``. The
    head's number of classes is the entry point's default; inside a search space it is the space's.

    Raises:
        ArchError: The widths of neighbouring entries differ, or a size is out of range.
    """

    model: ClassVar[str] = "vit_resnas"

    patch_embed: PatchEmbed
    blocks: tuple[Block | Reduction, ...]
    head: Head
    _key: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        dim = self.patch_embed.dim
        for i, block in enumerate(self.blocks):
            if isinstance(block, Reduction):
                if block.in_dim != dim:
                    raise ArchError(_mismatch(i + 1, block, "C_in", block.in_dim, dim))
                if block.out_dim < block.in_dim:
                    raise ArchError(
                        f"network_def entry {i + 1} {block.to_def()}: C_out {block.out_dim} is smaller than C_in "
                        f"{block.in_dim}; the residual path pads channels, so C_out must be at least C_in"
                    )
                dim = block.out_dim
            elif block.dim != dim:
                raise ArchError(_mismatch(i + 1, block, "embed_dim", block.dim, dim))
        if self.head.dim != dim:
            raise ArchError(_mismatch(len(self.blocks) + 1, self.head, "C", self.head.dim, dim))

    @classmethod
    def trusted(cls, patch_embed: PatchEmbed, blocks: tuple[Block | Reduction, ...], head: Head) -> NetworkDef:
        """As the constructor, for entries that fit by construction: a third of the time of drawing goes into checks."""
        arch = object.__new__(cls)
        for name, value in (("patch_embed", patch_embed), ("blocks", blocks), ("head", head), ("_key", "")):
            object.__setattr__(arch, name, value)
        return arch

    # -- parsing and printing -----------------------------------------------------------------------------------

    @classmethod
    def from_network_def(cls, network_def: Any) -> NetworkDef:
        """Parse the paper's form: nested tuples or lists, the same as a string, or a `NetworkDef` (returned as it is).

        Raises:
            ArchError: With the index of the offending entry and what was expected there.
        """
        if isinstance(network_def, cls):
            return network_def
        if isinstance(network_def, str):
            network_def = _parse_text(network_def)
        if not isinstance(network_def, Sequence) or isinstance(network_def, str | bytes):
            raise ArchError(f"network_def must be a tuple of entries or its string, got {type(network_def).__name__}")
        if not 2 <= len(network_def) <= _MAX_ENTRIES:
            raise ArchError(
                f"network_def has {len(network_def)} entries; expected a patch embedding, blocks and a head "
                f"(2 to {_MAX_ENTRIES} entries)"
            )
        last = len(network_def) - 1
        entries = [_parse_entry(i, e, first=i == 0, last=i == last) for i, e in enumerate(network_def)]
        return cls(entries[0], tuple(entries[1:-1]), entries[-1])

    def to_network_def(self) -> tuple:
        """The paper's form, as nested tuples."""
        return (self.patch_embed.to_def(), *(b.to_def() for b in self.blocks), self.head.to_def())

    def args(self) -> dict[str, Any]:
        """``{"network_def": nested lists}``."""
        return {"network_def": _as_lists(self.to_network_def())}

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> NetworkDef:
        """See `Arch.from_args`."""
        if "network_def" not in args:
            raise ArchError(f"{cls.model} is described by network_def; got {', '.join(map(str, args)) or 'nothing'}")
        return cls.from_network_def(args["network_def"])

    @classmethod
    def parse(cls, value: Any) -> NetworkDef:
        """See `Arch.parse`; the paper's form and its string are read as well."""
        if isinstance(value, Sequence):
            return cls.from_network_def(value)
        return super(NetworkDef, cls).parse(value)

    def __str__(self) -> str:
        return str(self.to_network_def()).replace(" ", "")

    # -- identities -----------------------------------------------------------------------------------------------

    def key(self) -> str:
        """Identity as a sub-network of a supernet: positions kept, genes of absent blocks erased.

        Architectures that select the same weights of a supernet have the same key: the genes of an absent block
        decide nothing. Sortable and JSON-plain.
        """
        if not self._key:
            entries = [self.patch_embed, *self.blocks, self.head]
            absent = [isinstance(e, Block) and not e.exists for e in entries]
            parts = [(1, e.dim, 0) if gone else e.to_def() for e, gone in zip(entries, absent, strict=True)]
            object.__setattr__(self, "_key", "|".join(map(str, parts)).replace(" ", ""))
        return self._key

    def canonical(self) -> NetworkDef:
        """The stand-alone network: absent blocks deleted.

        Two architectures compute the same function family when their canonical forms are equal, even where their
        keys (which weights of a supernet they use) differ.
        """
        return replace(self, blocks=tuple(b for b in self.blocks if not (isinstance(b, Block) and not b.exists)))

    def with_num_classes(self, num_classes: int) -> NetworkDef:
        """The same architecture with another classifier size."""
        return replace(self, head=Head(self.head.dim, num_classes))

    # -- costs ----------------------------------------------------------------------------------------------------

    def layers(
        self,
        *,
        img_size: int | Iterable[int] = 224,
        patch_size: int = 14,
        in_chans: int = 3,
        num_classes: int | None = None,
        distill_token: bool = False,
        **_: Any,
    ) -> tuple[Layer, ...]:
        """The stem, both halves of each present block, the reductions and the head, in the order of the forward.

        Args:
            img_size: Side of the square image, or (height, width), in pixels.
            patch_size: Side of a patch of the first stage, in pixels.
            in_chans: Channels of the image.
            num_classes: Size of a classifier; None takes the head's number, 0: no classifier.
            distill_token: Count the distillation token and its classifier.

        Raises:
            ArchError: The total stride does not divide ``img_size``, or another argument is out of range.
        """
        classes = self.head.num_classes if num_classes is None else num_classes
        for name, value, low in (("patch_size", patch_size, 1), ("in_chans", in_chans, 1), ("num_classes", classes, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ArchError(f"{name} must be an integer of at least {low}, got {value!r}")
        grids = self.grids(image_size(img_size), patch_size)
        positions = [height * width for height, width in grids]
        prefix, stage, entry = 1 + bool(distill_token), 0, self.patch_embed
        layers = [stem(entry.kind, entry.mid_dim, in_chans, patch_size, positions[0], prefix, entry.dim)]
        for block in self.blocks:
            if isinstance(block, Reduction):
                stage += 1
                layers.append(reduction(positions[stage], prefix, block.in_dim, block.out_dim))
            elif block.exists:
                tokens = positions[stage] + prefix
                layers.append(attention(tokens, block.dim, block.num_heads, block.head_dim))
                layers.append(mlp(tokens, block.dim, block.mlp_hidden))
        return (*layers, head(positions[-1], prefix, self.head.dim, classes))

    # -- shape ----------------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    @property
    def num_reductions(self) -> int:
        """Number of spatial reductions; the total stride is ``patch_size * 2**num_reductions``."""
        return sum(isinstance(b, Reduction) for b in self.blocks)

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """Width of each stage."""
        return (self.patch_embed.dim, *(b.out_dim for b in self.blocks if isinstance(b, Reduction)))

    @property
    def stages(self) -> tuple[tuple[Block, ...], ...]:
        """Transformer blocks of each stage, absent ones included."""
        stages: list[list[Block]] = [[]]
        for block in self.blocks:
            if isinstance(block, Reduction):
                stages.append([])
            else:
                stages[-1].append(block)
        return tuple(map(tuple, stages))

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of present transformer blocks of each stage."""
        return tuple(sum(b.exists for b in stage) for stage in self.stages)

    def total_stride(self, patch_size: int) -> int:
        """Pixels of the image per position of the last stage."""
        return patch_size * 2**self.num_reductions

    def grids(self, img_size: int | Iterable[int], patch_size: int) -> tuple[tuple[int, int], ...]:
        """Height and width of the patch grid of each stage.

        Raises:
            ArchError: ``patch_size`` is not usable, or ``img_size`` is not a multiple of the total stride.
        """
        height, width = image_size(img_size)
        if patch_size < 1 or (self.patch_embed.kind and patch_size % 2):
            raise ArchError(f"patch_size {patch_size}: the convolutional stem halves it, so it must be even")
        stride = self.total_stride(patch_size)
        if height % stride or width % stride:
            near = [max(stride, round(s / stride) * stride) for s in (height, width)]
            raise ArchError(
                f"img_size {height}x{width} is not a multiple of the total stride {stride} (patch_size {patch_size} "
                f"x {2**self.num_reductions} for {self.num_reductions} spatial reductions); the nearest that is: "
                f"{near[0]}x{near[1]}"
            )
        return tuple((height // patch_size >> i, width // patch_size >> i) for i in range(self.num_reductions + 1))


@lru_cache(maxsize=1 << 14)
def stem(kind: int, mid_dim: int, in_chans: int, patch_size: int, positions: int, prefix: int, dim: int) -> Layer:
    """Patch embedding of a type, prefix tokens and position embedding."""
    shape = dict(type=kind, mid_dim=mid_dim, in_chans=in_chans, patch_size=patch_size)
    tokens = dim * (positions + prefix)
    peak = dim * positions + 2 * tokens  # adding the position embedding
    if kind:
        # three convolutions without bias at half the image's side, each with a batch norm, then the patch projection
        kernels = in_chans * mid_dim * 9 + 2 * mid_dim * mid_dim * 9
        area, patch = positions * patch_size**2 // 4, mid_dim * (patch_size // 2) ** 2
        macs, params = kernels * area, kernels + 3 * 2 * mid_dim
        peak = max(peak, 4 * mid_dim * area, mid_dim * area + dim * positions)
    else:
        macs, params, patch = 0, 0, in_chans * patch_size**2
    macs += dim * patch * positions
    params += dim * (patch + 1) + dim * (2 * prefix + positions)
    return Layer.of(
        "stem", **shape, tokens=positions + prefix, prefix=prefix, dim=dim, macs=macs, params=params, memory=peak
    )


@lru_cache(maxsize=1 << 14)
def reduction(positions: int, prefix: int, in_dim: int, out_dim: int) -> Layer:
    """Residual spatial reduction to ``positions`` patches."""
    before, after = in_dim * (4 * positions + prefix), out_dim * (positions + prefix)
    tokens, patches = out_dim * prefix, out_dim * positions
    pooled, shortcut = in_dim * positions, in_dim * (positions + prefix)
    return Layer.of(
        "reduction",
        tokens=positions + prefix,
        prefix=prefix,
        in_dim=in_dim,
        out_dim=out_dim,
        macs=in_dim * out_dim * (9 * positions + prefix),
        # layer norm, convolution, token projection, position embedding
        params=in_dim * out_dim * 10 + 2 * in_dim + out_dim * (2 + positions),
        memory=max(
            # convolution: input, norm, prefix tokens, the map in its own memory, patches
            2 * before + tokens + 4 * in_dim * positions + patches,
            # joining prefix tokens and patches: input, norm, both, their parts before the position embedding
            2 * before + tokens + 2 * patches + after,
            # adding the residual: input, both parts, pooled and padded residual, both terms and the sum
            before + tokens + patches + pooled + shortcut + 3 * after,
        ),
    )


@lru_cache(maxsize=1 << 14)
def head(positions: int, prefix: int, dim: int, num_classes: int) -> Layer:
    """Final norm and a classifier for each prefix token; a distilled network also makes their sum and mean."""
    return Layer.of(
        "head",
        tokens=positions + prefix,
        prefix=prefix,
        dim=dim,
        num_classes=num_classes,
        macs=dim * num_classes * prefix,
        params=2 * dim + (dim + 1) * num_classes * prefix,
        memory=dim * (positions + prefix) + num_classes * (1 if prefix == 1 else 4),
    )


def _as_lists(value: Any) -> Any:
    return [_as_lists(v) for v in value] if isinstance(value, tuple) else value


_FORMS = {
    0: "(0, C)",
    4: "(4, C)",
    5: "(5, C, mid)",
    1: "(1, (C, heads, head_dim), (C, mlp_hidden), exists)",
    3: "(3, C_in, C_out)",
    2: "(2, C, num_classes)",
}


def _parse_text(text: str) -> Any:
    if len(text) > _MAX_CHARS:
        raise ArchError(f"network_def text has {len(text)} characters; at most {_MAX_CHARS} are read")
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        short = text if len(text) <= 80 else text[:77] + "..."
        raise ArchError(f"network_def text is not a nested tuple or list of integers: {short!r}") from None


def _parse_entry(i: int, entry: Any, *, first: bool, last: bool) -> Entry:
    def fail(why: str) -> ArchError:
        text = repr(entry)
        return ArchError(f"network_def entry {i} {text if len(text) <= 80 else text[:77] + '...'}: {why}")

    def size(value: Any, name: str, minimum: int = 1) -> int:
        # bool is an int to Python, but a width of True is a mistake
        if isinstance(value, bool) or not isinstance(value, int):
            raise fail(f"{name} must be an integer, got {value!r:.40}")
        if not minimum <= value <= _MAX_SIZE:
            raise fail(f"{name} must be between {minimum} and {_MAX_SIZE}, got {str(value)[:40]}")
        return value

    def length(value: Any, n: int, kind: int) -> None:
        if not isinstance(value, list | tuple) or len(value) != n:
            raise fail(f"expected {_FORMS[kind]}")

    if not isinstance(entry, list | tuple) or not entry:
        raise fail("an entry is a tuple that starts with its type, one of " + ", ".join(_FORMS.values()))
    kind = entry[0]
    if isinstance(kind, bool) or not isinstance(kind, int) or kind not in _FORMS:
        raise fail("unknown type; expected one of " + ", ".join(_FORMS.values()))
    if first != (kind in (0, 4, 5)):
        raise fail("a patch embedding (type 0, 4 or 5) must be the first entry and stand nowhere else")
    if last != (kind == 2):
        raise fail("a head (2, C, num_classes) must be the last entry and stand nowhere else")

    if kind in (0, 4):
        length(entry, 2, kind)
        return PatchEmbed(kind, size(entry[1], "C"), STEM_MID_CHANNELS if kind == 4 else 0)
    if kind == 5:
        length(entry, 3, kind)
        return PatchEmbed(kind, size(entry[1], "C"), size(entry[2], "mid"))
    if kind == 3:
        length(entry, 3, kind)
        return Reduction(size(entry[1], "C_in"), size(entry[2], "C_out"))
    if kind == 2:
        length(entry, 3, kind)
        return Head(size(entry[1], "C"), size(entry[2], "num_classes", minimum=0))
    length(entry, 4, kind)
    length(entry[1], 3, kind)
    length(entry[2], 2, kind)
    dim = size(entry[1][0], "C")
    if size(entry[2][0], "C of the MLP") != dim:
        raise fail(f"C of the MLP is {entry[2][0]}, expected C of the attention, {dim}")
    exists = size(entry[3], "exists", minimum=0) if not isinstance(entry[3], bool) else int(entry[3])
    if exists > 1:
        raise fail(f"exists must be 0 or 1, got {exists}")
    return Block(
        dim, size(entry[1][1], "heads"), size(entry[1][2], "head_dim"), size(entry[2][1], "mlp_hidden"), bool(exists)
    )


def _mismatch(i: int, entry: Entry, name: str, got: int, expected: int) -> str:
    return f"network_def entry {i} {entry.to_def()}: {name} is {got}, expected {expected} from the entry before it"
