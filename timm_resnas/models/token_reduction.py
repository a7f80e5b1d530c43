"""Fewer tokens inside a timm vision transformer: DynamicViT, Adaptive Token Sampling and PatchMerger.

Each method is a class that stands in front of the model's own class and owns the loop over its blocks; all else (layers
and their names, classifier, position embeddings) stays the model's. Prefix tokens (class, distillation, registers) are
never touched.

Papers:
`DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification` - https://arxiv.org/abs/2106.02034
`Adaptive Token Sampling For Efficient Vision Transformers` - https://arxiv.org/abs/2111.15667
`Learning to Merge Tokens in Vision Transformers` (PatchMerger) - https://arxiv.org/abs/2202.12015
"""

import copy
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionPoolLatent, get_device_dtype, global_pool_nlc
from timm.models import checkpoint, vision_transformer
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from .narrow import Absent
from .token_layers import (
    PatchMerger,
    Predictor,
    at_most,
    keep_best,
    kept_of,
    masked_block,
    merge_heads,
    project,
    sample,
    significance,
)

__all__ = [
    "METHODS",
    "AdaptiveTokenSampling",
    "DynamicViT",
    "Masked",
    "PatchMerging",
    "TokenError",
    "TokenReduction",
    "reduce_in_place",
    "unreduced",
]

# position embeddings are resampled in a leaf of fx graphs also where a forward of this file calls timm's
exec("torch.fx.wrap('resample_abs_pos_embed')", vars(vision_transformer))

FEWEST = 8  # tokens that a share given to ATS leaves at least, as in its released code

# tokens [B, P + n, dim]; where its patches are in the image's grid, [B, n], None: it is whole; what of each patch is
# there, [B, n], None: all
State = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class TokenError(ValueError):
    """A model whose tokens a method cannot reduce, or options that do not fit it."""


# -- what all methods share --------------------------------------------------------------------------------------------


class TokenReduction:
    """In front of the class of a timm VisionTransformer.

    `forward_features` returns fewer tokens. Where images of a batch keep different numbers, those of fewer have zeros
    in the slots that they do not use, and pooling leaves these out. `forward_intermediates` puts patches back to where
    they are in the image, with zeros elsewhere. Masks of attention cannot be given, for the tokens change.
    """

    method: ClassVar[str]

    # -- a method supplies ---------------------------------------------------------------------------------------------

    def set_up(self, **options: Any) -> None:
        """Make the layers of the method.

        Raises:
            TokenError: The options do not fit the model, or the method its blocks.
        """
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Those of `set_up`, JSON-plain."""
        raise NotImplementedError

    def before(
        self,
        i: int,
        x: torch.Tensor,
        kept: torch.Tensor | None,
        weight: torch.Tensor | None,
        total: int,
    ) -> State:
        """What happens to the tokens before block i; ``total`` is the number of patches at first."""
        return x, kept, weight

    def run(self, i: int, x: torch.Tensor, kept: torch.Tensor | None, weight: torch.Tensor | None, total: int) -> State:
        """Block i."""
        return self.checkpointed(self.blocks[i], x), kept, weight

    def has_gaps(self) -> bool:
        """Whether slots of what `forward_features` returns may be unused."""
        return False

    def macs_vary(self) -> bool:
        """Whether the arithmetic of an evaluation depends on the image."""
        return False

    # ------------------------------------------------------------------------------------------------------------------

    def checkpointed(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """The function's result; its activations are computed again in the backward pass, where this was asked for."""
        if self.grad_checkpointing:
            return checkpoint(function, *args, **kwargs)
        return function(*args, **kwargs)

    def embedded(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] to the tokens that enter the first block."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def steps(self, x: torch.Tensor, last: int | None = None) -> Iterator[State]:
        """The tokens after each block, up to the last."""
        x = self.embedded(x)
        kept, weight, total = None, None, x.shape[1] - self.num_prefix_tokens
        for i in range(len(self.blocks) if last is None else last + 1):
            x, kept, weight = self.before(i, x, kept, weight, total)
            x, kept, weight = self.run(i, x, kept, weight, total)
            yield x, kept, weight

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, P + n, dim]"""
        if torch.jit.is_scripting():
            x = self.embedded(x)
            total = x.shape[1] - self.num_prefix_tokens
            kept: torch.Tensor | None = None
            weight: torch.Tensor | None = None
            for i, block in enumerate(self.blocks):
                x, kept, weight = self.before(i, x, kept, weight, total)
                x = block(x)
            return self.norm(x)
        for tokens, _, weight in self.steps(x):  # noqa: B007
            pass
        return self.without_gaps(self.norm(tokens), weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, num_classes]"""
        return self.forward_head(self.forward_features(x))

    def without_gaps(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Tokens with zeros where there is none."""
        if weight is None:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return torch.cat([prefix, patches * weight.unsqueeze(-1).to(x.dtype)], dim=1)

    def pool(self, x: torch.Tensor, pool_type: str | None = None) -> torch.Tensor:
        """See timm's VisionTransformer; slots that are zero are left out. [B, T, dim] -> [B, dim]"""
        kind = self.global_pool if pool_type is None else pool_type
        if not torch.jit.is_scripting():
            if self.has_gaps() and kind not in ("", "token"):
                return self.pool_without_gaps(x, kind)
        if self.attn_pool is not None:
            return self.attn_pool(x if self.pool_include_prefix else x[:, self.num_prefix_tokens :])
        return global_pool_nlc(x, kind, self.num_prefix_tokens, self.pool_include_prefix)

    def pool_without_gaps(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        """As `pool`, over the tokens of each image."""
        if not self.pool_include_prefix:
            x = x[:, self.num_prefix_tokens :]
        there = x.detach().any(dim=-1)
        there = there | ~there.any(dim=1, keepdim=True)  # an image may have lost all of its patches
        if self.attn_pool is not None:
            mask = torch.zeros_like(there, dtype=x.dtype).masked_fill(~there, -torch.inf)
            return self.attn_pool(x, attn_mask=mask[:, None, None, :])
        mean = x.sum(dim=1) / there.sum(dim=1, keepdim=True)
        highest = x.masked_fill(~there.unsqueeze(-1), -torch.inf).amax(dim=1)
        return {"avg": mean, "max": highest, "avgmax": 0.5 * (highest + mean)}[kind]

    def on_grid(self, x: torch.Tensor, kept: torch.Tensor | None, total: int) -> torch.Tensor:
        """Patches [B, n, dim] where they are in the image, [B, total, dim]."""
        if kept is None:
            return x
        # unused slots are zero, so that it does not matter where they are added
        return x.new_zeros(x.shape[0], total, x.shape[2]).scatter_add(1, kept.unsqueeze(-1).expand_as(x), x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As timm's VisionTransformer; zeros where tokens were dropped, in both formats.

        Raises:
            ValueError: Another format, or a mask of attention.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r:.40}")
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal are for tokens that stay; those of vit_tokens change")
        take, last = feature_take_indices(len(self.blocks), indices)
        size, prefix, taps = x.shape[-2:], self.num_prefix_tokens, []
        height, width = self.patch_embed.dynamic_feat_size(tuple(size))
        for i, (tokens, kept, weight) in enumerate(self.steps(x, last if stop_early else None)):  # noqa: B007
            if i in take:
                y = self.without_gaps(self.norm(tokens) if norm else tokens, weight)
                taps.append((y[:, :prefix], self.on_grid(y[:, prefix:], kept, height * width)))
        maps = [patches for _, patches in taps]
        if output_fmt == "NCHW":
            if any(m.shape[1] != height * width for m in maps):
                raise ValueError(
                    f"merged tokens have no place in the image; take output_fmt='NLC', or indices of blocks before "
                    f"the merger, of {type(self).__name__}"
                )
            maps = [m.unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous() for m in maps]
        prefixes = [p for p, _ in taps] if return_prefix_tokens and prefix else None
        final = None if intermediates_only else self.without_gaps(self.norm(tokens), weight)
        if output_dict:
            found = {"image_intermediates": maps, "image_intermediates_prefix": prefixes, "image_features": final}
            return {k: v for k, v in found.items() if v is not None}
        found = maps if prefixes is None else list(zip(maps, prefixes, strict=True))
        return found if intermediates_only else (final, found)


def _depths(name: str, values: Any, depth: int) -> list[int]:
    given = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else None
    plain = given is not None and all(isinstance(v, int) and not isinstance(v, bool) for v in given)
    if not plain or not given or given != sorted(set(given)) or not 0 <= given[0] <= given[-1] < depth:
        raise TokenError(f"{name} must be rising numbers of blocks from 0 to {depth - 1}, got {values!r:.60}")
    return given


def _ratios(values: Any, count: int, places: str) -> list[float]:
    ratios = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []
    numbers = all(isinstance(r, int | float) and not isinstance(r, bool) and 0 < r <= 1 for r in ratios)
    if not numbers or len(ratios) != count or ratios != sorted(ratios, reverse=True):
        raise TokenError(
            f"keep_ratios must be shares of the patches in (0, 1], one for each of the {count} {places}, none higher "
            f"than the one before; got {values!r:.60}"
        )
    return [float(r) for r in ratios]


def _numbers(name: str, values: Any, most: int | None = None) -> list[int]:
    """One number or several, as a list."""
    given = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    for value in given or [values]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most and value > most):
            bounds = f"from 1 to {most}" if most else "from 1"
            raise TokenError(f"{name} must be a whole number {bounds}, got {value!r:.40}")
    return given


def _check_blocks(model: nn.Module, numbers: Sequence[int], what: str, attention: Sequence[type]) -> None:
    """Blocks whose attention a method computes itself."""
    for i in numbers:
        block = model.blocks[i]
        if type(block) is not Block:
            raise TokenError(f"{what} knows timm's Block, but blocks.{i} is a {type(block).__name__}")
        if type(block.attn) not in attention:
            raise TokenError(f"{what} knows timm's Attention, but blocks.{i}.attn is a {type(block.attn).__name__}")


def _check_pool(model: nn.Module, what: str) -> None:
    if model.attn_pool is not None and type(model.attn_pool) is not AttentionPoolLatent:
        raise TokenError(
            f"{what} knows timm's AttentionPoolLatent, but attn_pool is a {type(model.attn_pool).__name__}"
        )


# -- DynamicViT --------------------------------------------------------------------------------------------------------


class Masked(NamedTuple):
    """What a DynamicViT in training gives after ``set_masked_training()``.

    Attributes:
        logits: As in eval mode.
        features: Of all patch tokens after the final norm, [B, N, dim].
        decisions: Of each location, 1 for what is kept and 0 for what is dropped, [B, N]; they have gradients.
    """

    logits: torch.Tensor
    features: torch.Tensor
    decisions: list[torch.Tensor]


class DynamicViT(TokenReduction):
    """A small network in front of some blocks scores the tokens; the best stay, a fixed number of them.

    In training all tokens are computed: decisions are drawn (Gumbel-softmax, straight-through gradient), and attention
    does not see what was dropped. `timm_resnas.tasks.DynamicViTTask` has the losses.
    """

    method = "dynamicvit"
    locations: list[int]
    keep_ratios: list[float]

    def set_up(self, locations: Sequence[int] | None = None, keep_ratios: float | Sequence[float] = 0.7) -> None:
        """Add predictors.

        Args:
            locations: Blocks before which tokens are dropped. Default: after a quarter, half and three quarters.
            keep_ratios: Share of the first number of patches that is left after each location; one number r: r, r²,
                r³, ...

        Raises:
            TokenError: Options or blocks that do not fit.
        """
        depth = len(self.blocks)
        if locations is None:
            locations = sorted({depth * k // 4 for k in (1, 2, 3)})
        self.locations = _depths("locations", locations, depth)
        if isinstance(keep_ratios, int | float) and not isinstance(keep_ratios, bool):
            keep_ratios = [float(keep_ratios) ** (s + 1) for s in range(len(self.locations))]
        ratios = _ratios(keep_ratios, len(self.locations), "locations")
        _check_blocks(self, range(self.locations[0], depth), self.method, (Attention, Absent))
        _check_pool(self, self.method)
        self.keep_ratios = ratios
        dd = get_device_dtype(self)
        self.score_predictor = nn.ModuleList([Predictor(self.embed_dim, **dd) for _ in ratios])
        self.masked_training = False

    def options(self) -> dict[str, Any]:
        """See `set_up`."""
        return {"locations": list(self.locations), "keep_ratios": list(self.keep_ratios)}

    def set_masked_training(self, enable: bool = True) -> None:
        """In training, return `Masked` instead of logits."""
        self.masked_training = enable

    def has_gaps(self) -> bool:
        """In training."""
        return self.training

    def before(
        self,
        i: int,
        x: torch.Tensor,
        kept: torch.Tensor | None,
        weight: torch.Tensor | None,
        total: int,
    ) -> State:
        """Drop tokens, or decide on them."""
        for s, predictor in enumerate(self.score_predictor):
            if self.locations[s] == i:
                score = predictor(x[:, self.num_prefix_tokens :], weight)
                if self.training and not torch.jit.is_scripting():
                    decision = F.gumbel_softmax(score, hard=True)[..., 0]
                    weight = decision if weight is None else decision * weight
                else:
                    x, kept = keep_best(x, score[:, :, 0], kept, total, self.keep_ratios[s])
        return x, kept, weight

    def run(self, i: int, x: torch.Tensor, kept: torch.Tensor | None, weight: torch.Tensor | None, total: int) -> State:
        """Block i, masked once there are decisions."""
        if weight is None:
            return super().run(i, x, kept, weight, total)
        policy = F.pad(weight, (self.num_prefix_tokens, 0), value=1.0)
        return self.checkpointed(masked_block, self.blocks[i], x, policy), kept, weight

    def without_gaps(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Dropped tokens are zero; what a decision changes of the mean over those that are there is its gradient."""
        if weight is None:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        weight = weight.unsqueeze(-1)
        hard = weight.detach()
        mean = (patches * hard).sum(dim=1, keepdim=True) / hard.sum(dim=1, keepdim=True).clamp_min(1.0)
        return torch.cat([prefix, patches * hard + (patches - mean).detach() * (weight - hard)], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, num_classes]; see `set_masked_training`."""
        if not torch.jit.is_scripting():
            if self.training and self.masked_training:
                return self.forward_masked(x)
        return self.forward_head(self.forward_features(x))

    def forward_masked(self, x: torch.Tensor) -> Masked:
        """In training mode: logits, features and decisions."""
        decisions: list[torch.Tensor] = []
        for i, (tokens, _, weight) in enumerate(self.steps(x)):  # noqa: B007
            if i in self.locations:
                decisions.append(weight)
        tokens = self.norm(tokens)
        logits = self.forward_head(self.without_gaps(tokens, weight))
        return Masked(logits, tokens[:, self.num_prefix_tokens :], decisions)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """See timm's VisionTransformer."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        self.locations = [i for i in self.locations if i < len(self.blocks)]
        self.keep_ratios = self.keep_ratios[: len(self.locations)]
        self.score_predictor = self.score_predictor[: len(self.locations)]
        return taken


# -- ATS ---------------------------------------------------------------------------------------------------------------


class AdaptiveTokenSampling(TokenReduction):
    """Attention of some blocks asks only for tokens that matter to the class token; how many is the image's own number.

    It has no parameters and needs no training. As its shapes depend on the image, it is neither scripted, traced nor
    exported, and its multiply-accumulates counted without data (`timm_resnas.nas.count`) are the most that
    ``max_tokens`` allows; `timm_resnas.nas.count.expected_macs` has their mean over images.

    With ``keep_ratios`` nothing is sampled: the highest-scored tokens stay, a fixed number of them, as in DynamicViT.
    Such a network is exported and counted as any other.
    """

    method = "ats"
    keep_ratios: list[float] | None

    def set_up(
        self,
        blocks: Sequence[int] | None = None,
        max_tokens: int | float | None = None,
        keep_ratios: Sequence[float] | None = None,
    ) -> None:
        """Choose the blocks that sample.

        Args:
            blocks: Their numbers. Default: all after a quarter, of those with attention.
            max_tokens: The most patch tokens that leave such a block: a number, or a share of those that enter it (1.0
                is all; 8 are left at least). The highest-scored picks stay.
            keep_ratios: Instead of sampling, the share of the first number of patches that leaves each of the blocks.

        Raises:
            TokenError: Options or blocks that do not fit, or no class token.
        """
        depth = len(self.blocks)
        if not self.has_class_token:
            raise TokenError(f"ats asks what the class token sees; this {type(self).__bases__[-1].__name__} has none")
        if blocks is None:
            there = [not isinstance(getattr(b, "attn", None), Absent) for b in self.blocks]
            blocks = [i for i in range(depth // 4, depth) if there[i]]
        self.sampling = _depths("blocks", blocks, depth)
        share = isinstance(max_tokens, float) and 0 < max_tokens <= 1
        number = isinstance(max_tokens, int) and not isinstance(max_tokens, bool) and max_tokens >= 1
        if max_tokens is not None and not share and not number:
            raise TokenError(f"max_tokens must be a whole number from 1, or a share in (0, 1], got {max_tokens!r:.40}")
        if keep_ratios is not None:
            if max_tokens is not None:
                raise TokenError("max_tokens limits what is sampled; with keep_ratios nothing is, so give one of them")
            keep_ratios = _ratios(keep_ratios, len(self.sampling), "blocks")
        _check_blocks(self, self.sampling, self.method, (Attention,))
        _check_pool(self, self.method)
        self.max_tokens, self.keep_ratios = max_tokens, keep_ratios

    def options(self) -> dict[str, Any]:
        """See `set_up`."""
        if self.keep_ratios is not None:
            return {"blocks": list(self.sampling), "keep_ratios": list(self.keep_ratios)}
        return {"blocks": list(self.sampling), "max_tokens": self.max_tokens}

    def has_gaps(self) -> bool:
        """Where images of a batch keep different numbers."""
        return self.macs_vary()

    def macs_vary(self) -> bool:
        """Where images decide how many tokens stay."""
        return self.keep_ratios is None

    def limit(self, counts: torch.Tensor) -> torch.Tensor:
        """The most tokens that stay of as many."""
        if self.max_tokens is None:
            return counts
        if isinstance(self.max_tokens, float):
            return (counts * self.max_tokens).long().clamp_min(FEWEST).minimum(counts)
        return counts.clamp_max(self.max_tokens)

    def run(self, i: int, x: torch.Tensor, kept: torch.Tensor | None, weight: torch.Tensor | None, total: int) -> State:
        """Block i; sampling ones return the picked tokens of each image, padded to the batch's highest number."""
        prefix, block = self.num_prefix_tokens, self.blocks[i]
        mask = None if weight is None else F.pad(weight, (prefix, 0), value=True)[:, None, None, :]
        ratio = self.ratio_after(i)
        most = None if ratio is None or ratio == 1 else kept_of(total, ratio)
        # where all stay, also by rounding, nothing is to be chosen
        if i not in self.sampling or ratio == 1 or most is not None and most == x.shape[1] - prefix:
            return self.checkpointed(block, x, attn_mask=mask), kept, weight
        x, index, weight = self.checkpointed(self.sampled, block, x, weight, mask, total, most)
        return x, index if kept is None else kept.gather(1, index), weight

    def ratio_after(self, i: int) -> float | None:
        """Share of the first number of patches that leaves block i; None where it is sampled."""
        if self.keep_ratios is None:
            return None
        passed = [ratio for k, ratio in zip(self.sampling, self.keep_ratios, strict=True) if k <= i]
        return passed[-1] if passed else 1.0

    def sampled(
        self,
        block: Block,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        mask: torch.Tensor | None,
        total: int,
        most: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """timm's Block for some of its tokens."""
        x, index, weight = self.attend(block, x, weight, mask, total, most)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), index, weight

    def attend(
        self,
        block: Block,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        mask: torch.Tensor | None,
        total: int,
        most: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Its attention, for some of the tokens as queries, with all as keys and values."""
        attn, prefix = block.attn, self.num_prefix_tokens
        normed = block.norm1(x)
        q, k, v = project(attn, normed)
        index, weight = self.pick(attn, q, k, v, weight, total, most)
        rows = torch.cat([torch.arange(prefix, device=x.device).expand(x.shape[0], -1), index + prefix], dim=1)

        def take(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.gather(1, rows.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))

        q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        dropout = attn.attn_drop.p if self.training else 0.0
        if attn.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            scores = (q * attn.scale) @ k.transpose(-2, -1)
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            y = attn.attn_drop(scores.softmax(dim=-1)) @ v
        return take(x) + block.drop_path1(block.ls1(merge_heads(attn, y, take(normed)))), index, weight

    @torch.no_grad()
    def pick(
        self,
        attn: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weight: torch.Tensor | None,
        total: int,
        most: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Which patches go on, in their order, [B, n], and which of these slots are used, [B, n]; None: all.

        ``most`` go on without sampling.
        """
        batch, entering = q.shape[0], k.shape[2] - self.num_prefix_tokens
        there = torch.ones(batch, entering, dtype=torch.bool, device=q.device) if weight is None else weight
        score = significance(attn, q[:, :, :1], k, v, there)
        if most is not None:
            return score.topk(most, dim=1)[1].sort(dim=1)[0], None
        if q.is_meta:  # shapes only: as many as may be
            most = int(self.limit(torch.tensor(entering)))
            return torch.arange(most, device=q.device).expand(batch, -1), None
        counts = there.sum(dim=1)
        picked = sample(score, total, counts < total) & there
        if self.max_tokens is not None:
            picked = at_most(picked, score, self.limit(counts))
        left = picked.sum(dim=1, keepdim=True)
        index = picked.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(left.max())]
        weight = torch.arange(index.shape[1], device=q.device) < left
        return index, None if bool(weight.all()) else weight

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """See timm's VisionTransformer."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        self.sampling = [i for i in self.sampling if i < len(self.blocks)]
        if self.keep_ratios is not None:
            self.keep_ratios = self.keep_ratios[: len(self.sampling)]
        return taken


# -- PatchMerger -------------------------------------------------------------------------------------------------------


class PatchMerging(TokenReduction):
    """A `PatchMerger` between two blocks, or several; they have to be trained.

    The tokens after it have no place in the image: `forward_intermediates` gives maps of earlier blocks only.
    """

    method = "patchmerger"
    after_block: list[int]

    def set_up(
        self,
        after_block: int | Sequence[int] | None = None,
        num_tokens: int | Sequence[int] = 8,
        scaled: bool = True,
    ) -> None:
        """Add the mergers.

        Args:
            after_block: Number of blocks that run before it; of several mergers, rising numbers. Default: half of them.
            num_tokens: Number of tokens that come out; of several mergers one number for all, or one for each.
            scaled: See `PatchMerger`.

        Raises:
            TokenError: Options that do not fit.
        """
        depth = len(self.blocks)
        places = _numbers("after_block", depth // 2 if after_block is None else after_block, depth - 1)
        if places != sorted(set(places)):
            raise TokenError(f"after_block of several mergers must be rising numbers, got {places!r:.60}")
        counts = _numbers("num_tokens", num_tokens)
        if isinstance(num_tokens, int):
            counts = counts * len(places)
        if len(counts) != len(places):
            raise TokenError(
                f"num_tokens must be one number, or one for each of the {len(places)} mergers; got {counts}"
            )
        if not isinstance(scaled, bool):
            raise TokenError(f"scaled must be true or false, got {scaled!r:.40}")
        self.after_block, self.num_tokens, self.scaled = places, counts, scaled
        dd = get_device_dtype(self)
        self.patch_merger = nn.ModuleList([PatchMerger(self.embed_dim, count, scaled, **dd) for count in counts])

    def options(self) -> dict[str, Any]:
        """See `set_up`."""
        return {"after_block": list(self.after_block), "num_tokens": list(self.num_tokens), "scaled": self.scaled}

    def before(
        self,
        i: int,
        x: torch.Tensor,
        kept: torch.Tensor | None,
        weight: torch.Tensor | None,
        total: int,
    ) -> State:
        """Merge the patch tokens."""
        for s, merger in enumerate(self.patch_merger):
            if self.after_block[s] == i:
                prefix = self.num_prefix_tokens
                x = torch.cat([x[:, :prefix], merger(x[:, prefix:])], dim=1)
        return x, kept, weight

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """See timm's VisionTransformer."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        self.after_block = [i for i in self.after_block if i < len(self.blocks)]
        self.num_tokens = self.num_tokens[: len(self.after_block)]
        self.patch_merger = self.patch_merger[: len(self.after_block)]
        return taken


METHODS: dict[str, type[TokenReduction]] = {c.method: c for c in (DynamicViT, AdaptiveTokenSampling, PatchMerging)}


# -- the model's class -------------------------------------------------------------------------------------------------


@cache
def _front(method: type[TokenReduction], kind: type[VisionTransformer]) -> type[VisionTransformer]:
    # TorchScript reads the annotations of one class only
    annotations = {
        k: v for c in (*reversed(kind.__mro__), method) for k, v in vars(c).get("__annotations__", {}).items()
    }
    name = f"{method.__name__}{kind.__name__}"
    # the module that has the checkpoint filter
    return type(name, (method, kind), {"__module__": f"{__package__}.vit_tokens", "__annotations__": annotations})


def reduce_in_place(model: nn.Module, method: str, **options: Any) -> nn.Module:
    """Give a model the class that reduces its tokens, and the layers that this takes.

    Args:
        model: A timm VisionTransformer, also a narrowed one.
        method: ``"dynamicvit"``, ``"ats"`` or ``"patchmerger"``.
        **options: See `set_up` of the method's class.

    Raises:
        TokenError: The method is unknown, or does not fit the model.
        TypeError: The method has no such option.
    """
    if method not in METHODS:
        raise TokenError(f"method must be {', '.join(METHODS)}, got {method!r:.40}")
    kind = type(model)
    if isinstance(model, TokenReduction):
        raise TokenError(f"the tokens of this {kind.__name__} are reduced already, by {model.method}")
    owned = ("forward", "forward_features", "forward_intermediates", "pool")
    changed = [n for n in owned if getattr(kind, n, None) is not getattr(VisionTransformer, n)]
    if changed:
        raise TokenError(
            f"tokens can be reduced in timm's VisionTransformer; a {kind.__name__} has its own {changed[0]}"
        )
    if getattr(model.attn_pool, "pos_embed", None) is not None:
        raise TokenError(f"attn_pool of this {kind.__name__} has a position embedding, so it needs every token")
    model.__class__ = _front(METHODS[method], kind)
    try:
        model.set_up(**options)
    except Exception:
        model.__class__ = kind  # layers are made after all checks
        raise
    return model


def unreduced(model: nn.Module) -> nn.Module:
    """A copy of the model as it was before its tokens were reduced, with today's weights."""
    model = copy.deepcopy(model)
    model.__class__ = type(model).__bases__[1]
    for name in ("score_predictor", "patch_merger"):
        model._modules.pop(name, None)
    return model
