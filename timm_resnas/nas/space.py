"""Search spaces: genes and their choices, random networks under a budget, mutation, crossover.

Inside, a network is a row of small integers, one per gene: an index into the gene's choices, 0 the largest. Thousands
of rows are drawn, costed and compared at once; an `Arch` is made of accepted rows only. A family subclasses
`SearchSpace` with its genes, the layers that they decide, and the way from rows to its Arch and back.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..arch import Arch, Layer, image_size
from .cost import Budget, BudgetError, format_cost
from .generator import ABSENT, MAX_PROPOSALS, generate
from .tables import Position, Table

if TYPE_CHECKING:
    from torch import nn

__all__ = ["BudgetError", "Gene", "MAX_CHOICES", "Position", "SearchSpace"]

MAX_CHOICES = 64  # of one gene; a space may come from the net
_MAX_TRIES = 1 << 14  # the same for one child


@dataclass(frozen=True)
class Gene:
    """One choice of a space.

    Attributes:
        name: The field's term: ``"embed_dim"``, ``"num_heads"``, ``"mlp_hidden"``, ``"exists"``, ...
        choices: Largest first.
        kind: In draws within a budget, ``"unit"`` genes start at their largest and step down, ``"width"`` genes are
            drawn. A ``"presence"`` gene is 0 (present) or 1 (absent); with a single choice it is always present.
        entries: Indices of the choices as often as training draws them, largest first: ``(0, 0, 1, 1)`` for a block
            that is absent in half of the draws. None: each once.
        presence: Column of the presence gene of the part that this gene belongs to: where that is absent, the gene
            decides nothing and is 0.
        follows: Of a presence gene, the column of another one: where that is absent, so is this.
        odds: Odds that a random step down takes this gene, in the first steps and later. None: the number of its steps
            (widths and presence only later), so that none is exhausted long before another.
        stage: Stage of the network, for tables and pictures.
    """

    name: str
    choices: tuple[Any, ...]
    kind: str = "unit"
    entries: tuple[int, ...] | None = None
    presence: int | None = None
    follows: int | None = None
    odds: tuple[float, float] | None = None
    stage: int = 0

    @property
    def draws(self) -> tuple[int, ...]:
        """`entries`, each choice once where they are not given."""
        return tuple(range(len(self.choices))) if self.entries is None else self.entries

    @property
    def absence(self) -> float:
        """Share of the draws in which a presence gene is absent."""
        return self.draws.count(ABSENT) / len(self.draws)

    @property
    def step_odds(self) -> tuple[float, float]:
        """`odds`, or their default."""
        steps = float(len(self.choices) - 1)
        return self.odds or (steps if self.kind == "unit" else 0.0, steps)


class SearchSpace(ABC):
    """Networks that differ in genes, priced layer by layer.

    A family's constructor calls this one. Costs ``macs``, ``params`` and ``memory`` are there from the start; `price`
    adds others, which budgets and searches then name like these.

    Args:
        genes: The columns of rows.
        positions: Where the network has a layer, and which genes decide it.
        model_args: Arguments that all networks of the space are built with, ``img_size`` and ``in_chans`` among them.
        network_order: Columns in the order in which training draws them; as they are where None.

    Attributes:
        family: Name in the dict of `to_dict`.
        arch_type: The family's Arch.
        supernet: Entry point of its supernet: ``timm.create_model(space.supernet, space=space.to_dict())``.
        presets: Named spaces: functions of model arguments.
        training_args: Names of the model arguments that only training uses.
        mixes: Whether blocks have several paths, see `Supernet.mixture`.
        scales: Whether the supernet may have switchable scales, its argument ``switchable_scale``.
        searched: The genes that leave a choice, in network order.
        largest: The network of all largest choices.
        smallest: The network of all least choices, what can be absent absent.
    """

    family: ClassVar[str]
    arch_type: ClassVar[type[Arch]]
    supernet: ClassVar[str]
    presets: ClassVar[Mapping[str, Callable[..., SearchSpace]]] = {}
    training_args: ClassVar[tuple[str, ...]] = ()
    mixes: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    _families: ClassVar[dict[str, type[SearchSpace]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "family" in cls.__dict__:
            SearchSpace._families[cls.family] = cls

    def __init__(
        self,
        genes: Sequence[Gene],
        positions: Sequence[Position],
        model_args: Mapping[str, Any],
        network_order: Sequence[int] | None = None,
    ) -> None:
        self.genes = tuple(genes)
        self.positions = tuple(positions)
        self._model_args = dict(model_args)
        counts = [len(gene.choices) for gene in self.genes]
        if not all(1 <= n <= MAX_CHOICES for n in counts):
            raise ValueError(f"a gene has 1 to {MAX_CHOICES} choices, got {max(counts)}")
        self._counts_int, self._counts = counts, np.array(counts, np.float32)
        self._last = np.array(counts, np.int8) - np.int8(1)
        self._widths = [i for i, gene in enumerate(self.genes) if gene.kind == "width"]
        self._presence = np.array([i for i, gene in enumerate(self.genes) if gene.kind == "presence"], np.intp)
        self._absence = np.array([self.genes[i].absence for i in self._presence])
        self._removable = np.array([counts[i] > 1 for i in self._presence], bool)
        self._structural = [*self._widths, *self._presence[self._removable].tolist()]
        self._follows = [(i, g.follows) for i, g in enumerate(self.genes) if g.follows is not None]
        owned = [(i, g.presence) for i, g in enumerate(self.genes) if g.presence is not None]
        self._owned = np.array([i for i, _ in owned], np.intp)
        self._owners = np.array([p for _, p in owned], np.intp)
        odds = np.array([gene.step_odds for gene in self.genes]).T
        self._odds = [_cumulative(o) for o in odds]
        order = range(len(genes)) if network_order is None else network_order
        self._searched = [i for i in order if counts[i] > 1]
        self.searched = tuple(self.genes[i] for i in self._searched)
        self._prices: dict[str, dict[str, Any]] = {}
        self._tables: dict[str, Table] = {}
        height, width = image_size(model_args["img_size"])
        self.price("macs", lambda layer: layer.macs)
        self.price("params", lambda layer: layer.params)
        image = 4 * model_args["in_chans"] * height * width
        self.price("memory", lambda layer: layer.memory, reduce="max", base=image)
        self.largest: Arch = self.decode(np.zeros((1, len(self.genes)), np.int8))[0]
        self.smallest: Arch = self.decode(self.normalise(self._last[None].copy()))[0]

    # -- a family supplies -------------------------------------------------------------------------------------------

    @abstractmethod
    def decode(self, rows: np.ndarray) -> list[Arch]:
        """Architectures of normalised rows, [n, genes]."""

    @abstractmethod
    def encode(self, arch: Arch) -> np.ndarray:
        """Normalised row of an architecture, [genes] int8.

        Raises:
            ValueError: It is not of this space; the message names the first part that differs and what is possible
                there.
        """

    @abstractmethod
    def choices_dict(self) -> dict[str, Any]:
        """What `to_dict` holds beside the family and the model arguments."""

    @classmethod
    @abstractmethod
    def from_choices(cls, data: Mapping[str, Any], model_args: Mapping[str, Any]) -> SearchSpace:
        """Inverse of `choices_dict`; the data are checked, for they may come from the net.

        Raises:
            ValueError: Parts are missing, unknown, or do not fit each other.
        """

    @classmethod
    def reads(cls, data: Mapping[str, Any]) -> bool:
        """Whether a dict of `to_dict` is of this family."""
        return data.get("family") == cls.family

    # -- forms -------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, space: SearchSpace | Mapping[str, Any] | str) -> SearchSpace:
        """A space from a preset's name, the dict of `to_dict`, or a space (returned as it is)."""
        if isinstance(space, SearchSpace):
            return space
        return cls.preset(space) if isinstance(space, str) else cls.from_dict(space)

    @staticmethod
    def preset(name: str, **model_args: Any) -> SearchSpace:
        """A named space of any family.

        Raises:
            ValueError: The name is not known.
        """
        presets = SearchSpace.preset_names()
        if name not in presets:
            raise ValueError(f"unknown search space {name!r:.80}; known: {', '.join(presets)}")
        return presets[name].presets[name](**model_args)

    @staticmethod
    def preset_names() -> dict[str, type[SearchSpace]]:
        """Names of all families' presets, and the family of each."""
        return {name: family for family in SearchSpace._families.values() for name in family.presets}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> SearchSpace:
        """Inverse of `to_dict`; the data are checked, for they may come from the net.

        Raises:
            ValueError: Parts are missing, unknown, or do not fit each other.
        """
        family = isinstance(data, Mapping) and next((f for f in SearchSpace._families.values() if f.reads(data)), None)
        if not family:
            got = ", ".join(map(str, list(data)[:8])) if isinstance(data, Mapping) else type(data).__name__
            known = ", ".join(SearchSpace._families)
            raise ValueError(f"a search space is a dict with a family ({known}) and its choices; got {got:.200}")
        model_args = data.get("model_args") or {}
        if not isinstance(model_args, Mapping) or not all(isinstance(k, str) for k in model_args):
            raise ValueError("model_args of a search space must be a dict of names to values")
        choices = {k: v for k, v in data.items() if k not in ("family", "model_args")}
        return family.from_choices(choices, model_args)

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain form: ``family``, the family's choices, ``model_args``."""
        return _plain({"family": self.family, **self.choices_dict(), "model_args": self._model_args})

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments that models of the space are built with, JSON-plain; ``img_size`` is [height, width]."""
        return _plain(self._model_args)

    def at(self, **model_args: Any) -> SearchSpace:
        """The same choices for other model arguments, such as ``img_size`` and ``num_classes``."""
        return self.from_choices(_plain(self.choices_dict()), {**self._model_args, **model_args})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SearchSpace) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size():.3g} sub-networks of {self.largest})"

    def __reduce__(self) -> tuple:
        return SearchSpace.from_dict, (self.to_dict(),)

    # -- what is inside ----------------------------------------------------------------------------------------------

    def size(self) -> int:
        """Number of different sub-networks (by `Arch.key`)."""
        inside = {int(p): 1 for p in self._presence}
        free = 1
        for gene in self.genes:
            if gene.kind != "presence":
                if gene.presence is None:
                    free *= len(gene.choices)
                else:
                    inside[gene.presence] *= len(gene.choices)
        after: dict[int | None, list[int]] = {}
        for p in inside:
            after.setdefault(self.genes[p].follows, []).append(p)

        def ways(p: int) -> int:
            # absent, all that follow are absent as well
            present = inside[p] * math.prod(ways(q) for q in after.get(p, ()))
            return present + (self._counts_int[p] > 1)

        return free * math.prod(ways(p) for p in after.get(None, ()))

    def contains(self, arch: Arch) -> bool:
        """Whether the architecture selects a sub-network of this space; genes of absent parts do not matter."""
        try:
            self.encode(arch)
        except ValueError:
            return False
        return True

    def rows(self, archs: Iterable[Arch]) -> np.ndarray:
        """Rows of architectures, [n, genes].

        Raises:
            ValueError: One is not of this space.
        """
        return np.stack([self.encode(arch) for arch in archs])

    def build(self, picks: Sequence[Sequence[int]] | np.ndarray) -> list[Arch]:
        """Networks from one index into ``draws`` for each gene of `searched`, [n, len(searched)].

        Raises:
            ValueError: The shape or an index is out of range.
        """
        picks = np.asarray(picks)
        if picks.ndim != 2 or picks.shape[1] != len(self.searched):
            raise ValueError(f"picks must have shape [n, {len(self.searched)}], got {list(picks.shape)}")
        counts = np.array([len(gene.draws) for gene in self.searched])
        if ((picks < 0) | (picks >= counts)).any():
            raise ValueError("picks holds an index outside its gene's entries")
        rows = np.zeros((len(picks), len(self.genes)), np.int8)
        for i, (gene, column) in enumerate(zip(self.searched, self._searched, strict=True)):
            rows[:, column] = np.array(gene.draws)[picks[:, i]]
        return self.decode(self.normalise(rows))

    def layers(self, arch: Arch) -> tuple[Layer, ...]:
        """The layers of a network at the space's ``model_args``, see `Arch.layers`."""
        return arch.layers(**self._model_args)

    def network(self, arch: Arch, **kwargs: Any) -> nn.Module:
        """The plain timm network for evaluation: canonical, without what only training uses; ``kwargs`` as `create`."""
        args = {name: value for name, value in self.model_args.items() if name not in self.training_args}
        return arch.canonical().create(**args, **kwargs)

    def cascade(self, rows: np.ndarray) -> np.ndarray:
        """Make absent, in place, what follows an absent part. [n, genes]"""
        for column, before in self._follows:
            rows[:, column] |= rows[:, before]
        return rows

    def normalise(self, rows: np.ndarray) -> np.ndarray:
        """Apply `cascade` and put the genes of absent parts at 0, in place. [n, genes]"""
        self.cascade(rows)
        rows[:, self._owned] *= 1 - rows[:, self._owners]
        return rows

    # -- costs -------------------------------------------------------------------------------------------------------

    def price(
        self, name: str, layer_cost: Callable[[Layer], int], *, unit: int = 1, reduce: str = "sum", base: int = 0
    ) -> None:
        """Add a cost, or replace it: every combination of each position's genes is priced once, when first needed.

        Args:
            name: The cost, such as ``"latency_ms"``.
            layer_cost: Price of a layer, a non-negative integer, so that sums are the same in any order.
            unit: Price of one unit of the cost: 10**6 for nanoseconds of a cost in milliseconds.
            reduce: ``"sum"``, or ``"max"`` for a peak.
            base: Added to every network's cost, in the price's unit.
        """
        self._prices[name] = dict(price=layer_cost, unit=unit, reduce=reduce, base=base)
        self._tables.pop(name, None)

    @property
    def cost_names(self) -> tuple[str, ...]:
        """Names of the priced costs."""
        return tuple(self._prices)

    def table(self, name: str) -> Table:
        """Prices of one cost.

        Raises:
            BudgetError: The space has no such price.
        """
        if name not in self._tables:
            self._tables[name] = Table(self.genes, self.positions, **self._price_of(name))
        return self._tables[name]

    def _price_of(self, name: str) -> dict[str, Any]:
        if name not in self._prices:
            hint = "; measure a latency table for it" if name == "latency_ms" else ""
            raise BudgetError(f"the space has no price for {name}, only for {', '.join(self._prices)}{hint}")
        return self._prices[name]

    def costs(self, arch: Arch) -> dict[str, int | float]:
        """All priced costs of an architecture of the space at its ``model_args``.

        Parameters are those of the finished network, without heads that only training uses.

        Raises:
            ValueError: The architecture is not of this space.
        """
        row = self.encode(arch)[None]
        values = {name: self.table(name).cost(row).item() for name in self._prices}
        return {name: int(v) if self._prices[name]["unit"] == 1 else v for name, v in values.items()}

    def cost_of(self, arch: Arch, name: str) -> int | float:
        """One cost of an architecture of the family, layer by layer, whether or not the space has its choices.

        Raises:
            BudgetError: The space has no such price.
        """
        known = self._price_of(name)
        prices = [known["base"], *(known["price"](layer) for layer in self.layers(arch))]
        if known["reduce"] == "max":
            prices = [prices[0] + max(prices[1:])]
        total = sum(prices)
        return total if known["unit"] == 1 else total / known["unit"]

    def cost_range(self, name: str) -> tuple[float, float]:
        """Least and greatest cost of the space's networks.

        Raises:
            BudgetError: The space has no such price.
        """
        return self.table(name).range

    # -- drawing -----------------------------------------------------------------------------------------------------

    def sample(self, rng: np.random.Generator, budget: Budget | None = None) -> Arch:
        """One random network, see `sample_many`."""
        return self.sample_many(1, rng, budget)[0]

    def sample_many(self, n: int, rng: np.random.Generator, budget: Budget | None = None) -> list[Arch]:
        """Independent random networks (some may be equal).

        Without a budget every gene is drawn for itself, as in super-network training. With one, the paper's generator:
        random widths and depth with units at their maximum, until the first-named cost reaches the lower end of the
        band; then random steps down, of units only and after 100 steps of widths and depth as well, until it is no more
        than the limit; it starts over when that or another limit is missed.

        Args:
            n: Number of networks.
            rng: Source of randomness.
            budget: What they may cost.

        Returns:
            ``n`` networks; fewer, but at least one, when the band is hit too rarely.

        Raises:
            BudgetError: The budget is out of reach, or nothing was found in it with bounded effort.
        """
        if budget is None:
            return self.decode(self.normalise(self._uniform(n, rng)))
        self.check_budget(budget)
        found: list[Arch] = []
        tried, rate = 0, 0.5
        nearest = _NearestMiss(budget)
        while len(found) < n and tried < (4 * MAX_PROPOSALS if found else MAX_PROPOSALS):
            batch = min(math.ceil((n - len(found)) / rate * 1.05) + 4, 4096)
            rows = generate(self, batch, rng, budget)
            tried += len(rows)
            good = self._within(rows, budget)
            if not found and not good.any():
                nearest.note({name: self.table(name).cost(rows) for name, _ in budget})
            found += self.decode(rows[good][: n - len(found)])
            rate = max((len(found) + 0.5) / tried, 1e-4)
        if not found:
            raise BudgetError(
                f"no network of the space was found within {budget} in {tried} random tries{nearest}; widen the band "
                f"(lower is {budget.lower}) or loosen a limit"
            )
        return found

    def mutate(self, arch: Arch, rng: np.random.Generator, prob: float = 0.3, budget: Budget | None = None) -> Arch:
        """One mutation of ``arch``, see `mutate_many`.

        Raises:
            ValueError: ``arch`` is not of this space.
            BudgetError: None was found within the budget with bounded effort.
        """
        return _only(self.mutate_many([arch], 1, rng, prob, budget), "mutation", budget)

    def mutate_many(
        self,
        parents: Sequence[Arch],
        n: int,
        rng: np.random.Generator,
        prob: float = 0.3,
        budget: Budget | None = None,
    ) -> list[Arch]:
        """Mutations of parents drawn uniformly.

        Each gene changes with probability ``prob``: widths and units are redrawn from their choices (the old one among
        them), the presence of a removable part is flipped; then the cascade. A child outside the budget is replaced by
        another one of the same parent. A part that returns starts from its maximum, since the genes of absent parts are
        not kept.

        Returns:
            ``n`` children; fewer where some parent's were all out of budget with bounded effort.

        Raises:
            ValueError: A parent is not of this space.
        """
        rows = self.rows(parents)
        chosen = rng.integers(len(rows), size=n)

        def make(children: np.ndarray) -> np.ndarray:
            genes = rows[chosen[children]]
            change = rng.random(genes.shape, np.float32) < prob
            drawn = self._uniform(len(genes), rng)
            drawn[:, self._presence] = (genes[:, self._presence] ^ 1) & self._removable
            return self.normalise(np.where(change, drawn, genes))

        return self._breed(make, n, budget)

    def crossover(self, a: Arch, b: Arch, rng: np.random.Generator, budget: Budget | None = None) -> Arch:
        """One child of ``a`` and ``b``, see `crossover_many`.

        Raises:
            ValueError: A parent is not of this space.
            BudgetError: None was found within the budget with bounded effort.
        """
        return _only(self.crossover_many([a, b], 1, rng, budget), "crossover", budget)

    def crossover_many(
        self, parents: Sequence[Arch], n: int, rng: np.random.Generator, budget: Budget | None = None
    ) -> list[Arch]:
        """Children of pairs of two different parents, drawn uniformly.

        Each gene comes from either with probability one half; then the cascade. A child outside the budget is replaced
        by another one of the same pair.

        Returns:
            ``n`` children; fewer where some pair's were all out of budget with bounded effort.

        Raises:
            ValueError: Fewer than two parents, or one is not of this space.
        """
        if len(parents) < 2:
            raise ValueError(f"crossover needs at least two parents, got {len(parents)}")
        rows = self.rows(parents)
        first = rng.integers(len(rows), size=n)
        second = (first + rng.integers(1, len(rows), size=n)) % len(rows)

        def make(children: np.ndarray) -> np.ndarray:
            from_second = rng.random((len(children), len(self.genes)), np.float32) < 0.5
            return self.normalise(np.where(from_second, rows[second[children]], rows[first[children]]))

        return self._breed(make, n, budget)

    def _breed(self, make: Callable[[np.ndarray], np.ndarray], n: int, budget: Budget | None) -> list[Arch]:
        """For each child the first proposal within budget; ``make`` proposes one for each child number it is given."""
        rows = np.zeros((n, len(self.genes)), np.int8)
        found = np.zeros(n, bool)
        waiting, tried, copies = np.arange(n), 0, 1 if budget is None else 12
        while waiting.size and tried < _MAX_TRIES:
            proposed = make(np.repeat(waiting, copies))
            good = np.flatnonzero(self._within(proposed, budget)) if budget else np.arange(len(proposed))
            owner, where = np.unique(waiting[good // copies], return_index=True)
            rows[owner] = proposed[good[where]]
            found[owner] = True
            waiting = np.flatnonzero(~found)
            tried += copies
            copies = min(2 * copies, 1024)
        return self.decode(rows[found])

    # -- budgets -----------------------------------------------------------------------------------------------------

    def check_budget(self, budget: Budget) -> None:
        """Say why a budget cannot be met.

        Raises:
            BudgetError: A limit is below the smallest network, or the first-named, unless its ``lower`` is 0, above the
                largest; or a limited cost has no price.
        """
        for name, limit in budget:
            least, most = self.cost_range(name)
            above = limit > most and name == budget.first and budget.lower > 0
            if limit < least or above:
                fact = "above the largest" if above else "below the smallest"
                low, high, got = (format_cost(name, v) for v in (least, most, limit))
                hint = " (lower=0 allows any limit above the smallest)" if above else ""
                raise BudgetError(
                    f"budget {name}={got} is {fact} network of the space, whose networks have {name} from {low} to "
                    f"{high}{hint}"
                )

    def idle_limits(self, budget: Budget) -> dict[str, float]:
        """Limited costs that are the same for all networks, so that their limit chooses nothing, and their value.

        The peak of activations is often such a cost: the stem, which is not searched, decides it.
        """
        ranges = {name: self.cost_range(name) for name, _ in budget}
        return {name: least for name, (least, most) in ranges.items() if least == most}

    def _within(self, rows: np.ndarray, budget: Budget) -> np.ndarray:
        """Which rows meet the budget, [n] bool."""
        good = np.ones(len(rows), bool)
        for i, (name, limit) in enumerate(budget):
            cost = self.table(name).cost(rows)
            good &= cost <= limit
            if i == 0:
                good &= cost >= budget.band[0]
        return good

    # -- rows -------------------------------------------------------------------------------------------------------

    def _uniform(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Every gene for itself, before `normalise`."""
        rows = (rng.random((n, len(self.genes)), np.float32) * self._counts).astype(np.int8)
        np.minimum(rows, self._last, out=rows)  # a float32 product may round up to the count
        rows[:, self._presence] = rng.random((n, len(self._presence)), np.float32) < self._absence
        return rows


class _NearestMiss:
    """The costs nearest to a budget among rejected networks, for the error message."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.nearest = 0.0
        self.least: dict[str, float] = {}

    def note(self, costs: Mapping[str, np.ndarray]) -> None:
        floor, limit = self.budget.band
        first = costs[self.budget.first]
        self.nearest = max(self.nearest, first[first <= limit].max(initial=0.0))
        inside = (first <= limit) & (first >= floor)
        for name, cost in costs.items():
            if name != self.budget.first and inside.any():
                self.least[name] = min(self.least.get(name, math.inf), cost[inside].min())

    def __str__(self) -> str:
        if self.least:
            least = ", ".join(f"{n} was {format_cost(n, v)}" for n, v in self.least.items())
            return f"; in the band of {self.budget.first} the least {least}"
        if self.nearest:
            return f"; the nearest {self.budget.first} was {format_cost(self.budget.first, self.nearest)}"
        return ""


def _only(children: list[Arch], what: str, budget: Budget | None) -> Arch:
    if not children:
        raise BudgetError(f"no {what} within {budget} was found in {_MAX_TRIES} tries; widen the band")
    return children[0]


def _cumulative(odds: np.ndarray) -> np.ndarray:
    """Upper end of each column's share of [0, 1); columns after the last that can be drawn get no share."""
    if not odds.any():  # nothing can step down
        odds = np.ones(len(odds))
    total = np.cumsum(odds)
    total = (total / total[-1]).astype(np.float32)
    total[np.flatnonzero(odds)[-1] :] = 1
    return total


def _plain(data: Any) -> Any:
    return json.loads(json.dumps(data))
