"""Evolutionary search under a budget, and random search to compare it with.

The search of "Searching for Efficient Multi-Stage Vision Transformers" (arXiv 2109.00642, released code): 500 random
networks, then generations of 75 mutations and 75 crossovers of the best 75 of the whole history. Unlike in the
released code no sub-network is ever evaluated twice; equality is :meth:`Arch.key`, which ignores the genes of absent
blocks.

Both searches ask and tell: they name the networks to score, and take the scores in any order.

>>> search = EvolutionSearch(space, Budget(macs=12e6), seed=0)
>>> while not search.done:
...     search.tell([(arch, score(arch)) for arch in search.ask()])
>>> Arch.from_record(search.best)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..arch import Arch
from .cost import Budget
from .space import BudgetError, SearchSpace

__all__ = ["EvolutionSearch", "RandomSearch", "Search", "rank_key"]

_PATIENCE = 8  # consecutive draws without a new candidate before a generation is cut short
_SPARE = 16
_FORMAT = 2


def rank_key(record: Mapping[str, Any]) -> tuple:
    """Sort key of history records, best first: higher score, then fewer MACs, then :meth:`Arch.key`."""
    return -record["score"], record["macs"], record["key"]


class Search:
    """Ask and tell over generations, with a history and exact resuming; a subclass says how a generation is drawn.

    Args:
        space: The search space.
        budget: What a network may cost; None for no limit.
        seed: Seed of all randomness. The same seed and scores give the same history, whatever the order in which
            scores were told.
        generations: Number of generations, the initial one included.

    Attributes:
        history: One record per scored network, in ask order, added when its generation is complete. JSON-plain:
            ``model`` and ``args`` (`Arch.record`), ``key``, the space's costs, ``score``, ``generation``, ``origin``
            ("start", "initial", "mutation", "crossover", "random"; of a slimming "start", "action", "step").
        archs: The networks of the history, by key.
        generation: Number of the current generation, from 0.
        population: Networks of the initial generation, at most.
        batch: Networks of a generation after the initial one, at most.

    Raises:
        BudgetError: The space cannot meet the budget.
        ValueError: A setting is out of range.
    """

    kind = ""
    population = 0
    batch = 0

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget | None,
        seed: int,
        *,
        generations: int,
    ) -> None:
        self.space = space
        self.budget = budget
        self.seed = seed
        self.generations = _count("iterations", generations)
        if budget is not None:
            space.check_budget(budget)
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self.history: list[dict[str, Any]] = []
        self.generation = 0
        self.archs: dict[str, Arch] = {}
        self._pending: dict[str, tuple[Arch, str]] = {}  # by key, in ask order
        self._scores: dict[str, int | float] = {}
        self._exhausted = False

    def settings(self) -> dict[str, Any]:
        """Settings that decide the history, JSON-plain."""
        return {"generations": self.generations}

    def _propose(self) -> Iterable[tuple[Arch, str]]:
        """The next generation: new networks, each with its origin."""
        raise NotImplementedError

    @property
    def planned(self) -> int:
        """How many networks will be scored, at most."""
        return self.population + (self.generations - 1) * self.batch

    # -- ask and tell ---------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether nothing is left to score: all generations are complete, or no new network is found any longer."""
        if not self._pending and self.generation < self.generations and not self._exhausted:
            self._advance()
        return not self._pending

    @property
    def best(self) -> dict[str, Any] | None:
        """The best record of the history (see :func:`rank_key`); None while it is empty."""
        return min(self.history, key=rank_key, default=None)

    def ask(self) -> list[Arch]:
        """Networks of the current generation that still need a score, in ask order; empty when the search is done.

        Raises:
            BudgetError: Not one network was found within the budget.
        """
        if self.done:
            return []
        return [arch for key, (arch, _) in self._pending.items() if key not in self._scores]

    def tell(self, results: Iterable[tuple[Arch, int | float]]) -> None:
        """Take scores (higher is better) of asked networks, in any order and in as many parts as you like.

        Counts of correct answers, as integers, make a history independent of how the evaluation was split up.

        Raises:
            ValueError: A network was not asked for, a score is not a finite number, or it contradicts an earlier one.
        """
        scores: dict[str, int | float] = {}
        for arch, score in results:
            key = arch.key()
            if key not in self._pending:
                raise ValueError(f"told a score of a network that the search does not wait for: {arch}")
            score = score.item() if hasattr(score, "item") else score
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise ValueError(f"a score must be a finite number, got {score!r:.40} for {arch}")
            if scores.get(key, self._scores.get(key, score)) != score:
                raise ValueError(f"told two different scores of one network: {arch}")
            scores[key] = score
        self._scores.update(scores)
        if self._pending and len(self._scores) == len(self._pending):
            self._complete()

    def _advance(self) -> None:
        proposals = list(self._propose())
        self._pending = {arch.key(): (arch, origin) for arch, origin in proposals}
        self._exhausted = not proposals

    def _complete(self) -> None:
        for key, (arch, origin) in self._pending.items():
            record = {
                **arch.record(),
                "key": key,
                **self.space.costs(arch),
                "score": self._scores[key],
                "generation": self.generation,
                "origin": origin,
            }
            self.history.append(record)
        self.archs.update((key, arch) for key, (arch, _) in self._pending.items())
        self._pending, self._scores = {}, {}
        self.generation += 1

    def _fresh(self, n: int, draw: Callable[[int], list[Arch]], origin: str, taken: set[str]) -> list[tuple[Arch, str]]:
        """Up to ``n`` networks of ``draw(count)`` that are neither known nor ``taken``, which grows by them."""
        found: list[tuple[Arch, str]] = []
        fruitless = 0
        while len(found) < n and fruitless < _PATIENCE:
            before = len(found)
            try:
                # a few more than are missing, so that the last rare ones are still found
                drawn = draw(max(n - len(found), min(n, _SPARE)))
            except BudgetError:
                if not self.history and not found:
                    raise
                break
            for arch in drawn:
                key = arch.key()
                if len(found) < n and key not in self.archs and key not in taken:
                    taken.add(key)
                    found.append((arch, origin))
            fruitless = 0 if len(found) > before else fruitless + 1
        return found

    def _sample(self, n: int) -> list[Arch]:
        return self.space.sample_many(n, self._rng, self.budget)

    # -- resuming -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that continuing needs, JSON-plain: settings, generator, history, the generation that is out."""
        return {
            "format": _FORMAT,
            "kind": self.kind,
            "setup": self._setup(),
            "rng": copy.deepcopy(self._rng.bit_generator.state),
            "generation": self.generation,
            "exhausted": self._exhausted,
            "history": copy.deepcopy(self.history),
            "pending": [
                {**arch.record(), "origin": origin, "score": self._scores.get(key)}
                for key, (arch, origin) in self._pending.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; the rest of the history is that of an unbroken search.

        Raises:
            ValueError: The state is damaged, or of a search with another space, budget, seed or settings.
        """
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT or state.get("kind") != self.kind:
            raise ValueError(f"not the state of a search of kind {self.kind!r} (format {_FORMAT})")
        setup = self._setup()
        for name, value in setup.items():
            if state.get("setup", {}).get(name) != value:
                raise ValueError(
                    f"the state belongs to another search: its {name} is {state.get('setup', {}).get(name)!r:.200}, "
                    f"this one's is {value!r:.200}"
                )
        try:
            history = copy.deepcopy(list(state["history"]))
            archs: dict[str, Arch] = {}
            for i, record in enumerate(history):
                rank_key(record)
                arch = Arch.from_record(record)
                if record["key"] != arch.key():
                    raise ValueError(f"the key of history record {i} is not its architecture's")
                archs[record["key"]] = arch
            pending: dict[str, tuple[Arch, str]] = {}
            scores: dict[str, int | float] = {}
            for item in state["pending"]:
                arch = Arch.from_record(item)
                self.space.encode(arch)
                pending[arch.key()] = (arch, item["origin"])
                if item["score"] is not None:
                    scores[arch.key()] = item["score"]
            rng = np.random.PCG64()
            rng.state = state["rng"]
            generation, exhausted = int(state["generation"]), bool(state["exhausted"])
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"the state of the search is damaged: {type(err).__name__} {err}") from err
        self.history, self.generation, self._exhausted = history, generation, exhausted
        self._pending, self._scores, self.archs = pending, scores, archs
        self._rng = np.random.Generator(rng)

    def _setup(self) -> dict[str, Any]:
        return {
            "space": self.space.to_dict(),
            "budget": self.budget.to_dict() if self.budget else None,
            "seed": self.seed,
            **self.settings(),
        }


class EvolutionSearch(Search):
    """The paper's evolutionary search; the defaults are its settings (3350 networks).

    A generation that finds fewer new networks than wanted, with bounded effort, is smaller; one that finds none ends
    the search.

    Args:
        space: See :class:`Search`; so are ``budget`` and ``seed``.
        population: Random networks of the initial generation.
        iterations: Number of generations, the initial one included.
        parents: Best networks of the whole history that the next generation is bred from.
        mutations: Mutations per generation.
        crossovers: Crossovers per generation.
        mutation_prob: Probability of each gene to mutate.
        start: Networks that the initial generation begins with; those out of budget are left out.

    Raises:
        BudgetError: The space cannot meet the budget.
        ValueError: A setting is out of range.
    """

    kind = "evolution"

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget | None = None,
        seed: int = 0,
        *,
        population: int = 500,
        iterations: int = 20,
        parents: int = 75,
        mutations: int = 75,
        crossovers: int = 75,
        mutation_prob: float = 0.3,
        start: Sequence[Arch] = (),
    ) -> None:
        super().__init__(space, budget, seed, generations=iterations)
        within = (a for a in start if budget is None or not budget.check(space.costs(a)))
        self.start = tuple({arch.key(): arch for arch in within}.values())
        self.population = _count("population", population)
        self.parents = _count("parents", parents)
        self.mutations = _count("mutations", mutations, minimum=0)
        self.crossovers = _count("crossovers", crossovers, minimum=0)
        self.batch = self.mutations + self.crossovers
        if not 0 < mutation_prob <= 1:
            raise ValueError(f"mutation_prob must be above 0 and at most 1, got {mutation_prob!r}")
        self.mutation_prob = float(mutation_prob)

    def settings(self) -> dict[str, Any]:
        return {
            "population": self.population,
            "iterations": self.generations,
            "parents": self.parents,
            "mutations": self.mutations,
            "crossovers": self.crossovers,
            "mutation_prob": self.mutation_prob,
            **({"start": [arch.key() for arch in self.start]} if self.start else {}),
        }

    def top(self, n: int) -> list[Arch]:
        """The ``n`` best networks of the history, best first."""
        return [self.archs[record["key"]] for record in sorted(self.history, key=rank_key)[:n]]

    def _propose(self) -> list[tuple[Arch, str]]:
        taken: set[str] = set()
        if not self.history:
            given = [(arch, "start") for arch in self.start[: self.population]]
            taken.update(arch.key() for arch, _ in given)
            return given + self._fresh(self.population - len(given), self._sample, "initial", taken)
        parents = self.top(self.parents)

        def mutate(n: int) -> list[Arch]:
            return self.space.mutate_many(parents, n, self._rng, self.mutation_prob, self.budget)

        def cross(n: int) -> list[Arch]:
            return self.space.crossover_many(parents, n, self._rng, self.budget)

        found = self._fresh(self.mutations, mutate, "mutation", taken)
        if len(parents) > 1:
            found += self._fresh(self.crossovers, cross, "crossover", taken)
        return found


class RandomSearch(Search):
    """Random networks of the same budget: what evolution has to beat at the same number of evaluations.

    The networks are those of the evolution's initial generation, drawn on; the generations have its sizes.

    Args:
        space: See :class:`EvolutionSearch`; so are the other arguments.
    """

    kind = "random"

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget | None = None,
        seed: int = 0,
        *,
        population: int = 500,
        iterations: int = 20,
        mutations: int = 75,
        crossovers: int = 75,
    ) -> None:
        super().__init__(space, budget, seed, generations=iterations)
        self.population = _count("population", population)
        self.batch = _count("mutations + crossovers", mutations + crossovers)

    def settings(self) -> dict[str, Any]:
        return {"population": self.population, "iterations": self.generations, "batch": self.batch}

    def _propose(self) -> list[tuple[Arch, str]]:
        return self._fresh(self.batch if self.history else self.population, self._sample, "random", set())


def _count(name: str, value: Any, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r:.40}")
    return value
