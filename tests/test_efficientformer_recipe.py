"""The main job in spaces with batch norm: to the end, killed and continued, on its supernet by two processes."""

import shutil

import pytest
import timm
import torch
from recipe_server import Recipe, wait_for_step, wait_until
from safetensors.torch import load_file
from test_search_recipe import QUICK, SEARCH, results_of, without_seconds
from timm.models.efficientformer import EfficientFormer
from timm.models.efficientformer_v2 import EfficientFormerV2

from timm_resnas.engine.supernet import open_run, val_batches
from timm_resnas.nas.evaluate import count_correct
from timm_resnas.nas.jsonl import read_jsonl

FEW = [
    *("--num-random", "0", "--num-any-cost", "0", "--iterations", "2", "--budget", "macs=40%,lower=0.9"),
    *("--calibration", "64"),
]


@pytest.mark.parametrize(
    "space, options, kind",
    [
        ("efficientformer_micro", [], EfficientFormer),
        ("efficientformerv2_micro", ["--step", "sandwich"], EfficientFormerV2),
    ],
    ids=["v1", "v2"],
)
def test_search(recipe_server, tmp_path, space, options, kind):
    options = [*QUICK, *FEW, *options, "--space", space, "--img-size", "32", "--checkpoint-steps", "3"]
    runs = Recipe(recipe_server, "search", options)
    straight, killed, two = (tmp_path / name for name in ("straight", "killed", "two"))
    runs.run(straight)
    results = results_of(straight)
    limit = results["budget"]["macs"]
    history = without_seconds(straight)
    assert results["candidates"] == len(history) == 14
    assert all(0.9 * limit <= r["macs"] <= limit for r in history)
    model = timm.create_model(f"local-dir:{straight / 'best'}", pretrained=True)
    assert isinstance(model, kind)
    assert sum(p.numel() for p in model.parameters()) == results["best"]["params"]
    # its statistics are those that it was scored with
    _, data, _ = open_run(straight)
    correct, _ = count_correct(model.eval(), val_batches(data, torch.device("cpu")))
    assert correct == results["best"]["score"]

    if kind is EfficientFormerV2:
        return
    pid = runs.start(killed)
    wait_for_step(killed, 3, pid)
    runs.kill(pid)
    pid = runs.start(killed)
    scores = killed / "state" / "scores-0.jsonl"
    wait_until(lambda: scores.exists() and scores.read_bytes().count(b"\n") >= 5, pid, f"{killed}.log")
    runs.kill(pid)
    runs.run(killed)
    one, other = (load_file(folder / "supernet" / "model.safetensors") for folder in (straight, killed))
    assert all(torch.equal(v, other[k]) for k, v in one.items())
    assert without_seconds(killed) == history
    shutil.rmtree(killed)

    searches = Recipe(recipe_server, "search", [*SEARCH, *FEW, "--supernet", str(straight / "supernet")])
    searches.run_two(two)
    assert without_seconds(two) == history
    assert min(len(read_jsonl(f)) for f in (two / "state").glob("scores-*.jsonl")) > 0
