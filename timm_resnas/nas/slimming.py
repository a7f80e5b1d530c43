"""Slimming: from a large network down to a budget, always by the step that loses least for what it gains.

The search of EfficientFormer (arXiv 2206.01191, by measured latency) and EfficientFormerV2 (arXiv 2212.08059, by size
and speed together), neither of which was released. A step makes one gene smaller: drops a block, takes the next smaller
width, fewer heads, fewer hidden units. All steps that are open are scored with inherited weights, the one that loses
least score per gain is taken, until the budget holds. The networks on the way are a family of all sizes.

>>> search = Slimming(space, Budget(latency_ms=3.0))
>>> while not search.done:
...     search.tell([(arch, score(arch)) for arch in search.ask()])
>>> [(r["score"], r["latency_ms"]) for r in search.chain()]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..arch import Arch
from .cost import Budget
from .evolution import Search, _count, rank_key
from .space import BudgetError, SearchSpace

__all__ = ["MES", "Slimming", "mobile_efficiency"]

MES: Mapping[str, tuple[float, float]] = {"params": (3e6, 0.5), "latency_ms": (1.0, 1.0)}
"""Unit and exponent of each cost in the Mobile Efficiency Score: those of MobileNetV2 on an iPhone 12."""


def mobile_efficiency(costs: Mapping[str, float], terms: Mapping[str, tuple[float, float]] = MES) -> float:
    """The Mobile Efficiency Score of EfficientFormerV2: 100 times the product of (cost / unit) ** -exponent.

    Larger is better. Units only scale it, so that which step gains most does not depend on them.
    """
    return 100 * math.prod((costs[name] / unit) ** -exponent for name, (unit, exponent) in terms.items())


class _Action(NamedTuple):
    gene: int
    choice: int
    gain: float


class Slimming(Search):
    """Greedy search from the largest network down to a budget; nothing in it is random.

    Each generation is a step: all single actions from the network that has been reached. An action makes one gene
    smaller, by as many of its choices as gain `step`. What decides nothing (a gene of an absent part) or gains nothing
    is no action. The next network is that of the least loss of score per gain, the published rule, also where the loss
    is negative; of equals, the one that gains most. Where no action gains (a peak of memory that two layers share), the
    gain is in MACs.

    Args:
        space: See :class:`Search`.
        budget: Upper limits to reach; its lower band is not used. None goes down to the smallest network.
        seed: See :class:`Search`; of no effect.
        gain: What an action gains: a cost that the space has a price for, or "mes", the Mobile Efficiency Score of
            `MES`. None: the first-named limit that does not hold yet; MACs without a budget.
        step: Least that an action is to gain, as a share of the start's cost, so that heads and hidden units are taken
            in portions of alike size and few networks are scored. What is missing to the budget is enough; a gene that
            has not as much left gives all that it can. 0: each gene's next smaller choice.
        together: Best actions that are taken at once: steps are fewer by this factor, and the network that they lead to
            is scored in the next step.
        start: Network to begin with; None: the space's largest.

    Raises:
        BudgetError: The space cannot meet the budget.
        ValueError: A setting is out of range, the gain is not known, or the start is not of the space.
    """

    kind = "slimming"

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget | None = None,
        seed: int = 0,
        *,
        gain: str | None = None,
        step: float = 0.02,
        together: int = 1,
        start: Arch | None = None,
    ) -> None:
        if budget is not None:
            space.check_budget(budget)  # one above the largest network as well
            budget = Budget(lower=0, **budget.limits)
        # each step makes a gene smaller, so this many end it
        super().__init__(space, budget, seed, generations=2 + sum(len(gene.choices) - 1 for gene in space.genes))
        if gain is not None:
            missing = [name for name in (MES if gain == "mes" else (gain,)) if name not in space.cost_names]
            if missing:
                raise BudgetError(
                    f"the gain {gain} needs {', '.join(missing)}, and the space has a price for "
                    f"{', '.join(space.cost_names)} only"
                    + ("; measure a latency table for it" if "latency_ms" in missing else "")
                )
        if not (isinstance(step, int | float) and 0 <= step <= 1):
            raise ValueError(f"step must be from 0 to 1 (of the start's cost), got {step!r:.40}")
        self.gain, self.step, self.together = gain, float(step), _count("together", together)
        self.start = space.largest if start is None else start
        self._first = space.encode(self.start)
        self._chain = [self._first]

    def settings(self) -> dict[str, Any]:
        return {"gain": self.gain, "step": self.step, "together": self.together, "start": self.start.key()}

    # -- results ------------------------------------------------------------------------------------------------------

    def chain(self) -> list[dict[str, Any]]:
        """Records of the networks that were visited, from the start on."""
        known = {record["key"]: record for record in self.history}
        keys = [arch.key() for arch in self.space.decode(np.stack(self._chain))]
        return [known[key] for key in keys if key in known]

    @property
    def best(self) -> dict[str, Any] | None:
        """The best record within the budget (see :func:`rank_key`); None while there is none."""
        within = (r for r in self.history if self.budget is None or self._open_limit(r) is None)
        return min(within, key=rank_key, default=None)

    @property
    def planned(self) -> int:
        """About how many networks will have been scored at the end, if each further step takes the median gain."""
        row, count = self._chain[-1], len(self.history) or 1
        while actions := self._actions(row):
            count += len(actions) + (self.together > 1)
            actions.sort(key=lambda action: action.gain)
            row = self._applied(row, actions[len(actions) // 2 :])
        return count

    # -- steps --------------------------------------------------------------------------------------------------------

    def _costs(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: self.space.table(name).cost(rows) for name in self.space.cost_names}

    def _open_limit(self, costs: Mapping[str, float]) -> str | None:
        """The cost to bring down: the first limit that does not hold, or MACs where there is no budget."""
        if self.budget is None:
            return "macs"
        return next((name for name, limit in self.budget if costs[name] > limit), None)

    def _actions(self, row: np.ndarray) -> list[_Action]:
        """All that can be done from a network; none where the budget holds."""
        now = {name: float(cost[0]) for name, cost in self._costs(row[None]).items()}
        binding = self._open_limit(now)
        steps = [(g, i) for g, gene in enumerate(self.space.genes) for i in range(row[g] + 1, len(gene.choices))]
        if binding is None or not steps:
            return []
        rows = np.repeat(row[None], len(steps), axis=0)
        rows[np.arange(len(steps)), [g for g, _ in steps]] = [i for _, i in steps]
        costs = self._costs(self.space.normalise(rows))
        begin = self._costs(self._first[None])
        for measure in (self.gain or binding, binding, "macs"):
            sized = binding if measure == "mes" else measure
            want = self.step * begin[sized][0]
            if sized == binding and self.budget is not None:
                want = min(want, now[binding] - self.budget.limits[binding])
            if measure == "mes":
                terms = [{name: float(costs[name][k]) for name in MES} for k in range(len(steps))]
                gains = np.array([mobile_efficiency(t) for t in terms]) - mobile_efficiency(now)
            else:
                gains = now[measure] - costs[measure]
            reach = now[sized] - costs[sized]
            found = [a for g in range(len(row)) if (a := _sized(g, steps, gains, reach, want)) is not None]
            if found:
                return found
        return []

    def _applied(self, row: np.ndarray, ranked: Iterable[_Action]) -> np.ndarray:
        """The network after the first actions, as many as are taken together and the budget needs."""
        taken = 0
        for action in ranked:
            after = self._after(row, action)
            if (after == row).all():  # of a part that is dropped by now
                continue
            row, taken = after, taken + 1
            costs = {name: float(cost[0]) for name, cost in self._costs(row[None]).items()}
            if taken == self.together or self._open_limit(costs) is None:
                break
        return row

    def _after(self, row: np.ndarray, action: _Action) -> np.ndarray:
        after = row.copy()
        after[action.gene] = action.choice
        return self.space.normalise(after[None])[0]

    def _follow(self) -> list[tuple[Arch, str]]:
        """Walk on as far as scores are known; what has to be scored to go further."""
        known = {record["key"]: record["score"] for record in self.history}
        while True:
            row = self._chain[-1]
            actions = self._actions(row)
            archs = self.space.decode(np.stack([row, *(self._after(row, action) for action in actions)]))
            origins = ["start" if len(self._chain) == 1 else "step", *["action"] * len(actions)]
            missing = [(a, o) for a, o in zip(archs, origins, strict=True) if a.key() not in known]
            if missing or not actions:
                return missing
            state, *scores = (known[arch.key()] for arch in archs)
            loss = [state - score for score in scores]
            order = sorted(
                range(len(actions)),
                key=lambda k: (loss[k] / actions[k].gain, -actions[k].gain, archs[1 + k].key()),
            )
            self._chain.append(self._applied(row, [actions[k] for k in order]))

    def _propose(self) -> list[tuple[Arch, str]]:
        return self._follow()

    def _complete(self) -> None:
        super()._complete()
        self._follow()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._chain = [self._first]
        self._follow()


def _sized(
    gene: int, steps: list[tuple[int, int]], gains: np.ndarray, reach: np.ndarray, want: float
) -> _Action | None:
    """The smallest step of a gene that reaches what is wanted, or the one that reaches most; None: it gains nothing."""
    own = [k for k, (g, _) in enumerate(steps) if g == gene and gains[k] > 0]
    if not own:
        return None
    k = next((k for k in own if reach[k] >= want), max(own, key=lambda k: reach[k]))
    return _Action(gene, steps[k][1], float(gains[k]))
