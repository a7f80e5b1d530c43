"""The main job in a space of the AutoFormer family: to the end, killed and continued, by two processes."""

import json

import timm
import torch
from recipe_server import Recipe, wait_for_step, wait_until
from safetensors.torch import load_file
from test_search_recipe import QUICK, SEARCH, results_of, without_seconds

from timm_resnas.models.autoformer import AutoFormer
from timm_resnas.nas.jsonl import read_jsonl

FEW = ["--num-random", "0", "--num-any-cost", "0", "--iterations", "2"]


def test_search(recipe_server, tmp_path):
    runs = Recipe(recipe_server, "search", [*QUICK, *FEW, "--space", "autoformer_micro", "--checkpoint-steps", "3"])
    straight, killed, two = (tmp_path / name for name in ("straight", "killed", "two"))
    runs.run(straight)
    results = results_of(straight)
    limit = results["budget"]["macs"]
    history = without_seconds(straight)
    assert results["candidates"] == len(history) == 14
    assert all(r["model"] == "autoformer" and 0.975 * limit <= r["macs"] <= limit for r in history)
    model = timm.create_model(f"local-dir:{straight / 'best'}", pretrained=True)
    assert isinstance(model, AutoFormer) and model.qkv_bias_layout == "prefix"
    assert sum(p.numel() for p in model.parameters()) == results["best"]["params"]
    config = json.loads((straight / "best" / "config.json").read_text())
    assert config["model_args"]["num_heads"] == results["best"]["args"]["num_heads"]
    assert (straight / "choices.png").stat().st_size > 0

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

    Recipe(recipe_server, "search", [*SEARCH, *FEW, "--supernet", str(straight / "supernet")]).run_two(two)
    assert without_seconds(two) == history
    assert min(len(read_jsonl(f)) for f in (two / "state").glob("scores-*.jsonl")) > 0
