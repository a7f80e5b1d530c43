"""Rank correlation: what a score says of accuracies, and what of it is more than the size of networks."""

from __future__ import annotations

import numpy as np
from scipy.stats import kendalltau, rankdata, spearmanr

__all__ = ["interval", "kendall", "partial", "spearman"]

DRAWS = 1000  # of networks with repetition


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; NaN where one side has no differences."""
    if len(np.unique(a)) < 2 or len(np.unique(b)) < 2:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's rank correlation (tau-b, which allows for ties); NaN where one side has no differences."""
    return float(kendalltau(a, b).statistic)


def partial(a: np.ndarray, b: np.ndarray, fixed: np.ndarray) -> float:
    """Spearman's rank correlation of ``a`` and ``b`` with ``fixed`` held fixed: of what a line in its ranks leaves.

    NaN where one of them has no differences, or none are left.
    """
    ab, af, bf = spearman(a, b), spearman(a, fixed), spearman(b, fixed)
    rest = (1 - af**2) * (1 - bf**2)
    return float((ab - af * bf) / np.sqrt(rest)) if rest > 1e-12 else float("nan")


def interval(
    accuracy: np.ndarray, score: np.ndarray, control: np.ndarray | None = None, seed: int = 0
) -> tuple[float, float]:
    """Ends of the interval that holds 95% of Spearman's correlation over networks that are drawn with repetition.

    Args:
        accuracy: Of each network.
        score: Of each.
        control: Of each: of the correlation less that of this one.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(accuracy), (DRAWS, len(accuracy)))
    draws = _spearman_rows(np.asarray(accuracy)[drawn], np.asarray(score)[drawn])
    if control is not None:
        draws = draws - _spearman_rows(np.asarray(accuracy)[drawn], np.asarray(control)[drawn])
    low, high = np.nanquantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _spearman_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`spearman` of each row."""
    ranks = [rankdata(v, axis=1) for v in (a, b)]
    x, y = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return np.divide((x * y).sum(axis=1), scale, out=np.full(len(a), np.nan), where=scale > 0)
