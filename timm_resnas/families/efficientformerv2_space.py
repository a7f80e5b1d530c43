"""Networks and search spaces of EfficientFormerV2.

Paper: "Rethinking Vision Transformers for MobileNet Size and Speed" - https://arxiv.org/abs/2212.08059. As in the paper
a network has a width for each stage, blocks that may be absent, and an expansion for each block's MLP; in a supernet
every block of the third and the fourth stage can attend. The authors released neither their supernet nor its choices:
widths and expansions of the presets are those of the published networks and some smaller ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np

from ..arch import Arch, Layer
from ..models.efficientformer_nas import (
    HEADS,
    KEY_DIM,
    STAGES,
    VALUE_DIM,
    check_depths,
    check_size,
    check_widths,
    plain_depths,
)
from ..models.efficientformerv2_nas import VIT_STAGES, check_num_vits, check_ratios, with_defaults
from .efficientformer_space import (
    DEFAULT_ARGS,
    MICRO_ARGS,
    RATES,
    Makers,
    StageSpace,
    assemble,
    check_keys,
    check_model_args,
    grids,
    head,
    hidden_units,
    reduction,
    stem,
    whole,
)

__all__ = ["EfficientFormerV2Arch", "EfficientFormerV2Space"]

DOWN_KEY_DIM, DOWN_VALUE_DIM = 16, 64  # of timm's attention between stages


# -- layers ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 16)
def attending_reduction(height: int, width: int, in_dim: int, dim: int) -> Layer:
    """Attention from a map to one of half its sides, beside a convolution of stride 2; to a map of this size."""
    area, keys, values = height * width, HEADS * DOWN_KEY_DIM, HEADS * DOWN_VALUE_DIM
    tokens = 4 * area
    return Layer.of(
        "attention_reduction",
        height=height,
        width=width,
        in_dim=in_dim,
        dim=dim,
        macs=9 * in_dim * dim * area  # convolution
        + in_dim * area * (9 + keys)  # queries
        + in_dim * tokens * (keys + values)
        + area * values * (9 + dim)  # local values, projection
        + area * tokens * (keys + values),
        params=dim * (9 * in_dim + 3)
        + in_dim * (10 + keys)
        + 3 * keys
        + in_dim * (keys + values)
        + 3 * (keys + values)
        + values * (12 + dim)
        + 3 * dim
        + HEADS * tokens,
        memory=area
        * (
            # image's map, convolution; query, keys, values, local values
            4 * in_dim
            + dim
            + 5 * (keys + values)
            # the weighted sum as it is, laid out anew, with local values; or logits before and after a step
            + max(3 * values + HEADS * tokens, 2 * HEADS * tokens)
        ),
    )


def _mlp(area: int, dim: int, hidden: int) -> tuple[int, int]:
    """(MACs, parameters) of the MLP with a depth-wise layer in its middle, and of its layer scale."""
    return area * hidden * (2 * dim + 9), hidden * (2 * dim + 15) + 4 * dim


@lru_cache(maxsize=1 << 16)
def convolving(height: int, width: int, hidden: int, dim: int) -> Layer:
    """Block of an MLP alone."""
    area = height * width
    macs, params = _mlp(area, dim, hidden)
    return Layer.of(
        "mlp_block",
        height=height,
        width=width,
        dim=dim,
        hidden=hidden,
        macs=macs,
        params=params,
        # the layer in the middle: hidden units before, convolved, normed, activated
        memory=area * max(dim + 4 * hidden, 3 * dim + hidden),
    )


@lru_cache(maxsize=1 << 16)
def attending(height: int, width: int, stride: int, hidden: int, dim: int) -> Layer:
    """Block of attention, on a map made smaller by the stride, and MLP."""
    area, keys, values = height * width, HEADS * KEY_DIM, HEADS * VALUE_DIM
    tokens = area // stride**2
    macs, params = _mlp(area, dim, hidden)
    macs += tokens * (2 * dim * keys + dim * values + 9 * values) + area * values * dim
    macs += tokens**2 * (keys + values + 2 * HEADS**2)
    params += (dim + 3) * (2 * keys + values) + 12 * values + dim * (values + 4)
    params += 2 * HEADS * (HEADS + 1) + HEADS * tokens
    # query, key, values, local values; then the weighted sum as it is, laid out anew and with local values, or enlarged
    # before and after activation, or logits before and after a step (and the smaller map)
    smaller, enlarged = (dim, 2 * stride**2 * values) if stride > 1 else (0, 3 * values)
    attention = 2 * keys + 2 * values + max(enlarged + HEADS * tokens, smaller + 2 * HEADS * tokens)
    if stride > 1:
        macs += 9 * dim * tokens
        params += 12 * dim
    return Layer.of(
        "attention_block_2d",
        height=height,
        width=width,
        stride=stride,
        dim=dim,
        hidden=hidden,
        macs=macs,
        params=params,
        memory=max(area * dim + tokens * attention, area * max(2 * dim + 4 * hidden, 4 * dim + hidden)),
    )


# -- networks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EfficientFormerV2Arch(Arch):
    """A network of the family.

    Attributes:
        embed_dims: Channels of each stage.
        depths: For each stage 1 for a block, 0 for one that its supernet has there and it has not.
        mlp_ratios: Hidden units per channel of each block that is there, truncated to an integer.
        num_vit: Blocks at the end of the third and of the fourth stage that attend.
    """

    model: ClassVar[str] = "efficientformerv2_nas"
    embed_dims: tuple[int, ...]
    depths: tuple[tuple[int, ...], ...]
    mlp_ratios: tuple[tuple[float, ...], ...]
    num_vit: tuple[int, ...]

    def args(self) -> dict[str, Any]:
        """See `Arch.args`."""
        return dict(
            depths=plain_depths(self.depths),
            embed_dims=list(self.embed_dims),
            mlp_ratios=[list(ratios) for ratios in self.mlp_ratios],
            num_vit=list(self.num_vit),
        )

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> EfficientFormerV2Arch:
        """See `Arch.from_args`; what is missing is that of the entry point."""
        args = with_defaults(args)
        depths = check_depths(args["depths"])
        counts = [sum(flags) for flags in depths]
        ratios, num_vit = check_ratios(args["mlp_ratios"], counts), check_num_vits(args["num_vit"], counts)
        return cls(check_widths(args["embed_dims"]), depths, ratios, num_vit)

    def canonical(self) -> EfficientFormerV2Arch:
        """See `Arch.canonical`."""
        return EfficientFormerV2Arch(self.embed_dims, whole(self.depths), self.mlp_ratios, self.num_vit)

    def layers(
        self, img_size: Any = 224, in_chans: int = 3, num_classes: int = 1000, distillation: bool = True, **_: Any
    ) -> tuple[Layer, ...]:
        """See `Arch.layers`."""
        makers = _makers(img_size, in_chans, num_classes, distillation)
        blocks = []
        for i, (make, dim, ratios) in enumerate(zip(makers.blocks, self.embed_dims, self.mlp_ratios, strict=True)):
            vits = dict(zip(VIT_STAGES, self.num_vit, strict=True)).get(i, 0)
            first = len(ratios) - vits
            blocks.append([partial(make, dim, ratio, attends=p >= first) for p, ratio in enumerate(ratios)])
        return assemble(makers, self.embed_dims, blocks)


def _block(grid: tuple[int, int], stride: int, dim: int, mlp_ratio: float, attends: bool) -> Layer:
    hidden = hidden_units(dim, mlp_ratio)
    return attending(*grid, stride, hidden, dim) if attends else convolving(*grid, hidden, dim)


def _makers(img_size: Any, in_chans: int, num_classes: int, distillation: bool) -> Makers:
    sizes = grids(img_size)
    return Makers(
        partial(stem, *check_size(img_size), in_chans, 3),  # timm's norm with activation holds its input as well
        [partial(attending_reduction if i >= 3 else reduction, *sizes[i]) for i in (1, 2, 3)],
        [partial(_block, grid, 2 if i == 2 else 1) for i, grid in enumerate(sizes)],
        partial(head, *sizes[-1], num_classes, 1 + distillation),
    )


# -- spaces ------------------------------------------------------------------------------------------------------------


class EfficientFormerV2Space(StageSpace):
    """EfficientFormerV2 networks.

    Args:
        embed_dims: Widths of each stage.
        depths: Most blocks of each stage.
        mlp_ratios: Choices of each block's MLP ratio in each stage.
        min_depths: Blocks of each stage that are always there, its first ones.
        num_vit: Most blocks of the third and of the fourth stage that attend; all of them where None.
        **model_args: Arguments that models of the space are built with: ``img_size``, ``in_chans``, ``num_classes``,
            ``distillation``, ``layer_scale_init_value``, drop rates.

    Raises:
        ValueError: See `StageSpace`; an argument is unknown or malformed.
    """

    family = "efficientformerv2"
    arch_type = EfficientFormerV2Arch
    supernet = "efficientformerv2_supernet"
    training_args = ("layer_scale_init_value", *RATES)
    vit_stages = VIT_STAGES
    largest: EfficientFormerV2Arch
    smallest: EfficientFormerV2Arch

    def __init__(
        self,
        embed_dims: Sequence[Sequence[int]],
        depths: Sequence[int],
        mlp_ratios: Sequence[Sequence[float]],
        min_depths: Sequence[int] = (1, 1, 1, 1),
        num_vit: Sequence[int] | None = None,
        **model_args: Any,
    ) -> None:
        args = check_model_args({**DEFAULT_ARGS, "distillation": True, **model_args})
        makers = _makers(*(args[name] for name in ("img_size", "in_chans", "num_classes", "distillation")))
        if num_vit is None and isinstance(depths, list | tuple) and len(depths) == STAGES:
            num_vit = [depths[i] for i in VIT_STAGES]
        if not isinstance(num_vit, list | tuple) or len(num_vit) != len(VIT_STAGES):
            raise ValueError(f"num_vit must be two numbers, of the stages 2 and 3, got {num_vit!r:.60}")
        super().__init__(embed_dims, depths, min_depths, num_vit, mlp_ratios, makers, args)

    def choices_dict(self) -> dict[str, Any]:
        """See `SearchSpace.choices_dict`."""
        return dict(
            embed_dims=[self.genes[c].choices for c in self.widths],
            depths=self.depths,
            mlp_ratios=self.mlp_ratios,
            min_depths=self.min_depths,
            num_vit=[self.most_vit[i] for i in VIT_STAGES],
        )

    @classmethod
    def from_choices(cls, data: Mapping[str, Any], model_args: Mapping[str, Any]) -> EfficientFormerV2Space:
        """See `SearchSpace.from_choices`."""
        needed = {"embed_dims", "depths", "mlp_ratios"}
        check_keys(data, needed, {"min_depths", "num_vit"}, "an EfficientFormerV2 space")
        return cls(**data, **model_args)

    def decode(self, rows: np.ndarray) -> list[EfficientFormerV2Arch]:
        """See `SearchSpace.decode`."""
        archs = []
        for row in rows.tolist():
            dims, depths, ratios, vits = zip(*self.stages_of(row), strict=True)
            archs.append(EfficientFormerV2Arch(dims, depths, ratios, tuple(vits[i] for i in VIT_STAGES)))
        return archs

    def encode(self, arch: Arch) -> np.ndarray:
        """See `SearchSpace.encode`."""
        if not isinstance(arch, EfficientFormerV2Arch):
            raise ValueError(f"expected an EfficientFormerV2Arch, got a {type(arch).__name__}")
        num_vits = dict(zip(VIT_STAGES, arch.num_vit, strict=True))
        return self.row_of(arch.embed_dims, arch.depths, num_vits, arch.mlp_ratios)


EfficientFormerV2Space.presets = {
    # S0, S1, S2 and L among them
    "efficientformerv2": partial(
        EfficientFormerV2Space,
        embed_dims=[[40, 32], [80, 64, 48], [192, 144, 120, 96], [384, 288, 224, 176]],
        depths=(5, 5, 15, 10),
        mlp_ratios=[[4, 3, 2]] * STAGES,
    ),
    # images of 64 px on a CPU
    "efficientformerv2_micro": partial(
        EfficientFormerV2Space,
        embed_dims=[[24, 16], [32, 24], [64, 48, 32], [128, 96, 64]],
        depths=(2, 2, 4, 3),
        mlp_ratios=[[4, 3, 2, 1]] * STAGES,
        num_vit=(2, 2),
        **MICRO_ARGS,
    ),
}
