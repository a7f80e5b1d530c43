"""The AutoFormer supernet: the largest network of a space, with every sub-network inside.

Paper: "AutoFormer: Searching Transformers for Visual Recognition" - https://arxiv.org/abs/2107.00651
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from torch import nn

from ..arch import ArchError
from ..models.autoformer import (
    AutoFormer,
    RelPosAttention,
    _cfg,
    checkpoint_filter_fn,
    mlp_hidden,
    relative_positions,
)
from ..nas.elastic import Widths, elastic_layer_norm, elastic_linear, masked_layer_norm
from ..nas.packs import (
    BlockAt,
    Pack,
    classify,
    embed_patches,
    masked_pre_norm_block,
    pre_norm_block,
    pre_norm_block_one,
)
from ..nas.scaling import add_scales, nearest
from ..nas.space import SearchSpace
from ..nas.supernet import Supernet
from ..nas.units import Units, pre_norm_units
from .autoformer_space import AutoFormerArch, AutoFormerSpace

__all__ = ["AutoFormerArch", "AutoFormerSpace", "AutoFormerSupernet"]


class AutoFormerSupernet(Supernet, AutoFormer):
    """The weights of an AutoFormer space, with every sub-network inside, see `Supernet`.

    As a timm model it is the space's ``allocation``, which may be wider than its largest network. Architectures beside
    the space's choices are sub-networks as well, as long as they fit in the weights.

    Args:
        space: A preset's name, a dict as `SearchSpace.to_dict` returns it, or an `AutoFormerSpace`.
        switchable_scale: First value of scales of both branches of each layer, see `SwitchableScale`; None: none.
        **kwargs: As `AutoFormer`, without the architecture; what is not given comes from ``space.model_args``.
    """

    space: AutoFormerSpace
    active: AutoFormerArch | None
    modes = ("sliced", "masked")

    def __init__(self, space: Any, switchable_scale: float | None = None, **kwargs) -> None:
        space = SearchSpace.create(space)
        if not isinstance(space, AutoFormerSpace):
            raise ValueError(f"an AutoFormer supernet needs a space of its family, got one of {space.family!r}")
        kwargs = {**space.model_args, **kwargs}
        super().__init__(**space.allocation.args(), **kwargs)
        # space.model_args always describes the network that was built
        self.set_space(space.at(**{k: kwargs[k] for k in space.model_args}))
        self._steps: tuple[list[int], list[int]] | None = None  # depths and widths
        if switchable_scale is not None:
            choices = space.choices_dict()
            self._steps = sorted(choices["depth"]), sorted(choices["embed_dim"])
            for block in self.blocks:
                add_scales(block, *map(len, self._steps), switchable_scale)

    # -- choosing sub-networks --------------------------------------------------------------------------------------

    def check_fit(self, arch: AutoFormerArch) -> None:
        """See `Supernet.check_fit`; any widths up to the weights' fit."""
        if arch.embed_dim > self.embed_dim or arch.depth > len(self.blocks):
            raise ArchError(
                f"the architecture has width {arch.embed_dim} and {arch.depth} layers, the supernet {self.embed_dim} "
                f"and {len(self.blocks)}"
            )
        for i, block in enumerate(self.blocks[: arch.depth]):
            widths, heads, hidden = self._widths(arch, i), block.attn.num_heads, block.mlp.fc1.out_features
            if arch.num_heads[i] > heads or widths.mlp_hidden > hidden:
                raise ArchError(
                    f"layer {i} has {arch.num_heads[i]} heads and {widths.mlp_hidden} hidden units, the supernet has "
                    f"{heads} and {hidden} there"
                )

    def stand_alone(self, arch: AutoFormerArch) -> tuple[AutoFormerArch, dict[str, Any]]:
        """See `Supernet.stand_alone`."""
        cfg = getattr(self, "pretrained_cfg", {})
        overlay = {k: cfg[k] for k in ("interpolation", "crop_pct", "crop_mode", "mean", "std") if k in cfg}
        img_size, grid = self.patch_embed.img_size, self.patch_embed.grid_size
        overlay.update(input_size=(self.in_chans, *img_size), num_classes=self.num_classes, pool_size=grid)
        own = ("in_chans", "num_classes", "global_pool", "head_dim", "rel_pos", "max_relative_position")
        return arch, dict(
            img_size=img_size,
            patch_size=self.patch_embed.patch_size[0],
            pretrained_cfg_overlay=overlay,
            **{name: getattr(self, name) for name in own},
        )

    def sliced_state_dict(self, arch: AutoFormerArch, net: nn.Module) -> dict[str, torch.Tensor]:
        """See `Supernet.sliced_state_dict`; biases of queries, keys and values as `qkv_bias_layout` says."""
        out = super().sliced_state_dict(arch, net)
        if self.qkv_bias_layout == "prefix":
            for i, block in enumerate(self.blocks[: arch.depth]):
                key = f"blocks.{i}.attn.qkv.bias"
                out[key] = block.attn.qkv.bias.detach()[: len(out[key])].clone()
        return out

    def units(self) -> tuple[Units, ...]:
        """See `Supernet.units`."""
        return tuple(unit for i, block in enumerate(self.blocks) for unit in pre_norm_units(f"blocks.{i}", block))

    def scales_at(self, arch: AutoFormerArch) -> list[tuple[int, int]]:
        """See `Supernet.scales_at`; beside the space's choices the nearest ones count."""
        return [self._scale_at(arch)] * len(self.blocks)

    def _scale_at(self, arch: AutoFormerArch) -> tuple[int, int]:
        if self._steps is None:
            return 0, 0
        depths, widths = self._steps
        return nearest(depths, arch.depth), nearest(widths, arch.embed_dim)

    def _widths(self, arch: AutoFormerArch, i: int) -> BlockAt:
        if i >= arch.depth:
            return BlockAt(arch.embed_dim, 0, 0, False)
        hidden = mlp_hidden(arch.embed_dim, arch.mlp_ratio[i])
        return BlockAt(arch.embed_dim, arch.num_heads[i] * self.head_dim, hidden, True, self._scale_at(arch))

    # -- forward ----------------------------------------------------------------------------------------------------

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """The images, see `Supernet.shared`."""
        if tuple(x.shape[2:]) != tuple(self.patch_embed.img_size):
            size, own = ("x".join(map(str, s)) for s in (x.shape[2:], self.patch_embed.img_size))
            raise ValueError(f"images of {size} do not match the supernet's {own}; see set_input_size")
        return x

    def forward_groups(self, h: torch.Tensor, archs: Sequence[AutoFormerArch], mode: str) -> torch.Tensor:
        """See `Supernet.forward_groups`."""
        if self.num_classes <= 0 and len({a.embed_dim for a in archs}) > 1:
            raise ValueError("sub-networks of several widths need a classifier; the supernet has num_classes=0")
        return self._forward_masked(h, archs) if mode == "masked" else self._forward_sliced(h, archs)

    def _positions(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return relative_positions(x, *self.patch_embed.grid_size, self.max_relative_position)

    def _tokens(self, patches: torch.Tensor) -> torch.Tensor:
        """Class token in front of patches [R, N, dim], position embedding, dropout."""
        dim = patches.shape[-1]
        token = self.cls_token[..., :dim].expand(patches.shape[0], -1, -1)
        return self.pos_drop(torch.cat([token, patches], dim=1) + self.pos_embed[..., :dim])

    def _run(self, i: int, function: Callable[..., Any], *args: Any) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, self.blocks[i], *args)
        return function(self.blocks[i], *args)

    def _forward_sliced(self, x: torch.Tensor, archs: Sequence[AutoFormerArch]) -> torch.Tensor:
        packs = embed_patches(x, self.patch_embed.proj, [arch.embed_dim for arch in archs])
        packs = [Pack(pack.groups, self._tokens(pack.x)) for pack in packs]
        attention = partial(_attention, positions=self._positions(x), layout=self.qkv_bias_layout)
        for i in range(len(self.blocks)):
            packs = self._run(i, pre_norm_block, packs, [self._widths(arch, i) for arch in archs], attention)
        norm = self.norm
        packs = [Pack(p.groups, elastic_layer_norm(p.x, norm.weight, norm.bias, norm.eps)) for p in packs]
        return classify(self.head, [Pack(p.groups, self.forward_head(p.x, pre_logits=True)) for p in packs])

    def _forward_masked(self, x: torch.Tensor, archs: Sequence[AutoFormerArch]) -> torch.Tensor:
        # x is [groups, images, tokens, channels] and zero where a group's mask is
        masks, positions = self._masks(archs, like=x), self._positions(x)
        keep = next(masks)
        x = self._tokens(self.patch_embed(x)).unflatten(0, (len(archs), -1)) * keep
        for i in range(len(self.blocks)):
            own = [self._widths(arch, i) for arch in archs]
            widths = [w.attn_dim for w in own]
            attention = partial(_masked_attention, widths=widths, positions=positions, layout=self.qkv_bias_layout)
            args = (x, keep, next(masks), next(masks), next(masks), own, attention)
            x = self._run(i, masked_pre_norm_block, *args)
        x = masked_layer_norm(x, keep, self.norm.weight, self.norm.bias, self.norm.eps).flatten(0, 1)
        return self.forward_head(x if self.num_classes > 0 else x[..., : archs[0].embed_dim])

    def _masks(self, archs: Sequence[AutoFormerArch], like: torch.Tensor) -> Iterator[torch.Tensor]:
        """Masks [groups, 1, 1, channels] of the width, then of each layer's heads, hidden units, and its sums."""
        yield _first(self.embed_dim, [arch.embed_dim for arch in archs], like)
        for i, block in enumerate(self.blocks):
            widths = [self._widths(arch, i) for arch in archs]
            yield _first(block.attn.proj.in_features, [w.attn_dim for w in widths], like)
            yield _first(block.mlp.fc1.out_features, [w.mlp_hidden for w in widths], like)
            yield _first(self.embed_dim, [w.dim * w.exists for w in widths], like)

    def forward_one(self, h: torch.Tensor, arch: AutoFormerArch) -> torch.Tensor:
        """See `Supernet.forward_one`."""
        proj, dim = self.patch_embed.proj, arch.embed_dim
        x = self._tokens(F.conv2d(h, proj.weight[:dim], proj.bias[:dim], proj.stride).flatten(2).transpose(1, 2))
        attention = partial(_attention_one, positions=self._positions(x), layout=self.qkv_bias_layout)
        for i, block in enumerate(self.blocks[: arch.depth]):
            x = pre_norm_block_one(block, x, self._widths(arch, i), attention)
        x = elastic_layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)
        x = self.forward_head(x, pre_logits=True)
        return F.linear(x, self.head.weight[:, :dim], self.head.bias) if self.num_classes > 0 else x


# -- attention of sub-networks ----------------------------------------------------------------------------------------


def _first(count: int, widths: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Mask of the first channels of each group, [groups, 1, 1, count]."""
    widths = torch.tensor(widths, device=like.device)[:, None, None, None]
    return (torch.arange(count, device=like.device) < widths).to(like.dtype)


def _prefix_bias(bias: torch.Tensor, widths: Sequence[int], most: int) -> torch.Tensor:
    """Of each group the first 3 * width entries, cut in thirds, each followed by zeros up to ``most``.

    [groups, 1, 1, 3 * most]
    """
    thirds = [F.pad(bias[: 3 * w].view(3, w), (0, most - w)).flatten() for w in widths]
    return torch.stack(thirds)[:, None, None]


def _attention(
    attn: RelPosAttention, xs: list[torch.Tensor], dims: Widths, heads: Widths, positions: tuple, layout: str
) -> list[torch.Tensor]:
    """See `timm_resnas.nas.packs.self_attention`."""
    bias = torch.zeros_like(attn.qkv.bias) if layout == "prefix" else attn.qkv.bias
    ys = elastic_linear(xs, attn.qkv.weight, bias, dims, heads, parts=3)
    outs = []
    for y, widths in zip(ys, heads, strict=True):
        groups, most = (len(widths), -1), max(widths)
        if layout == "prefix":
            own = _prefix_bias(attn.qkv.bias, widths, most).to(y.dtype)
            y = (y.unflatten(0, groups) + own).flatten(0, 1)
        y = attn.attend(y, *positions)
        if min(widths) < most:  # a head that a group lacks has relative positions nevertheless
            y = (y.unflatten(0, groups) * _first(most, widths, y)).flatten(0, 1)
        outs.append(y)
    return elastic_linear(outs, attn.proj.weight, attn.proj.bias, heads, dims)


def _attention_one(
    attn: RelPosAttention, x: torch.Tensor, dim: int, width: int, positions: tuple, layout: str
) -> torch.Tensor:
    """See `timm_resnas.nas.packs.self_attention_one`."""
    weight = attn.qkv.weight.unflatten(0, (3, -1))[:, :width, :dim].flatten(0, 1)
    bias = attn.qkv.bias
    bias = bias[: 3 * width] if layout == "prefix" else bias.view(3, -1)[:, :width].flatten()
    x = attn.attend(F.linear(x, weight, bias), *positions)
    return F.linear(x, attn.proj.weight[:dim, :width], attn.proj.bias[:dim])


def _masked_attention(
    attn: RelPosAttention, x: torch.Tensor, heads: torch.Tensor, widths: Sequence[int], positions: tuple, layout: str
) -> torch.Tensor:
    """See `timm_resnas.nas.packs.masked_self_attention`."""
    if layout == "prefix":
        y = F.linear(x, attn.qkv.weight)
        y = y + _prefix_bias(attn.qkv.bias, widths, attn.proj.in_features).to(y.dtype)
    else:
        y = attn.qkv(x)
    y = attn.attend(y.flatten(0, 1), *positions)
    return attn.proj(y.unflatten(0, (len(x), -1)) * heads.to(y.dtype))


# -- entry point ------------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {"autoformer_supernet": _cfg(input_size=(3, 32, 32), pool_size=(4, 4), num_classes=10)}
)


@register_model
def autoformer_supernet(pretrained: bool = False, **kwargs) -> AutoFormerSupernet:
    """Super-network of any AutoFormer space: ``space`` is a preset's name or a dict. The default is 'autoformer_micro'.

    A released supernet's checkpoint loads with ``space`` 'autoformer_tiny', 'autoformer_small' or 'autoformer_base'.
    """
    kwargs = {"space": "autoformer_micro", **kwargs}
    if isinstance(kwargs["space"], SearchSpace):
        raise ValueError("space must be JSON-plain so that the model can be saved; pass its name or space.to_dict()")
    for key, value in SearchSpace.create(kwargs["space"]).model_args.items():
        kwargs.setdefault(key, value)  # before the builder sets them from the default cfg
    return build_model_with_cfg(
        AutoFormerSupernet,
        "autoformer_supernet",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
        **kwargs,
    )
