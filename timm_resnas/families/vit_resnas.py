"""The ViT-ResNAS supernet: the largest network of a space, with every sub-network inside.

Paper: "Searching for Efficient Multi-Stage Vision Transformers" - https://arxiv.org/abs/2109.00642, section 3.3
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from torch import nn

from ..arch import ArchError
from ..models.network_def import Block, NetworkDef, Reduction
from ..models.vit_resnas import SpatialReduction, TransformerBlock, VitResNas, _cfg, checkpoint_filter_fn
from ..nas.elastic import elastic_layer_norm, elastic_linear, masked_layer_norm, zero_grads_for
from ..nas.packs import (
    BlockAt,
    Pack,
    by_width,
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
from .elastic import repair_narrower
from .vit_resnas_space import VitResNasSpace

__all__ = ["VitResNasSpace", "VitResNasSupernet"]


class VitResNasSupernet(Supernet, VitResNas):
    """The largest network of a ViT-ResNAS space, with every sub-network inside, see `Supernet`.

    Args:
        space: A preset's name, a dict as `SearchSpace.to_dict` returns it, or a `VitResNasSpace`.
        switchable_scale: First value of scales of both branches of each block, by the depth and the width of its stage,
            see `SwitchableScale`; None: none.
        **kwargs: As `VitResNas`, without ``network_def``; what is not given comes from ``space.model_args``.
    """

    space: VitResNasSpace
    active: NetworkDef | None
    modes = ("sliced", "masked")

    def __init__(self, space: Any, switchable_scale: float | None = None, **kwargs) -> None:
        if "network_def" in kwargs:
            raise TypeError(
                "a supernet takes space, a preset's name or a dict, instead of network_def; vit_resnas takes a "
                "network_def, and a supernet's set_arch(network_def) one of its sub-networks"
            )
        space = SearchSpace.create(space)
        if not isinstance(space, VitResNasSpace):
            raise ValueError(f"a ViT-ResNAS supernet needs a space of its family, got one of {space.family!r}")
        kwargs = {**space.model_args, **kwargs}
        super().__init__(space.largest.to_network_def(), **kwargs)
        # space.model_args always describes the network that was built
        self.set_space(space.at(**{k: kwargs[k] for k in space.model_args}))
        self._steps: list[tuple[list[int], list[int]]] | None = None  # depths and widths of each stage
        if switchable_scale is not None:
            least, most = space.smallest.depths, space.largest.depths
            dims = [sorted(gene.choices) for gene in space.genes if gene.name == "embed_dim"]
            self._steps = [(list(range(a, b + 1)), own) for a, b, own in zip(least, most, dims, strict=True)]
            stages = self._stages()
            for block, stage in zip(self.blocks, stages, strict=True):
                if isinstance(block, TransformerBlock):
                    add_scales(block, *map(len, self._steps[stage]), switchable_scale)

    # -- choosing sub-networks --------------------------------------------------------------------------------------

    def check_fit(self, arch: NetworkDef) -> None:
        """See `Supernet.check_fit`: the same blocks, reductions and head dims, and no more of anything."""
        largest = self.arch
        if len(arch.blocks) != len(largest.blocks):
            raise ArchError(
                f"the architecture has {len(arch.blocks)} blocks and reductions, the supernet {len(largest.blocks)}; "
                f"a sub-network keeps every position (absent blocks as exists=0)"
            )
        pairs = [(arch.patch_embed, largest.patch_embed), *zip(arch.blocks, largest.blocks, strict=True)]
        for i, (entry, limit) in enumerate(pairs):
            if not _fits(entry, limit):
                raise ArchError(
                    f"network_def entry {i} {entry.to_def()} does not fit in the supernet's {limit.to_def()}"
                )

    def stand_alone(self, arch: NetworkDef) -> tuple[NetworkDef, dict[str, Any]]:
        """See `Supernet.stand_alone`."""
        cfg = getattr(self, "pretrained_cfg", {})
        overlay = {k: cfg[k] for k in ("interpolation", "crop_pct", "crop_mode", "mean", "std") if k in cfg}
        overlay.update(
            input_size=(self.in_chans, *self.img_size), num_classes=self.num_classes, pool_size=self.grids[-1]
        )
        return arch.canonical().with_num_classes(self.num_classes), dict(
            img_size=self.img_size,
            patch_size=self.patch_size,
            in_chans=self.in_chans,
            num_classes=self.num_classes,
            global_pool=self.global_pool,
            distill_token=self.has_dist,
            patch_head=self.patch_head is not None,
            pretrained_cfg_overlay=overlay,
        )

    def extract(self, arch: Any, repair: torch.Tensor | None = None) -> nn.Module:
        """See `Supernet.extract`.

        Args:
            arch: The sub-network.
            repair: Images, [n, C, H, W], unlabelled: what the heads and hidden units that it lacks would have added to
                each layer is regressed on those that it has, as for a pretrained network, see `elastic`.
        """
        net = super().extract(arch)
        if repair is not None:
            arch = self.check_arch(arch)
            blocks = [
                replace(block, num_heads=limit.num_heads, mlp_hidden=limit.mlp_hidden)
                if isinstance(block, Block)
                else block
                for block, limit in zip(arch.blocks, self.arch.blocks, strict=True)
            ]
            repair_narrower(net, super().extract(replace(arch, blocks=tuple(blocks))), repair)
        return net

    def _stages(self) -> list[int]:
        """The stage that each of ``blocks`` belongs to; a reduction to the one before it."""
        before = itertools.accumulate(isinstance(block, Reduction) for block in self.arch.blocks)
        return [n - isinstance(b, Reduction) for n, b in zip(before, self.arch.blocks, strict=True)]

    def scales_at(self, arch: NetworkDef) -> list[tuple[int, int]]:
        """See `Supernet.scales_at`; beside the space's choices the nearest ones count."""
        depths, dims = arch.depths, [stage[0].dim for stage in arch.stages]
        own = [
            (nearest(known, depth), nearest(widths, dim))
            for (known, widths), depth, dim in zip(self._steps or (), depths, dims, strict=True)
        ]
        return [own[stage] for stage in self._stages()]

    def _entries(self, arch: NetworkDef) -> Sequence[Any]:
        """Its blocks and reductions; blocks know where their scales are."""
        if self._steps is None:
            return arch.blocks
        return [
            BlockAt(b.dim, b.attn_dim, b.mlp_hidden, b.exists, at) if isinstance(b, Block) else b
            for b, at in zip(arch.blocks, self.scales_at(arch), strict=True)
        ]

    def own_key(self, arch: NetworkDef, key: str) -> str:
        """See `Supernet.own_key`: absent blocks are not counted in the extracted network."""
        if not key.startswith("blocks."):
            return key
        present = [i for i, b in enumerate(arch.blocks) if not (isinstance(b, Block) and not b.exists)]
        _, i, rest = key.split(".", 2)
        return f"blocks.{present[int(i)]}.{rest}"

    def units(self) -> tuple[Units, ...]:
        """See `Supernet.units`."""
        blocks = [(i, block) for i, block in enumerate(self.blocks) if isinstance(block, TransformerBlock)]
        return tuple(unit for i, block in blocks for unit in pre_norm_units(f"blocks.{i}", block))

    # -- forward ----------------------------------------------------------------------------------------------------

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """The stem's output, see `Supernet.shared`."""
        if tuple(x.shape[2:]) != self.img_size:
            size, own = ("x".join(map(str, s)) for s in (x.shape[2:], self.img_size))
            raise ValueError(f"images of {size} do not match the supernet's {own}; see set_input_size")
        return self.patch_embed.stem(x)

    def forward_groups(self, h: torch.Tensor, archs: Sequence[NetworkDef], mode: str):
        """See `Supernet.forward_groups`."""
        if self.num_classes <= 0 and len({a.head.dim for a in archs}) > 1:
            raise ValueError("sub-networks of several widths need a classifier; the supernet has num_classes=0")
        return self._forward_masked(h, archs) if mode == "masked" else self._forward_sliced(h, archs)

    def _tokens(self, patches: torch.Tensor) -> torch.Tensor:
        """Prefix tokens in front of patches [R, N, dim], position embedding, dropout."""
        dim = patches.shape[-1]
        tokens = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        tokens = [t[..., :dim].expand(patches.shape[0], -1, -1) for t in tokens]
        return self.pos_drop(torch.cat([*tokens, patches], dim=1) + self.pos_embed[..., :dim])

    def _unused(self) -> list[nn.Parameter]:
        """Parameters of heads that this forward leaves out."""
        if self.patch_head is None or (self.token_labeling and self.training):
            return []
        return list(self.patch_head.parameters())

    # -- masked: the full network, with channels of each group set to zero ------------------------------------------

    def _forward_masked(self, stem: torch.Tensor, archs: Sequence[NetworkDef]):
        # x is [groups, images, tokens, channels] and zero where a group's mask is
        groups = len(archs)
        masks = self._masks(archs, like=stem)
        keep = next(masks)
        x = self._tokens(self.patch_embed.projection(stem).flatten(2).transpose(1, 2))
        x = x.unflatten(0, (groups, -1)) * keep
        for block, *entries in zip(self.blocks, *map(self._entries, archs), strict=True):
            if isinstance(block, SpatialReduction):
                x = self._masked_reduce(block, x, keep, keep := next(masks))
                continue
            args = (block, x, keep, next(masks), next(masks), next(masks), entries)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(masked_pre_norm_block, *args)
            else:
                x = masked_pre_norm_block(*args)
        x = masked_layer_norm(x, keep, self.norm.weight, self.norm.bias, self.norm.eps).flatten(0, 1)
        if self.num_classes <= 0:
            x = x[..., : archs[0].head.dim]
        return self.forward_head(zero_grads_for(x, self._unused()))

    def _masks(self, archs: Sequence[NetworkDef], like: torch.Tensor) -> Iterator[torch.Tensor]:
        """Masks [groups, 1, 1, channels] in the order of use, each the first channels of its group.

        Embedding and reductions: their width. Blocks: heads, hidden units, width of both branches' sums (none where
        the block is absent).
        """
        largest = [(self.arch.patch_embed.dim, [arch.patch_embed.dim for arch in archs])]
        for limit, *entries in zip(self.arch.blocks, *(arch.blocks for arch in archs), strict=True):
            if isinstance(limit, Reduction):
                largest.append((limit.out_dim, [e.out_dim for e in entries]))
            else:
                largest.append((limit.attn_dim, [e.attn_dim for e in entries]))
                largest.append((limit.mlp_hidden, [e.mlp_hidden for e in entries]))
                largest.append((limit.dim, [e.dim * e.exists for e in entries]))
        sizes, widths = zip(*largest, strict=True)
        widths = torch.tensor(widths, device=like.device)[:, :, None, None, None]  # all at once: one transfer
        channel = torch.arange(max(sizes), device=like.device)
        for size, width in zip(sizes, widths, strict=True):
            yield (channel[:size] < width).to(self.pos_embed.dtype)

    def _masked_reduce(self, block: SpatialReduction, x, keep, out) -> torch.Tensor:
        prefix = block.num_prefix_tokens
        y = masked_layer_norm(x, keep, block.norm.weight, block.norm.bias, block.norm.eps).flatten(0, 1)
        patches = block.patch_reduce(block.to_map(y[:, prefix:])).flatten(2).transpose(1, 2) + block.pos_embed
        y = torch.cat([block.token_transform(y[:, :prefix]), patches], dim=1)
        shortcut = F.pad(_pool(block, x.flatten(0, 1)), (0, block.out_dim - block.in_dim))
        groups = (len(x), -1)
        return torch.addcmul(shortcut.unflatten(0, groups), y.unflatten(0, groups), out)

    # -- one sub-network, to be scored: plain layers on slices of the weights ---------------------------------------

    def forward_one(self, h: torch.Tensor, arch: NetworkDef):
        """See `Supernet.forward_one`."""
        conv, dim = self.patch_embed.projection, arch.patch_embed.dim
        x = self._tokens(F.conv2d(h, conv.weight[:dim], conv.bias[:dim], conv.stride).flatten(2).transpose(1, 2))
        for block, entry in zip(self.blocks, self._entries(arch), strict=True):
            if isinstance(entry, Reduction):
                x = self._reduce_one(block, x, entry)
            elif entry.exists:
                x = pre_norm_block_one(block, x, entry)
        return self._head_packs([Pack((0,), x)])

    def _reduce_one(self, block: SpatialReduction, x: torch.Tensor, entry: Reduction) -> torch.Tensor:
        prefix, (dim, out) = block.num_prefix_tokens, (entry.in_dim, entry.out_dim)
        conv, linear = block.patch_reduce, block.token_transform
        y = elastic_layer_norm(x, block.norm.weight, block.norm.bias, block.norm.eps)
        tokens = F.linear(y[:, :prefix], linear.weight[:out, :dim], linear.bias[:out])
        maps = block.to_map(y[:, prefix:]).contiguous()  # as in the plain network, to the last bit
        maps = F.conv2d(maps, conv.weight[:out, :dim], conv.bias[:out], conv.stride, conv.padding)
        y = torch.cat([tokens, maps.flatten(2).transpose(1, 2) + block.pos_embed[..., :out]], dim=1)
        return y + F.pad(_pool(block, x), (0, out - dim))

    # -- sliced: each group through its slices of the weights -------------------------------------------------------

    def _forward_sliced(self, h: torch.Tensor, archs: Sequence[NetworkDef]):
        packs = embed_patches(h, self.patch_embed.projection, [arch.patch_embed.dim for arch in archs])
        packs = [Pack(pack.groups, self._tokens(pack.x)) for pack in packs]
        for block, *entries in zip(self.blocks, *map(self._entries, archs), strict=True):
            if isinstance(block, SpatialReduction):
                packs = self._reduce(block, packs, entries)
            elif self.grad_checkpointing and torch.is_grad_enabled():
                packs = checkpoint(pre_norm_block, block, packs, entries)
            else:
                packs = pre_norm_block(block, packs, entries)
        return self._head_packs(packs)

    def _reduce(self, block: SpatialReduction, packs: list[Pack], entries: Sequence[Reduction]) -> list[Pack]:
        """Spatial reduction; groups are packed by the next stage's width."""
        prefix = block.num_prefix_tokens
        outs = [[entries[g].out_dim for g in pack.groups] for pack in packs]
        ins = [[pack.x.shape[-1]] * len(pack.groups) for pack in packs]
        ys = [elastic_layer_norm(pack.x, block.norm.weight, block.norm.bias, block.norm.eps) for pack in packs]
        linear, conv = block.token_transform, block.patch_reduce
        tokens = elastic_linear([y[:, :prefix] for y in ys], linear.weight, linear.bias, ins, outs)
        # im2col: the first input channels are the first columns of the flattened weight
        columns = [
            F.unfold(block.to_map(y[:, prefix:]), conv.kernel_size, padding=conv.padding, stride=conv.stride)
            for y in ys
        ]
        area = conv.kernel_size[0] * conv.kernel_size[1]
        patches = elastic_linear(
            [c.transpose(1, 2) for c in columns],
            conv.weight.flatten(1),
            conv.bias,
            [[n * area for n in widths] for widths in ins],
            outs,
        )
        reduced: dict[int, torch.Tensor] = {}
        for pack, token, patch, widths in zip(packs, tokens, patches, outs, strict=True):
            shortcut = _pool(block, pack.x)
            each = shortcut.shape[0] // len(pack.groups)
            for i, (group, dim) in enumerate(zip(pack.groups, widths, strict=True)):
                rows = slice(i * each, (i + 1) * each)
                y = torch.cat([token[rows, :, :dim], patch[rows, :, :dim] + block.pos_embed[..., :dim]], dim=1)
                reduced[group] = y + F.pad(shortcut[rows], (0, dim - shortcut.shape[-1]))
        members = by_width([entry.out_dim for entry in entries])
        return [Pack(groups, torch.cat([reduced[g] for g in groups])) for groups in members.values()]

    def _head_packs(self, packs: list[Pack]):
        """Final norm and classifiers; outputs in batch order, in the forms of `forward_head`."""
        prefix = self.num_prefix_tokens
        xs = [elastic_layer_norm(pack.x, self.norm.weight, self.norm.bias, self.norm.eps) for pack in packs]
        xs[0] = zero_grads_for(xs[0], self._unused())

        def logits(head: nn.Module, features: list[torch.Tensor]) -> torch.Tensor:
            return classify(
                head, [Pack(pack.groups, self.head_drop(f)) for pack, f in zip(packs, features, strict=True)]
            )

        if self.head_dist is not None:
            cls = logits(self.head, [x[:, 0] for x in xs])
            dist = logits(self.head_dist, [x[:, 1] for x in xs])
            if self.distilled_training and self.training:
                return cls, dist
            return (cls + dist) / 2
        if self.global_pool == "token":
            pooled = [x[:, 0] for x in xs]
        elif self.global_pool == "avg":
            pooled = [x[:, prefix:].mean(dim=1) for x in xs]
        else:
            pooled = xs
        out = logits(self.head, pooled)
        if self.token_labeling and self.training:
            return out, logits(self.patch_head, [x[:, prefix:] for x in xs])
        return out


def _fits(entry: Any, limit: Any) -> bool:
    if type(entry) is not type(limit):
        return False
    if isinstance(entry, Block):
        return (
            entry.dim <= limit.dim
            and entry.head_dim == limit.head_dim
            and entry.num_heads <= limit.num_heads
            and entry.mlp_hidden <= limit.mlp_hidden
        )
    if isinstance(entry, Reduction):
        return entry.in_dim <= limit.in_dim and entry.out_dim <= limit.out_dim
    return entry.kind == limit.kind and entry.mid_dim == limit.mid_dim and entry.dim <= limit.dim


def _pool(block: SpatialReduction, x: torch.Tensor) -> torch.Tensor:
    """The residual of a spatial reduction before its channels are padded: patches pooled, prefix tokens as they are."""
    prefix = block.num_prefix_tokens
    pooled = F.avg_pool2d(block.to_map(x[:, prefix:]), 2).flatten(2).transpose(1, 2)
    return torch.cat([x[:, :prefix], pooled], dim=1)


# -- entry points -----------------------------------------------------------------------------------------------------


def _create_supernet(variant: str, pretrained: bool = False, **kwargs) -> VitResNasSupernet:
    space = SearchSpace.create(kwargs["space"])
    if isinstance(kwargs["space"], SearchSpace):
        raise ValueError("space must be JSON-plain so that the model can be saved; pass its name or space.to_dict()")
    for key, value in space.model_args.items():
        kwargs.setdefault(key, value)  # before the builder sets them from the default cfg
    out_indices = kwargs.pop("out_indices", tuple(range(space.largest.num_reductions + 1)))
    first = "proj" if space.largest.patch_embed.kind == 0 else "conv1.conv"
    overlay = dict(first_conv=f"patch_embed.{first}")
    overlay.update(kwargs.pop("pretrained_cfg_overlay", None) or {})
    return build_model_with_cfg(
        VitResNasSupernet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        pretrained_cfg_overlay=overlay,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "vit_resnas_tiny_supernet": _cfg(),
        "vit_resnas_small_supernet": _cfg(),
        "vit_resnas_supernet": _cfg(input_size=(3, 32, 32), pool_size=(2, 2), num_classes=10),
    }
)


@register_model
def vit_resnas_tiny_supernet(pretrained: bool = False, **kwargs) -> VitResNasSupernet:
    """Super-network of the paper's Tiny search: 84.8 M parameters, largest network 3.50 GMACs."""
    model_args = dict(space="vit_resnas_tiny")
    return _create_supernet("vit_resnas_tiny_supernet", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vit_resnas_small_supernet(pretrained: bool = False, **kwargs) -> VitResNasSupernet:
    """Super-network of the paper's Small and Medium searches: 155.3 M parameters, largest network 6.26 GMACs."""
    model_args = dict(space="vit_resnas_small")
    return _create_supernet("vit_resnas_small_supernet", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vit_resnas_supernet(pretrained: bool = False, **kwargs) -> VitResNasSupernet:
    """Super-network of any search space: ``space`` is a preset's name or a dict. The default is 'micro'."""
    model_args = dict(space="micro")
    return _create_supernet("vit_resnas_supernet", pretrained=pretrained, **dict(model_args, **kwargs))
