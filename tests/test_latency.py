"""Latency tables: what they predict, how records become one, their files, and budgets on latency."""

import json

import numpy as np
import pytest

from timm_resnas.arch import Arch, Layer
from timm_resnas.families.vit_resnas import VitResNasSpace
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.evolution import EvolutionSearch
from timm_resnas.nas.latency import (
    LatencyTable,
    cover_networks,
    fit_line,
    measure_network,
    measured_layers,
    spread_networks,
)
from timm_resnas.nas.space import BudgetError, SearchSpace
from timm_resnas.nas.timing import Conditions, LatencyError, device_name, run_rounds, summary

MICRO = SearchSpace.preset("micro")
CONDITIONS = Conditions("cpu", "a processor", 1, 32, "float32", "2.9")


def tiny_space(**model_args) -> SearchSpace:
    """A space whose networks run in a millisecond."""
    network = [(0, 16), (1, (16, 2, 8), (16, 32), 1), (3, 16, 24), (1, (24, 2, 8), (24, 32), 1), (2, 24, 5)]
    block = {"attn": [8, 16], "mlp": [16, 32], "layer": None}
    keep = [[8, 16], block, [16, 24], {**block, "layer": [24, 0]}, None]
    return VitResNasSpace(network, keep, **{"img_size": 16, "patch_size": 4, **model_args})


def wide_space() -> SearchSpace:
    """A space with 49 widths, 32 numbers of heads and 64 of hidden units: too many to measure each."""
    network = [(0, 64), (1, (64, 32, 8), (64, 512), 1), (2, 64, 10)]
    choices = {"attn": list(range(8, 257, 8)), "mlp": list(range(8, 513, 8)), "layer": None}
    return VitResNasSpace(network, [list(range(16, 65)), choices, None], img_size=32, patch_size=4)


def true_ms(layer: Layer) -> float:
    """Any deterministic time: grows with the shape, but not in proportion to MACs."""
    kind = ("stem", "attention", "mlp", "reduction", "head").index(layer.kind)
    shape = dict(layer.shape)
    dim = shape.get("dim", shape.get("in_dim"))
    size = shape.get("num_heads", shape.get("hidden", shape.get("out_dim", 0)))
    return 0.1 + 0.01 * kind + 0.003 * dim + 0.0002 * dim * size**0.5 + 0.001 * shape["tokens"]


def truth(space: SearchSpace, arch, overhead: float = 0.0, scale: float = 1.0) -> float:
    return overhead + scale * sum(map(true_ms, space.layers(arch)))


def table_of(space: SearchSpace, time=true_ms, **kwargs) -> LatencyTable:
    layers = {p: {"ms": time(p), "median_ms": time(p), "iqr": 0.0, "samples": 3} for p in measured_layers(space)}
    return LatencyTable(CONDITIONS, layers, **kwargs)


class FakeTimer:
    """Times of `true_ms`, with slow repeats and an overhead and scale of the whole."""

    contention = 0.0

    def __init__(self, overhead: float = 0.0, scale: float = 1.0, noise: float = 0.0) -> None:
        self.overhead, self.scale, self.noise = overhead, scale, noise
        self.rng = np.random.default_rng(0)
        self.calls = 0

    def _repeats(self, ms: np.ndarray) -> np.ndarray:
        self.calls += 1
        slow = self.rng.random((5, len(ms))) < self.noise
        slow[self.rng.integers(5)] = False  # other programs leave one repeat of a round alone
        return ms * np.where(slow, self.rng.uniform(1, 4, slow.shape), 1)

    def layers(self, arch) -> np.ndarray:
        return self._repeats(np.array([true_ms(layer) for layer in MICRO.layers(arch)]))

    def total(self, arch) -> list[float]:
        return self._repeats(np.array([truth(MICRO, arch, self.overhead, self.scale)]))[:, 0].tolist()


# -- networks to measure ----------------------------------------------------------------------------------------------


def test_covering_holds_layers_of_every_network():
    """The oracle: layers of random networks, found without the covering's own list."""
    held = {layer for arch in cover_networks(MICRO) for layer in MICRO.layers(arch)}
    seen = {layer for arch in MICRO.sample_many(3000, np.random.default_rng(0)) for layer in MICRO.layers(arch)}
    assert held == seen == set(measured_layers(MICRO))


def test_thinned_axes_keep_their_ends():
    space = wide_space()
    held = {layer for arch in cover_networks(space) for layer in space.layers(arch)} & set(measured_layers(space))
    for kind, name, ends in (
        ("stem", "dim", (16, 64)),
        ("attention", "num_heads", (1, 32)),
        ("mlp", "hidden", (8, 512)),
    ):
        values = sorted({dict(layer.shape)[name] for layer in held if layer.kind == kind})
        assert len(values) == 8 and (values[0], values[-1]) == ends

    # a table of them predicts the networks between exactly where the times are linear in each axis
    def time(layer: Layer) -> float:
        shape = dict(layer.shape)
        return 1 + 0.5 * shape["dim"] + 0.01 * shape["dim"] * shape.get("num_heads", shape.get("hidden", 0))

    table = table_of(space, time)
    table.price(space)
    for arch in space.sample_many(50, np.random.default_rng(0)):
        assert table.predict(arch, **space.model_args) == pytest.approx(sum(map(time, space.layers(arch))), abs=1e-5)
    with pytest.raises(LatencyError, match=r"does not hold mlp\(.*hidden=520.*\); it holds mlp with dim"):
        table.layer_ns(Layer("mlp", (("dim", 64), ("hidden", 520), ("tokens", 65))))
    with pytest.raises(LatencyError, match="it holds no conv"):
        table.layer_ns(Layer("conv", (("dim", 64),)))


@pytest.mark.parametrize("count", [8, 30])
def test_spread_networks_are_evenly_spread_and_new(count):
    old = spread_networks(MICRO, 8, 0)
    archs = spread_networks(MICRO, count, 1, avoid=old)
    macs = np.array([MICRO.costs(a)["macs"] for a in archs])
    least, most = MICRO.cost_range("macs")
    parts = ((macs - least) / (most - least) * count).clip(0, count - 1e-6).astype(int)
    assert np.abs(parts - np.arange(count)).max() <= 1 and len(archs) == count  # an end may fall to the neighbour
    assert not {a.key() for a in archs} & {a.key() for a in old}
    assert spread_networks(MICRO, count, 1, avoid=old) == archs


# -- from records to a table, with made-up times ----------------------------------------------------------------------


def test_additive_truth_is_recovered():
    """Slow repeats change nothing; the calibration finds overhead and scale of the whole."""
    jobs = LatencyTable.jobs(MICRO)
    for noise in (0.0, 0.5):
        timer = FakeTimer(overhead=0.7, scale=1.1, noise=noise)
        table = LatencyTable.from_records(MICRO, CONDITIONS, jobs, run_rounds(timer, jobs, 5))
        assert table.overhead_ms == pytest.approx(0.7, rel=1e-3) and table.scale == pytest.approx(1.1, rel=1e-3)
        for arch in MICRO.sample_many(50, np.random.default_rng(1)):
            predicted = table.predict(arch, **MICRO.model_args)
            assert predicted == pytest.approx(truth(MICRO, arch, 0.7, 1.1), rel=1e-4)
    measured = {layer: v["ms"] for layer, v in table.layers.items()}
    assert measured == pytest.approx({layer: true_ms(layer) for layer in measured}, abs=1e-6)  # whole nanoseconds
    assert all(v["iqr"] < 1e-9 for v in table.layers.values())


def test_a_few_slow_rounds_decide_nothing():
    jobs = LatencyTable.jobs(MICRO)
    records = list(run_rounds(FakeTimer(), jobs, 9))
    for record in records:
        if record["round"] in (2, 3, 7):
            record["ms"] = np.multiply(record["ms"], 2.5).tolist()
    table = LatencyTable.from_records(MICRO, CONDITIONS, jobs, records)
    assert (table.overhead_ms, table.scale) == pytest.approx((0, 1), abs=1e-4)
    assert all(v["ms"] == pytest.approx(true_ms(p), abs=1e-6) for p, v in table.layers.items())


def test_rounds_are_interleaved_and_resumable():
    jobs = LatencyTable.jobs(MICRO, calibration=4)
    records = list(run_rounds(FakeTimer(), jobs, 3))
    assert [r["round"] for r in records] == sorted(r["round"] for r in records)
    orders = [[r["job"] for r in records if r["round"] == i] for i in range(3)]
    assert all(sorted(order) == sorted(jobs) for order in orders) and len({tuple(o) for o in orders}) == 3
    assert json.loads(json.dumps(records)) == records
    broken = records[: len(records) // 2]
    again = FakeTimer()
    rest = list(run_rounds(again, jobs, 3, broken))
    assert broken + rest == records and again.calls == len(records) - len(broken)


def test_missing_records_are_told():
    jobs = LatencyTable.jobs(MICRO)
    records = [r for r in run_rounds(FakeTimer(), jobs, 2) if r["job"] != "layers 0"]
    with pytest.raises(LatencyError, match="the latency table does not hold"):
        LatencyTable.from_records(MICRO, CONDITIONS, jobs, records)


def test_fit_line():
    x = np.array([1.0, 2.0, 3.0, 5.0, 8.0])
    assert fit_line(x, 0.5 + 2 * x) == pytest.approx((0.5, 2.0))
    assert fit_line(x, [2.5, 4.5, 60.0, 10.5, 16.5]) == pytest.approx((0.5, 2.0))  # one bad point
    assert fit_line(x, 3 * x - 0.1)[0] == 0  # no negative overhead
    assert fit_line(x, 3 * x, through_zero=True) == pytest.approx((0, 3))
    assert fit_line([2.0], [3.0]) == pytest.approx((0, 1.5))
    with pytest.raises(ValueError, match="above zero"):
        fit_line([], [])


def test_summary():
    assert summary([1, 2, 3, 4, 100]) == {"ms": 1, "median_ms": 3, "iqr": 2}


# -- predicting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["micro", "vit_resnas_small"])
def test_rows_equal_networks_to_the_last_bit(name):
    space = SearchSpace.preset(name)
    table = table_of(space, overhead_ms=0.31, scale=1.07)
    table.price(space)
    archs = space.sample_many(500, np.random.default_rng(0)) + [space.largest, space.smallest]
    rows = space.table("latency_ms").cost(space.rows(archs))
    assert rows.tolist() == [table.predict(a, **space.model_args) for a in archs]
    assert rows.tolist() == [space.costs(a)["latency_ms"] for a in archs]
    for arch, ms in zip(archs[:20], rows, strict=False):
        assert ms == pytest.approx(truth(space, arch, 0.31, 1.07), abs=1e-4)
    assert table.predict(space.smallest.canonical(), **space.model_args) == rows[-1]  # absent blocks cost nothing


def test_range_is_that_of_all_networks():
    """Against every network of a small space, with times that fall as widths grow in some places."""
    space = tiny_space()
    rng = np.random.default_rng(3)
    table = table_of(space, time=lambda layer: float(rng.uniform(0.1, 1)))
    table.price(space)
    counts = [len(gene.draws) for gene in space.searched]
    every = [table.predict(a, **space.model_args) for a in space.build(np.indices(counts).reshape(len(counts), -1).T)]
    assert space.cost_range("latency_ms") == (min(every), max(every))
    assert (
        min(every) < space.costs(space.smallest)["latency_ms"] and max(every) > space.costs(space.largest)["latency_ms"]
    )


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
@pytest.mark.parametrize("lower", [0.975, 0.995])
def test_latency_budget_alone(share, lower):
    space = SearchSpace.preset("micro")
    table = table_of(space)
    table.price(space)
    budget = Budget.parse(f"latency={100 * share:g}%,lower={lower}", share_of=space.costs(space.largest))
    rng = np.random.default_rng(0)
    found = space.sample_many(60, rng, budget)
    parents = found[:10]
    found += space.mutate_many(parents, 20, rng, 0.3, budget) + space.crossover_many(parents, 20, rng, budget)
    low, high = budget.band
    assert len(found) >= 90 and len({a.key() for a in found}) > 30
    assert all(low <= table.predict(a, **space.model_args) <= high for a in found)


def test_search_under_a_latency_budget():
    space = SearchSpace.preset("micro")
    table_of(space).price(space)
    budget = Budget(latency_ms=0.6 * space.costs(space.largest)["latency_ms"], params=900_000)
    search = EvolutionSearch(space, budget, 0, population=20, iterations=3, parents=6, mutations=6, crossovers=6)
    while not search.done:
        search.tell([(arch, len(arch.key())) for arch in search.ask()])
    assert len(search.history) == 20 + 2 * 12
    assert all(budget.check(record) == [] for record in search.history)
    with pytest.raises(BudgetError, match="latency_ms=0.1 ms is below the smallest"):
        EvolutionSearch(space, Budget(latency_ms=0.1))


# -- conditions and spaces ---------------------------------------------------------------------------------------------


def test_check_names_what_differs():
    table = table_of(MICRO)
    table.check(MICRO, batch_size=32, num_threads=None)
    with pytest.raises(LatencyError, match="batch_size is 16, the table's is 32; precision is 'amp'"):
        table.check(MICRO, batch_size=16, precision="amp")
    with pytest.raises(LatencyError, match="device_name is .*, the table's is 'a processor'"):
        table.price(MICRO, device="cpu")
    with pytest.raises(TypeError, match="unknown condition 'threads'"):
        table.check(MICRO, threads=1)
    with pytest.raises(LatencyError, match="does not hold stem"):
        table.check(SearchSpace.preset("micro", img_size=64))
    with pytest.raises(LatencyError, match="does not hold"):
        table.check(SearchSpace.preset("vit_resnas_small"))


def test_a_network_is_measured_under_the_tables_conditions():
    space = tiny_space()
    here = Conditions.here(batch_size=2, num_threads=1)
    table = LatencyTable.measure(space, here, rounds=1, calibration=2)
    table.price(space, device="cpu")
    got = measure_network(space.largest, space, table, rounds=2, min_run_time=1e-3)
    assert set(got) == {"ms", "median_ms", "iqr"} and 0 < got["ms"] <= got["median_ms"]
    assert table.notes["calibration"][0]["model"] == "vit_resnas"
    with pytest.raises(LatencyError, match="device_name"):
        measure_network(space.largest, space, table_of(space))
    with pytest.raises(ValueError, match="stages of"):
        measure_network(MICRO.largest, space, table)


# -- files ------------------------------------------------------------------------------------------------------------


def test_files(tmp_path):
    table = table_of(MICRO, overhead_ms=0.25, scale=1.5, notes={"rounds": 3})
    table.save(tmp_path / "latency.json")
    again = LatencyTable.load(tmp_path / "latency.json")
    assert again.to_json() == table.to_json() and again.layers == table.layers and again.conditions == CONDITIONS
    assert (again.overhead_ms, again.scale, again.notes) == (0.25, 1.5, {"rounds": 3})
    arch = MICRO.sample(np.random.default_rng(0))
    assert again.predict(arch, **MICRO.model_args) == table.predict(arch, **MICRO.model_args)
    with pytest.raises(LatencyError, match="none.json: No such file"):
        LatencyTable.load(tmp_path / "none.json")


def changed(**change):
    data = json.loads(table_of(tiny_space()).to_json())
    for path, value in change.items():
        *parents, last = path.split("__")
        place = data
        for part in parents:
            place = place[int(part) if part.isdigit() else part]
        place[int(last) if last.isdigit() else last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not a latency table: not JSON"),
        ("[]", "not a latency table of format .*, got 'list'"),
        ('{"format": "timm_resnas latency table 1"}', "measure again: the latency table is of format 1"),
        (changed(conditions__threads=1), "conditions must have .*; got .*threads"),
        (changed(conditions__batch_size=0), "batch_size must be an integer of at least 1"),
        (changed(conditions__precision="int4"), "precision"),
        (changed(scale=0), "scale must be above 0"),
        (changed(overhead_ms=float("nan")), "overhead_ms must be a number from 0"),
        (changed(layers=3), "damaged: TypeError"),
        (changed(layers__0__ms=-1), "layer 0: ms must be a number from 0"),
        (changed(layers__0__ms=float("inf")), "layer 0: ms must be a number from 0"),
        (changed(layers__0__shape=[1]), "layer 0 must be a dict with kind and shape"),
        (changed(layers__0__shape__dim="8"), "layer 0: dim must be an integer"),
        (changed(layers__1=json.loads(changed())["layers"][0]), "layer 1 .* is there twice"),
    ],
)
def test_damaged_files(text, message, tmp_path):
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(LatencyError, match=message) as error:
        LatencyTable.load(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_this_machine():
    here = Conditions.here(batch_size=1, num_threads=1)
    assert here.device_name == device_name("cpu") != "" and "batch 1" in str(here)
    with pytest.raises(LatencyError):
        CONDITIONS.check_device()


# -- the recipe -------------------------------------------------------------------------------------------------------


def test_recipe_measures_verifies_and_resumes(tmp_path, capsys):
    from recipes.latency import main

    space = tmp_path / "space.json"
    space.write_text(json.dumps(tiny_space().to_dict()))
    command = ["--space", str(space), "--output", str(tmp_path / "t.json"), "--rounds", "2", "--min-run-time", "0.0001"]
    command += ["--batch-size", "2", "--calibration", "3", "--verify", "4"]
    (tmp_path / "t.graphs").mkdir()  # somebody else's: without ONNX Runtime, no graph is written here
    main(command)
    (tmp_path / "t.graphs").rmdir()
    said = capsys.readouterr().out
    assert "| table |" in said and "| proportional to MACs |" in said
    table = LatencyTable.load(tmp_path / "t.json")
    table.check(tiny_space(), num_threads=1, batch_size=2)
    found = table.notes["verification"]
    assert set(found["results"]) == {*("table", "table, drift taken out", "proportional to MACs", "linear in MACs")}
    for network in found["networks"]:
        assert table.predict(Arch.from_record(network), **tiny_space().model_args) == network["predicted_ms"]
    known = {str(n["args"]) for n in table.notes["calibration"]}
    assert found["networks"] and not known & {str(n["args"]) for n in found["networks"]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["space.json", "t.json", "t.png", "t.records.jsonl"]

    # broken off in the middle of a line: nothing that was measured is measured again
    records = tmp_path / "t.records.jsonl"
    lines = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(b"".join(lines[:10]) + lines[10][:20])
    (tmp_path / "t.json").unlink()
    main(command)
    assert "9 of " in capsys.readouterr().out
    mended = records.read_bytes().splitlines(keepends=True)
    assert mended[:10] == lines[:10] and len(mended) == len(lines)

    # all is measured: the same table again
    text = (tmp_path / "t.json").read_text()
    main(command)
    assert (tmp_path / "t.json").read_text() == text and records.read_bytes() == b"".join(mended)

    for option, value in (("--batch-size", "3"), ("--rounds", "0"), ("--space", "huge"), ("--output", str(tmp_path))):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([*command, option, value])
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.splitlines()[-1].count("error") == 1
    assert records.read_bytes() == b"".join(mended)


def test_a_space_that_is_measured_whole_leaves_none_to_verify(tmp_path, capsys):
    from recipes.latency import main

    network = [[0, 8], [1, [8, 2, 4], [8, 8], 1], [2, 8, 3]]
    choices = [[8], {"attn": [8, 4], "mlp": [8], "layer": None}, None]
    space = VitResNasSpace(network, choices, img_size=16, patch_size=4)
    (tmp_path / "space.json").write_text(json.dumps(space.to_dict()))
    command = ["--space", str(tmp_path / "space.json"), "--output", str(tmp_path / "t.json"), "--rounds", "2"]
    main([*command, "--min-run-time", "0.0001", "--calibration", "2", "--verify", "4"])
    assert "none is left to verify" in capsys.readouterr().out
    table = LatencyTable.load(tmp_path / "t.json")
    assert "verification" not in table.notes and table.predict(space.largest, **space.model_args) > 0


def test_comparison_by_hand():
    from timm_resnas.engine.latency import compare

    found = compare(np.array([1.0, 2.2, 2.7]), np.array([1.0, 2.0, 3.0]))
    assert found == pytest.approx({"median_error": 0.1, "max_error": 0.1, "rank_correlation": 1.0})
    assert compare(np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 3.0]))["rank_correlation"] == pytest.approx(-1)
