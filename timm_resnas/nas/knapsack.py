"""Where a search over a trained network starts: what each gene costs alone, put together by a knapsack.

One gene at a time is narrowed and the network scored; the losses are taken to add up. The best network within a budget
is then a multiple-choice knapsack, solved by dynamic programming over the budget's first cost. Genes that change what
others cost (how many tokens go on) are scored in all their combinations, with a knapsack for each.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..arch import Arch
from .cost import Budget
from .space import SearchSpace

__all__ = ["Losses", "alone", "knapsack", "losses"]

PROBES = (0.25, 0.5, 0.75, 1.0)  # of a gene's steps down, where it is scored
BINS = 4096  # of the budget
MAX_SHARED = 256  # combinations of genes that change what others cost


class Losses(NamedTuple):
    """What narrowing costs, in the unit of the scores.

    Attributes:
        genes: Of each choice of each gene against the largest network, [choices]; 0 for shared genes.
        shared: Of each row of `shared_rows`.
    """

    genes: list[np.ndarray]
    shared: np.ndarray


def shared_genes(space: SearchSpace) -> list[int]:
    """Columns of the genes that decide more than one layer, so that they change what other genes cost."""
    places = [sum(g in position.genes for position in space.positions) for g in range(len(space.genes))]
    return [g for g, count in enumerate(places) if count > 1]


def shared_rows(space: SearchSpace) -> np.ndarray:
    """Every combination of `shared_genes` in the largest network, itself first, [n, genes].

    Raises:
        ValueError: There are too many.
    """
    columns = shared_genes(space)
    choices = [range(len(space.genes[g].choices)) for g in columns]
    if (count := math.prod(map(len, choices))) > MAX_SHARED:
        raise ValueError(
            f"genes that decide more than one layer have {count} combinations, more than {MAX_SHARED}: too many to "
            f"score each"
        )
    rows = np.zeros((count, len(space.genes)), np.int8)
    rows[:, columns] = list(itertools.product(*choices))
    return np.unique(space.normalise(rows), axis=0)


def _probes(choices: int) -> list[int]:
    return sorted({max(1, round(share * (choices - 1))) for share in PROBES}) if choices > 1 else []


def alone(space: SearchSpace) -> list[Arch]:
    """The networks to score: the largest, those that differ from it in one gene, and all of `shared_rows`."""
    rows, shared = [np.zeros(len(space.genes), np.int8)], shared_genes(space)
    for g, gene in enumerate(space.genes):
        for index in _probes(len(gene.choices)) if g not in shared else []:
            rows.append(rows[0].copy())
            rows[-1][g] = index
    return space.decode(np.concatenate([rows, shared_rows(space)[1:]]))


def losses(space: SearchSpace, scores: Sequence[float]) -> Losses:
    """What narrowing costs, from the scores of `alone`.

    Between probes it is interpolated; a narrower choice is not taken to be better than a wider one.
    """
    largest, at, shared = scores[0], 1, shared_genes(space)
    found = []
    for g, gene in enumerate(space.genes):
        probes = _probes(len(gene.choices)) if g not in shared else []
        measured = [0.0, *(largest - s for s in scores[at : at + len(probes)])]
        at += len(probes)
        steps = np.interp(range(len(gene.choices)), [0, *probes], measured)
        found.append(np.maximum.accumulate(steps))
    return Losses(found, np.array([0.0, *(max(0.0, largest - s) for s in scores[at:])]))


def _gene_costs(space: SearchSpace, name: str, fixed: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """Least cost, and what each choice of each gene adds to it, [1] for shared genes.

    A measured latency may be less for a wider choice than for the smallest.
    """
    table, shared = space.table(name), shared_genes(space)
    last = np.array([len(gene.choices) - 1 for gene in space.genes], np.int8)
    last[shared] = fixed[shared]
    base = least = table.cost(last[None])[0]
    added = []
    for g, gene in enumerate(space.genes):
        if g in shared:
            added.append(np.zeros(1))
            continue
        rows = np.repeat(last[None], len(gene.choices), axis=0)
        rows[:, g] = range(len(gene.choices))
        more = table.cost(rows) - base
        added.append(more - more.min())
        least += more.min()
    return float(least), added


def knapsack(space: SearchSpace, loss: Losses, budget: Budget, power: float = 1.0) -> Arch | None:
    """The network of least total loss whose first-named cost is within the budget; None if there is none.

    Args:
        space: Its genes, but for `shared_genes`, must add to that cost independently of each other.
        loss: See `losses`.
        budget: Only its first limit is kept by construction.
        power: Of the losses: below 1 the cut is more even, above 1 it spares what is sensitive.
    """
    least, best = np.inf, None
    for fixed, own in zip(shared_rows(space), loss.shared, strict=True):
        found = _knapsack(space, loss.genes, budget, power, fixed)
        if found is not None and (total := own**power + found[0]) < least:
            least, best = total, found[1]
    return None if best is None else space.decode(_filled(space, best, budget)[None])[0]


def _knapsack(
    space: SearchSpace, loss: Sequence[np.ndarray], budget: Budget, power: float, fixed: np.ndarray
) -> tuple[float, np.ndarray] | None:
    """(least loss, row) with shared genes as they are in a row."""
    name, limit = next(iter(budget))
    base, added = _gene_costs(space, name, fixed)
    if base > limit:
        return None
    room = limit - base
    best = np.zeros(BINS + 1)  # least loss of the genes so far within each part of the room
    picks = []
    for cost, own in zip(added, loss, strict=True):
        shares = np.divide(cost, room, out=np.where(cost > 0, np.inf, 0.0), where=room > 0)
        weights = np.ceil(np.minimum(shares, 2) * BINS - 1e-9).astype(int)  # what does not fit may be any number
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
    found = np.array(row[::-1], np.int8)
    shared = shared_genes(space)
    found[shared] = fixed[shared]
    return best[BINS], found


def _filled(space: SearchSpace, row: np.ndarray, budget: Budget) -> np.ndarray:
    """Genes widened, the most costly step first, until the cost is within the budget's band or none fits any more.

    Coarse genes leave room: what a knapsack finds may cost less than the band allows.
    """
    name, limit = next(iter(budget))
    table = space.table(name)
    while table.cost(row[None])[0] < budget.band[0]:
        wider = np.repeat(row[None], len(row), axis=0) - np.eye(len(row), dtype=np.int8)
        wider = np.delete(wider, shared_genes(space), axis=0)
        wider = wider[(wider >= 0).all(axis=1)]
        wider = wider[table.cost(wider) <= limit] if len(wider) else wider
        if not len(wider):
            break
        row = wider[table.cost(wider).argmax()]
    return row
