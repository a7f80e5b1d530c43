"""Price tables: one cost of every position of a space, for every combination of the genes it depends on.

The cost of a row of genes is a sum (or maximum) of one cell per position, so ten thousand rows are costed with a few
array operations, and every cost, counted or measured, goes the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..arch import Layer

if TYPE_CHECKING:
    from .space import Gene

__all__ = ["Position", "Table", "layers_at"]

_MAX_CELLS = 1 << 20  # of one position; a space may come from the net
_EXACT = 1 << 53  # float64 adds integers exactly below it


class Position(NamedTuple):
    """A place of the network.

    Attributes:
        genes: Columns of the genes that decide its layer.
        layer: The layer for the values of these genes; None where it is absent.
    """

    genes: tuple[int, ...]
    layer: Callable[..., Layer | None]


def layers_at(genes: Sequence[Gene], position: Position) -> Iterator[tuple[tuple[int, ...], Layer | None]]:
    """Every combination of a position's genes, as indices of their choices, and the layer that it gives."""
    for index in np.ndindex(*(len(genes[g].choices) for g in position.genes)):
        yield index, position.layer(*(genes[g].choices[i] for g, i in zip(position.genes, index, strict=True)))


class Table:
    """One cost of all positions of a space.

    Args:
        genes: The space's genes.
        positions: Its positions.
        price: Cost of a layer, a non-negative integer.
        unit: Price of one unit of the cost: nanoseconds of a millisecond where ``price`` gives nanoseconds.
        reduce: ``"sum"``, or ``"max"`` for a peak.
        base: Added to every network's cost, in the price's unit.

    Attributes:
        local: Whether a step of a gene changes one position only, so that `drop` tells what it takes off, [genes].

    Raises:
        ValueError: A price is not a non-negative integer, or a table would be too large.
    """

    def __init__(
        self,
        genes: Sequence[Gene],
        positions: Sequence[Position],
        price: Callable[[Layer], int],
        *,
        unit: int = 1,
        reduce: str = "sum",
        base: int = 0,
    ) -> None:
        self.unit, self.reduce, self.base = unit, reduce, base
        self.listed: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # starts of the generator, by cost
        self._factors: list[tuple[tuple[int, ...], np.ndarray]] = []
        self._strides = np.zeros((len(genes), len(positions)))
        for p, position in enumerate(positions):
            shape = [len(genes[g].choices) for g in position.genes]
            if np.prod(shape, dtype=float) > _MAX_CELLS:
                raise ValueError(f"position {p} depends on {len(shape)} genes of {shape} choices: too many to price")
            cells = np.zeros(shape)
            for index, layer in layers_at(genes, position):
                cells[index] = 0 if layer is None else _checked(price(layer), layer)
            self._factors.append((position.genes, cells))
            step = 1
            for g, n in zip(reversed(position.genes), reversed(shape), strict=True):
                self._strides[g, p] = step
                step *= n
        if sum(cells.max() for _, cells in self._factors) + base >= _EXACT:
            raise ValueError("the costs of the space's largest networks are beyond 2^53 and would be rounded")
        sizes = [cells.size for _, cells in self._factors]
        self._starts = np.cumsum([0, *sizes[:-1]])
        self._flat = np.concatenate([cells.ravel() for _, cells in self._factors])

        # a unit gene that one position depends on: where its cells lie, given that position's other genes
        wide = max(len(position.genes) for position in positions) - 1
        self._columns = np.zeros((wide, len(genes)), np.intp)
        self._steps = np.zeros((wide, len(genes)), np.intp)
        self._first = np.zeros(len(genes), np.intp)
        self._own = np.zeros(len(genes), np.intp)
        self.local = np.zeros(len(genes), bool)
        for g, gene in enumerate(genes):
            at = np.flatnonzero(self._strides[g])
            if reduce != "sum" or gene.kind != "unit" or len(at) != 1:
                continue
            others = [c for c in positions[at[0]].genes if c != g]
            self._columns[: len(others), g] = others
            self._steps[: len(others), g] = self._strides[others, at[0]]
            self._first[g], self._own[g], self.local[g] = self._starts[at[0]], self._strides[g, at[0]], True

    def cost(self, rows: np.ndarray) -> np.ndarray:
        """Cost of each row, [n] float64, exact for counts."""
        cells = self._flat[(rows.astype(np.float64) @ self._strides).astype(np.intp) + self._starts]
        total = (cells.sum(axis=1) if self.reduce == "sum" else cells.max(axis=1)) + self.base
        return total if self.unit == 1 else total / self.unit

    def drop(self, rows: np.ndarray, gene: np.ndarray, index: np.ndarray) -> np.ndarray:
        """What the cost of each row loses as its local gene goes one step down from ``index``, [n]; else 0."""
        each, step = np.arange(len(rows)), self._own[gene]
        at = self._first[gene] + step * index
        for columns, strides in zip(self._columns, self._steps, strict=True):
            at += rows[each, columns[gene]] * strides[gene]
        # of genes that are not local the step is 0, and at the last choice nothing follows
        loss = self._flat[at] - self._flat[np.minimum(at + step, len(self._flat) - 1)]
        return loss if self.unit == 1 else loss / self.unit

    @cached_property
    def range(self) -> tuple[float, float]:
        """Least and greatest cost of any combination of genes, exact: genes are eliminated one by one."""
        join = np.add if self.reduce == "sum" else np.maximum
        ends = []
        for best in (np.min, np.max):
            factors = list(self._factors)
            left = {g for genes, _ in factors for g in genes}
            while left:
                # the gene whose neighbours are fewest, so that joined tables stay small
                near = {g: {h for genes, _ in factors if g in genes for h in genes} for g in left}
                gene = min(left, key=lambda g: (len(near[g]), g))
                left.remove(gene)
                names = (*sorted(near[gene] - {gene}), gene)
                mine = [_aligned(genes, cells, names) for genes, cells in factors if gene in genes]
                joined = mine[0]
                for cells in mine[1:]:
                    joined = join(joined, cells)
                factors = [f for f in factors if gene not in f[0]]
                factors.append((names[:-1], best(joined, axis=-1)))
            total = 0.0
            for _, cells in factors:
                total = join(total, float(cells))
            ends.append(float(total + self.base) / self.unit)
        return ends[0], ends[1]


def _aligned(genes: tuple[int, ...], cells: np.ndarray, names: tuple[int, ...]) -> np.ndarray:
    """Cells over ``genes`` with one axis for each of ``names``, of length 1 where the name is not among them."""
    order = sorted(range(len(genes)), key=lambda i: names.index(genes[i]))
    shape = [1] * len(names)
    for i in order:
        shape[names.index(genes[i])] = cells.shape[i]
    return cells.transpose(order).reshape(shape)


def _checked(price: int, layer: Layer) -> int:
    if isinstance(price, bool) or not isinstance(price, int | np.integer) or price < 0:
        raise ValueError(f"the price of {layer} must be a non-negative integer, got {price!r:.40}")
    return int(price)
