"""ViT-Slim: masks on attention, MLP and tokens that are trained with a network, and the network that they leave.

Paper: "Vision Transformer Slimming: Multi-Dimension Searching in Continuous Optimization Space" -
https://arxiv.org/abs/2201.00814. There masks stay multiplications and nothing gets smaller; here the network is cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from ..arch import Part
from ..models.narrow import Branch, NarrowError, branches
from ..models.token_positions import TokenPositions, check_all_patches
from ..models.token_reduction import TokenError, reduce_in_place
from ..models.vit_tokens import reduce_tokens
from ..nas.cost import Budget, BudgetError, format_cost
from ..nas.count import count_macs
from ..nas.supernet import checkpoints
from .elastic import space_of
from .elastic_space import HIDDEN_MULTIPLE, HIDDEN_STEPS, ElasticArch

__all__ = ["ATTENTION", "KINDS", "MaskedViT", "Masks", "monotone", "rectangle", "threshold"]

KINDS = ("attention", "mlp", "tokens")
ATTENTION = ("entries", "heads", "uniform")
TOKENS_START = 3.0  # tanh of it is 0.995
ENTRIES_MULTIPLE = 8  # of a head, where it has several times as many: kernels are slow at odd widths
BISECTIONS = 24
_NOT_MASKED = ("gate", "norm", "relative_position_bias_table")  # of an attention; what it reads is zero anyway


class Masks(NamedTuple):
    """What is kept, by block; all bool.

    Attributes:
        attention: Entries of query, key and value of each head, [num_heads, head_dim].
        mlp: Hidden units, [hidden].
        tokens: Positions, the class token among them, [N]; None: all.
    """

    attention: tuple[torch.Tensor, ...]
    mlp: tuple[torch.Tensor, ...]
    tokens: tuple[torch.Tensor, ...] | None = None


def threshold(values: Sequence[torch.Tensor], keep: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One threshold for the masks of all blocks: the value that a share of at least ``keep`` of them reaches.

    Args:
        values: Masks of one kind, any shapes, with their signs.
        keep: Share to keep, in (0, 1].

    Returns:
        The threshold, [], and what reaches it, bool of the masks' shapes.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"the share of masks to keep must be above 0 and at most 1, got {keep!r:.40}")
    flat = torch.cat([value.flatten() for value in values]).sort().values
    limit = flat[int((1 - keep) * len(flat))]
    return limit, [value >= limit for value in values]


def monotone(masks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Token masks by which no token that a block drops is used by a later one: an earlier block keeps it as well."""
    kept = [masks[-1]]
    for mask in reversed(masks[:-1]):
        kept.append(mask | kept[-1])
    return kept[::-1]


def rectangle(values: torch.Tensor, keep: int, multiple: int = 1) -> torch.Tensor:
    """The same number of entries in each of some heads, about ``keep`` in all, of the greatest sum of masks.

    `vit_elastic` holds one head dimension for a block, while a threshold leaves each head its own. Padding all to the
    largest would compute zeros; this has the thresholds' cost, and all that it computes counts.

    Args:
        values: Masks, [num_heads, head_dim].
        keep: Entries, over all heads.
        multiple: Of the entries of a head.

    Returns:
        bool, [num_heads, head_dim].
    """
    heads, width = values.shape
    kept = torch.zeros_like(values, dtype=torch.bool)
    order = values.sort(dim=1, descending=True, stable=True)
    sums = order.values.cumsum(dim=1)
    best = None
    for count in range(1, heads + 1):
        each = min(width, round(keep / count / multiple) * multiple)
        # as many as that, and no fewer where a head has no more: a head of low masks is not left out for its own sake
        if each == 0 or abs(count * each - keep) > count * multiple / 2:
            continue
        total, which = sums[:, each - 1].sort(descending=True, stable=True)
        score = float(total[:count].sum())
        if best is None or score > best[0]:
            best = score, which[:count], each
    if best is not None:
        _, which, each = best
        for head in which.tolist():
            kept[head, order.indices[head, :each]] = True
    return kept


class MaskedViT(nn.Module):
    """A timm vision transformer with masks to be trained with it.

    >>> net = MaskedViT(timm.create_model("deit_small_patch16_224", pretrained=True))
    >>> ...  # train with `timm_resnas.tasks.SlimMaskTask`
    >>> small = net.shrink(net.within(Budget.parse("macs=60%", net.costs())))  # a vit_elastic, logits as masked

    A mask multiplies query, key and value alike; hidden units before they are read; and, of a token, tanh of it, what
    attention and MLP get, while the residual stream stays. It is applied to the weights that make query, key and value
    and to those that read hidden units, which is the same.

    Args:
        model: Of a kind that `elastic` takes; it becomes a part of this one.
        attention: A mask for each head's entries, ``"heads"``, or ``"uniform"``: entries, alike in all heads.
        tokens: Whether tokens have masks.

    Attributes:
        model: The network.
        attention: Masks of blocks that have attention, by number: [1, 1, num_heads, 1, head_dim], 1 where all share.
        mlp: Masks of hidden units, [1, 1, hidden].
        tokens: Before tanh, [1, N, 1]; empty without token masks.
        fixed: Masks that are in force instead of the trained ones.

    Raises:
        NarrowError: The model cannot be narrowed, or not by these masks; the message names the module.
        TokenError: Tokens are to have masks, and the model drops patches at random.
        ValueError: The kind of attention mask is not known.
    """

    fixed: Masks | None

    def __init__(self, model: nn.Module, attention: str = "entries", tokens: bool = False) -> None:
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"masks of attention are {', '.join(ATTENTION)}; got {attention!r:.40}")
        if tokens:
            check_all_patches(model)
        self.space = space_of(model)
        self.model, self.granularity, self.fixed = model, attention, None
        self.pretrained_cfg = model.pretrained_cfg
        self.num_classes = model.num_classes
        self.branches = branches(model)
        like = dict(device=next(model.parameters()).device)
        self.attention, self.mlp, self.tokens = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for i, (attn, mlp) in enumerate(self.branches):
            for branch in (attn, mlp):
                if branch.units.count and (branch.whole or branch.normed):
                    raise NarrowError(
                        f"the units of {branch.units.name} are normed or mixed together, so that masking them is not "
                        f"the same as leaving them out"
                    )
            if attn.units.count:
                if attention != "heads" and not attn.entries:
                    raise NarrowError(
                        f"heads of {attn.units.name} are normed or rotated, so that each keeps its {attn.width} "
                        f"entries; mask whole heads"
                    )
                heads = 1 if attention == "uniform" else attn.units.count
                width = 1 if attention == "heads" else attn.width
                self.attention[str(i)] = nn.Parameter(torch.ones(1, 1, heads, 1, width, **like))
            if mlp.units.count:
                self.mlp[str(i)] = nn.Parameter(torch.ones(1, 1, mlp.units.count, **like))
        if tokens:
            for i, pair in enumerate(self.space.structure.pairs):
                self.tokens[str(i)] = nn.Parameter(torch.full((1, pair[0].tokens, 1), TOKENS_START, **like))
                for branch in self.branches[i]:
                    self.model.get_submodule(branch.units.name).register_forward_pre_hook(partial(self._mask_tokens, i))

    # -- masked ------------------------------------------------------------------------------------------------------

    def _mask_tokens(self, block: int, _: nn.Module, inputs: tuple) -> tuple:
        return inputs[0] * self._in_force("tokens", block).to(inputs[0].dtype), *inputs[1:]

    def _in_force(self, kind: str, block: int) -> torch.Tensor:
        """What multiplies: [num_heads, head_dim], [hidden] or [N, 1]."""
        branch = self.branches[block][kind == "mlp"]
        param = getattr(self, kind)[str(block)]
        if self.fixed is not None:
            chosen = getattr(self.fixed, kind)
            if chosen is None:
                return param.new_ones(param.shape[1:])
            fixed = chosen[block].to(param)
            return fixed[:, None] if kind == "tokens" else fixed
        if kind == "attention":
            return param[0, 0, :, 0].expand(branch.units.count, branch.width)
        return param[0, 0] if kind == "mlp" else param[0].tanh()

    def masked_weights(self) -> dict[str, torch.Tensor]:
        """Weights of the network that masks multiply, multiplied, by name."""
        params = dict(self.model.named_parameters())
        found = {}
        for i, (attn, mlp) in enumerate(self.branches):
            if attn.units.count:
                mask = self._in_force("attention", i).flatten()
                for part in _made(attn):
                    value = mask.repeat(part.runs)
                    param = params[part.param]
                    found[part.param] = param * (value[:, None] if param.ndim > 1 else value).to(param.dtype)
            if mlp.units.count:
                part = mlp.units.parts[-1]
                found[part.param] = params[part.param] * self._in_force("mlp", i).to(params[part.param].dtype)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The masked network. [B, C, H, W] -> what it returns, such as [B, num_classes]

        Raises:
            ValueError: Gradients are asked for, with gradient checkpointing.
        """
        if checkpoints(self.model):
            raise ValueError(
                "with gradient checkpointing the backward pass would compute the network again without its masks; "
                "turn it off by model.set_grad_checkpointing(False)"
            )
        return functional_call(self.model, self.masked_weights(), (x,))

    def no_weight_decay(self) -> set[str]:
        """Those of the network; masks decay, as in the released code."""
        own = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"model.{name}" for name in own}

    def prices(self) -> dict[str, torch.Tensor]:
        """Sum of the absolute masks by kind, those of tokens after tanh, []."""
        return {
            kind: torch.stack([v.abs().sum() for v in values]).sum() for kind in KINDS if (values := self.values(kind))
        }

    def values(self, kind: str) -> list[torch.Tensor]:
        """Trained masks of one kind, of the parameters' shapes; those of tokens after tanh."""
        values = list(getattr(self, kind).values())
        return [value.tanh() for value in values] if kind == "tokens" else values

    # -- thresholds --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def masks(self, keep: Mapping[str, float]) -> Masks:
        """The paper's masks: one threshold for each kind over all blocks; those of tokens monotone.

        Args:
            keep: Share to keep, in (0, 1], by kind: "attention", "mlp", "tokens"; 1 where it is not given.

        Raises:
            ValueError: A kind is not known or has no masks, or a share is out of range; masks are not finite.
        """
        if unknown := [kind for kind in keep if kind not in KINDS or not len(getattr(self, kind))]:
            raise ValueError(f"there are no masks of {', '.join(unknown)}; shares are of {', '.join(KINDS)}")
        chosen: dict[str, dict[int, torch.Tensor]] = {}
        for kind in KINDS:
            values = self.values(kind)
            if not all(bool(value.isfinite().all()) for value in values):
                raise ValueError(f"masks of {kind} are not finite; train them anew, at a lower learning rate")
            found = threshold(values, keep.get(kind, 1.0))[1] if values else []
            chosen[kind] = dict(zip(map(int, getattr(self, kind)), found, strict=True))
        attention, mlp = [], []
        for i, (attn, own) in enumerate(self.branches):
            shape = (attn.units.count, attn.width)
            device = next(self.parameters()).device
            none = torch.zeros(shape if attn.units.count else (0, 1), dtype=torch.bool, device=device)
            attention.append(chosen["attention"][i][0, 0, :, 0].expand(shape) if i in chosen["attention"] else none)
            mlp.append(chosen["mlp"][i][0, 0] if i in chosen["mlp"] else none.new_zeros(own.units.count))
        tokens = None
        if chosen["tokens"]:
            tokens = tuple(mask[0, :, 0] for mask in monotone(list(chosen["tokens"].values())))
        return Masks(tuple(attention), tuple(mlp), tokens)

    @torch.no_grad()
    def shaped(self, masks: Masks) -> Masks:
        """The nearest masks that a network holds: see `rectangle`; widths in multiples of 8; the class token stays."""
        attention, mlp = [], []
        for i, (mask, hidden) in enumerate(zip(masks.attention, masks.mlp, strict=True)):
            if self.granularity == "entries" and mask.numel():
                multiple = ENTRIES_MULTIPLE if mask.shape[1] >= 4 * ENTRIES_MULTIPLE else 1
                mask = rectangle(self._soft("attention", i), int(mask.sum()), multiple)
            attention.append(mask)
            count = len(hidden)
            if count >= HIDDEN_STEPS * HIDDEN_MULTIPLE:
                keep = min(count, round(int(hidden.sum()) / HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE)
                order = self._soft("mlp", i).argsort(descending=True, stable=True)[:keep]
                hidden = torch.zeros_like(hidden).index_fill_(0, order, True)
            mlp.append(hidden)
        tokens = masks.tokens
        if tokens is not None:
            tokens = tuple(mask.clone() for mask in tokens)
            least = self._soft("tokens", len(tokens) - 1)[self.model.num_prefix_tokens :, 0].argmax()
            for mask in tokens:  # and one patch
                mask[: self.model.num_prefix_tokens] = True
                mask[self.model.num_prefix_tokens + least] |= not mask[self.model.num_prefix_tokens :].any()
            tokens = tuple(monotone(tokens))
        return Masks(tuple(attention), tuple(mlp), tokens)

    def _soft(self, kind: str, block: int) -> torch.Tensor:
        fixed, self.fixed = self.fixed, None
        value = self._in_force(kind, block)
        self.fixed = fixed
        return value

    def check_budget(self, budget: Budget) -> None:
        """Say why masks cannot meet a budget.

        Raises:
            BudgetError: It limits what has no price here, or is out of the range of their networks.
        """
        if missing := [name for name, _ in budget if name not in self.costs()]:
            raise BudgetError(f"masks keep limits on {', '.join(self.costs())}; the budget names {missing[0]}")
        self.space.check_budget(budget)
        stay = [kind for kind in KINDS[:2] if self._stays(kind)]
        none = [
            tuple(mask if kind in stay else torch.zeros_like(mask) for mask in masks)
            for kind, masks in zip(KINDS, self.masks({})[:2], strict=False)
        ]
        tokens = None
        if len(self.tokens):
            first = torch.arange(next(iter(self.tokens.values())).shape[1]) <= self.model.num_prefix_tokens
            tokens = (first,) * len(self.tokens)
        least = self.costs(Masks(*none, tokens))
        for name, limit in budget:
            if least[name] > limit:
                but = f" but {' and '.join(stay)}, whose masks are not trained" if stay else ""
                patch = " and of one patch" if tokens else ""
                raise BudgetError(
                    f"the smallest network of masks, of one unit in each layer{but}{patch}, has {name} "
                    f"{format_cost(name, least[name])}, above the budget's {format_cost(name, limit)}"
                )

    def _stays(self, kind: str) -> bool:
        """Whether masks are alike, so that any threshold keeps all, and will not be trained."""
        values = self.values(kind)
        return (
            bool(values)
            and not any(p.requires_grad for p in getattr(self, kind).values())
            and torch.cat([v.flatten() for v in values]).unique().numel() == 1
        )

    def within(self, budget: Budget, tokens: float | None = None) -> Masks:
        """Masks of the largest share, the same of all kinds, whose network is within a budget.

        Found by bisection: no network is scored. Its lower band is not used.

        Args:
            budget: Limits.
            tokens: Share of token masks that is kept, whatever that of the others; before they are made monotone.

        Raises:
            BudgetError: See `check_budget`; or not even the smallest share is within it, for masks are alike.
        """
        self.check_budget(budget)

        def at(share: float) -> tuple[Masks, dict[str, int]]:
            shares = {kind: share for kind in KINDS if len(getattr(self, kind))}
            if tokens is not None:
                shares["tokens"] = tokens
            masks = self.shaped(self.masks(shares))
            return masks, self.costs(masks)

        def holds(costs: Mapping[str, int]) -> bool:
            return all(costs[name] <= limit for name, limit in budget)

        low, high = 1e-6, 1.0
        best, costs = at(low)
        if not holds(costs):
            if tokens is not None:
                raise BudgetError(
                    f"with {tokens:.0%} of the token masks kept, no threshold of the others leaves a network within "
                    f"{budget}; keep fewer tokens"
                )
            raise BudgetError(
                f"masks are so alike that no threshold leaves a network within {budget}; train them first"
            )
        whole, most = at(high)
        if holds(most):
            return whole
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            masks, found = at(middle)
            if holds(found):
                low = middle
                if found[budget.first] >= costs[budget.first]:
                    best, costs = masks, found
            else:
                high = middle
        return best

    # -- the smaller network -----------------------------------------------------------------------------------------

    def arch(self, masks: Masks | None = None) -> ElasticArch:
        """The network that masks leave; None: the whole.

        A branch without any unit keeps one that computes nothing, for the layer's bias.
        """
        if masks is None:
            return self.space.largest
        widths = []
        for (attn, mlp), entries, hidden in zip(self.branches, masks.attention, masks.mlp, strict=True):
            heads, width = 0, attn.width
            if attn.units.count:
                counts = entries.sum(dim=1)
                heads = max(1, int((counts > 0).sum()))
                width = max(1, int(counts.max())) if attn.entries else attn.width
            own = (heads, max(1, int(hidden.sum())) if mlp.units.count else 0)
            widths.append(own if width == attn.width else (*own, width))
        return ElasticArch(self.space.base, tuple(widths))

    def costs(self, masks: Masks | None = None) -> dict[str, int]:
        """``macs``, ``params`` and ``memory`` of the network that masks leave, see `SearchSpace.costs`.

        With fewer tokens MACs are counted, and memory is that of the network with all of them.
        """
        arch = self.arch(masks)
        costs = arch.costs(**self.space.model_args)
        if masks is not None and _drops(masks):
            with torch.device("meta"):
                small = arch.create(**self.space.model_args)
                small = reduce_in_place(small, TokenPositions.method, **self._positions(masks))
            size = (self.space.model_args["in_chans"], *self.space.model_args["img_size"])
            costs["macs"] = count_macs(small, size)
        return costs

    def _positions(self, masks: Masks) -> dict[str, Any]:
        """Options of `TokenPositions`."""
        prefix = self.model.num_prefix_tokens
        if not all(bool(mask[:prefix].all()) for mask in masks.tokens):
            raise TokenError("masks leave out the class token or a register; a network keeps them, see `shaped`")
        if not all(map(torch.equal, masks.tokens, monotone(masks.tokens))):
            raise TokenError("masks have tokens in a block that an earlier one leaves out; see `monotone`")
        blocks, positions, count = [], [], len(masks.tokens[0]) - prefix
        for i, mask in enumerate(masks.tokens):
            kept = mask[prefix:].nonzero()[:, 0].tolist()
            if len(kept) < count:
                blocks.append(i)
                positions.append(kept)
                count = len(kept)
        return {"blocks": blocks, "positions": positions, "grid": list(self.model.patch_embed.grid_size)}

    @torch.no_grad()
    def shrink(self, masks: Masks) -> nn.Module:
        """The network that masks leave, as a `vit_elastic` with logits equal to the masked one's.

        Where heads of a block keep different numbers of entries, all are as wide as the widest, with zeros. With fewer
        tokens it is a `vit_tokens`.

        Raises:
            TokenError: Masks leave out a class token or a register, or what a later block or another part of the
                network reads.
        """
        if _drops(masks):
            small = self.shrink(masks._replace(tokens=None))
            return reduce_tokens(small, TokenPositions.method, **self._positions(masks))
        arch = self.arch(masks)
        cfg = {**self.pretrained_cfg, "architecture": arch.model}
        args = json.loads(json.dumps({**self.space.model_args, "pretrained_cfg": cfg}))
        small = arch.create(**args)
        weights = dict(self.model.state_dict())
        for (attn, mlp), entries, hidden, own in zip(
            self.branches, masks.attention, masks.mlp, arch.widths, strict=True
        ):
            if attn.units.count:
                width = own[2] if len(own) > 2 else attn.width
                weights.update(_cut_heads(weights, attn, entries, own[0], width))
            if mlp.units.count:
                index, there = _first(hidden[None], own[1])
                for part in mlp.units.parts:
                    weights[part.param] = _take(weights[part.param], part, index, there if part.dim else None)
        param = next(self.model.parameters())
        names = small.state_dict().keys()
        small.load_state_dict({name: weights[name].clone(memory_format=torch.contiguous_format) for name in names})
        return small.to(param.device, param.dtype).train(self.training)


def _drops(masks: Masks) -> bool:
    return masks.tokens is not None and not all(bool(mask.all()) for mask in masks.tokens)


def _made(attn: Branch) -> list[Part]:
    """Parts that make query, key and value."""
    own = len(attn.units.name) + 1
    return [part for part in attn.units.parts[:-1] if not part.param[own:].startswith(_NOT_MASKED)]


def _first(kept: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of what is kept in each row, in order, filled up to ``count``; and which of them are kept."""
    order = kept.long().argsort(dim=1, descending=True, stable=True)[:, :count]
    return order, kept.gather(1, order)


def _take(tensor: torch.Tensor, part: Part, index: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
    """Entries of a part's dimension, with zeros where nothing is there. index: [1, n] or [heads, n]"""
    flat = index.flatten()
    each = tensor.shape[part.dim] // part.runs
    index = torch.cat([flat + run * each for run in range(part.runs)])
    taken = tensor.index_select(part.dim, index)
    if there is not None:
        shape = [1] * tensor.ndim
        shape[part.dim] = -1
        taken = taken * there.flatten().repeat(part.runs).view(shape).to(taken)
    return taken


def _cut_heads(
    weights: Mapping[str, torch.Tensor], attn: Branch, entries: torch.Tensor, heads: int, width: int
) -> dict[str, torch.Tensor]:
    """Weights of an attention of these heads and entries."""
    which, _ = _first(entries.any(dim=1)[None], heads)  # [1, heads]
    kept = entries[which[0]]
    inside, there = _first(kept, width) if width < attn.width else (
        torch.arange(width, device=entries.device).expand(heads, -1),
        kept,
    )  # fmt: skip
    index = which[0][:, None] * attn.width + inside  # [heads, width]
    made = {part.param for part in _made(attn)}
    found = {}
    for part in attn.units.parts:
        if part.width != attn.width:  # one number of each head
            found[part.param] = _take(weights[part.param], part, which)
        else:
            found[part.param] = _take(weights[part.param], part, index, there if part.param in made else None)
    return found
