"""EfficientFormer V1 and V2: supernets against networks of their own, batch statistics, spaces, costs."""

import copy
import itertools
import json
import pickle
import re

import numpy as np
import pytest
import timm
import torch
from test_cost import LiveMemory
from test_efficientformer import V1, V2
from torch import nn
from torch.testing import assert_close

import timm_resnas
from timm_resnas.arch import Arch, ArchError
from timm_resnas.engine.supernet import convert_sync_batchnorm
from timm_resnas.families.efficientformer_nas import EfficientFormerArch, EfficientFormerSpace
from timm_resnas.families.efficientformerv2_nas import EfficientFormerV2Arch, EfficientFormerV2Space
from timm_resnas.nas.batch_norm import NARROW, recalibrate
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.count import count_macs
from timm_resnas.nas.evaluate import Evaluator, count_correct
from timm_resnas.nas.space import SearchSpace
from timm_resnas.nas.timing import layer_starts
from timm_resnas.nas.units import cut, mask

pytestmark = pytest.mark.oldest

SIZE = (64, 32)


def small_v1(**model_args):
    return EfficientFormerSpace(
        *([[12, 8], [14, 10], [12], [20, 16, 12]], (2, 1, 2, 4), (1, 1, 1, 1), 3),
        **{**dict(img_size=SIZE, num_classes=5, layer_scale_init_value=0.5, mlp_ratios=1.5), **model_args},
    )


def small_v2(**model_args):
    return EfficientFormerV2Space(
        *([[12, 8], [14, 10], [12, 10], [20, 16]], (2, 1, 3, 2), [[2, 1], [1], [2, 0.5], [1.5, 1]]),
        **dict(num_vit=(2, 2), img_size=SIZE, num_classes=5, layer_scale_init_value=0.5, **model_args),
    )


BOTH = pytest.mark.parametrize("make", [small_v1, small_v2], ids=["v1", "v2"])


def perturbed(space, dtype=torch.float64, **kwargs):
    """A supernet in which every parameter and statistic has a value of its own, the same at every call."""
    net = timm.create_model(space.supernet, space=space.to_dict(), dtype=dtype, **kwargs)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in [*net.named_parameters(), *net.named_buffers()]:
            if not t.is_floating_point():
                continue
            fan = t[0].numel() if t.ndim > 1 else 10
            t.normal_(std=fan**-0.5, generator=g).add_(t.ndim == 1 and not name.endswith(("bias", "mean")))
            if name.endswith("running_var"):
                t.abs_().add_(0.5)
    return net.eval()


def images(n, dtype=torch.float64, seed=1):
    return torch.randn(n, 3, *SIZE, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def some(space, n=6, seed=2):
    return [space.largest, space.smallest, *space.sample_many(n, np.random.default_rng(seed))]


def own_block(net, arch, stage, j):
    """Where the supernet keeps block ``j`` of a sub-network's stage, and how the network itself calls it."""
    places = [p for p, there in enumerate(arch.depths[stage]) if there]
    if isinstance(arch, EfficientFormerV2Arch):
        return f"stages.{stage}.blocks.{places[j]}", f"stages.{stage}.blocks.{j}"
    attends = stage == 3 and j >= len(places) - arch.num_vit
    first = 1 if stage == 3 else 99  # of four places the last three can attend
    own = f"stages.{stage}.blocks.{places[j] + attends}"
    if places[j] >= first and not attends:
        own = f"pools.{places[j] - first}"
    return own, f"stages.{stage}.blocks.{j + attends}"


def alone(net, arch, plain):
    """A sub-network's tensors, sliced so that gradients and statistics reach the supernet's; without its code."""
    names = {}
    for stage, flags in enumerate(arch.depths):
        for j in range(sum(flags)):
            own, name = own_block(net, arch, stage, j)
            names[name] = own
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    out = {}
    for key, target in [*plain.named_parameters(), *plain.named_buffers()]:
        m = re.match(r"(stages\.\d\.blocks\.\d+)\.(.*)", key)
        own = f"{names[m[1]]}.{m[2]}" if m else key
        norm, leaf = own.rpartition(".")[::2]
        narrow = f"{norm}.{NARROW}.{target.shape[0] if target.ndim else 0}.{leaf}"
        whole = tensors[own]
        if target.shape != whole.shape and narrow in tensors:
            out[key] = tensors[narrow]
        else:
            out[key] = whole[tuple(slice(n) for n in target.shape)]
    return out


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    return {n: p.grad.clone() for n, p in net.named_parameters()}


# -- sub-networks -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("own_statistics", [False, True], ids=["of training", "own"])
def test_extracted_equals_supernet_equals_saved_and_loaded(make, own_statistics, tmp_path):
    space, x = make(), images(3, torch.float32)
    net = perturbed(space, torch.float32)
    if own_statistics:
        net.recalibrate(images(32, torch.float32, seed=3).split(8))
    outputs = []
    with torch.inference_mode():
        for i, arch in enumerate(some(space)):
            net.set_arch(arch)
            model = net.extract(arch)
            outputs.append(net(x))
            assert_close(model(x), outputs[-1], rtol=0, atol=0)
            if i < 3:
                timm_resnas.save_pretrained(model, tmp_path / str(i))
                loaded = timm.create_model(f"local-dir:{tmp_path / str(i)}", pretrained=True).eval()
                assert type(loaded) is type(model)
                assert_close(loaded(x), outputs[-1], rtol=0, atol=0)
        net.set_arch(None)
        full = net(x)
        assert_close(full, outputs[0], rtol=1e-5, atol=1e-5)
        timm_resnas.save_pretrained(net, tmp_path / "net")
        again = timm_resnas.load(tmp_path / "net", check=True).eval()
        assert again.space == space
        assert_close(again(x), full, rtol=0, atol=0)
        again.set_arch(arch)
        same = torch.equal(again(x), outputs[-1])
        assert same == (not own_statistics)  # its images are not saved
        again.recalibrate(images(32, torch.float32, seed=3).split(8))
        if own_statistics:
            assert_close(again(x), outputs[-1], rtol=0, atol=0)
    assert torch.stack(outputs).std(0).min() > 0.01  # they differ


@BOTH
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_groups_equal_one_by_one(make, training):
    """Outputs, gradients and running statistics of several sub-networks in one pass: those of each alone, in turn."""
    space = make()
    net = perturbed(space).train(training)
    other, archs = copy.deepcopy(net), some(space)
    archs.append(archs.pop(0))  # the largest last
    x = images(4 * len(archs))
    y = net(x, archs=archs)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    found = gradients(net, (y * weight).sum())
    each = []
    for arch, part in zip(archs, x.chunk(len(archs)), strict=True):
        plain = arch.create(**space.model_args, device="meta").train(training)
        each.append(torch.func.functional_call(plain, alone(other, arch, plain), (part,)))
    assert_close(y, torch.cat(each), rtol=1e-9, atol=1e-9)
    (torch.cat(each) * weight).sum().backward()
    for name, p in other.named_parameters():
        assert_close(found[name], torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-8, atol=1e-8, msg=name)
    assert_close(dict(net.named_buffers()), dict(other.named_buffers()), rtol=1e-9, atol=1e-9)
    before = perturbed(space)
    moved = [n for n, b in net.named_buffers() if n.endswith("mean") and not b.equal(before.get_buffer(n))]
    assert bool(moved) == training


@BOTH
def test_distilled_training_and_the_whole_batch(make):
    net, x = perturbed(make()).train(), images(4)
    net.set_distilled_training()
    archs = some(net.space, 1)[1:]
    first, second = net(x, archs=archs)
    one = [net(part, archs=[arch]) for arch, part in zip(archs, x.chunk(2), strict=True)]
    assert_close(first, torch.cat([a for a, _ in one]))
    assert_close(second, torch.cat([b for _, b in one]))
    whole = net(x, archs=archs, whole=True)
    assert whole[0].shape == (8, 5) and not torch.allclose(whole[0], whole[1])


@BOTH
def test_gradient_checkpointing(make):
    """With drop path and dropout, which are drawn again as they were."""
    net = perturbed(make(drop_path_rate=0.3, proj_drop_rate=0.2)).train()
    archs, results, calls, statistics = some(net.space, 2), [], [], []
    before = {n: b.clone() for n, b in net.named_buffers()}
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        net.load_state_dict(before, strict=False)
        torch.manual_seed(0)
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        with torch.nn.modules.module.register_module_forward_pre_hook(count):
            results.append(gradients(net, net(images(16), archs=archs).square().sum()))
        statistics.append({n: b.clone() for n, b in net.named_buffers()})
    assert_close(statistics[0], statistics[1], rtol=0, atol=0)  # moved once
    assert any(not torch.equal(b, before[n]) for n, b in statistics[0].items())
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    assert calls[1] > 1.5 * calls[0]  # computed twice
    torch.manual_seed(1)
    other = net(images(16), archs=archs)
    torch.manual_seed(0)
    assert not torch.allclose(net(images(16), archs=archs), other)


@BOTH
def test_rates_are_those_of_the_place(make):
    """Drop path grows from block to block; modules that sub-networks share take each place's."""
    net = perturbed(make(drop_path_rate=0.9)).train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    for m in net.modules():
        if hasattr(m, "drop_prob"):
            m.drop_prob = 0.0
    x, arch = images(4), net.space.largest
    with torch.no_grad():
        quiet = net(x, archs=[arch])
        assert_close(quiet, net(x, archs=[arch]))
        net.stages[1].blocks[0].drop_path2.drop_prob = 0.9
        noisy = net(x, archs=[arch])
    assert not torch.allclose(quiet, noisy)


def test_units_of_v1():
    """Cut equals masked; sorting keeps the function of the full network, statistics included, and turns narrow ones."""
    space = small_v1()
    net, x = perturbed(space), images(2)
    state = net.state_dict()
    names = {u.name: u.count for u in net.units()}
    assert names["stages.3.blocks.2.token_mixer"] == 8 and names["pools.1.mlp"] == 30 and len(names) == 3 + 9 + 3
    keep = {u.name: u.count - 1 for u in net.units() if u.name.endswith("mlp") and not u.name.startswith("pools")}
    masked = torch.func.functional_call(net, mask(state, net.units(), keep), (x,))
    narrow = cut(state, net.units(), keep)
    plain = space.network(space.largest).double()
    for name, module in plain.named_modules():
        if name in keep:  # layers of fewer units
            for key in ("fc1", "norm1", "fc2"):
                for leaf, _ in [*module.named_parameters(), *module.named_buffers()]:
                    if leaf.startswith(key):
                        part, last = leaf.split(".")
                        owner, value = module.get_submodule(part), narrow[f"{name}.{leaf}"]
                        is_parameter = last in dict(owner.named_parameters())
                        setattr(owner, last, nn.Parameter(value) if is_parameter else value)
    own = plain.state_dict()
    plain.load_state_dict({k: narrow[k] for k in own})
    assert_close(plain.eval()(x), masked)


@BOTH
def test_sorting(make):
    """The full network computes the same, statistics included; narrow ones do not, nor forget what they learned."""
    net, x = perturbed(make()), images(2)
    optimizer = torch.optim.AdamW(net.parameters())
    gradients(net, net(x, archs=[net.space.largest, net.space.smallest]).square().sum())
    optimizer.step()
    with torch.no_grad():
        before, small, old = net(x), net.extract(net.space.smallest)(x), copy.deepcopy(net)
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in net.named_parameters()}
    net.sort_channels(optimizer)
    assert_close(net(x), before)
    assert not torch.allclose(net.extract(net.space.smallest)(x), small)
    after = {n: optimizer.state[p]["exp_avg"] for n, p in net.named_parameters()}
    assert any(not torch.equal(v, after[n]) for n, v in moments.items())
    if make is small_v1:
        return
    new, old = (
        dict(net.named_parameters()) | dict(net.named_buffers()),
        dict(old.named_parameters()) | dict(old.named_buffers()),
    )
    for unit in net.units():
        weight = f"{unit.name}.fc1.conv.weight"
        order = [old[weight].flatten(1).tolist().index(row) for row in new[weight].flatten(1).tolist()]
        for key in [k for k in new if k.startswith(f"{unit.name}.fc1.bn.{NARROW}.") and new[k].ndim]:
            full, n = re.sub(rf"{NARROW}\.\d+\.", "", key), len(new[key])
            for was, whole, now in (
                (old[key], old[full], new[key]),
                (moments.get(key), moments.get(full), after.get(key)),
            ):
                if was is not None:
                    assert now.tolist() == [(was if i < n else whole)[i].item() for i in order[:n]]


@BOTH
def test_what_does_not_fit(make):
    net = perturbed(make())
    depths = ((1, 1), (1,), (1,), (1, 1))
    v1 = make is small_v1
    kind = EfficientFormerArch if v1 else EfficientFormerV2Arch
    rest = (2,) if v1 else (((1.0, 1.0), (1.0,), (1.0,), (1.0, 1.0)), (0, 2))
    cases = [
        (kind((14, 14, 12, 20), depths, *rest), "stage 0 of the architecture has width 14 and 2 places .* 12 and 2"),
        (kind((12, 14, 12, 20), ((1,), *depths[1:-1], (1, 0, 0, 0, 1)), *rest), "stage 3 .* 5 places for blocks"),
    ]
    if v1:
        cases.append((kind((12, 14, 12, 20), depths, 2), "block 0 of stage 3 attends, which .* those from 1 on can"))
    else:
        cases[1] = (kind((12, 14, 12, 20), depths, ((1.0, 2.1), *rest[0][1:]), (0, 2)), "block 1 of stage 0 has 25 hid")
        cases.append((kind((12, 14, 12, 20), depths, rest[0], (1, 2)), "block 0 of stage 2 attends, which .* 1 on can"))
    for arch, message in cases:
        with pytest.raises(ArchError, match=message):
            net.set_arch(arch)
    with pytest.raises(ValueError, match="images of 32x32 do not match the supernet's 64x32"):
        net(torch.zeros(1, 3, 32, 32, dtype=torch.float64), archs=[net.space.smallest])
    with pytest.raises(ValueError, match="needs a space of its family, got one of 'vit_resnas'"):
        timm.create_model(net.space.supernet, space="micro")
    between = kind((10, 12, 8, 14), ((1,),) * 4, *((1,) if v1 else (((0.7,),) * 4, (0, 1))))
    if v1:
        between = kind((10, 12, 8, 14), (*((1,),) * 3, (0, 1)), 1)
    net.set_arch(between)
    with torch.inference_mode():
        assert_close(net(images(2)), net.extract(between)(images(2)), rtol=0, atol=0)
    net.reset_classifier(0)
    with pytest.raises(ValueError, match="several widths need a classifier"):
        net(images(2), archs=[net.space.largest, net.space.smallest])


# -- batch statistics -------------------------------------------------------------------------------------------------


def test_recalibrate():
    """The mean over batches of each one's mean and unbiased variance, through layers that are in evaluation."""
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, momentum=0.7))
    model.double().train()
    model[1].eval()
    with torch.no_grad():
        model[3].running_mean.fill_(50)
    batches = [images(4, seed=s) * (s + 1) + s for s in range(3)]
    recalibrate(model, batches)
    assert_close(model[1].running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    assert_close(model[1].running_var, torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0))
    first = nn.BatchNorm2d(3, affine=True).double()  # by the batch's own statistics, as in training
    seen = [model[2](first(b)) for b in batches]
    assert_close(model[3].running_mean, torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0))
    assert [m.training for m in model] == [True, False, True, True]
    assert model[3].momentum == 0.7 and model[1].momentum == 0.1


@BOTH
def test_each_sub_network_has_its_own_statistics(make):
    space, calibration = make(), images(24, seed=4).split(8)
    net, x = perturbed(space), images(3)
    archs = some(space, 1)

    def wanted(arch):
        model = arch.canonical().create(**space.model_args).double().eval()
        plain = arch.create(**space.model_args, device="meta")
        own = model.state_dict()
        model.load_state_dict({k: v for k, v in alone(net, arch, plain).items() if k in own})
        recalibrate(model, calibration)
        return model(x)

    with torch.no_grad():
        before = [net.extract(arch)(x) for arch in archs]
        net.recalibrate(calibration)
        for arch, old in zip(archs, before, strict=True):
            net.set_arch(arch)
            assert_close(net(x), wanted(arch))
            assert not torch.allclose(net(x), old)
            with torch.enable_grad():
                assert_close(net(x, archs=[arch]), wanted(arch))
        # those that were computed before do not outlive the weights that they were computed with
        net.stem.conv2.weight.mul_(1.5) if make is small_v1 else net.stem.conv2.conv.weight.mul_(1.5)
        assert_close(net(x), wanted(arch))
        # the full network
        net.set_arch(None)
        full = copy.deepcopy(net)
        recalibrate(full, calibration)
        net.recalibrate(calibration)
        assert_close(net(x), full(x), rtol=0, atol=0)
        # in training each group has its batch's
        net.train()
        trained = net(x.repeat(2, 1, 1, 1), archs=[arch])
        assert not torch.allclose(trained[:3], wanted(arch))
        # images of another size are let go
        net.eval()
        net.set_input_size((32, 32))
        net.set_arch(arch)
        assert net(images(2)[:, :, :32]).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = perturbed(space, torch.float32)
        half.recalibrate([c.float() for c in calibration])
        half.set_arch(arch)
        half(x.float())
        inside = half._statistics_of(arch)
    half._statistics.clear()
    assert_close(inside, half._statistics_of(arch), rtol=0, atol=0)


def test_pickled_with_statistics():
    net, arch, x = perturbed(small_v1()), small_v1().smallest, images(3)
    net.recalibrate([images(8, seed=4)])
    net.set_arch(arch)
    with torch.no_grad():
        assert_close(pickle.loads(pickle.dumps(net))(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
def test_statistics_of_a_copy_are_of_its_weights(assign):
    """Counters of changes start anew in a copy, so that they may say the same of other weights."""
    space, x = small_v1(), images(3)
    net, other = perturbed(space), perturbed(space)
    arch = space.smallest
    with torch.no_grad():
        for param in other.parameters():
            param.copy_(param.flip(0))
        net = copy.deepcopy(net)
        net.load_state_dict(net.state_dict(), assign=assign)
        net.recalibrate([images(8, seed=4)])
        net.set_arch(arch)
        before = net(x)
        net = net if assign else copy.deepcopy(net)
        net.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=assign)
        other.recalibrate([images(8, seed=4)])
        other.set_arch(arch)
        assert_close(net(x), other(x), rtol=0, atol=0)
        assert not torch.allclose(net(x), before)


@BOTH
def test_statistics_over_all_processes_keep_activations(make):
    """Some norms of V2 have their activation in them."""
    net, x = perturbed(make()), images(3)
    with torch.no_grad():
        before = net(x)
        net = convert_sync_batchnorm(net)
        assert any(isinstance(m, nn.SyncBatchNorm) for m in net.modules())
        assert_close(net(x), before, rtol=0, atol=0)


@BOTH
def test_scores_are_those_of_extracted_networks(make):
    space = make()
    net = perturbed(space, torch.float32)
    net.recalibrate(images(16, torch.float32, seed=4).split(8))
    batches = [(images(16, torch.float32, seed=s), torch.arange(16) % 5) for s in range(3)]
    archs = some(space, 4)
    scores = Evaluator(net, batches).score(archs)
    y = net(images(2, torch.float32), archs=[archs[-1]])  # with gradients, after what was computed without
    y.sum().backward()
    assert_close(copy.deepcopy(net)(images(2, torch.float32), archs=[archs[-1]]), y, rtol=0, atol=0)
    assert scores == [count_correct(net.extract(arch), batches)[0] for arch in archs]
    assert len(set(scores)) > 2


# -- spaces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, published", [("efficientformer", V1), ("efficientformerv2", V2)])
def test_the_published_networks_are_inside(preset, published):
    space = SearchSpace.preset(preset)
    net = timm.create_model(space.supernet, space=space.to_dict(), device="meta", num_classes=1000, img_size=224)
    for name, args in published.items():
        arch = space.arch_type.from_args(args)
        assert space.contains(arch)
        net.set_arch(arch)
        theirs = timm.create_model(name, device="meta")
        assert space.costs(arch)["params"] == sum(p.numel() for p in theirs.parameters())
        assert space.costs(arch)["macs"] == count_macs(theirs, (3, 224, 224))
        assert {k: v.shape for k, v in net.extract(arch).state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        assert Arch.of(arch.model, arch.args()) == arch == arch.canonical()


@pytest.mark.parametrize(
    "name, size, least, most, weights",
    [
        ("efficientformer", 6.11e14, 4.16, 82.23, 119.98),
        ("efficientformer_micro", 8.2e4, 0.105, 2.61, 3.23),
        ("efficientformerv2", 3.92e24, 0.93, 36.7, 36.8),
        ("efficientformerv2_micro", 4.87e9, 0.113, 1.88, 1.9),
    ],
)
def test_presets(name, size, least, most, weights):
    """Number of architectures; millions of parameters of the least, the greatest, and the supernet."""
    space = SearchSpace.preset(name)
    assert space.size() == pytest.approx(size, rel=0.01)
    net = timm.create_model(space.supernet, space=name, device="meta", num_classes=space.model_args["num_classes"])
    found = [space.costs(arch)["params"] / 1e6 for arch in (space.smallest, space.largest)]
    found.append(sum(p.numel() for p in net.parameters()) / 1e6)
    assert found == pytest.approx([least, most, weights], rel=0.02)
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space


@BOTH
def test_every_row_is_one_network(make):
    """Over all rows of a space: as many networks as `size` says; rows and networks turn into each other."""
    space = make()
    if make is small_v2:
        space = EfficientFormerV2Space(
            *([[8], [8, 6], [8], [8]], (1, 2, 3, 2), [[1], [1], [2, 1], [1]]), num_vit=(2, 2), img_size=32
        )
    rows = np.array(list(itertools.product(*(range(len(g.choices)) for g in space.genes))), np.int8)
    costs = space.table("params").cost(rows)
    normal = space.normalise(rows.copy())
    assert np.array_equal(costs, space.table("params").cost(normal))
    assert np.array_equal(normal, space.normalise(normal.copy()))
    normal = np.unique(normal, axis=0)
    archs = space.decode(normal)
    assert len({arch.key() for arch in archs}) == len(archs) == space.size()
    assert np.array_equal(space.rows(archs), normal)
    for arch in archs[:: len(archs) // 40]:
        assert Arch.from_record(json.loads(json.dumps(arch.record()))) == arch
        assert space.arch_type.from_args(json.loads(arch.key())) == arch


def test_a_step_down_of_num_vit_makes_the_first_that_attends_pool():
    space = small_v1()
    arch = EfficientFormerArch((12, 14, 12, 20), ((1,), (1,), (1,), (1, 1, 0, 1)), 2)
    row = space.encode(arch)
    (column,) = space.vits.values()
    assert space.genes[column].name == "num_vit" and space.genes[column].choices[row[column]] == 3
    row[column] += 1
    (one,) = space.decode(space.normalise(row[None]))
    # the place that it came to is empty: the next one is meant
    assert one == EfficientFormerArch((12, 14, 12, 20), ((1,), (1,), (1,), (1, 1, 0, 1)), 1)
    assert space.genes[column].choices[row[column]] == 1
    row[column] += 1
    assert space.decode(space.normalise(row[None]))[0].num_vit == 0


def layer_peaks(model, x):
    """Bytes held at the peak of each layer, without the image."""
    found = []
    with torch.inference_mode():
        model(x)  # tables of biases are kept
        with LiveMemory(model, x) as memory:

            def begin(*_):
                found.append(memory.peak)
                memory.peak = memory.live

            handles = [m.register_forward_pre_hook(begin) for m in layer_starts(model)]
            model(x)
            found.append(memory.peak)
    for handle in handles:
        handle.remove()
    return [peak - x.nbytes for peak in found[1:]]


@pytest.mark.parametrize("make", [small_v1, small_v2, "efficientformer_micro", "efficientformerv2_micro"])
def test_costs_are_those_of_built_networks(make):
    """MACs by torch's counter, parameters, memory layer by layer, and layers in the order of the forward."""
    space = (
        SearchSpace.preset(make) if isinstance(make, str) else make(distillation=False) if make is small_v2 else make()
    )
    size = (3, *space.model_args["img_size"])
    for arch in some(space, 4, seed=5):
        model, x = space.network(arch).eval(), torch.zeros(1, *size)
        params, layers = sum(p.numel() for p in model.parameters()), space.layers(arch)
        peaks = layer_peaks(model, x)
        costs = dict(macs=count_macs(model, size), params=params, memory=max(peaks) + x.nbytes)
        assert space.costs(arch) == arch.costs(**space.model_args) == costs
        assert [layer.memory for layer in layers[:-1]] == peaks[:-1]  # the head's is of a few values


@pytest.mark.parametrize("kind", [EfficientFormerArch, EfficientFormerV2Arch])
def test_memory_where_attention_has_many_tokens(kind):
    """Logits are then larger than all else."""
    args = dict(depths=(1, 1, 1, 1), embed_dims=(4, 4, 4, 4), num_vit=1)
    arch = kind.from_args(args if kind is EfficientFormerArch else {**args, "mlp_ratios": 1})
    model, size = arch.create(img_size=(768, 640), num_classes=3).eval(), (768, 640)
    layers = arch.layers(img_size=size, num_classes=3)
    assert [layer.memory for layer in layers] == layer_peaks(model, torch.zeros(1, 3, *size))


@pytest.mark.parametrize("name", ["efficientformer", "efficientformerv2"])
def test_drawn_within_budgets(name):
    space, rng = SearchSpace.preset(name), np.random.default_rng(7)
    budget = Budget(macs=1.3e9 if name == "efficientformer" else 6.5e8, params=13_000_000, lower=0.9)
    archs = space.sample_many(20, rng, budget)
    archs += space.mutate_many(archs, 10, rng, 0.2, budget) + space.crossover_many(archs, 10, rng, budget)
    assert len(archs) == 40 and len({arch.key() for arch in archs}) > 30
    assert all(not budget.check(arch.costs()) for arch in archs)


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("efficientformer", dict(embed_dims=[[8]] * 3), "embed_dims must be 4 lists of choices"),
        ("efficientformer", dict(embed_dims=[[8, 8], [8], [8], [8]]), "embed_dims of stage 0 holds a choice twice"),
        ("efficientformer", dict(embed_dims=[[8, 7], [8], [8], [8]]), "the first of them even; got"),
        ("efficientformer", dict(embed_dims=[[8], [8], [8], []]), "embed_dims of stage 3 must be a list of 1 to 64"),
        ("efficientformer", dict(depths=[1, 1, 1]), "depths must be 4 integers from 1 to 64"),
        ("efficientformer", dict(min_depths=[1, 1, 1, 3]), r"min_depths \[1, 1, 1, 3\] must be no more than depths"),
        ("efficientformer", dict(num_vit=3), "from 0 to the 2 blocks of stage 3, got 3"),
        ("efficientformer", dict(heads=3), "has depths, embed_dims, min_depths, num_vit; got"),
        ("efficientformer", dict(model_args=dict(img_size=48)), "positive multiples of 32, got 48"),
        ("efficientformer", dict(model_args=dict(mlp_ratios="4")), "an MLP ratio must be a number above 0"),
        ("efficientformer", dict(model_args=dict(patch=3)), "unknown model argument 'patch'"),
        ("efficientformer", dict(model_args=dict(drop_rate=1)), "drop_rate must be a number from 0 to below 1, got 1"),
        ("efficientformerv2", dict(mlp_ratios=[[4]] * 3), "mlp_ratios must be 4 lists of choices"),
        (
            "efficientformerv2",
            dict(mlp_ratios=[[4], [4], [4], [4, "3"]]),
            "stage 3 must be a list of numbers",
        ),
        ("efficientformerv2", dict(mlp_ratios=[[4], [4], [4], [4, 0]]), "an MLP ratio must be a number above 0"),
        ("efficientformerv2", dict(num_vit=3), "num_vit must be two numbers, of the stages 2 and 3, got 3"),
        ("efficientformerv2", dict(num_vit=[0, 3]), "from 0 to the 2 blocks of stage 3, got 3"),
        ("efficientformerv2", dict(model_args=dict(distillation=1)), "distillation must be true or false, got 1"),
    ],
)
def test_malformed_spaces(family, change, message):
    data = dict(family=family, embed_dims=[[8, 6]] * 4, depths=[1, 1, 1, 2])
    if family == "efficientformerv2":
        data["mlp_ratios"] = [[4, 2]] * 4
    SearchSpace.from_dict(data)
    with pytest.raises(ValueError, match=message):
        SearchSpace.from_dict({**data, **change})


def test_networks_of_another_space():
    space, ones = small_v1(), ((1,), (1,), (1,))
    for arch, message in (
        (EfficientFormerArch((10, 14, 12, 20), (*ones, (1,)), 0), "stage 0: embed_dim 10 is not one of .* 12, 8"),
        (
            EfficientFormerArch((12, 14, 12, 20), (*ones, (1,) * 5), 0),
            "stage 3: the space has 4 places .*, not 5",
        ),
        (EfficientFormerArch((12, 14, 12, 20), (*ones, (0, 1)), 0), "stage 3: block 0 is always there in this space"),
        (EfficientFormerArch((12, 14, 12, 20), (*ones, (1, 1)), 2), "block 0 attends, which in this space the last 3"),
        (small_v2().largest, "expected an EfficientFormerArch, got a EfficientFormerV2Arch"),
    ):
        with pytest.raises(ValueError, match=message):
            space.encode(arch)
    arch = EfficientFormerV2Arch((12, 14, 12, 20), (*ones, (1,)), ((2.0,), (1.0,), (2.0,), (1.2,)), (0, 0))
    with pytest.raises(ValueError, match=r"stage 3, block 0: mlp_ratio 1.2 is not one of the space's choices 1.5, 1.0"):
        small_v2().encode(arch)
