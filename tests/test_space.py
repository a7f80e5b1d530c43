"""Search spaces: choices, counting, and the generators against slow ones and the paper's statistics."""

import itertools
import json
import pickle
from collections import Counter

import numpy as np
import pytest

from timm_resnas.families.vit_resnas import VitResNasSpace
from timm_resnas.models.network_def import Block, NetworkDef, Reduction
from timm_resnas.nas import generator
from timm_resnas.nas import space as space_module
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.space import BudgetError, SearchSpace


def macs(arch: NetworkDef, **model_args) -> int:
    return arch.costs(**model_args)["macs"]


PRESETS = ("vit_resnas_tiny", "vit_resnas_small", "mini", "micro")


def toy_space(**model_args) -> SearchSpace:
    """Two stages; blocks 2 and 3 of the first are both removable, so the cascade acts; 3 x 2 widths."""
    network_def = (
        (0, 24),
        (1, (24, 2, 8), (24, 48), 1),
        (1, (24, 2, 8), (24, 32), 1),
        (1, (24, 1, 8), (24, 48), 1),
        (3, 24, 32),
        (1, (32, 2, 16), (32, 64), 1),
        (2, 32, 5),
    )
    choices = [
        [24, 16, 8],
        dict(attn=[16, 8], mlp=[48, 32], layer=None),
        dict(attn=[16], mlp=[32, 16], layer=[24, 0, 0]),
        dict(attn=[8], mlp=[48, 24], layer=[24, 24, 24, 0]),
        [32, 24],
        dict(attn=[32, 16], mlp=[64], layer=[32, 0]),
        None,
    ]
    args = dict(img_size=16, patch_size=4, in_chans=1)
    return VitResNasSpace(network_def, choices, **{**args, **model_args})


# -- a slow, scalar version of the space, from the paper's text, as an oracle ------------------------------------------


def pick(values: list, rng: np.random.Generator):
    return values[int(rng.integers(len(values)))]


class SlowSpace:
    """Draws raw genes ``{(entry, kind): value}`` one by one."""

    def __init__(self, space: SearchSpace) -> None:
        data = space.to_dict()
        self.entries = data["network_def"]
        self.choices = data["num_channels_to_keep"]
        self.args = {k: v for k, v in data["model_args"].items() if k != "num_classes"}
        self.genes, self.archs, self.costs = {}, {}, {}
        for i, choice in enumerate(self.choices):
            if isinstance(choice, dict):
                self.genes |= {(i, k): v for k, v in choice.items() if v}
            elif choice:
                self.genes[i, "width"] = choice

    def arch(self, genes: dict) -> NetworkDef:
        key = tuple(genes.items())
        if key not in self.archs:
            self.archs[key] = self._arch(genes)
        return self.archs[key]

    def _arch(self, genes: dict) -> NetworkDef:
        dim, out, removed_before = 0, [], False
        for i, entry in enumerate(self.entries):
            kind = entry[0]
            if kind in (0, 4, 5):
                dim = genes[i, "width"]
                out.append((kind, dim, *entry[2:]))
            elif kind == 3:
                out.append((3, dim, genes[i, "width"]))
                dim, removed_before = genes[i, "width"], False
            elif kind == 2:
                out.append((2, dim, entry[2]))
            else:
                exists = genes.get((i, "layer"), 1) > 0 and not (removed_before and (i, "layer") in self.genes)
                removed_before = not exists
                source = genes if exists else {k: max(v) for k, v in self.genes.items()}
                heads = source[i, "attn"] // entry[1][2]
                out.append((1, (dim, heads, entry[1][2]), (dim, source[i, "mlp"]), int(exists)))
        return NetworkDef.from_network_def(out)

    def cost(self, genes: dict) -> int:
        key = tuple(genes.items())
        if key not in self.costs:
            self.costs[key] = macs(self.arch(genes), **self.args)
        return self.costs[key]

    def raw(self, arch: NetworkDef) -> dict:
        genes = {}
        for i, entry in enumerate(arch.to_network_def()):
            if entry[0] == 1:
                genes |= {(i, "attn"): entry[1][1] * entry[1][2], (i, "mlp"): entry[2][1], (i, "layer"): entry[3]}
            elif entry[0] != 2:
                genes[i, "width"] = entry[2] if entry[0] == 3 else entry[1]
        return genes

    def random(self, rng) -> dict:
        return {k: pick(v, rng) for k, v in self.genes.items()}

    def generate(self, rng, floor: float, limit: float, free_steps: int) -> NetworkDef:
        blocks = sorted({i for i, kind in self.genes if kind == "mlp"})
        entries = sorted({i for i, _ in self.genes})
        while True:
            while True:
                genes = {k: pick(v, rng) if k[1] in ("width", "layer") else max(v) for k, v in self.genes.items()}
                if self.cost(genes) >= floor:
                    break
            steps = 0
            while self.cost(genes) > limit:
                every = steps >= free_steps
                entry = pick(entries if every else blocks, rng)
                kinds = [k for i, k in self.genes if i == entry and (every or k != "layer")]
                kind = pick(kinds, rng)
                choice = self.genes[entry, kind]
                if kind == "layer":
                    if pick(choice, rng) == 0:
                        genes[entry, kind] = 0
                else:
                    genes[entry, kind] = max([v for v in choice if v < genes[entry, kind]], default=min(choice))
                steps += 1
            if floor <= self.cost(genes) <= limit:
                return self.arch(genes)

    def mutate(self, arch: NetworkDef, rng, prob: float, floor: float, limit: float) -> NetworkDef:
        while True:
            genes = self.raw(arch)
            for key, choice in self.genes.items():
                if rng.random() < prob:
                    genes[key] = 1 - genes[key] if key[1] == "layer" else pick(choice, rng)
            if floor <= self.cost(genes) <= limit:
                return self.arch(genes)

    def crossover(self, a: NetworkDef, b: NetworkDef, rng, floor: float, limit: float) -> NetworkDef:
        first, second = self.raw(a), self.raw(b)
        while True:
            genes = {k: (second if rng.random() < 0.5 else first)[k] for k in first}
            if floor <= self.cost(genes) <= limit:
                return self.arch(genes)


def assert_same_distribution(a: list[NetworkDef], b: list[NetworkDef]) -> None:
    """Two-sample chi-squared statistic over keys within five standard deviations of its mean."""
    one, two = Counter(x.key() for x in a), Counter(x.key() for x in b)
    ra, rb = (len(b) / len(a)) ** 0.5, (len(a) / len(b)) ** 0.5
    common, rest = [], [0, 0]
    for key in one | two:
        if one[key] + two[key] >= 20:
            common.append((one[key], two[key]))
        else:
            rest = [rest[0] + one[key], rest[1] + two[key]]
    cells = [*common, *([rest] if sum(rest) else [])]
    chi2 = sum((x * ra - y * rb) ** 2 / (x + y) for x, y in cells)
    free = len(cells) - 1
    assert free > 3
    assert chi2 < free + 5 * (2 * free) ** 0.5, (chi2, free)


def enumerate_space(space: SearchSpace) -> dict[str, NetworkDef]:
    slow = SlowSpace(space)
    product = itertools.product(*(sorted(set(v)) for v in slow.genes.values()))
    archs = (slow.arch(dict(zip(slow.genes, values, strict=True))) for values in product)
    return {a.key(): a for a in archs}


# -- contents ---------------------------------------------------------------------------------------------------------


def test_size_by_enumeration():
    space = toy_space()
    archs = enumerate_space(space)
    assert space.size() == len(archs) == 3 * 2 * 4 * (2 * (2 + 1) + 1) * (2 + 1)
    for arch in archs.values():
        assert space.contains(arch)


def test_paper_spaces():
    # numbers of the released code's sr_tiny_mh and sr_small_mh
    for name, widths, attn, mlp, blocks, costs in (
        (
            "vit_resnas_tiny",
            [(256, 224, 192, 176, 160), (512, 448, 384, 352, 320), (1024, 896, 768, 704, 640)],
            [(192, 160, 128, 96), (576, 480, 384, 288), (768, 640, 512, 384)],
            [(768, 384, 64), (1536, 768, 128), (3072, 1536, 256)],
            6,
            (84_814_464, 3_497_553_920),
        ),
        (
            "vit_resnas_small",
            [(320, 280, 240, 220, 200), (640, 560, 480, 440, 400), (1280, 1120, 960, 880, 800)],
            [(256, 224, 192, 160), (768, 672, 576, 480), (1024, 896, 768, 640)],
            [(960, 480, 80), (1920, 960, 160), (3840, 1920, 320)],
            7,
            (155_318_528, 6_260_342_784),
        ),
    ):
        space = SearchSpace.preset(name)
        got = space.largest.costs()
        assert (got["params"], got["macs"]) == costs
        assert space.costs(space.largest) == got
        genes = iter(space.searched)
        for stage, head_dim in enumerate((32, 48, 64)):
            width = next(genes)
            assert (width.name, width.choices, width.stage) == ("embed_dim", widths[stage], stage)
            for block in range(1, blocks + 1):
                heads, hidden = next(genes), next(genes)
                assert (heads.name, heads.choices) == ("num_heads", tuple(a // head_dim for a in attn[stage]))
                assert hidden.name == "mlp_hidden" and len(hidden.choices) == 7
                assert hidden.choices == tuple(range(mlp[stage][0], mlp[stage][1] - 1, -mlp[stage][2]))
                if block in (2, 4, 6):
                    exists = next(genes)
                    assert (exists.name, exists.choices, exists.draws) == ("exists", (True, False), (0, 0, 1, 1))
        assert next(genes, None) is None
        head_dims = [b.head_dim for b in space.largest.blocks if isinstance(b, Block)]
        assert head_dims == [32] * blocks + [48] * blocks + [64] * blocks
        assert space.size() == 125 * ((4 * 7 + 1) ** 3 * (4 * 7) ** (blocks - 3)) ** 3


@pytest.mark.parametrize("name, low, high", [("micro", 2e5, 2e6), ("mini", 5e6, 15e6)])
def test_our_spaces(name, low, high):
    space = SearchSpace.preset(name)
    largest, smallest = space.costs(space.largest), space.costs(space.smallest)
    assert low <= largest["params"] <= high
    assert smallest["macs"] <= 0.3 * largest["macs"]
    if name == "micro":
        assert space.model_args["img_size"] == [32, 32] and space.model_args["patch_size"] == 4
        assert largest["macs"] <= 30.1e6 and smallest["params"] >= low
    else:
        for size in (64, 96, 128):
            assert space.at(img_size=size).costs(space.largest)["macs"] > 0


def test_unknown_preset():
    autoformer = "autoformer_tiny, autoformer_small, autoformer_base, autoformer_micro"
    former = "efficientformer, efficientformer_micro, efficientformerv2, efficientformerv2_micro"
    with pytest.raises(
        ValueError, match=f"'nano'; known: {autoformer}, {former}, vit_resnas_tiny, vit_resnas_small, mini, micro"
    ):
        SearchSpace.preset("nano")


@pytest.mark.parametrize("name", PRESETS)
def test_sampled_networks_belong(name):
    space = SearchSpace.preset(name)
    rng = np.random.default_rng(3)
    archs = space.sample_many(200, rng)
    assert len({a.key() for a in archs}) > 190
    kwargs = {k: v for k, v in space.model_args.items()}
    for arch in [*archs, space.largest, space.smallest]:
        assert space.contains(arch)
        assert NetworkDef.from_network_def(arch.to_network_def()) == arch
        for block, full in zip(arch.blocks, space.largest.blocks, strict=True):
            if isinstance(block, Block) and not block.exists:
                assert (block.num_heads, block.mlp_hidden) == (full.num_heads, full.mlp_hidden)
        assert space.costs(arch) == arch.costs(**kwargs)


def test_costs_of_rows_equal_costs_of_archs():
    for name in PRESETS:
        space = SearchSpace.preset(name)
        archs = space.sample_many(50, np.random.default_rng(0))
        rows = space.rows(archs)
        for cost in ("macs", "params", "memory"):
            assert space.table(cost).cost(rows).tolist() == [a.costs(**space.model_args)[cost] for a in archs]
        assert space.decode(rows) == archs


def test_draws_without_budget_are_uniform():
    space = toy_space()
    archs = space.sample_many(20_000, np.random.default_rng(0))
    rng, slow = np.random.default_rng(1), SlowSpace(space)
    assert_same_distribution(archs, [slow.arch(slow.random(rng)) for _ in range(20_000)])


def test_searched_and_build():
    space = toy_space()
    assert [(gene.name, gene.choices, gene.draws) for gene in space.searched] == [
        ("embed_dim", (24, 16, 8), (0, 1, 2)),
        ("num_heads", (2, 1), (0, 1)),
        ("mlp_hidden", (48, 32), (0, 1)),
        ("mlp_hidden", (32, 16), (0, 1)),
        ("exists", (True, False), (0, 1, 1)),
        ("mlp_hidden", (48, 24), (0, 1)),
        ("exists", (True, False), (0, 0, 0, 1)),
        ("embed_dim", (32, 24), (0, 1)),
        ("num_heads", (2, 1), (0, 1)),
        ("exists", (True, False), (0, 1)),
    ]
    full, cut = space.build([[0] * 10, [1, 1, 0, 1, 2, 1, 2, 1, 1, 0]])
    assert full == space.largest
    assert cut.to_network_def() == (
        (0, 16),
        (1, (16, 1, 8), (16, 48), 1),
        (1, (16, 2, 8), (16, 32), 0),
        (1, (16, 1, 8), (16, 48), 0),  # by the cascade
        (3, 16, 24),
        (1, (24, 1, 16), (24, 64), 1),
        (2, 24, 5),
    )
    with pytest.raises(ValueError, match=r"shape \[n, 10\], got \[1, 9\]"):
        space.build([[0] * 9])
    with pytest.raises(ValueError, match="outside"):
        space.build([[0] * 9 + [2]])


def test_smallest():
    space = toy_space()
    costs = {key: macs(a, img_size=16, patch_size=4, in_chans=1) for key, a in enumerate_space(space).items()}
    assert min(costs, key=costs.get) == space.smallest.key()
    assert max(costs, key=costs.get) == space.largest.key()


@pytest.mark.parametrize(
    "change, message",
    [
        ((0, (0, 20)), "entry 0: embed_dim 20 is not one of the space's choices 24, 16, 8"),
        ((0, (4, 24)), "entry 0 is"),
        ((1, (1, (24, 3, 8), (24, 48), 1)), "entry 1: num_heads 3 is not one of"),
        ((1, (1, (24, 1, 16), (24, 48), 1)), "entry 1 has head_dim 16"),
        ((1, (1, (24, 2, 8), (24, 48), 0)), "entry 1 is absent"),
        ((2, (1, (24, 2, 8), (24, 32), 0)), "entry 3 must be absent"),
        ((3, (1, (24, 1, 8), (24, 50), 1)), "entry 3: mlp_hidden 50 is not one of the space's choices 48, 24"),
        ((3, (3, 24, 24)), "stages of 3-1 blocks"),
    ],
)
def test_check_says_why(change, message):
    space = toy_space()
    network_def = list(space.largest.to_network_def())
    network_def[change[0]] = change[1]
    if change[0] == 0 and change[1][1] == 20:
        network_def = json.loads(json.dumps(network_def).replace("24", "20"))
    arch = NetworkDef.from_network_def(network_def)
    assert not space.contains(arch)
    with pytest.raises(ValueError, match=message):
        space.encode(arch)


def test_dead_genes_do_not_matter():
    space = SearchSpace.preset("micro")
    arch = space.smallest
    blocks = [Block(b.dim, 1, b.head_dim, 7) if isinstance(b, Block) and not b.exists else b for b in arch.blocks]
    blocks = [
        Block(b.dim, b.num_heads, b.head_dim, b.mlp_hidden, False) if isinstance(b, Block) and b.mlp_hidden == 7 else b
        for b in blocks
    ]
    other = NetworkDef(arch.patch_embed, tuple(blocks), arch.head)
    assert other != arch and other.key() == arch.key() and space.contains(other)


# -- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_forms(name):
    space = SearchSpace.preset(name)
    data = json.loads(json.dumps(space.to_dict()))
    again = SearchSpace.from_dict(data)
    assert again == space and again.to_dict() == data and hash(again) == hash(space)
    assert again.sample(np.random.default_rng(0)) == space.sample(np.random.default_rng(0))
    assert pickle.loads(pickle.dumps(space)) == space
    assert SearchSpace.create(name) == SearchSpace.create(data) == SearchSpace.create(space) == space


def test_paper_form_with_arrays_in_any_order():
    data = SearchSpace.preset("vit_resnas_tiny").to_dict()
    choices = [
        {k: v if v is None else np.array(v[::-1]) for k, v in c.items()} if isinstance(c, dict) else c and np.array(c)
        for c in (c if not isinstance(c, list) else c[::-1] for c in data["num_channels_to_keep"])
    ]
    assert VitResNasSpace(str(data["network_def"]), choices) == SearchSpace.preset("vit_resnas_tiny")


def test_model_args():
    space = SearchSpace.preset("micro", num_classes=7, in_chans=1)
    assert space.largest.num_classes == space.model_args["num_classes"] == 7
    other = space.at(num_classes=3, img_size=(64, 32), drop_path_rate=0.1)
    assert other.largest.num_classes == 3 and other.model_args["in_chans"] == 1
    assert other.model_args["img_size"] == [64, 32] and other.model_args["drop_path_rate"] == 0.1
    assert other.costs(other.largest)["macs"] == macs(other.largest, img_size=(64, 32), patch_size=4, in_chans=1)
    assert space.largest.num_classes == 7
    space.model_args["num_classes"] = 0
    assert space.model_args["num_classes"] == 7


def without(data: dict, key: str) -> dict:
    return {k: v for k, v in data.items() if k != key}


def with_choice(i: int, value) -> dict:
    data = toy_space().to_dict()
    data["num_channels_to_keep"][i] = value
    return data


@pytest.mark.parametrize(
    "data, message",
    [
        ([1], r"a search space is a dict with a family \(.*vit_resnas.*\) and its choices; got list"),
        (without(toy_space().to_dict(), "network_def"), "a search space is a dict"),
        (
            toy_space().to_dict() | {"code": "x"},
            "a ViT-ResNAS space has network_def and num_channels_to_keep; got .*code",
        ),
        (toy_space().to_dict() | {"family": "x"}, "a search space is a dict with a family"),
        (toy_space().to_dict() | {"model_args": 3}, "model_args of a search space must be a dict"),
        (toy_space().to_dict() | {"model_args": {"patchsize": 4}}, "unknown model argument 'patchsize'"),
        (toy_space().to_dict() | {"model_args": {"img_size": 20}}, "not a multiple of the total stride"),
        (toy_space().to_dict() | {"model_args": {"distill_token": 1}}, "distill_token must be true or false"),
        (toy_space().to_dict() | {"model_args": {"drop_path_rate": 2}}, "drop_path_rate must be a number from 0"),
        (toy_space().to_dict() | {"network_def": "((4,"}, "network_def text is not a nested tuple"),
        (toy_space().to_dict() | {"num_channels_to_keep": []}, "one entry for each of network_def's 7, got 0 entries"),
        (with_choice(0, [32, 16]), "entry 0: the largest choice is 32, but network_def has 24"),
        (with_choice(0, []), "entry 0 must be a list of 1 to 64 integers"),
        (with_choice(0, [24, 10**9]), "must be an integer from 1 to 65536, got 1000000000"),
        (with_choice(0, [24, "8"]), "must be an integer"),
        (with_choice(0, [24, 24]), "holds a choice twice"),
        (with_choice(0, list(range(24, 0, -1)) * 3), "list of 1 to 64"),
        (with_choice(1, [16]), "entry 1 belongs to a block and must be a dict of attn, mlp, layer"),
        (with_choice(1, dict(attn=[16, 12], mlp=[48], layer=None)), "multiples of head_dim 8"),
        (with_choice(2, dict(attn=[16], mlp=[32], layer=[24, 8, 0])), r"must hold 24 \(present\) and 0 \(absent\)"),
        (with_choice(4, [32, 16]), "entry 4: width 16 is smaller than the 24 of the stage before"),
        (with_choice(6, [32]), "entry 6 belongs to the head and must be None"),
    ],
)
def test_bad_dicts(data, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace.from_dict(data)


# -- generators -------------------------------------------------------------------------------------------------------

# paper's generator in the released code: 2,000 networks each, mean and standard deviation
STATISTICS = {
    ("vit_resnas_tiny", 1_794_400_000): dict(
        macs=(1.7880e9, 0.0081e9), removed=(4.470, 1.331), widths=(199.6, 399.1, 800.0), heads=0.753, hidden=0.858
    ),
    ("vit_resnas_small", 2_900_000_000): dict(
        macs=(2.8819e9, 0.0202e9), removed=(4.982, 1.265), widths=(234.8, 466.2, 943.1), heads=0.751, hidden=0.801
    ),
    ("vit_resnas_small", 4_600_000_000): dict(
        macs=(4.5777e9, 0.0312e9), removed=(3.037, 1.136), widths=(278.8, 569.0, 1118.3), heads=0.945, hidden=0.963
    ),
}


@pytest.mark.parametrize("name, limit", STATISTICS)
def test_generator_statistics_of_the_paper(name, limit):
    space, expected = SearchSpace.preset(name), STATISTICS[name, limit]
    archs = space.sample_many(2000, np.random.default_rng(0), Budget(macs=limit))
    rows = []
    for arch in archs:
        blocks = [(b, full) for b, full in zip(arch.blocks, space.largest.blocks, strict=True) if isinstance(b, Block)]
        there = [(b, full) for b, full in blocks if b.exists]
        rows.append(
            (
                macs(arch),
                len(blocks) - len(there),
                *arch.embed_dims,
                np.mean([b.num_heads / full.num_heads for b, full in there]),
                np.mean([b.mlp_hidden / full.mlp_hidden for b, full in there]),
            )
        )
    rows = np.array(rows)
    assert (rows[:, 0] <= limit).all() and (rows[:, 0] >= 0.975 * limit).all()
    # the expected means have the same standard error as ours, and are rounded to the digits shown
    error = 4 * rows.std(axis=0, ddof=1) * (2 / 2000) ** 0.5
    error += [0.00005e9, 0.0005, 0.05, 0.05, 0.05, 0.0005, 0.0005]
    wanted = [expected["macs"][0], expected["removed"][0], *expected["widths"], expected["heads"], expected["hidden"]]
    assert (abs(rows.mean(axis=0) - wanted) < error).all(), (rows.mean(axis=0), wanted, error)
    assert rows[:, 0].std() == pytest.approx(expected["macs"][1], rel=0.1)
    assert rows[:, 1].std() == pytest.approx(expected["removed"][1], rel=0.1)


@pytest.mark.parametrize("fraction, free_steps", [(0.45, 100), (0.45, 20), (0.75, 100)])
def test_generator_equals_slow_one(fraction, free_steps, monkeypatch):
    # cascade, every kind of step, and a walk that ends in either phase
    monkeypatch.setattr(generator, "FREE_STEPS", free_steps)
    space = toy_space()
    limit = int(fraction * space.costs(space.largest)["macs"])
    budget = Budget(macs=limit, lower=0.9)
    fast = space.sample_many(8000, np.random.default_rng(0), budget)
    slow, rng = SlowSpace(space), np.random.default_rng(1)
    assert_same_distribution(fast, [slow.generate(rng, *budget.band, free_steps) for _ in range(1500)])


def test_walks_end_at_the_limit():
    # the cost that a walk keeps up step by step is the true one
    for name, fraction in (("macs", 0.35), ("params", 0.35), ("memory", 0.6)):
        space = SearchSpace.preset("mini" if name == "params" else "micro")
        limit = fraction * space.costs(space.largest)[name]
        rows = generator.generate(space, 1000, np.random.default_rng(0), Budget(**{name: limit}))
        costs = space.table(name).cost(rows)
        assert (costs <= limit).all()
        if name != "memory":  # one step more than needed would end lower
            assert (costs >= 0.95 * limit).mean() > 0.8


def test_listed_starts_equal_rejection(monkeypatch):
    space = toy_space()
    floor = 0.7 * space.costs(space.largest)["macs"]
    listed, costs = generator.listed_starts(space, 8000, np.random.default_rng(0), "macs", floor)
    assert (costs == space.table("macs").cost(listed)).all()
    monkeypatch.setattr(generator, "MAX_STARTS", 0)
    drawn, _ = generator.starts(space, 8000, np.random.default_rng(1), "macs", floor)
    assert_same_distribution(space.decode(listed), space.decode(drawn))
    # and they are used where drawing would take long
    monkeypatch.undo()
    space = SearchSpace.preset("vit_resnas_small")
    archs = space.sample_many(50, np.random.default_rng(0), Budget(macs=6.1e9))
    assert space.table("macs").listed and all(0.975 * 6.1e9 <= macs(a) <= 6.1e9 for a in archs)


def test_mutation_equals_slow_one():
    space = toy_space()
    limit = int(0.6 * space.costs(space.largest)["macs"])
    budget = Budget(macs=limit, lower=0.7)
    parent = space.sample(np.random.default_rng(5), budget)
    slow, rng = SlowSpace(space), np.random.default_rng(1)
    fast = space.mutate_many([parent], 8000, np.random.default_rng(0), 0.3, budget)
    assert_same_distribution(fast, [slow.mutate(parent, rng, 0.3, *budget.band) for _ in range(1500)])
    fast = space.mutate_many([space.smallest], 8000, np.random.default_rng(0), 0.3)
    other = [slow.mutate(space.smallest, rng, 0.3, 0, np.inf) for _ in range(3000)]
    assert_same_distribution(fast, other)


def test_crossover_equals_slow_one():
    space = toy_space()
    budget = Budget(macs=int(0.8 * space.costs(space.largest)["macs"]), lower=0.5)
    slow, rng = SlowSpace(space), np.random.default_rng(1)
    a, b = space.smallest, space.largest
    fast = [space.crossover(a, b, rng, budget) for _ in range(1500)]
    assert_same_distribution(fast, [slow.crossover(a, b, rng, *budget.band) for _ in range(1500)])
    assert_same_distribution(
        space.crossover_many([a, b], 8000, rng), [slow.crossover(a, b, rng, 0, np.inf) for _ in range(3000)]
    )


def test_parents_are_uniform_and_pairs_differ():
    space = SearchSpace.preset("micro")
    rng = np.random.default_rng(0)
    parents = space.sample_many(4, rng)
    children = space.mutate_many(parents, 4000, rng, prob=1e-9)  # nothing changes
    counts = Counter(children)
    assert set(counts) == set(parents) and all(abs(n - 1000) < 150 for n in counts.values())
    mixed = space.crossover_many(parents, 200, rng)
    assert sum(c in parents for c in mixed) < 10
    with pytest.raises(ValueError, match="at least two parents"):
        space.crossover_many(parents[:1], 5, rng)
    with pytest.raises(ValueError, match="stages of"):
        space.mutate(toy_space().largest, rng)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("fraction", [0.35, 0.6])
def test_children_stay_in_budget(name, fraction):
    space = SearchSpace.preset(name)
    rng = np.random.default_rng(0)
    budget = Budget(macs=int(fraction * space.costs(space.largest)["macs"]))
    parents = space.sample_many(40, rng, budget)
    children = space.mutate_many(parents, 40, rng, 0.3, budget), space.crossover_many(parents, 40, rng, budget)
    assert [len(x) for x in (parents, *children)] == [40, 40, 40]
    for arch in itertools.chain(parents, *children):
        assert budget.check(space.costs(arch)) == []
        assert space.contains(arch)


def with_latency(space: SearchSpace) -> SearchSpace:
    """A millisecond for a thousand hidden units, and 0.1 ms for the network."""
    space.price("latency_ms", lambda layer: 1000 * dict(layer.shape).get("hidden", 0), unit=10**6, base=10**5)
    return space


def test_price():
    space = with_latency(toy_space())
    arch = space.largest
    hidden = sum(b.mlp_hidden for b in arch.blocks if isinstance(b, Block))
    assert space.cost_names == ("macs", "params", "memory", "latency_ms")
    assert space.costs(arch)["latency_ms"] == (100 + hidden) / 1000
    assert space.cost_range("latency_ms") == (0.132, (100 + hidden) / 1000)
    space.price("latency_ms", lambda layer: 1)
    assert space.costs(arch)["latency_ms"] == len(arch.layers(**space.model_args))
    for price in (-1, 0.5, None):
        space.price("latency_ms", lambda layer, price=price: price)
        with pytest.raises(ValueError, match="must be a non-negative integer"):
            space.costs(arch)
    with pytest.raises(BudgetError, match="no price for energy, only for macs, params, memory, latency_ms"):
        space.cost_range("energy")


@pytest.mark.parametrize("seed", range(3))
def test_cost_range_of_any_price(seed):
    # a cost that grows with nothing: the ends are found by elimination, not at the largest and smallest network
    space = toy_space()
    values: dict = {}
    rng = np.random.default_rng(seed)
    space.price("latency_ms", lambda layer: values.setdefault(layer, int(rng.integers(1000))), unit=1)
    costs = [space.costs(a)["latency_ms"] for a in enumerate_space(space).values()]
    assert space.cost_range("latency_ms") == (min(costs), max(costs))
    space.price("peak", lambda layer: values[layer], reduce="max", base=7)
    costs = [space.costs(a)["peak"] for a in enumerate_space(space).values()]
    assert space.cost_range("peak") == (min(costs), max(costs))


@pytest.mark.parametrize(
    "budget",
    [
        Budget(macs=12e6, params=800_000),
        Budget(params=800_000, macs=12e6),
        Budget(macs=12e6, latency_ms=2),
        Budget(latency_ms=2, macs=14e6),
        Budget(macs=12e6, memory=100e3, latency_ms=2, lower=0.9),
        Budget(memory=120e3, lower=0.9),
        Budget(macs=12e6, lower=0.999),
        Budget(params=10e6, lower=0),
    ],
    ids=str,
)
def test_several_limits(budget):
    space = with_latency(SearchSpace.preset("micro"))
    rng = np.random.default_rng(0)
    archs = space.sample_many(20, rng, budget)
    archs += space.mutate_many(archs, 20, rng, 0.3, budget)
    archs += space.crossover_many(archs[:20], 20, rng, budget)
    assert len(archs) == 60
    for arch in archs:
        assert budget.check(space.costs(arch)) == []


@pytest.mark.parametrize(
    "budget, message",
    [
        (Budget(macs=1e6), "macs=1M is below the smallest network of the space, .* macs from 4.16.*M to 30.*M"),
        (Budget(macs=40e6), r"macs=40M is above the largest .* \(lower=0 allows"),
        (Budget(macs=12e6, params=1e5), "params=100K is below the smallest"),
        (Budget(params=5e6), "params=5M is above the largest"),
        (Budget(latency_ms=3), "no price for latency_ms, only for .*; measure a latency table"),
    ],
)
def test_budgets_out_of_reach(budget, message):
    space = SearchSpace.preset("micro")
    for call in (space.check_budget, lambda b: space.sample(np.random.default_rng(0), b)):
        with pytest.raises(BudgetError, match=message):
            call(budget)


def test_contradictory_budget(monkeypatch):
    monkeypatch.setattr(space_module, "MAX_PROPOSALS", 4096)
    space = SearchSpace.preset("micro")
    with pytest.raises(BudgetError, match="in the band of macs the least params was 4..*K; widen the band"):
        space.sample(np.random.default_rng(0), Budget(macs=12e6, params=300e3))
    with pytest.raises(BudgetError, match=r"in \d+ random tries; the nearest macs was 1.*M; widen"):
        space.sample(np.random.default_rng(0), Budget(macs=12_000_001, lower=0.99999999))
    monkeypatch.setattr(space_module, "_MAX_TRIES", 64)
    with pytest.raises(BudgetError, match="no mutation within"):
        space.mutate(space.largest, np.random.default_rng(0), 0.3, Budget(macs=12_000_001, lower=0.99999999))


def test_budget_at_the_ends():
    space = SearchSpace.preset("micro")
    rng = np.random.default_rng(0)
    most, least = (space.costs(a)["macs"] for a in (space.largest, space.smallest))
    assert space.costs(space.sample(rng, Budget(macs=most)))["macs"] >= 0.975 * most
    assert space.costs(space.sample(rng, Budget(macs=int(1.02 * least))))["macs"] <= 1.02 * least


def test_reductions_never_narrow():
    for name in PRESETS:
        for arch in SearchSpace.preset(name).sample_many(50, np.random.default_rng(0)):
            assert all(b.out_dim >= b.in_dim for b in arch.blocks if isinstance(b, Reduction))
