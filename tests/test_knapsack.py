"""The start of a search over a trained network, against trying everything."""

import itertools

import numpy as np
import pytest

from timm_resnas.families.elastic_space import ElasticArch, ElasticSpace
from timm_resnas.families.elastic_tokens import TokenSpace
from timm_resnas.nas.cost import Budget, BudgetError
from timm_resnas.nas.knapsack import Losses, alone, knapsack, losses


@pytest.fixture(scope="module")
def space():
    """Few enough networks to try them all."""
    choices = [[[2, 1, 0], [192, 96, 0]]] * 2 + [[[2], [192]]] * 4
    return ElasticSpace("test_vit", choices, img_size=32, num_classes=7)


def test_networks_that_are_scored_alone(space):
    archs = alone(space)
    assert archs[0] == space.largest and len(archs) == 1 + 4 * 2
    for arch in archs[1:]:
        pairs = zip(arch.widths, space.largest.widths, strict=True)
        assert sum(a != b for pair, most in pairs for a, b in zip(pair, most, strict=True)) == 1


def test_losses_between_probes():
    space = ElasticSpace("test_vit", [[[2], list(range(192, -1, -12))]] * 6, img_size=32)
    scores = [0.0, *[-1.0, -2.0, -1.5, -8.0] * 6]
    loss, shared = losses(space, scores)
    assert shared.tolist() == [0.0]
    assert loss[0].tolist() == [0.0]
    # probes at a quarter, half, three quarters and all of 16 steps; narrower is never better
    assert loss[1][[0, 2, 4, 8, 12, 14, 16]].tolist() == [0.0, 0.5, 1.0, 2.0, 2.0, 4.75, 8.0]


@pytest.mark.parametrize("share", [0.8, 0.6, 0.45])
def test_the_best_of_all(space, share):
    rng = np.random.default_rng(0)
    loss = [np.sort(rng.random(len(gene.choices))) for gene in space.genes]
    for values in loss:
        values[0] = 0.0
    least, most = space.cost_range("macs")
    budget = Budget(macs=least + share * (most - least), lower=0)
    rows = np.array(list(itertools.product(*(range(len(gene.choices)) for gene in space.genes))), np.int8)
    within = rows[space.table("macs").cost(rows) <= budget.limits["macs"]]
    total = [sum(values[i] for values, i in zip(loss, row, strict=True)) for row in within]
    found = knapsack(space, Losses(loss, np.zeros(1)), budget)
    row = space.encode(found)
    assert not budget.check(space.costs(found))
    assert sum(values[i] for values, i in zip(loss, row, strict=True)) == pytest.approx(min(total))


def test_room_that_coarse_genes_leave_is_filled(space):
    loss = [np.array([0.0, 0.0, 1.0])[: len(gene.choices)] for gene in space.genes]  # the middle costs nothing
    least, most = space.cost_range("macs")
    budget = Budget(macs=most, lower=0.9)
    assert not budget.check(space.costs(knapsack(space, Losses(loss, np.zeros(1)), budget)))


def test_no_network_within_the_budget(space):
    loss = Losses([np.zeros(len(gene.choices)) for gene in space.genes], np.zeros(1))
    assert knapsack(space, loss, Budget(macs=1000, lower=0)) is None
    assert space.even(Budget(macs=1000)) is None


@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
def test_an_even_cut_uses_the_budget(share):
    """Heads are coarse, so that hidden units make up for them; their steps are finer than the space's choices."""
    space = ElasticSpace("vit_small_patch16_224", img_size=32, num_classes=7)
    budget = Budget.parse(f"macs={share:.0%}", space.costs(space.largest))
    arch = space.even(budget)
    (heads,), hidden = ({pair[i] for pair in arch.widths} for i in (0, 1))
    assert max(hidden) - min(hidden) in (0, 8) and all(n % 8 == 0 for n in hidden)
    # for each number of heads, the most hidden units that are within the band if every block has as many
    alike = [ElasticArch(arch.base, ((h, m),) * 12) for h in range(1, 7) for m in range(8, 1537, 8)]
    most = {a.widths[0][0]: a.widths[0][1] for a in alike if not budget.check({"macs": space.cost_of(a, "macs")})}
    apart = [abs(h / 6 - m / 1536) for h, m in most.items()]
    assert not budget.check({"macs": space.cost_of(arch, "macs")})
    assert abs(heads / 6 - sum(m for _, m in arch.widths) / 12 / 1536) <= min(apart) + 8 / 1536
    widened = ElasticArch(arch.base, tuple((h, m + 8 * (i == 11)) for i, (h, m) in enumerate(arch.widths)))
    assert space.cost_of(arch, "macs") <= budget.limits["macs"] < space.cost_of(widened, "macs")


def test_an_even_cut_within_several_limits():
    space = ElasticSpace("vit_small_patch16_224", img_size=32, num_classes=7)
    full = space.costs(space.largest)
    loose, tight = (Budget.parse(text, full) for text in ("macs=50%", "macs=50%,params=40%"))
    costs = {name: space.cost_of(space.even(tight), name) for name in full}
    assert costs["macs"] <= tight.limits["macs"] and costs["params"] <= tight.limits["params"]
    assert space.cost_of(space.even(loose), "params") > tight.limits["params"]
    # it is the parameters that decide, wherever they are named
    only, other = (Budget.parse(text, full) for text in ("params=40%", "params=40%,macs=50%"))
    assert space.even(tight) == space.even(other) == space.even(only)
    heads, hidden = zip(*space.even(only).widths, strict=True)
    assert abs(sum(heads) / 72 - sum(hidden) / 12 / 1536) < 0.1
    with pytest.raises(BudgetError, match="no price for latency_ms.*latency table"):
        space.even(Budget(latency_ms=3.0))


def test_an_even_cut_of_latency_is_of_measured_layers():
    space = ElasticSpace("test_vit", img_size=32)
    space.price("latency_ms", lambda layer: 10 + layer.macs, unit=10**6)
    budget = Budget.parse("latency_ms=60%", space.costs(space.largest))
    arch = space.even(budget)
    assert space.contains(arch) and space.costs(arch)["latency_ms"] <= budget.limits["latency_ms"]
    assert len({hidden for _, hidden in arch.widths}) <= 2


def test_an_even_cut_beside_heads_that_are_mixed():
    """They stay, and the others are not cut in their place."""
    space = ElasticSpace("cait_xxs24_224", img_size=32)
    arch = space.even(Budget.parse("macs=60%", space.costs(space.largest)))
    mixed, others = arch.widths[:24], arch.widths[24:]
    assert {heads for heads, _ in mixed} == {4} and len(others) == 2
    share = sum(hidden / most for (_, hidden), (_, most) in zip(arch.widths, space.largest.widths, strict=True)) / 26
    assert all(abs(heads / 4 - share) <= 1 / 4 for heads, _ in others)


def test_an_even_cut_within_a_band_of_its_own():
    space = ElasticSpace("vit_small_patch16_224", img_size=32)
    limit = int(0.45 * space.costs(space.largest)["macs"])
    for lower in (0.975, 0.995):
        budget = Budget(macs=limit, lower=lower)
        assert not budget.check({"macs": space.cost_of(space.even(budget), "macs")})


@pytest.mark.parametrize("base", ["vit_small_patch16_224", "vit_resnas_tiny", "cait_xxs24_224"])
def test_costs_layer_by_layer_are_those_of_the_tables(base):
    space = ElasticSpace(base)
    for arch in space.sample_many(5, np.random.default_rng(0)):
        assert {name: space.cost_of(arch, name) for name in space.cost_names} == space.costs(arch)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.4])
def test_the_best_of_all_with_tokens(share):
    """How many patches go on changes what every layer behind costs, so that it is scored in all combinations."""
    choices = [[[2], [192]]] * 2 + [[[2, 1], [192, 96, 0]]] * 2 + [[[2], [192]], [[2], [192, 48]]]
    space = TokenSpace("test_vit", choices, [1, 3], [1.0, 0.6, 0.3], img_size=64, num_classes=7)
    rng = np.random.default_rng(1)

    tokens = {}  # loss of each combination of both places

    def score(arch):
        widths = sum(0.01 * (2 - heads) + 0.0001 * (192 - hidden) ** 1.1 for heads, hidden in arch.widths)
        return -widths - tokens.setdefault(arch.keep_ratios, 0.3 * rng.random() if min(arch.keep_ratios) < 1 else 0.0)

    archs = alone(space)
    assert archs[0] == space.largest and len({a.key() for a in archs}) == len(archs) == 1 + 2 * 3 + 1 + 5
    loss = losses(space, [score(arch) for arch in archs])
    assert len(tokens) == 6 and loss.shared.tolist() == pytest.approx(list(tokens.values()))
    least, most = space.cost_range("macs")
    budget = Budget(macs=least + share * (most - least), lower=0)
    rows = np.array(list(itertools.product(*(range(len(gene.choices)) for gene in space.genes))), np.int8)
    rows = np.unique(space.normalise(rows), axis=0)
    within = space.decode(rows[space.table("macs").cost(rows) <= budget.limits["macs"]])
    found = knapsack(space, loss, budget)
    assert not budget.check(space.costs(found))
    assert score(found) == pytest.approx(max(map(score, within)))
    even = space.even(budget)
    assert even is None or even.keep_ratios == (1.0, 1.0)


@pytest.mark.parametrize("name", ["macs", "params"])
def test_no_room_above_the_smallest(space, name):
    """A limit at the smallest network's own cost leaves it alone."""
    loss = Losses([np.arange(len(gene.choices), dtype=float) for gene in space.genes], np.zeros(1))
    least, _ = space.cost_range(name)
    assert knapsack(space, loss, Budget(**{name: least}, lower=0)) == space.smallest


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_wider_may_be_faster_than_the_smallest(share):
    """Measured latency need not fall with the width."""
    space = ElasticSpace("test_vit", [[[2, 1], [192, 96, 48]]] * 2 + [[[2], [192]]] * 4, img_size=32)
    at = {}
    rng = np.random.default_rng(1)
    space.price("latency_ms", lambda layer: at.setdefault(layer, int(rng.integers(1e6, 5e6))), unit=10**6)
    rows = np.array(list(itertools.product(*(range(len(gene.choices)) for gene in space.genes))), np.int8)
    costs = space.table("latency_ms").cost(rows)
    assert costs.min() < space.costs(space.smallest)["latency_ms"]
    budget = Budget(latency_ms=costs.min() + share * np.ptp(costs), lower=0)
    loss = [np.arange(len(gene.choices), dtype=float) ** 2 for gene in space.genes]
    total = [sum(values[i] for values, i in zip(loss, row, strict=True)) for row in rows]
    found = knapsack(space, Losses(loss, np.zeros(1)), budget)
    assert not budget.check(space.costs(found))
    best = min(t for t, cost in zip(total, costs, strict=True) if cost <= budget.limits["latency_ms"])
    assert sum(v[i] for v, i in zip(loss, space.encode(found), strict=True)) == best


def test_an_even_cut_where_the_largest_network_lacks_branches():
    space = ElasticSpace("test_vit", [[[0], [192, 96, 48, 0]], [[2, 1, 0], [0]]] * 3, img_size=32)
    even = space.even(Budget(macs=space.cost_range("macs")[1]))
    assert even == space.largest
