"""Reformer as a vision encoder: attention by hashing, reversible residuals, feed-forward in chunks.

Paper: `Reformer: The Efficient Transformer` - https://arxiv.org/abs/2001.04451 (ICLR 2020)
Origin: https://github.com/lucidrains/reformer-pytorch (a widely used version of the paper's attention; no images)

Attention has one projection for queries and keys. Tokens are sorted by the bucket that a random rotation puts their
query into, cut into chunks, and attend to their chunk and the one before (locality-sensitive hashing, LSH);
several rounds of that are combined as one softmax. A layer is y1 = x1 + attention(x2), y2 = x2 + feed_forward(y1), so
that training recomputes a layer's inputs from its outputs: memory for activations does not grow with depth, but for
the buckets (a byte per token, head and round).

The paper has no classifier of images. This is a ViT without class token: patches, position embedding, reversible layers
over two copies of the tokens, their mean, layer norm, average pooling.

* Rotations are drawn afresh in every training step, and are fixed in evaluation: the model is a function.
* Any number of tokens works: padding, which is never a key, fills the last chunks. Where two buckets hold all tokens,
  attention is exact.
* Hashing pays for long sequences only. With a thread of a CPU, width 192 and buckets of 49, it is faster than exact
  attention from about 2,400 tokens on with 4 rounds, 1,500 with 2, 500 with 1; at 12,544 tokens it is 3, 7, 13 times as
  fast.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    DropPath,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    is_meta_device,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from torch import nn

from ._reversible import ReversibleBlocks, widen
from .sret import resample_pos_embed

__all__ = ["Reformer", "lsh_attention"]

_ATTENTIONS = ("lsh", "exact")
_ROTATIONS = ("fresh", "fixed")


def fixed_rotations(head_dim: int, num_hashes: int, num_buckets: int, seed: int, device: torch.device) -> torch.Tensor:
    """Return random directions `[head_dim, num_hashes, num_buckets / 2]`, the same on every device.

    Normally distributed numbers, from a hash (the finaliser of MurmurHash3) of their index.
    """
    mask = 0xFFFFFFFF
    num = head_dim * num_hashes * (num_buckets // 2)
    x = (torch.arange(num, device=device) + (seed + 1) * 0x9E3779B1) & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    uniform = (((x ^ (x >> 16)) >> 9).float() + 0.5) / 2**23
    return (2**0.5 * torch.erfinv(2 * uniform - 1)).reshape(head_dim, num_hashes, num_buckets // 2)


def hash_buckets(qk: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Return the buckets `[B, heads, rounds, N]` of vectors `[B, heads, N, d]`.

    A bucket is the direction nearest to a vector, of those in `rotations` `[d, rounds, n]` and the n opposite ones.
    """
    rotated = torch.einsum("bhnd,drk->bhrnk", qk.detach(), rotations)
    buckets = torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)
    return buckets.to(torch.uint8 if rotations.shape[2] <= 128 else torch.int32)  # small: kept for the backward pass


def lsh_attention(
    qk: torch.Tensor,
    v: torch.Tensor,
    buckets: torch.Tensor,
    bucket_size: int,
    scale: float,
    dropout: float = 0.0,
    fused: bool = False,
) -> torch.Tensor:
    """Attention in chunks of tokens sorted by bucket, combined over rounds.

    Args:
        qk: queries `[B, heads, N, d]`, also the keys when scaled to length 1.
        v: values `[B, heads, N, d]`.
        buckets: `[B, heads, rounds, N]`, integers.
        bucket_size: tokens per chunk.
        scale: of the logits.
        dropout: probability of dropping a weight.
        fused: use torch's fused attention where there is one round.

    Returns:
        `[B, heads, N, d]`.
    """
    B, H, N, d = qk.shape
    rounds = buckets.shape[2]
    total = _padded(N, bucket_size)
    buckets = F.pad(buckets.long(), (0, total - N), value=float(total))  # behind all others
    k = F.pad(F.normalize(qk, dim=-1), (0, 0, 0, total - N))
    qk, v = F.pad(qk, (0, 0, 0, total - N)), F.pad(v, (0, 0, 0, total - N))

    position = torch.arange(total, device=qk.device)
    order = (buckets * total + position).argsort(dim=-1)
    undo = order.argsort(dim=-1)
    index = order.reshape(B, H, rounds * total, 1).expand(-1, -1, -1, d)
    chunks = [B, H, rounds * total // bucket_size, bucket_size]
    q = qk.gather(2, index).reshape(chunks + [d])
    k = k.gather(2, index).reshape(chunks + [d])
    v = v.gather(2, index).reshape(chunks + [d])
    place = order.reshape(chunks)
    # the chunk before, around all rounds
    k = torch.cat([k, k.roll(1, 2)], dim=3)
    v = torch.cat([v, v.roll(1, 2)], dim=3)
    key_place = torch.cat([place, place.roll(1, 2)], dim=3)[:, :, :, None]
    # a token attends to itself only where it sees nothing else, never to padding; both numbers fit float16
    bias = torch.zeros_like(key_place, dtype=q.dtype).masked_fill(key_place >= N, -6e4)
    bias = bias.masked_fill(place[..., None] == key_place, -5e4)

    if fused and rounds == 1:
        out = F.scaled_dot_product_attention(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias.flatten(0, 1), dropout_p=dropout, scale=scale
        )
        return out.reshape(B, H, total, d).gather(2, undo.reshape(B, H, total, 1).expand(-1, -1, -1, d))[:, :, :N]
    logits = (q * scale) @ k.transpose(-2, -1) + bias
    logsum = logits.logsumexp(dim=-1, keepdim=True)
    out = F.dropout((logits - logsum).exp(), dropout) @ v

    undo = undo[:, :, :, :N, None]
    out = out.reshape(B, H, rounds, total, d).gather(3, undo.expand(-1, -1, -1, -1, d))
    weight = logsum.reshape(B, H, rounds, total, 1).gather(3, undo).softmax(dim=2)
    return (out * weight).sum(dim=2)


def _padded(num_tokens: int, bucket_size: int) -> int:
    """Smallest number of tokens that makes an even number of chunks."""
    return (num_tokens + 2 * bucket_size - 1) // (2 * bucket_size) * 2 * bucket_size


class LshAttention(nn.Module):
    """Multi-head self-attention with shared queries and keys, by hashing or exact.

    Args:
        num_tokens: tokens at the model's own image size, for which rotations are kept.
        exact: attend to all tokens.
        fresh: in training, draw the rotations at every call (torch's global generator).
        qk_scale: of the product of a query with a key of length 1.
        seed: seeds the fixed rotations.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        bucket_size: int,
        num_hashes: int,
        exact: bool = False,
        fresh: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        seed: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.bucket_size = bucket_size
        self.num_hashes = num_hashes
        self.exact = exact
        self.fresh = fresh
        self.seed = seed
        self.fused_attn = use_fused_attn()

        self.qk = nn.Linear(dim, dim, bias=False, **dd)
        self.v = nn.Linear(dim, dim, bias=False, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_buffer("rotations", torch.empty(0, **dd), persistent=False)
        self.init_rotations(num_tokens)

    @torch.jit.ignore
    def init_rotations(self, num_tokens: int) -> None:
        """Fill the buffer of fixed rotations, for `num_tokens` tokens."""
        num_buckets = 0 if self.is_exact(num_tokens) else _padded(num_tokens, self.bucket_size) // self.bucket_size
        fixed = fixed_rotations(self.head_dim, self.num_hashes, num_buckets, self.seed, self.rotations.device)
        self.rotations = fixed.to(self.rotations.dtype)

    def is_exact(self, num_tokens: int) -> bool:
        return self.exact or num_tokens <= 2 * self.bucket_size

    def get_rotations(self, num_tokens: int, like: torch.Tensor) -> torch.Tensor:
        """Return the rotations `[head_dim, num_hashes, buckets / 2]` for this call."""
        num_buckets = _padded(num_tokens, self.bucket_size) // self.bucket_size
        if self.training and self.fresh:
            return torch.randn(self.head_dim, self.num_hashes, num_buckets // 2, device=like.device, dtype=like.dtype)
        if self.rotations.shape[2] == num_buckets // 2:
            return self.rotations.to(like.dtype)
        return fixed_rotations(self.head_dim, self.num_hashes, num_buckets, self.seed, like.device).to(like.dtype)

    def attend(self, x: torch.Tensor, buckets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output `[B, N, C]` and the buckets that it used, None where attention is exact.

        Args:
            buckets: what an earlier call returned, to compute the same again.
        """
        B, N, C = x.shape
        qk = self.qk(x).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        dropout = self.attn_drop.p if self.training else 0.0
        if self.is_exact(N):
            k = F.normalize(qk, dim=-1)
            bias = torch.eye(N, dtype=x.dtype, device=x.device) * -5e4  # as in lsh_attention
            if self.fused_attn:
                x = F.scaled_dot_product_attention(qk, k, v, bias, dropout_p=dropout, scale=self.scale)
            else:
                x = F.dropout(((qk * self.scale) @ k.transpose(-2, -1) + bias).softmax(dim=-1), dropout) @ v
        else:
            # also where buckets are given: dropout has to find the generator in the same state
            rotations = self.get_rotations(N, qk)
            if buckets is None:
                buckets = hash_buckets(qk, rotations)
            x = lsh_attention(qk, v, buckets, self.bucket_size, self.scale, dropout, self.fused_attn)
        x = self.proj(x.transpose(1, 2).reshape(B, N, C))
        return self.proj_drop(x), buckets

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x, None)[0]


class ReversibleBlock(nn.Module):
    """y1 = x1 + attention(x2), y2 = x2 + feed_forward(y1), over two streams of tokens `[B, N, C]`."""

    def __init__(
        self,
        dim: int,
        attn: LshAttention,
        mlp_ratio: float,
        ff_chunks: int,
        norm_layer,
        act_layer,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.ff_chunks = ff_chunks
        self.grad_checkpointing = False

    def attend(self, x: torch.Tensor, buckets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        y, buckets = self.attn.attend(self.norm1(x.to(self.norm1.weight.dtype)), buckets)
        return self.drop_path(y).to(x.dtype), buckets

    def feed_chunk(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm2(x.to(self.norm2.weight.dtype)))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        for chunk in x.chunk(self.ff_chunks, dim=1):
            if self.grad_checkpointing and not torch.jit.is_scripting() and torch.is_grad_enabled():
                outputs.append(checkpoint(self.feed_chunk, chunk))
            else:
                outputs.append(self.feed_chunk(chunk))
        return self.drop_path(torch.cat(outputs, dim=1)).to(x.dtype)

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x1 = x1 + self.attend(x2, None)[0]
        return x1, x2 + self.feed_forward(x1)


class Reformer(nn.Module):
    """Reformer as a vision encoder (https://arxiv.org/abs/2001.04451).

    Args:
        img_size: image size (int or height, width) that position embedding and rotations are made for. Other sizes
            work too: the embedding is resampled, rotations are computed.
        patch_size: side of a patch; images are padded to whole patches.
        global_pool: 'avg', 'max', 'avgmax' or ''; after the last norm.
        mlp_ratio: hidden width of the feed-forward over `embed_dim`.
        attention: 'lsh' or 'exact'; both have the same weights.
        bucket_size: tokens of a chunk. With up to twice as many tokens, attention is exact.
        num_hashes: rounds of hashing.
        rotations: of training, 'fresh' at every step or 'fixed' as in evaluation.
        qk_scale: factor of the product of a query and a key of length 1; default head width to the power of -1/2. The
            paper's own code has 1.
        ff_chunks: parts of the sequence that go through the feed-forward one by one.
        reversible: recompute activations in the backward pass instead of keeping them.
        axial_pos_embed: position embedding as a sum of one for the row and one for the column.

    Raises:
        ValueError: an unknown choice, a number below 1, a width that heads do not divide.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 8,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        attention: str = "lsh",
        bucket_size: int = 49,
        num_hashes: int = 4,
        rotations: str = "fresh",
        qk_scale: float | None = None,
        ff_chunks: int = 1,
        reversible: bool = True,
        axial_pos_embed: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer=nn.LayerNorm,
        act_layer=nn.GELU,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        numbers = dict(patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        _check_args(dict(numbers, bucket_size=bucket_size, num_hashes=num_hashes, ff_chunks=ff_chunks))
        _check_choices(attention, rotations)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_prefix_tokens = 0
        self.output_fmt = "NCHW"
        self.num_features = self.embed_dim = embed_dim

        self.patch_embed = PatchEmbed(
            None, patch_size, in_chans, embed_dim, flatten=False, strict_img_size=False, dynamic_img_pad=True, **dd
        )
        self.grid_size = grid = self._grid(img_size)
        empty = partial(torch.empty, **dd)
        self.pos_embed = self.pos_row = self.pos_col = None
        if axial_pos_embed:
            self.pos_row = nn.Parameter(empty(1, embed_dim, grid[0], 1))
            self.pos_col = nn.Parameter(empty(1, embed_dim, 1, grid[1]))
        else:
            self.pos_embed = nn.Parameter(empty(1, embed_dim, *grid))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        blocks = []
        for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth)):
            attn = LshAttention(
                embed_dim,
                num_heads,
                grid[0] * grid[1],
                bucket_size,
                num_hashes,
                exact=attention == "exact",
                fresh=rotations == "fresh",
                qk_scale=qk_scale,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                seed=i,
                **dd,
            )
            layers = dict(norm_layer=norm_layer, act_layer=act_layer, proj_drop=proj_drop_rate, drop_path=rate)
            blocks.append(ReversibleBlock(embed_dim, attn, mlp_ratio, ff_chunks, **layers, **dd))
        self.blocks = ReversibleBlocks(*blocks, reversible=reversible)
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)]
        self.norm = norm_layer(embed_dim, **dd)
        self.head = ClassifierHead(embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        if not is_meta_device(device):
            self.init_weights(needs_reset=False)

    def _grid(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        return self.patch_embed.dynamic_feat_size(to_2tuple(img_size))

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise linear layers and position embedding by a truncated normal (.02), else torch's defaults.

        Args:
            needs_reset: also reset the other layers, as is needed after `to_empty`.
        """
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for p in (self.pos_embed, self.pos_row, self.pos_col):
            if p is not None:
                trunc_normal_(p, std=0.02)
        self._init_rotations()

    def _init_rotations(self) -> None:
        for block in self.blocks:
            block.attn.init_rotations(self.grid_size[0] * self.grid_size[1])

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "pos_row", "pos_col"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^patch_embed|^pos_",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute more: reversible blocks the feed-forward, chunk by chunk; otherwise each block."""
        self.blocks.grad_checkpointing = enable
        for block in self.blocks:
            block.grad_checkpointing = enable and self.blocks.reversible

    @torch.jit.ignore
    def set_attention(self, attention: str | None = None, num_hashes: int | None = None) -> None:
        """Change the attention ('lsh' or 'exact') or the rounds of hashing; None leaves what is."""
        if attention is not None:
            _check_choices(attention, "fixed")
            update_model_args(self, attention=attention)
        if num_hashes is not None:
            _check_args(dict(num_hashes=num_hashes))
            update_model_args(self, num_hashes=num_hashes)
        for block in self.blocks:
            if attention is not None:
                block.attn.exact = attention == "exact"
            if num_hashes is not None:
                block.attn.num_hashes = num_hashes
        self._init_rotations()

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None) -> None:
        """Resample the position embedding and make the fixed rotations for another image size.

        Args:
            img_size: int or (height, width); None keeps the size.
            patch_size: None, or the one that the network was built with, which cannot be changed.

        Raises:
            ValueError: `patch_size` is another one.
        """
        if patch_size is not None and to_2tuple(patch_size) != to_2tuple(self.patch_embed.patch_size):
            raise ValueError(f"patch_size={patch_size}: the network was built with {self.patch_embed.patch_size}.")
        if img_size is None:
            return
        self.grid_size = self._grid(img_size)
        for name, size in _position_sizes(self.grid_size).items():
            p = getattr(self, name)
            if p is not None:
                with torch.no_grad():
                    resampled = resample_pos_embed(p, *size)
                setattr(self, name, nn.Parameter(resampled, requires_grad=p.requires_grad))
        self._init_rotations()
        update_model_input_size(self, to_2tuple(img_size))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, keeping the pooling unless another is named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Return the embedded patches as a map `[B, C, rows, columns]`."""
        x = self.patch_embed(x)
        rows, cols = x.shape[2], x.shape[3]
        if self.pos_embed is not None:
            x = x + resample_pos_embed(self.pos_embed, rows, cols)
        elif self.pos_row is not None and self.pos_col is not None:
            x = x + resample_pos_embed(self.pos_row, rows, 1) + resample_pos_embed(self.pos_col, 1, cols)
        return self.pos_drop(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the map `[B, C, rows, columns]` of the last layer, normed."""
        x = self.forward_stem(x)
        B, C, H, W = x.shape
        x = self.norm(self.blocks(x.flatten(2).transpose(1, 2)))
        return x.transpose(1, 2).reshape(B, C, H, W)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the layers' maps, the mean of both streams, as timm's `forward_intermediates`.

        Args:
            x: images `[B, in_chans, H, W]`.
            indices: last n layers if int, all if None, the listed ones if a sequence.
            norm: apply the last norm to them.
            stop_early: stop after the last wanted layer.
            output_fmt: 'NCHW'.
            intermediates_only: return only the list.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW'.")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x = self.forward_stem(x)
        shape, dtype = x.shape, x.dtype

        def as_map(x: torch.Tensor, norm: bool) -> torch.Tensor:
            return (self.norm(x) if norm else x).transpose(1, 2).reshape(shape)

        x1 = x2 = widen(x.flatten(2).transpose(1, 2))
        intermediates, start = [], 0
        stops = sorted({i + 1 for i in take_indices} | ({max_index + 1} if stop_early else {len(self.blocks)}))
        for stop in stops:  # one run of reversible blocks to the next map
            x1, x2 = self.blocks.run(x1, x2, start, stop)
            start, x = stop, ((x1 + x2) / 2).to(dtype)
            if stop - 1 in take_indices:
                intermediates.append(as_map(x, norm))
        if intermediates_only:
            return intermediates
        return as_map(x, True), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers after the last wanted one, norm and head as asked; return the indices of the kept taps."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        blocks = ReversibleBlocks(*list(self.blocks)[: max_index + 1], reversible=self.blocks.reversible)
        blocks.grad_checkpointing = self.blocks.grad_checkpointing
        self.blocks = blocks.train(self.training)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))


def _check_args(numbers: dict[str, int]) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"Reformer: {name}={value} must be at least 1.")
    if "num_heads" in numbers and numbers["embed_dim"] % numbers["num_heads"]:
        raise ValueError(f"Reformer: {numbers['num_heads']} heads do not divide a width of {numbers['embed_dim']}.")


def _check_choices(attention: str, rotations: str) -> None:
    if attention not in _ATTENTIONS:
        raise ValueError(f"Reformer: attention={attention!r} is not one of {_ATTENTIONS}.")
    if rotations not in _ROTATIONS:
        raise ValueError(f"Reformer: rotations={rotations!r} is not one of {_ROTATIONS}.")


def _position_sizes(grid: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return dict(pos_embed=grid, pos_row=(grid[0], 1), pos_col=(1, grid[1]))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Reformer) -> dict[str, torch.Tensor]:
    """Resample a checkpoint's position embedding; map layers of reformer-pytorch to this model's keys.

    That library lists each layer twice, as `layers.blocks` and `layers.irrev_blocks`.
    """
    for wrapper in ("model", "state_dict"):
        state_dict = state_dict.get(wrapper, state_dict)
    layers = {"f.norm": "norm1", "f.fn.toqk": "attn.qk", "f.fn.tov": "attn.v", "f.fn.to_out": "attn.proj"}
    layers |= {"g.norm": "norm2", "g.fn.fn.w1": "mlp.fc1", "g.fn.fn.w2": "mlp.fc2"}
    sizes, out = _position_sizes(model.grid_size), {}
    for k, v in state_dict.items():
        k = k.removeprefix("module.")
        if "layers.irrev_blocks." in k:
            continue
        if m := re.match(r"(?:.*\.)?layers\.blocks\.(\d+)\.([fg])\.net\.(.*)\.(weight|bias)$", k):
            layer = f"{m[2]}.{m[3]}"
            k = f"blocks.{m[1]}.{layers.get(layer, layer)}.{m[4]}"
        if k in sizes:
            v = resample_pos_embed(v, *sizes[k])
        out[k] = v
    return out


def _create_reformer(variant: str, pretrained: bool = False, **kwargs) -> Reformer:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        Reformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


def _cfg(**kwargs) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (28, 28),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2001.04451",
        "paper_name": "Reformer: The Efficient Transformer",
        "origin_url": "https://github.com/lucidrains/reformer-pytorch",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"reformer_tiny": _cfg(), "reformer_small": _cfg()})


@register_model
def reformer_tiny(pretrained=False, **kwargs) -> Reformer:
    """12 layers of width 192 over patches of 8 pixels: 5.3M parameters, 5.3 GMACs."""
    model_args = dict(embed_dim=192, depth=12, num_heads=3)
    return _create_reformer("reformer_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def reformer_small(pretrained=False, **kwargs) -> Reformer:
    """12 layers of width 384 over patches of 8 pixels: 20.3M parameters, 18.3 GMACs."""
    model_args = dict(embed_dim=384, depth=12, num_heads=6)
    return _create_reformer("reformer_small", pretrained, **dict(model_args, **kwargs))
