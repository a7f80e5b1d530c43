"""Search spaces of the ViT-ResNAS family: choices, random networks, mutation, crossover.

A space is written as in "Searching for Efficient Multi-Stage Vision Transformers" (arXiv 2109.00642, released code):
the largest network's ``network_def`` and, beside each of its entries, what may be chosen there
(``num_channels_to_keep``):

=====================  ========================================================================================
patch embedding        list of embed widths of the first stage
transformer block      ``dict(attn=[channels of all heads, ...], mlp=[hidden units, ...], layer=None)``; with
                       ``layer=[C, C, 0, 0]`` the block is removable, here absent in half of the draws
reduction              list of embed widths of the next stage
head                   ``None``
=====================  ========================================================================================

An embed width holds for its whole stage. A removable block directly after an absent removable block is absent too (the
paper's cascade). The genes of absent blocks decide nothing, so every :class:`~timm_resnas.arch.Arch` made here has them
at the block's maximum.

Inside, a network is a row of small integers (one index into the choices per gene, 0 the largest), so that thousands
are drawn, costed and compared at once; an Arch is made of accepted rows only.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..arch import Arch, Block, Head, PatchEmbed, Reduction
from .cost import Budget, CostModel, cost_model, format_cost

__all__ = ["AdditiveCosts", "BudgetError", "ExtraCosts", "Layer", "SearchSpace"]

ExtraCosts = Callable[[Arch], Mapping[str, float]]
"""Costs that shapes do not give, such as ``{"latency_ms": 11.3}`` from a measured table."""


@runtime_checkable
class AdditiveCosts(Protocol):
    """Extra costs that are one number, a sum over the pieces of a network: computed for thousands of rows at once.

    Attributes:
        name: The cost, such as ``"latency_ms"``.
        unit: Pieces per unit of the cost. Pieces are integers, so that sums are the same in any order.
    """

    name: str
    unit: int

    def __call__(self, arch: Arch) -> Mapping[str, float]:
        """``{name: sum of pieces / unit}``; absent blocks cost nothing."""

    def piece(self, piece: tuple[str, int, int, int, int]) -> int:
        """Cost, at least 0, of (kind, stage from 0, dim, size, head_dim).

        Kinds: ``"stem"`` and ``"head"`` of width dim; ``"attn"`` with size heads and ``"mlp"`` with size hidden units,
        each half a block; ``"reduction"`` from width dim to size, which opens the stage. What is not named is 0.
        """

    def check(self, space: SearchSpace) -> None:
        """Raise ValueError where the costs are not for this space."""


_MAX_CHOICES = 64  # of one gene; a space may come from the net
_FREE_STEPS = 100  # steps of random shrinking before widths and removal join (released code)
_MAX_PROPOSALS = 1 << 17  # effort before a band counts as too narrow: some seconds
_MAX_TRIES = 1 << 14  # the same for one child
_MAX_STARTS = 1 << 17  # starting points of the generator that are listed rather than drawn


class BudgetError(ValueError):
    """A budget that the space cannot meet; the message gives the reachable range."""


@dataclass(frozen=True)
class Layer:
    """One searched layer: where the super-network draws one entry for each sub-network.

    Attributes:
        entry: Index of its ``network_def`` entry.
        kind: ``"width"`` (embed width), ``"attn"`` (channels of all heads), ``"mlp"`` (hidden units) or ``"layer"``
            (the block's presence: its width, or 0).
        choices: The entries, largest first, as often as they are drawn: ``(C, C, 0, 0)`` is four entries.
    """

    entry: int
    kind: str
    choices: tuple[int, ...]


class SearchSpace:
    """Sub-networks of one largest network.

    Args:
        network_def: The largest network, in any form that :meth:`Arch.from_network_def` reads.
        num_channels_to_keep: Choices per entry, see the module's text.
        **model_args: Arguments that models of the space are built with: ``img_size``, ``patch_size``, ``in_chans``,
            ``num_classes``, ``distill_token``, ``patch_head`` and drop rates. An explicit ``num_classes`` replaces
            the head's number.

    Attributes:
        largest: The largest network, an :class:`Arch`.
        smallest: The network of the least choices, every removable block absent.
        layers: The searched layers, in network order; layers without a choice are left out.
        cost_model: Cost of all networks of the space at its ``model_args``.

    Raises:
        ValueError: The choices do not fit the network (:class:`ArchError` for the network itself); the message names
            the entry.
    """

    def __init__(self, network_def: Any, num_channels_to_keep: Sequence, **model_args: Any) -> None:
        arch = Arch.from_network_def(network_def)
        if model_args.get("num_classes") is not None:
            arch = arch.with_num_classes(_integer(model_args["num_classes"], "num_classes", minimum=0))
        self._model_args = _check_model_args({**_DEFAULT_ARGS, **model_args, "num_classes": arch.num_classes})
        self._choices = _check_choices(arch, num_channels_to_keep)
        self.cost_model: CostModel = cost_model(
            arch,
            num_classes=arch.num_classes,
            **{k: self._model_args[k] for k in ("img_size", "patch_size", "in_chans", "distill_token")},
        )
        self._index(arch)
        self.largest = self._decode(np.zeros((1, self._num_genes), np.int8))[0]
        self.smallest = self._decode(self._normalise(self._last[None].copy()))[0]

    # -- forms --------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, space: SearchSpace | Mapping[str, Any] | str) -> SearchSpace:
        """A space from a preset's name, the dict of :meth:`to_dict`, or a space (returned as is)."""
        if isinstance(space, SearchSpace):
            return space
        return cls.preset(space) if isinstance(space, str) else cls.from_dict(space)

    @classmethod
    def preset(cls, name: str, **model_args: Any) -> SearchSpace:
        """A named space.

        ``vit_resnas_tiny`` and ``vit_resnas_small`` are the paper's two (the small one serves Small and Medium);
        ``mini`` is for photographs of 64 to 128 px, ``micro`` for 32 px images on a CPU.

        Raises:
            ValueError: The name is not known.
        """
        if name not in _PRESETS:
            raise ValueError(f"unknown search space {name!r}; known: {', '.join(_PRESETS)}")
        network_def, choices, preset_args = _PRESETS[name]()
        return cls(network_def, choices, **{**preset_args, **model_args})

    @classmethod
    def from_paper(cls, network_def: Any, num_channels_to_keep: Sequence, **model_args: Any) -> SearchSpace:
        """A space from the two arguments that the paper's released code states it with. See the class."""
        return cls(network_def, num_channels_to_keep, **model_args)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSpace:
        """Inverse of :meth:`to_dict`; the data are checked, for they may come from the net.

        Raises:
            ValueError: Parts are missing, unknown, or do not fit each other.
        """
        keys = ("network_def", "num_channels_to_keep", "model_args")
        if not isinstance(data, Mapping) or not set(data) <= set(keys) or not set(keys[:2]) <= set(data):
            got = ", ".join(map(str, list(data)[:8])) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"a search space is a dict of {', '.join(keys)}; got {got:.200}")
        model_args = data.get("model_args") or {}
        if not isinstance(model_args, Mapping) or not all(isinstance(k, str) for k in model_args):
            raise ValueError("model_args of a search space must be a dict of names to values")
        return cls(data["network_def"], data["num_channels_to_keep"], **model_args)

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain form: ``network_def``, ``num_channels_to_keep``, ``model_args``."""
        return json.loads(
            json.dumps(
                {
                    "network_def": self.largest.to_network_def(),
                    "num_channels_to_keep": self._choices,
                    "model_args": self._model_args,
                }
            )
        )

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments that models of the space are built with, JSON-plain; ``num_classes`` is the head's number."""
        return json.loads(json.dumps(self._model_args))

    def with_model_args(self, **model_args: Any) -> SearchSpace:
        """The same choices with other model arguments; the head follows ``num_classes``."""
        return SearchSpace(self.largest, self._choices, **{**self._model_args, **model_args})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SearchSpace) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def __repr__(self) -> str:
        return f"SearchSpace({self.size():.3g} sub-networks of {self.largest})"

    def __reduce__(self) -> tuple:
        return SearchSpace.from_dict, (self.to_dict(),)

    # -- what is inside -----------------------------------------------------------------------------------------------

    def size(self) -> int:
        """Number of different sub-networks (by :meth:`Arch.key`)."""
        total = math.prod(len(self._lists[c]) for c in self._width_cols)
        counts = {False: 1, True: 0}  # ways so far, by whether the block before is removable and absent
        for b in range(self._num_blocks):
            genes = len(self._lists[b]) * len(self._lists[self._num_blocks + b])
            if not self._removable[b]:
                counts = {False: (counts[False] + counts[True]) * genes, True: 0}
            elif self._linked[b]:
                counts = {False: counts[False] * genes, True: counts[False] + counts[True]}
            else:
                ways = counts[False] + counts[True]
                counts = {False: ways * genes, True: ways}
        return total * (counts[False] + counts[True])

    def contains(self, arch: Arch) -> bool:
        """Whether the architecture selects a sub-network of this space; genes of absent blocks do not matter."""
        try:
            self.check(arch)
        except ValueError:
            return False
        return True

    def check(self, arch: Arch) -> None:
        """Say why an architecture is no sub-network of this space.

        Raises:
            ValueError: It is not; the message names the first entry that differs, and what is possible there.
        """
        self._encode(arch)

    def costs(self, arch: Arch, extra_costs: ExtraCosts | None = None) -> dict[str, int | float]:
        """``macs``, ``params`` and ``memory`` of an architecture of the space at its ``model_args``, and extra ones.

        Parameters are those of the finished network, without a patch head.

        Raises:
            ValueError: The architecture is not of this space.
        """
        self.check(arch)
        return {**self.cost_model.costs(arch), **(extra_costs(arch) if extra_costs else {})}

    def build(self, picks: Sequence[Sequence[int]] | np.ndarray) -> list[Arch]:
        """Networks from one index into ``choices`` per layer of :attr:`layers`, [num_networks, num_layers].

        The cascade applies, so a layer picked present can be absent.

        Raises:
            ValueError: The shape or an index is out of range.
        """
        picks = np.asarray(picks)
        if picks.ndim != 2 or picks.shape[1] != len(self.layers):
            raise ValueError(f"picks must have shape [n, {len(self.layers)}], got {list(picks.shape)}")
        counts = np.array([len(layer.choices) for layer in self.layers])
        if ((picks < 0) | (picks >= counts)).any():
            raise ValueError("picks holds an index outside its layer's choices")
        genes = np.zeros((len(picks), self._num_genes), np.int8)
        for i, (layer, col) in enumerate(zip(self.layers, self._layer_cols, strict=True)):
            if layer.kind == "layer":
                genes[:, col] = np.array(layer.choices)[picks[:, i]] == 0
            else:
                genes[:, col] = picks[:, i]
        return self._decode(self._normalise(genes))

    # -- drawing ------------------------------------------------------------------------------------------------------

    def sample(
        self, rng: np.random.Generator, budget: Budget | None = None, extra_costs: ExtraCosts | None = None
    ) -> Arch:
        """One random network, see :meth:`sample_many`."""
        return self.sample_many(1, rng, budget, extra_costs)[0]

    def sample_many(
        self, n: int, rng: np.random.Generator, budget: Budget | None = None, extra_costs: ExtraCosts | None = None
    ) -> list[Arch]:
        """Independent random networks (some may be equal).

        Without a budget every layer is drawn for itself, as in super-network training. With one, the paper's
        generator (released code): random widths and depth with heads and hidden units at their maximum, until the
        first-named cost reaches the lower end of the band; then random steps down, of heads or hidden units only and
        after 100 steps of widths and depth too, until it is no more than the limit; from anew when that, or another
        limit, is missed.

        Args:
            n: Number of networks.
            rng: Source of randomness.
            budget: What they may cost.
            extra_costs: Gives limited costs that shapes do not (``latency_ms``). Unless it is :class:`AdditiveCosts`,
                it is called network by network, for those that meet the other limits or, where the first-named limit
                is its own, at every step.

        Returns:
            ``n`` networks; fewer, but at least one, when the band is hit too rarely.

        Raises:
            BudgetError: The budget is out of reach, or nothing was found in it with bounded effort.
        """
        if budget is None:
            return self._decode(self._draw(n, rng))
        self._check_reach(budget, extra_costs)
        found: list[Arch] = []
        tried, rate = 0, 0.5
        seen = _Misses(budget)
        while len(found) < n and tried < (4 * _MAX_PROPOSALS if found else _MAX_PROPOSALS):
            batch = min(math.ceil((n - len(found)) / rate * 1.05) + 4, 4096)
            genes = self._generate(batch, rng, budget, extra_costs)
            tried += len(genes)
            good = self._within(genes, budget, extra_costs)
            if not found and not good.any():
                quick = [name for name, _ in budget if self._on_rows(name, extra_costs)]
                seen.note({name: self._cost(name, genes, extra_costs) for name in quick})
            cheap = genes[good]
            if not self._needs_extra(budget, extra_costs):
                cheap = cheap[: n - len(found)]
            for arch in self._decode(cheap):
                if len(found) < n and self._within_extra(arch, budget, extra_costs):
                    found.append(arch)
            rate = max((len(found) + 0.5) / tried, 1e-4)
        if not found:
            raise BudgetError(
                f"no network of the space was found within {budget} in {tried} random tries{seen}; widen the band "
                f"(lower is {budget.lower}) or loosen a limit"
            )
        return found

    def mutate(
        self,
        arch: Arch,
        rng: np.random.Generator,
        prob: float = 0.3,
        budget: Budget | None = None,
        extra_costs: ExtraCosts | None = None,
    ) -> Arch:
        """One mutation of ``arch``, see :meth:`mutate_many`.

        Raises:
            ValueError: ``arch`` is not of this space.
            BudgetError: None was found within the budget with bounded effort.
        """
        return self._only(self.mutate_many([arch], 1, rng, prob, budget, extra_costs), "mutation", budget)

    def mutate_many(
        self,
        parents: Sequence[Arch],
        n: int,
        rng: np.random.Generator,
        prob: float = 0.3,
        budget: Budget | None = None,
        extra_costs: ExtraCosts | None = None,
    ) -> list[Arch]:
        """Mutations of parents drawn uniformly.

        Each gene changes with probability ``prob``: widths, heads and hidden units are drawn anew from their choices
        (the old one among them), the presence of a removable block is flipped; then the cascade. A child outside the
        budget is replaced by another one of the same parent. A block that returns starts from its maximum, since the
        genes of absent blocks are not kept.

        Returns:
            ``n`` children; fewer where some parent's were all out of budget with bounded effort.

        Raises:
            ValueError: A parent is not of this space.
        """
        rows = self._encode_many(parents)
        chosen = rng.integers(len(rows), size=n)

        def make(children: np.ndarray) -> np.ndarray:
            genes = rows[chosen[children]]
            change = rng.random(genes.shape, np.float32) < prob
            drawn = self._uniform(len(genes), rng)
            drawn[:, self._exists_cols] = genes[:, self._exists_cols] ^ 1
            drawn[:, self._exists_cols] &= self._removable
            return self._normalise(np.where(change, drawn, genes))

        return self._breed(make, n, budget, extra_costs)

    def crossover(
        self,
        a: Arch,
        b: Arch,
        rng: np.random.Generator,
        budget: Budget | None = None,
        extra_costs: ExtraCosts | None = None,
    ) -> Arch:
        """One child of ``a`` and ``b``, see :meth:`crossover_many`.

        Raises:
            ValueError: A parent is not of this space.
            BudgetError: None was found within the budget with bounded effort.
        """
        return self._only(self._cross(self._encode_many([a, b]), 1, rng, budget, extra_costs), "crossover", budget)

    def crossover_many(
        self,
        parents: Sequence[Arch],
        n: int,
        rng: np.random.Generator,
        budget: Budget | None = None,
        extra_costs: ExtraCosts | None = None,
    ) -> list[Arch]:
        """Children of pairs of two different parents, drawn uniformly.

        Each gene comes from either with probability one half; then the cascade. A child outside the budget is
        replaced by another one of the same pair.

        Returns:
            ``n`` children; fewer where some pair's were all out of budget with bounded effort.

        Raises:
            ValueError: Fewer than two parents, or one is not of this space.
        """
        if len(parents) < 2:
            raise ValueError(f"crossover needs at least two parents, got {len(parents)}")
        return self._cross(self._encode_many(parents), n, rng, budget, extra_costs)

    def _cross(self, rows, n, rng, budget, extra_costs) -> list[Arch]:
        first = rng.integers(len(rows), size=n)
        second = (first + rng.integers(1, len(rows), size=n)) % len(rows)

        def make(children: np.ndarray) -> np.ndarray:
            from_second = rng.random((len(children), self._num_genes), np.float32) < 0.5
            genes = np.where(from_second, rows[second[children]], rows[first[children]])
            return self._normalise(genes)

        return self._breed(make, n, budget, extra_costs)

    @staticmethod
    def _only(children: list[Arch], what: str, budget: Budget | None) -> Arch:
        if not children:
            raise BudgetError(f"no {what} within {budget} was found in {_MAX_TRIES} tries; widen the band")
        return children[0]

    def _breed(
        self,
        make: Callable[[np.ndarray], np.ndarray],
        n: int,
        budget: Budget | None,
        extra_costs: ExtraCosts | None,
    ) -> list[Arch]:
        """For each child the first proposal within budget; ``make`` proposes one for each child number it is given."""
        if budget is not None:
            self._check_names(budget, extra_costs)
        children: dict[int, Arch] = {}
        waiting, tried, copies = np.arange(n), 0, 1 if budget is None else 12
        while waiting.size and tried < _MAX_TRIES:
            genes = make(np.repeat(waiting, copies))
            good = np.flatnonzero(self._within(genes, budget, extra_costs)) if budget else np.arange(len(genes))
            # the first good copy of each child, in its own order; with extra costs those after it may be needed
            owner = waiting[good // copies]
            if not self._needs_extra(budget, extra_costs):
                owner, where = np.unique(owner, return_index=True)
                good = good[where]
            for i, arch in zip(owner.tolist(), self._decode(genes[good]), strict=True):
                if i not in children and self._within_extra(arch, budget, extra_costs):
                    children[i] = arch
            waiting = np.array([i for i in waiting.tolist() if i not in children], dtype=np.intp)
            tried += copies
            copies = min(2 * copies, 1024)
        return [children[i] for i in sorted(children)]

    # -- budgets ------------------------------------------------------------------------------------------------------

    def check_budget(self, budget: Budget, extra_costs: ExtraCosts | None = None) -> None:
        """Say why a budget cannot be met.

        Raises:
            BudgetError: A limit is below the smallest network, or the first-named, unless its ``lower`` is 0, above
                the largest; or a limited cost is not known.
        """
        self._check_reach(budget, extra_costs)

    def _check_names(self, budget: Budget, extra_costs: ExtraCosts | None) -> None:
        if extra_costs is None:
            for name, _ in budget:
                if name not in _EXACT:
                    raise BudgetError(f"the budget limits {name}, which shapes do not give; pass extra_costs for it")

    def _check_reach(self, budget: Budget, extra_costs: ExtraCosts | None) -> None:
        self._check_names(budget, extra_costs)
        least, most = (self.costs(a, extra_costs) for a in (self.smallest, self.largest))
        if table := self._additive(extra_costs):
            # a measured cost need not grow with every width
            least[table.name], most[table.name] = table.reach()
        for name, limit in budget:
            if name not in least:
                raise BudgetError(f"the budget limits {name}, but extra_costs gives only {', '.join(least)}")
            above = limit > most[name] and name == budget.first and budget.lower > 0
            if limit < least[name] or above:
                fact = "above the largest" if above else "below the smallest"
                low, high, got = (format_cost(name, v) for v in (least[name], most[name], limit))
                hint = " (lower=0 allows any limit above the smallest)" if above else ""
                raise BudgetError(
                    f"budget {name}={got} is {fact} network of the space, whose networks have {name} from {low} to "
                    f"{high}{hint}"
                )

    def _additive(self, extra_costs: ExtraCosts | None) -> _AdditiveRows | None:
        """The extra costs as tables over rows, made once; None where they are no sum over pieces."""
        if not isinstance(extra_costs, AdditiveCosts):
            return None
        if extra_costs not in self._tables:
            extra_costs.check(self)
            self._tables[extra_costs] = _AdditiveRows(self, extra_costs)
        return self._tables[extra_costs]

    def _on_rows(self, name: str, extra_costs: ExtraCosts | None) -> bool:
        """Whether many networks are costed at once."""
        table = None if name in _EXACT else self._additive(extra_costs)
        return name in _EXACT or (table is not None and table.name == name)

    def _needs_extra(self, budget: Budget | None, extra_costs: ExtraCosts | None) -> bool:
        return budget is not None and not all(self._on_rows(name, extra_costs) for name, _ in budget)

    def _within(self, genes: np.ndarray, budget: Budget, extra_costs: ExtraCosts | None) -> np.ndarray:
        """Which rows meet the limits that are computed on rows."""
        good = np.ones(len(genes), bool)
        for i, (name, limit) in enumerate(budget):
            if self._on_rows(name, extra_costs):
                cost = self._cost(name, genes, extra_costs)
                good &= cost <= limit
                if i == 0:
                    good &= cost >= budget.band[0]
        return good

    def _within_extra(self, arch: Arch, budget: Budget | None, extra_costs: ExtraCosts | None) -> bool:
        """Whether an architecture that passed :meth:`_within` meets the other limits too."""
        if budget is None or not self._needs_extra(budget, extra_costs):
            return True
        costs = extra_costs(arch)
        for i, (name, limit) in enumerate(budget):
            if name not in _EXACT and not (costs[name] <= limit and (i or costs[name] >= budget.band[0])):
                return False
        return True

    # -- the generator ------------------------------------------------------------------------------------------------

    def _draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Every layer for itself."""
        return self._normalise(self._uniform(n, rng))

    def _uniform(self, n: int, rng: np.random.Generator) -> np.ndarray:
        genes = (rng.random((n, self._num_genes), np.float32) * self._counts).astype(np.int8)
        np.minimum(genes, self._last, out=genes)  # a float32 product may round up to the count
        genes[:, self._exists_cols] = rng.random((n, self._num_blocks), np.float32) < self._absence
        return genes

    def _generate(self, n: int, rng: np.random.Generator, budget: Budget, extra_costs: ExtraCosts | None) -> np.ndarray:
        """Proposals of the paper's generator: each ends at or below the limit, in the band or not.

        Each row is a walk of its own and all walks are run to their end, so which of them are in the band does not
        depend on which end first.
        """
        floor, limit = budget.band
        genes, cost = self._starts(n, rng, budget.first, floor, extra_costs)
        rows = np.flatnonzero(cost > limit)
        genes[rows] = self._shrink(genes[rows], cost[rows], budget.first, limit, rng, extra_costs)
        return self._normalise(genes)

    def _starts(
        self, n: int, rng: np.random.Generator, name: str, floor: float, extra_costs: ExtraCosts | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Random widths and depth, heads and hidden units at their maximum, given that the cost is at least floor."""
        genes_found, cost_found, found, tried = [], [], 0, 0
        listed = self._num_starts <= _MAX_STARTS and self._on_rows(name, extra_costs)
        while found < n and tried < _MAX_PROPOSALS:
            if tried >= 4 * n and found < 0.02 * tried and listed:
                return self._listed_starts(n, rng, name, floor, extra_costs)
            batch = max(64, min(2 * n, 4096))
            genes = np.zeros((batch, self._num_genes), np.int8)
            for col in self._width_cols:
                genes[:, col] = rng.integers(self._counts_int[col], size=batch)
            genes[:, self._exists_cols] = rng.random((batch, self._num_blocks), np.float32) < self._absence
            genes = self._normalise(genes)
            cost = self._cost(name, genes, extra_costs)
            keep = cost >= floor
            genes_found.append(genes[keep])
            cost_found.append(cost[keep])
            found += int(keep.sum())
            tried += batch
        if not found:
            raise self._no_start(name, floor, f"{tried} random tries")
        return np.concatenate(genes_found)[:n], np.concatenate(cost_found)[:n]

    @staticmethod
    def _no_start(name: str, floor: float, why: str) -> BudgetError:
        return BudgetError(
            f"networks are made by shrinking ones with all heads and hidden units, none of which reaches {name} "
            f"{format_cost(name, floor)} ({why}); lower the budget or widen its band"
        )

    def _listed_starts(
        self, n: int, rng: np.random.Generator, name: str, floor: float, extra_costs: ExtraCosts | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same as rejection, drawn from the list of all starts: for limits near the largest network."""
        listed = self._listed if name in _EXACT else self._additive(extra_costs).listed
        if name not in listed:
            cols = [*self._width_cols, *(self._exists_cols.start + np.flatnonzero(self._removable))]
            grid = np.indices([self._counts_int[c] for c in cols], dtype=np.int8).reshape(len(cols), -1).T
            genes = np.zeros((len(grid), self._num_genes), np.int8)
            genes[:, cols] = grid
            absent = genes[:, self._exists_cols] == 1
            prob = np.where(absent, self._absence, 1 - self._absence).prod(axis=1)  # widths are uniform
            genes = self._normalise(genes)
            cost = self._cost(name, genes, extra_costs)
            order = np.argsort(-cost, kind="stable")
            listed[name] = genes[order], cost[order], np.cumsum(prob[order])
        genes, cost, cumulative = listed[name]
        count = int(np.searchsorted(-cost, -floor, side="right"))
        if not count:
            raise self._no_start(name, floor, f"the most is {format_cost(name, cost[0])}")
        picked = np.searchsorted(cumulative[:count], rng.random(n) * cumulative[count - 1], side="right")
        picked = np.minimum(picked, count - 1)
        return genes[picked].copy(), cost[picked].copy()

    def _shrink(
        self,
        genes: np.ndarray,
        cost: np.ndarray,
        name: str,
        limit: float,
        rng: np.random.Generator,
        extra_costs: ExtraCosts | None,
    ) -> np.ndarray:
        """Random steps down, each row until its cost is no more than the limit."""
        out = genes.copy()
        rows = np.arange(len(genes))
        linear = name in _LINEAR
        unit = self._units(name, genes) if linear else None
        table = self._additive(extra_costs) if name not in _EXACT and self._on_rows(name, extra_costs) else None
        chunk, step = 20, 0  # a divisor of _FREE_STEPS
        while rows.size:
            odds = self._odds_first if step < _FREE_STEPS else self._odds_all
            actions = np.searchsorted(odds, rng.random((chunk, len(rows)), np.float32), side="right")
            each = np.arange(len(rows))
            for act in actions:
                live = cost > limit
                index = genes[each, act]
                moves = live & (index < self._last[act])
                genes[each, act] = index + moves
                if linear or table:
                    # heads and hidden units change the cost by their stage's unit; a removed block's do not
                    moved = moves & (genes[each, self._presence[act]] == 0)
                    if linear:
                        cost -= moved * self._drops[act, index] * unit[each, self._unit_of[act]]
                    else:
                        cost -= moved * table.drop(genes, act, index)
                    redo = np.flatnonzero(moves & (act >= self._width_start))
                else:
                    redo = np.flatnonzero(moves)
                if redo.size:
                    part = genes[redo]
                    self._cascade(part)
                    genes[redo] = part
                    cost[redo] = self._cost(name, part, extra_costs)
                    if linear:
                        unit[redo] = self._units(name, part)
            # a row with nothing left to shrink ends too; it is out of the band then
            done = (cost <= limit) | (genes == self._last).all(axis=1)
            out[rows[done]] = genes[done]
            rows, genes, cost = rows[~done], genes[~done], cost[~done]
            unit = unit[~done] if linear else None
            step += chunk
        return out

    # -- rows of genes ------------------------------------------------------------------------------------------------
    # columns: attention of each block, MLP of each block, width of each stage, absence of each block

    def _index(self, arch: Arch) -> None:
        """Tables that the vectorised methods read."""
        blocks: list[Block] = []
        block_entries: list[int] = []
        width_entries = [0]
        stage_of: list[int] = []
        for i, entry in enumerate(arch.blocks, start=1):
            if isinstance(entry, Block):
                blocks.append(entry)
                block_entries.append(i)
                stage_of.append(len(width_entries) - 1)
            else:
                width_entries.append(i)
        nb, ns = len(blocks), len(width_entries)
        self._arch, self._blocks, self._num_blocks, self._num_stages = arch, blocks, nb, ns
        self._num_genes = 3 * nb + ns
        self._width_start = 2 * nb
        self._width_cols = range(2 * nb, 2 * nb + ns)
        self._exists_cols = slice(2 * nb + ns, 3 * nb + ns)
        self._stage_of = np.array(stage_of, np.intp)

        choices = self._choices
        depth = [choices[i]["layer"] for i in block_entries]
        self._removable = np.array([d is not None for d in depth], bool)
        self._absence = np.array([d.count(0) / len(d) if d else 0.0 for d in depth])
        # a removable block right after another one of the same stage
        self._linked = [
            b > 0 and bool(self._removable[b - 1 : b + 1].all()) and block_entries[b] == block_entries[b - 1] + 1
            for b in range(nb)
        ]
        self._lists: list[list[int]] = [choices[i]["attn"] for i in block_entries]
        self._lists += [choices[i]["mlp"] for i in block_entries]
        self._lists += [choices[i] for i in width_entries]
        self._lists += [[1, 0] if r else [1] for r in self._removable]
        self._counts_int = [len(x) for x in self._lists]
        self._counts = np.array(self._counts_int, np.float32)
        self._last = np.array(self._counts_int, np.int8) - np.int8(1)
        longest = max(self._counts_int)
        padded = np.array([x + x[-1:] * (longest + 1 - len(x)) for x in self._lists], np.float64)
        self._values = padded
        self._num_starts = math.prod(self._counts_int[2 * nb :])
        self._listed: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._tables: weakref.WeakKeyDictionary[AdditiveCosts, _AdditiveRows] = weakref.WeakKeyDictionary()

        # shrinking: what a step down takes off, in units of the stage; 0 for widths and presence, costed anew instead
        self._drops = padded[:, :-1] - padded[:, 1:]
        self._drops[2 * nb :] = 0
        exists = np.arange(nb) + self._exists_cols.start
        self._presence = np.concatenate([exists, exists, np.arange(2 * nb, self._num_genes)])
        self._unit_of = np.concatenate([self._stage_of, self._stage_of + ns, np.zeros(ns + nb, np.intp)])
        # cumulative odds of each column to step down. At first a block, then attention or MLP; later any entry, and
        # for removable blocks attention, MLP or a draw from the layer list, which removes it or does nothing
        first = np.zeros(self._num_genes)
        first[: 2 * nb] = 1
        later = np.ones(self._num_genes)
        later[: 2 * nb] = np.tile(np.where(self._removable, 1 / 3, 1 / 2), 2)
        later[self._exists_cols] = np.where(self._removable, self._absence / 3, 0)
        self._odds_first, self._odds_all = (_cumulative(odds) for odds in (first, later))
        self._stage_matrix = np.eye(ns)[self._stage_of]  # [num_blocks, num_stages]

        # decoding: each entry's code is a weighted sum of its genes, and names one shared entry object
        weights = np.zeros((self._num_genes, len(choices)))
        self._interned: list[_Interned] = [_Interned(self._make_width_entry(0))]
        weights[2 * nb, 0] = 1
        stage, b = 0, 0
        for i, entry in enumerate(arch.blocks, start=1):
            if isinstance(entry, Block):
                weights[self._exists_cols.start + b, i] = 1
                weights[nb + b, i] = 2
                weights[b, i] = 2 * _MAX_CHOICES
                weights[2 * nb + stage, i] = 2 * _MAX_CHOICES**2
                self._interned.append(_Interned(self._make_block(b)))
                b += 1
            else:
                stage += 1
                weights[2 * nb + stage, i] = 1
                weights[2 * nb + stage - 1, i] = _MAX_CHOICES
                self._interned.append(_Interned(self._make_width_entry(stage)))
        weights[2 * nb + stage, -1] = 1
        self._interned.append(_Interned(self._make_head))
        self._code_weights = weights

        kinds = {"attn": 0, "mlp": nb, "layer": self._exists_cols.start}
        layers: list[Layer] = []
        self._layer_cols: list[int] = []
        for i, choice in enumerate(choices):
            if isinstance(choice, list):
                layers.append(Layer(i, "width", tuple(choice)))
                self._layer_cols.append(2 * nb + width_entries.index(i))
            elif choice is not None:
                for kind, start in kinds.items():
                    if choice[kind] is not None:
                        layers.append(Layer(i, kind, tuple(choice[kind])))
                        self._layer_cols.append(start + block_entries.index(i))
        keep = [len(layer.choices) > 1 for layer in layers]
        self.layers = tuple(x for x, k in zip(layers, keep, strict=True) if k)
        self._layer_cols = [x for x, k in zip(self._layer_cols, keep, strict=True) if k]

    def _make_width_entry(self, stage: int) -> Callable[[int], PatchEmbed | Reduction]:
        widths = self._lists[2 * self._num_blocks + stage]
        stem = self._arch.patch_embed
        if stage == 0:
            return lambda code: PatchEmbed(stem.kind, widths[code], stem.mid_dim)
        before = self._lists[2 * self._num_blocks + stage - 1]
        return lambda code: Reduction(before[code // _MAX_CHOICES], widths[code % _MAX_CHOICES])

    def _make_block(self, b: int) -> Callable[[int], Block]:
        nb = self._num_blocks
        attn, mlp, widths = self._lists[b], self._lists[nb + b], self._lists[2 * nb + self._stage_of[b]]
        head_dim = self._blocks[b].head_dim

        def make(code: int) -> Block:
            rest, absent = divmod(code, 2)
            rest, f = divmod(rest, _MAX_CHOICES)
            w, a = divmod(rest, _MAX_CHOICES)
            return Block(widths[w], attn[a] // head_dim, head_dim, mlp[f], not absent)

        return make

    def _make_head(self, code: int) -> Head:
        return Head(self._lists[2 * self._num_blocks + self._num_stages - 1][code], self._arch.num_classes)

    def _cascade(self, genes: np.ndarray) -> None:
        start = self._exists_cols.start
        for b, linked in enumerate(self._linked):
            if linked:
                genes[:, start + b] |= genes[:, start + b - 1]

    def _normalise(self, genes: np.ndarray) -> np.ndarray:
        """Apply the cascade and put the genes of absent blocks at the maximum, in place."""
        self._cascade(genes)
        present = 1 - genes[:, self._exists_cols]
        nb = self._num_blocks
        genes[:, :nb] *= present
        genes[:, nb : 2 * nb] *= present
        return genes

    def _decode(self, genes: np.ndarray) -> list[Arch]:
        codes = (genes @ self._code_weights).astype(np.int64).tolist()
        archs = []
        for row in codes:
            entries = [table[code] for table, code in zip(self._interned, row, strict=True)]
            archs.append(Arch(entries[0], tuple(entries[1:-1]), entries[-1]))
        return archs

    def _encode_many(self, archs: Iterable[Arch]) -> np.ndarray:
        return np.stack([self._encode(a) for a in archs])

    def _encode(self, arch: Arch) -> np.ndarray:
        own = self._arch
        if not isinstance(arch, Arch):
            raise ValueError(f"expected an Arch, got {type(arch).__name__}; use Arch.from_network_def")
        if [type(b) for b in arch.blocks] != [type(b) for b in own.blocks]:
            raise ValueError(
                f"the space's networks have {own.num_reductions + 1} stages of {_depth_text(own)} blocks (absent ones "
                f"are kept as entries with exists=0); this one has {_depth_text(arch)}"
            )
        if (arch.patch_embed.kind, arch.patch_embed.mid_dim) != (own.patch_embed.kind, own.patch_embed.mid_dim):
            raise ValueError(f"entry 0 is {arch.patch_embed.to_def()}, the space has {own.patch_embed.to_def()}")
        if arch.num_classes != own.num_classes:
            raise ValueError(f"the head has {arch.num_classes} classes, the space's has {own.num_classes}")
        nb = self._num_blocks
        genes = [0] * self._num_genes
        stage, b, absent_before = 0, 0, False
        genes[2 * nb] = self._find(2 * nb, 0, "embed width", arch.patch_embed.dim)
        for i, entry in enumerate(arch.blocks, start=1):
            if type(entry) is not Block:
                stage += 1
                genes[2 * nb + stage] = self._find(2 * nb + stage, i, "embed width", entry.out_dim)
                continue
            if entry.exists:
                if entry.head_dim != self._blocks[b].head_dim:
                    raise ValueError(f"entry {i} has head_dim {entry.head_dim}, the space {self._blocks[b].head_dim}")
                if self._linked[b] and absent_before:
                    raise ValueError(f"entry {i} must be absent: the removable block before it is")
                genes[b] = self._find(b, i, "attention channels", entry.num_heads * entry.head_dim)
                genes[nb + b] = self._find(nb + b, i, "mlp_hidden", entry.mlp_hidden)
            elif not self._removable[b]:
                raise ValueError(f"entry {i} is absent, but the space cannot remove it")
            else:
                genes[self._exists_cols.start + b] = 1
            absent_before = not entry.exists
            b += 1
        return np.array(genes, np.int8)

    def _find(self, col: int, entry: int, name: str, value: int) -> int:
        try:
            return self._lists[col].index(value)
        except ValueError:
            known = ", ".join(map(str, self._lists[col]))
            raise ValueError(f"entry {entry}: {name} {value} is none of the space's choices {known}") from None

    def _cost(self, name: str, genes: np.ndarray, extra_costs: ExtraCosts | None = None) -> np.ndarray:
        """A cost of each row, float64 (exact for counts)."""
        if name not in _EXACT:
            rows = self._normalise(genes.copy())
            if self._on_rows(name, extra_costs):
                return self._additive(extra_costs).cost(rows)
            return np.array([extra_costs(arch)[name] for arch in self._decode(rows)], np.float64)
        nb, start = self._num_blocks, self._width_start
        cols = np.arange(start + self._num_stages)
        values = self._values[cols, genes[:, : len(cols)]]
        present = 1.0 - genes[:, self._exists_cols]
        dims = list(values[:, start:].T)
        if name == "memory":
            peaks = list(self.cost_model.fixed_memory(dims))
            for b, stage in enumerate(self._stage_of):
                inside = self.cost_model.block_memory(stage, dims[stage], values[:, b], values[:, nb + b])
                peaks += [p * present[:, b] for p in inside]
            peak = np.zeros(len(genes))
            for p in peaks:
                np.maximum(peak, p, out=peak)
            return 4 * peak
        attn = list(((values[:, :nb] * present) @ self._stage_matrix).T)
        mlp = list(((values[:, nb:start] * present) @ self._stage_matrix).T)
        if name == "macs":
            return self.cost_model.macs(dims, attn, mlp)
        return self.cost_model.params(dims, attn, mlp, list((present @ self._stage_matrix).T))

    def _units(self, name: str, genes: np.ndarray) -> np.ndarray:
        """Cost of one attention channel, then of one hidden unit, in each stage: [n, 2 * num_stages]."""
        start = self._width_start
        attn, mlp = _LINEAR[name]
        dims = [self._values[start + s, genes[:, start + s]] for s in range(self._num_stages)]
        parts = [getattr(self.cost_model, attn)(s, d) for s, d in enumerate(dims)]
        parts += [getattr(self.cost_model, mlp)(s, d) for s, d in enumerate(dims)]
        return np.stack(parts, axis=1)


_EXACT = ("macs", "params", "memory")
_LINEAR = {"macs": ("attn_macs", "mlp_macs"), "params": ("attn_params", "mlp_params")}


def _cumulative(odds: np.ndarray) -> np.ndarray:
    """Upper end of each column's share of [0, 1); columns after the last that can be drawn get no share."""
    total = np.cumsum(odds)
    total = (total / total[-1]).astype(np.float32)
    total[np.flatnonzero(odds)[-1] :] = 1
    return total


class _AdditiveRows:
    """:class:`AdditiveCosts` as one flat table that rows of genes point into.

    Attributes:
        name: See :class:`AdditiveCosts`.
        listed: Starting points of the generator, by cost.
    """

    def __init__(self, space: SearchSpace, costs: AdditiveCosts) -> None:
        self.name, self._unit = costs.name, costs.unit
        self.listed: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        nb, ns, lists = space._num_blocks, space._num_stages, space._lists
        self._absent, self._fixed = space._exists_cols, ~space._removable
        self._stage_of, self._num_blocks = space._stage_of, nb
        widths = lists[2 * nb : 2 * nb + ns]
        # each table is over (a gene, another gene): widths before and after, or a block's width and its own gene
        tables, first, second = [[[costs.piece(("stem", 0, w, 0, 0))] for w in widths[0]]], [2 * nb], []
        second.append(-1)
        for s in range(1, ns):
            tables.append([[costs.piece(("reduction", s, a, b, 0)) for b in widths[s]] for a in widths[s - 1]])
            first.append(2 * nb + s - 1)
            second.append(2 * nb + s)
        tables.append([[costs.piece(("head", ns - 1, w, 0, 0))] for w in widths[-1]])
        first.append(2 * nb + ns - 1)
        second.append(-1)
        self._outside = len(tables)
        for b, (stage, block) in enumerate(zip(space._stage_of.tolist(), space._blocks, strict=True)):
            d = block.head_dim
            tables.append([[costs.piece(("attn", stage, w, a // d, d)) for a in lists[b]] for w in widths[stage]])
            tables.append([[costs.piece(("mlp", stage, w, f, 0)) for f in lists[nb + b]] for w in widths[stage]])
            first += [2 * nb + stage] * 2
            second += [b, nb + b]
        self._arrays = [np.array(t, np.float64) for t in tables]
        # one more column of zeros in front of the genes stands for "no second gene"
        self._first, self._second = np.array(first) + 1, np.array(second) + 1
        self._strides = np.array([a.shape[1] for a in self._arrays])
        self._starts = np.cumsum([0, *(a.size for a in self._arrays[:-1])])
        self._flat = np.concatenate([*(a.ravel() for a in self._arrays), [0, 0]])
        # by gene, for a block's own genes: its table, its width's gene, and 1; for the others the zeros at the end
        self._own = np.zeros((4, space._num_genes), np.intp)
        self._own[0] = len(self._flat) - 2
        for b in range(nb):
            for col, table in ((b, self._outside + 2 * b), (nb + b, self._outside + 2 * b + 1)):
                self._own[:, col] = self._starts[table], self._strides[table], first[table], 1

    def cost(self, genes: np.ndarray) -> np.ndarray:
        """Cost of each row, [n]; equal to that of its network to the last bit."""
        index = np.zeros((len(genes), genes.shape[1] + 1), np.intp)
        index[:, 1:] = genes
        pieces = self._flat[self._starts + index[:, self._first] * self._strides + index[:, self._second]]
        pieces[:, self._outside :] *= np.repeat(1 - genes[:, self._absent], 2, axis=1)
        return pieces.sum(axis=1) / self._unit

    def drop(self, genes: np.ndarray, act: np.ndarray, index: np.ndarray) -> np.ndarray:
        """What the cost of each row lost as its gene ``act``, of a present block, went one up from ``index``, [n].

        Of widths and presence, which have no cost of their own, it says nothing.
        """
        start, stride, width, own = self._own[:, act]
        at = start + stride * genes[np.arange(len(genes)), width] + own * index
        return (self._flat[at] - self._flat[at + 1]) / self._unit

    def reach(self) -> tuple[float, float]:
        """The least and the greatest cost of the space's networks."""
        ends = []
        for best, blocks in ((np.min, self._fixed), (np.max, np.ones_like(self._fixed))):
            # the least without the removable blocks, the greatest with them
            inside: list[Any] = [0] * (self._outside - 1)
            for b in np.flatnonzero(blocks).tolist():
                for table in self._arrays[self._outside + 2 * b : self._outside + 2 * b + 2]:
                    inside[self._stage_of[b]] = inside[self._stage_of[b]] + best(table, axis=1)
            cost = self._arrays[0][:, 0] + inside[0]  # over the first stage's widths
            for s in range(1, len(inside)):
                cost = best(cost[:, None] + self._arrays[s], axis=0) + inside[s]
            ends.append(float(best(cost + self._arrays[self._outside - 1][:, 0]) / self._unit))
        return ends[0], ends[1]


class _Misses:
    """How near a fruitless generator came, for its error message."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.nearest = 0.0
        self.least: dict[str, float] = {}

    def note(self, costs: Mapping[str, np.ndarray]) -> None:
        first = costs.get(self.budget.first)
        if first is None:
            return
        below = first[first <= self.budget.band[1]]
        self.nearest = max(self.nearest, below.max(initial=0.0))
        inside = (first <= self.budget.band[1]) & (first >= self.budget.band[0])
        for name, cost in costs.items():
            if name != self.budget.first and inside.any():
                self.least[name] = min(self.least.get(name, math.inf), cost[inside].min())

    def __str__(self) -> str:
        if self.least:
            return "; in the band of {} the least {}".format(
                self.budget.first, ", ".join(f"{n} was {format_cost(n, v)}" for n, v in self.least.items())
            )
        if self.nearest:
            return f"; the nearest {self.budget.first} was {format_cost(self.budget.first, self.nearest)}"
        return ""


class _Interned(dict):
    """Code -> entry, made once."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, code: int) -> Any:
        entry = self[code] = self._make(code)
        return entry


# -- checking ---------------------------------------------------------------------------------------------------------

_DEFAULT_ARGS = {"img_size": 224, "patch_size": 14, "in_chans": 3, "distill_token": False}
_RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
_KNOWN_ARGS = (*_DEFAULT_ARGS, "num_classes", "patch_head", *_RATES)


def _integer(value: Any, what: str, minimum: int = 1) -> int:
    value = value.item() if isinstance(value, np.integer) else value
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= 1 << 16:
        raise ValueError(f"{what} must be an integer from {minimum} to {1 << 16}, got {value!r:.40}")
    return value


def _check_model_args(args: dict[str, Any]) -> dict[str, Any]:
    clean: dict[str, Any] = {}
    for name, value in args.items():
        if name not in _KNOWN_ARGS:
            raise ValueError(f"unknown model argument {name!r} of a search space; known: {', '.join(_KNOWN_ARGS)}")
        if name == "img_size" and isinstance(value, list | tuple):
            if len(value) != 2:
                raise ValueError(f"img_size must be an integer or (height, width), got {value!r:.40}")
            clean[name] = [_integer(v, name) for v in value]
        elif name in ("distill_token", "patch_head"):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r:.40}")
            clean[name] = value
        elif name in _RATES:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{name} must be a number from 0 to below 1, got {value!r:.40}")
            clean[name] = float(value)
        else:
            clean[name] = _integer(value, name, minimum=0 if name == "num_classes" else 1)
    return clean


def _check_choices(arch: Arch, choices: Any) -> list[Any]:
    """The choices as lists of integers, largest first, checked against the largest network."""
    entries = [arch.patch_embed, *arch.blocks, arch.head]
    if not isinstance(choices, list | tuple) or len(choices) != len(entries):
        got = f"{len(choices)} entries" if isinstance(choices, list | tuple) else type(choices).__name__
        raise ValueError(
            f"num_channels_to_keep must have one entry for each of network_def's {len(entries)}, got {got}"
        )
    clean: list[Any] = []
    widths: list[list[int]] = []
    for i, (entry, choice) in enumerate(zip(entries, choices, strict=True)):
        where = f"num_channels_to_keep entry {i}"
        if isinstance(entry, Head):
            if choice is not None:
                raise ValueError(f"{where} belongs to the head and must be None, got {choice!r:.40}")
            clean.append(None)
        elif isinstance(entry, Block):
            if not entry.exists:
                raise ValueError(
                    f"network_def entry {i} {entry.to_def()} is absent; the largest network has all blocks"
                )
            if not isinstance(choice, Mapping) or set(choice) != {"attn", "mlp", "layer"}:
                raise ValueError(
                    f"{where} belongs to a block and must be a dict of attn, mlp, layer; got {choice!r:.80}"
                )
            attn = _check_list(choice["attn"], f"attn of {where}", entry.attn_dim)
            if any(a % entry.head_dim for a in attn):
                raise ValueError(f"attn of {where} must hold multiples of head_dim {entry.head_dim}, got {attn}")
            mlp = _check_list(choice["mlp"], f"mlp of {where}", entry.mlp_hidden)
            layer = choice["layer"]
            if layer is not None:
                layer = _check_list(layer, f"layer of {where}", entry.dim, depth=True)
                layer = layer if 0 in layer else None
            clean.append({"attn": attn, "mlp": mlp, "layer": layer})
        else:
            width = entry.dim if isinstance(entry, PatchEmbed) else entry.out_dim
            widths.append(_check_list(choice, where, width))
            if len(widths) > 1 and widths[-1][-1] < widths[-2][0]:
                raise ValueError(
                    f"{where}: width {widths[-1][-1]} is smaller than the {widths[-2][0]} of the stage before; a "
                    f"reduction never narrows"
                )
            clean.append(widths[-1])
    return clean


def _check_list(values: Any, where: str, largest: int, depth: bool = False) -> list[int]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= _MAX_CHOICES:
        raise ValueError(f"{where} must be a list of 1 to {_MAX_CHOICES} integers, got {values!r:.80}")
    clean = sorted((_integer(v, f"a value in {where}", minimum=0 if depth else 1) for v in values), reverse=True)
    if clean[0] != largest:
        raise ValueError(f"{where}: the largest choice is {clean[0]}, but network_def has {largest}")
    if depth and set(clean) - {0, largest}:
        raise ValueError(f"{where} must hold {largest} (present) and 0 (absent) only, got {clean}")
    if not depth and len(set(clean)) != len(clean):
        raise ValueError(f"{where} holds a choice twice: {clean}")
    return clean


def _depth_text(arch: Arch) -> str:
    return "-".join(str(len(stage)) for stage in arch.stages)


# -- presets ----------------------------------------------------------------------------------------------------------


def _stages(
    stem: tuple[int, ...],
    widths: Sequence[Sequence[int]],
    head_dims: Sequence[int],
    heads: Sequence[Sequence[int]],
    hidden: Sequence[Sequence[int]],
    depths: Sequence[int],
    removable: Sequence[Sequence[int]],
    num_classes: int,
) -> tuple[list[Any], list[Any]]:
    """Network and choices of a space that has the same choices in every block of a stage.

    Args:
        stem: Type of the patch embedding, and for type 5 its mid channels.
        removable: Per stage the blocks, counted from 1, that may be absent (in half of the draws).
    """
    network: list[Any] = [(stem[0], widths[0][0], *stem[1:])]
    choices: list[Any] = [list(widths[0])]
    for s, width in enumerate(widths):
        dim, head_dim = width[0], head_dims[s]
        if s:
            network.append((3, widths[s - 1][0], dim))
            choices.append(list(width))
        for b in range(1, depths[s] + 1):
            network.append((1, (dim, max(heads[s]), head_dim), (dim, max(hidden[s])), 1))
            layer = [dim, dim, 0, 0] if b in removable[s] else None
            choices.append({"attn": [h * head_dim for h in heads[s]], "mlp": list(hidden[s]), "layer": layer})
    network.append((2, widths[-1][0], num_classes))
    choices.append(None)
    return network, choices


def _vit_resnas_tiny() -> tuple:
    """The paper's sr_tiny_mh."""
    space = _stages(
        stem=(4,),
        widths=[(256, 224, 192, 176, 160), (512, 448, 384, 352, 320), (1024, 896, 768, 704, 640)],
        head_dims=(32, 48, 64),
        heads=[(6, 5, 4, 3), (12, 10, 8, 6), (12, 10, 8, 6)],
        hidden=[range(768, 383, -64), range(1536, 767, -128), range(3072, 1535, -256)],
        depths=(6, 6, 6),
        removable=[(2, 4, 6)] * 3,
        num_classes=1000,
    )
    return *space, dict(img_size=224, patch_size=14, in_chans=3)


def _vit_resnas_small() -> tuple:
    """The paper's sr_small_mh, for Small and Medium."""
    space = _stages(
        stem=(4,),
        widths=[(320, 280, 240, 220, 200), (640, 560, 480, 440, 400), (1280, 1120, 960, 880, 800)],
        head_dims=(32, 48, 64),
        heads=[(8, 7, 6, 5), (16, 14, 12, 10), (16, 14, 12, 10)],
        hidden=[range(960, 479, -80), range(1920, 959, -160), range(3840, 1919, -320)],
        depths=(7, 7, 7),
        removable=[(2, 4, 6)] * 3,
        num_classes=1000,
    )
    return *space, dict(img_size=224, patch_size=14, in_chans=3)


def _mini() -> tuple:
    """Photographs of 64 to 128 px: stages of 12, 6 and 3 positions a side at 96 px."""
    space = _stages(
        stem=(4,),
        widths=[(128, 112, 96, 80, 64), (256, 224, 192, 160, 128), (384, 352, 320, 288, 256)],
        head_dims=(32, 32, 32),
        heads=[(4, 3, 2), (8, 6, 4, 3), (12, 10, 8, 6)],
        hidden=[range(384, 127, -64), range(768, 255, -128), range(1152, 383, -192)],
        depths=(4, 5, 4),
        removable=[(2, 4), (2, 4), (2, 4)],
        num_classes=1000,
    )
    return *space, dict(img_size=96, patch_size=8, in_chans=3)


def _micro() -> tuple:
    """Images of 32 px on a CPU: stages of 8, 4 and 2 positions a side; the stem is thin, for it is not searched."""
    space = _stages(
        stem=(5, 16),
        widths=[(64, 56, 48, 40, 32), (112, 96, 80, 64), (160, 144, 128, 112)],
        head_dims=(16, 16, 16),
        heads=[(4, 3, 2, 1), (7, 5, 4, 3, 2), (10, 8, 6, 4)],
        hidden=[range(192, 47, -48), range(336, 83, -84), range(480, 119, -120)],
        depths=(4, 4, 4),
        removable=[(2, 4), (2, 4), (2, 4)],
        num_classes=10,
    )
    return *space, dict(img_size=32, patch_size=4, in_chans=3)


_PRESETS: dict[str, Callable[[], tuple]] = {
    "vit_resnas_tiny": _vit_resnas_tiny,
    "vit_resnas_small": _vit_resnas_small,
    "mini": _mini,
    "micro": _micro,
}
