"""Any timm ViT as a supernet: what is cut equals what is masked, costs are those of built models, repair repairs."""

import copy
import json

import numpy as np
import pytest
import timm
import torch

import timm_resnas
from timm_resnas.arch import Arch, ArchError
from timm_resnas.families.elastic_space import ElasticArch, ElasticSpace, hidden_choices
from timm_resnas.models.narrow import NarrowError
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.count import count_macs
from timm_resnas.nas.repair import Moments, correction
from timm_resnas.nas.timing import layer_starts
from timm_resnas.nas.units import mask

# plain, distilled, registers, q/k norm, attention pool, rotary with SwiGLU, norms over pruned units, separate q/k/v,
# Beit's tables, layer scale with class attention, ours
BASES = {
    "test_vit": dict(img_size=32),
    "deit_tiny_distilled_patch16_224": dict(img_size=32, depth=3),
    "vit_little_patch16_reg4_gap_256": dict(img_size=32, depth=2),
    "vit_base_patch16_siglip_224": dict(img_size=32, depth=1),
    "vit_tiny_patch16_224": dict(img_size=(32, 48), depth=3, qk_norm=True, init_values=0.1),
    "eva02_tiny_patch14_224": dict(img_size=28, depth=3),
    "eva02_base_patch14_448": dict(img_size=28, depth=1),
    "vit_small_patch16_dinov3": dict(img_size=32, depth=2),
    "beit_base_patch16_224": dict(img_size=32, depth=1),
    "cait_xxs24_224": dict(img_size=32, depth=2),
    "vit_resnas": dict(
        network_def=[
            *([5, 24, 8], [1, [24, 3, 8], [24, 48], 1], [3, 24, 32], [1, [32, 4, 8], [32, 64], 1]),
            *([1, [32, 2, 16], [32, 96], 1], [3, 32, 48], [1, [48, 4, 12], [48, 96], 1], [2, 48, 7]),
        ],
        img_size=56,
    ),
}


def make(name, **more):
    """The base with weights that depend on every parameter."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **BASES[name], **more).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.02)
    return model


@pytest.fixture(scope="module", params=BASES)
def pair(request):
    model = make(request.param)
    return request.param, model, timm_resnas.elastic(model).eval()


def images(net, n=4, seed=1):
    return torch.randn(n, 3, *net.space.model_args["img_size"], generator=torch.Generator().manual_seed(seed))


def silenced(net, arch):
    """Weights of the full network in which the units that the architecture lacks are zero."""
    counts = dict(zip((u.name for u in net.units()), (n for widths in arch.widths for n in widths), strict=True))
    state = mask(net.state_dict(), net.units(), counts)
    for unit in net.units():
        if counts[unit.name] == 0:  # an absent branch has no bias either
            for name in (f"{unit.name}.proj.bias", f"{unit.name}.fc2.bias"):
                if name in state:
                    state[name] = torch.zeros_like(state[name])
    return state


def in_order(model, modules, x):
    """The modules as the forward enters them."""
    entered = []
    handles = [m.register_forward_pre_hook(lambda m, _: entered.append(m)) for m in modules]
    model(x)
    for handle in handles:
        handle.remove()
    return entered


def test_cut_equals_silenced_and_costs_are_those_of_built_networks(pair):
    name, model, net = pair
    x = images(net)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), model(x), rtol=1e-6, atol=1e-6)
        for arch in net.space.sample_many(10, np.random.default_rng(0)):
            small = net.extract(arch)
            net.set_arch(arch)
            torch.testing.assert_close(net(x), small(x), rtol=1e-6, atol=1e-6)
            net.set_arch(None)
            if name != "eva02_base_patch14_448":  # norms over hidden units are taken over those that are kept
                expected = torch.func.functional_call(model, silenced(net, arch), (x,))
                torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
            costs = net.space.costs(arch)
            assert costs["params"] == sum(p.numel() for p in small.parameters())
            assert costs["macs"] == count_macs(small, x.shape[1:]) == arch.costs(**net.space.model_args)["macs"]
            assert Arch.from_record(json.loads(json.dumps(arch.record()))) == arch
            # where latency tables measure: entered one after the other, one for each layer
            starts = layer_starts(small)
            assert in_order(small, starts, x) == starts and len(starts) == len(arch.layers(**net.space.model_args))


def test_sorting_keeps_the_function(pair):
    _, model, net = pair
    x = images(net)
    net.calibrate([images(net, 8, seed=2)], repair=False)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224", "cait_xxs24_224", "beit_base_patch16_224"])
def test_gradients_of_groups_are_those_of_each_alone(name):
    net = timm_resnas.elastic(make(name).double()).double()
    archs = [net.space.largest, *net.space.sample_many(2, np.random.default_rng(3)), net.space.smallest]
    x = images(net, 8).double()

    def gradients(outputs):
        net.zero_grad()
        outputs.square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        return [p.grad.clone() for p in net.parameters()]

    together = gradients(net(x, archs=archs))
    each = [gradients(net(part, archs=[arch])) for part, arch in zip(x.chunk(4), archs, strict=True)]
    for got, *parts in zip(together, *each, strict=True):
        torch.testing.assert_close(got, sum(parts), rtol=1e-9, atol=1e-9)


def test_gradient_checkpointing_is_refused():
    """Widths in force are unknown to the backward pass of checkpointed blocks."""
    net = timm_resnas.elastic(make("test_vit")).train()
    net.set_grad_checkpointing()
    x = images(net, 2)
    net(x).sum().backward()
    with pytest.raises(ValueError, match="set_grad_checkpointing"):
        net(x, archs=[net.space.largest, net.space.smallest])
    with torch.no_grad():
        net(x, archs=[net.space.largest, net.space.smallest])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224", "vit_resnas"])
def test_heads_of_fewer_entries_compute_what_the_base_does_without_the_others(name, fused, tmp_path):
    model = make(name)
    widths = [list(own) for own in ElasticSpace(name, num_classes=7, **BASES[name]).largest.widths]
    layers = [block.attn for block in model.modules() if hasattr(block, "attn") and hasattr(block, "mlp")]
    kept = {i: layer.proj.in_features // layer.num_heads - 3 - i for i, layer in enumerate(layers) if i != 1}
    state = {k: v.clone() for k, v in model.state_dict().items()}  # of the narrow one
    with torch.no_grad():
        for i, dim in kept.items():
            widths[i].append(dim)
            layer, prefix = layers[i], next(n for n, m in model.named_modules() if m is layers[i])
            qkv = [w for w in (layer.qkv.weight, layer.qkv.bias) if w is not None]
            for part, w in zip(("weight", "bias"), qkv, strict=False):
                heads = w.unflatten(0, (3 * layer.num_heads, -1))
                state[f"{prefix}.qkv.{part}"] = heads[:, :dim].flatten(0, 1)
                heads[:, dim:] = 0
            columns = layer.proj.weight.unflatten(1, (layer.num_heads, -1))
            state[f"{prefix}.proj.weight"] = columns[..., :dim].flatten(1)
    args = dict(base=name, widths=widths, num_classes=7, **BASES[name])
    small = timm.create_model("vit_elastic", **args).eval()
    small.load_state_dict(state)
    for module in small.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    size = ElasticSpace(name, **BASES[name]).model_args["img_size"]
    x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    arch = Arch.from_record({"model": "vit_elastic", "args": {"base": name, "widths": widths}})
    costs = arch.costs(num_classes=7, **{**BASES[name], "img_size": size})
    assert costs["params"] == sum(p.numel() for p in small.parameters())
    assert costs["macs"] == count_macs(small, x.shape[1:])
    timm_resnas.save_pretrained(small, tmp_path / "small")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), small(x))
    with pytest.raises(ArchError, match="not head_dim"):
        timm_resnas.elastic(small)


def test_heads_that_keep_their_entries():
    for name in ("eva02_tiny_patch14_224", "cait_xxs24_224"):
        widths = [[*own, 8] for own in ElasticSpace(name, **BASES[name]).largest.widths]
        with pytest.raises(NarrowError, match="normed, rotated or mixed"):
            timm.create_model("vit_elastic", base=name, widths=widths, **BASES[name])
        with pytest.raises(ArchError, match="heads of block 0 are normed, rotated or mixed"):
            ElasticArch.from_args(dict(base=name, widths=widths)).costs(**BASES[name])


def test_a_block_without_branches_is_saved_and_loaded(pair, tmp_path):
    name, _, net = pair
    (heads, hidden), *others = net.space.choices
    gone = ElasticArch(name, ((min(heads), min(hidden)), *((h[0], m[0]) for h, m in others)))
    assert gone.widths[0] == (0, 0)
    small, x = net.extract(gone), images(net)
    timm_resnas.save_pretrained(small, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), small(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224", "beit_base_patch16_224", "cait_xxs24_224"])
def test_saved_and_loaded_in_another_process(name, python, tmp_path):
    net = timm_resnas.elastic(make(name)).eval()
    arch = net.space.sample_many(1, np.random.default_rng(4))[0]
    small, x = net.extract(arch), images(net)
    timm_resnas.save_pretrained(small, tmp_path / "small")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, timm, timm_resnas, torch; f = sys.argv[1]; "
        "m = timm.create_model(f'local-dir:{f}/small', pretrained=True).eval(); "
        "x = torch.load(f'{f}/x.pt', weights_only=True); "
        "torch.save(torch.inference_mode()(m)(x).clone(), f'{f}/y.pt')"
    )
    done = python.run(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), small(x), rtol=0, atol=0)
    timm_resnas.save_pretrained(net, tmp_path / "net")
    again = timm_resnas.load(f"local-dir:{tmp_path / 'net'}", check=True).eval()
    assert again.space == net.space
    with torch.inference_mode():
        torch.testing.assert_close(again.extract(arch)(x), small(x), rtol=0, atol=0)


def test_a_shrunk_model_is_one_of_timms(tmp_path):
    net = timm_resnas.elastic(make("vit_tiny_patch16_224")).eval()
    arch = ElasticArch(net.space.base, ((2, 96), (0, 192), (3, 0)))
    small = net.extract(arch)
    assert type(small) is timm.models.VisionTransformer and small.pretrained_cfg["architecture"] == "vit_elastic"
    assert small.pretrained_cfg["classifier"] == "head"
    x = images(net)
    with torch.inference_mode():
        logits = small(x)
        torch.testing.assert_close(small.forward_head(small.forward_features(x)), logits, rtol=0, atol=0)
        assert [f.shape[1] for f in small.forward_intermediates(x, indices=3, intermediates_only=True)] == [192] * 3
    timm_resnas.save_pretrained(small, tmp_path / "small")
    name = f"local-dir:{tmp_path / 'small'}"
    features = timm.create_model(name, pretrained=True, features_only=True)
    assert [f.shape[2:] for f in features(x)] == [(2, 3)] * 3
    wider = timm.create_model(name, pretrained=True, img_size=64).eval()  # positions resampled as timm does
    assert wider(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    any_size = timm.create_model(name, pretrained=True, dynamic_img_size=True).eval()
    torch.testing.assert_close(any_size(x), logits, rtol=1e-5, atol=1e-5)
    small.set_grad_checkpointing()
    small.train()(x).sum().backward()
    exported = torch.export.export(small.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), logits, rtol=1e-5, atol=1e-5)


def test_shrunk_again():
    net = timm_resnas.elastic(make("test_vit")).eval()
    first = net.extract(net.space.sample_many(1, np.random.default_rng(5))[0])
    again = timm_resnas.elastic(first).eval()
    x = images(net)
    with torch.inference_mode():
        torch.testing.assert_close(again(x), first(x), rtol=0, atol=0)
        arch = again.space.sample_many(1, np.random.default_rng(6))[0]
        pairs = list(zip(arch.widths, again.space.largest.widths, strict=True))
        assert all(a <= b for p, q in pairs for a, b in zip(p, q, strict=True))
        assert again.extract(arch)(x).shape == (4, 7)


# -- importance and repair ---------------------------------------------------------------------------------------------


def test_importance_is_what_a_unit_adds():
    """Hidden units and heads are sorted by the mean squared length of what each adds to its layer's output."""
    net = timm_resnas.elastic(make("test_vit")).eval()
    x = images(net, 16)
    net.calibrate([x[:8], x[8:]], repair=False)
    for layer in net.elastic_layers():
        seen = []
        handle = layer.last.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            net(x)
        handle.remove()
        units, width = layer.branch.units.count, layer.branch.width
        parts = seen[0].unflatten(-1, (units, width)), layer.last.weight.unflatten(1, (units, width))
        added = torch.einsum("bnuw,ouw->bnuo", *parts).square().sum(-1).mean((0, 1))
        assert (added.diff() <= 1e-6 * added[0]).all()


def test_redundant_units_are_removed_without_loss():
    """Half of the hidden units repeat the other half: the repaired network computes the same."""
    model = make("test_vit")
    with torch.no_grad():
        for block in model.blocks:
            half = block.mlp.fc1.out_features // 2
            block.mlp.fc1.weight[half:] = block.mlp.fc1.weight[:half]
            block.mlp.fc1.bias[half:] = block.mlp.fc1.bias[:half]
    net = timm_resnas.elastic(model).eval()
    x = images(net, 64)
    arch = ElasticArch("test_vit", tuple((heads, hidden // 2) for heads, hidden in net.space.largest.widths))
    net.calibrate([x], repair=False)
    # importance alone may keep both of a pair; twins are neighbours in the order, so cut every other one
    for layer in net.elastic_layers():
        if layer.branch.kind == "mlp":
            order = torch.cat([torch.arange(0, layer.fc1.out_features, 2), torch.arange(1, layer.fc1.out_features, 2)])
            with torch.no_grad():
                for tensor, dim in ((layer.fc1.weight, 0), (layer.fc1.bias, 0), (layer.fc2.weight, 1)):
                    tensor.copy_(tensor.index_select(dim, order))
    with torch.inference_mode():
        expected = net(x)
        cut, repaired = net.extract(arch)(x), net.extract(arch, repair=x)(x)
    error = (repaired - expected).norm() / expected.norm()
    assert error < 0.25 * (cut - expected).norm() / expected.norm()


def test_repair_while_scoring_equals_least_squares():
    """The weights that are read by any number of units minimise the penalised squared error on the full network's."""
    net = timm_resnas.elastic(make("test_vit")).eval()
    x = images(net, 32)
    net.calibrate([x])
    layer = net.elastic_layers()[1]
    seen = []
    handle = layer.last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        net(x)
    handle.remove()
    u = seen[0].flatten(0, 1).double()
    u = u - u.mean(0)
    keep, weight = 96, layer.fc2.weight.double()
    penalty = 1e-3 * u.square().mean() * len(u)
    # minimise |W' u_K - W u|^2 + penalty |W' - W_K|^2: the rows of an ordinary least squares
    a = torch.cat([u[:, :keep], penalty.sqrt() * torch.eye(keep, dtype=u.dtype)])
    b = torch.cat([u @ weight.T, penalty.sqrt() * weight[:, :keep].T])
    expected = torch.linalg.lstsq(a, b).solution.T
    got = layer.reader.at(keep)[0]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    arch = ElasticArch("test_vit", tuple((h, f if i else 96) for i, (h, f) in enumerate(net.space.largest.widths)))
    with torch.inference_mode():
        net.set_arch(arch)
        torch.testing.assert_close(net(x), net.extract(arch)(x), rtol=1e-5, atol=1e-5)


def test_moments_of_units_far_from_zero():
    """Their variance is far below float32's rounding of the square of their mean."""
    u = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)) * 0.1 + torch.arange(8) * 300
    v = u.double() @ torch.ones(8, 2).double()
    moments = Moments()
    for part, other in zip(u.split(250), v.split(250), strict=True):
        moments.add(part, other)
    centred = u.double() - u.double().mean(0)
    torch.testing.assert_close(moments.covariance, centred.T @ centred / 1000, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.second, u.double().T @ u.double() / 1000, rtol=1e-6, atol=1e-3)
    weight = correction(moments, True)[0]
    torch.testing.assert_close(weight, torch.ones_like(weight), rtol=5e-3, atol=0)  # but for the penalty


def test_calibration_needs_images_and_leaves_the_network_as_it_was():
    net = timm_resnas.elastic(make("test_vit")).train()
    for batches, message in (([], "needs images"), ([torch.randn(2, 1, 32, 32)], "channels")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            net.calibrate(batches)
        assert net.training and not any(m._forward_pre_hooks for m in net.modules())
    net.blocks[0].eval()  # a part may have a mode of its own
    net.calibrate([images(net, 4)])
    net.extract(net.space.smallest, repair=images(net, 4))
    assert [block.training for block in net.blocks] == [False] + [True] * 5


@pytest.mark.parametrize("repair", [True, False])
def test_units_are_not_ranked_by_what_is_no_number(repair):
    net = timm_resnas.elastic(make("test_vit"))
    before = {name: p.clone() for name, p in net.named_parameters()}
    bad = images(net, 4)
    bad[0, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="activations are NaN or infinite"):
        net.calibrate([images(net, 4), bad], repair=repair)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    with pytest.raises(ValueError, match="activations are NaN or infinite"):
        net.extract(net.space.sample(np.random.default_rng(0)), repair=bad)
    with torch.no_grad():  # of which nothing later is ranked
        net.blocks[-1].mlp.fc2.weight[0] = float("inf")
    net.calibrate([images(net, 4)], repair=repair)
    arch = ElasticArch("test_vit", tuple((h, 96) for h, _ in net.space.largest.widths))
    with pytest.raises(ValueError, match="activations are NaN or infinite"):
        net.extract(arch, repair=images(net, 32))


def test_equal_widths_of_another_base_are_refused():
    net = timm_resnas.elastic(make("test_vit"))
    net.set_arch(net.space.smallest)
    with pytest.raises(ArchError, match="the network is a deit_tiny_patch16_224"):
        net.set_arch(ElasticArch("deit_tiny_patch16_224", net.space.smallest.widths))


def narrowed_and_repaired():
    """An elastic supernet, a narrower network in force, images, and its repaired outputs on them."""
    net = timm_resnas.elastic(make("test_vit")).eval()
    x = images(net, 32)
    net.calibrate([x])
    arch = ElasticArch("test_vit", tuple((h, 96) for h, _ in net.space.largest.widths))
    with torch.no_grad():
        net.set_arch(arch)
        repaired = net(x)
    return net, arch, x, repaired


def test_repair_of_other_weights_is_not_used():
    """Training goes on after the calibration: narrowed networks are those of today's weights."""
    net, arch, x, repaired = narrowed_and_repaired()
    with torch.no_grad():
        for param in net.parameters():
            param.mul_(1.1)
        small = net.extract(arch)
        torch.testing.assert_close(net(x), small(x), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(repaired, small(x), atol=1e-2)
        for layer in net.elastic_layers():
            part = small.get_submodule(layer.branch.units.name)
            assert torch.equal(part.fc2.bias if hasattr(part, "fc2") else part.proj.bias, layer.last.bias)


def test_repair_goes_along_with_copies_and_moves():
    net, arch, x, repaired = narrowed_and_repaired()
    with torch.no_grad():
        again = copy.deepcopy(copy.deepcopy(net))
        assert torch.equal(again(x), repaired)
        torch.testing.assert_close(again.double()(x.double()).float(), repaired, rtol=1e-5, atol=1e-5)
        # but not to other weights, also where only a bias is another
        for layer in net.elastic_layers():
            layer.last.bias.add_(1.0)
        changed = net(x)
        plain = copy.deepcopy(net)
        for layer in plain.elastic_layers():
            assert layer.reader is None
        assert torch.equal(plain(x), changed)
        again.float().load_state_dict(net.state_dict(), assign=True)
        assert torch.equal(again(x), changed)


def test_repair_of_one_layer_brings_it_nearer():
    model = make("vit_small_patch16_dinov3")
    with torch.no_grad():  # hidden units that resemble each other, as those of trained networks do
        for block in model.blocks:
            first, second = torch.randn(1536, 16), torch.randn(16, 384)
            block.mlp.fc1.weight.copy_(first @ second / 64)
    net = timm_resnas.elastic(model).eval()
    x, other = images(net, 64), images(net, 64, seed=9)
    arch = ElasticArch(net.space.base, tuple((6, 768) for _ in net.space.largest.widths))
    net.calibrate([x])
    with torch.inference_mode():
        expected = net(other)
        net.set_arch(arch)
        scored = (net(other) - expected).norm()
        net.set_arch(None)
        repaired = (net.extract(arch, repair=x)(other) - expected).norm()
        net.calibrate([x], repair=False)
        plain = (net.extract(arch)(other) - expected).norm()
    assert repaired < 0.8 * plain and scored < plain


# -- spaces ------------------------------------------------------------------------------------------------------------


def test_choices():
    assert hidden_choices(1536) == (*range(1536, 0, -96), 0)
    assert hidden_choices(8) == (*range(8, 0, -1), 0)
    space = ElasticSpace("vit_tiny_patch16_224", img_size=32, num_classes=7)
    assert space.largest.widths == ((3, 768),) * 12 and space.smallest.widths == ((0, 0),) * 12
    assert space.size() == (4 * 17) ** 12
    assert ElasticSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    budget = Budget.parse("macs=50%", space.costs(space.largest))
    archs = space.sample_many(20, np.random.default_rng(0), budget)
    assert len(archs) == 20 and all(not budget.check(space.costs(arch)) for arch in archs)
    # half of the heads' cost goes, not their presence: attention is left in most blocks
    assert np.mean([heads > 0 for arch in archs for heads, _ in arch.widths]) > 0.75


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ElasticSpace("convnext_atto"), "ConvNeXt has no blocks of attention and MLP"),
        (lambda: ElasticSpace("swin_tiny_patch4_window7_224"), r"layers.0.blocks.0.attn .* is a WindowAttention"),
        (lambda: ElasticSpace("hf-hub:someone/vit"), "must be the name of a vision transformer that timm knows"),
        (lambda: ElasticSpace("vit_elastic"), "must be the name of a vision transformer that timm knows"),
        (lambda: ElasticSpace("test_vit", nonsense=3), "test_vit cannot be built with"),
        (lambda: timm.create_model("vit_elastic", base="test_vit", widths=[[2, 9]]), "has 6 blocks, got widths of 1"),
        (lambda: timm.create_model("vit_elastic", base="test_vit", widths=[[3, 9]] * 6), "has 2 units, at most 2"),
        (lambda: timm.create_model("vit_elastic", base="cait_xxs24_224", widths=[[2, 9]] * 26), "0 or 4 can be kept"),
        (lambda: ElasticArch.from_args({"base": "test_vit", "widths": [[1, -1]]}), r"widths\[0\] must be \[num_heads"),
        (lambda: ElasticArch("test_vit", ((2, 8),)).costs(img_size=32), "has 6 blocks, the widths are of 1"),
    ],
)
def test_what_cannot_be_narrowed_is_named(make, message):
    with pytest.raises((NarrowError, ArchError), match=message):
        make()


def test_a_search_over_a_pretrained_model_resumes():
    from timm_resnas.nas.evolution import EvolutionSearch

    space = ElasticSpace("test_vit", img_size=32, num_classes=7)
    budget = Budget.parse("macs=60%", space.costs(space.largest))
    search = EvolutionSearch(space, budget, 0, population=10, iterations=3, parents=4, mutations=4, crossovers=4)
    while not search.done:
        search.tell([(arch, sum(h + f for h, f in arch.widths)) for arch in search.ask()])
        state = json.loads(json.dumps(search.state_dict()))
        search = EvolutionSearch(space, budget, 0, population=10, iterations=3, parents=4, mutations=4, crossovers=4)
        search.load_state_dict(state)
    assert 20 < len(search.history) <= 26 and isinstance(Arch.from_record(search.best), ElasticArch)


def test_networks_to_measure_hold_every_layer():
    """A latency table of a space in which no width of the stream and no presence is drawn."""
    from timm_resnas.nas.latency import cover_networks, measured_layers

    space = ElasticSpace("test_vit", img_size=32, num_classes=7)
    held = {layer for arch in cover_networks(space) for layer in space.layers(arch)}
    assert set(measured_layers(space)) <= held


def test_sub_networks_of_a_vit_resnas_supernet_are_repaired():
    """Nearer to the network that has all heads and hidden units, whose other weights they share."""
    torch.manual_seed(0)
    net = timm.create_model("vit_resnas_supernet").eval()
    with torch.no_grad():
        for param in net.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    x, more = (torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (16, 64))
    row = net.space.encode(net.space.sample(np.random.default_rng(1)))
    units = [gene.kind == "unit" for gene in net.space.genes]
    whole = net.extract(net.space.decode(np.where(units, 0, row)[None].astype(row.dtype))[0])
    row = np.where(units, [len(gene.choices) - 1 for gene in net.space.genes], row).astype(row.dtype)
    arch = net.space.decode(row[None])[0]
    plain, repaired = net.extract(arch), net.extract(arch, repair=more)
    with torch.inference_mode():
        far, near = ((m(x) - whole(x)).square().mean() for m in (plain, repaired))
    assert near < 0.5 * far
    before, after = plain.state_dict(), repaired.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {
        k for k in before if k.startswith("blocks.") and ("attn.proj." in k or "mlp.fc2." in k)
    }
    again = net.extract(net.space.largest, repair=more)  # nothing is missing
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.extract(net.space.largest).state_dict().items())


def test_widths_of_another_length():
    with pytest.raises(NarrowError, match=r"widths\[1\] must be"):
        timm.create_model("vit_elastic", base="test_vit", widths=[[2, 8], [2, 8, 16, 1], *[[2, 8]] * 4])
