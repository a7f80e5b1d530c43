"""The ViT-ResNAS supernet: one set of weights, every sub-network.

Paper: "Searching for Efficient Multi-Stage Vision Transformers" - https://arxiv.org/abs/2109.00642, section 3.3

A supernet is the largest network of a search space. A sub-network uses the first channels and heads of each layer and
skips absent blocks. Training computes many sub-networks in one forward-backward pass: the batch is cut into equal
contiguous groups, each with an architecture of its own.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from torch import nn

from ..arch import Arch, ArchError, Block, Reduction
from ..models.vit_resnas import SpatialReduction, TransformerBlock, VitResNas, _cfg, checkpoint_filter_fn
from .elastic import elastic_layer_norm, elastic_linear, masked_layer_norm, touch
from .space import SearchSpace

__all__ = ["MODES", "VitResNasSupernet"]

MODES = ("auto", "sliced", "masked")

_logger = logging.getLogger(__name__)


class Pack(NamedTuple):
    """Groups of a batch that share an embedding width."""

    groups: tuple[int, ...]
    x: torch.Tensor  # [len(groups) * images, tokens, embed_dim]


class VitResNasSupernet(VitResNas):
    """The largest network of a search space, with every sub-network inside.

    As a timm model it is that largest network; `set_arch` makes `forward` compute a sub-network instead, and
    ``net(x, archs=[...])`` computes several, each on its part of the batch.

    Args:
        space: A preset's name, a dict as `SearchSpace.to_dict` returns it, or a `SearchSpace`.
        **kwargs: As `VitResNas`, without ``network_def``; what is not given comes from ``space.model_args``.
    """

    def __init__(self, space: Any, **kwargs) -> None:
        space = SearchSpace.create(space)
        kwargs = {**space.model_args, **kwargs}
        super().__init__(space.largest.to_network_def(), **kwargs)
        # space.model_args always describes the network that was built
        self.space = space.with_model_args(**{k: kwargs[k] for k in space.model_args})
        self.active: Arch | None = None
        self._checked: dict[str, Arch] = {}
        self._auto_mode: str | None = None

    # -- choosing sub-networks ------------------------------------------------------------------------------------

    def set_arch(self, arch: Arch | Any | None) -> None:
        """Make `forward` compute this sub-network; None for the full network.

        Raises:
            ArchError: The architecture does not fit in the supernet; the message names the entry.
        """
        self.active = None if arch is None else self.check_arch(arch)

    def check_arch(self, arch: Arch | Any) -> Arch:
        """The architecture, if it is a sub-network of this supernet.

        Raises:
            ArchError: It has other blocks or reductions, other head dims, or more of something than the supernet.
        """
        arch = Arch.from_network_def(arch)
        known = self._checked.get(arch.key())
        if known is not None:
            return known
        largest = self.arch
        if len(arch.blocks) != len(largest.blocks):
            raise ArchError(
                f"the architecture has {len(arch.blocks)} blocks and reductions, the supernet {len(largest.blocks)}; "
                f"a sub-network keeps every position (absent blocks as exists=0)"
            )
        pairs = [
            (arch.patch_embed, largest.patch_embed),
            *zip(arch.blocks, largest.blocks, strict=True),
        ]
        for i, (entry, limit) in enumerate(pairs):
            if not _fits(entry, limit):
                raise ArchError(
                    f"network_def entry {i} {entry.to_def()} does not fit in the supernet's {limit.to_def()}"
                )
        if len(self._checked) >= 4096:  # memory must not grow with the number of candidates
            self._checked.clear()
        self._checked[arch.key()] = arch
        return arch

    def extract(self, arch: Arch | Any) -> VitResNas:
        """The sub-network as an ordinary timm model `vit_resnas` with a copy of its weights.

        Built from the canonical form (absent blocks deleted), on the supernet's device and dtype, in its mode.
        """
        arch = self.check_arch(arch)
        stand_alone = arch.canonical().with_num_classes(self.num_classes)
        cfg = getattr(self, "pretrained_cfg", {})
        overlay = {k: cfg[k] for k in ("interpolation", "crop_pct", "crop_mode", "mean", "std") if k in cfg}
        net = timm.create_model(
            "vit_resnas",
            network_def=stand_alone.to_network_def(),
            img_size=self.img_size,
            patch_size=self.patch_size,
            in_chans=self.in_chans,
            num_classes=self.num_classes,
            global_pool=self.global_pool,
            distill_token=self.has_dist,
            patch_head=self.patch_head is not None,
            pretrained_cfg_overlay=dict(
                overlay,
                input_size=(self.in_chans, *self.img_size),
                num_classes=self.num_classes,
                pool_size=self.grids[-1],
            ),
            device="meta",  # nothing to initialise
            dtype=self.cls_token.dtype,
        )
        net.load_state_dict(self.sliced_state_dict(arch, net), assign=True)
        return net.train(self.training)

    def sliced_state_dict(self, arch: Arch, net: VitResNas) -> dict[str, torch.Tensor]:
        """The sub-network's part of the weights, copied, under the keys of the extracted ``net``."""
        present = [i for i, b in enumerate(arch.blocks) if not (isinstance(b, Block) and not b.exists)]
        source = self.state_dict()
        out = {}
        for key, target in net.state_dict().items():
            name = key
            if key.startswith("blocks."):
                _, i, rest = key.split(".", 2)
                name = f"blocks.{present[int(i)]}.{rest}"
            value = source[name]
            if ".qkv." in name:
                # rows are q, k, v, each with the first heads in front
                thirds = value.view(3, -1, *value.shape[1:])[:, : target.shape[0] // 3]
                value = thirds.reshape(-1, *value.shape[1:])
                value = value[:, : target.shape[1]] if value.ndim == 2 else value
            else:
                value = value[tuple(slice(n) for n in target.shape)]
            out[key] = value.detach().clone(memory_format=torch.contiguous_format)
        return out

    # -- channel sorting ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sort_channels(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put hidden units and heads of every block in order of importance, so that sub-networks keep the best.

        Importance is the sum of the absolute weights and biases that make and use a unit (paper, section 3.3; released
        code). The function of the full network stays; that of sub-networks changes. Stable and in place; gradients
        are permuted along. In distributed training every process must call it.

        Args:
            optimizer: Its moments are permuted along (the released code leaves them where they were).

        Raises:
            ValueError: The optimizer keeps a state that is not per weight, such as factored moments.
        """
        state = {} if optimizer is None else optimizer.state
        for block in self.blocks:
            if not isinstance(block, TransformerBlock):
                continue
            attn, fc1, fc2 = block.attn, block.mlp.fc1, block.mlp.fc2
            order = _order(_strength(fc1.weight, 0) + _strength(fc1.bias, 0) + _strength(fc2.weight, 1))
            for param, dim in ((fc1.weight, 0), (fc1.bias, 0), (fc2.weight, 1)):
                _permute(param, dim, order, state)

            qkv, proj = attn.qkv, attn.proj
            strength = _strength(qkv.weight, 0) + _strength(qkv.bias, 0)  # [q, k, v][head][head_dim]
            strength = strength.view(3, -1, attn.head_dim).sum(dim=(0, 2))
            strength += _strength(proj.weight, 1).view(-1, attn.head_dim).sum(dim=1)
            order = torch.arange(proj.in_features, device=strength.device).view(-1, attn.head_dim)
            order = order[_order(strength)].flatten()
            thirds = torch.cat([order + i * proj.in_features for i in range(3)])
            for param, dim, index in ((qkv.weight, 0, thirds), (qkv.bias, 0, thirds), (proj.weight, 1, order)):
                _permute(param, dim, index, state)

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, archs: Iterable[Arch | Any] | None = None, mode: str = "auto"):
        """Logits (and patch or distillation logits, as `VitResNas.forward`) in batch order.

        The backward pass of sub-networks gives every parameter a gradient, zero where none of them uses it.

        Args:
            x: Images [B, C, H, W].
            archs: Sub-networks, each computed on its own of ``len(archs)`` equal contiguous groups of the batch.
                None: the active architecture (`set_arch`) on the whole batch.
            mode: How several sub-networks are computed. 'sliced' multiplies only each one's slices of the weights;
                'masked' computes the full network and masks channels (the paper's way). Both give the same outputs
                and gradients, up to rounding. 'auto' chooses.

        Raises:
            ValueError: The batch is not a multiple of the number of architectures, the images have another size than
                the supernet's, or the mode is unknown.
            ArchError: An architecture does not fit in the supernet.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        if archs is None and self.active is None:
            return super().forward(x)
        if tuple(x.shape[2:]) != self.img_size:
            size, own = ("x".join(map(str, s)) for s in (x.shape[2:], self.img_size))
            raise ValueError(f"images of {size} do not match the supernet's {own}; see set_input_size")
        if archs is None:
            return self.forward_from_stem(self.patch_embed.stem(x))
        archs = [self.check_arch(a) for a in archs]
        if not archs or x.shape[0] % len(archs):
            raise ValueError(f"a batch of {x.shape[0]} images cannot be cut into {len(archs)} equal groups")
        if self.num_classes <= 0 and len({a.head.dim for a in archs}) > 1:
            raise ValueError("sub-networks of several widths need a classifier; the supernet has num_classes=0")
        compute = self._forward_masked if self._choose(mode) == "masked" else self._forward_sliced
        return compute(self.patch_embed.stem(x), archs)

    def forward_from_stem(self, stem: torch.Tensor):
        """`forward` of the active architecture from ``net.patch_embed.stem(x)``, which all sub-networks share."""
        arch = self.active or self.arch
        if self.training or torch.is_grad_enabled():
            return self._forward_sliced(stem, [arch])
        return self._forward_one(stem, arch)

    def _choose(self, mode: str) -> str:
        """The mode that 'auto' stands for; said once."""
        if mode != "auto":
            return mode
        if self._auto_mode is None:
            self._auto_mode = "sliced"
            _logger.info("sub-networks are computed in mode '%s'", self._auto_mode)
        return self._auto_mode

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

    def _forward_masked(self, stem: torch.Tensor, archs: Sequence[Arch]):
        # x is [groups, images, tokens, channels] and zero where a group's mask is
        groups = len(archs)
        masks = self._masks(archs, like=stem)
        keep = next(masks)
        x = self._tokens(self.patch_embed.projection(stem).flatten(2).transpose(1, 2))
        x = x.unflatten(0, (groups, -1)) * keep
        for block in self.blocks:
            if isinstance(block, SpatialReduction):
                x = self._masked_reduce(block, x, keep, keep := next(masks))
                continue
            args = (block, x, keep, next(masks), next(masks), next(masks))
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._masked_block, *args)
            else:
                x = self._masked_block(*args)
        x = masked_layer_norm(x, keep, self.norm.weight, self.norm.bias, self.norm.eps).flatten(0, 1)
        if self.num_classes <= 0:
            x = x[..., : archs[0].head.dim]
        return self.forward_head(touch(x, self._unused()))

    def _masks(self, archs: Sequence[Arch], like: torch.Tensor) -> Iterator[torch.Tensor]:
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

    def _masked_block(self, block: TransformerBlock, x, keep, heads, hidden, branch) -> torch.Tensor:
        attn, mlp = block.attn, block.mlp
        groups = (len(x), -1)
        y = masked_layer_norm(x, keep, block.norm1.weight, block.norm1.bias, block.norm1.eps)
        y = _attend(attn.qkv(y).flatten(0, 1), attn.head_dim, attn.attn_drop.p if self.training else 0.0)
        y = attn.proj(y.unflatten(0, groups) * heads.to(y.dtype)).flatten(0, 1)
        x = torch.addcmul(x, block.drop_path1(attn.proj_drop(y)).unflatten(0, groups), branch)

        y = masked_layer_norm(x, keep, block.norm2.weight, block.norm2.bias, block.norm2.eps)
        y = mlp.drop1(mlp.act(mlp.fc1(y)).mul_(hidden))
        y = mlp.drop2(mlp.fc2(y)).flatten(0, 1)
        return torch.addcmul(x, block.drop_path2(y).unflatten(0, groups), branch)

    def _masked_reduce(self, block: SpatialReduction, x, keep, out) -> torch.Tensor:
        prefix = block.num_prefix_tokens
        y = masked_layer_norm(x, keep, block.norm.weight, block.norm.bias, block.norm.eps).flatten(0, 1)
        patches = block.patch_reduce(block.to_map(y[:, prefix:])).flatten(2).transpose(1, 2) + block.pos_embed
        y = torch.cat([block.token_transform(y[:, :prefix]), patches], dim=1)
        shortcut = F.pad(_pool(block, x.flatten(0, 1)), (0, block.out_dim - block.in_dim))
        groups = (len(x), -1)
        return torch.addcmul(shortcut.unflatten(0, groups), y.unflatten(0, groups), out)

    # -- one sub-network, to be scored: plain layers on slices of the weights ---------------------------------------

    def _forward_one(self, stem: torch.Tensor, arch: Arch):
        """As `_forward_sliced` of one group, without what gradients and several groups need."""
        conv, dim = self.patch_embed.projection, arch.patch_embed.dim
        x = self._tokens(F.conv2d(stem, conv.weight[:dim], conv.bias[:dim], conv.stride).flatten(2).transpose(1, 2))
        for block, entry in zip(self.blocks, arch.blocks, strict=True):
            if isinstance(entry, Reduction):
                x = self._reduce_one(block, x, entry)
            elif entry.exists:
                x = self._block_one(block, x, entry)
        return self._head_packs([Pack((0,), x)])

    def _block_one(self, block: TransformerBlock, x: torch.Tensor, entry: Block) -> torch.Tensor:
        attn, mlp, dim, width, hidden = block.attn, block.mlp, entry.dim, entry.attn_dim, entry.mlp_hidden
        y = elastic_layer_norm(x, block.norm1.weight, block.norm1.bias, block.norm1.eps)
        weight = attn.qkv.weight.unflatten(0, (3, -1))[:, :width, :dim].flatten(0, 1)
        y = F.linear(y, weight, attn.qkv.bias.unflatten(0, (3, -1))[:, :width].flatten())
        y = _attend(y, attn.head_dim, 0.0)
        x = x + F.linear(y, attn.proj.weight[:dim, :width], attn.proj.bias[:dim])
        y = elastic_layer_norm(x, block.norm2.weight, block.norm2.bias, block.norm2.eps)
        y = mlp.act(F.linear(y, mlp.fc1.weight[:hidden, :dim], mlp.fc1.bias[:hidden]))
        return x + F.linear(y, mlp.fc2.weight[:dim, :hidden], mlp.fc2.bias[:dim])

    def _reduce_one(self, block: SpatialReduction, x: torch.Tensor, entry: Reduction) -> torch.Tensor:
        prefix, (dim, out) = block.num_prefix_tokens, (entry.in_dim, entry.out_dim)
        conv, linear = block.patch_reduce, block.token_transform
        y = elastic_layer_norm(x, block.norm.weight, block.norm.bias, block.norm.eps)
        tokens = F.linear(y[:, :prefix], linear.weight[:out, :dim], linear.bias[:out])
        maps = block.to_map(y[:, prefix:])
        maps = F.conv2d(maps, conv.weight[:out, :dim], conv.bias[:out], conv.stride, conv.padding)
        y = torch.cat([tokens, maps.flatten(2).transpose(1, 2) + block.pos_embed[..., :out]], dim=1)
        return y + F.pad(_pool(block, x), (0, out - dim))

    # -- sliced: each group through its own slices of the weights ---------------------------------------------------

    def _forward_sliced(self, stem: torch.Tensor, archs: Sequence[Arch]):
        packs = self._embed_packs(stem, archs)
        for i, block in enumerate(self.blocks):
            entries = [arch.blocks[i] for arch in archs]
            if isinstance(block, SpatialReduction):
                packs = self._reduce(block, packs, entries)
            elif self.grad_checkpointing and torch.is_grad_enabled():
                packs = checkpoint(self._block, block, packs, entries)
            else:
                packs = self._block(block, packs, entries)
        return self._head_packs(packs)

    def _embed_packs(self, stem: torch.Tensor, archs: Sequence[Arch]) -> list[Pack]:
        """Patch embedding of each group at its own width; the stem is common to all."""
        projection = self.patch_embed.projection
        size = projection.kernel_size[0]
        batch, channels = stem.shape[:2]
        height, width = self.grids[0]
        # the kernel equals the stride, so the convolution is a linear layer on patches
        patches = stem.view(batch, channels, height, size, width, size).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(len(archs), -1, height * width, channels * size * size)
        members = _by_width([arch.patch_embed.dim for arch in archs])
        xs = elastic_linear(
            [_take(patches, groups).flatten(0, 1) for groups in members.values()],
            projection.weight.flatten(1),
            projection.bias,
            [[patches.shape[-1]] * len(groups) for groups in members.values()],
            [[dim] * len(groups) for dim, groups in members.items()],
        )
        return [Pack(groups, self._tokens(x)) for groups, x in zip(members.values(), xs, strict=True)]

    def _block(self, block: TransformerBlock, packs: list[Pack], entries: Sequence[Block]) -> list[Pack]:
        """One transformer block on the groups in which it is present."""
        kept = [[i for i, g in enumerate(pack.groups) if entries[g].exists] for pack in packs]
        touched = [k for k, rows in enumerate(kept) if rows]
        if not touched:
            first, *rest = packs
            return [Pack(first.groups, touch(first.x, list(block.parameters()))), *rest]
        genes = [[entries[packs[k].groups[i]] for i in kept[k]] for k in touched]
        xs = [_rows(packs[k], kept[k]) for k in touched]
        dims = [[x.shape[-1]] * len(g) for x, g in zip(xs, genes, strict=True)]
        heads = [[b.attn_dim for b in g] for g in genes]
        hidden = [[b.mlp_hidden for b in g] for g in genes]

        attn, mlp = block.attn, block.mlp
        ys = [elastic_layer_norm(x, block.norm1.weight, block.norm1.bias, block.norm1.eps) for x in xs]
        ys = elastic_linear(ys, attn.qkv.weight, attn.qkv.bias, dims, heads, parts=3)
        ys = [_attend(y, attn.head_dim, attn.attn_drop.p if self.training else 0.0) for y in ys]
        ys = elastic_linear(ys, attn.proj.weight, attn.proj.bias, heads, dims)
        xs = [x + block.drop_path1(attn.proj_drop(y)) for x, y in zip(xs, ys, strict=True)]

        ys = [elastic_layer_norm(x, block.norm2.weight, block.norm2.bias, block.norm2.eps) for x in xs]
        ys = elastic_linear(ys, mlp.fc1.weight, mlp.fc1.bias, dims, hidden)
        ys = [mlp.drop1(mlp.act(y)) for y in ys]
        ys = elastic_linear(ys, mlp.fc2.weight, mlp.fc2.bias, hidden, dims)
        xs = [x + block.drop_path2(mlp.drop2(y)) for x, y in zip(xs, ys, strict=True)]

        packs = list(packs)
        for k, x in zip(touched, xs, strict=True):
            packs[k] = _put_rows(packs[k], kept[k], x)
        return packs

    def _reduce(self, block: SpatialReduction, packs: list[Pack], entries: Sequence[Reduction]) -> list[Pack]:
        """Spatial reduction; groups are packed anew by the next stage's width."""
        prefix = block.num_prefix_tokens
        outs = [[entries[g].out_dim for g in pack.groups] for pack in packs]
        ins = [[pack.x.shape[-1]] * len(pack.groups) for pack in packs]
        ys = [elastic_layer_norm(pack.x, block.norm.weight, block.norm.bias, block.norm.eps) for pack in packs]
        tokens = elastic_linear(
            [y[:, :prefix] for y in ys], block.token_transform.weight, block.token_transform.bias, ins, outs
        )
        # im2col: the first input channels are the first columns of the flattened weight
        conv = block.patch_reduce
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
        members = _by_width([entry.out_dim for entry in entries])
        return [Pack(groups, torch.cat([reduced[g] for g in groups])) for groups in members.values()]

    def _head_packs(self, packs: list[Pack]):
        """Final norm and classifiers; outputs in batch order, in the forms of `forward_head`."""
        prefix = self.num_prefix_tokens
        xs = [elastic_layer_norm(pack.x, self.norm.weight, self.norm.bias, self.norm.eps) for pack in packs]
        xs[0] = touch(xs[0], self._unused())

        def classify(head: nn.Module, features: list[torch.Tensor]) -> torch.Tensor:
            features = [self.head_drop(f) for f in features]
            if isinstance(head, nn.Linear):
                ins = [[f.shape[-1]] * len(pack.groups) for f, pack in zip(features, packs, strict=True)]
                outs = [[head.out_features] * len(pack.groups) for pack in packs]
                features = elastic_linear(features, head.weight, head.bias, ins, outs)
            parts = {}
            for pack, f in zip(packs, features, strict=True):
                parts.update(zip(pack.groups, f.chunk(len(pack.groups)), strict=True))
            return torch.cat([parts[g] for g in range(len(parts))])

        if self.head_dist is not None:
            cls = classify(self.head, [x[:, 0] for x in xs])
            dist = classify(self.head_dist, [x[:, 1] for x in xs])
            if self.distilled_training and self.training:
                return cls, dist
            return (cls + dist) / 2
        if self.global_pool == "token":
            pooled = [x[:, 0] for x in xs]
        elif self.global_pool == "avg":
            pooled = [x[:, prefix:].mean(dim=1) for x in xs]
        else:
            pooled = xs
        logits = classify(self.head, pooled)
        if self.token_labeling and self.training:
            return logits, classify(self.patch_head, [x[:, prefix:] for x in xs])
        return logits


def _strength(param: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum of absolute values of each index of ``dim``."""
    # double, so that no order of summation decides which comes first
    dtype = torch.float32 if param.device.type == "mps" else torch.float64
    others = [d for d in range(param.ndim) if d != dim]
    return param.abs().sum(dim=others, dtype=dtype) if others else param.abs().to(dtype)


def _order(strength: torch.Tensor) -> torch.Tensor:
    return torch.argsort(strength, descending=True, stable=True)


def _permute(param: torch.Tensor, dim: int, order: torch.Tensor, state: Mapping[torch.Tensor, dict[str, Any]]) -> None:
    """Reorder a parameter, its gradient and its optimizer state in place."""
    tensors = [param] if param.grad is None else [param, param.grad]
    for name, value in state.get(param, {}).items():
        if isinstance(value, torch.Tensor) and value.shape == param.shape:
            tensors.append(value)
        elif isinstance(value, torch.Tensor) and value.numel() > 1:
            raise ValueError(
                f"the optimizer's state {name!r} of shape {list(value.shape)} cannot be sorted along with a parameter "
                f"of shape {list(param.shape)}; sort_channels needs an optimizer with state per weight, such as AdamW"
            )
    for tensor in tensors:
        tensor.copy_(tensor.index_select(dim, order))


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


def _by_width(widths: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Groups of each width, widest first."""
    return {w: tuple(g for g, v in enumerate(widths) if v == w) for w in sorted(set(widths), reverse=True)}


def _take(x: torch.Tensor, groups: tuple[int, ...]) -> torch.Tensor:
    """Groups of [groups, ...]; a view where they are neighbours."""
    if groups == tuple(range(groups[0], groups[0] + len(groups))):
        return x[groups[0] : groups[0] + len(groups)]
    return x[list(groups)]


def _rows(pack: Pack, kept: list[int]) -> torch.Tensor:
    if len(kept) == len(pack.groups):
        return pack.x
    return _take(pack.x.unflatten(0, (len(pack.groups), -1)), tuple(kept)).flatten(0, 1)


def _put_rows(pack: Pack, kept: list[int], x: torch.Tensor) -> Pack:
    if len(kept) == len(pack.groups):
        return Pack(pack.groups, x)
    parts = list(pack.x.chunk(len(pack.groups)))
    for i, part in zip(kept, x.chunk(len(kept)), strict=True):
        parts[i] = part
    return Pack(pack.groups, torch.cat(parts))


def _pool(block: SpatialReduction, x: torch.Tensor) -> torch.Tensor:
    """The residual of a spatial reduction before its channels are padded: patches pooled, prefix tokens as they are."""
    prefix = block.num_prefix_tokens
    pooled = F.avg_pool2d(block.to_map(x[:, prefix:]), 2).flatten(2).transpose(1, 2)
    return torch.cat([x[:, :prefix], pooled], dim=1)


def _attend(qkv: torch.Tensor, head_dim: int, dropout: float) -> torch.Tensor:
    """[R, N, 3 * heads * head_dim] -> [R, N, heads * head_dim]. Heads that a group lacks are zero and stay zero."""
    q, k, v = qkv.unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


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
