"""search.py with a score that needs no training: from a space to a network, whatever interrupts it."""

import json
import re

import pytest
import timm
import torch
from recipe_server import Recipe, wait_until

from recipes import report as report_recipe
from recipes import search as recipe
from timm_resnas.nas.evolution import rank_key
from timm_resnas.nas.jsonl import read_jsonl

QUICK = [
    *("--cpu", "--threads", "1", "--img-size", "16", "--population", "6", "--iterations", "2", "--parents", "3"),
    *("--mutations", "2", "--crossovers", "2", "--num-random", "3", "--budget", "macs=60%"),
]


@pytest.fixture(scope="module")
def runs(recipe_server):
    return Recipe(recipe_server, "search", QUICK)


def history(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_jsonl(folder / "history.jsonl")]


def test_from_space_to_network(runs, tmp_path, capsys):
    """Killed, and continued by two processes: the history of a run that was not. No supernet is left."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    log = runs.run(straight, "--score", "dss")
    pid = runs.start(killed, "--score", "dss")
    wait_until(lambda: len(read_jsonl(killed / "state" / "scores-0.jsonl")) > 2, pid, f"{killed}.log")
    runs.kill(pid)
    runs.run_two(killed, "--score", "dss")
    assert history(killed) == history(straight) and 8 <= len(history(straight)) <= 10
    assert not (straight / "supernet").exists() and not (straight / "training.jsonl").exists()

    results = json.loads((straight / "results.json").read_text())
    best = min(history(straight), key=rank_key)
    assert results["best"]["key"] == best["key"] and best["value"] == max(r["value"] for r in history(straight))
    assert results["largest"]["value"] > best["value"]
    model = timm.create_model(f"local-dir:{straight / 'best'}", pretrained=True).eval()
    assert (
        sum(p.numel() for p in model.parameters()) == best["params"]
        and torch.isfinite(model(torch.randn(1, 3, 16, 16))).all()
    )
    config = json.loads((straight / "best" / "config.json").read_text())
    assert config["timm_resnas"]["weights"] == "untrained" and config["timm_resnas"]["searched"]["score"] == "dss"
    assert f"--model {straight}/best --dataset digits" in log and "--pretrained" not in log
    assert f"| best | {best['macs'] / 1e6:.5g}M" in log
    report_recipe.main([str(straight)])
    assert re.search(
        r"Rank correlation of dss over the \d+ candidates: -?\d\.\d\d with params", capsys.readouterr().out
    )
    assert "untrained weights" in (straight / "report.md").read_text()


def test_a_front_of_the_control(tmp_path):
    recipe.main([*QUICK, "--output", str(tmp_path), "--name", "run", "--score", "params", "--search", "pareto"])
    folder = tmp_path / "run"
    results, records = json.loads((folder / "results.json").read_text()), history(folder)
    assert [p["value"] for p in results["front"]] == sorted(p["value"] for p in results["front"])
    assert len(results["front"]) == len(list((folder / "pareto").iterdir())) > 1
    assert all(r["value"] == r["params"] for r in records)
    assert results["random"] and results["best"]["params"] == max(r["params"] for r in records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--supernet", "there"], "--score dss does not go with --supernet: it needs no trained weights"),
        (["--prescreen", "0.5"], "--score dss does not go with --prescreen"),
        (["--model", "vit_tiny_patch16_224"], "--score dss is of networks that are not trained"),
        (["--budget", "macs=1%"], "is below the smallest network of the space"),
        (["--step", "single"], "--step is for training a supernet; with --score dss none is trained"),
    ],
)
def test_what_is_refused(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe.main([*QUICK, "--output", str(tmp_path), "--score", "dss", *options])
    assert message in capsys.readouterr().err
