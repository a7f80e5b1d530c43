"""The supernet: sliced = masked = every sub-network alone; extraction, channel sorting, several processes."""

import copy
import json
import os
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from timm_resnas.arch import ArchError
from timm_resnas.families.vit_resnas import VitResNasSpace
from timm_resnas.hub import save_pretrained
from timm_resnas.models.vit_resnas import checkpoint_filter_fn
from timm_resnas.nas import elastic
from timm_resnas.nas.count import count_macs
from timm_resnas.nas.sampling import MultiArchSampler
from timm_resnas.nas.space import SearchSpace

pytestmark = pytest.mark.oldest

CONV, PLAIN = (5, 24, 6), (0, 24)


def small_space(stem=CONV, **model_args):
    """Three stages of two blocks, the second removable; images 32 x 48."""
    heads, mlp = [16, 12, 8], [40, 32, 24, 16]
    network, choices = [stem], [[24, 20, 16]]
    for dim, widths in ((24, None), (32, [32, 28, 24]), (40, [40, 36, 32])):
        if widths:
            network.append((3, network[-1][1][0], dim))
            choices.append(widths)
        for layer in (None, [dim, dim, 0, 0]):
            network.append((1, (dim, 4, 4), (dim, 40), 1))
            choices.append({"attn": heads, "mlp": mlp, "layer": layer})
    args = {"img_size": (32, 48), "patch_size": 4, **model_args}
    return VitResNasSpace([*network, (2, 40, 7)], [*choices, None], **args)


def perturbed(space, seed=0, dtype=torch.float64):
    """A supernet in which every parameter and buffer has a value of its own, the same at every call."""
    net = timm.create_model("vit_resnas_supernet", space=space.to_dict(), device="meta", dtype=dtype)
    net.to_empty(device="cpu")
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim > 1 and not name.endswith(("token", "pos_embed")):
                p.normal_(std=1.2 / p[0].numel() ** 0.5, generator=g)
            else:
                p.normal_(std=0.2, generator=g).add_(p.ndim == 1 and not name.endswith("bias"))
        for b in net.buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 1.5, generator=g)
            else:
                b.fill_(3)
    return net


def freeze_bn(net):
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()


def weighted_sum(outputs):
    """A loss that all outputs of all examples decide, each in its own way."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(9)
    return sum((o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)


def images(net, count, seed=1):
    g = torch.Generator().manual_seed(seed)
    param = net.cls_token
    return torch.randn(count, net.in_chans, *net.img_size, generator=g, dtype=torch.float64).to(param.dtype)


def run(net, x, archs, mode):
    net = copy.deepcopy(net)
    outputs = net(x, archs=archs, mode=mode)
    weighted_sum(outputs).backward()
    assert all(p.grad is not None for p in net.parameters())
    return outputs, {n: p.grad for n, p in net.named_parameters()}


def run_alone(net, x, archs):
    """Each group through its extracted network, which gets the stem's output on the whole batch."""
    net = copy.deepcopy(net)
    stem = net.patch_embed.stem(x)
    subs, outputs = [], []
    for arch, part, stem_part in zip(archs, x.chunk(len(archs)), stem.chunk(len(archs)), strict=True):
        sub = net.extract(arch)
        sub.token_labeling, sub.distilled_training = net.token_labeling, net.distilled_training
        sub.patch_embed.stem = lambda _, stem_part=stem_part: stem_part
        outputs.append(sub(part))
        subs.append(sub)
    if isinstance(outputs[0], tuple):
        outputs = tuple(torch.cat(o) for o in zip(*outputs, strict=True))
    else:
        outputs = torch.cat(outputs)
    weighted_sum(outputs).backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
    for arch, sub in zip(archs, subs, strict=True):
        there = [i for i, b in enumerate(arch.blocks) if getattr(b, "exists", True)]
        for name, p in sub.named_parameters():
            if p.grad is None:
                continue
            if name.startswith("blocks."):
                _, i, rest = name.split(".", 2)
                name = f"blocks.{there[int(i)]}.{rest}"
            place = [torch.arange(n) for n in p.shape]
            if ".qkv." in name:
                n, full = len(p) // 3, len(grads[name]) // 3
                place[0] = torch.cat([torch.arange(n) + k * full for k in range(3)])
            grads[name][torch.meshgrid(*place, indexing="ij")] += p.grad
    return outputs, grads


def assert_close(found, wanted, tolerance, what=""):
    limit = tolerance * wanted.abs().max().item()
    assert (found - wanted).abs().max().item() <= limit, what


def assert_same(found, wanted, tolerance):
    outputs, grads = found
    wanted_outputs, wanted_grads = wanted
    if not isinstance(outputs, tuple):
        outputs, wanted_outputs = (outputs,), (wanted_outputs,)
    for o, w in zip(outputs, wanted_outputs, strict=True):
        assert_close(o, w, tolerance, "outputs")
    assert grads.keys() == wanted_grads.keys()
    for name, grad in grads.items():
        assert_close(grad, wanted_grads[name], tolerance, name)


def twins(space, count=6, seed=3):
    """Architectures that share embedding widths and differ in heads, hidden units and depth, among strangers."""
    rng = np.random.default_rng(seed)
    archs = space.sample_many(count, rng)
    genes, picks = space.searched, None
    while picks is None or not all(len(set(column)) > 1 for column in picks.T):
        picks = np.array([[rng.integers(len(gene.draws)) for gene in genes] for _ in range(3)])
    for i, gene in enumerate(genes):
        if gene.kind == "width":
            picks[:, i] = picks[0, i]
    archs[1::2] = space.build(picks)[: len(archs[1::2])]
    if count > 2:
        archs[0] = space.smallest  # so that order by width is not the batch's
    return archs


# -- outputs and gradients --------------------------------------------------------------------------------------------

CASES = {
    "conv stem": dict(stem=CONV),
    "plain stem": dict(stem=PLAIN),
    "patch head": dict(stem=PLAIN, patch_head=True),
    "distill": dict(stem=CONV, distill_token=True),
}


@pytest.mark.parametrize("merge_rows", [0, 10**9])
@pytest.mark.parametrize("case", CASES)
def test_sliced_masked_and_alone_agree(case, merge_rows, monkeypatch):
    monkeypatch.setattr(elastic, "MERGE_ROWS", merge_rows)
    space = small_space(**CASES[case])
    net = perturbed(space).train()
    freeze_bn(net)
    if case == "patch head":
        net.set_token_labeling()
    if case == "distill":
        net.set_distilled_training()
    archs = twins(space)
    x = images(net, 12)
    wanted = run_alone(net, x, archs)
    assert_same(run(net, x, archs, "sliced"), wanted, 1e-9)
    assert_same(run(net, x, archs, "masked"), wanted, 1e-9)


def test_batch_statistics_are_those_of_the_whole_batch():
    net = perturbed(small_space()).train()
    archs = twins(net.space)
    x = images(net, 12)
    wanted = run_alone(net, x, archs)
    for mode in ("sliced", "masked"):
        assert_same(run(net, x, archs, mode), wanted, 1e-9)
    one = copy.deepcopy(net)
    one(x, archs=archs, mode="sliced")
    two = copy.deepcopy(net)
    two.patch_embed(x)
    assert torch.equal(one.patch_embed.conv3.bn.running_var, two.patch_embed.conv3.bn.running_var)


@pytest.mark.parametrize("merge_rows", [0, 10**9])
def test_float32(merge_rows, monkeypatch):
    monkeypatch.setattr(elastic, "MERGE_ROWS", merge_rows)
    net = perturbed(small_space(), dtype=torch.float32).train()
    archs = twins(net.space)
    x = images(net, 12)
    wanted = run_alone(net, x, archs)
    assert_same(run(net, x, archs, "sliced"), wanted, 1e-3)
    assert_same(run(net, x, archs, "masked"), wanted, 1e-3)


@pytest.mark.parametrize("mode", ["sliced", "masked"])
def test_blocks_that_no_group_uses(mode):
    """Every parameter gets a gradient, also the patch head while labels are off."""
    space = small_space(PLAIN, patch_head=True)
    net = perturbed(space).train()
    archs = [space.smallest] * 3
    x = images(net, 6)
    outputs, grads = run(net, x, archs, mode)
    assert_same((outputs, grads), run_alone(net, x, archs), 1e-9)
    assert outputs.shape == (6, 7)
    for name in ("blocks.1.attn.qkv.weight", "blocks.4.norm2.bias", "blocks.7.mlp.fc2.weight", "patch_head.weight"):
        assert not grads[name].any(), name


@pytest.mark.parametrize("mode", ["sliced", "masked"])
def test_grad_checkpointing_changes_nothing(mode):
    net = perturbed(small_space()).train()
    archs = twins(net.space)
    x = images(net, 12)
    wanted = run(net, x, archs, mode)
    net.set_grad_checkpointing()
    assert_same(run(net, x, archs, mode), wanted, 1e-12)


@pytest.mark.parametrize("mode", ["sliced", "masked"])
def test_random_rates(mode):
    net = perturbed(small_space(), dtype=torch.float32)
    kwargs = dict(drop_rate=0.1, pos_drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.3)
    net = timm.create_model("vit_resnas_supernet", space=net.space.to_dict(), **kwargs).train()
    outputs, grads = run(net, images(net, 12), twins(net.space), mode)
    assert outputs.shape == (12, 7) and torch.isfinite(outputs).all()
    assert all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_drop_path_leaves_out_branches_of_single_images(branch):
    """Rates of the last stage are 0.79 and 0.99: about 8 in 10 images of every group go past both branches."""
    space = small_space(PLAIN)
    net = timm.create_model("vit_resnas_supernet", space=space.to_dict(), drop_path_rate=0.99).double()
    net.load_state_dict(perturbed(space).state_dict())
    for i in (0, 1, 3, 4):
        net.blocks[i].drop_path1 = net.blocks[i].drop_path2 = nn.Identity()

    def silence(net, branch):
        for i in (6, 7):
            layer = net.blocks[i].attn.proj if branch == "attn" else net.blocks[i].mlp.fc2
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    silence(net, {"attn": "mlp", "mlp": "attn"}[branch])
    past = copy.deepcopy(net).eval()
    silence(past, branch)
    archs = twins(space, count=4)
    x = images(net, 100)
    wanted = past(x, archs=archs)
    for mode in ("sliced", "masked"):
        torch.manual_seed(0)
        same = (net.train()(x, archs=archs, mode=mode) - wanted).abs().amax(dim=1) < 1e-12
        assert all(10 < n < 25 for n in same.view(4, 25).sum(dim=1).tolist())


def test_one_architecture_and_avg_pooling():
    space = small_space(PLAIN)
    net = perturbed(space).train()
    net.reset_classifier(net.num_classes, "avg")
    archs = twins(space)[1:2]
    x = images(net, 2)
    wanted = run_alone(net, x, archs)
    for mode in ("sliced", "masked"):
        assert_same(run(net, x, archs, mode), wanted, 1e-9)


@pytest.mark.parametrize("mode", ["sliced", "masked"])
def test_autocast_and_bfloat16(mode, monkeypatch):
    """Statistics of norms stay float32: outputs keep bfloat16's accuracy far from a mean of 0."""
    net = perturbed(small_space(), dtype=torch.float32).train()
    freeze_bn(net)
    archs = twins(net.space)
    x = images(net, 12)
    wanted = net(x, archs=archs, mode="sliced").detach()
    # oneDNN's kernels for bfloat16 need more of a virtual machine than some give
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, grads = run(net, x, archs, mode)
    assert_close(outputs.float(), wanted, 0.03)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads.values())
    low = copy.deepcopy(net).bfloat16()
    assert_close(low(x.bfloat16(), archs=archs, mode=mode).float(), wanted, 0.06)


def test_masked_layer_norm():
    """Against layer norm of the kept channels alone, where E[x^2] - mean^2 would cancel."""
    g = torch.Generator().manual_seed(0)
    widths = [24, 17, 5]
    keep = (torch.arange(24) < torch.tensor(widths)[:, None]).float()[:, None, None]
    weight, bias = torch.randn(2, 24, generator=g)
    for dtype, mean, tolerance in (
        (torch.float64, 3000, 1e-9),
        (torch.float32, 3000, 2e-3),
        (torch.bfloat16, 30, 4e-3),
    ):
        x = torch.randn(3, 2, 4, 24, generator=g) + mean
        x = (x.double() * keep).to(dtype).requires_grad_()
        y = elastic.masked_layer_norm(x, keep.to(dtype), weight.to(dtype), bias.to(dtype), 1e-6)
        assert y.dtype == dtype
        (y * y.detach().cos()).sum().backward()
        for i, width in enumerate(widths):
            z = x.detach()[i].double()[..., :width].requires_grad_()
            w, b = weight.to(dtype).double()[:width], bias.to(dtype).double()[:width]
            wanted = nn.functional.layer_norm(z, (width,), w, b, 1e-6)
            (wanted * y[i, ..., :width].detach().double().cos()).sum().backward()
            assert_close(y[i, ..., :width].double(), wanted, tolerance)
            assert not y[i, ..., width:].any() and not x.grad[i, ..., width:].any()
            assert_close(x.grad[i, ..., :width].double(), z.grad, 5 * tolerance)


def test_masked_layer_norm_gradcheck():
    g = torch.Generator().manual_seed(0)
    keep = (torch.arange(6) < torch.tensor([6, 3])[:, None]).double()[:, None, None]
    x = (torch.randn(2, 2, 2, 6, generator=g, dtype=torch.float64) * keep).requires_grad_()
    weight, bias = torch.randn(2, 6, generator=g, dtype=torch.float64)
    # x is zero where it is masked: perturb it within the mask only
    args = (x, weight.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w, b: elastic.masked_layer_norm(x * keep, keep, w, b, 1e-6), args)


# -- the released code's numbers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(golden):
    path = golden("supernet_a")
    with safe_open(path, "pt") as f:
        meta = json.loads(f.metadata()["meta"])
    tensors = load_file(path)
    args = dict(img_size=224, patch_size=14, patch_head=True)
    space = VitResNasSpace(meta["network_def"], literal_eval(meta["num_channels_to_keep"]), **args)
    net = timm.create_model("vit_resnas_supernet", space=space.to_dict())
    state = {k.removeprefix("state_dict/"): v for k, v in tensors.items() if k.startswith("state_dict/")}
    net.load_state_dict(checkpoint_filter_fn(state, net))
    return net, tensors, meta


def our_name(name):
    return (
        name.replace("cls_head", "head").replace("tokens", "cls_token") if "." not in name or "head" in name else name
    )


def test_released_sub_networks(released):
    net, tensors, meta = released
    net.eval()
    x = tensors["input"]
    with torch.inference_mode():
        torch.testing.assert_close(net(x), tensors["eval_full/logits"], atol=1e-4, rtol=0)
        for i in range(3):
            wanted = tensors[f"subnet{i}/logits"]
            net.set_arch(meta[f"subnet{i}"])
            torch.testing.assert_close(net(x), wanted, atol=1e-4, rtol=0)
            torch.testing.assert_close(net.extract(net.active)(x), wanted, atol=1e-4, rtol=0)
    net.set_arch(None)


@pytest.mark.parametrize("mode", ["sliced", "masked"])
def test_released_training_step(released, mode):
    net, tensors, meta = released
    net = copy.deepcopy(net).train()
    net.set_token_labeling()
    defs = meta["per_example_network_def"]
    order = [i for g in range(4) for i in (g, g + 4)]  # released: example i is in group i mod 4
    archs = [defs[i] for i in range(4)]
    assert defs[4:] == archs
    cls, patch = net(tensors["input"][order], archs=archs, mode=mode)
    back = torch.tensor(order).argsort()
    cls, patch = cls[back], patch[back]
    torch.testing.assert_close(cls, tensors["train/cls_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(patch, tensors["train/patch_logits"], atol=1e-4, rtol=0)
    loss = (cls * tensors["train/loss_weight_cls"]).sum() + (patch * tensors["train/loss_weight_patch"]).sum()
    torch.testing.assert_close(loss, tensors["train/loss"][0], atol=1e-3, rtol=0)
    loss.backward()
    names = [k for k in tensors if k.startswith("train/grad/")]
    assert len(names) == 18
    params = dict(net.named_parameters())
    for name in names:
        assert_close(params[our_name(name.removeprefix("train/grad/"))].grad, tensors[name], 1e-3, name)


def test_released_channel_sorting(released):
    net, tensors, _ = released
    net = copy.deepcopy(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.sort_channels()
    rewired = {k.removeprefix("rewired/"): v for k, v in tensors.items() if k.startswith("rewired/")}
    for name, value in net.state_dict().items():
        assert torch.equal(value, rewired.get(name, before[name])), name
    assert len(rewired) == 36


# -- channel sorting --------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sorting_commutes_with_training(name):
    """Sorted or not, the next steps of the full network are the same: function, gradients and moments."""
    net = perturbed(small_space(PLAIN)).train()
    x = images(net, 4)
    ends = []
    for sort in (False, True):
        twin = copy.deepcopy(net)
        optimizer = OPTIMIZERS[name](twin.parameters())
        for step in range(4):
            if sort and step == 2:
                before = twin(x), twin(x, archs=[net.space.smallest])
                twin.sort_channels(optimizer)
                torch.testing.assert_close(twin(x), before[0], rtol=0, atol=1e-10)
                assert (twin(x, archs=[net.space.smallest]) - before[1]).abs().max() > 1e-3
            optimizer.zero_grad()
            weighted_sum(twin(x)).backward()
            if sort and step == 3:
                twin.sort_channels(optimizer)  # gradients that wait for their step go along
            optimizer.step()
        ends.append(twin(x))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-8)


def test_sorting_is_in_place_ordered_and_stable():
    net = perturbed(small_space(PLAIN))
    block = net.blocks[0]
    with torch.no_grad():
        for p, dim in ((block.mlp.fc1.weight, 0), (block.mlp.fc1.bias, 0), (block.mlp.fc2.weight, 1)):
            p.copy_(p.index_select(dim, torch.arange(40) // 2 * 2))  # equal pairs
        block.mlp.fc1.bias[38:] = 50  # biases count
        block.mlp.fc1.bias[1::2] *= -1  # equally important, yet different
        weak = block.attn.qkv.weight.abs().sum(1).view(3, 4, 4).sum((0, 2)).argmin()
        block.attn.qkv.bias.view(3, 4, 4)[0, weak] = -50
    weak = block.attn.qkv.weight.view(3, 4, 4, 24)[:, weak].clone()
    sign = block.mlp.fc1.bias.clone()
    pointers = [p.data_ptr() for p in net.parameters()]
    net.sort_channels()
    assert pointers == [p.data_ptr() for p in net.parameters()]
    fc1, fc2, attn = block.mlp.fc1, block.mlp.fc2, block.attn
    importance = fc1.weight.abs().sum(1) + fc1.bias.abs() + fc2.weight.abs().sum(0)
    assert (importance.diff() <= 1e-12).all()
    first = {abs(b): b for b in reversed(sign.tolist())}
    assert all(b == first[abs(b)] for b in fc1.bias[::2].tolist())
    qkv = attn.qkv.weight.abs().sum(1) + attn.qkv.bias.abs()
    importance = qkv.view(3, 4, 4).sum((0, 2)) + attn.proj.weight.abs().sum(0).view(4, 4).sum(1)
    assert (importance.diff() <= 0).all()
    assert fc1.bias[0] == 50 and torch.equal(attn.qkv.weight.view(3, 4, 4, 24)[:, 0], weak)
    state = copy.deepcopy(net.state_dict())
    net.sort_channels()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_sorting_refuses_factored_moments():
    net = perturbed(small_space(PLAIN))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    weight = net.blocks[0].mlp.fc1.weight
    optimizer.state[weight] = {"row": torch.zeros(40), "step": torch.tensor(3.0)}
    before = weight.clone()
    with pytest.raises(ValueError, match=r"'row' of shape \[40\]"):
        net.sort_channels(optimizer)
    assert torch.equal(weight, before)


# -- extraction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space",
    [
        pytest.param(small_space(PLAIN), id="plain"),
        pytest.param(small_space(distill_token=True), id="distill"),
        pytest.param(SearchSpace.preset("micro", img_size=32), id="micro"),
        pytest.param(SearchSpace.preset("mini", img_size=32), id="mini"),
        pytest.param(SearchSpace.preset("vit_resnas_tiny", img_size=56), id="tiny"),
    ],
)
def test_extracted_networks_compute_what_the_supernet_does(space):
    net = perturbed(space, dtype=torch.float32).eval()
    x = images(net, 2)
    with torch.inference_mode():
        stem = net.patch_embed.stem(x)
        for arch in space.sample_many(20, np.random.default_rng(0)):
            net.set_arch(arch)
            wanted = net(x)
            torch.testing.assert_close(net.forward_shared(stem), wanted, rtol=0, atol=0)
            sub = net.extract(arch)
            assert_close(sub(x), wanted, 1e-5)
            assert sub.arch == arch.canonical() and not sub.training
        net.set_arch(None)
        assert_close(net.forward_shared(stem), net(x), 1e-5)


def test_extracted_networks_own_their_tensors(tmp_path):
    net = perturbed(small_space(patch_head=True), dtype=torch.float32).eval()
    arch = net.space.sample(np.random.default_rng(4))
    sub = net.extract(arch)
    state = sub.state_dict()
    own = {v.untyped_storage().data_ptr() for v in state.values()}
    assert len(own) == len(state)
    assert not own & {v.untyped_storage().data_ptr() for v in net.state_dict().values()}
    assert all(v.is_contiguous() for v in state.values())
    save_file(state, tmp_path / "sub.safetensors")
    again = load_file(tmp_path / "sub.safetensors")
    assert all(torch.equal(v, again[k]) for k, v in state.items())
    # as a folder that timm loads, in another form of the same network
    save_pretrained(sub, tmp_path / "sub")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'sub'}", pretrained=True).eval()
    x = images(net, 2)
    assert torch.equal(loaded(x), sub(x))
    before = sub(x)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert torch.equal(sub(x), before)


def test_a_saved_supernet_comes_back(tmp_path):
    net = perturbed(small_space(num_classes=5), dtype=torch.float32).eval()
    save_pretrained(net, tmp_path / "net", label_names=list("abcde"))
    again = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    assert again.space == net.space
    x = images(net, 4)
    archs = twins(net.space, count=4)
    assert torch.equal(again(x), net(x))
    assert torch.equal(again(x, archs=archs), net(x, archs=archs))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_errors():
    space = small_space(PLAIN)
    net = perturbed(space)
    x = images(net, 6)
    with pytest.raises(ValueError, match="mode must be one of sliced, masked; got 'dense'"):
        net(x, archs=[space.largest], mode="dense")
    with pytest.raises(ValueError, match="6 images cannot be cut into 4 equal groups"):
        net(x, archs=[space.largest] * 4)
    with pytest.raises(ValueError, match="cannot be cut into 0 equal groups"):
        net(x, archs=[])
    with pytest.raises(ValueError, match="images of 48x32 do not match the supernet's 32x48"):
        net(x.transpose(2, 3), archs=[space.largest])
    with pytest.raises(ArchError, match=r"has 5 blocks and reductions, the supernet 8.*absent blocks as exists=0"):
        net(x, archs=[space.smallest.canonical()])
    with pytest.raises(ArchError, match=r"entry 3 .* does not fit in the supernet's"):
        net.set_arch("((0,24),(1,(24,4,4),(24,40),1),(1,(24,4,4),(24,40),1),(3,24,36),(2,36,7))".replace(
            "(3,24,36),(2,36,7)",
            "(3,24,36),(1,(36,4,4),(36,40),1),(1,(36,4,4),(36,40),1),(3,36,40),(1,(40,4,4),(40,40),1),"
            "(1,(40,4,4),(40,40),1),(2,40,7)",
        ))  # fmt: skip
    with pytest.raises(ArchError):
        net.extract("not an architecture")
    with pytest.raises(TypeError, match=r"^a supernet takes space, .* instead of network_def; vit_resnas takes a"):
        timm.create_model("vit_resnas_supernet", network_def=space.largest.to_network_def())
    for mode in ("sliced", "masked"):
        headless = perturbed(small_space(PLAIN, num_classes=0))
        with pytest.raises(ValueError, match="several widths need a classifier"):
            headless(x, archs=[space.largest, space.smallest], mode=mode)
        assert headless(x, archs=[space.smallest] * 2, mode=mode).shape == (6, 32)


# -- several processes ------------------------------------------------------------------------------------------------


def _parallel_cases():
    """Nets and images that parent and children make alike."""
    for name, space in (
        ("plain", small_space(PLAIN, patch_head=True)),  # the patch head is not trained
        ("frozen", small_space(CONV)),
        ("statistics", small_space(CONV)),
    ):
        net = perturbed(space).train()
        if name == "frozen":
            freeze_bn(net)
        sampler = MultiArchSampler(space, 4, seed=8, warmup_epochs=0)
        yield name, net, sampler, images(net, 16)


def _mean_loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)


TARGETS = torch.arange(16) % 7


def _process(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for name, net, sampler, x in _parallel_cases():
        model = nn.parallel.DistributedDataParallel(net)
        mine = slice(8 * rank, 8 * rank + 8)
        for mode in ("sliced", "masked"):
            for step in range(3):  # without a gradient for everything, the second would fail
                model.zero_grad()
                archs = sampler.archs(0, step, rank, 2) if step < 2 else [net.space.smallest] * 2
                _mean_loss(model(x[mine], archs=archs, mode=mode), TARGETS[mine]).backward()
                results.update({f"{name}/{mode}/{step}/{n}": p.grad.clone() for n, p in net.named_parameters()})
    if rank == 0:
        save_file(results, f"{folder}/grads.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(python, tmp_path):
    code = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import test_supernet as t; "
    given = dict(env=dict(os.environ), out=tmp_path / "log", err=tmp_path / "log")
    pids = [python.start(f"{code} t._process({rank}, {str(tmp_path)!r})", **given) for rank in range(2)]
    assert [python.wait(pid) for pid in pids] == [0, 0], (tmp_path / "log").read_text()
    found = load_file(tmp_path / "grads.safetensors")
    seen = 0
    for name, net, sampler, x in _parallel_cases():
        for mode in ("sliced", "masked"):
            for step in range(3):
                archs = sampler.archs(0, step) if step < 2 else [net.space.smallest] * 4
                net.zero_grad()
                if name == "statistics":  # each process normalises its own images
                    for part in range(2):
                        mine = slice(8 * part, 8 * part + 8)
                        outputs = net(x[mine], archs=archs[2 * part : 2 * part + 2], mode=mode)
                        (_mean_loss(outputs, TARGETS[mine]) / 2).backward()
                else:
                    _mean_loss(net(x, archs=archs, mode=mode), TARGETS).backward()
                for n, p in net.named_parameters():
                    assert_close(found[f"{name}/{mode}/{step}/{n}"], p.grad, 1e-9, (name, mode, step, n))
                    seen += 1
    assert seen == len(found)


def test_arch_objects_and_defs_are_both_taken():
    net = perturbed(small_space(PLAIN))
    arch = net.space.sample(np.random.default_rng(0))
    x = images(net, 2)
    wanted = net(x, archs=[arch])
    for form in (arch.to_network_def(), str(arch), arch.args(), json.loads(json.dumps(arch.record()))):
        assert torch.equal(net(x, archs=[form]), wanted)


@pytest.mark.parametrize(
    "name",
    [
        *("vit_resnas_supernet", "autoformer_supernet", "vit_elastic_supernet", "vit_tokens_supernet"),
        *("efficientformer_supernet", "efficientformerv2_supernet"),
    ],
)
def test_costs_follow_the_image_size_and_the_classifier(name):
    net = timm.create_model(name).eval()
    height, width = net.space.model_args["img_size"]
    for change in (lambda: net.set_input_size(img_size=(2 * height, width)), lambda: net.reset_classifier(3)):
        change()
        arch = net.space.largest if name == "vit_elastic_supernet" else net.space.smallest
        small = net.extract(arch)
        costs = net.space.costs(arch)
        assert costs["params"] == sum(p.numel() for p in small.parameters())
        assert costs["macs"] == count_macs(small, (3, 2 * height, width))
