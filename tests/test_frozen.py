"""Draws, costs, searches and samplers are those of the first version, number by number.

``frozen/space.json`` was written before the search space became independent of the family; the latency in it is a
made-up price of each layer.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from timm_resnas.nas.cost import Budget
from timm_resnas.nas.evolution import EvolutionSearch, RandomSearch
from timm_resnas.nas.pareto import ParetoSearch
from timm_resnas.nas.sampling import MultiArchSampler, SandwichSampler
from timm_resnas.nas.space import SearchSpace

FROZEN = json.loads((Path(__file__).parent / "frozen" / "space.json").read_text())
KINDS = {"stem": 1, "attention": 2, "mlp": 3, "reduction": 4, "head": 5}


def made_up_ns(layer) -> int:
    shape = dict(layer.shape)
    dim = shape.get("in_dim", shape.get("dim"))
    size = shape.get("num_heads", shape.get("hidden", shape.get("out_dim", 0)))
    tokens, head_dim = shape["tokens"], shape.get("head_dim", 0)
    code = (KINDS[layer.kind] * 1299709 + tokens * 15485863 + dim * 7919 + size * 104729 + head_dim * 31) % 61
    work = {
        "stem": 40 * dim,
        "attention": 4 * dim * size * head_dim,
        "mlp": 2 * dim * size,
        "reduction": 9 * dim * size,
        "head": 10 * dim,
    }[layer.kind]
    return 1000 + work * tokens // 100 * (70 + code) // 100


def priced(name: str) -> SearchSpace:
    space = SearchSpace.preset(name)
    space.price("latency_ms", made_up_ns, unit=10**6)
    return space


def digest(lines) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def entry(archs) -> dict:
    keys = [a.key() for a in archs]
    return {"count": len(keys), "first": keys[:2], "sha256": digest(keys)}


def score(arch) -> int:
    return int(hashlib.sha256(arch.key().encode()).hexdigest()[:6], 16) % 400


@pytest.mark.parametrize("case", FROZEN["draws"], ids=lambda c: f"{c['space']} {c['budget']}")
def test_draws(case):
    space = priced(case["space"])
    budget = case["budget"] and Budget(**case["budget"])
    drawn = space.sample_many(300, np.random.default_rng(1), budget)
    assert entry(drawn) == case["sample"]
    top = drawn[:60]
    assert entry(space.mutate_many(top, 120, np.random.default_rng(2), 0.3, budget)) == case["mutate"]
    assert entry(space.crossover_many(top, 120, np.random.default_rng(3), budget)) == case["crossover"]


@pytest.mark.parametrize("name", ["micro", "vit_resnas_tiny", "vit_resnas_small"])
def test_costs(name):
    space = priced(name)
    drawn = space.sample_many(20, np.random.default_rng(5))
    assert [{"key": a.key(), **space.costs(a)} for a in drawn] == FROZEN["costs"][name]
    assert space.costs(space.largest) == FROZEN["costs"][f"{name} largest"]
    assert space.costs(space.smallest) == FROZEN["costs"][f"{name} smallest"]
    assert space.size() == FROZEN["costs"][f"{name} size"]


def searches(space: SearchSpace) -> dict:
    small = dict(population=60, iterations=5, mutations=15, crossovers=15)
    ms = FROZEN["latency_limit"]
    return {
        "evolution macs": EvolutionSearch(space, Budget(macs=8e6), 3, parents=15, **small),
        "evolution latency": EvolutionSearch(space, Budget(latency_ms=ms), 3, parents=15, **small),
        "random params": RandomSearch(space, Budget(params=6e5), 3, **small),
        "pareto": ParetoSearch(space, None, 3, objectives=("macs", "params"), parents=15, max_score=400, **small),
        "pareto latency": ParetoSearch(
            space, Budget(macs=2e7), 3, objectives=("latency_ms",), parents=15, max_score=400, **small
        ),
    }


@pytest.mark.parametrize("name", FROZEN["searches"])
def test_histories(name):
    search = searches(priced("micro"))[name]
    while not search.done:
        search.tell([(arch, score(arch)) for arch in search.ask()])
    lines = [f"{r['key']} {r['score']} {r['macs']} {r['generation']} {r['origin']}" for r in search.history]
    want = FROZEN["searches"][name]
    assert (len(lines), digest(lines), search.best["key"]) == (want["count"], want["sha256"], want["best"])


@pytest.mark.parametrize("case", FROZEN["samplers"], ids=lambda c: f"{c['sampler']} {c['space']} {c['num_archs']}")
def test_samplers(case):
    kind = {"MultiArchSampler": MultiArchSampler, "SandwichSampler": SandwichSampler}[case["sampler"]]
    sampler = kind(SearchSpace.preset(case["space"]), case["num_archs"], seed=3, warmup_epochs=6)
    archs = [a for epoch in (0, 2, 5, 9) for step in (0, 1, 17) for a in sampler.archs(epoch, step)]
    assert entry(archs) == {k: case[k] for k in ("count", "first", "sha256")}
