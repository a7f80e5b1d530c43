"""Where a search over a trained network starts: what each gene costs alone, put together by a knapsack.

One gene at a time is narrowed and the network scored; the losses are taken to add up. The best network within a budget
is then a multiple-choice knapsack, solved by dynamic programming over the budget's first cost.
"""

from collections.abc import Sequence

import numpy as np

from ..arch import Arch
from .cost import Budget
from .space import SearchSpace

__all__ = ["alone", "knapsack", "losses", "uniform"]

PROBES = (0.25, 0.5, 0.75, 1.0)  # of a gene's steps down, where it is scored
BINS = 4096  # of the budget


def _probes(choices: int) -> list[int]:
    return sorted({max(1, round(share * (choices - 1))) for share in PROBES}) if choices > 1 else []


def alone(space: SearchSpace) -> list[Arch]:
    """The networks to score: the largest, and those that differ from it in one gene."""
    rows = [np.zeros(len(space.genes), np.int8)]
    for g, gene in enumerate(space.genes):
        for index in _probes(len(gene.choices)):
            rows.append(rows[0].copy())
            rows[-1][g] = index
    return space.decode(np.stack(rows))


def losses(space: SearchSpace, scores: Sequence[float]) -> list[np.ndarray]:
    """Loss of each choice of each gene against the largest network, [choices], from the scores of `alone`.

    Between probes it is interpolated; a narrower choice is not taken to be better than a wider one.
    """
    largest, at = scores[0], 1
    found = []
    for gene in space.genes:
        probes = _probes(len(gene.choices))
        measured = [0.0, *(largest - s for s in scores[at : at + len(probes)])]
        at += len(probes)
        steps = np.interp(range(len(gene.choices)), [0, *probes], measured)
        found.append(np.maximum.accumulate(steps))
    return found


def _gene_costs(space: SearchSpace, name: str) -> tuple[float, list[np.ndarray]]:
    """Cost of the smallest choices together, and what each choice of each gene adds to it."""
    table = space.table(name)
    last = np.array([len(gene.choices) - 1 for gene in space.genes], np.int8)
    base = table.cost(last[None])[0]
    added = []
    for g, gene in enumerate(space.genes):
        rows = np.repeat(last[None], len(gene.choices), axis=0)
        rows[:, g] = range(len(gene.choices))
        added.append(table.cost(rows) - base)
    return float(base), added


def knapsack(space: SearchSpace, loss: Sequence[np.ndarray], budget: Budget, power: float = 1.0) -> Arch | None:
    """The network of least total loss whose first-named cost is within the budget; None if there is none.

    Args:
        space: Its genes must add to that cost independently of each other.
        loss: Of each choice of each gene, see `losses`.
        budget: Only its first limit is kept by construction.
        power: Of the losses: below 1 the cut is more even, above 1 it spares what is sensitive.
    """
    name, limit = next(iter(budget))
    base, added = _gene_costs(space, name)
    if base > limit:
        return None
    room = max(limit - base, 1e-12)
    best = np.zeros(BINS + 1)  # least loss of the genes so far within each part of the room
    picks = []
    for cost, own in zip(added, loss, strict=True):
        weights = np.ceil(cost / room * BINS - 1e-9).astype(int)
        options = np.full((len(weights), BINS + 1), np.inf)
        for i, weight in enumerate(weights):
            if weight <= BINS:
                options[i, weight:] = best[: BINS + 1 - weight] + max(own[i], 0.0) ** power
        # of equals the narrower
        pick = len(options) - 1 - options[::-1].argmin(axis=0)
        picks.append((pick, weights))
        best = options.min(axis=0)
    if not np.isfinite(best[BINS]):
        return None
    row, left = [], BINS
    for pick, weights in reversed(picks):
        row.append(pick[left])
        left -= weights[pick[left]]
    return space.decode(_filled(space, np.array(row[::-1], np.int8), budget)[None])[0]


def _filled(space: SearchSpace, row: np.ndarray, budget: Budget) -> np.ndarray:
    """Genes widened, the most costly step first, until the cost is within the budget's band or none fits any more.

    Coarse genes leave room: what a knapsack finds may cost less than the band allows.
    """
    name, limit = next(iter(budget))
    table = space.table(name)
    while table.cost(row[None])[0] < budget.band[0]:
        wider = np.repeat(row[None], len(row), axis=0) - np.eye(len(row), dtype=np.int8)
        wider = wider[(wider >= 0).all(axis=1)]
        wider = wider[table.cost(wider) <= limit] if len(wider) else wider
        if not len(wider):
            break
        row = wider[table.cost(wider).argmax()]
    return row


def uniform(space: SearchSpace, budget: Budget) -> Arch | None:
    """The largest network within the budget whose genes all keep about the same share of their largest choice."""
    found = None
    for share in np.linspace(0, 1, 401):
        row = []
        for gene in space.genes:
            kept = [i for i, n in enumerate(gene.choices) if n]  # nothing is left out whole
            row.append(min(kept, key=lambda i: abs(gene.choices[i] - share * gene.choices[0])))
        rows = np.array([row], np.int8)
        if all(space.table(name).cost(rows)[0] <= limit for name, limit in budget):
            found = rows
    return None if found is None else space.decode(found)[0]
