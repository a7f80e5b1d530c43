"""Random networks within a budget, thousands at a time, as rows of genes.

The generator of "Searching for Efficient Multi-Stage Vision Transformers" (arXiv 2109.00642, released code): random
widths and depth with units at their maximum, given that the cost reaches the lower end of the band; then random steps
down until it is no more than the limit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .cost import Budget, BudgetError, format_cost

if TYPE_CHECKING:
    from .space import SearchSpace

__all__ = ["generate"]

ABSENT = 1  # index of a presence gene
FREE_STEPS = 100  # steps of random shrinking before widths and removal join (released code)
MAX_PROPOSALS = 1 << 17  # effort before a band counts as too narrow: some seconds
MAX_STARTS = 1 << 17  # starting points that are listed rather than drawn


def generate(space: SearchSpace, n: int, rng: np.random.Generator, budget: Budget) -> np.ndarray:
    """Proposals of the paper's generator: each ends at or below the limit, in the band or not.

    Each row is a walk and all walks are run to their end, so which of them are in the band does not depend on which
    end first.
    """
    floor, limit = budget.band
    rows, cost = starts(space, n, rng, budget.first, floor)
    above = np.flatnonzero(cost > limit)
    rows[above] = shrink(space, rows[above], cost[above], budget.first, limit, rng)
    return space.normalise(rows)


def starts(
    space: SearchSpace, n: int, rng: np.random.Generator, name: str, floor: float
) -> tuple[np.ndarray, np.ndarray]:
    """Random widths and depth, units at their maximum, given that the cost is at least ``floor``."""
    table = space.table(name)
    found_rows, found_cost, found, tried = [], [], 0, 0
    listed = math.prod(space._counts_int[c] for c in space._structural) <= MAX_STARTS
    while found < n and tried < MAX_PROPOSALS:
        if tried >= 4 * n and found < 0.02 * tried and listed:
            return listed_starts(space, n, rng, name, floor)
        batch = max(64, min(2 * n, 4096))
        rows = np.zeros((batch, len(space.genes)), np.int8)
        for column in space._widths:
            rows[:, column] = rng.integers(space._counts_int[column], size=batch)
        rows[:, space._presence] = rng.random((batch, len(space._presence)), np.float32) < space._absence
        rows = space.normalise(rows)
        cost = table.cost(rows)
        keep = cost >= floor
        found_rows.append(rows[keep])
        found_cost.append(cost[keep])
        found += int(keep.sum())
        tried += batch
    if not found:
        raise _no_start(name, floor, f"{tried} random tries")
    return np.concatenate(found_rows)[:n], np.concatenate(found_cost)[:n]


def listed_starts(
    space: SearchSpace, n: int, rng: np.random.Generator, name: str, floor: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same as rejection, drawn from the list of all starts: for limits near the largest network."""
    table = space.table(name)
    if table.listed is None:
        grid = np.indices([space._counts_int[c] for c in space._structural], dtype=np.int8)
        grid = grid.reshape(len(space._structural), -1).T
        rows = np.zeros((len(grid), len(space.genes)), np.int8)
        rows[:, space._structural] = grid
        absent = rows[:, space._presence] == ABSENT
        prob = np.where(absent, space._absence, 1 - space._absence).prod(axis=1)  # widths are uniform
        rows = space.normalise(rows)
        cost = table.cost(rows)
        order = np.argsort(-cost, kind="stable")
        table.listed = rows[order], cost[order], np.cumsum(prob[order])
    rows, cost, cumulative = table.listed
    count = int(np.searchsorted(-cost, -floor, side="right"))
    if not count:
        raise _no_start(name, floor, f"the most is {format_cost(name, cost[0])}")
    picked = np.searchsorted(cumulative[:count], rng.random(n) * cumulative[count - 1], side="right")
    picked = np.minimum(picked, count - 1)
    return rows[picked].copy(), cost[picked].copy()


def shrink(
    space: SearchSpace, rows: np.ndarray, cost: np.ndarray, name: str, limit: float, rng: np.random.Generator
) -> np.ndarray:
    """Random steps down, each row until its cost is no more than the limit."""
    table = space.table(name)
    out = rows.copy()
    left = np.arange(len(rows))
    chunk, step = 20, 0  # a divisor of FREE_STEPS
    while left.size:
        odds = space._odds[step >= FREE_STEPS]
        actions = np.searchsorted(odds, rng.random((chunk, len(left)), np.float32), side="right")
        each = np.arange(len(left))
        for act in actions:
            index = rows[each, act]
            moves = (cost > limit) & (index < space._last[act])
            cost -= moves * table.drop(rows, act, index)
            rows[each, act] = index + moves
            redo = np.flatnonzero(moves & ~table.local[act])
            if redo.size:
                part = space.cascade(rows[redo])
                rows[redo] = part
                cost[redo] = table.cost(part)
        # a row with nothing left to shrink ends too; it is out of the band then
        done = (cost <= limit) | (rows == space._last).all(axis=1)
        out[left[done]] = rows[done]
        left, rows, cost = left[~done], rows[~done], cost[~done]
        step += chunk
    return out


def _no_start(name: str, floor: float, why: str) -> BudgetError:
    return BudgetError(
        f"networks are made by shrinking ones with all heads and hidden units, none of which reaches {name} "
        f"{format_cost(name, floor)} ({why}); lower the budget or widen its band"
    )
