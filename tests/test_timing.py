"""Where layers begin in any timm model, and tables that price a space; made-up times."""

import numpy as np
import pytest
import timm

from timm_resnas.nas.latency import LatencyError, LatencyTable, cover_networks, measured_layers
from timm_resnas.nas.space import SearchSpace
from timm_resnas.nas.timing import Conditions, measure_layers

CONDITIONS = Conditions("cpu", "a processor", 1, 32, "float32", "2.9")


@pytest.mark.parametrize("name, size", [("vit_tiny_patch16_224", 32), ("eva02_tiny_patch14_224", 28)])
def test_layers_of_timm_models(name, size):
    found = measure_layers(
        timm.create_model(name, img_size=size), Conditions.here(batch_size=1), rounds=1, min_run_time=0
    )
    blocks = [f"blocks.{i}.{norm}" for i in range(12) for norm in ("norm1", "norm2")]
    assert list(found) == ["patch_embed", *blocks, "norm"]


@pytest.mark.parametrize("name", ["micro", "mini", "vit_resnas_tiny", "vit_resnas_small"])
def test_few_networks_cover_every_layer_and_prices_are_predictions(name):
    space = SearchSpace.preset(name)
    archs = cover_networks(space)
    assert {layer for a in archs for layer in space.layers(a)} == set(measured_layers(space)) and len(archs) <= 40
    rng = np.random.default_rng(0)
    one = {"median_ms": 1.0, "iqr": 0.0, "samples": 1}
    times = {layer: {"ms": float(rng.uniform(0.1, 1)), **one} for layer in measured_layers(space)}
    table = LatencyTable(CONDITIONS, times, overhead_ms=0.31, scale=1.07)
    table = LatencyTable.from_json(table.to_json())
    table.price(space)
    for arch in space.sample_many(100, rng):
        assert space.costs(arch)["latency_ms"] == table.predict(arch, **space.model_args)


def test_format_1_is_refused():
    with pytest.raises(LatencyError, match="measure again"):
        LatencyTable.from_json('{"format": "timm_resnas latency table 1"}')
