"""EfficientFormer's blocks as mixtures of paths: against the formula, and against sub-networks."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from recipe_server import Recipe, wait_for_step
from safetensors.torch import load_file
from test_efficientformer_supernet import gradients, images, perturbed, small_v1
from torch.testing import assert_close

from recipes import supernet as recipe
from timm_resnas.engine.settings import SupernetOptions
from timm_resnas.engine.supernet import networks_per_image
from timm_resnas.families.efficientformer_nas import EfficientFormerArch
from timm_resnas.families.meta_path import MetaPath
from timm_resnas.hub import load
from timm_resnas.nas.count import count_macs
from timm_resnas.nas.space import SearchSpace

# places of `small_v1`: two, one, two, four; the first of each stage is always there, the last three can attend
PATHS = [("pools", "identity"), ("pools", "identity"), *[("attends", "pools", "identity")] * 3]


def mixture(**kwargs):
    mixed = MetaPath(perturbed(small_v1()), **kwargs)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for alpha in mixed.alphas:
            alpha.normal_(generator=g)
    return mixed.eval()


def test_paths():
    mixed = mixture()
    several = [mixed.paths(i, p) for i, p in ((0, 1), (2, 1), (3, 1), (3, 2), (3, 3))]
    assert several == PATHS and [len(a) for a in mixed.alphas] == list(map(len, PATHS))
    assert [mixed.paths(i, 0) for i in range(4)] == [("pools",)] * 4
    assert mixed.alphas[0].dtype == torch.float64
    assert {"alphas.0", "net.stages.3.blocks.2.token_mixer.attention_biases"} <= mixed.no_weight_decay()


@pytest.mark.parametrize("noise", ["uniform", "gumbel", "none"])
def test_formula(noise):
    """The whole forward, written out; noise of each place in the order of the forward."""
    mixed = mixture(noise=noise, temperature=0.7).train()
    net, x = mixed.net.eval(), images(2)
    torch.manual_seed(3)
    found = mixed(x)

    torch.manual_seed(3)
    weights = []
    for alpha in mixed.alphas:
        values = alpha.detach().tolist()
        if noise != "none":
            u = torch.rand(len(values), dtype=torch.float64).tolist()
            values = [
                a + (n if noise == "uniform" else -math.log(-math.log(n))) for a, n in zip(values, u, strict=True)
            ]
        powers = [math.exp(v / 0.7) for v in values]
        weights.append([p / sum(powers) for p in powers])

    def tokens(block, y):
        b, c, h, w = y.shape
        return block(y.reshape(b, c, h * w).transpose(1, 2)).transpose(1, 2).reshape(b, c, h, w)

    stages = net.stages
    y = stages[0].blocks[0](net.stem(x))
    y = weights[0][0] * stages[0].blocks[1](y) + weights[0][1] * y
    y = stages[1].blocks[0](stages[1].downsample(y))
    y = stages[2].blocks[0](stages[2].downsample(y))
    y = weights[1][0] * stages[2].blocks[1](y) + weights[1][1] * y
    y = stages[3].blocks[0](stages[3].downsample(y))
    for k in range(3):  # timm's Flat is block 1
        attends, pools, identity = weights[2 + k]
        y = attends * tokens(stages[3].blocks[2 + k], y) + pools * net.pools[k](y) + identity * y
    features = net.norm(y.flatten(2).transpose(1, 2)).mean(1)
    assert_close(found, (net.head(features) + net.head_dist(features)) / 2)


def test_gradient_checkpointing():
    """The same gradients and statistics; activations are computed twice."""
    mixed, found = mixture(noise="gumbel").train(), []
    before = {n: b.clone() for n, b in mixed.named_buffers()}
    for enable in (False, True):
        mixed.net.set_grad_checkpointing(enable)
        mixed.load_state_dict(before, strict=False)
        calls = []
        torch.manual_seed(0)
        with torch.nn.modules.module.register_module_forward_pre_hook(lambda *_, calls=calls: calls.append(0)):
            grads = gradients(mixed, sum(y.square().sum() for y in mixed(images(4))))
        found.append((grads, {n: b.clone() for n, b in mixed.named_buffers()}, len(calls)))
    assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-9)
    assert_close(found[0][1], found[1][1], rtol=0, atol=0)
    assert found[1][2] > 1.5 * found[0][2]
    assert any(not torch.equal(b, before[n]) for n, b in found[0][1].items())


def test_what_a_step_computes():
    """All paths: blocks that pool in the places of those that attend, beside the largest network."""
    space = SearchSpace.preset("efficientformer_micro")
    largest, net = space.largest, timm.create_model("efficientformer_supernet", space="efficientformer_micro")
    size = (3, *space.model_args["img_size"])
    side = size[1] // 32
    pools = sum(count_macs(pool, (largest.embed_dims[-1], side, side)) for pool in net.pools)
    costs = networks_per_image(SupernetOptions(step="paths"), space)
    assert costs == pytest.approx(1 + pools / space.costs(largest)["macs"]) and costs > 1


def test_evaluation_draws_nothing():
    mixed, x = mixture(), images(2)
    state = torch.get_rng_state()
    first = mixed(x)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(first, mixed(x))
    mixed.train()
    mixed.net.eval()
    assert not torch.allclose(mixed(x), mixed(x))


@pytest.mark.parametrize("by", ["weights", "temperature"])
def test_one_path_is_a_sub_network(by):
    """Where one path of each place has all the weight, also as the temperature falls."""
    mixed, x = mixture(), images(3)
    net = mixed.net
    names = [(0, 1), (2, 1), (3, 1), (3, 2), (3, 3)]
    archs = [a for a in net.space.sample_many(200, np.random.default_rng(0)) if a.embed_dims == (12, 14, 12, 20)]
    assert len(archs) > 9 and {a.num_vit for a in archs} == {0, 1, 2, 3}
    for arch in archs:
        there = [p for p, flag in enumerate(arch.depths[3]) if flag]
        with torch.no_grad():
            for (i, p), alpha, paths in zip(names, mixed.alphas, PATHS, strict=True):
                name = "pools" if p < len(arch.depths[i]) and arch.depths[i][p] else "identity"
                if i == 3 and name == "pools" and there.index(p) >= len(there) - arch.num_vit:
                    name = "attends"
                alpha.fill_(0).__setitem__(paths.index(name), 1.0 if by == "temperature" else 1e4)
            mixed.temperature = 1e-4 if by == "temperature" else 1.0
            net.set_arch(arch)
            assert mixed.arch() == arch
            assert_close(mixed(x), net(x))
            net.set_arch(None)


def test_importance():
    mixed = mixture()
    with torch.no_grad():
        mixed.alphas[0].copy_(torch.tensor([math.log(3.0), 0.0]))
        mixed.alphas[2].copy_(torch.tensor([math.log(2.0), math.log(5.0), math.log(4.0)]))
    found = mixed.importance()
    assert found[0] == pytest.approx([math.inf, 3.0])
    assert found[3][:2] == pytest.approx([math.inf, 7 / 4])
    assert mixed.probabilities()[3][1] == pytest.approx(dict(attends=2 / 11, pools=5 / 11, identity=4 / 11))


def test_blocks_attend_from_the_end_on():
    """A block that attends in front of one that pools is none that timm's class can have."""
    mixed = mixture()
    with torch.no_grad():
        for alpha, best in zip(mixed.alphas, (0, 1, 0, 1, 0), strict=True):
            alpha.zero_()[best] = 1.0
    assert mixed.arch() == EfficientFormerArch((12, 14, 12, 20), ((1, 1), (1,), (1,), (1, 1, 1, 1)), 1)


@pytest.mark.parametrize("noise", ["uniform", "gumbel"])
def test_weights_and_paths_train_together(noise):
    torch.manual_seed(0)
    net = timm.create_model("efficientformer_supernet", space=small_v1().to_dict())
    mixed = MetaPath(net, noise=noise).train()
    x, y = images(32, torch.float32), torch.arange(32) % 4
    x = x + y[:, None, None, None] * torch.linspace(-1, 1, 32)
    optimizer, losses = torch.optim.AdamW(mixed.parameters(), lr=3e-3), []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(mixed(x), y)
        grads = gradients(mixed, loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(grads[f"alphas.{i}"].abs().sum() > 0 for i in range(5))
    assert grads["net.pools.0.mlp.fc1.weight"].abs().sum() > 0
    assert len({v for stage in mixed.importance() for v in stage}) > 5
    # the weights are the supernet's
    assert net.extract(mixed.arch()).eval()(x).shape == (32, 5)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(noise="normal"), "noise must be one of uniform, gumbel, none; got 'normal'"),
        (dict(temperature=0.0), "the temperature must be above 0, got 0.0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MetaPath(perturbed(small_v1()), **kwargs)
    with pytest.raises(ValueError, match="EfficientFormerSupernet, got a Linear"):
        MetaPath(torch.nn.Linear(1, 1))


# -- supernet.py --step paths ------------------------------------------------------------------------------------------

PATHS_STEP = [
    *("--cpu", "--threads", "1", "--step", "paths", "--space", "efficientformer_micro", "--img-size", "32"),
    *("--epochs", "1", "--warmup-epochs", "0", "--batch-size", "128", "--calibration", "64"),
]


def test_the_recipe_trains_paths_killed_or_not(recipe_server, tmp_path):
    space = tmp_path / "space.json"
    space.write_text(json.dumps(small_v1(img_size=32, num_classes=10).to_dict()))
    options = [*PATHS_STEP, "--space", str(space), "--checkpoint-steps", "3", "--path-noise", "gumbel"]
    runs = Recipe(recipe_server, "supernet", options)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert "  paths of stage 4, by place: " in runs.run(straight)
    pid = runs.start(killed)
    wait_for_step(killed, 3, pid)
    runs.kill(pid)
    runs.run(killed)
    one, other = (load_file(folder / "supernet" / "model.safetensors") for folder in (straight, killed))
    assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
    found = [json.loads((folder / "supernet" / "paths.json").read_text()) for folder in (straight, killed)]
    assert found[0] == found[1]
    probable = [p for stage in found[0]["probabilities"] for place in stage for p in place.values() if p not in (0, 1)]
    assert len(set(probable)) > 4  # they were trained
    net = load(straight / "supernet")
    net.extract(EfficientFormerArch.from_args(found[0]["most_probable"]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--space", "micro"], "--step paths is for blocks of several paths"),
        (["--num-archs", "2"], "--num-archs is for steps of sub-networks"),
        (["--step", "groups", "--path-noise", "none"], "--path-noise is for --step paths, not groups"),
        (["--sampler", "sandwich"], "--sampler sandwich is for --step groups"),
        (["--mode", "masked"], "--mode is for steps of sub-networks"),
        (["--token-labeling"], "--token-labeling is for --step groups and single"),
    ],
)
def test_options_that_paths_do_not_have(given, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        recipe.main([*PATHS_STEP, *given, "--output", str(tmp_path), "--name", "run"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("supernet.py")]
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run" / "config.yaml").exists()
