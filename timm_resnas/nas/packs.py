"""Several sub-networks in one forward-backward pass: the parts that pre-norm vision transformers share.

A batch is cut into equal contiguous groups, each with an architecture. Groups that share an embedding width are kept in
one tensor, a `Pack`; each layer multiplies only each group's slice of its weight, see `elastic_linear`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .elastic import Widths, elastic_layer_norm, elastic_linear, masked_layer_norm, zero_grads_for
from .scaling import scaled, scaled_one

__all__ = [
    "BlockAt",
    "BlockWidths",
    "Pack",
    "attend",
    "by_width",
    "classify",
    "embed_patches",
    "masked_pre_norm_block",
    "pre_norm_block",
    "pre_norm_block_one",
    "take",
]


class Pack(NamedTuple):
    """Groups of a batch that share an embedding width."""

    groups: tuple[int, ...]
    x: torch.Tensor  # [len(groups) * images, tokens, embed_dim]


class BlockWidths(Protocol):
    """Widths of a transformer block of a sub-network."""

    dim: int
    attn_dim: int  # channels of all heads
    mlp_hidden: int
    exists: bool


class BlockAt(NamedTuple):
    """`BlockWidths`, and where the block's scales are, see `SwitchableScale`."""

    dim: int
    attn_dim: int
    mlp_hidden: int
    exists: bool
    scale: tuple[int, int] = (0, 0)


def by_width(widths: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Groups of each width, widest first."""
    return {w: tuple(g for g, v in enumerate(widths) if v == w) for w in sorted(set(widths), reverse=True)}


def take(x: torch.Tensor, groups: tuple[int, ...]) -> torch.Tensor:
    """Groups of [groups, ...]; a view where they are neighbours."""
    if groups == tuple(range(groups[0], groups[0] + len(groups))):
        return x[groups[0] : groups[0] + len(groups)]
    return x[list(groups)]


def embed_patches(x: torch.Tensor, projection: nn.Conv2d, dims: Sequence[int]) -> list[Pack]:
    """Patch embedding by a convolution whose kernel equals its stride, each group at its width.

    Args:
        x: Input of the convolution, [B, C, H, W]: ``len(dims)`` groups.
        projection: The convolution of the full network.
        dims: Width of each group.

    Returns:
        Packs of [images, H/k * W/k, width], widest first.
    """
    size = projection.kernel_size[0]
    batch, channels = x.shape[:2]
    height, width = x.shape[2] // size, x.shape[3] // size
    # such a convolution is a linear layer on patches
    patches = x.view(batch, channels, height, size, width, size).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(len(dims), -1, height * width, channels * size * size)
    members = by_width(dims)
    xs = elastic_linear(
        [take(patches, groups).flatten(0, 1) for groups in members.values()],
        projection.weight.flatten(1),
        projection.bias,
        [[patches.shape[-1]] * len(groups) for groups in members.values()],
        [[dim] * len(groups) for dim, groups in members.items()],
    )
    return [Pack(groups, x) for groups, x in zip(members.values(), xs, strict=True)]


def self_attention(attn: nn.Module, xs: list[torch.Tensor], dims: Widths, heads: Widths) -> list[torch.Tensor]:
    """timm's ``Attention``, its output projection included, on packs whose groups differ in channels of all heads."""
    ys = elastic_linear(xs, attn.qkv.weight, attn.qkv.bias, dims, heads, parts=3)
    ys = [attend(y, attn.head_dim, attn.attn_drop.p if attn.training else 0.0) for y in ys]
    return elastic_linear(ys, attn.proj.weight, attn.proj.bias, heads, dims)


def self_attention_one(attn: nn.Module, x: torch.Tensor, dim: int, width: int) -> torch.Tensor:
    """As `self_attention` of one group, without gradients. [B, N, dim]"""
    weight = attn.qkv.weight.unflatten(0, (3, -1))[:, :width, :dim].flatten(0, 1)
    x = F.linear(x, weight, attn.qkv.bias.unflatten(0, (3, -1))[:, :width].flatten())
    return F.linear(attend(x, attn.head_dim, 0.0), attn.proj.weight[:dim, :width], attn.proj.bias[:dim])


def masked_self_attention(attn: nn.Module, x: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """As `self_attention` on ``[groups, images, tokens, channels]``; ``heads`` masks the channels of all heads."""
    y = attend(attn.qkv(x).flatten(0, 1), attn.head_dim, attn.attn_drop.p if attn.training else 0.0)
    return attn.proj(y.unflatten(0, (len(x), -1)) * heads.to(y.dtype))


def pre_norm_block(
    block: nn.Module,
    packs: list[Pack],
    widths: Sequence[BlockWidths],
    attention: Callable[..., list[torch.Tensor]] = self_attention,
) -> list[Pack]:
    """One transformer block on the groups in which it is present.

    Args:
        block: With ``norm1, attn, ls1, drop_path1, norm2, mlp, ls2, drop_path2`` of timm, at the full network's
            widths; ls1 and ls2 are switchable scales, or do nothing.
        packs: All groups.
        widths: Of each group; `BlockAt` where there are scales.
        attention: What ``block.attn`` computes, for a family of its own kind.
    """
    kept = [[i for i, g in enumerate(pack.groups) if widths[g].exists] for pack in packs]
    used = [k for k, rows in enumerate(kept) if rows]
    if not used:
        first, *rest = packs
        return [Pack(first.groups, zero_grads_for(first.x, list(block.parameters()))), *rest]
    genes = [[widths[packs[k].groups[i]] for i in kept[k]] for k in used]
    xs = [_rows(packs[k], kept[k]) for k in used]
    dims = [[x.shape[-1]] * len(g) for x, g in zip(xs, genes, strict=True)]
    heads = [[w.attn_dim for w in g] for g in genes]
    hidden = [[w.mlp_hidden for w in g] for g in genes]

    attn, mlp = block.attn, block.mlp
    ys = [elastic_layer_norm(x, block.norm1.weight, block.norm1.bias, block.norm1.eps) for x in xs]
    ys = attention(attn, ys, dims, heads)
    ys = [scaled(block.ls1, attn.proj_drop(y), g) for y, g in zip(ys, genes, strict=True)]
    xs = [x + block.drop_path1(y) for x, y in zip(xs, ys, strict=True)]

    ys = [elastic_layer_norm(x, block.norm2.weight, block.norm2.bias, block.norm2.eps) for x in xs]
    ys = elastic_linear(ys, mlp.fc1.weight, mlp.fc1.bias, dims, hidden)
    ys = [mlp.drop1(mlp.act(y)) for y in ys]
    ys = elastic_linear(ys, mlp.fc2.weight, mlp.fc2.bias, hidden, dims)
    ys = [scaled(block.ls2, mlp.drop2(y), g) for y, g in zip(ys, genes, strict=True)]
    xs = [x + block.drop_path2(y) for x, y in zip(xs, ys, strict=True)]

    packs = list(packs)
    for k, x in zip(used, xs, strict=True):
        packs[k] = _put_rows(packs[k], kept[k], x)
    return packs


def pre_norm_block_one(
    block: nn.Module,
    x: torch.Tensor,
    widths: BlockWidths,
    attention: Callable[..., torch.Tensor] = self_attention_one,
) -> torch.Tensor:
    """As `pre_norm_block` of one group, without what gradients and several groups need. [B, N, dim]"""
    mlp, dim, hidden = block.mlp, widths.dim, widths.mlp_hidden
    y = elastic_layer_norm(x, block.norm1.weight, block.norm1.bias, block.norm1.eps)
    x = x + scaled_one(block.ls1, attention(block.attn, y, dim, widths.attn_dim), widths)
    y = elastic_layer_norm(x, block.norm2.weight, block.norm2.bias, block.norm2.eps)
    y = mlp.act(F.linear(y, mlp.fc1.weight[:hidden, :dim], mlp.fc1.bias[:hidden]))
    y = F.linear(y, mlp.fc2.weight[:dim, :hidden], mlp.fc2.bias[:dim])
    return x + scaled_one(block.ls2, y, widths)


def masked_pre_norm_block(
    block: nn.Module,
    x: torch.Tensor,
    keep: torch.Tensor,
    heads: torch.Tensor,
    hidden: torch.Tensor,
    branch: torch.Tensor,
    widths: Sequence[BlockWidths],
    attention: Callable[..., torch.Tensor] = masked_self_attention,
) -> torch.Tensor:
    """As `pre_norm_block`, the paper's way: the full block, with channels of each group set to zero.

    Args:
        block: As in `pre_norm_block`.
        x: ``[groups, images, tokens, channels]``, zero where not kept.
        keep: Mask of the channels, ``[groups, 1, 1, channels]``.
        heads: Of the channels of all heads.
        hidden: Of the hidden units.
        branch: Of the channels of both branches' sums: none where the block is absent.
        widths: Of each group; what is read of them is where its scales are.
        attention: As in `pre_norm_block`.
    """
    mlp, groups = block.mlp, (len(x), -1)
    y = masked_layer_norm(x, keep, block.norm1.weight, block.norm1.bias, block.norm1.eps)
    y = scaled(block.ls1, block.attn.proj_drop(attention(block.attn, y, heads)), widths).flatten(0, 1)
    x = torch.addcmul(x, block.drop_path1(y).unflatten(0, groups), branch)

    y = masked_layer_norm(x, keep, block.norm2.weight, block.norm2.bias, block.norm2.eps)
    y = mlp.drop1(mlp.act(mlp.fc1(y)).mul_(hidden))
    y = scaled(block.ls2, mlp.drop2(mlp.fc2(y)), widths).flatten(0, 1)
    return torch.addcmul(x, block.drop_path2(y).unflatten(0, groups), branch)


def attend(qkv: torch.Tensor, head_dim: int, dropout: float) -> torch.Tensor:
    """[R, N, 3 * heads * head_dim] -> [R, N, heads * head_dim]. Heads that a group lacks are zero and stay zero."""
    q, k, v = qkv.unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


def classify(head: nn.Module, packs: Sequence[Pack]) -> torch.Tensor:
    """A classifier (or Identity) on features of each group; outputs in batch order."""
    features = [pack.x for pack in packs]
    if isinstance(head, nn.Linear):
        ins = [[pack.x.shape[-1]] * len(pack.groups) for pack in packs]
        outs = [[head.out_features] * len(pack.groups) for pack in packs]
        features = elastic_linear(features, head.weight, head.bias, ins, outs)
    parts: dict[int, torch.Tensor] = {}
    for pack, feature in zip(packs, features, strict=True):
        parts.update(zip(pack.groups, feature.chunk(len(pack.groups)), strict=True))
    return torch.cat([parts[g] for g in range(len(parts))])


def _rows(pack: Pack, kept: list[int]) -> torch.Tensor:
    if len(kept) == len(pack.groups):
        return pack.x
    return take(pack.x.unflatten(0, (len(pack.groups), -1)), tuple(kept)).flatten(0, 1)


def _put_rows(pack: Pack, kept: list[int], x: torch.Tensor) -> Pack:
    if len(kept) == len(pack.groups):
        return Pack(pack.groups, x)
    parts = list(pack.x.chunk(len(pack.groups)))
    for i, part in zip(kept, x.chunk(len(kept)), strict=True):
        parts[i] = part
    return Pack(pack.groups, torch.cat(parts))
