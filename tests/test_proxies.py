"""Training-free scores: against released code's numbers and definitions written out, and what they leave alone."""

import copy
import json

import numpy as np
import plain_vit  # noqa: F401
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import timm_resnas
from timm_resnas.engine.settings import SearchOptions
from timm_resnas.models.autoformer import checkpoint_filter_fn
from timm_resnas.nas.evaluate import FIXED_POINT, SCORES
from timm_resnas.nas.proxies import PROXIES, ProxyEvaluator, linear_maps, proxy_score, score_network
from timm_resnas.nas.units import pre_norm_units

WITH_WEIGHTS = [name for name, compute in PROXIES.items() if compute is not None]


def supernet(name):
    torch.manual_seed(0)
    if name == "elastic":
        return timm_resnas.elastic(
            timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_classes=5)
        )
    return timm.create_model(name)


def batch(n=6):
    torch.manual_seed(1)
    return torch.randn(n, 3, 32, 32), torch.arange(n) % 5


# -- TF-TAS's indicator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["arch0", "arch1"])
def test_dss_of_the_released_code(case, golden):
    with safe_open(golden("dss_a"), "pt") as f:
        facts = json.loads(f.metadata()["archs"])[case]
        weights = {k.split("/param/")[1]: f.get_tensor(k) for k in f.keys() if k.startswith(f"{case}/param/")}
        logits = f.get_tensor(f"{case}/logits_ones_input")
    arch, largest = facts["arch"], facts["supernet"]
    net = timm.create_model(
        "autoformer",
        embed_dim=arch["embed_dim"][0],
        mlp_ratio=arch["mlp_ratio"],
        num_heads=arch["num_heads"],
        img_size=largest["img_size"],
        patch_size=largest["patch_size"],
        max_relative_position=largest["max_relative_position"],
    )
    net.load_state_dict(checkpoint_filter_fn(weights, net))
    ones = torch.ones(1, 3, 32, 32)
    torch.testing.assert_close(net.eval()(ones), logits, rtol=1e-4, atol=1e-4)
    units = [unit for i, block in enumerate(net.blocks) for unit in pre_norm_units(f"blocks.{i}", block)]
    maps = linear_maps(net, units)
    assert len(maps.attention) == len(maps.mlp) == len(maps.readers) == 2 * len(net.blocks)
    names = dict(dss="score_paper_abs", dss_raw="score_grad_everywhere_raw", dss_released="score_released")
    for name, key in names.items():
        for images in (ones, torch.randn(3, 3, 32, 32)):  # only their shape counts
            assert score_network(name, copy.deepcopy(net), maps, images) == pytest.approx(facts[key], rel=1e-4), name


# -- definitions, on a network small enough to write them out ---------------------------------------------------------


class Tiny(nn.Module):
    """A convolution of patches, one MLP, a classifier."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 4, 16, 16), nn.Linear(4, 32), nn.Linear(32, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv(x).flatten(2).mean(-1)
        return self.head(x + self.fc2(F.gelu(self.fc1(x))))


def tiny():
    torch.manual_seed(0)
    net = Tiny()
    units = timm_resnas.arch.Units(
        "mlp", 32, (timm_resnas.arch.Part("fc1.weight", 0), timm_resnas.arch.Part("fc2.weight", 1))
    )
    return net, linear_maps(net, [units])


def test_saliencies_written_out():
    net, maps = tiny()
    assert maps.attention == () and maps.mlp == ("fc1.weight", "fc2.weight") and maps.readers == ("fc2.weight",)
    x, y = batch()
    weights = [net.conv.weight, net.fc1.weight, net.fc2.weight, net.head.weight]
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), weights)
    wanted = sum((g * w).abs().sum().item() for g, w in zip(grads, weights, strict=True))
    assert score_network("snip", copy.deepcopy(net), maps, x, y) == pytest.approx(wanted, rel=1e-5)

    positive = copy.deepcopy(net).double()
    for p in positive.parameters():
        p.data.abs_()
    weights = [positive.conv.weight, positive.fc1.weight, positive.fc2.weight, positive.head.weight]
    grads = torch.autograd.grad(positive(torch.ones(1, 3, 32, 32).double()).sum(), weights)
    terms = [(g * w).abs().sum().item() for g, w in zip(grads, weights, strict=True)]
    assert score_network("synflow", copy.deepcopy(net), maps, x) == pytest.approx(np.log(sum(terms)), rel=1e-12)
    assert score_network("dss", copy.deepcopy(net), maps, x) == pytest.approx(terms[1] + terms[2], rel=1e-5)


def test_naswot_written_out():
    net, maps = tiny()
    x, _ = batch()
    with torch.no_grad():
        hidden = net.fc1(net.conv(x).flatten(2).mean(-1))
    kernel = [
        [sum((a > 0) == (b > 0) for a, b in zip(u, v, strict=True)) for u in hidden.tolist()] for v in hidden.tolist()
    ]
    sign, wanted = np.linalg.slogdet(np.array(kernel, float))
    assert sign == 1
    assert score_network("naswot", net, maps, x) == pytest.approx(wanted, rel=1e-6)
    assert np.isfinite(score_network("naswot", net, maps, x[[0, 0, 1]]))  # images that are alike


# -- of any family ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit_resnas_supernet", "autoformer_supernet", "elastic"])
def test_scores_of_sub_networks_and_what_they_leave_alone(family):
    """Those of the network alone; deterministic; weights, gradients, buffers, mode, the generator and what a caller
    has set stay as they were."""
    net, (x, y) = supernet(family).train(), batch()
    archs = [net.space.smallest, *net.space.sample_many(1, np.random.default_rng(0))]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with torch.no_grad():
        found = {name: [proxy_score(name, net, arch, x, y) for arch in archs] for name in PROXIES}
    assert torch.equal(torch.get_rng_state(), state) and net.training and net.active is None
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())

    for name, values in found.items():
        assert values == [proxy_score(name, net, arch, x, y) for arch in archs], name
    for i, arch in enumerate(archs):
        alone = net.extract(arch)
        assert found["params"][i] == sum(p.numel() for p in alone.parameters())
        assert found["macs"][i] == net.space.costs(arch)["macs"]
        maps = linear_maps(alone, net.units(), lambda key, arch=arch: net.own_key(arch, key))
        assert {n.split(".")[-2] for n in maps.attention} <= {"qkv", "proj"}
        assert {n.split(".")[-2] for n in maps.mlp} <= {"fc1", "fc2"}
        assert len(maps.attention) == len([n for n, _ in alone.named_parameters() if "attn" in n and ".weight" in n])
        for name in WITH_WEIGHTS:
            assert score_network(name, copy.deepcopy(alone), maps, x, y) == found[name][i], name


def test_evaluator_keeps_scores_apart(tmp_path):
    net, (x, y) = supernet("plain_vit_supernet"), batch()
    archs = net.space.sample_many(3, np.random.default_rng(0))
    evaluator = ProxyEvaluator(net, "naswot", x, y, folder=tmp_path, fingerprint="weights")
    scores = evaluator.score(archs)
    values = [proxy_score("naswot", net, arch, x, y) for arch in archs]
    assert scores == [round(v * FIXED_POINT) for v in values] and len(set(scores)) == 3
    assert [evaluator.record(arch)["value"] for arch in archs] == values
    again = ProxyEvaluator(net, "naswot", x, y, folder=tmp_path, fingerprint="weights")
    assert again.score(archs) == scores and again.num_computed == 0
    other = ProxyEvaluator(net, "params", x, y, folder=tmp_path, fingerprint="weights")
    assert other.score(archs) == [FIXED_POINT * net.space.costs(a)["params"] for a in archs] and other.num_computed == 3


def test_every_score_is_an_option():
    field = SearchOptions.__dataclass_fields__["score"]
    assert set(field.metadata["choices"]) == {*SCORES, *PROXIES} - {"cosine"}
