"""Everything that is written once works for a family that it has never seen."""

import ast
import json
from pathlib import Path

import numpy as np
import plain_vit
import pytest
import timm
import torch

import timm_resnas
from timm_resnas.arch import Arch
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.count import count_macs
from timm_resnas.nas.evaluate import Evaluator, count_correct
from timm_resnas.nas.evolution import EvolutionSearch
from timm_resnas.nas.pareto import ParetoSearch
from timm_resnas.nas.sampling import SandwichSampler
from timm_resnas.nas.space import SearchSpace
from timm_resnas.nas.units import cut, mask
from timm_resnas.tasks import SupernetTask

ROOT = Path(timm_resnas.__file__).parent


@pytest.fixture(scope="module")
def space():
    space = SearchSpace.preset("plain_vit")
    space.price(
        "latency_ms", lambda layer: 1000 * len(layer.kind) * (1 + dict(layer.shape).get("hidden", 9)), unit=10**6
    )
    return space


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 4
    return torch.randn(64, 3, 32, 32, generator=generator) + y[:, None, None, None] / 2, y


@pytest.fixture(scope="module")
def net(space, images):
    """Trained for a few steps, several sub-networks in each."""
    torch.manual_seed(0)
    net = timm.create_model("plain_vit_supernet", space=space.to_dict())
    task, sampler = SupernetTask(net, smoothing=0.0, verbose=False), SandwichSampler(space, 4, warmup_epochs=0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        loss = task(*images, archs=sampler.archs(0, step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    return net.eval()


def test_costs_are_those_of_built_networks(space):
    for arch in [space.largest, space.smallest, *space.sample_many(5, np.random.default_rng(0))]:
        model = arch.canonical().create(num_classes=10)
        costs = space.costs(arch)
        assert costs["params"] == sum(p.numel() for p in model.parameters())
        assert costs["macs"] == count_macs(model, (3, 32, 32)) == arch.costs(**space.model_args)["macs"]
        assert Arch.from_record(json.loads(json.dumps(arch.record()))) == arch
    assert space.size() == (16 * 17) ** 2


@pytest.mark.parametrize("name", ["macs", "latency_ms"])
def test_drawn_within_budgets(space, name):
    low, high = space.cost_range(name)
    budget, rng = Budget(**{name: (low + high) / 2}, lower=0.9), np.random.default_rng(0)
    archs = space.sample_many(30, rng, budget)
    archs += space.mutate_many(archs, 10, rng, 0.3, budget) + space.crossover_many(archs, 10, rng, budget)
    assert len(archs) == 50 and all(not budget.check(space.costs(arch)) for arch in archs)


def test_extracted_equals_supernet(net, space, images):
    archs = space.sample_many(8, np.random.default_rng(1))
    with torch.no_grad():
        grouped = net(images[0], archs=archs)
    for arch, x, y in zip(archs, images[0].chunk(8), grouped.chunk(8), strict=True):
        with torch.inference_mode():
            net.set_arch(arch)
            alone = net.extract(arch)(x)
            torch.testing.assert_close(net(x), alone, rtol=0, atol=0)
            net.set_arch(None)
        torch.testing.assert_close(alone, y, rtol=1e-5, atol=1e-5)


def test_cut_equals_masked_and_sorting_keeps_the_function(net, images):
    arch = plain_vit.PlainVitArch(tuple(plain_vit.Block(h, f) for h, f in ((2, 64), (4, 32), (1, 128), (3, 96))))
    keep = {
        f"blocks.{i}.{k}": n
        for i, b in enumerate(arch.blocks)
        for k, n in (("attn", b.num_heads), ("mlp", b.mlp_hidden))
    }
    params = dict(net.state_dict())
    small = arch.create()
    small.load_state_dict(cut(params, net.units(), keep))
    with torch.inference_mode():
        masked = torch.func.functional_call(net, mask(params, net.units(), keep), (images[0],))
        torch.testing.assert_close(small.eval()(images[0]), masked, rtol=1e-5, atol=1e-5)
        before = net(images[0])
        net.sort_channels()
        torch.testing.assert_close(net(images[0]), before, rtol=1e-5, atol=1e-5)


def test_searches_resume(net, space, images, tmp_path):
    batches = [images]
    for make in (
        lambda: EvolutionSearch(space, Budget(macs=1.0e6, lower=0.5), 0, population=12, iterations=3, parents=4),
        lambda: ParetoSearch(space, None, 0, objectives=("latency_ms",), population=12, iterations=3, max_score=64),
    ):
        histories = []
        for kill in (False, True):
            search = make()
            search.mutations = search.crossovers = 4
            evaluator = Evaluator(net, batches, folder=tmp_path / f"{search.kind}{kill}")
            while not search.done:
                asked = search.ask()
                asked = asked[: len(asked) // 2 + 1] if kill else asked
                search.tell(zip(asked, evaluator.score(asked), strict=True))
                if kill:
                    state = json.loads(json.dumps(search.state_dict()))
                    search = make()
                    search.mutations = search.crossovers = 4
                    search.load_state_dict(state)
            histories.append(search.history)
        assert histories[0] == histories[1] and len(histories[0]) > 15
        best = Arch.from_record(search.best)
        assert search.best["score"] == count_correct(net.extract(best), batches)[0]


def test_saved_and_loaded(net, space, images, tmp_path):
    for name, model in (("net", net.extract(space.smallest)), ("supernet", net)):
        timm_resnas.save_pretrained(model, tmp_path / name)
        again = timm_resnas.load(f"local-dir:{tmp_path / name}", check=True).eval()
        with torch.inference_mode():
            torch.testing.assert_close(again(images[0]), model(images[0]), rtol=0, atol=0)
    assert again.space == space
    assert len(timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).blocks) == 2


def test_no_room_but_its_own_knows_a_family():
    """nas/, engine/ and hub/ name no family, and imports point one way."""
    floors = ["arch", "models", "nas", "families", "tasks", "data", "engine", "hub"]
    allowed = {"nas": {"arch", "nas"}, "models": {"arch", "models"}, "families": set(floors[:4]), "arch": set()}
    for file in ROOT.rglob("*.py"):
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        text = file.read_text()
        if room in ("nas", "engine", "hub"):
            assert not [w for w in ("vit_resnas", "VitResNas", "network_def", "Reduction") if w in text], file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level and room in allowed:
                depth = len(file.relative_to(ROOT).parts) - node.level
                names = [node.module] if node.module else [alias.name for alias in node.names]
                target = names if depth == 0 else [room]
                assert {t.split(".")[0] for t in target} <= allowed[room], (file, target)


def test_the_family_is_one_file(python):
    lines = Path(plain_vit.__file__).read_text().splitlines()
    assert len([line for line in lines if line.strip()]) < 160
    code = "import sys, timm, timm_resnas; sys.exit('plain_vit' in timm.list_models())"
    assert python.run(code).returncode == 0
