"""Where layers begin in any timm model, and tables that price a space; made-up times."""

import time

import numpy as np
import pytest
import timm
import torch

from timm_resnas.nas import timing
from timm_resnas.nas.latency import LatencyError, LatencyTable, cover_networks, measured_layers
from timm_resnas.nas.space import SearchSpace
from timm_resnas.nas.timing import Conditions, LatencyTimer, measure_layers

MICRO = SearchSpace.preset("micro")
CONDITIONS = Conditions("cpu", "a processor", 1, 32, "float32", "2.9")


@pytest.mark.parametrize(
    "name, size",
    [
        ("vit_tiny_patch16_224", 32),
        ("deit_tiny_distilled_patch16_224", 32),
        ("eva02_tiny_patch14_224", 28),
        ("beit_base_patch16_224", 32),
    ],
)
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


@pytest.mark.parametrize("precision", list(timing.PRECISIONS))
def test_precisions(precision, monkeypatch):
    """Weights, images and autocast that each name means; nothing is computed, for a CPU may not have the type."""
    conditions = Conditions.here(batch_size=2, num_threads=1, precision=precision)
    timer = LatencyTimer(MICRO, conditions, min_run_time=0)
    net, seen = timer.network(MICRO.smallest), {}

    def forward(x):
        seen.update(
            amp=torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
            inference=torch.is_inference_mode_enabled(),
            threads=torch.get_num_threads(),
            image=(x.dtype, tuple(x.shape)),
        )

    monkeypatch.setattr(net, "forward", forward)
    assert len(timer.total(MICRO.smallest)) >= 3
    amp, own = timing.PRECISIONS[precision]
    assert seen == {"amp": amp, "inference": True, "threads": 1, "image": (own, (2, 3, 32, 32))}
    assert {p.dtype for p in net.parameters()} == {own}


def test_networks_share_weights_but_not_their_own():
    """Each network has memory of its size, no two of its weights the same; networks together have that of one."""
    state = torch.get_rng_state()
    timer = LatencyTimer(MICRO, Conditions.here(batch_size=1, num_threads=1))
    nets = [timer.network(arch) for arch in (MICRO.smallest, MICRO.largest)]
    assert torch.equal(torch.get_rng_state(), state)
    for net in nets:
        spans = sorted((p.data_ptr(), p.data_ptr() + 4 * p.numel()) for p in net.parameters())
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert len({p.untyped_storage().data_ptr() for net in nets for p in net.parameters()}) == 1
    assert timer.network(MICRO.smallest.canonical()) is nets[0]


def test_a_pause_is_found_in_its_layer_and_in_the_whole():
    timer = LatencyTimer(MICRO, Conditions.here(batch_size=1, num_threads=1), min_run_time=0)
    net = timer.network(MICRO.smallest)
    index = next(i for i, layer in enumerate(MICRO.layers(MICRO.smallest)) if layer.kind == "reduction")
    module = timing.layer_starts(net)[index]
    pause = module.register_forward_hook(lambda *_: time.sleep(0.05))
    parts = timer.layers(MICRO.smallest).min(axis=0)
    assert parts[index] >= 50 and min(timer.total(MICRO.smallest)) >= 50
    assert timer.contention > 0.2  # asleep is not computing
    pause.remove()


def test_layers_that_do_not_fit_are_told(monkeypatch):
    timer = LatencyTimer(MICRO, Conditions.here(batch_size=1, num_threads=1), min_run_time=0)
    net = timer.network(MICRO.smallest)
    starts = timing.layer_starts(net)
    for wrong, message in (
        (starts[:-1], r"layers begin at \d+ modules of a VitResNas, but its NetworkDef lists \d+ layers"),
        ([*starts[:-2], starts[-1], starts[-2]], "do not begin one after the other, once each"),
    ):
        monkeypatch.setattr(net, "layer_starts", lambda wrong=wrong: wrong, raising=False)
        with pytest.raises(LatencyError, match=message):
            timer.layers(MICRO.smallest)
    with pytest.raises(LatencyError, match="a ResNet has no patch_embed and no blocks and no norm"):
        timing.layer_starts(timm.create_model("resnet18", device="meta"))


def test_measure_any_timm_model():
    model = timm.create_model("resnet18", num_classes=3).train()
    found = timing.measure(model, Conditions.here(batch_size=1, num_threads=1), rounds=2, min_run_time=0)
    assert 0 < found["ms"] <= found["median_ms"] and not model.training
