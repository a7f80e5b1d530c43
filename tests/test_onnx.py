"""Networks as ONNX graphs, and their times in ONNX Runtime."""

import json

import numpy as np
import pytest
import timm
import torch
from test_latency import tiny_space
from torch import nn

from timm_resnas.arch import Arch
from timm_resnas.families.vit_resnas import VitResNasSpace
from timm_resnas.nas.latency import LatencyTable, measure_network, open_timer
from timm_resnas.nas.onnx import INPUT, ExportError, open_session, scopes, to_onnx, to_program
from timm_resnas.nas.onnx_timer import OnnxTimer, layer_of_nodes, layer_times
from timm_resnas.nas.timing import Conditions, LatencyError, layer_starts

SPACE = tiny_space()
# six networks: one block of two widths each
SMALL = VitResNasSpace(
    [(0, 8), (1, (8, 2, 8), (8, 48), 1), (2, 8, 5)],
    [[8], {"attn": [8, 16], "mlp": [16, 32, 48], "layer": None}, None],
    img_size=8,
    patch_size=4,
)


def conditions(**more) -> Conditions:
    return Conditions.here(**{"batch_size": 2, "num_threads": 1, "runtime": "onnxruntime", **more})


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return SPACE.network(SPACE.largest).eval()


@pytest.fixture(scope="module")
def proto(net):
    return to_onnx(net, torch.zeros(2, 3, 16, 16), {"mean": "[0.5]"})


@pytest.fixture(scope="module")
def timer(tmp_path_factory):
    return OnnxTimer(SPACE, conditions(), min_run_time=1e-3, folder=tmp_path_factory.mktemp("graphs"))


# -- graphs -----------------------------------------------------------------------------------------------------------


def test_any_batch_size_gives_the_networks_logits(net, proto):
    session = open_session(proto.SerializeToString())
    assert session.get_modelmeta().custom_metadata_map == {"mean": "[0.5]"}
    for batch in (1, 5):
        x = torch.randn(batch, 3, 16, 16)
        (got,) = session.run(None, {INPUT: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_graph_names_modules_but_no_files_of_this_machine(proto):
    named = {name for node in proto.graph.node for name in scopes(node)}
    assert {"patch_embed", "blocks.0.norm1", "norm"} <= named
    assert b"/site-packages/" not in proto.SerializeToString() and b".py" not in proto.SerializeToString()


class Choosy(nn.Module):
    """Looks at what is in the images, which no graph can."""

    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_what_cannot_be_exported_is_said_in_one_line(tmp_path):
    with pytest.raises(ExportError, match="a batch of at least 2, got 1"):
        to_onnx(nn.Identity(), torch.zeros(1, 3, 4, 4))
    for way in (to_onnx, to_program):
        with pytest.raises(ExportError, match="cannot export a Choosy") as error:
            way(Choosy(), torch.zeros(2, 3, 4, 4))
        assert "\n" not in str(error.value)
    with torch.device("meta"):
        large = nn.Linear(2**15, 2**15)
    with pytest.raises(ExportError, match=r"4\.0 GiB of weights"):
        to_onnx(large, torch.zeros(2, 2**15))
    (tmp_path / "m.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"cannot read .*m\.onnx"):
        open_session(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="has no SlowExecutionProvider; it has .*CPUExecutionProvider"):
        open_session(tmp_path / "m.onnx", provider="SlowExecutionProvider")


def test_packages_are_optional(python):
    """Without them nothing else breaks, and a sentence says what to install."""
    code = """
import sys
sys.modules["onnxruntime"] = None
from timm_resnas.families.vit_resnas import VitResNasSpace
from timm_resnas.nas.latency import LatencyTable
from timm_resnas.nas.timing import Conditions
Conditions.here(batch_size=1)
assert "onnx" not in sys.modules
try:
    Conditions.here(batch_size=1, runtime="onnxruntime")
except ImportError as e:
    assert "needs the package onnxruntime" in str(e) and "timm_resnas[export]" in str(e), e
else:
    raise AssertionError
"""
    done = python.run(code)
    assert done.returncode == 0, done.stderr


# -- layers -----------------------------------------------------------------------------------------------------------


def test_nodes_belong_to_the_layer_that_was_entered_last(net, proto):
    layers = layer_of_nodes(proto, net)
    names = {module: name for name, module in net.named_modules()}
    starts = [names[m] for m in layer_starts(net)]
    order = [layers[node.name] for node in proto.graph.node]
    assert order == sorted(order) and max(order) + 1 == len(starts) == len(SPACE.layers(SPACE.largest))
    for node in proto.graph.node:  # by module, without the order of the graph
        inside = [s for s in scopes(node) if s.startswith(("blocks.0.attn", "blocks.0.norm1"))]
        if inside:
            assert starts[layers[node.name]] == "blocks.0.norm1"
        elif any(s.startswith("blocks.0.mlp") for s in scopes(node)):
            assert starts[layers[node.name]] == "blocks.0.norm2"
    del proto.graph.node[order.index(1) :]
    with pytest.raises(LatencyError, match=f"where its layer {starts[1]} begins, after {starts[0]}"):
        layer_of_nodes(proto, net)


def kernel(ts: int, name: str, dur: int) -> dict:
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur}


def test_a_profile_by_hand():
    """Fused nodes, by their name or by their place, also first of all; nodes before the first layer; two runs."""
    layers = {"shape": -1, "a": 0, "b": 0, "c": 1, "d": 1}
    run = [
        ("Reorder", 5),
        ("shape", 7),
        ("a", 10),
        ("Fused_token_1", 20),
        ("c/SomeFusion", 30),
        ("Gelu", 40),
        ("d", 50),
    ]
    events = [{"cat": "Session", "name": "model_loading", "ts": 0, "dur": 99}]
    for start, factor in ((5000, 2), (1000, 1)):
        events += [kernel(start + 100 * i, name, factor * dur) for i, (name, dur) in enumerate(run)]
        events.append({"cat": "Session", "name": "model_run", "ts": start, "dur": 1000})
    times, nodes = layer_times(events, layers)
    np.testing.assert_allclose(times, [[0.035, 0.120], [0.070, 0.240]])
    assert nodes.tolist() == [3, 3]
    with pytest.raises(LatencyError, match="names no node of layer 2 of 3"):
        layer_times(events, {**layers, "e": 2})


def test_what_profiling_adds_is_taken_off(monkeypatch, timer):
    """Profiled nodes that take 4 microseconds longer give the times of nodes that do not."""
    true = np.array([[0.5, 0.25], [0.6, 0.2]])
    nodes = np.array([100, 50])
    monkeypatch.setattr(timer, "_per_node", None)
    monkeypatch.setattr(timer, "_whole", lambda arch, batch: true.sum(axis=1))
    monkeypatch.setattr(timer, "_profiled", lambda arch, batch: (true + 0.004 * nodes, nodes))
    monkeypatch.setattr(timer.space, "layers", lambda arch: None, raising=False)
    assert timer._profiling() == pytest.approx((0.75 + 0.6 - 0.75) / 150)  # fastest with profile: 1.35, without: 0.75
    np.testing.assert_allclose(timer.layers(None), true)


def test_times_of_a_network(timer):
    arch = SPACE.smallest
    parts = timer.layers(arch)
    assert parts.shape[1] == len(SPACE.layers(arch)) and (parts >= 0).all() and parts.sum() > 0
    assert min(timer.total(arch)) > 0 and 0 <= timer.contention <= 1
    graph = timer.graph(arch)
    before = graph.stat().st_mtime_ns
    assert timer.graph(arch.canonical()) == graph and graph.stat().st_mtime_ns == before


def test_graphs_share_their_weights(timer):
    """All matrices are in one file, which is no larger than the largest network; sessions read it."""
    graphs = [timer.graph(arch) for arch in (SPACE.smallest, SPACE.largest)]
    pool = (graphs[0].parent / "weights.bin").stat().st_size
    weights = [p for p in SPACE.network(SPACE.largest).parameters() if p.ndim > 1 and p.numel() > 1024]
    assert 0 < pool <= sum(4 * p.numel() + 4096 for p in weights)
    for graph in graphs:
        (logits,) = open_session(graph).run(None, timer._feed(graph, 3))
        assert logits.shape == (3, 5) and np.isfinite(logits).all()


# -- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_of_onnx_runtime(tmp_path):
    from recipes.latency import main

    (tmp_path / "space.json").write_text(json.dumps(SMALL.to_dict()))
    main(
        [
            *("--space", str(tmp_path / "space.json"), "--output", str(tmp_path / "t.json"), "--batch-size", "2"),
            *("--runtime", "onnxruntime", "--rounds", "2", "--min-run-time", "0.0001", "--calibration", "2"),
            *("--verify", "3"),
        ]
    )
    assert not (tmp_path / "t.graphs").exists()
    table = LatencyTable.load(tmp_path / "t.json")
    here = table.conditions
    assert (here.runtime, here.provider, here.num_threads, here.batch_size) == (
        *("onnxruntime", "CPUExecutionProvider", 1, 2),
    )
    assert here == conditions() and "ONNX Runtime" in str(here)
    table.price(SMALL, device="cpu")
    found = table.notes["verification"]["networks"]
    for network in found:
        arch = Arch.from_record(network)
        assert table.predict(arch, **SMALL.model_args) == network["predicted_ms"] > 0
    with pytest.raises(LatencyError, match="runtime is 'torch', the table's is 'onnxruntime'"):
        table.check(SMALL, runtime="torch")
    got = measure_network(SMALL.smallest, SMALL, table, rounds=2, min_run_time=1e-3)
    assert set(got) == {"ms", "median_ms", "iqr"} and 0 < got["ms"] <= got["median_ms"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(precision="bfloat16"), "on the cpu in float32, got cpu and bfloat16"),
        (dict(runtime="tvm"), "unknown runtime 'tvm'; known: torch, onnxruntime"),
    ],
)
def test_conditions_that_there_are_none_of(wrong, message):
    with pytest.raises(LatencyError, match=message):
        conditions(**wrong)


def test_a_timer_is_of_its_runtime():
    assert isinstance(open_timer(SPACE, conditions()), OnnxTimer)
    with pytest.raises(LatencyError, match="of the runtime torch; expected onnxruntime"):
        OnnxTimer(SPACE, conditions(runtime="torch"))
    with pytest.raises(LatencyError, match="conditions of ONNX Runtime"):
        Conditions("cpu", "a processor", 1, 1, "float32", "2.9", "torch", "CPUExecutionProvider", "1.30")


def test_a_model_of_timm(tmp_path):
    """Layers of any network that `layer_starts` knows."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    layers = layer_of_nodes(to_onnx(model, torch.zeros(2, 3, 32, 32)), model)
    assert max(layers.values()) + 1 == len(layer_starts(model)) == 6
