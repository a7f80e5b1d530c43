"""Slimming: the greedy chain against a slow version, its actions on every family, exact resuming."""

import json

import numpy as np
import plain_vit  # noqa: F401 - another family's space
import pytest
import timm
from test_evolution import every_network, run, separable_score, small_space, toy_score

from timm_resnas.families.elastic import elastic
from timm_resnas.families.elastic_space import ElasticSpace
from timm_resnas.families.elastic_tokens import with_tokens
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.slimming import MES, Slimming, mobile_efficiency
from timm_resnas.nas.space import BudgetError, SearchSpace


def spaces():
    return {
        "vit_resnas": SearchSpace.preset("micro"),
        "autoformer": SearchSpace.preset("autoformer_micro"),
        "plain_vit": SearchSpace.preset("plain_vit"),
        "elastic": ElasticSpace("test_vit", img_size=32, num_classes=10),
        "tokens": with_tokens(elastic(timm.create_model("test_vit", img_size=64, patch_size=8)), [1, 0.8, 0.6]).space,
        "efficientformer": SearchSpace.preset("efficientformer_micro"),
        "efficientformerv2": SearchSpace.preset("efficientformerv2_micro"),
    }


def with_gene(space, row, gene, choice):
    row = row.copy()
    row[gene] = choice
    return space.normalise(row[None])[0]


def hashed(arch):
    return sum(arch.key().encode()) * 7919 % 1000


def neighbours(space, arch, archs):
    """Of all networks those that have one of this one's genes at the next smaller choice, and what follows from it."""
    row, wanted = space.encode(arch), set()
    for g, gene in enumerate(space.genes):
        if row[g] + 1 < len(gene.choices):
            stepped = row.copy()
            stepped[g] += 1
            wanted.add(space.decode(space.normalise(stepped[None]))[0].key())
    return [other for other in archs if other.key() in wanted and other != arch]


@pytest.mark.parametrize("seed", range(3))
def test_the_chain_is_that_of_a_slow_greedy_search(seed):
    """All single actions by comparing every network of the space with the state."""
    space, score = small_space(widths=(16,)), separable_score(seed)
    archs, limit = every_network(space), 0.5 * space.costs(space.largest)["macs"]
    seen = {space.largest.key()}
    search = run(Slimming(space, Budget(macs=int(limit)), step=0), score)
    state, chain = space.largest, [space.largest]
    while space.costs(state)["macs"] > limit:
        best = None
        for other in neighbours(space, state, archs):
            seen.add(other.key())
            gain = space.costs(state)["macs"] - space.costs(other)["macs"]
            rank = ((score(state) - score(other)) / gain, -gain, other.key())
            best = min(best, (rank, other), key=lambda b: b[0]) if best else (rank, other)
        state = best[1]
        chain.append(state)
    assert [r["key"] for r in search.chain()] == [arch.key() for arch in chain] and len(chain) > 8
    assert len(search.history) == len(seen) and {r["key"] for r in search.history} == seen
    assert search.best["score"] >= search.chain()[-1]["score"] and search.best["macs"] <= limit


@pytest.mark.parametrize("family", spaces())
def test_steps_of_every_family(family):
    space = spaces()[family]
    low, high = space.cost_range("macs")
    budget = Budget(macs=int(0.4 * low + 0.6 * high))
    search = Slimming(space, budget, step=0.03)
    start = high
    while not search.done:
        state = search.chain()[-1] if search.history else None
        asked = search.ask()
        if state is not None:
            row = space.encode(search.archs[state["key"]])
            for arch in asked:
                after = space.encode(arch)
                # one gene, and what follows from it, such as blocks after an absent one
                stepped = [
                    g for g in np.flatnonzero(after > row) if (with_gene(space, row, g, after[g]) == after).all()
                ]
                gain = state["macs"] - space.costs(arch)["macs"]
                assert stepped and gain > 0
                g = stepped[0]
                enough = min(0.03 * start, state["macs"] - budget.limits["macs"])
                if after[g] > row[g] + 1:  # not the next choice: that one would gain too little
                    less = space.decode(with_gene(space, row, g, after[g] - 1)[None])[0]
                    assert state["macs"] - space.costs(less)["macs"] < enough
                if gain < enough:
                    assert after[g] == len(space.genes[g].choices) - 1
        search.tell([(arch, hashed(arch)) for arch in asked])
    chain = search.chain()
    costs = [r["macs"] for r in chain]
    assert chain[0]["key"] == space.largest.key() and costs == sorted(costs, reverse=True)
    assert costs[-1] <= budget.limits["macs"] < costs[-2]
    assert len({r["key"] for r in search.history}) == len(search.history)
    for before, after in zip(chain, chain[1:], strict=False):
        rivals = [r for r in search.history if r["generation"] == chain.index(before) and r["origin"] == "action"]
        rates = {r["key"]: (before["score"] - r["score"]) / (before["macs"] - r["macs"]) for r in rivals}
        assert rates[after["key"]] == min(rates.values())


def test_mobile_efficiency():
    """The published sizes and latencies; spec of EfficientFormerV2."""
    nets = {(3.5, 0.9): 102.9, (6.1, 1.1): 63.8, (12.6, 1.6): 30.5, (26.1, 2.7): 12.6, (3.5, 1.0): 92.6}
    for (millions, ms), expected in nets.items():
        assert mobile_efficiency({"params": millions * 1e6, "latency_ms": ms}) == pytest.approx(expected, abs=0.05)
    assert mobile_efficiency({"macs": 4.0}, {"macs": (1.0, 0.5)}) == pytest.approx(50)


def priced():
    space = SearchSpace.preset("micro")
    space.price("latency_ms", lambda layer: 1000 + 50 * dict(layer.shape).get("hidden", 0) ** 2, unit=10**6)
    return space


def test_the_gain_in_size_and_latency_together():
    space = priced()
    budget = Budget(params=int(0.6 * space.costs(space.largest)["params"]))
    search = run(Slimming(space, budget, gain="mes", step=0.05), hashed)
    chain = search.chain()
    for step, (before, after) in enumerate(zip(chain, chain[1:], strict=False)):
        rates = {
            r["key"]: (before["score"] - r["score"]) / (mobile_efficiency(r) - mobile_efficiency(before))
            for r in search.history
            if r["generation"] == step and r["origin"] == "action"
        }
        assert rates[after["key"]] == min(rates.values())
    by_size = run(Slimming(space, budget, step=0.05), hashed)
    assert [r["key"] for r in by_size.chain()] != [r["key"] for r in chain]
    # units do not matter, so that any device's latencies can be set against any size
    scaled = {name: (7 * unit, exponent) for name, (unit, exponent) in MES.items()}
    ratios = {round(mobile_efficiency(r, scaled) / mobile_efficiency(r), 12) for r in search.history}
    assert len(ratios) == 1


def test_latency_falls_along_the_chain():
    space = priced()
    search = run(Slimming(space, Budget(latency_ms=0.5 * space.costs(space.largest)["latency_ms"])), hashed)
    latency = [r["latency_ms"] for r in search.chain()]
    assert len(latency) > 5 and all(a > b for a, b in zip(latency, latency[1:], strict=False))


def test_limits_are_met_one_after_the_other():
    space = ElasticSpace("test_vit", img_size=32, num_classes=10)
    full = space.costs(space.largest)
    budget = Budget(memory=int(0.8 * full["memory"]), params=int(0.5 * full["params"]))
    search = run(Slimming(space, budget, step=0.05), hashed)
    chain = search.chain()
    assert not Budget(lower=0, **budget.limits).check(chain[-1]) and search.best["score"] >= chain[-1]["score"]
    holds = [r["memory"] <= budget.limits["memory"] for r in chain]
    first = holds.index(True)
    assert first > 0 and all(holds[first:])
    # blocks share the peak at first: no single step lowers it, and steps gain MACs
    assert chain[1]["memory"] == chain[0]["memory"] and chain[1]["macs"] < chain[0]["macs"]


def test_without_a_budget_the_chain_ends_at_the_smallest_network():
    space = SearchSpace.preset("micro")
    search = run(Slimming(space, step=0.1), hashed)
    chain = search.chain()
    assert chain[-1]["macs"] == space.cost_range("macs")[0] and search.best["score"] == max(
        r["score"] for r in search.history
    )


def test_several_steps_at_once():
    space = ElasticSpace("test_vit", img_size=32, num_classes=10)
    budget = Budget(macs=int(0.5 * space.costs(space.largest)["macs"]))
    single, double = (run(Slimming(space, budget, step=0, together=n), hashed) for n in (1, 3))
    assert len(double.history) < 0.6 * len(single.history)
    chain = double.chain()
    assert [r["origin"] for r in chain] == ["start"] + ["step"] * (len(chain) - 1)
    assert budget.limits["macs"] >= chain[-1]["macs"] and chain[-2]["macs"] > budget.limits["macs"]
    rows = space.rows(double.archs[r["key"]] for r in chain)
    changed = (np.diff(rows, axis=0) > 0).sum(axis=1)
    assert set(changed[:-1]) == {3} and changed[-1] <= 3
    # each gene goes where its own action went, and those are the best three
    first = [r for r in double.history if r["generation"] == 0 and r["origin"] == "action"]
    start = chain[0]
    best = sorted(first, key=lambda r: (start["score"] - r["score"]) / (start["macs"] - r["macs"]))[:3]
    assert (space.rows(double.archs[r["key"]] for r in best).sum(axis=0) == rows[1]).all()


def test_from_a_given_network():
    space = SearchSpace.preset("micro")
    start = space.sample(np.random.default_rng(0))
    limit = int(0.7 * space.costs(start)["macs"])
    search = run(Slimming(space, Budget(macs=limit), start=start), hashed)
    assert search.chain()[0]["key"] == start.key() and search.chain()[-1]["macs"] <= limit
    smaller = run(Slimming(space, Budget(macs=space.costs(start)["macs"]), start=start), hashed)
    assert [r["origin"] for r in smaller.history] == ["start"] and smaller.best["key"] == start.key()
    with pytest.raises(ValueError):
        Slimming(space, start=small_space().largest)


def test_planned_number_of_candidates():
    for family, space in spaces().items():
        budget = Budget(macs=int(0.75 * space.costs(space.largest)["macs"]))
        search = Slimming(space, budget, step=0.05)
        before = search.planned
        run(search, hashed)
        assert 0.3 < len(search.history) / before < 3, family
        assert search.planned == len(search.history)


SETTINGS = dict(step=0.05, together=2)


def slimmer(space=None):
    space = space or SearchSpace.preset("micro")
    return Slimming(space, Budget(macs=int(0.5 * space.costs(space.largest)["macs"])), 7, **SETTINGS)


def test_any_order_of_tell():
    plain, shuffled, rng = run(slimmer()), slimmer(), np.random.default_rng(0)
    while not shuffled.done:
        asked = shuffled.ask()
        first = [asked[i] for i in rng.permutation(len(asked))[:5]]
        shuffled.tell([(a, np.int64(toy_score(a))) for a in first])
    assert shuffled.history == plain.history and shuffled.chain() == plain.chain()


def test_resumed_at_every_point():
    space = small_space()
    plain, search = run(slimmer(space)), slimmer(space)
    for _ in range(len(plain.history)):
        for before_done in (True, False):
            text = json.dumps(search.state_dict())
            search = slimmer(space)
            search.load_state_dict(json.loads(text))
            if before_done and search.done:
                assert search.history == plain.history and search.chain() == plain.chain()
                return
        search.tell([(a, toy_score(a)) for a in search.ask()[:3]])
    pytest.fail("the resumed search does not end")


def test_states_of_other_searches():
    search = slimmer()
    search.tell([(a, 1) for a in search.ask()])
    state = search.state_dict()
    for name, value in (("step", 0.1), ("together", 1), ("gain", "params"), ("start", "x")):
        other = json.loads(json.dumps(state))
        other["setup"][name] = value
        with pytest.raises(ValueError, match=f"its {name} is"):
            slimmer().load_state_dict(other)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(step=1.5), "step must be from 0 to 1"),
        (dict(step="a"), "step must be from 0 to 1"),
        (dict(together=0), "together must be an integer of at least 1"),
        (dict(gain="mes"), "the gain mes needs latency_ms, .* measure a latency table"),
        (dict(gain="speed"), "the gain speed needs speed"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Slimming(SearchSpace.preset("micro"), Budget(macs=12e6), **settings)


def test_budgets_out_of_reach():
    space = SearchSpace.preset("micro")
    for macs, message in ((1e6, "below the smallest"), (1e9, "above the largest")):
        with pytest.raises(BudgetError, match=message):
            Slimming(space, Budget(macs=macs))
