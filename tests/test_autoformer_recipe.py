"""The main job in a space of the AutoFormer family."""

import json

import timm
from recipe_server import Recipe
from test_search_recipe import QUICK, results_of, without_seconds

from recipes import report
from timm_resnas.models.autoformer import AutoFormer

FEW = ["--num-random", "0", "--num-any-cost", "0", "--iterations", "2"]


def test_search(recipe_server, tmp_path):
    straight = tmp_path / "straight"
    Recipe(recipe_server, "search", [*QUICK, *FEW, "--space", "autoformer_micro"]).run(straight)
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
    (straight / "choices.png").unlink()
    report.main([str(straight)])
    assert (straight / "choices.png").stat().st_size > 0
