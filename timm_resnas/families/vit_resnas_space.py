"""Search spaces of the ViT-ResNAS family.

Paper: "Searching for Efficient Multi-Stage Vision Transformers" - https://arxiv.org/abs/2109.00642

A space is written as in the released code: the largest network's ``network_def`` and, beside each of its entries, what
may be chosen there (``num_channels_to_keep``):

=====================  ========================================================================================
patch embedding        list of embed widths of the first stage
transformer block      ``dict(attn=[channels of all heads, ...], mlp=[hidden units, ...], layer=None)``; with
                       ``layer=[C, C, 0, 0]`` the block is removable: absent with probability 1/2
reduction              list of embed widths of the next stage
head                   ``None``
=====================  ========================================================================================

An embed width holds for its whole stage. A removable block directly after an absent removable block is absent as well
(the paper's cascade). The genes of absent blocks decide nothing, so every architecture made here has them at the
block's maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from ..arch import Layer, attention, image_size, mlp
from ..models.network_def import Block, Head, NetworkDef, PatchEmbed, Reduction, head, reduction, stem
from ..nas.space import MAX_CHOICES, Gene, Position, SearchSpace

__all__ = ["VitResNasSpace"]

_RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


class VitResNasSpace(SearchSpace):
    """Sub-networks of one largest ViT-ResNAS network.

    Rows hold the heads of each block, the hidden units of each block, the width of each stage, the presence of each
    block; training draws in network order.

    Args:
        network_def: The largest network, in any form that `NetworkDef.from_network_def` reads.
        num_channels_to_keep: Choices per entry, see the module's text.
        **model_args: Arguments that models of the space are built with: ``img_size``, ``patch_size``, ``in_chans``,
            ``num_classes``, ``distill_token``, ``patch_head`` and drop rates. An explicit ``num_classes`` replaces
            the head's number.

    Raises:
        ValueError: The choices do not fit the network (`ArchError` for the network itself); the message names the
            entry.
    """

    family = "vit_resnas"
    arch_type = NetworkDef
    scales = True
    supernet = "vit_resnas_supernet"
    training_args = ("patch_head", *_RATES)
    largest: NetworkDef
    smallest: NetworkDef

    def __init__(self, network_def: Any, num_channels_to_keep: Sequence, **model_args: Any) -> None:
        arch = NetworkDef.from_network_def(network_def)
        if model_args.get("num_classes") is None:
            model_args["num_classes"] = arch.num_classes
        model_args = _check_model_args({**_DEFAULT_ARGS, **model_args})
        arch = arch.with_num_classes(model_args["num_classes"])
        choices = _check_choices(arch, num_channels_to_keep)
        grids = arch.grids(model_args["img_size"], model_args["patch_size"])
        areas, prefix = [h * w for h, w in grids], 1 + model_args["distill_token"]
        embed, patch_size, in_chans = arch.patch_embed, model_args["patch_size"], model_args["in_chans"]
        self._arch, self._choices = arch, choices

        nb = sum(isinstance(entry, Block) for entry in arch.blocks)
        width, exists = 2 * nb, 2 * nb + arch.num_reductions + 1  # first columns
        genes: dict[int, Gene] = {width: Gene("embed_dim", tuple(choices[0]), kind="width", odds=(0.0, 1.0))}
        positions = [
            Position((width,), lambda dim: stem(embed.kind, embed.mid_dim, in_chans, patch_size, areas[0], prefix, dim))
        ]
        # the columns that decide each entry, and the entry made of their indices
        self._entries = [((width,), lambda dim: PatchEmbed(embed.kind, dim, embed.mid_dim))]
        order, b, s = [width], 0, 0
        for i, entry in enumerate(arch.blocks, start=1):
            if isinstance(entry, Reduction):
                s += 1
                genes[width + s] = Gene("embed_dim", tuple(choices[i]), kind="width", odds=(0.0, 1.0), stage=s)
                columns = (width + s - 1, width + s)
                positions.append(Position(columns, partial(reduction, areas[s], prefix)))
                self._entries.append((columns, Reduction))
                order.append(width + s)
                continue
            layer, head_dim, tokens = choices[i]["layer"], entry.head_dim, areas[s] + prefix
            columns = (b, nb + b, width + s, exists + b)
            # Odds of a step down (released code): at first a block, then attention or MLP; later any entry, and for
            # removable blocks attention, MLP or a draw from the layer list, which removes it or does nothing.
            owned = dict(presence=exists + b, odds=(1.0, 1 / 3 if layer else 1 / 2), stage=s)
            genes[b] = Gene("num_heads", tuple(a // head_dim for a in choices[i]["attn"]), **owned)
            genes[nb + b] = Gene("mlp_hidden", tuple(choices[i]["mlp"]), **owned)
            absent = tuple(int(value == 0) for value in layer) if layer else (0,)
            # removable, as the one directly before it in the stage
            linked = layer and isinstance(arch.blocks[i - 2], Block) and i > 1 and choices[i - 1]["layer"]
            genes[exists + b] = Gene(
                "exists",
                (True, False) if layer else (True,),
                kind="presence",
                entries=absent,
                follows=exists + b - 1 if linked else None,
                odds=(0.0, absent.count(1) / len(absent) / 3),
                stage=s,
            )
            positions.append(Position((b, width + s, exists + b), _attention_layer(tokens, head_dim)))
            positions.append(Position((nb + b, width + s, exists + b), _mlp_layer(tokens)))
            self._entries.append((columns, _block_entry(head_dim)))
            order += (b, nb + b, exists + b)
            b += 1
        positions.append(Position((width + s,), lambda dim: head(areas[-1], prefix, dim, arch.num_classes)))
        self._entries.append(((width + s,), lambda dim: Head(dim, arch.num_classes)))

        genes_in_order = [genes[column] for column in range(len(genes))]
        self._makers = [
            (itemgetter(*columns), _Interned(make, [genes_in_order[c].choices for c in columns]))
            for columns, make in self._entries
        ]
        super().__init__(genes_in_order, positions, model_args, order)

    def choices_dict(self) -> dict[str, Any]:
        """``network_def`` and ``num_channels_to_keep``."""
        return {"network_def": self._arch.to_network_def(), "num_channels_to_keep": self._choices}

    @classmethod
    def from_choices(cls, data: Mapping[str, Any], model_args: Mapping[str, Any]) -> VitResNasSpace:
        """See `SearchSpace.from_choices`."""
        if set(data) != {"network_def", "num_channels_to_keep"}:
            got = ", ".join(map(str, list(data)[:8]))
            raise ValueError(f"a ViT-ResNAS space has network_def and num_channels_to_keep; got {got:.200}")
        return cls(data["network_def"], data["num_channels_to_keep"], **model_args)

    @classmethod
    def reads(cls, data: Mapping[str, Any]) -> bool:
        """See `SearchSpace.reads`; the first supernets were published without a family."""
        return data.get("family", cls.family) == cls.family and "network_def" in data

    def decode(self, rows: np.ndarray) -> list[NetworkDef]:
        """See `SearchSpace.decode`."""
        archs = []
        for start in range(0, len(rows), 1024):  # lists of integers take many times the room of rows
            for row in rows[start : start + 1024].tolist():
                entries = [made[genes(row)] for genes, made in self._makers]
                archs.append(NetworkDef.trusted(entries[0], tuple(entries[1:-1]), entries[-1]))
        return archs

    def encode(self, arch: NetworkDef) -> np.ndarray:
        """See `SearchSpace.encode`. The head's number of classes is the space's, whatever the architecture says."""
        own = self._arch
        if not isinstance(arch, NetworkDef):
            raise ValueError(f"expected a NetworkDef, got {type(arch).__name__}; use NetworkDef.from_network_def")
        if [type(b) for b in arch.blocks] != [type(b) for b in own.blocks]:
            raise ValueError(
                f"the space's networks have {own.num_reductions + 1} stages of {_depth_text(own)} blocks (absent ones "
                f"are kept as entries with exists=0); this one has {_depth_text(arch)}"
            )
        if (arch.patch_embed.kind, arch.patch_embed.mid_dim) != (own.patch_embed.kind, own.patch_embed.mid_dim):
            raise ValueError(f"entry 0 is {arch.patch_embed.to_def()}, the space has {own.patch_embed.to_def()}")
        row = [0] * len(self.genes)
        row[self._entries[0][0][0]] = self._find(self._entries[0][0][0], 0, arch.patch_embed.dim)
        for i, entry in enumerate(arch.blocks, start=1):
            columns = self._entries[i][0]
            if type(entry) is not Block:
                row[columns[1]] = self._find(columns[1], i, entry.out_dim)
                continue
            heads, hidden, _, exists = columns
            follows = self.genes[exists].follows
            if entry.exists:
                if entry.head_dim != own.blocks[i - 1].head_dim:
                    raise ValueError(f"entry {i} has head_dim {entry.head_dim}, the space {own.blocks[i - 1].head_dim}")
                if follows is not None and row[follows]:
                    raise ValueError(f"entry {i} must be absent: the removable block before it is")
                row[heads] = self._find(heads, i, entry.num_heads)
                row[hidden] = self._find(hidden, i, entry.mlp_hidden)
            elif len(self.genes[exists].choices) == 1:
                raise ValueError(f"entry {i} is absent, but the space cannot remove it")
            else:
                row[exists] = 1
        return np.array(row, np.int8)

    def _find(self, column: int, entry: int, value: int) -> int:
        gene = self.genes[column]
        try:
            return gene.choices.index(value)
        except ValueError:
            known = ", ".join(map(str, gene.choices))
            raise ValueError(f"entry {entry}: {gene.name} {value} is not one of the space's choices {known}") from None


class _Interned(dict):
    """Indices of an entry's genes -> the entry, made once."""

    def __init__(self, make: Callable[..., Any], choices: Sequence[tuple]) -> None:
        super().__init__()
        self._make, self._choices = make, choices

    def __missing__(self, indices: int | tuple[int, ...]) -> Any:
        each = indices if isinstance(indices, tuple) else (indices,)
        entry = self[indices] = self._make(*(c[i] for c, i in zip(self._choices, each, strict=True)))
        return entry


def _block_entry(head_dim: int) -> Callable[..., Block]:
    return lambda heads, hidden, dim, exists: Block(dim, heads, head_dim, hidden, exists)


def _attention_layer(tokens: int, head_dim: int) -> Callable[..., Layer | None]:
    return lambda heads, dim, exists: attention(tokens, dim, heads, head_dim) if exists else None


def _mlp_layer(tokens: int) -> Callable[..., Layer | None]:
    return lambda hidden, dim, exists: mlp(tokens, dim, hidden) if exists else None


def _depth_text(arch: NetworkDef) -> str:
    return "-".join(str(len(stage)) for stage in arch.stages)


# -- checking ---------------------------------------------------------------------------------------------------------


_DEFAULT_ARGS = {"img_size": 224, "patch_size": 14, "in_chans": 3, "distill_token": False}
_KNOWN_ARGS = (*_DEFAULT_ARGS, "num_classes", "patch_head", *_RATES)


def _integer(value: Any, what: str, minimum: int = 1) -> int:
    value = value.item() if isinstance(value, np.integer) else value
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= 1 << 16:
        raise ValueError(f"{what} must be an integer from {minimum} to {1 << 16}, got {value!r:.40}")
    return value


def _check_model_args(args: dict[str, Any]) -> dict[str, Any]:
    clean: dict[str, Any] = {}
    for name, value in args.items():
        if name not in _KNOWN_ARGS:
            raise ValueError(f"unknown model argument {name!r} of a search space; known: {', '.join(_KNOWN_ARGS)}")
        if name == "img_size":
            clean[name] = tuple(_integer(side, name) for side in image_size(value))
        elif name in ("distill_token", "patch_head"):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r:.40}")
            clean[name] = value
        elif name in _RATES:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{name} must be a number from 0 to below 1, got {value!r:.40}")
            clean[name] = float(value)
        else:
            clean[name] = _integer(value, name, minimum=0 if name == "num_classes" else 1)
    return clean


def _check_choices(arch: NetworkDef, choices: Any) -> list[Any]:
    """The choices as lists of integers, largest first, checked against the largest network."""
    entries = [arch.patch_embed, *arch.blocks, arch.head]
    if not isinstance(choices, list | tuple) or len(choices) != len(entries):
        got = f"{len(choices)} entries" if isinstance(choices, list | tuple) else type(choices).__name__
        raise ValueError(
            f"num_channels_to_keep must have one entry for each of network_def's {len(entries)}, got {got}"
        )
    clean: list[Any] = []
    widths: list[list[int]] = []
    for i, (entry, choice) in enumerate(zip(entries, choices, strict=True)):
        where = f"num_channels_to_keep entry {i}"
        if isinstance(entry, Head):
            if choice is not None:
                raise ValueError(f"{where} belongs to the head and must be None, got {choice!r:.40}")
            clean.append(None)
        elif isinstance(entry, Block):
            if not entry.exists:
                raise ValueError(
                    f"network_def entry {i} {entry.to_def()} is absent; the largest network has all blocks"
                )
            if not isinstance(choice, Mapping) or set(choice) != {"attn", "mlp", "layer"}:
                raise ValueError(
                    f"{where} belongs to a block and must be a dict of attn, mlp, layer; got {choice!r:.80}"
                )
            attn = _check_list(choice["attn"], f"attn of {where}", entry.attn_dim)
            if any(a % entry.head_dim for a in attn):
                raise ValueError(f"attn of {where} must hold multiples of head_dim {entry.head_dim}, got {attn}")
            mlp = _check_list(choice["mlp"], f"mlp of {where}", entry.mlp_hidden)
            layer = choice["layer"]
            if layer is not None:
                layer = _check_list(layer, f"layer of {where}", entry.dim, depth=True)
                layer = layer if 0 in layer else None
            clean.append({"attn": attn, "mlp": mlp, "layer": layer})
        else:
            width = entry.dim if isinstance(entry, PatchEmbed) else entry.out_dim
            widths.append(_check_list(choice, where, width))
            if len(widths) > 1 and widths[-1][-1] < widths[-2][0]:
                raise ValueError(
                    f"{where}: width {widths[-1][-1]} is smaller than the {widths[-2][0]} of the stage before; a "
                    f"reduction never narrows"
                )
            clean.append(widths[-1])
    return clean


def _check_list(values: Any, where: str, largest: int, depth: bool = False) -> list[int]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= MAX_CHOICES:
        raise ValueError(f"{where} must be a list of 1 to {MAX_CHOICES} integers, got {values!r:.80}")
    clean = sorted((_integer(v, f"a value in {where}", minimum=0 if depth else 1) for v in values), reverse=True)
    if clean[0] != largest:
        raise ValueError(f"{where}: the largest choice is {clean[0]}, but network_def has {largest}")
    if depth and set(clean) - {0, largest}:
        raise ValueError(f"{where} must hold {largest} (present) and 0 (absent) only, got {clean}")
    if not depth and len(set(clean)) != len(clean):
        raise ValueError(f"{where} holds a choice twice: {clean}")
    return clean


# -- presets ----------------------------------------------------------------------------------------------------------


def _stages(
    stem: tuple[int, ...],
    widths: Sequence[Sequence[int]],
    head_dims: Sequence[int],
    heads: Sequence[Sequence[int]],
    hidden: Sequence[Sequence[int]],
    depths: Sequence[int],
    removable: Sequence[Sequence[int]],
    num_classes: int,
) -> tuple[list[Any], list[Any]]:
    """Network and choices of a space that has the same choices in every block of a stage.

    Args:
        stem: Type of the patch embedding, and for type 5 its mid channels.
        removable: Per stage the blocks, counted from 1, that may be absent (in half of the draws).
    """
    network: list[Any] = [(stem[0], widths[0][0], *stem[1:])]
    choices: list[Any] = [list(widths[0])]
    for s, width in enumerate(widths):
        dim, head_dim = width[0], head_dims[s]
        if s:
            network.append((3, widths[s - 1][0], dim))
            choices.append(list(width))
        for b in range(1, depths[s] + 1):
            network.append((1, (dim, max(heads[s]), head_dim), (dim, max(hidden[s])), 1))
            layer = [dim, dim, 0, 0] if b in removable[s] else None
            choices.append({"attn": [h * head_dim for h in heads[s]], "mlp": list(hidden[s]), "layer": layer})
    network.append((2, widths[-1][0], num_classes))
    choices.append(None)
    return network, choices


def _vit_resnas_tiny() -> tuple:
    """The paper's sr_tiny_mh."""
    space = _stages(
        stem=(4,),
        widths=[(256, 224, 192, 176, 160), (512, 448, 384, 352, 320), (1024, 896, 768, 704, 640)],
        head_dims=(32, 48, 64),
        heads=[(6, 5, 4, 3), (12, 10, 8, 6), (12, 10, 8, 6)],
        hidden=[range(768, 383, -64), range(1536, 767, -128), range(3072, 1535, -256)],
        depths=(6, 6, 6),
        removable=[(2, 4, 6)] * 3,
        num_classes=1000,
    )
    return *space, dict(img_size=224, patch_size=14, in_chans=3)


def _vit_resnas_small() -> tuple:
    """The paper's sr_small_mh, for Small and Medium."""
    space = _stages(
        stem=(4,),
        widths=[(320, 280, 240, 220, 200), (640, 560, 480, 440, 400), (1280, 1120, 960, 880, 800)],
        head_dims=(32, 48, 64),
        heads=[(8, 7, 6, 5), (16, 14, 12, 10), (16, 14, 12, 10)],
        hidden=[range(960, 479, -80), range(1920, 959, -160), range(3840, 1919, -320)],
        depths=(7, 7, 7),
        removable=[(2, 4, 6)] * 3,
        num_classes=1000,
    )
    return *space, dict(img_size=224, patch_size=14, in_chans=3)


def _mini() -> tuple:
    """Photographs of 64 to 128 px: stages of 12, 6 and 3 positions a side at 96 px."""
    space = _stages(
        stem=(4,),
        widths=[(128, 112, 96, 80, 64), (256, 224, 192, 160, 128), (384, 352, 320, 288, 256)],
        head_dims=(32, 32, 32),
        heads=[(4, 3, 2), (8, 6, 4, 3), (12, 10, 8, 6)],
        hidden=[range(384, 127, -64), range(768, 255, -128), range(1152, 383, -192)],
        depths=(4, 5, 4),
        removable=[(2, 4), (2, 4), (2, 4)],
        num_classes=1000,
    )
    return *space, dict(img_size=96, patch_size=8, in_chans=3)


def _micro() -> tuple:
    """Images of 32 px on a CPU: stages of 8, 4 and 2 positions a side; the stem is thin, for it is not searched."""
    space = _stages(
        stem=(5, 16),
        widths=[(64, 56, 48, 40, 32), (112, 96, 80, 64), (160, 144, 128, 112)],
        head_dims=(16, 16, 16),
        heads=[(4, 3, 2, 1), (7, 5, 4, 3, 2), (10, 8, 6, 4)],
        hidden=[range(192, 47, -48), range(336, 83, -84), range(480, 119, -120)],
        depths=(4, 4, 4),
        removable=[(2, 4), (2, 4), (2, 4)],
        num_classes=10,
    )
    return *space, dict(img_size=32, patch_size=4, in_chans=3)


def _preset(make: Callable[[], tuple]) -> Callable[..., VitResNasSpace]:
    def create(**model_args: Any) -> VitResNasSpace:
        network_def, choices, own_args = make()
        return VitResNasSpace(network_def, choices, **{**own_args, **model_args})

    return create


VitResNasSpace.presets = {
    "vit_resnas_tiny": _preset(_vit_resnas_tiny),
    "vit_resnas_small": _preset(_vit_resnas_small),
    "mini": _preset(_mini),
    "micro": _preset(_micro),
}
