"""Search for a front: NSGA-II survival against brute force, known fronts, exact resuming, NSGA-II's own operators."""

import argparse
import itertools
import json
import random
import sys

import numpy as np
import pytest
import timm
import torch

pytest.importorskip("pymoo")

from test_evolution import every_network, separable_score, small_space, toy_score

from recipes import benchmark_pareto
from timm_resnas.arch import Arch
from timm_resnas.data import load_splits, split_record
from timm_resnas.families.vit_resnas import VitResNasSpace
from timm_resnas.hub import save_pretrained
from timm_resnas.models.network_def import Block
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.evolution import EvolutionSearch
from timm_resnas.nas.pareto import ParetoSearch, budget_violation, survivors
from timm_resnas.nas.space import BudgetError, SearchSpace

pytestmark = pytest.mark.oldest

MICRO = SearchSpace.preset("micro")
SMALL = dict(population=20, iterations=4, parents=10, mutations=8, crossovers=7)
BOTH = ("macs", "params")


def run(search, score=toy_score):
    while not search.done:
        search.tell([(arch, score(arch)) for arch in search.ask()])
    return search


def saturating_score(seed: int):
    """Like accuracy: more is better, less and less so, each layer with its own importance; of 500 images."""
    weights = np.random.default_rng(seed).lognormal(size=(len(MICRO.largest.blocks) + 1, 2))

    def quality(arch: Arch) -> float:
        total = weights[0, 0] * arch.patch_embed.dim / 16
        for i, (block, largest) in enumerate(zip(arch.blocks, MICRO.largest.blocks, strict=True), start=1):
            if not isinstance(block, Block):
                total += 4 * weights[i, 0] * (block.out_dim / largest.out_dim) ** 0.5
            elif block.exists:
                total += 1 + weights[i, 0] * (block.num_heads / largest.num_heads) ** 0.5
                total += weights[i, 1] * (block.mlp_hidden / largest.mlp_hidden) ** 0.5
        return total

    low, high = quality(MICRO.smallest), quality(MICRO.largest)
    return lambda arch: round(485 - 330 * np.exp(-4 * (quality(arch) - low) / (high - low)))


def beats(a, b) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


def brute_ranks(values) -> list[int]:
    """Number of the front of each row, by taking fronts away one after the other."""
    ranks, left, front = [-1] * len(values), set(range(len(values))), 0
    while left:
        members = {i for i in left if not any(beats(values[j], values[i]) for j in left)}
        for i in members:
            ranks[i] = front
        left, front = left - members, front + 1
    return ranks


def brute_volume(points) -> float:
    """Volume that points (0 best, 1 worst) dominate within the unit cube: cells of the grid through them, added up."""
    points = [p for p in points if max(p) < 1]
    axes = [np.array(sorted({0.0, 1.0, *column})) for column in zip(*points, strict=True)]
    covered = np.zeros([len(axis) - 1 for axis in axes])
    for point in points:
        covered[tuple(slice(np.searchsorted(axis, x), None) for axis, x in zip(axes, point, strict=True))] = 1
    for axis in reversed(axes):
        covered = covered @ np.diff(axis)
    return float(covered)


# -- survival ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_objectives", [2, 3, 4])
def test_sorting_against_brute_force(num_objectives):
    rng = np.random.default_rng(num_objectives)
    for _ in range(20):
        values = rng.integers(0, 6, size=(40, num_objectives)).astype(float)  # many ties and copies
        ranks = brute_ranks(values)
        for n in (1, 7, 25, 40, 60):
            chosen = survivors(values, n)
            assert len(set(chosen.tolist())) == len(chosen) == min(n, 40)
            assert [ranks[i] for i in chosen] == sorted(ranks)[:n]


def test_survivors_are_pymoos():
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

    values = np.random.default_rng(0).random((60, 3))
    problem, population = Problem(n_var=1, n_obj=3), Population.new("F", values)
    RankAndCrowding().do(problem, population, n_survive=60, random_state=np.random.default_rng(1))
    all_places = [(p.get("rank"), -p.get("crowding")) for p in population]
    for n in (1, 12, 20, 30, 60):
        kept = RankAndCrowding().do(problem, population, n_survive=n, random_state=np.random.default_rng(1))
        places = [all_places[i] for i in survivors(values, n)]
        # sets of networks may differ where distances are infinite, and pymoo chooses at random
        assert places == sorted(all_places)[:n]
        assert places == sorted((p.get("rank"), -p.get("crowding")) for p in kept)


def test_crowding_of_a_hand_made_set():
    # a front of five, its ends infinitely far; distances 4/4, 3/4 + 3/4 ..., and one network behind
    values = np.array([[0, 8], [1, 6], [2, 5], [4, 4], [8, 0], [8, 8]], float)
    # (last - next) / range, summed over both: index 1 is 2/8 + 3/8, 2 is 3/8 + 2/8, 3 is 6/8 + 5/8
    assert survivors(values, 6).tolist() == [0, 4, 3, 1, 2, 5]
    assert survivors(values, 3).tolist() == [0, 4, 3]
    assert survivors(values[::-1], 6).tolist() == [1, 5, 2, 3, 4, 0]  # ties by order
    assert survivors(np.ones((4, 2)), 2).tolist() == [0, 1]


def test_feasible_first():
    values = np.array([[0, 0], [5, 5], [1, 1], [6, 6], [2, 2]], float)
    violation = np.array([0.5, 0, 0.1, 0, 0.1])
    assert survivors(values, 5, violation).tolist() == [1, 3, 2, 4, 0]
    assert survivors(values, 1, violation).tolist() == [1]
    assert survivors(values, 2, np.ones(5)).tolist() == [0, 1]
    budget = Budget(macs=100, params=50, lower=0.9)
    assert budget_violation(budget, dict(macs=95, params=50)) == 0
    assert budget_violation(budget, dict(macs=110, params=75)) == pytest.approx(0.1 + 0.5)
    assert budget_violation(budget, dict(macs=80, params=10)) == pytest.approx(0.1)
    assert budget_violation(None, {}) == 0


# -- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objectives", [("macs",), ("params", "macs"), ("macs", "params", "memory")])
def test_front_and_hypervolume_against_brute_force(objectives):
    search = ParetoSearch(MICRO, None, 0, objectives=objectives, max_score=500, **SMALL)
    run(search, saturating_score(0))
    rows = [(-r["score"], *(r[n] for n in objectives)) for r in search.history]
    best = {row for row in rows if not any(beats(other, row) for other in rows)}
    front = search.front()
    assert [(-r["score"], *(r[n] for n in objectives)) for r in front] == sorted(best, key=lambda v: (v[1:], v[0]))
    assert all(r in search.history for r in front) and len(front) > 3

    largest = MICRO.costs(MICRO.largest)
    for generation, volume in enumerate(search.hypervolumes):
        records = [r for r in search.history if r["generation"] <= generation]
        points = {(1 - r["score"] / 500, *(r[n] / largest[n] for n in objectives)) for r in records}
        assert volume == pytest.approx(brute_volume(points), rel=1e-9)
    assert len(search.hypervolumes) == 4 and search.hypervolumes == sorted(search.hypervolumes)
    assert search.hypervolume() == search.hypervolumes[-1] < 1

    reference = {"score": 100, objectives[0]: 0.5 * largest[objectives[0]]}
    worst = [0.5 * largest[objectives[0]], *(largest[n] for n in objectives[1:])]
    points = {
        ((500 - r["score"]) / 400, *(r[n] / w for n, w in zip(objectives, worst, strict=True))) for r in search.history
    }
    assert search.hypervolume(reference) == pytest.approx(brute_volume(points), rel=1e-9)
    with pytest.raises(ValueError, match="names latency_ms; the objectives are score, "):
        search.hypervolume({"latency_ms": 3})
    with pytest.raises(ValueError, match="must be worse than score 500"):
        search.hypervolume({"score": 500})


def test_front_of_an_edited_history():
    search = ParetoSearch(MICRO, Budget(macs=20_000_000), 0, objectives=("params",), **SMALL)
    search.tell([(arch, 1) for arch in search.ask()])
    a, b, c = search.history[:3]
    a.update(score=9, params=10, macs=700)
    b.update(score=9, params=10, macs=600)  # equal in objectives: the cheaper one stands for both
    c.update(score=99, params=1, macs=20_000_001)  # the best, but out of budget
    assert search.front() == [b]


def test_networks_beyond_the_reference_add_nothing():
    search = ParetoSearch(MICRO, None, 0, max_score=500, **SMALL)
    assert search.hypervolume() == 0 and search.hypervolumes == [] and search.front() == []
    search.tell([(arch, 500) for arch in search.ask()])
    least = min(r["macs"] for r in search.history)
    assert [r["macs"] for r in search.front()] == [least]
    assert search.hypervolume({"macs": least}) == search.hypervolume({"macs": least // 2}) == 0
    assert search.hypervolume({"macs": 4 * least}) == pytest.approx(0.75)


def test_reaches_the_known_front():
    space = small_space()
    costs = {a: space.costs(a)["macs"] for a in every_network(space)}
    for seed in range(3):
        score = separable_score(seed)
        rows = sorted((cost, -score(a)) for a, cost in costs.items())
        lowest = itertools.accumulate((1, *(s for _, s in rows)), min)
        best = [row for row, before in zip(rows, lowest, strict=False) if row[1] < before]
        search = ParetoSearch(space, None, seed, population=60, iterations=25, parents=30, mutations=20, crossovers=20)
        run(search, score)
        assert len(search.history) == 60 + 24 * 40 < 0.1 * len(costs)
        found = [(r["macs"], -r["score"]) for r in search.front()]
        assert len(best) >= 20 and found == best


def test_better_than_the_default_operators():
    names, args = ["macs", "params"], argparse.Namespace(objectives=["macs", "params"], evaluations=300)
    args.population, args.children = 100, 50
    for seed in range(3):
        score = saturating_score(seed)
        volumes = []
        for method, *more in ((benchmark_pareto.ours,), (benchmark_pareto.nsga2, 100), (benchmark_pareto.nsga2, 50)):
            archs = method(MICRO, lambda many, score=score: [score(a) for a in many], seed, args, *more)
            assert len(archs) == 300
            values = benchmark_pareto.objectives(MICRO, archs, [score(a) for a in archs], names)
            volumes.append(benchmark_pareto.hypervolume(values, MICRO, names, 500))
        assert volumes[0] > 1.02 * max(volumes[1:])


def test_benchmark_of_a_run(tmp_path, capsys):
    torch.manual_seed(0)
    net = timm.create_model("vit_resnas_supernet", space="micro")
    save_pretrained(net, tmp_path / "supernet", info={"space": MICRO.to_dict()})
    (tmp_path / "config.yaml").write_text("dataset: digits\n")
    (tmp_path / "state").mkdir()
    splits = load_splits("digits")
    val = list(range(20))
    record = split_record(splits.train, range(20, len(splits.train)), val)
    (tmp_path / "state" / "data.json").write_text(json.dumps(record))
    command = [str(tmp_path), "--evaluations", "12", "--population", "8", "--children", "4", "--seeds", "1"]
    benchmark_pareto.main([*command, "--json", str(tmp_path / "first.json")])
    assert "20 validation images" in capsys.readouterr().out
    benchmark_pareto.main([*command, "--json", str(tmp_path / "second.json")])
    out = capsys.readouterr().out
    assert out.count(" 0 networks scored") == 3 and "| ours |" in out
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first == second and first["distinct"]["ours"] == [12]
    assert set(first["hypervolumes"]) == {"ours", "NSGA-II, population 12", "NSGA-II, population 4"}
    for command_end, message in (
        (["--objectives", "flops"], "must be of macs"),
        (["--children", "5"], "a multiple of"),
    ):
        with pytest.raises(SystemExit):
            benchmark_pareto.main([*command, *command_end])
        assert message in capsys.readouterr().err


# -- generations ------------------------------------------------------------------------------------------------------


def test_history():
    budget = Budget(params=700_000, macs=14_000_000)
    search = run(ParetoSearch(MICRO, budget, 0, objectives=BOTH, **SMALL))
    history = search.history
    assert json.loads(json.dumps(history)) == history
    assert [r["generation"] for r in history] == [0] * 20 + [1] * 15 + [2] * 15 + [3] * 15
    assert [r["origin"] for r in history] == ["initial"] * 20 + (["mutation"] * 8 + ["crossover"] * 7) * 3
    assert len({r["key"] for r in history}) == len(history)
    for record in history:
        arch = Arch.from_record(record)
        assert record["key"] == arch.key() and record["score"] == toy_score(arch)
        assert {**MICRO.costs(arch), **record} == record
        assert record["params"] <= 700_000 and record["macs"] <= 14_000_000
    # no lower band
    assert min(r["params"] for r in history) == MICRO.costs(MICRO.smallest)["params"]
    evolution = run(EvolutionSearch(MICRO, Budget(macs=14_000_000), 0, **SMALL))
    assert set(evolution.history[0]) == set(history[0])
    assert search.batch == evolution.batch == 15


@pytest.mark.parametrize("budget", [None, Budget(macs=10_000_000), Budget(params=700_000, memory=120_000)])
def test_first_generation_covers_the_range(budget):
    search = ParetoSearch(MICRO, budget, 0, population=80)
    asked = search.ask()
    macs = np.sort([MICRO.costs(a)["macs"] for a in asked])
    pool = MICRO.sample_many(4000, np.random.default_rng(0))
    most = max(MICRO.costs(a)["macs"] for a in [MICRO.largest, *pool] if budget is None or within(budget, a))
    assert len({a.key() for a in asked}) == 80
    assert macs[0] == MICRO.costs(MICRO.smallest)["macs"] and macs[-1] >= 0.85 * most
    if budget is None:
        assert macs[-1] == MICRO.costs(MICRO.largest)["macs"]
    # even in ratios: no gap is many times the mean one
    gaps = np.diff(np.log(macs))
    if budget is None or len(list(budget)) == 1:
        assert gaps.max() < 6 * gaps.mean()
    if budget is None:
        independent = np.diff(np.log(np.sort([MICRO.costs(a)["macs"] for a in pool[:80]])))
        assert len(independent) == 79 and independent.sum() < 0.7 * gaps.sum()


def within(budget: Budget, arch: Arch) -> bool:
    return all(MICRO.costs(arch)[name] <= limit for name, limit in budget)


def test_children_come_from_survivors_and_differ_little(monkeypatch):
    search = ParetoSearch(MICRO, None, 1, objectives=BOTH, **{**SMALL, "population": 60})
    score = saturating_score(1)
    search.tell([(arch, score(arch)) for arch in search.ask()])
    values = np.array([[-r["score"], r["macs"], r["params"]] for r in search.history], float)
    kept = [search.history[i]["key"] for i in survivors(values, 10)]
    parents = []
    for name in ("mutate_many", "crossover_many"):
        original = getattr(MICRO, name)
        monkeypatch.setattr(MICRO, name, lambda p, *a, f=original: parents.extend(p) or f(p, *a))
    children = search.ask()
    counts = [sum(p.key() == key for p in parents) for key in kept]
    assert sum(counts) == len(parents) > 15
    assert sum(counts[:5]) > 1.5 * sum(counts[5:])  # the tournaments' odds are 3 to 1
    assert search.mutation_prob == pytest.approx(2 / len(MICRO.searched))
    assert {a.key() for a in children}.isdisjoint(r["key"] for r in search.history)


def test_same_seed_same_history_and_no_global_randomness():
    random.seed(0)
    np.random.seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist()
    plain = run(ParetoSearch(MICRO, None, 3, objectives=BOTH, **SMALL))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    np.random.seed(1)
    shuffled = ParetoSearch(MICRO, None, 3, objectives=BOTH, **SMALL)
    rng = np.random.default_rng(0)
    while not shuffled.done:
        asked = shuffled.ask()
        shuffled.tell([(asked[i], np.int64(toy_score(asked[i]))) for i in rng.permutation(len(asked))[:5]])
    assert shuffled.history == plain.history and shuffled.front() == plain.front()
    assert run(ParetoSearch(MICRO, None, 4, objectives=BOTH, **SMALL)).history != plain.history


def test_resume_at_every_point():
    arguments = dict(budget=Budget(macs=15_000_000), seed=7, objectives=BOTH, max_score=1000, **SMALL)
    plain = run(ParetoSearch(MICRO, **arguments))
    search = ParetoSearch(MICRO, **arguments)
    for _ in range(len(plain.history)):
        for before_done in (True, False):
            # also between a complete generation and the drawing of the next
            text = json.dumps(search.state_dict())
            search = ParetoSearch(MICRO, **arguments)
            search.load_state_dict(json.loads(text))
            if before_done and search.done:
                assert search.history == plain.history
                assert search.hypervolumes == plain.hypervolumes and search.front() == plain.front()
                return
        search.tell([(a, toy_score(a)) for a in search.ask()[:4]])
    pytest.fail("the resumed search does not end")


@pytest.mark.parametrize("change", [dict(objectives=("params",)), dict(mutation_prob=0.3), dict(lower=0.5)])
def test_state_of_another_search(change):
    arguments = dict(budget=Budget(macs=20_000_000), objectives=BOTH, **SMALL)
    state = ParetoSearch(MICRO, **arguments).state_dict()
    with pytest.raises(ValueError, match="the state belongs to another search"):
        ParetoSearch(MICRO, **{**arguments, **change}).load_state_dict(state)
    with pytest.raises(ValueError, match="not the state of a search of kind 'evolution'"):
        EvolutionSearch(MICRO).load_state_dict(state)


# -- ends and errors --------------------------------------------------------------------------------------------------


def test_exhausted_space():
    space = small_space(widths=(16,))
    budget = Budget(macs=int(0.45 * space.costs(space.largest)["macs"]))
    inside = {a.key() for a in every_network(space) if space.costs(a)["macs"] <= dict(budget)["macs"]}
    assert 50 < len(inside) < 500
    search = run(ParetoSearch(space, budget, 0, population=60, iterations=40, mutations=30, crossovers=30))
    assert search.done and search.generation < 40
    keys = [r["key"] for r in search.history]
    assert len(keys) == len(set(keys)) and set(keys) <= inside and len(keys) > 0.97 * len(inside)
    assert "random" in {r["origin"] for r in search.history}


def test_budget_that_the_generator_misses(monkeypatch):
    # the networks found by the spread are kept when random ones are not found
    def fail(*args):
        raise BudgetError("none found")

    space = small_space(widths=(16,))
    monkeypatch.setattr(space, "sample_many", fail)
    budget = Budget(macs=int(1.05 * space.costs(space.smallest)["macs"]))
    search = run(ParetoSearch(space, budget, 0, population=60, iterations=5, mutations=10, crossovers=10))
    assert search.done and search.history[0]["macs"] == space.costs(space.smallest)["macs"]
    band = Budget(macs=space.costs(space.largest)["macs"] - 1)
    with pytest.raises(BudgetError, match="none found"):
        ParetoSearch(space, band, 0, lower=0.999999).ask()


def test_a_single_network():
    network_def = ((0, 16), (1, (16, 2, 8), (16, 32), 1), (2, 16, 5))
    space = VitResNasSpace(network_def, [[16], dict(attn=[16], mlp=[32], layer=None), None], img_size=16, patch_size=4)
    search = run(ParetoSearch(space, None, 0, max_score=100), lambda arch: 60)
    assert len(search.history) == len(search.front()) == 1
    assert search.hypervolume() == 0 and search.hypervolume({"macs": 2 * search.history[0]["macs"]}) == 0.3


def test_all_scores_equal():
    search = run(ParetoSearch(MICRO, None, 0, objectives=BOTH, max_score=2, **SMALL), lambda arch: 1)
    assert len(search.history) == 65
    smallest = MICRO.costs(MICRO.smallest)
    assert [(r["macs"], r["params"]) for r in search.front()] == [(smallest["macs"], smallest["params"])]


def test_latency_objective_and_budget():
    space = SearchSpace.preset("micro")
    space.price("latency_ms", lambda layer: 1000 * dict(layer.shape).get("hidden", 0), unit=10**6, base=10**5)
    budget = Budget(latency_ms=2.0, macs=14_000_000)
    search = run(ParetoSearch(space, budget, 0, objectives=("macs", "latency_ms"), **SMALL))
    assert len(search.history) == 65
    for record in search.history:
        blocks = [b for b in Arch.from_record(record).blocks if isinstance(b, Block) and b.exists]
        assert record["latency_ms"] == pytest.approx(0.1 + 1e-3 * sum(b.mlp_hidden for b in blocks), rel=1e-12)
        assert record["latency_ms"] <= 2
        assert record["macs"] <= 14_000_000
    assert search.front() == sorted(search.front(), key=lambda r: (r["macs"], r["latency_ms"]))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(objectives=()), "needs a cost beside the score; name one or more of macs, params, memory"),
        (dict(objectives=("flops",)), "unknown objective 'flops'; known costs: macs, params, memory"),
        (dict(objectives=("score", "macs")), "unknown objective 'score'.*the score is always an objective"),
        (dict(objectives=("latency_ms",)), "latency_ms is measured; price it from a latency table"),
        (dict(objectives=("macs", "macs")), "named twice: macs, macs"),
        (dict(parents=0), "parents must be an integer of at least 1, got 0"),
        (dict(mutations=-1), "mutations must be an integer of at least 0"),
        (dict(mutation_prob=0), "mutation_prob must be above 0"),
        (dict(max_score=0), "max_score must be a finite number above 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ParetoSearch(MICRO, **settings)


def test_budget_out_of_reach():
    with pytest.raises(BudgetError, match="below the smallest"):
        ParetoSearch(MICRO, Budget(macs=1_000_000))
    ParetoSearch(MICRO, Budget(macs=10**12))  # limits nothing, which is no error without a band
    with pytest.raises(BudgetError, match="no price for latency_ms"):
        ParetoSearch(MICRO, Budget(latency_ms=3))


def test_without_pymoo(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymoo.indicators.hv", None)
    with pytest.raises(ImportError, match=r"needs pymoo .*pip install 'timm_resnas\[search\]'"):
        ParetoSearch(MICRO)
