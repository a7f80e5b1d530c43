"""Search for many budgets at once: the front of score against costs.

Survival is NSGA-II's (Deb et al. 2002), computed by pymoo: fronts of non-dominated networks, and on the last one that
fits, the least crowded. What a generation is made of is our own, since an architecture's costs are known before it is
scored: the first one is spread evenly over the range of MACs, no network out of budget and no network twice is ever
scored, and children differ from good parents in few layers.

>>> search = ParetoSearch(space, Budget(macs=20e6), seed=0, objectives=("macs", "params"), max_score=num_images)
>>> while not search.done:
...     search.tell([(arch, score(arch)) for arch in search.ask()])
>>> [(r["score"], r["macs"], r["params"]) for r in search.front()]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..arch import Arch
from .cost import Budget, budget_violation, format_cost
from .evolution import Search, _count, rank_key
from .space import BudgetError, SearchSpace

__all__ = ["ParetoSearch", "survivors"]

_POOL = 8  # networks drawn for each one of the initial generation
_TILT = 8.0  # strongest preference for large or small choices, as the exponent between a layer's ends
_MAX_TILT = 128.0  # the smallest network, in practice


class ParetoSearch(Search):
    """Networks that no other one beats in score and all costs, by NSGA-II survival.

    Each generation is bred from the survivors of the whole history: binary tournaments by front and crowding choose
    the parents of mutations and crossovers. Where these bring too few new networks, random ones are added.

    Args:
        space: See :class:`Search`; so is ``seed``.
        budget: What a network may cost; None for no limit. Its lower band is not used.
        objectives: Costs to keep low: ``macs``, ``params``, ``memory``, or another that the space has a price for
            (``latency_ms``). The score, to be high, is always the other objective.
        population: Networks of the initial generation.
        iterations: Number of generations, the initial one included.
        parents: Survivors that the next generation is bred from.
        mutations: Mutations per generation.
        crossovers: Crossovers per generation.
        mutation_prob: Probability of each gene to mutate; None is two layers of the space on average. (The paper's
            0.3, made for one objective, gave smaller hypervolumes.)
        lower: Lower end of a band of the first-named limit, as a fraction of it.
        max_score: Score of a perfect network, such as the number of images. The hypervolume's unit; no decision
            depends on it.

    Raises:
        BudgetError: The space cannot meet the budget.
        ImportError: pymoo is not installed.
        ValueError: A setting is out of range, or an objective is not known.
    """

    kind = "pareto"

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget | None = None,
        seed: int = 0,
        *,
        objectives: Sequence[str] = ("macs",),
        population: int = 500,
        iterations: int = 20,
        parents: int = 75,
        mutations: int = 75,
        crossovers: int = 75,
        mutation_prob: float | None = None,
        lower: float = 0.0,
        max_score: int | float = 1,
    ) -> None:
        _pymoo()
        if budget is not None:
            budget = Budget(lower=lower, **budget.limits)
        super().__init__(space, budget, seed, generations=iterations)
        # what objectives are measured by: the largest network, of the whole space whatever the budget
        self._largest = space.costs(space.largest)
        self.objectives = _check_objectives(objectives, self._largest)
        for name in self.objectives:
            least, most = space.cost_range(name)
            if least == most and space.size() > 1:
                raise ValueError(
                    f"all networks of the space have {name} {format_cost(name, most)}, which cannot be an objective; "
                    f"choose among {', '.join(n for n in self._largest if n != name)}"
                )
        self.population = _count("population", population)
        self.parents = _count("parents", parents)
        self.mutations = _count("mutations", mutations, minimum=0)
        self.crossovers = _count("crossovers", crossovers, minimum=0)
        self.batch = self.mutations + self.crossovers
        if mutation_prob is None:
            mutation_prob = min(1.0, 2 / max(len(space.searched), 1))
        if not 0 < mutation_prob <= 1:
            raise ValueError(f"mutation_prob must be above 0 and at most 1, got {mutation_prob!r}")
        self.mutation_prob = float(mutation_prob)
        if not (max_score > 0 and math.isfinite(max_score)):
            raise ValueError(f"max_score must be a finite number above 0, got {max_score!r:.40}")
        self.max_score = max_score

    def settings(self) -> dict[str, Any]:
        return {
            "objectives": list(self.objectives),
            "population": self.population,
            "iterations": self.generations,
            "parents": self.parents,
            "mutations": self.mutations,
            "crossovers": self.crossovers,
            "mutation_prob": self.mutation_prob,
        }

    # -- results ------------------------------------------------------------------------------------------------------

    def front(self) -> list[dict[str, Any]]:
        """Records of the history that no other beats, cheapest first (by the objectives in their order).

        Of networks that are equal in score and objectives, the first by :func:`rank_key` stands for all.
        """
        return self._front(self.history)

    def hypervolume(self, reference: Mapping[str, float] | None = None) -> float:
        """Hypervolume of the front: the share of the box from a reference point to a perfect network without cost.

        Args:
            reference: The worst ``score`` and costs that count, in their own units. What is not given is 0 for the
                score and the largest network's for a cost, so that searches of one space can be compared.

        Raises:
            ValueError: A name is not an objective, or no room is left between the reference and the ideal.
        """
        return self._hypervolume(self.history, reference)

    @property
    def hypervolumes(self) -> list[float]:
        """:meth:`hypervolume` after each complete generation."""
        ends = [i for i, r in enumerate(self.history) if i and r["generation"] != self.history[i - 1]["generation"]]
        return [self._hypervolume(self.history[:end]) for end in (*ends, *[len(self.history)] * bool(self.history))]

    def _values(self, records: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Objectives to minimise: [n, 1 + number of costs]."""
        rows = [[-r["score"], *(r[name] for name in self.objectives)] for r in records]
        return np.array(rows, np.float64).reshape(-1, 1 + len(self.objectives))

    def _front(self, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        within = [r for r in sorted(records, key=rank_key) if not budget_violation(self.budget, r)]
        points: dict[tuple, dict[str, Any]] = {}
        values = self._values(within)
        for i in _pymoo().sorting.do(values, only_non_dominated_front=True):
            points.setdefault(tuple(values[i]), within[i])
        return sorted(points.values(), key=lambda r: (*(r[name] for name in self.objectives), -r["score"], r["key"]))

    def _hypervolume(self, records: Sequence[dict[str, Any]], reference: Mapping[str, float] | None = None) -> float:
        names = ("score", *self.objectives)
        given = dict(reference or {})
        if not set(given) <= set(names):
            unknown = ", ".join(sorted(set(given) - set(names)))
            raise ValueError(f"the reference point names {unknown}; the objectives are {', '.join(names)}")
        worst = np.array([-given.get("score", 0), *(given.get(n, self._largest[n]) for n in self.objectives)])
        ideal = np.array([-self.max_score] + [0] * len(self.objectives))
        if not (worst > ideal).all():
            raise ValueError(f"the reference point {given} must be worse than score {self.max_score} and no cost")
        points = self._front(records)
        if not points:
            return 0.0
        values = (self._values(points) - ideal) / (worst - ideal)
        return float(_pymoo().HV(ref_point=np.ones(len(names))).do(values))

    # -- generations --------------------------------------------------------------------------------------------------

    def _propose(self) -> list[tuple[Arch, str]]:
        taken: set[str] = set()
        if not self.history:
            found = self._spread(self.population)
            taken.update(arch.key() for arch, _ in found)
            try:
                return found + self._fresh(self.population - len(found), self._sample, "initial", taken)
            except BudgetError:
                if not found:
                    raise
                return found
        violation = np.array([budget_violation(self.budget, r) for r in self.history])
        order = survivors(self._values(self.history), self.parents, violation)
        parents = [self.archs[self.history[i]["key"]] for i in order]

        def winners(n: int) -> list[Arch]:
            # survivors are in order, so the winner of a tournament is the one that comes first
            return [parents[i] for i in self._rng.integers(len(parents), size=(n, 2)).min(axis=1)]

        def mutate(n: int) -> list[Arch]:
            return self.space.mutate_many(winners(n), n, self._rng, self.mutation_prob, self.budget)

        def cross(n: int) -> list[Arch]:
            return self.space.crossover_many(winners(max(n, 2)), n, self._rng, self.budget)

        found = self._fresh(self.mutations, mutate, "mutation", taken)
        if len(parents) > 1:
            found += self._fresh(self.crossovers, cross, "crossover", taken)
        # few mutations do not reach far; without this, a search of a small space would end before its time
        missing = self.batch - len(found)
        return found + self._fresh(missing, self._sample, "random", taken)

    def _spread(self, n: int) -> list[tuple[Arch, str]]:
        """Up to ``n`` different networks within budget, at even ratios of MACs from the least to the most.

        Independent draws all cost about the same, the mean. Here each network prefers large or small choices by its
        tilt: a choice at x of the way from a layer's largest to its smallest has the odds exp(tilt * x).
        What is above a limit is redrawn with more tilt to small.
        """
        pool = {arch.key(): arch for arch in (self.space.smallest, self.space.largest) if self._fits(arch)}
        tilt = np.linspace(-_TILT, _TILT, _POOL * n)
        while tilt.size:
            drawn = self._tilted(tilt)
            fits = np.array([self._fits(arch) for arch in drawn])
            pool.update((arch.key(), arch) for arch, good in zip(drawn, fits, strict=True) if good)
            tilt = tilt[~fits & (tilt < _MAX_TILT)]
            tilt += np.maximum(_TILT / 4, tilt / 2)
        archs = list(pool.values())
        place = np.log(self.space.table("macs").cost(self.space.rows(archs))) if archs else np.zeros(0)
        found: list[tuple[Arch, str]] = []
        for target in np.linspace(place.min(), place.max(), n) if archs else ():
            if len(found) < len(archs):
                nearest = int(np.argmin(np.abs(place - target)))
                place[nearest] = math.inf
                found.append((archs[nearest], "initial"))
        return found

    def _tilted(self, tilt: np.ndarray) -> list[Arch]:
        counts = np.array([len(gene.draws) for gene in self.space.searched])
        tilt = np.where(tilt == 0, 1e-9, tilt)[:, None]
        # the inverse of the distribution on [0, 1) whose density grows as exp(tilt * x)
        x = np.log1p(self._rng.random((len(tilt), len(counts))) * np.expm1(tilt)) / tilt
        return self.space.build(np.minimum((x * counts).astype(int), counts - 1))

    def _fits(self, arch: Arch) -> bool:
        if self.budget is None:
            return True
        return not self.budget.check(self.space.costs(arch))


def survivors(values: np.ndarray, n: int, violation: np.ndarray | None = None) -> np.ndarray:
    """NSGA-II's survivors, best first: by front, then the least crowded; after them those out of budget.

    Ties keep their order, so nothing is random.

    Args:
        values: Objectives to minimise, [num_networks, num_objectives].
        n: How many survive; fewer where there are fewer.
        violation: By how much a network is out of budget, [num_networks]; 0 is feasible.

    Returns:
        Indices, [min(n, num_networks)].
    """
    pymoo = _pymoo()
    values = np.asarray(values, np.float64)
    violation = np.zeros(len(values)) if violation is None else np.asarray(violation)
    feasible = np.flatnonzero(violation <= 0)
    chosen: list[int] = []
    for front in pymoo.sorting.do(values[feasible], n_stop_if_ranked=n) if feasible.size else ():
        members = feasible[front]
        crowding = pymoo.crowding.do(values[members])
        chosen += members[np.argsort(-crowding, kind="stable")].tolist()
    others = np.flatnonzero(violation > 0)
    chosen += others[np.argsort(violation[others], kind="stable")].tolist()
    return np.array(chosen[:n], dtype=np.intp)


def _pymoo() -> SimpleNamespace:
    """The parts of pymoo that are used here; its import takes half a second, and only this search needs it."""
    try:
        from pymoo.indicators.hv import HV
        from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
        from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
    except ImportError as err:
        raise ImportError(
            f"a search with several objectives needs pymoo ({err}); pip install 'timm_resnas[search]'"
        ) from err
    return SimpleNamespace(HV=HV, crowding=get_crowding_function("cd"), sorting=NonDominatedSorting())


def _check_objectives(objectives: Sequence[str], known: Mapping[str, Any]) -> tuple[str, ...]:
    names = (objectives,) if isinstance(objectives, str) else tuple(objectives)
    if not names:
        raise ValueError(
            f"a front needs a cost beside the score; name one or more of {', '.join(known)}, or search for the best "
            f"score under a budget with EvolutionSearch"
        )
    for name in names:
        if name == "latency_ms" and name not in known:
            raise ValueError("the objective latency_ms is measured; price it from a latency table")
        if name not in known:
            raise ValueError(
                f"unknown objective {name!r}; known costs: {', '.join(known)} (the score is always an objective)"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"an objective is named twice: {', '.join(names)}")
    return names
