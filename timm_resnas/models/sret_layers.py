"""Layers of SReT: grouped attention over permuted tokens, blocks that are applied several times, and their stages.

Paper: `Sliced Recursive Transformer` - https://arxiv.org/abs/2111.05297 (ECCV 2022)
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import ClNormMlpClassifierHead, DropPath, LayerNorm, Mlp, use_fused_attn
from timm.models import checkpoint, register_notrace_function, register_notrace_module
from torch import nn

__all__ = ["EVAL_PERMUTATIONS", "RESIDUALS", "GroupAttention", "PatchEmbed", "RecursiveBlock", "Stage", "TokenHead"]

RESIDUALS = ("both", "identity", "branch", "none")
EVAL_PERMUTATIONS = ("fixed", "identity", "random")
NORM = partial(LayerNorm, eps=1e-6)


def fixed_permutation(num_tokens: int, seed: int, device: torch.device) -> torch.Tensor:
    """Return a pseudo-random permutation of `num_tokens` indices, the same on every device and in every version.

    The indices are sorted by a hash (the finaliser of MurmurHash3, a bijection on 32 bits, so no ties).
    """
    mask = 0xFFFFFFFF
    x = (torch.arange(num_tokens, device=device) + (seed + 1) * 0x9E3779B1) & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return (x ^ (x >> 16)).argsort()


@register_notrace_function
def resample_pos_embed(pos_embed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resample a `[1, C, H, W]` position embedding to another grid (bicubic, antialiased)."""
    if pos_embed.shape[2] == height and pos_embed.shape[3] == width:
        return pos_embed
    resampled = F.interpolate(pos_embed.float(), size=(height, width), mode="bicubic", antialias=True)
    return resampled.to(pos_embed.dtype)


class WeightedSum(nn.Module):
    """Residual sum `identity * x + branch * y` with learnable scalars (paper: learnable residual connection)."""

    def __init__(self, residual: str = "both", device=None, dtype=None):
        super().__init__()
        one = partial(torch.ones, 1, device=device, dtype=dtype)
        self.identity = nn.Parameter(one()) if residual in ("both", "identity") else None
        self.branch = nn.Parameter(one()) if residual in ("both", "branch") else None

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.ones_(p)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.identity is not None:
            x = x * self.identity
        if self.branch is not None:
            return torch.addcmul(x, y, self.branch)
        return x + y


@register_notrace_module
class GroupAttention(nn.Module):
    """Multi-head self-attention inside groups of tokens, for one of several passes that share the weights.

    Args:
        num_tokens: patch tokens at the model's own image size.
        groups: groups of each pass.
        permute: whether a pass permutes the tokens before it groups them; without effect at one group.
        num_prefix_tokens: 1 with a class token, which attends to all tokens and is a key in every group.
        eval_permutation: 'fixed', 'identity' or 'random'; training always draws at random (torch's global generator).
        seed: seeds the fixed permutations.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        groups: Sequence[int],
        permute: Sequence[bool],
        num_prefix_tokens: int = 0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        eval_permutation: str = "fixed",
        seed: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.groups = list(groups)
        self.permute = [p and g > 1 for p, g in zip(permute, groups, strict=True)]
        self.num_prefix_tokens = num_prefix_tokens
        self.eval_permutation = eval_permutation
        self.seed = seed
        self.fused_attn = use_fused_attn()

        self.qkv = nn.Linear(dim, dim * 3, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_buffer("perm", self._fixed_permutations(num_tokens, device), persistent=False)

    def _fixed_permutations(self, num_tokens: int, device=None) -> torch.Tensor | None:
        if not any(self.permute):
            return None
        return torch.stack([fixed_permutation(num_tokens, self.seed + i, device) for i in range(len(self.permute))])

    @torch.jit.ignore
    def init_permutations(self, num_tokens: int | None = None) -> None:
        """Fill the buffer of fixed permutations again, for `num_tokens` tokens if given."""
        if self.perm is not None:
            self.perm = self._fixed_permutations(num_tokens or self.perm.shape[1], self.perm.device)

    def permutation(self, num_tokens: int, index: int, device: torch.device) -> torch.Tensor | None:
        """Return the permutation `[num_tokens]` of pass `index`, or None for none."""
        if self.perm is not None:
            if self.permute[index]:
                if self.training or self.eval_permutation == "random":
                    return torch.randperm(num_tokens, device=device)
                if self.eval_permutation == "fixed":
                    if self.perm.shape[1] == num_tokens:
                        return self.perm[index]
                    return fixed_permutation(num_tokens, self.seed + index, device)
        return None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of `[B, N, C]` queries over `[B, M, C]` keys and values."""
        B, N, C = q.shape
        q = q.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = k.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        v = v.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = self.attn_drop(attn.softmax(dim=-1))
            x = attn @ v
        return x.transpose(1, 2).reshape(B, N, C)

    def attend_groups(self, qkv: torch.Tensor, prefix: torch.Tensor | None, num_groups: int) -> torch.Tensor:
        """Attention of tokens `[B, groups * n, 3C]` inside contiguous groups, with prefix keys `[B, 1, 3C]` in each."""
        B, N, C3 = qkv.shape
        q, k, v = qkv.reshape(B * num_groups, N // num_groups, C3).chunk(3, dim=-1)
        if prefix is not None:
            _, pk, pv = prefix.repeat_interleave(num_groups, dim=0).chunk(3, dim=-1)
            k, v = torch.cat([pk, k], dim=1), torch.cat([pv, v], dim=1)
        return self.attend(q, k, v).reshape(B, N, C3 // 3)

    def forward(self, x: torch.Tensor, index: int = 0) -> torch.Tensor:
        P = self.num_prefix_tokens
        num_tokens = x.shape[1] - P
        size = (num_tokens + self.groups[index] - 1) // self.groups[index]
        num_groups = num_tokens // size
        perm = self.permutation(num_tokens, index, x.device)

        if perm is not None and P == 0:
            x = x.index_select(1, perm)  # cheaper before the projection: C channels, not 3C
        qkv = self.qkv(x)
        prefix: torch.Tensor | None = None
        x_prefix: torch.Tensor | None = None
        if P > 0:
            prefix = qkv[:, :P]
            q, k, v = qkv.chunk(3, dim=-1)
            x_prefix = self.attend(q[:, :P], k, v)
            qkv = qkv[:, P:]
            if perm is not None:
                qkv = qkv.index_select(1, perm)

        even = num_groups * size
        x = self.attend_groups(qkv[:, :even], prefix, num_groups)
        if even < num_tokens:
            x = torch.cat([x, self.attend_groups(qkv[:, even:], prefix, 1)], dim=1)
        if perm is not None:
            x = x.index_select(1, perm.argsort())
        if x_prefix is not None:
            x = torch.cat([x_prefix, x], dim=1)
        return self.proj_drop(self.proj(x))


class NonLinearProjection(nn.Module):
    """Non-linear projection layer (NLL): a residual MLP between two applications of a shared block."""

    def __init__(self, dim: int, hidden: int, residual: str, proj_drop: float, norm_layer, act_layer, **dd):
        super().__init__()
        self.norm = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, hidden, act_layer=act_layer, drop=proj_drop, **dd)
        self.res = WeightedSum(residual, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.res(x, self.mlp(self.norm(x)))


class RecursiveBlock(nn.Module):
    """A transformer block applied once per entry of `groups`, an NLL with its own weights after each application."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        groups: Sequence[int],
        permute: Sequence[bool],
        mlp_hidden: int,
        nll_hidden: int,
        num_prefix_tokens: int = 0,
        residual: str = "both",
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer=NORM,
        act_layer=nn.GELU,
        eval_permutation: str = "fixed",
        seed: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = GroupAttention(
            dim,
            num_heads,
            num_tokens,
            groups,
            permute,
            num_prefix_tokens=num_prefix_tokens,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            eval_permutation=eval_permutation,
            seed=seed,
            **dd,
        )
        self.res1 = WeightedSum(residual, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, mlp_hidden, act_layer=act_layer, drop=proj_drop, **dd)
        self.res2 = WeightedSum(residual, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.nll = nn.ModuleList(
            NonLinearProjection(dim, nll_hidden, residual, proj_drop, norm_layer, act_layer, **dd)
            if nll_hidden
            else nn.Identity()
            for _ in groups
        )

    def forward(self, x: torch.Tensor, recursions: int) -> torch.Tensor:
        for i, nll in enumerate(self.nll):
            if i < recursions:
                x = self.res1(x, self.drop_path(self.attn(self.norm1(x), i)))
                x = self.res2(x, self.drop_path(self.mlp(self.norm2(x))))
                x = nll(x)
        return x


class Stage(nn.Module):
    """Optional downsampling, then recursive blocks over the tokens of a feature map."""

    def __init__(self, in_dim: int, dim: int, blocks: list[RecursiveBlock], class_token: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        down = in_dim != 0
        self.downsample = nn.Conv2d(in_dim, dim, 3, 2, 1, groups=in_dim, **dd) if down else nn.Identity()
        # a class token skips the convolution; a linear layer widens it, as in PiT
        self.token_proj = nn.Linear(in_dim, dim, **dd) if down and class_token else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(
        self, x: torch.Tensor, token: torch.Tensor | None, recursions: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.downsample(x)
        B, C, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)
        if token is not None:
            x = torch.cat([self.token_proj(token), x], dim=1)
        else:
            x = x.contiguous()
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, recursions)
            else:
                x = block(x, recursions)
        if token is not None:
            token, x = x[:, :1], x[:, 1:]
        return x.transpose(1, 2).reshape(B, C, H, W), token


class PatchEmbed(nn.Sequential):
    """Three 3x3 convolutions, each with batch norm and ReLU; the first log2(stride) of them have stride 2."""

    def __init__(self, in_chans: int, embed_dim: int, stride: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        num_strided = int(math.log2(stride))
        widths = (in_chans, embed_dim // 2, embed_dim, embed_dim)
        for i in range(3):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride=2 if i < num_strided else 1, padding=1, **dd)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1], **dd))
            self.add_module(f"act{i + 1}", nn.ReLU(inplace=True))


class TokenHead(ClNormMlpClassifierHead):
    """Norm and classifier on the class token of `[B, 1 + N, C]`, or with `pool_type=''` on all tokens.

    The head pools, rather than the model, since timm reads a model's pooling from its head when it saves it.
    """

    def __init__(self, in_features: int, num_classes: int, pool_type: str = "token", **kwargs):
        super().__init__(in_features, num_classes, pool_type="", input_fmt="NLC", **kwargs)
        self.pool_type = pool_type

    def reset(self, num_classes: int, pool_type: str | None = None, **kwargs) -> None:
        super().reset(num_classes, None, **kwargs)
        if pool_type is not None:
            self.pool_type = pool_type

    def _global_pool(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] if self.pool_type == "token" else x
