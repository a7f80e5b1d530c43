"""Tokens as genes: a network that was found equals the sub-network of the supernet, and costs what it counts."""

import json

import numpy as np
import pytest
import timm
import torch

import timm_resnas
from timm_resnas.arch import Arch, ArchError
from timm_resnas.families.elastic_space import ElasticArch
from timm_resnas.families.elastic_tokens import TokenArch, TokenSpace, with_tokens
from timm_resnas.models.token_reduction import TokenError, TokenReduction
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.count import count_macs
from timm_resnas.nas.space import SearchSpace
from timm_resnas.nas.timing import layer_starts

# plain, registers with layer scale, q/k norm and an image that is no square, one that is pooled over its patches
BASES = {
    "vit_tiny_patch16_224": dict(img_size=64, depth=4),
    "vit_small_patch14_reg4_dinov2": dict(img_size=56, depth=4),
    "deit_tiny_patch16_224": dict(img_size=(48, 64), depth=5, qk_norm=True),
    "vit_little_patch16_reg1_gap_256": dict(img_size=64, depth=4, class_token=True),
}


def make(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **BASES[name]).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.02)
    return model


@pytest.fixture(scope="module", params=BASES)
def pair(request):
    model = make(request.param)
    return model, with_tokens(timm_resnas.elastic(model)).eval()


def images(net, n=4, seed=1):
    return torch.randn(n, 3, *net.space.model_args["img_size"], generator=torch.Generator().manual_seed(seed))


def drawn(net, n=10, budget=None):
    return net.space.sample_many(n, np.random.default_rng(0), budget)


def test_found_networks_are_the_sub_networks_and_cost_what_they_count(pair):
    model, net = pair
    x, size = images(net), (3, *net.space.model_args["img_size"])
    with torch.inference_mode():
        assert torch.equal(net(x), model(x))
        for arch in drawn(net):
            small = net.extract(arch)
            net.set_arch(arch)
            torch.testing.assert_close(net(x), small(x), rtol=1e-6, atol=1e-6)
            net.set_arch(None)
            assert isinstance(small, TokenReduction) is (min(arch.keep_ratios) < 1)
            costs = net.space.costs(arch)
            assert costs["macs"] == count_macs(small, size)
            assert costs["params"] == sum(p.numel() for p in small.parameters())
            assert costs == arch.costs(**net.space.model_args) == arch.canonical().costs(**net.space.model_args)
            assert len(layer_starts(small)) == len(net.space.layers(arch))
        patches = net.patch_embed.num_patches
        arch = TokenArch.from_args({**net.space.largest.args(), "keep_ratios": [1.0, 0.7, 0.5]})
        assert net.extract(arch).forward_features(x).shape[1] == net.num_prefix_tokens + patches // 2


def test_what_stays_is_what_the_class_token_sees(pair):
    """By the attention of the block itself, computed here for all tokens."""
    model, net = pair
    x, place, prefix = images(net), net.space.blocks[0], net.num_prefix_tokens
    seen = {}

    def scores(module, inputs, output):
        q, k, v = module.qkv(inputs[0]).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = module.q_norm(q), module.k_norm(k)
        weights = (q[:, :, 0, None] @ k.transpose(-2, -1) * module.scale).softmax(-1)[:, :, 0].sum(1)
        seen[0] = (weights * v.square().sum((1, 3)).sqrt())[:, prefix:]

    handle = model.blocks[place].attn.register_forward_hook(scores)
    with torch.inference_mode():
        whole = model.forward_intermediates(x, indices=[place], output_fmt="NLC", intermediates_only=True)[0]
        handle.remove()
        small = net.extract(TokenArch.from_args({**net.space.largest.args(), "keep_ratios": [0.5, 0.5, 0.5]}))
        found = small.forward_intermediates(x, indices=[place], output_fmt="NLC", intermediates_only=True)[0]
    best = seen[0].topk(int(0.5 * whole.shape[1]), dim=1)[1]
    kept = torch.zeros(whole.shape[:2], dtype=torch.bool).scatter(1, best, True)
    torch.testing.assert_close(found, whole * kept.unsqueeze(-1), rtol=1e-5, atol=1e-5)


def test_gradients_of_groups_are_those_of_each_alone():
    net = with_tokens(timm_resnas.elastic(make("vit_tiny_patch16_224"))).double().train()
    archs = [net.space.largest, *drawn(net, 3), net.space.smallest]
    assert len({arch.keep_ratios for arch in archs}) > 2
    archs.insert(2, archs[1])  # of equal numbers of tokens, at once
    x = images(net, 2 * len(archs)).double()
    weight = torch.linspace(-1, 1, 7, dtype=torch.double)

    def gradients(forward):
        net.zero_grad()
        (forward() * weight).sum().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters()}

    sliced = gradients(lambda: net(x, archs=archs))
    alone = gradients(lambda: torch.cat([net(part, archs=[a]) for part, a in zip(x.chunk(6), archs, strict=True)]))
    for name, expected in alone.items():
        torch.testing.assert_close(sliced[name], expected, rtol=1e-9, atol=1e-9)


def test_repair_brings_a_network_nearer_to_the_full_one():
    net = with_tokens(timm_resnas.elastic(make("vit_tiny_patch16_224"))).eval()
    fit, held = images(net, 96), images(net, 32, seed=2)
    net.calibrate(fit.split(32))
    arch = TokenArch(
        net.space.base, ((2, 384), (2, 384), (1, 384), (2, 384)), net.space.blocks, (0.9, 0.7, 0.5)
    )  # fmt: skip
    with torch.inference_mode():
        full, plain = net(held), with_tokens(timm_resnas.elastic(make("vit_tiny_patch16_224"))).eval()
        plain.calibrate(fit.split(32), repair=False)

        def error(model):
            return (model(held) - full).square().mean().item()

        # as it is, repaired while it is scored, and layer after layer
        errors = [error(m) for m in (plain.extract(arch), net.extract(arch), net.extract(arch, repair=fit))]
        net.set_arch(arch)
        torch.testing.assert_close(net(held), net.extract(arch)(held), rtol=1e-5, atol=1e-5)
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.8 * errors[0]


def test_draws_and_identities():
    net = with_tokens(timm_resnas.elastic(make("vit_tiny_patch16_224")), keep_ratios=[1, 0.6, 0.3], blocks=[1, 3])
    space = net.space
    widths = 4 * 17**4 * 3**2 * 4**2 // 4  # heads of blocks that drop patches: one at least
    assert space.size() == widths * 6
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    archs = drawn(net, 50, Budget.parse("macs=50%", space.costs(space.largest)))
    assert len({a.keep_ratios for a in archs}) > 3
    for arch in archs:
        assert list(arch.keep_ratios) == sorted(arch.keep_ratios, reverse=True)
        assert arch.widths[1][0] and arch.widths[3][0]
        again = Arch.from_record(json.loads(json.dumps(arch.record())))
        assert again == arch and space.contains(arch) and space.decode(space.encode(arch)[None]) == [arch]
    rng = np.random.default_rng(1)
    for child in space.mutate(archs[0], rng, 0.5, None), space.crossover(archs[0], archs[1], rng, None):
        assert space.contains(child)
    whole = TokenArch(space.base, archs[0].widths, (1, 3), (1.0, 1.0))
    assert whole.canonical() == ElasticArch(space.base, archs[0].widths)
    assert TokenArch(space.base, archs[0].widths, (1, 3), (0.6, 0.6)).canonical().blocks == (1,)
    # other models of the entry point are none of the family
    assert Arch.of("vit_tokens", {"base": space.base, "method": "dynamicvit"}) is None


def test_shares_that_are_as_many_patches():
    """0.9 and 0.88 of 8 patches are 7: nothing is chosen a second time, and the cost says so."""
    space = TokenSpace("test_vit", keep_ratios=[1, 0.9, 0.88], img_size=(64, 32), num_classes=7)
    arch = TokenArch(space.base, space.largest.widths, space.blocks, (0.9, 0.9, 0.88))
    small = space.network(arch).eval()
    assert space.costs(arch)["macs"] == count_macs(small, (3, 64, 32))


def test_two_heads_in_training():
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=4, num_classes=7)
    net = with_tokens(timm_resnas.elastic(model)).train()
    net.set_distilled_training(True)
    archs, x = [net.space.largest, net.space.smallest], images(net)
    found = net(x, archs=archs)
    assert isinstance(found, tuple) and len(found) == 2
    for i, arch in enumerate(archs):
        small = net.extract(arch)
        small.set_distilled_training(True)
        for part, wanted in zip(found, small(x.chunk(2)[i]), strict=True):
            torch.testing.assert_close(part.chunk(2)[i], wanted, rtol=1e-5, atol=1e-5)


def test_networks_without_tokens_are_of_another_space():
    net = with_tokens(timm_resnas.elastic(make("vit_tiny_patch16_224")))
    assert not net.space.contains(net.space.largest.canonical())


def test_saved_and_loaded(tmp_path):
    net = with_tokens(timm_resnas.elastic(make("vit_small_patch14_reg4_dinov2"))).eval()
    arch, x = drawn(net, 1, Budget.parse("macs=50%", net.space.costs(net.space.largest)))[0], images(net)
    net.calibrate([x])  # how it repairs while it scores is not saved
    small = net.extract(arch, repair=x)
    timm_resnas.save_pretrained(small, tmp_path / "small")
    timm_resnas.save_pretrained(net, tmp_path / "net")
    with torch.inference_mode():
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()(x), small(x))
        again = timm_resnas.load(tmp_path / "net").eval()
        for supernet in (again, net):
            supernet.set_arch(arch)
        with net.as_saved():
            torch.testing.assert_close(again(x), net(x), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(again(x), net(x), rtol=1e-3)
    # fixed numbers of tokens, of any number of images
    exported = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    with torch.inference_mode():
        torch.testing.assert_close(exported(x[:3]), small(x[:3]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_base_patch16_siglip_224", {}, "what the class token sees"),
        ("vit_tiny_patch16_224", dict(keep_ratios=[0.9, 0.5]), "must fall from 1"),
        ("vit_tiny_patch16_224", dict(keep_ratios=[1, 0.5, 0.7]), "must fall from 1"),
        ("vit_tiny_patch16_224", dict(blocks=[3, 1]), "rising numbers of blocks"),
        ("vit_tiny_patch16_224", dict(blocks=[1, 4]), "from 0 to 3"),
        ("vit_tiny_patch16_224", dict(choices=[[[3], [8]], [[0], [8]], [[3], [8]], [[3], [8]]]), "block 1 has no att"),
        ("eva02_tiny_patch14_224", {}, "VisionTransformer"),
    ],
)
def test_what_does_not_fit_is_named(name, options, message):
    with pytest.raises(TokenError, match=message):
        TokenSpace(name, img_size=28 if "14" in name else 32, depth=4, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(keep_ratios=[0.5, 0.7, 0.7]), "none higher than the one before"),
        (dict(keep_ratios=[0.5]), "one for each of the 3"),
        (dict(blocks=[1, 2, 9]), "from 0 to 3"),
        (dict(method="dynamicvit"), "method must be 'ats'"),
        (dict(widths=[[3, 768], [0, 768], [3, 768], [3, 768]]), "block 1 has no attention"),
    ],
)
def test_malformed_networks(changes, message):
    space = TokenSpace("vit_tiny_patch16_224", img_size=64, depth=4)
    with pytest.raises(ArchError, match=message):
        TokenArch.from_args({**space.largest.args(), **changes})


def test_keep_ratios_instead_of_sampling():
    model = make("vit_tiny_patch16_224")
    fewer = timm_resnas.reduce_tokens(model, "ats", blocks=[1, 2], keep_ratios=[0.75, 0.5])
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        # independent of the other images of a batch
        torch.testing.assert_close(fewer(x)[1:2], fewer(x[1:2]), rtol=1e-5, atol=1e-5)
        kept = timm_resnas.reduce_tokens(model, "ats", blocks=[1, 2], keep_ratios=[1.0, 1.0])
        assert torch.equal(kept(x), model(x))
        assert fewer.forward_features(x).shape == (3, 1 + 8, 192)
    assert fewer.options() == {"blocks": [1, 2], "keep_ratios": [0.75, 0.5]}
    with pytest.raises(TokenError, match="give one of them"):
        timm_resnas.reduce_tokens(model, "ats", max_tokens=4, keep_ratios=[0.5] * 3)
    with pytest.raises(TokenError, match="one for each of the 2 blocks"):
        timm_resnas.reduce_tokens(model, "ats", blocks=[1, 2], keep_ratios=[0.5])
