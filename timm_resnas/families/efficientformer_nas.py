"""The EfficientFormer supernet: the largest network of a space, with every sub-network inside.

Paper: "EfficientFormer: Vision Transformers at MobileNet Speed" - https://arxiv.org/abs/2206.01191. The paper's has one
width; here narrower networks take the first channels of each layer. Its training by mixed paths is in `meta_path`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models import efficientformer as base
from torch import nn

from ..arch import ArchError
from ..models.efficientformer_nas import STAGES, STRIDE, EfficientFormerNas, _cfg, checkpoint_filter_fn
from ..nas.batch_norm import Piece, PiecewiseSupernet
from ..nas.space import SearchSpace
from ..nas.units import Part, Units
from .efficientformer_space import EfficientFormerArch, EfficientFormerSpace

__all__ = ["EfficientFormerArch", "EfficientFormerSpace", "EfficientFormerSupernet"]

LAST = STAGES - 1


class EfficientFormerSupernet(PiecewiseSupernet, EfficientFormerNas):
    """The largest network of an EfficientFormer space, with every sub-network inside, see `PiecewiseSupernet`.

    Any widths up to the largest, any blocks, and any number of blocks at the end that attend are sub-networks, also
    where the space does not list them.

    Args:
        space: A preset's name, a dict as `SearchSpace.to_dict` returns it, or an `EfficientFormerSpace`.
        **kwargs: As `EfficientFormerNas`, without the architecture; what is not given comes from ``space.model_args``.

    Attributes:
        pools: For each place of the last stage that can attend, the block that stands there where it does not.
    """

    space: EfficientFormerSpace
    active: EfficientFormerArch | None

    def __init__(self, space: Any, **kwargs) -> None:
        space = SearchSpace.create(space)
        if not isinstance(space, EfficientFormerSpace):
            raise ValueError(f"an EfficientFormer supernet needs a space of its family, got one of {space.family!r}")
        kwargs = {**space.model_args, **kwargs}
        super().__init__(**space.largest.args(), **kwargs)
        rates = {"proj_drop": kwargs.get("proj_drop_rate", 0.0), "mlp_ratio": kwargs["mlp_ratios"]}
        dd = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.pools = nn.ModuleList(
            base.MetaBlock2d(
                space.largest.embed_dims[LAST],
                drop_path=getattr(block.drop_path1, "drop_prob", 0.0),
                layer_scale_init_value=kwargs["layer_scale_init_value"],
                **rates,
                **dd,
            )
            for block in self.stages[LAST].blocks
            if isinstance(block, base.MetaBlock1d)
        )
        # space.model_args always describes the network that was built
        self.set_space(space.at(**{k: kwargs[k] for k in space.model_args}))

    def check_fit(self, arch: EfficientFormerArch) -> None:
        """See `Supernet.check_fit`."""
        largest = self.space.largest
        check_stages(arch, largest)
        places = [p for p, there in enumerate(arch.depths[LAST]) if there]
        can = len(largest.depths[LAST]) - largest.num_vit
        if arch.num_vit and places[-arch.num_vit] < can:
            raise ArchError(
                f"block {places[-arch.num_vit]} of stage {LAST} attends, which here those from {can} on can"
            )

    def stand_alone(self, arch: EfficientFormerArch) -> tuple[EfficientFormerArch, dict[str, Any]]:
        """See `Supernet.stand_alone`."""
        return arch.canonical(), stand_alone_args(self, "mlp_ratios")

    def spare(self) -> list[nn.Parameter]:
        """See `PiecewiseSupernet.spare`."""
        return list(self.pools.parameters())

    def units(self) -> tuple[Units, ...]:
        """See `Supernet.units`."""
        out = []
        for name, block in self.named_modules():
            if isinstance(block, base.MetaBlock1d):
                mixer, count = f"{name}.token_mixer", block.token_mixer.num_heads
                width = block.token_mixer.qkv.out_features // count  # a head's query, key and value stand together
                parts = [Part(f"{mixer}.qkv.weight", 0, 1, width), Part(f"{mixer}.qkv.bias", 0, 1, width)]
                parts.append(Part(f"{mixer}.attention_biases", 0))
                parts.append(Part(f"{mixer}.proj.weight", 1, 1, block.token_mixer.val_dim))
                out.append(Units(mixer, count, tuple(parts)))
            elif not isinstance(block, base.MetaBlock2d):
                continue
            parts = [Part(f"{name}.mlp.fc1.weight", 0), Part(f"{name}.mlp.fc1.bias", 0)]
            if isinstance(block, base.MetaBlock2d):
                parts += [Part(f"{name}.mlp.norm1.{t}", 0) for t in NORM_TENSORS]
            parts.append(Part(f"{name}.mlp.fc2.weight", 1))
            out.append(Units(f"{name}.mlp", block.mlp.fc1.weight.shape[0], tuple(parts)))
        return tuple(out)

    def block_at(self, stage: int, place: int, attends: bool) -> str:
        """Name of the block that a sub-network has at a place."""
        first = len(self.space.largest.depths[LAST]) - len(self.pools)
        if stage < LAST or place < first:
            return f"stages.{stage}.blocks.{place}"
        return f"stages.{stage}.blocks.{place + 1}" if attends else f"pools.{place - first}"  # 1: timm's Flat

    def pieces(self, arch: EfficientFormerArch) -> Iterator[Piece]:
        """See `PiecewiseSupernet.pieces`."""
        dims, grid = arch.embed_dims, tuple(side // STRIDE for side in self.img_size)
        yield Piece("stem", "stem", _stem(self.in_chans, dims[0]))
        for i, (dim, flags) in enumerate(zip(dims, arch.depths, strict=True)):
            if i:
                yield Piece(f"stages.{i}.downsample", f"stages.{i}.downsample", _downsample(dims[i - 1], dim))
            places = [p for p, there in enumerate(flags) if there]
            first = len(places) - (arch.num_vit if i == LAST else 0)
            for j, place in enumerate(places):
                attends = j >= first
                if j == first:
                    yield Piece("", "", _flat())
                module = _attending(dim, self.mlp_ratios, grid) if attends else _pooling(dim, self.mlp_ratios)
                yield Piece(self.block_at(i, place, attends), f"stages.{i}.blocks.{j + attends}", module)
        if not arch.num_vit:
            yield Piece("", "", _flat())
        yield Piece("norm", "norm", _norm(dims[LAST]))

    def mixture(self, noise: str, temperature: float) -> nn.Module:
        """See `Supernet.mixture`: a `MetaPath`."""
        from .meta_path import MetaPath  # it needs this module

        return MetaPath(self, noise, temperature)

    def classify(self, x: torch.Tensor) -> Any:
        """See `PiecewiseSupernet.classify`."""
        return two_heads(self, x.mean(dim=1) if self.global_pool == "avg" else x)


# -- what both versions share -----------------------------------------------------------------------------------------


NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def check_stages(arch: Any, largest: Any) -> None:
    """Whether an architecture's stages are no wider and no longer than the largest's.

    Raises:
        ArchError: One is; the message names it.
    """
    for i, (dim, most) in enumerate(zip(arch.embed_dims, largest.embed_dims, strict=True)):
        if dim > most or len(arch.depths[i]) > len(largest.depths[i]):
            raise ArchError(
                f"stage {i} of the architecture has width {dim} and {len(arch.depths[i])} places for blocks, that of "
                f"the supernet {most} and {len(largest.depths[i])}"
            )


def stand_alone_args(net: nn.Module, *names: str) -> dict[str, Any]:
    """Arguments of an extracted network beside its architecture; ``names``: further ones, which the net has as well."""
    cfg = getattr(net, "pretrained_cfg", {})
    overlay = {k: cfg[k] for k in ("interpolation", "crop_pct", "crop_mode", "mean", "std") if k in cfg}
    pool_size = tuple(side // STRIDE for side in net.img_size)
    overlay.update(input_size=(net.in_chans, *net.img_size), num_classes=net.num_classes, pool_size=pool_size)
    own = ("img_size", "in_chans", "num_classes", "global_pool", *names)
    return dict(pretrained_cfg_overlay=overlay, **{name: getattr(net, name) for name in own})


def two_heads(net: nn.Module, x: torch.Tensor) -> Any:
    """What timm's `forward_head` makes of pooled features, by the first columns of the classifiers."""
    x = net.head_drop(x)
    if net.num_classes <= 0:
        return x
    heads = [head for head in (net.head, net.head_dist) if head is not None]
    logits = [F.linear(x, head.weight[:, : x.shape[-1]].contiguous(), head.bias) for head in heads]
    if len(logits) == 1:
        return logits[0]
    return tuple(logits) if net.distilled_training and net.training else (logits[0] + logits[1]) / 2


# -- modules of sub-networks: rates stand for the full network's -------------------------------------------------------


_META: dict[str, Any] = {"device": "meta"}
_RATES: dict[str, Any] = {"proj_drop": 0.5, "drop_path": 0.5}


@lru_cache(maxsize=1024)
def _stem(in_chans: int, dim: int) -> nn.Module:
    return base.Stem4(in_chans, dim, **_META)


@lru_cache(maxsize=4096)
def _downsample(in_dim: int, dim: int) -> nn.Module:
    return base.Downsample(in_dim, dim, **_META)


@lru_cache(maxsize=1024)
def _pooling(dim: int, mlp_ratio: float) -> nn.Module:
    return base.MetaBlock2d(dim, mlp_ratio=mlp_ratio, **_RATES, **_META)


@lru_cache(maxsize=1024)
def _attending(dim: int, mlp_ratio: float, grid: tuple[int, int]) -> nn.Module:
    block = base.MetaBlock1d(dim, mlp_ratio=mlp_ratio, **_RATES, **_META)
    block.token_mixer = base.Attention(dim, resolution=grid, **_META)
    return block


@lru_cache(maxsize=1)
def _flat() -> nn.Module:
    return base.Flat()


@lru_cache(maxsize=1024)
def _norm(dim: int) -> nn.Module:
    return nn.LayerNorm(dim, **_META)


# -- entry point ------------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {"efficientformer_supernet": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), num_classes=10)}
)


@register_model
def efficientformer_supernet(pretrained: bool = False, **kwargs) -> EfficientFormerSupernet:
    """Super-network of any EfficientFormer space: ``space`` is a preset's name or a dict.

    The default is 'efficientformer_micro', for images of 64 px; 'efficientformer' holds the paper's networks.
    """
    kwargs = {"space": "efficientformer_micro", **kwargs}
    if isinstance(kwargs["space"], SearchSpace):
        raise ValueError("space must be JSON-plain so that the model can be saved; pass its name or space.to_dict()")
    for key, value in SearchSpace.create(kwargs["space"]).model_args.items():
        kwargs.setdefault(key, value)  # before the builder sets them from the default cfg
    return build_model_with_cfg(
        EfficientFormerSupernet,
        "efficientformer_supernet",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", STAGES), feature_cls="getter"),
        **kwargs,
    )
