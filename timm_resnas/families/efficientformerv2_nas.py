"""The EfficientFormerV2 supernet: the largest network of a space, with every sub-network inside.

Paper: "Rethinking Vision Transformers for MobileNet Size and Speed" - https://arxiv.org/abs/2212.08059. As in the paper
convolutions are shared by all widths, and each number of channels has a batch norm of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models import efficientformer_v2 as base
from torch import nn

from ..arch import ArchError
from ..models.efficientformerv2_nas import VIT_STAGES, EfficientFormerV2Nas, _cfg, checkpoint_filter_fn
from ..nas.batch_norm import Piece, PiecewiseSupernet, add_narrow_norms
from ..nas.space import SearchSpace
from ..nas.units import Part, Units
from .efficientformer_nas import NORM_TENSORS, check_stages, stand_alone_args, two_heads
from .efficientformer_space import grids, hidden_units
from .efficientformerv2_space import EfficientFormerV2Arch, EfficientFormerV2Space

__all__ = ["EfficientFormerV2Arch", "EfficientFormerV2Space", "EfficientFormerV2Supernet"]


class EfficientFormerV2Supernet(PiecewiseSupernet, EfficientFormerV2Nas):
    """The largest network of an EfficientFormerV2 space, with every sub-network inside, see `PiecewiseSupernet`.

    Widths and MLP ratios between the space's choices are sub-networks as well; they use the first channels of the
    largest network's batch norms.

    Args:
        space: A preset's name, a dict as `SearchSpace.to_dict` returns it, or an `EfficientFormerV2Space`.
        **kwargs: As `EfficientFormerV2Nas`, without the architecture; what is not given comes from
            ``space.model_args``.
    """

    space: EfficientFormerV2Space
    active: EfficientFormerV2Arch | None

    def __init__(self, space: Any, **kwargs) -> None:
        space = SearchSpace.create(space)
        if not isinstance(space, EfficientFormerV2Space):
            raise ValueError(f"an EfficientFormerV2 supernet needs a space of its family, got one of {space.family!r}")
        kwargs = {**space.model_args, **kwargs}
        super().__init__(**space.largest.args(), **kwargs)
        widths = [space.genes[column].choices for column in space.widths]
        add_narrow_norms(self.stem.conv1.bn, [dim // 2 for dim in widths[0]])
        add_narrow_norms(self.stem.conv2.bn, widths[0])
        add_narrow_norms(self.norm, widths[-1])
        for stage, dims, ratios in zip(self.stages, widths, space.mlp_ratios, strict=True):
            hidden = {hidden_units(dim, ratio) for dim in dims for ratio in ratios}
            if not isinstance(stage.downsample, nn.Identity):
                add_narrow_norms(stage.downsample.conv.bn, dims)
                if stage.downsample.attn is not None:
                    add_narrow_norms(stage.downsample.attn.proj.bn, dims)
            for block in stage.blocks:
                for norm, channels in (
                    (block.mlp.fc1.bn, hidden),
                    (block.mlp.mid.bn, hidden),
                    (block.mlp.fc2.bn, dims),
                ):
                    add_narrow_norms(norm, channels)
                if block.token_mixer is not None:
                    add_narrow_norms(block.token_mixer.proj.bn, dims)
                    if block.token_mixer.stride_conv is not None:
                        add_narrow_norms(block.token_mixer.stride_conv.bn, dims)
        # space.model_args always describes the network that was built
        self.set_space(space.at(**{k: kwargs[k] for k in space.model_args}))

    def check_fit(self, arch: EfficientFormerV2Arch) -> None:
        """See `Supernet.check_fit`."""
        largest = self.space.largest
        check_stages(arch, largest)
        for i, flags in enumerate(arch.depths):
            places = [p for p, there in enumerate(flags) if there]
            for place, ratio in zip(places, arch.mlp_ratios[i], strict=True):
                hidden = hidden_units(arch.embed_dims[i], ratio)
                most = self.stages[i].blocks[place].mlp.fc1.conv.out_channels
                if not 1 <= hidden <= most:
                    raise ArchError(f"block {place} of stage {i} has {hidden} hidden units, the supernet 1 to {most}")
        for i, vits, most in zip(VIT_STAGES, arch.num_vit, largest.num_vit, strict=True):
            places = [p for p, there in enumerate(arch.depths[i]) if there]
            can = len(largest.depths[i]) - most
            if vits and (first := places[-vits]) < can:
                raise ArchError(f"block {first} of stage {i} attends, which in this supernet those from {can} on can")

    def stand_alone(self, arch: EfficientFormerV2Arch) -> tuple[EfficientFormerV2Arch, dict[str, Any]]:
        """See `Supernet.stand_alone`."""
        return arch.canonical(), {**stand_alone_args(self), "distillation": self.dist}

    def units(self) -> tuple[Units, ...]:
        """See `Supernet.units`: the hidden units of MLPs; heads talk to each other, and none can be taken out alone."""
        out = []
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage.blocks):
                name = f"stages.{i}.blocks.{j}.mlp"
                parts = []
                for layer in ("fc1", "mid"):
                    parts += [Part(f"{name}.{layer}.conv.weight", 0), Part(f"{name}.{layer}.conv.bias", 0)]
                    parts += [Part(f"{name}.{layer}.bn.{t}", 0) for t in NORM_TENSORS]
                parts.append(Part(f"{name}.fc2.conv.weight", 1))
                out.append(Units(name, block.mlp.fc1.conv.out_channels, tuple(parts)))
        return tuple(out)

    def pieces(self, arch: EfficientFormerV2Arch) -> Iterator[Piece]:
        """See `PiecewiseSupernet.pieces`."""
        dims, sizes, vits = arch.embed_dims, grids(self.img_size), dict(zip(VIT_STAGES, arch.num_vit, strict=True))
        yield Piece("stem", "stem", _stem(self.in_chans, dims[0]))
        for i, (dim, flags) in enumerate(zip(dims, arch.depths, strict=True)):
            if i:
                module = _downsample(dims[i - 1], dim, sizes[i - 1], i >= 3)
                yield Piece(f"stages.{i}.downsample", f"stages.{i}.downsample", module)
            places = [p for p, there in enumerate(flags) if there]
            for j, (place, ratio) in enumerate(zip(places, arch.mlp_ratios[i], strict=True)):
                attends = j >= len(places) - vits.get(i, 0)
                module = _block(dim, ratio, sizes[i], 2 if i == 2 else None, attends)
                yield Piece(f"stages.{i}.blocks.{place}", f"stages.{i}.blocks.{j}", module)
        yield Piece("norm", "norm", _norm(dims[-1]))

    def classify(self, x: Any) -> Any:
        """See `PiecewiseSupernet.classify`."""
        return two_heads(self, x.mean(dim=(2, 3)) if self.global_pool == "avg" else x)


# -- modules of sub-networks: rates stand for the full network's -------------------------------------------------------


_META: dict[str, Any] = {"device": "meta"}


@lru_cache(maxsize=1024)
def _stem(in_chans: int, dim: int) -> nn.Module:
    return base.Stem4(in_chans, dim, **_META)


@lru_cache(maxsize=4096)
def _downsample(in_dim: int, dim: int, grid: tuple[int, int], attends: bool) -> nn.Module:
    return base.Downsample(in_dim, dim, resolution=grid, use_attn=attends, **_META)


@lru_cache(maxsize=4096)
def _block(dim: int, mlp_ratio: float, grid: tuple[int, int], stride: int | None, attends: bool) -> nn.Module:
    return base.EfficientFormerV2Block(
        dim,
        mlp_ratio,
        resolution=grid,
        stride=stride,
        use_attn=attends,
        proj_drop=0.5,
        drop_path=0.5,
        **_META,
    )


@lru_cache(maxsize=1024)
def _norm(dim: int) -> nn.Module:
    return nn.BatchNorm2d(dim, **_META)


# -- entry point ------------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {"efficientformerv2_supernet": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), num_classes=10)}
)


@register_model
def efficientformerv2_supernet(pretrained: bool = False, **kwargs) -> EfficientFormerV2Supernet:
    """Super-network of any EfficientFormerV2 space: ``space`` is a preset's name or a dict.

    The default is 'efficientformerv2_micro', for images of 64 px; 'efficientformerv2' holds the paper's networks.
    """
    kwargs = {"space": "efficientformerv2_micro", **kwargs}
    if isinstance(kwargs["space"], SearchSpace):
        raise ValueError("space must be JSON-plain so that the model can be saved; pass its name or space.to_dict()")
    for key, value in SearchSpace.create(kwargs["space"]).model_args.items():
        kwargs.setdefault(key, value)  # before the builder sets them from the default cfg
    return build_model_with_cfg(
        EfficientFormerV2Supernet,
        "efficientformerv2_supernet",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), feature_cls="getter"),
        **kwargs,
    )
