"""Layers and selections of token reduction; see `token_reduction` for the papers."""

import torch
import torch.nn.functional as F
from timm.layers import Attention, register_notrace_function, trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn

from .narrow import Absent

__all__ = [
    "PatchMerger",
    "Predictor",
    "at_most",
    "keep_best",
    "kept_of",
    "masked_attention",
    "masked_block",
    "merge_heads",
    "project",
    "sample",
    "significance",
]

EPS = 1e-6  # of masked attention, as in the released code


class Predictor(nn.Module):
    """DynamicViT's prediction module: log-probabilities of keeping and dropping each token."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, **dd), nn.Linear(dim, dim, **dd), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2, **dd),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4, **dd),
            nn.GELU(),
            nn.Linear(dim // 4, 2, **dd),
        )
        for layer in (*self.in_conv, *self.out_conv):
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Patch tokens [B, N, dim], and those that are still there [B, N] -> [B, N, 2]; entry 0 is keep."""
        x = self.in_conv(x)
        local, everywhere = x.chunk(2, dim=-1)
        if mask is None:
            everywhere = everywhere.mean(dim=1, keepdim=True)
        else:  # none may be left
            there = mask.unsqueeze(-1)
            everywhere = (everywhere * there).sum(dim=1, keepdim=True) / there.sum(dim=1, keepdim=True).clamp_min(1.0)
        x = torch.cat([local, everywhere.expand_as(local)], dim=-1)
        return self.out_conv(x).log_softmax(dim=-1)


class PatchMerger(nn.Module):
    """Any number of tokens to a fixed one: each of them is an average of the normed tokens.

    Args:
        dim: Width of a token.
        num_tokens: Number of tokens that come out.
        scaled: Divide the logits by the root of ``dim``; the paper's formula does not.
    """

    def __init__(self, dim: int, num_tokens: int, scaled: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        self.scale = dim**-0.5 if scaled else 1.0
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.queries = nn.Parameter(torch.empty(num_tokens, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries of unit variance."""
        nn.init.normal_(self.queries)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, dim] -> [B, num_tokens, dim]"""
        x = self.norm(x)
        return (self.queries @ x.transpose(1, 2) * self.scale).softmax(dim=-1) @ x


def project(attn: Attention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of timm's Attention, [B, heads, T, head_dim] each."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def merge_heads(attn: Attention, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """What timm's Attention does after its products; ``tokens`` were its input. [B, heads, T, d] -> [B, T, dim]"""
    x = attn.norm(x.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        x = x * attn.gate(tokens).sigmoid()
    return attn.proj_drop(attn.proj(x))


def masked_attention(attn: nn.Module, x: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    """DynamicViT's attention while it trains: to tokens of policy 1, and of each token to itself.

    Gradients reach the policy, for it is multiplied in; attention dropout is left out, as in the released code.

    Args:
        attn: timm's Attention, or an absent one.
        x: [B, T, dim].
        policy: [B, T].
    """
    if isinstance(attn, Absent):
        return attn(x)
    q, k, v = project(attn, x)
    scores = (q * attn.scale) @ k.transpose(-2, -1)
    seen = policy.unsqueeze(1) + torch.diag_embed(1 - policy)  # [B, T, T]
    weights = (scores - scores.amax(dim=-1, keepdim=True)).float().exp() * seen.unsqueeze(1)
    weights = (weights + EPS / x.shape[1]) / (weights.sum(dim=-1, keepdim=True) + EPS)
    return merge_heads(attn, weights.to(v.dtype) @ v, x)


def masked_block(block: Block, x: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    """timm's Block with `masked_attention`."""
    x = x + block.drop_path1(block.ls1(masked_attention(block.attn, block.norm1(x), policy)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def kept_of(total: int, ratio: float) -> int:
    """Number of tokens that are left of as many, as DynamicViT's released code rounds."""
    return max(1, int(total * ratio))


@torch.fx.wrap
@register_notrace_function
def keep_best(
    x: torch.Tensor,
    score: torch.Tensor,
    kept: torch.Tensor | None,
    total: int,
    ratio: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The patch tokens of highest score, in their order, and where in the image they are.

    Args:
        x: [B, P + n, dim], prefix tokens first.
        score: Of the patch tokens, [B, n].
        kept: Where these are, [B, n]; None: all are still there.
        total: Number of patch tokens that the image had at first.
        ratio: Share of these to keep.
    """
    count = min(kept_of(total, ratio), score.shape[1])
    prefix = x.shape[1] - score.shape[1]
    index = score.topk(count, dim=1)[1].sort(dim=1)[0]
    patches = x[:, prefix:].gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :prefix], patches], dim=1), index if kept is None else kept.gather(1, index)


def significance(
    attn: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, there: torch.Tensor
) -> torch.Tensor:
    """ATS's scores: what the class token sees of each token times the norm of its values, sum 1 over the patches.

    Args:
        attn: timm's Attention.
        q: Query of the class token, [B, heads, 1, head_dim].
        k: [B, heads, T, head_dim].
        v: [B, heads, T, head_dim].
        there: Which patches are, [B, n]; prefix tokens are.

    Returns:
        [B, n], 0 for those that are not there.
    """
    logits = ((q * attn.scale) @ k.transpose(-2, -1)).squeeze(2).float()  # [B, heads, T]
    prefix = k.shape[2] - there.shape[1]
    mask = F.pad(there, (prefix, 0), value=True)
    seen = logits.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(dim=-1).sum(dim=1)
    norm = v.float().square().sum(dim=(1, 3)).sqrt()
    score = (seen * norm)[:, prefix:] * there
    return score / score.sum(dim=1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)


def sample(score: torch.Tensor, total: int, removed: torch.Tensor) -> torch.Tensor:
    """ATS's inverse transform sampling at fixed points: which tokens are picked, [B, n] of bool.

    Args:
        score: See `significance`.
        total: Number of points: of patch tokens that the image had at first.
        removed: Whether the image has lost tokens before, [B]. (The released code keeps these with score 0, so that
            the cumulated scores start at 0.)
    """
    ordered, order = score.sort(dim=1)
    cdf = ordered.cumsum(dim=1)
    low = torch.where(removed.unsqueeze(1), 0.0, cdf[:, :1])
    cdf = (cdf - low) / (cdf[:, -1:] - low).clamp_min(torch.finfo(cdf.dtype).tiny)
    first = cdf.masked_fill(cdf <= 0, 1.0).amin(dim=1, keepdim=True)
    steps = torch.arange(total, device=cdf.device, dtype=cdf.dtype) / max(total - 1, 1)
    points = first + steps * (1 - first)  # [B, total]
    nearest = (points.unsqueeze(2) - cdf.unsqueeze(1)).abs().argmin(dim=2)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order.gather(1, nearest), True)


def at_most(picked: torch.Tensor, score: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Of the picked tokens [B, n] those of highest score, as many as ``most`` [B]."""
    rank = score.masked_fill(~picked, -1.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return picked & (rank < most.unsqueeze(1))
