"""Rank correlations against definitions written out."""

import numpy as np
import pytest

from timm_resnas.engine.correlation import beats, kendall, partial, spearman


def test_spearman_and_kendall():
    assert spearman([1, 2, 3], [2, 4, 9]) == pytest.approx(1)
    assert np.isnan(spearman([1, 2, 3], [5, 5, 5])) and np.isnan(kendall([1, 2, 3], [5, 5, 5]))
    a, b = np.array([3, 1, 4, 1.5, 9, 2.6]), np.array([2, 7, 1, 8, 2.5, 8.5])
    pairs = [(i, j) for i in range(6) for j in range(i)]
    signs = [np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in pairs]
    assert kendall(a, b) == pytest.approx(sum(signs) / len(pairs))


def test_partial_correlation_is_that_of_what_a_line_leaves():
    rng = np.random.default_rng(0)
    size = rng.permutation(200)
    a, b = size + rng.normal(0, 60, 200), size + rng.normal(0, 60, 200)
    ranks = [np.argsort(np.argsort(v)).astype(float) for v in (a, b, size)]
    left = [r - np.polyval(np.polyfit(ranks[2], r, 1), ranks[2]) for r in ranks[:2]]
    assert partial(a, b, size) == pytest.approx(np.corrcoef(*left)[0, 1])
    assert spearman(a, b) > 0.4 and abs(partial(a, b, size)) < 0.2  # they agree by size alone
    assert np.isnan(partial(size, b, size))


def test_what_beats_a_control():
    rng = np.random.default_rng(1)
    accuracy = rng.normal(size=100)
    good, bad = accuracy + rng.normal(0, 0.3, 100), accuracy + rng.normal(0, 2, 100)
    difference, low, high = beats(accuracy, good, bad)
    assert (
        difference == pytest.approx(spearman(accuracy, good) - spearman(accuracy, bad)) and 0 < low < difference < high
    )
    difference, low, high = beats(accuracy, good, good)
    assert (difference, low, high) == (0, 0, 0)
    assert beats(accuracy, good, bad) == beats(accuracy, good, bad)
