"""Networks and search spaces of the AutoFormer family.

Paper: "AutoFormer: Searching Transformers for Visual Recognition" - https://arxiv.org/abs/2107.00651

One embedding width for the network, its depth, and MLP ratio and heads of each layer. The first layers are those that
a shallower network keeps; depth is drawn uniformly, as a chain of layers that may be absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np

from ..arch import Arch, Layer, image_size
from ..models.autoformer import (
    QKV_BIAS_LAYOUTS,
    WEIGHT_INITS,
    check_grid,
    check_layers,
    default_layers,
    mlp_hidden,
)
from ..nas.space import MAX_CHOICES, Gene, Position, SearchSpace

__all__ = ["AutoFormerArch", "AutoFormerSpace"]

_RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


# -- layers ------------------------------------------------------------------------------------------------------------


def _positions(height: int, width: int) -> int:
    """Values of 4 bytes of the relative positions, which are held during the forward; indices have two."""
    return (height * width + 1) * (3 * (height + width) + 1)


@lru_cache(maxsize=1 << 12)
def _stem(height: int, width: int, in_chans: int, patch_size: int, dim: int) -> Layer:
    """Patch embedding, class token, position embedding."""
    patches, weights = height * width, in_chans * patch_size**2
    return Layer.of(
        "stem",
        height=height,
        width=width,
        in_chans=in_chans,
        patch_size=patch_size,
        dim=dim,
        macs=dim * weights * patches,
        params=dim * (weights + patches + 3),
        # adding the position embedding: patches, with the class token, sum
        memory=dim * (3 * patches + 2),
    )


@lru_cache(maxsize=1 << 16)
def _attention(height: int, width: int, reach: int, head_dim: int, num_heads: int, dim: int) -> Layer:
    """Attention half of a block; ``reach`` is 0 without relative positions."""
    tokens, inner, pairs = height * width + 1, num_heads * head_dim, 4 if reach else 2
    memory = tokens * (2 * dim + 4 * inner)  # input, norm; query, key, value, heads
    if reach:
        places = height + width + 1
        # query, key, value and heads with a channel for each place; then tables in parts and joined, or the tables'
        # share of the output, or both and their sum
        memory += tokens * (3 * inner + 4 * num_heads * places) + max(
            head_dim * (1 + tokens * (2 * places - 1)), tokens * (places * head_dim + inner), 2 * tokens * inner
        )
    return Layer.of(
        "attention",
        height=height,
        width=width,
        reach=reach,
        dim=dim,
        num_heads=num_heads,
        head_dim=head_dim,
        # logits and output, and what relative positions add to both
        macs=inner * (4 * dim + pairs * tokens) * tokens,
        params=inner * (4 * dim + 3) + 3 * dim + (8 * (reach + 1) * head_dim if reach else 0),
        memory=memory + _positions(height, width),
    )


@lru_cache(maxsize=1 << 16)
def _mlp(height: int, width: int, hidden: int, dim: int) -> Layer:
    """MLP half of a block."""
    tokens = height * width + 1
    return Layer.of(
        "mlp",
        height=height,
        width=width,
        dim=dim,
        hidden=hidden,
        macs=2 * dim * hidden * tokens,
        params=hidden * (2 * dim + 1) + 3 * dim,
        # activation: input, sum, norm; hidden before and after. Output: input, sum, norm, output; hidden after
        memory=tokens * max(3 * dim + 2 * hidden, 4 * dim + hidden) + _positions(height, width),
    )


@lru_cache(maxsize=1 << 12)
def _head(height: int, width: int, num_classes: int, dim: int) -> Layer:
    """Final norm and classifier."""
    tokens = height * width + 1
    return Layer.of(
        "head",
        height=height,
        width=width,
        num_classes=num_classes,
        dim=dim,
        macs=dim * num_classes,
        params=2 * dim + (dim + 1) * num_classes,
        memory=2 * dim * tokens + _positions(height, width),
    )


# -- networks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AutoFormerArch(Arch):
    """A network of the family.

    Attributes:
        embed_dim: Channels of all layers.
        mlp_ratio: Hidden units of each layer's MLP per channel; units are truncated to an integer.
        num_heads: Heads of each layer.
    """

    model: ClassVar[str] = "autoformer"
    embed_dim: int
    mlp_ratio: tuple[float, ...]
    num_heads: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.num_heads)

    def args(self) -> dict[str, Any]:
        """See `Arch.args`."""
        return {"embed_dim": self.embed_dim, "mlp_ratio": list(self.mlp_ratio), "num_heads": list(self.num_heads)}

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> AutoFormerArch:
        """See `Arch.from_args`; what is not given is that of the entry point."""
        names = ("embed_dim", "mlp_ratio", "num_heads", "depth")
        values = default_layers({name: args.get(name) for name in names})
        return cls(values["embed_dim"], *check_layers(**values))

    def layers(
        self,
        img_size: Any = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        head_dim: int = 64,
        rel_pos: bool = True,
        max_relative_position: int = 14,
        **_: Any,
    ) -> tuple[Layer, ...]:
        """See `Arch.layers`."""
        stem, attention, mlp, head = _makers(
            img_size, patch_size, in_chans, num_classes, head_dim, rel_pos, max_relative_position
        )
        dim = self.embed_dim
        pairs = zip(self.num_heads, self.mlp_ratio, strict=True)
        blocks = (
            layer for heads, ratio in pairs for layer in (attention(heads, dim), mlp(mlp_hidden(dim, ratio), dim))
        )
        return (stem(dim), *blocks, head(dim))


def _makers(
    img_size: Any, patch_size: int, in_chans: int, num_classes: int, head_dim: int, rel_pos: bool, reach: int
) -> tuple[Callable[..., Layer], ...]:
    """Stem by width, attention by heads and width, MLP by hidden units and width, head by width."""
    height, width = (side // patch_size for side in check_grid(image_size(img_size), patch_size))
    return (
        partial(_stem, height, width, in_chans, patch_size),
        partial(_attention, height, width, reach if rel_pos else 0, head_dim),
        partial(_mlp, height, width),
        partial(_head, height, width, num_classes),
    )


# -- spaces ------------------------------------------------------------------------------------------------------------


class AutoFormerSpace(SearchSpace):
    """Networks of one embedding width each, with their own heads and MLP ratio in each layer.

    Args:
        embed_dim: Widths of the network.
        depth: Numbers of layers.
        mlp_ratio: Choices of each layer's MLP ratio.
        num_heads: Choices of each layer's heads.
        allocated_dim: Width of a supernet's weights, the largest one where not given (the paper's are wider).
        **model_args: Arguments that models of the space are built with: ``img_size``, ``patch_size``, ``in_chans``,
            ``num_classes``, ``head_dim``, ``rel_pos``, ``max_relative_position``, ``qkv_bias_layout``, ``weight_init``,
            drop rates.

    Attributes:
        allocation: The network that holds the weights of all.

    Raises:
        ValueError: A list of choices is empty, too long, or holds a value twice or of another kind.
    """

    family = "autoformer"
    arch_type = AutoFormerArch
    supernet = "autoformer_supernet"
    scales = True
    training_args = ("qkv_bias_layout", "weight_init", *_RATES)
    largest: AutoFormerArch
    smallest: AutoFormerArch

    def __init__(
        self,
        embed_dim: Sequence[int],
        depth: Sequence[int],
        mlp_ratio: Sequence[float],
        num_heads: Sequence[int],
        allocated_dim: int | None = None,
        **model_args: Any,
    ) -> None:
        model_args = _check_model_args({**_DEFAULT_ARGS, **model_args})
        lists = dict(embed_dim=embed_dim, depth=depth, mlp_ratio=mlp_ratio, num_heads=num_heads)
        self._choices = {name: _check_choices(name, values) for name, values in lists.items()}
        widths, depths, ratios, heads = self._choices.values()
        for dim in widths:  # says what is wrong with a number
            check_layers(dim, ratios, 1)
        check_layers(widths[0], 1, heads)
        check_layers(widths[0], ratios[0], heads[0], depths[0])
        self._choices["allocated_dim"] = widths[0] if allocated_dim is None else allocated_dim
        self.allocation = AutoFormerArch.from_args(
            dict(embed_dim=self._choices["allocated_dim"], depth=depths[0], mlp_ratio=ratios[0], num_heads=heads[0])
        )
        if self.allocation.embed_dim < widths[0]:
            raise ValueError(f"allocated_dim {allocated_dim} is less than the largest embed_dim, {widths[0]}")

        named = ("head_dim", "rel_pos", "max_relative_position")
        size = ("img_size", "patch_size", "in_chans", "num_classes")
        stem, attention, mlp, head = _makers(*(model_args[name] for name in (*size, *named)))
        genes = [Gene("embed_dim", widths, kind="width", odds=(0.0, 1.0))]
        positions, presence = [Position((0,), stem)], None
        # columns of each layer: heads, MLP ratio, the presence that both follow
        self._columns: list[tuple[int, int, int | None]] = []
        for i in range(depths[0]):
            if i in depths:  # networks of i layers end here
                draws = (0,) * depths.index(i) + (1,)  # as often as each greater depth
                gene = Gene("exists", (True, False), kind="presence", entries=draws, follows=presence, stage=i)
                genes.append(gene)
                presence = len(genes) - 1
            column, whether = len(genes), () if presence is None else (presence,)
            genes += [
                Gene("num_heads", heads, presence=presence, stage=i),
                Gene("mlp_ratio", ratios, presence=presence, stage=i),
            ]
            positions.append(Position((column, 0, *whether), partial(_at, attention)))
            positions.append(Position((column + 1, 0, *whether), partial(_mlp_at, mlp)))
            self._columns.append((column, column + 1, presence))
        positions.append(Position((0,), head))
        super().__init__(genes, positions, model_args)

    def choices_dict(self) -> dict[str, Any]:
        """See `SearchSpace.choices_dict`."""
        return dict(self._choices)

    @classmethod
    def from_choices(cls, data: Mapping[str, Any], model_args: Mapping[str, Any]) -> AutoFormerSpace:
        """See `SearchSpace.from_choices`."""
        known = {"embed_dim", "depth", "mlp_ratio", "num_heads"}
        if not known <= set(data) <= known | {"allocated_dim"}:
            got = ", ".join(map(str, list(data)[:8]))
            raise ValueError(f"an AutoFormer space has embed_dim, depth, mlp_ratio and num_heads; got {got:.200}")
        return cls(**data, **model_args)

    def decode(self, rows: np.ndarray) -> list[AutoFormerArch]:
        """See `SearchSpace.decode`."""
        widths, _, ratios, heads, _ = self._choices.values()
        archs = []
        for row in rows.tolist():
            there = [(h, r) for h, r, p in self._columns if p is None or not row[p]]
            archs.append(
                AutoFormerArch(
                    widths[row[0]], tuple(ratios[row[r]] for _, r in there), tuple(heads[row[h]] for h, _ in there)
                )
            )
        return archs

    def encode(self, arch: AutoFormerArch) -> np.ndarray:
        """See `SearchSpace.encode`."""
        if not isinstance(arch, AutoFormerArch):
            raise ValueError(f"expected an AutoFormerArch, got {type(arch).__name__}; use AutoFormerArch.from_args")
        row = [0] * len(self.genes)
        row[0] = self._find("embed_dim", arch.embed_dim)
        self._find("depth", arch.depth)
        for i, (heads, ratio, presence) in enumerate(self._columns):
            if i < arch.depth:
                row[heads] = self._find("num_heads", arch.num_heads[i], f"layer {i}: ")
                row[ratio] = self._find("mlp_ratio", arch.mlp_ratio[i], f"layer {i}: ")
            else:
                row[presence] = 1
        return np.array(row, np.int8)

    def _find(self, name: str, value: float, where: str = "") -> int:
        choices = self._choices[name]
        if value not in choices:
            known = ", ".join(map(str, choices))
            raise ValueError(f"{where}{name} {value} is not one of the space's choices {known}")
        return choices.index(value)


def _at(attention: Callable[..., Layer], heads: int, dim: int, exists: bool = True) -> Layer | None:
    return attention(heads, dim) if exists else None


def _mlp_at(mlp: Callable[..., Layer], ratio: float, dim: int, exists: bool = True) -> Layer | None:
    return mlp(mlp_hidden(dim, ratio), dim) if exists else None


# -- checking ----------------------------------------------------------------------------------------------------------


_DEFAULT_ARGS = {
    **dict(img_size=224, patch_size=16, in_chans=3, num_classes=1000, head_dim=64, rel_pos=True),
    **dict(max_relative_position=14, qkv_bias_layout="prefix", weight_init=""),
}
_TEXTS = {"qkv_bias_layout": QKV_BIAS_LAYOUTS, "weight_init": WEIGHT_INITS}


def _check_model_args(args: dict[str, Any]) -> dict[str, Any]:
    clean: dict[str, Any] = {}
    for name, value in args.items():
        if name not in (*_DEFAULT_ARGS, *_RATES):
            known = ", ".join((*_DEFAULT_ARGS, *_RATES))
            raise ValueError(f"unknown model argument {name!r:.60} of a search space; known: {known}")
        if name == "img_size":
            good, want, value = True, "", image_size(value)
        elif name == "rel_pos":
            good, want = isinstance(value, bool), "true or false"
        elif name in _TEXTS:
            good, want = value in _TEXTS[name], " or ".join(map(repr, _TEXTS[name]))
        elif name in _RATES:
            good, want = _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"
        else:
            least = 0 if name == "num_classes" else 1
            good, want = _is_number(value, int) and least <= value <= 1 << 16, f"an integer from {least} to {1 << 16}"
        if not good:
            raise ValueError(f"{name} must be {want}, got {value!r:.40}")
        clean[name] = value
    return clean


def _is_number(value: Any, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_choices(name: str, values: Any) -> tuple:
    """Choices, largest first."""
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= MAX_CHOICES or not all(map(_is_number, values)):
        raise ValueError(f"{name} must be a list of 1 to {MAX_CHOICES} numbers, got {values!r:.80}")
    clean = sorted((float(v) if name == "mlp_ratio" else v for v in values), reverse=True)
    if len(set(clean)) != len(clean):
        raise ValueError(f"{name} holds a choice twice: {clean}")
    return tuple(clean)


# -- presets -----------------------------------------------------------------------------------------------------------


def _preset(choices: dict[str, Any], own_args: dict[str, Any]) -> Callable[..., AutoFormerSpace]:
    return lambda **model_args: AutoFormerSpace(**choices, **{**own_args, **model_args})


AutoFormerSpace.presets = {
    # the paper's
    "autoformer_tiny": _preset(
        dict(embed_dim=(240, 216, 192), depth=(14, 13, 12), mlp_ratio=(4, 3.5), num_heads=(4, 3), allocated_dim=256), {}
    ),
    "autoformer_small": _preset(
        dict(embed_dim=(448, 384, 320), depth=(14, 13, 12), mlp_ratio=(4, 3.5, 3), num_heads=(7, 6, 5)), {}
    ),
    "autoformer_base": _preset(
        dict(
            **dict(embed_dim=(624, 576, 528), depth=(16, 15, 14), mlp_ratio=(4, 3.5, 3), num_heads=(10, 9)),
            allocated_dim=640,
        ),
        {},
    ),
    # images of 32 px on a CPU: 4 patches a side
    "autoformer_micro": _preset(
        dict(embed_dim=(96, 80, 64, 48), depth=(6, 5, 4, 3), mlp_ratio=(4, 3, 2, 1), num_heads=(6, 5, 4, 3, 2)),
        dict(
            **dict(img_size=32, patch_size=8, num_classes=10, head_dim=16, max_relative_position=3),
            **dict(qkv_bias_layout="interleaved", weight_init="moco"),
        ),
    ),
}
