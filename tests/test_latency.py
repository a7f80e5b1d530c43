"""Latency tables: what they predict, how they are measured, their files, and budgets on latency."""

import json
import math

import numpy as np
import pytest
import torch

import timm_resnas  # noqa: F401  (registers the models)
from timm_resnas import Arch
from timm_resnas.arch import Reduction
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.evolution import EvolutionSearch
from timm_resnas.nas.latency import (
    PRECISIONS,
    LatencyError,
    LatencyTable,
    Meter,
    Piece,
    Setting,
    _all_pieces,
    _images,
    _stamps,
    cover_networks,
    device_name,
    fit_line,
    forward_pieces,
    measure,
    measure_network,
    pieces_of,
    run_rounds,
    spread_networks,
    summary,
)
from timm_resnas.nas.space import AdditiveCosts, BudgetError, SearchSpace

MICRO = SearchSpace.preset("micro")
SETTING = Setting("cpu", "a processor", 1, 32, "float32", "2.9")


def tiny_space(**model_args) -> SearchSpace:
    """A space whose networks run in a millisecond."""
    network = [(0, 16), (1, (16, 2, 8), (16, 32), 1), (3, 16, 24), (1, (24, 2, 8), (24, 32), 1), (2, 24, 5)]
    block = {"attn": [8, 16], "mlp": [16, 32], "layer": None}
    keep = [[8, 16], block, [16, 24], {**block, "layer": [24, 0]}, None]
    return SearchSpace(network, keep, **{"img_size": 16, "patch_size": 4, **model_args})


def true_ms(piece: Piece) -> float:
    """Any deterministic time: grows with the widths, but not in proportion to MACs."""
    kind = ("stem", "attn", "mlp", "reduction", "head").index(piece.kind)
    return 0.1 + 0.01 * kind + 0.003 * piece.dim + 0.0002 * piece.dim * piece.size**0.5 + 0.05 * piece.stage


def table_of(space: SearchSpace, time=true_ms, **kwargs) -> LatencyTable:
    pieces = {p: {"ms": time(p), "iqr": 0.0, "samples": 3} for p in _all_pieces(space)}
    stem = space.largest.patch_embed
    return LatencyTable(SETTING, space.model_args, (stem.kind, stem.mid_dim), pieces, **kwargs)


class FakeMeter:
    """Times of `true_ms`, with slow repeats, slow rounds and an overhead and scale of the whole."""

    waited = 0.0

    def __init__(self, overhead: float = 0.0, scale: float = 1.0, noise: float = 0.0) -> None:
        self.overhead, self.scale, self.noise = overhead, scale, noise
        self.rng = np.random.default_rng(0)
        self.calls = 0

    def _repeats(self, ms: np.ndarray) -> np.ndarray:
        self.calls += 1
        slow = self.rng.random((5, len(ms))) < self.noise
        slow[self.rng.integers(5)] = False  # other programs leave one repeat of a round alone
        return ms * np.where(slow, self.rng.uniform(1, 4, slow.shape), 1)

    def pieces(self, arch: Arch) -> np.ndarray:
        return self._repeats(np.array([true_ms(p) for p in pieces_of(arch)]))

    def total(self, arch: Arch) -> list[float]:
        ms = self.overhead + self.scale * sum(true_ms(p) for p in pieces_of(arch))
        return self._repeats(np.array([ms]))[:, 0].tolist()


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_pieces_of_a_network_by_hand():
    arch = Arch.from_network_def(
        [
            (5, 16, 8),
            (1, (16, 2, 8), (16, 32), 1),
            (1, (16, 1, 8), (16, 64), 0),
            (3, 16, 24),
            (1, (24, 3, 4), (24, 48), 1),
            (2, 24, 5),
        ]
    )
    assert pieces_of(arch) == [
        ("stem", 0, 16, 0, 0),
        ("attn", 0, 16, 2, 8),
        ("mlp", 0, 16, 32, 0),
        ("reduction", 1, 16, 24, 0),
        ("attn", 1, 24, 3, 4),
        ("mlp", 1, 24, 48, 0),
        ("head", 1, 24, 0, 0),
    ]
    assert pieces_of(arch) == pieces_of(arch.canonical())


@pytest.mark.parametrize("distill", [False, True])
def test_the_timed_forward_is_the_network(distill):
    space = MICRO.with_model_args(distill_token=distill)
    arch = space.sample(np.random.default_rng(0))
    meter = Meter(space, Setting.here(batch_size=2, num_threads=1))
    net = meter.network(arch)
    assert not net.training and str(net.arch) == str(arch.canonical())
    marks = []
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        out = forward_pieces(net, x, lambda: marks.append(1))
        expected = net(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert expected.isfinite().all() and expected.std() > 0
    assert len(marks) == len(pieces_of(arch)) + 1


def test_networks_share_weights_but_not_their_own():
    """Each network has memory of its size, no two of its weights the same; networks together have that of one."""
    meter = Meter(MICRO, Setting.here(batch_size=1, num_threads=1))
    nets = [meter.network(arch) for arch in (MICRO.smallest, MICRO.largest)]
    for net in nets:
        spans = sorted((p.data_ptr(), p.data_ptr() + 4 * p.numel()) for p in net.parameters())
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    pools = {p.untyped_storage().data_ptr() for net in nets for p in net.parameters()}
    assert len(pools) == 1
    assert meter.network(MICRO.smallest.canonical()) is nets[0]


@pytest.mark.parametrize("name", ["micro", "mini", "vit_resnas_tiny", "vit_resnas_small"])
def test_few_networks_cover_every_piece(name):
    space = SearchSpace.preset(name)
    archs = cover_networks(space)
    held = {p for arch in archs for p in pieces_of(arch)}
    assert held == set(_all_pieces(space))
    # as many as there are pairs of widths at a reduction, or a few more
    pairs = max(len([p for p in held if p.kind == "reduction" and p.stage == s]) for s in (1, 2))
    assert pairs <= len(archs) <= pairs + 3
    assert cover_networks(space) == archs


def test_covering_holds_pieces_of_every_network():
    """The oracle: pieces of random networks, found without the covering's own list."""
    held = set(_all_pieces(MICRO))
    seen = {p for arch in MICRO.sample_many(3000, np.random.default_rng(0)) for p in pieces_of(arch)}
    assert seen == held


def test_thinned_axes_keep_their_ends():
    network = [(0, 64), (1, (64, 32, 8), (64, 512), 1), (2, 64, 10)]
    keep = [list(range(16, 65)), {"attn": range(8, 257, 8), "mlp": range(8, 513, 8), "layer": None}, None]
    keep[1] = {"attn": list(keep[1]["attn"]), "mlp": list(keep[1]["mlp"]), "layer": None}
    space = SearchSpace(network, keep, img_size=32, patch_size=4)
    held = {p for arch in cover_networks(space, max_choices=5) for p in pieces_of(arch)}
    dims = sorted({p.dim for p in held})
    assert len(dims) == 5 and dims[0] == 16 and dims[-1] == 64
    assert sorted({p.size for p in held if p.kind == "attn"})[::4] == [1, 32]
    # a table of them predicts the networks between exactly where the times are linear in each axis
    pieces = {p: {"ms": 1 + 0.5 * p.dim + 0.01 * p.dim * p.size, "iqr": 0.0, "samples": 1} for p in held}
    table = LatencyTable(SETTING, space.model_args, (0, 0), pieces)
    table.check(space)
    for arch in space.sample_many(50, np.random.default_rng(0)):
        expected = sum(1 + 0.5 * p.dim + 0.01 * p.dim * p.size for p in pieces_of(arch))
        assert table.predict(arch) == pytest.approx(expected, abs=1e-5)


# -- measuring, with made-up times ------------------------------------------------------------------------------------


def test_additive_truth_is_recovered():
    """Slow repeats and rounds change nothing; the calibration finds overhead and scale of the whole."""
    jobs = LatencyTable.jobs(MICRO)
    for noise in (0.0, 0.5):
        meter = FakeMeter(overhead=0.7, scale=1.1, noise=noise)
        table = LatencyTable.from_records(MICRO, SETTING, jobs, run_rounds(meter, jobs, 5))
        assert table.overhead_ms == pytest.approx(0.7, rel=1e-3) and table.scale == pytest.approx(1.1, rel=1e-3)
        for arch in MICRO.sample_many(50, np.random.default_rng(1)):
            truth = 0.7 + 1.1 * sum(true_ms(p) for p in pieces_of(arch))
            assert table.predict(arch) == pytest.approx(truth, rel=1e-4)
    measured = {p: v["ms"] for p, v in table.pieces.items()}
    assert measured == pytest.approx({p: true_ms(p) for p in measured}, abs=1e-6)  # whole nanoseconds
    assert all(v["iqr"] < 1e-9 for v in table.pieces.values())


def test_a_few_slow_rounds_decide_nothing():
    jobs = LatencyTable.jobs(MICRO)
    records = list(run_rounds(FakeMeter(), jobs, 9))
    for record in records:
        if record["round"] in (2, 3, 7):
            record["ms"] = np.multiply(record["ms"], 2.5).tolist()
    table = LatencyTable.from_records(MICRO, SETTING, jobs, records)
    assert (table.overhead_ms, table.scale) == pytest.approx((0, 1), abs=1e-4)
    assert all(v["ms"] == pytest.approx(true_ms(p), abs=1e-6) for p, v in table.pieces.items())


def test_rounds_are_interleaved_and_resumable():
    jobs = LatencyTable.jobs(MICRO, calibration=4)
    meter = FakeMeter()
    records = list(run_rounds(meter, jobs, 3))
    assert [r["round"] for r in records] == sorted(r["round"] for r in records)
    orders = [[r["job"] for r in records if r["round"] == i] for i in range(3)]
    assert all(sorted(order) == sorted(jobs) for order in orders) and len({tuple(o) for o in orders}) == 3
    assert json.loads(json.dumps(records)) == records
    broken = records[: len(records) // 2]
    again = FakeMeter()
    rest = list(run_rounds(again, jobs, 3, broken))
    assert broken + rest == records and again.calls == len(records) - len(broken)


def test_missing_records_are_told():
    jobs = LatencyTable.jobs(MICRO)
    records = [r for r in run_rounds(FakeMeter(), jobs, 2) if r["job"] not in ("pieces 0", "calibration 0")]
    with pytest.raises(LatencyError, match="reduction of stage 1 .* is missing"):
        LatencyTable.from_records(MICRO, SETTING, jobs, records)


@pytest.mark.parametrize("count", [8, 30])
def test_spread_networks_are_evenly_spread_and_new(count):
    old = spread_networks(MICRO, 8, 0)
    archs = spread_networks(MICRO, count, 1, avoid=old)
    macs = np.array([MICRO.costs(a)["macs"] for a in archs])
    least, most = (MICRO.costs(a)["macs"] for a in (MICRO.smallest, MICRO.largest))
    parts = ((macs - least) / (most - least) * count).clip(0, count - 1e-6).astype(int)
    assert np.abs(parts - np.arange(count)).max() <= 1 and len(archs) == count  # an end may fall to the neighbour
    assert not {a.key() for a in archs} & {a.key() for a in old}
    assert spread_networks(MICRO, count, 1, avoid=old) == archs


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
    assert isinstance(table.costs, AdditiveCosts)
    archs = space.sample_many(500, np.random.default_rng(0)) + [space.largest, space.smallest]
    rows = space._cost("latency_ms", space._encode_many(archs), table.costs)
    assert rows.tolist() == [table.predict(a) for a in archs] == [table.costs(a)["latency_ms"] for a in archs]
    for arch, ms in zip(archs[:20], rows, strict=False):
        assert ms == pytest.approx(0.31 + 1.07 * sum(true_ms(p) for p in pieces_of(arch)), abs=1e-4)


def test_absent_blocks_cost_nothing():
    table = table_of(MICRO)
    stages = [MICRO.smallest.stages, MICRO.largest.stages]
    assert len(stages[0][0]) == len(stages[1][0])  # positions are kept
    assert table.predict(MICRO.smallest) == table.predict(MICRO.smallest.canonical())


def test_reach_is_that_of_all_networks():
    """Against every network of a small space, with times that fall as widths grow in some places."""
    space = tiny_space()
    rng = np.random.default_rng(3)
    table = table_of(space, time=lambda p: float(rng.uniform(0.1, 1)))
    counts = [len(layer.choices) for layer in space.layers]
    picks = np.indices(counts).reshape(len(counts), -1).T
    all_ms = [table.predict(a) for a in space.build(picks)]
    assert space._additive(table.costs).reach() == (min(all_ms), max(all_ms))
    assert min(all_ms) < table.predict(space.smallest) and max(all_ms) > table.predict(space.largest)


def test_prediction_outside_of_the_table():
    table = table_of(MICRO)
    with pytest.raises(LatencyError, match=r"does not hold stem of stage 0 \(embed_dim 320\).*\(32, 0\) to \(64, 0\)"):
        table.predict(SearchSpace.preset("vit_resnas_small").largest)


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.4, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("lower", [0.975, 0.995])
def test_latency_budget_alone(share, lower):
    table = table_of(MICRO)
    budget = Budget.parse(f"latency={100 * share:g}%,lower={lower}", share_of=MICRO.costs(MICRO.largest, table.costs))
    rng = np.random.default_rng(0)
    found = MICRO.sample_many(60, rng, budget, table.costs)
    parents = found[:10]
    found += MICRO.mutate_many(parents, 20, rng, 0.3, budget, table.costs)
    found += MICRO.crossover_many(parents, 20, rng, budget, table.costs)
    assert len(found) >= 90
    low, high = budget.band
    assert all(low <= table.predict(a) <= high for a in found)
    assert len({a.key() for a in found}) > 30


def test_rows_and_networks_make_the_same_draws():
    """The same latency as a plain function, which is asked network by network, gives the same networks."""
    table = table_of(MICRO, overhead_ms=0.2)

    def plain(arch: Arch) -> dict[str, float]:
        return {"latency_ms": table.predict(arch)}

    budget = Budget(latency_ms=0.6 * table.predict(MICRO.largest), params=500_000)
    made = []
    for extra in (plain, table.costs):
        rng = np.random.default_rng(5)
        found = MICRO.sample_many(12, rng, budget, extra)
        made.append(found)
        assert all(budget.check(MICRO.costs(a, extra)) == [] for a in found)
    keys = [[a.key() for a in archs] for archs in made]
    shared = sum(a == b for a, b in zip(*keys, strict=True))
    assert shared == 12


def test_latency_as_second_limit():
    table = table_of(MICRO)
    macs = int(0.5 * MICRO.costs(MICRO.largest)["macs"])
    typical = np.median([table.predict(a) for a in MICRO.sample_many(50, np.random.default_rng(0), Budget(macs=macs))])
    budget = Budget(macs=macs, latency_ms=typical)
    for arch in MICRO.sample_many(40, np.random.default_rng(1), budget, table.costs):
        assert budget.check(MICRO.costs(arch, table.costs)) == []


@pytest.mark.parametrize("factor, fact", [(0.5, "below the smallest"), (1.5, "above the largest")])
def test_impossible_latency_names_the_range(factor, fact):
    table = table_of(MICRO)
    least, most = (table.predict(a) for a in (MICRO.smallest, MICRO.largest))
    limit = factor * (least if factor < 1 else most)
    with pytest.raises(BudgetError, match=fact) as error:
        MICRO.check_budget(Budget(latency_ms=limit), table.costs)
    assert f"latency_ms from {least:.4g} ms to {most:.4g} ms" in str(error.value)
    with pytest.raises(BudgetError, match="pass extra_costs"):
        MICRO.check_budget(Budget(latency_ms=limit))


def test_band_above_all_starts_is_told():
    """Where the slowest networks are not those with all heads, the generator says what it can reach."""
    table = table_of(MICRO, time=lambda p: 2.0 if p.kind == "attn" and p.size == 4 - p.stage // 2 * 0 - 1 else 1.0)
    top = MICRO._additive(table.costs).reach()[1]
    assert table.predict(MICRO.largest) < 0.95 * top
    with pytest.raises(BudgetError, match=r"none of which reaches latency_ms .* \(the most is [0-9.]+ ms\)"):
        MICRO.sample_many(5, np.random.default_rng(0), Budget(latency_ms=top), table.costs)


def test_a_search_stays_in_its_latency_band():
    table = table_of(MICRO)
    budget = Budget(latency_ms=0.4 * table.predict(MICRO.largest))
    search = EvolutionSearch(
        MICRO, budget, 0, population=30, iterations=3, parents=10, mutations=10, crossovers=10, extra_costs=table.costs
    )
    while not search.done:
        search.tell([(a, sum(b.mlp_hidden for s in a.stages for b in s if b.exists)) for a in search.ask()])
    assert len(search.history) == 70
    for record in search.history:
        arch = Arch.from_network_def(record["network_def"])
        assert record["latency_ms"] == table.predict(arch)
        assert budget.band[0] <= record["latency_ms"] <= budget.band[1]
    assert json.loads(json.dumps(search.history)) == search.history


# -- does it fit? -----------------------------------------------------------------------------------------------------


def test_check_names_every_difference():
    table = table_of(MICRO)
    table.check(MICRO)
    table.check(MICRO.with_model_args(img_size=[32, 32], drop_rate=0.1))  # the same images; no cost in eval
    table.check(MICRO, num_threads=1, batch_size=32, precision="float32")
    with pytest.raises(LatencyError) as error:
        table.check(MICRO.with_model_args(img_size=64, num_classes=7), num_threads=2, batch_size=1, device="cpu")
    for part in (
        "num_threads is 2, the table's is 1",
        "batch_size is 1, the table's is 32",
        f"device_name is {device_name('cpu')!r}, the table's is 'a processor'",
        "img_size is [64, 64], the table's is [32, 32]",
        "num_classes is 7, the table's is 10",
    ):
        assert part in str(error.value)
    with pytest.raises(LatencyError, match="patch embedding"):
        table.check(SearchSpace.preset("mini", img_size=32, patch_size=4, num_classes=10))
    with pytest.raises(TypeError, match="unknown condition 'speed'"):
        table.check(MICRO, speed=3)


def test_a_wider_space_does_not_fit():
    data = MICRO.to_dict()
    data["network_def"][1][2][1] = 208
    data["num_channels_to_keep"][1]["mlp"][0] = 208
    with pytest.raises(LatencyError, match="mlp_hidden 208"):
        table_of(MICRO).check(SearchSpace.from_dict(data))
    # a budget of such a space is refused before anything is drawn
    with pytest.raises(LatencyError, match="mlp_hidden 208"):
        SearchSpace.from_dict(data).sample_many(
            3, np.random.default_rng(0), Budget(latency_ms=1), table_of(MICRO).costs
        )


def test_another_device_is_refused():
    with pytest.raises(LatencyError, match="'a processor'"):
        Meter(MICRO, SETTING)
    with pytest.raises(LatencyError, match="device_name"):
        measure_network(MICRO.smallest, MICRO, table_of(MICRO))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(precision="int8"), "unknown precision 'int8'; known: float32"),
        (dict(batch_size=0), "batch_size must be an integer of at least 1"),
        (dict(num_threads=None), "num_threads"),
        (dict(device="mps"), "cpu or cuda"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(LatencyError, match=message):
        Setting(**{**vars(SETTING), **change})


# -- files ------------------------------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path):
    table = table_of(MICRO, overhead_ms=0.25, scale=1.03, notes={"rounds": 3, "networks": [{"ms": 1}, {"ms": 2}]})
    table.save(tmp_path / "latency.json")
    assert [p.name for p in tmp_path.iterdir()] == ["latency.json"]
    again = LatencyTable.load(tmp_path / "latency.json")
    assert again.to_json() == table.to_json() and again.pieces == table.pieces and again.notes == table.notes
    assert again.setting == table.setting and again.model_args == table.model_args
    for arch in MICRO.sample_many(20, np.random.default_rng(0)):
        assert again.predict(arch) == table.predict(arch)
    # readable: one line for each piece, under the names of the field
    lines = [line for line in table.to_json().splitlines() if '"piece": "attn"' in line]
    assert len(lines) == sum(p.kind == "attn" for p in table.pieces)
    assert set(json.loads(lines[0].strip().rstrip(","))) == {
        *("piece", "stage", "embed_dim", "num_heads", "head_dim", "ms", "iqr", "samples")
    }


def _damage(change) -> str:
    data = json.loads(table_of(MICRO).to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "no JSON"),
        ("[]", "got 'list'"),
        ('{"format": "other"}', "got 'other'"),
        (_damage(lambda d: d.pop("setting")), "setting"),
        (_damage(lambda d: d["setting"].pop("torch")), "setting must have"),
        (_damage(lambda d: d["pieces"].pop()), "is missing|does not hold"),
        (_damage(lambda d: d["pieces"][3].update(ms=-1)), "piece 3: ms must be"),
        (_damage(lambda d: d["pieces"][3].update(ms=math.nan)), "piece 3: ms must be"),
        (_damage(lambda d: d["pieces"][0].update(piece="tail")), "piece 0 must be a dict with piece one of"),
        (_damage(lambda d: d["pieces"][9].update(embed_dim="wide")), "embed_dim must be an integer"),
        (_damage(lambda d: d.update(scale=0)), "scale must be"),
        (_damage(lambda d: d.update(overhead_ms="x")), "damaged"),
        (_damage(lambda d: d.update(stem=4)), "damaged"),
        (_damage(lambda d: d.update(pieces=7)), "damaged"),
    ],
)
def test_damaged_files_are_told(text, message, tmp_path):
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(LatencyError, match=message) as error:
        LatencyTable.load(path).check(MICRO)
    if "does not hold" not in str(error.value):
        assert str(error.value).startswith(str(path))
    with pytest.raises(LatencyError, match="No such file"):
        LatencyTable.load(tmp_path / "none.json")


# -- measuring for real: structure, not speed -------------------------------------------------------------------------


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_precisions(precision):
    """Weights, images and autocast that each name means; nothing is computed, for a CPU may not have the type."""
    setting = Setting.here(batch_size=2, num_threads=1, precision=precision)
    net = Meter(tiny_space(), setting).network(tiny_space().largest)
    seen = {}

    def run(mark):
        mark()
        seen.update(
            amp=torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
            inference=torch.is_inference_mode_enabled(),
            threads=torch.get_num_threads(),
        )
        mark()

    ms, _ = _stamps(run, 3, 2, setting)
    assert ms.shape == (3, 1)
    amp, own = PRECISIONS[precision]
    assert seen == {"amp": amp, "inference": True, "threads": 1}
    assert {t.dtype for t in net.state_dict().values() if t.is_floating_point()} == {own}
    assert _images(net, setting).dtype is own and _images(net, setting).shape == (2, 3, 16, 16)


def test_a_real_table(tmp_path):
    space = tiny_space()
    setting = Setting.here(batch_size=2, num_threads=1)
    meter = Meter(space, setting, min_run_time=0)
    jobs = LatencyTable.jobs(space, calibration=3)
    threads = torch.get_num_threads()
    table = LatencyTable.from_records(space, setting, jobs, run_rounds(meter, jobs, 2))
    assert torch.get_num_threads() == threads and torch.is_grad_enabled()
    assert set(table.pieces) == set(_all_pieces(space))
    assert all(p["ms"] > 0 and p["iqr"] >= 0 and p["samples"] >= 2 for p in table.pieces.values())
    assert len(table.notes["calibration"]) >= 2 and table.notes["rounds"] == 2
    assert 0 <= table.notes["waited"] <= 1
    table.check(space, device="cpu", num_threads=1, batch_size=2, precision="float32")
    table.save(tmp_path / "latency.json")
    found = measure_network(space.smallest, space, LatencyTable.load(tmp_path / "latency.json"), rounds=2)
    assert set(found) == {"ms", "median_ms", "iqr"} and 0 < found["ms"] <= found["median_ms"] and found["iqr"] >= 0
    assert json.loads(json.dumps(found)) == found


def test_stamps_measure_what_runs():
    """A sleep inside a piece is found in that piece and in the whole."""
    import time

    space = tiny_space()
    meter = Meter(space, Setting.here(batch_size=1, num_threads=1), min_run_time=0)
    net = meter.network(space.largest)
    pause = net.blocks[1].register_forward_hook(lambda *_: time.sleep(0.05))
    assert isinstance(space.largest.blocks[1], Reduction)
    pieces = meter.pieces(space.largest).min(axis=0)
    where = [p.kind for p in pieces_of(space.largest)].index("reduction")
    assert pieces[where] >= 50 and min(meter.total(space.largest)) >= 50
    assert meter.waited > 0  # asleep is not computing
    pause.remove()


def test_measure_any_timm_model():
    net = timm_resnas.models.vit_resnas.VitResNas(tiny_space().largest, img_size=16, patch_size=4).train()
    found = measure(net, Setting.here(batch_size=2, num_threads=1), rounds=3, min_run_time=0)
    assert found["ms"] > 0 and not net.training


# -- the recipe -------------------------------------------------------------------------------------------------------


def test_recipe_measures_verifies_and_resumes(tmp_path, capsys):
    from latency import main

    space = tmp_path / "space.json"
    space.write_text(json.dumps(tiny_space().to_dict()))
    command = ["--space", str(space), "--output", str(tmp_path / "t.json"), "--rounds", "2", "--min-run-time", "0"]
    command += ["--batch-size", "2", "--calibration", "3", "--verify", "4"]
    main(command)
    said = capsys.readouterr().out
    assert "| table |" in said and "| proportional to MACs |" in said
    table = LatencyTable.load(tmp_path / "t.json")
    table.check(tiny_space(), num_threads=1, batch_size=2)
    found = table.notes["verification"]
    assert set(found["results"]) == {*("table", "table, drift taken out", "proportional to MACs", "linear in MACs")}
    for network in found["networks"]:
        assert table.predict(Arch.from_network_def(network["network_def"])) == network["predicted_ms"]
    known = {str(n["network_def"]) for n in table.notes["calibration"]}
    assert found["networks"] and not known & {str(n["network_def"]) for n in found["networks"]}
    assert (tmp_path / "t.png").stat().st_size > 5000
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
    names = [[(r["job"], r["round"]) for r in map(json.loads, rows[1:])] for rows in (lines, mended)]
    assert names[0] == names[1]

    # all is measured: the same table again
    text = (tmp_path / "t.json").read_text()
    main(command)
    assert (tmp_path / "t.json").read_text() == text and records.read_bytes() == b"".join(mended)

    for option, value in (("--batch-size", "3"), ("--rounds", "0"), ("--space", "huge")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([*command, option, value])
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1 and "error" in said
    assert records.read_bytes() == b"".join(mended)


def test_comparison_by_hand():
    from latency import compare, ranks

    assert ranks(np.array([3.0, 1.0, 3.0, 9.0])).tolist() == [1.5, 0, 1.5, 3]
    found = compare(np.array([1.0, 2.2, 2.7]), np.array([1.0, 2.0, 3.0]))
    assert found == pytest.approx({"median_error": 0.1, "max_error": 0.1, "rank_correlation": 1.0})
    assert compare(np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 3.0]))["rank_correlation"] == pytest.approx(-1)
