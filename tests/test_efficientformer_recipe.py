"""The main job in spaces with batch norm: to the end, and on its supernet by two processes, killed and continued."""

import json

import pytest
import timm
import torch
from recipe_server import Recipe, wait_until
from test_efficientformer_supernet import small_v1, small_v2
from test_search_recipe import QUICK, SEARCH, results_of, without_seconds
from timm.models.efficientformer import EfficientFormer
from timm.models.efficientformer_v2 import EfficientFormerV2

from recipes import report
from timm_resnas.engine.supernet import open_run, val_batches
from timm_resnas.nas.evaluate import count_correct
from timm_resnas.nas.jsonl import read_jsonl

FEW = [
    *("--num-random", "0", "--num-any-cost", "0", "--iterations", "2", "--budget", "macs=40%,lower=0.9"),
    *("--calibration", "64"),
]


@pytest.mark.parametrize(
    "make, options, kind",
    [(small_v1, [], EfficientFormer), (small_v2, ["--step", "sandwich"], EfficientFormerV2)],
    ids=["v1", "v2"],
)
def test_search(recipe_server, tmp_path, make, options, kind):
    (tmp_path / "space.json").write_text(json.dumps(make().to_dict()))
    options = [*QUICK, *FEW, *options, "--space", str(tmp_path / "space.json"), "--img-size", "32"]
    straight, two = tmp_path / "straight", tmp_path / "two"
    Recipe(recipe_server, "search", options).run(straight)
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
    report.main([str(straight)])  # with pictures of this family's choices
    # candidates get the same statistics in either process and after a kill
    searches = Recipe(recipe_server, "search", [*SEARCH, *FEW, "--supernet", str(straight / "supernet")])
    pids = searches.start_two(two)
    scores = [two / "state" / f"scores-{rank}.jsonl" for rank in range(2)]
    wait_until(lambda: sum(len(read_jsonl(s)) for s in scores) >= 4, pids[0], f"{two}.log")
    searches.kill(*pids)
    searches.run_two(two)
    assert without_seconds(two) == history
    assert min(len(read_jsonl(file)) for file in scores) > 0
