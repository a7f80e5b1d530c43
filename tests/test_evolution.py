"""The searches: known optima, exact resuming, no network twice."""

import functools
import json
import random

import numpy as np
import pytest

from timm_resnas.arch import Arch
from timm_resnas.families.vit_resnas import VitResNasSpace
from timm_resnas.models.network_def import Block
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.evolution import EvolutionSearch, RandomSearch, Search, rank_key
from timm_resnas.nas.space import BudgetError, SearchSpace

MICRO = SearchSpace.preset("micro")
BUDGET = Budget(macs=12e6)
SMALL = dict(population=20, iterations=4, parents=6, mutations=8, crossovers=7)


def small_space(widths=(16, 8)) -> SearchSpace:
    """A few thousand networks, so that all can be scored."""
    network_def = (
        (0, 16),
        *[(1, (16, 2, 8), (16, 32), 1)] * 3,
        (3, 16, 24),
        *[(1, (24, 2, 8), (24, 48), 1)] * 2,
        (2, 24, 5),
    )
    first = dict(attn=[16, 8], mlp=[32, 16], layer=None)
    second = dict(attn=[16, 8], mlp=[48, 32, 16], layer=None)
    choices = [list(widths), first, first | dict(layer=[16, 0]), first, [24, 16], second, second, None]
    return VitResNasSpace(network_def, choices, img_size=16, patch_size=4, in_chans=1)


def every_network(space: SearchSpace) -> list[Arch]:
    picks = np.indices([len(gene.draws) for gene in space.searched]).reshape(len(space.searched), -1).T
    archs = {a.key(): a for a in space.build(picks)}
    assert len(archs) == space.size()
    return list(archs.values())


def toy_score(arch: Arch) -> int:
    """A separable score with a value of its own for each gene, so that the best is not the largest network."""
    total = 3 * arch.patch_embed.dim
    for i, block in enumerate(arch.blocks):
        if isinstance(block, Block) and block.exists:
            total += (97 * (i + 1)) % 31 * block.num_heads - (53 * (i + 2)) % 7 * block.mlp_hidden // 4
    return total


def separable_score(seed: int):
    """A random value for each choice of each gene; the score is their sum over the present ones."""

    @functools.cache
    def value(*gene) -> int:
        return random.Random(f"{seed} {gene}").randrange(10_000)

    def score(arch: Arch) -> int:
        total = 0
        for i, entry in enumerate(arch.to_network_def()):
            if entry[0] != 1:
                total += value(i, "width", entry[-1 if entry[0] == 3 else 1])
            elif entry[3]:
                total += value(i, "heads", entry[1][1]) + value(i, "hidden", entry[2][1])
        return total

    return score


def run(search: Search, score=toy_score) -> Search:
    while not search.done:
        search.tell([(arch, score(arch)) for arch in search.ask()])
    return search


def fold(record: dict) -> Arch:
    return Arch.from_record(record)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.45, 0.7])
def test_finds_the_known_optimum(seed, fraction):
    space, score = small_space(), separable_score(seed)
    budget = Budget(macs=int(fraction * space.costs(space.largest)["macs"]), lower=0.8)
    inside = [a for a in every_network(space) if not budget.check(space.costs(a))]
    settings = dict(population=60, iterations=12, parents=12, mutations=15, crossovers=15)
    search = run(EvolutionSearch(space, budget, seed, **settings), score)
    assert len(search.history) <= 60 + 11 * 30 < 0.2 * len(inside)
    assert search.best["score"] == max(map(score, inside))


def test_a_search_begins_with_given_networks():
    space, score = small_space(), separable_score(0)
    budget = Budget(macs=int(0.6 * space.costs(space.largest)["macs"]), lower=0.8)
    inside, outside = space.sample_many(2, np.random.default_rng(9), budget), space.largest
    settings = dict(population=10, iterations=2, parents=4, mutations=3, crossovers=3)
    search = EvolutionSearch(space, budget, 0, **settings, start=[outside, *inside, inside[0]])
    asked = search.ask()
    assert asked[:2] == inside and outside not in asked and len(asked) == 10 == len({a.key() for a in asked})
    search.tell([(arch, score(arch)) for arch in asked])
    assert [r["origin"] for r in search.history[:3]] == ["start", "start", "initial"]
    again = EvolutionSearch(space, budget, 0, **settings, start=inside)
    again.load_state_dict(search.state_dict())
    assert again.ask() == search.ask()
    with pytest.raises(ValueError, match="its start is"):
        EvolutionSearch(space, budget, 0, **settings, start=inside[:1]).load_state_dict(search.state_dict())


def test_better_than_random_on_a_large_space():
    settings = dict(population=100, iterations=8, mutations=30, crossovers=30)
    for seed in range(3):
        score = separable_score(seed)
        evolved = run(EvolutionSearch(MICRO, BUDGET, seed, parents=30, **settings), score)
        drawn = run(RandomSearch(MICRO, BUDGET, seed, **settings), score)
        assert len(evolved.history) == len(drawn.history) == 100 + 7 * 60
        assert evolved.best["score"] > drawn.best["score"]
        # the same generator starts both
        assert [r["key"] for r in evolved.history[:100]] == [r["key"] for r in drawn.history[:100]]


def test_history():
    search = run(EvolutionSearch(MICRO, BUDGET, 0, **SMALL))
    history = json.loads(json.dumps(search.history))
    assert history == search.history
    assert [r["generation"] for r in history] == [0] * 20 + [1] * 15 + [2] * 15 + [3] * 15
    assert [r["origin"] for r in history] == ["initial"] * 20 + (["mutation"] * 8 + ["crossover"] * 7) * 3
    assert len({r["key"] for r in history}) == len(history)
    for record in history:
        arch = fold(record)
        assert record["key"] == arch.key() and record["score"] == toy_score(arch)
        costs = MICRO.costs(arch)
        assert {k: record[k] for k in costs} == costs
        assert BUDGET.check(record) == []
    assert search.best == sorted(history, key=rank_key)[0]
    assert search.ask() == [] and search.done


def test_paper_settings():
    search = EvolutionSearch(MICRO, BUDGET)
    assert search.settings() == dict(
        population=500, iterations=20, parents=75, mutations=75, crossovers=75, mutation_prob=0.3
    )
    run(search)
    assert len(search.history) == 500 + 19 * 150


def test_children_come_from_the_best(monkeypatch):
    seen = []
    search = EvolutionSearch(MICRO, BUDGET, 0, **SMALL)
    original = MICRO.mutate_many
    monkeypatch.setattr(MICRO, "mutate_many", lambda parents, *args: seen.append(parents) or original(parents, *args))
    search.tell([(arch, i // 2) for i, arch in enumerate(search.ask())])
    search.ask()
    ranked = sorted(search.history, key=lambda r: (-r["score"], r["macs"], r["key"]))
    assert [a.key() for a in seen[0]] == [r["key"] for r in ranked[:6]]


def test_ties():
    records = [dict(score=1, macs=5, key="b"), dict(score=2, macs=9, key="c"), dict(score=2, macs=7, key="d")]
    records.append(dict(score=2, macs=7, key="a"))
    assert [r["key"] for r in sorted(records, key=rank_key)] == ["a", "d", "c", "b"]


def test_any_order_of_tell():
    plain = run(EvolutionSearch(MICRO, BUDGET, 3, **SMALL))
    shuffled = EvolutionSearch(MICRO, BUDGET, 3, **SMALL)
    rng = np.random.default_rng(0)
    while not shuffled.done:
        asked = shuffled.ask()
        first = [asked[i] for i in rng.permutation(len(asked))[:5]]
        shuffled.tell([(a, np.int64(toy_score(a))) for a in first])
        left = shuffled.ask()
        if len(asked) > 5:
            assert left == [a for a in asked if a not in first]
            shuffled.tell([])
    assert shuffled.history == plain.history
    assert run(EvolutionSearch(MICRO, BUDGET, 4, **SMALL)).history != plain.history


@pytest.mark.parametrize("kind", [EvolutionSearch, RandomSearch])
def test_resume_at_every_point(kind):
    settings = {k: v for k, v in SMALL.items() if kind is EvolutionSearch or k != "parents"}
    plain = run(kind(MICRO, BUDGET, 7, **settings)).history
    search = kind(MICRO, BUDGET, 7, **settings)
    for _ in range(len(plain)):
        for before_done in (True, False):
            # also between a complete generation and the drawing of the next
            text = json.dumps(search.state_dict())
            search = kind(MICRO, BUDGET, 7, **settings)
            search.load_state_dict(json.loads(text))
            if before_done and search.done:
                assert search.history == plain
                return
        search.tell([(a, toy_score(a)) for a in search.ask()[:4]])
    pytest.fail("the resumed search does not end")


def test_state_is_a_copy():
    search = EvolutionSearch(MICRO, BUDGET, 0, **SMALL)
    search.tell([(a, 1) for a in search.ask()])
    state = search.state_dict()
    text = json.dumps(state)
    run(search)
    assert json.dumps(state) == text


def test_exhausted_space():
    space = small_space(widths=(16,))
    budget = Budget(macs=space.costs(space.largest)["macs"], lower=0.93)
    inside = {a.key() for a in every_network(space) if not budget.check(space.costs(a))}
    assert 5 < len(inside) < 60
    settings = dict(population=200, iterations=10, mutations=50, crossovers=50)
    search = run(EvolutionSearch(space, budget, 0, **settings))
    assert search.generation < 10 and search.done
    assert {r["key"] for r in search.history} == inside and len(search.history) == len(inside)
    drawn = run(RandomSearch(space, budget, 0, **settings))
    assert drawn.done and {r["key"] for r in drawn.history} <= inside
    # the same when each generation is scored by a search resumed from the one before
    state = EvolutionSearch(space, budget, 0, **settings).state_dict()
    while True:
        again = EvolutionSearch(space, budget, 0, **settings)
        again.load_state_dict(state)
        if again.done:
            break
        again.tell([(a, toy_score(a)) for a in again.ask()])
        state = again.state_dict()
    assert again.history == search.history


def test_without_budget():
    search = run(EvolutionSearch(MICRO, None, 0, **SMALL))
    assert len(search.history) == 20 + 3 * 15
    state = search.state_dict()
    EvolutionSearch(MICRO, None, 0, **SMALL).load_state_dict(state)


def test_latency_budget_is_recorded():
    space = SearchSpace.preset("micro")
    space.price("latency_ms", lambda layer: 1000 * dict(layer.shape).get("hidden", 0), unit=10**6, base=10**5)
    budget = Budget(latency_ms=2, macs=14e6)
    search = run(EvolutionSearch(space, budget, 0, **SMALL))
    assert len(search.history) == 65
    for record in search.history:
        hidden = sum(b.mlp_hidden for b in fold(record).blocks if isinstance(b, Block) and b.exists)
        assert record["latency_ms"] == pytest.approx(0.1 + 1e-3 * hidden, rel=1e-12)
        assert budget.check(record) == []


def test_wrong_tells():
    search = EvolutionSearch(MICRO, BUDGET, 0, **SMALL)
    asked = search.ask()
    with pytest.raises(ValueError, match="does not wait for"):
        search.tell([(asked[0], 1), (MICRO.largest, 1)])
    assert search.ask() == asked  # nothing was taken
    for score in (float("nan"), "1", None, True):
        with pytest.raises(ValueError, match="a score must be a finite number"):
            search.tell([(asked[0], score)])
    search.tell([(asked[0], 1), (asked[0], 1)])
    search.tell([(asked[0], 1)])
    with pytest.raises(ValueError, match="two different scores"):
        search.tell([(asked[0], 2)])
    assert search.ask() == asked[1:]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update(kind="random"), "not the state of a search of kind 'evolution'"),
        (lambda s: s["setup"].update(seed=1), "its seed is 1, this one's is 0"),
        (lambda s: s["setup"].update(budget=None), "its budget is None"),
        (lambda s: s["setup"].update(parents=5), "its parents is 5, this one's is 6"),
        (lambda s: s["setup"]["space"]["model_args"].update(img_size=[64, 64]), "its space is"),
        (lambda s: s.pop("rng"), "damaged: KeyError 'rng'"),
        (lambda s: s["history"][3].pop("score"), "damaged: KeyError 'score'"),
        (lambda s: s["history"][3].update(key="x"), "damaged: .* key of history record 3"),
        (lambda s: s["pending"][0].update(args={"network_def": []}), "damaged: ArchError"),
        (lambda s: s["pending"][0].update(small_space().largest.record()), "damaged: ValueError"),
    ],
)
def test_wrong_states(change, message):
    search = EvolutionSearch(MICRO, BUDGET, 0, **SMALL)
    search.tell([(a, 1) for a in search.ask()])
    search.ask()
    before = json.dumps(search.state_dict())
    state = json.loads(before)
    change(state)
    with pytest.raises(ValueError, match=message):
        search.load_state_dict(state)
    assert json.dumps(search.state_dict()) == before


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(population=0), "population must be an integer of at least 1, got 0"),
        (dict(iterations=0), "iterations must be"),
        (dict(parents=2.5), "parents must be"),
        (dict(mutations=-1), "mutations must be an integer of at least 0"),
        (dict(mutation_prob=0), "mutation_prob must be above 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        EvolutionSearch(MICRO, BUDGET, **settings)


def test_budget_out_of_reach():
    with pytest.raises(BudgetError, match="below the smallest"):
        EvolutionSearch(MICRO, Budget(macs=1e6))
