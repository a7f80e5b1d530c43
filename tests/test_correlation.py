"""Rank correlations against definitions written out, and the table of scores."""

import json

import numpy as np
import plain_vit  # noqa: F401
import pytest
import timm
import torch

from timm_resnas.engine.correlation import _spearman_rows, interval, kendall, partial, spearman
from timm_resnas.engine.run import RunError
from timm_resnas.engine.score_table import read_accuracies, score_networks, score_table
from timm_resnas.nas.proxies import proxy_score


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


def test_intervals():
    rng = np.random.default_rng(1)
    accuracy = rng.normal(size=100)
    good, bad = accuracy + rng.normal(0, 0.3, 100), accuracy + rng.normal(0, 2, 100)
    low, high = interval(accuracy, good)
    assert 0.7 < low < spearman(accuracy, good) < high < 1
    low, high = interval(accuracy, good, bad)
    assert 0 < low < spearman(accuracy, good) - spearman(accuracy, bad) < high
    assert interval(accuracy, good, good) == (0, 0) and interval(accuracy, good, bad) == (low, high)
    # of draws alone: those of scipy
    drawn = np.random.default_rng(0).choice(100, (1000, 100))[:50]
    singly = [spearman(accuracy[i], bad[i]) for i in drawn]
    assert _spearman_rows(accuracy[drawn], bad[drawn]) == pytest.approx(singly)


def test_table_says_what_beats_counting_parameters():
    rng = np.random.default_rng(2)
    accuracy = rng.normal(size=80)
    scores = {
        "params": accuracy + rng.normal(0, 1.5, 80),
        "macs": -accuracy + rng.normal(0, 0.5, 80),
        "dss": accuracy + rng.normal(0, 0.2, 80),
        "naswot": rng.normal(size=80),
    }
    lines = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in score_table(scores, accuracy).splitlines()
    }
    assert list(lines) == ["score", "---", "params", "macs", "dss", "naswot"]
    assert lines["params"][-1] == "the control" and lines["dss"][-1] == "beats counting parameters"
    assert lines["macs"][-1] == "the wrong way" and lines["naswot"][-1] == "no better than chance"
    assert lines["dss"][0] == f"{kendall(accuracy, scores['dss']):.2f}"
    assert lines["dss"][2:4] == [f"{partial(accuracy, scores['dss'], scores[c]):.2f}" for c in ("params", "macs")]
    assert lines["params"][2] == "-" and lines["macs"][3] == "-"


def test_scores_are_kept(tmp_path):
    net = timm.create_model("plain_vit_supernet")
    archs = net.space.sample_many(3, np.random.default_rng(0))
    images, labels, done = torch.randn(4, 3, 32, 32), torch.arange(4), []
    file, given = tmp_path / "scores.jsonl", (["params", "snip"], images, labels)
    found = score_networks(net, archs, *given, file, {"seed": 0}, done.append)
    assert done == [1, 2, 3] and found["params"].tolist() == [net.space.costs(a)["params"] for a in archs]
    assert found["snip"].tolist() == [proxy_score("snip", net, a, images, labels) for a in archs]
    lines = file.read_text()
    again = score_networks(net, archs[::-1], ["snip"], images + 1, labels, file, {"seed": 0})
    assert again["snip"].tolist() == found["snip"].tolist()[::-1] and file.read_text() == lines
    other = score_networks(net, archs, ["snip"], images + 1, labels, file, {"seed": 1})
    assert other["snip"].tolist() != found["snip"].tolist() and file.read_text() != lines


def test_accuracies_of_vit_bench(tmp_path):
    arch = {"hidden_dim": 192, "depth": 2, "mlp_ratio": [3.5, 4.0], "num_heads": [4, 3]}
    data = {"source": "…", "one": [{"arch": arch, "c100_base_acc": 68.66, "c100_kd_acc": None}], "two": [{"arch": 3}]}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(data))
    ((found, accuracies),) = read_accuracies(path, "one")
    assert accuracies == {"c100_base": 68.66}
    assert found.args() == {"embed_dim": 192, "mlp_ratio": [3.5, 4.0], "num_heads": [4, 3]}
    with pytest.raises(RunError, match="has no list 'three'; there are: one, two"):
        read_accuracies(path, "three")
    with pytest.raises(RunError, match="two holds other than AutoFormer's networks"):
        read_accuracies(path, "two")
