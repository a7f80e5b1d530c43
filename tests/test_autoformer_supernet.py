"""The AutoFormer family: its supernet against its authors' code and against its own sub-networks; its spaces."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from test_autoformer import by_kind, released
from test_cost import LiveMemory
from torch.testing import assert_close

import timm_resnas
from timm_resnas.arch import Arch, ArchError
from timm_resnas.families.autoformer import AutoFormerArch, AutoFormerSpace
from timm_resnas.models.autoformer import checkpoint_filter_fn
from timm_resnas.nas import elastic
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.count import count_macs
from timm_resnas.nas.space import SearchSpace
from timm_resnas.nas.units import cut, mask

pytestmark = pytest.mark.oldest

LAYOUTS = ("prefix", "interleaved")


def small_space(**model_args):
    """Images 24 x 16; weights wider than the widest choice."""
    args = dict(img_size=(24, 16), patch_size=8, num_classes=5, head_dim=4, max_relative_position=1, **model_args)
    return AutoFormerSpace((24, 20, 16), (4, 2), (3, 1.5, 0.7), (4, 2, 1), 28, **args)


def perturbed(space, dtype=torch.float64):
    """A supernet in which every parameter has a value of its own, the same at every call."""
    net = timm.create_model("autoformer_supernet", space=space.to_dict(), device="meta", dtype=dtype)
    net.to_empty(device="cpu")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(std=0.4, generator=g).add_(p.ndim == 1 and not name.endswith("bias"))
    return net.eval()


def images(n, space, dtype=torch.float64):
    return torch.randn(n, 3, *space.model_args["img_size"], dtype=dtype, generator=torch.Generator().manual_seed(1))


def alone(net, arch, layout):
    """A sub-network's parameters, sliced so that gradients reach the supernet's; written without its code."""
    d, out = arch.embed_dim, {}
    params = dict(net.named_parameters())
    for key, p in params.items():
        layer = int(key.split(".")[1]) if key.startswith("blocks.") else 0
        if layer >= arch.depth:
            continue
        inner, hidden = 4 * arch.num_heads[layer], int(d * arch.mlp_ratio[layer])
        most = net.blocks[layer].attn.num_heads * 4
        if "rel_pos" in key or key == "head.bias":
            out[key] = p
        elif key == "head.weight":
            out[key] = p[:, :d]
        elif key in ("cls_token", "pos_embed"):
            out[key] = p[..., :d]
        elif "qkv.weight" in key:
            out[key] = torch.cat([p[k * most : k * most + inner, :d] for k in range(3)])
        elif "qkv.bias" in key:
            start = inner if layout == "prefix" else most
            out[key] = torch.cat([p[k * start : k * start + inner] for k in range(3)])
        elif "attn.proj.weight" in key:
            out[key] = p[:d, :inner]
        elif "fc1" in key:
            out[key] = p[:hidden, :d] if p.ndim == 2 else p[:hidden]
        elif "fc2.weight" in key:
            out[key] = p[:d, :hidden]
        else:  # patch embedding, norms, biases of outputs
            out[key] = p[:d]
    return out


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    return {n: p.grad.clone() for n, p in net.named_parameters()}


# -- the authors' weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sliced", "masked"])
def test_equals_the_authors_supernet(mode, golden):
    weights, x, own, model_args, archs, tensors = released(golden("autoformer_a"), "net0")
    space = AutoFormerSpace(
        *((own["embed_dim"],), (own["depth"],), (own["mlp_ratio"],), (own["num_heads"],)),
        **{k: v for k, v in model_args.items() if k != "global_pool"},
    )
    net = timm.create_model("autoformer_supernet", space=space.to_dict()).eval()
    net.load_state_dict(checkpoint_filter_fn(weights, net))
    for cfg, arch in enumerate(archs):
        net.set_arch(arch)
        with torch.inference_mode():
            assert_close(net(x), tensors[cfg]["logits"], rtol=1e-5, atol=1e-5)
        logits = net(x, archs=[arch], mode=mode)
        assert_close(logits, tensors[cfg]["logits"], rtol=1e-5, atol=1e-5)
        found = gradients(net, logits.sum())
        qkv = "blocks.0.attn.qkv"
        assert_close(
            found[f"{qkv}.weight"].unflatten(0, (3, -1)),
            by_kind(tensors[cfg][f"grad/{qkv}.weight"]),
            atol=1e-5,
            rtol=1e-4,
        )
        for key in (f"{qkv}.bias", "blocks.0.fc1.weight", "pos_embed"):
            assert_close(
                found[key.replace("fc1", "mlp.fc1")], tensors[cfg][f"grad/{key}"], atol=1e-5, rtol=1e-4, msg=key
            )


def as_released(net):
    """A supernet's weights under their names and in their order of rows."""
    names = {"patch_embed.": "patch_embed_super.", ".norm1.": ".attn_layer_norm.", ".norm2.": ".ffn_layer_norm."}
    names |= {".mlp.": ".", ".vertical": ".embeddings_table_v", ".horizontal": ".embeddings_table_h"}
    names |= {"rel_pos_k": "rel_pos_embed_k", "rel_pos_v": "rel_pos_embed_v"}
    out = {}
    for key, value in net.state_dict().items():
        if key.endswith("qkv.weight"):
            value = value.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        out[key] = value.contiguous()
    return out


def test_released_supernets_and_their_sub_networks_load_from_a_file(tmp_path):
    space = small_space()
    net = perturbed(space, torch.float32)
    save_file(as_released(net), tmp_path / "supernet.safetensors")
    torch.save({"model": as_released(net), "epoch": 3}, tmp_path / "supernet.pth")
    x = images(2, space, torch.float32)
    for file in ("supernet.safetensors", "supernet.pth"):
        overlay = dict(file=str(tmp_path / file), num_classes=5, input_size=(3, 24, 16))
        args = dict(pretrained=True, pretrained_cfg_overlay=overlay)
        again = timm.create_model("autoformer_supernet", space=space.to_dict(), **args)
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())
        for arch in (space.smallest, space.largest, AutoFormerArch(17, (1.25, 2.0, 3.1), (3, 4, 1))):
            net.set_arch(arch)
            model = timm.create_model("autoformer", **arch.args(), **space.model_args, **args).eval()
            with torch.inference_mode():
                assert_close(model(x), net(x))


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_papers_networks_fit_in_their_supernets(size):
    """Of the released files' shapes."""
    net = timm.create_model("autoformer_supernet", space=f"autoformer_{size}", device="meta", num_classes=1000)
    model = timm.create_model(f"autoformer_{size}", device="meta")
    model.load_state_dict(checkpoint_filter_fn(as_released(net), model), assign=True)
    arch = AutoFormerArch(model.embed_dim, model.mlp_ratios, tuple(block.attn.num_heads for block in model.blocks))
    net.set_arch(arch)
    assert {k: v.shape for k, v in net.extract(arch).state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    costs = arch.costs()
    assert costs["params"] == sum(p.numel() for p in model.parameters())
    assert costs["macs"] == count_macs(model, (3, 224, 224))
    assert net.space.contains(arch) == (size != "tiny")  # three of whose MLP ratios are 3


# -- sub-networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_extracted_equals_supernet_equals_saved_and_loaded(layout, tmp_path):
    space = small_space(qkv_bias_layout=layout)
    net, x = perturbed(space, torch.float32), images(3, space, torch.float32)
    outputs = []
    with torch.inference_mode():
        for i, arch in enumerate(space.sample_many(10, np.random.default_rng(2))):
            net.set_arch(arch)
            model = net.extract(arch)
            outputs.append(net(x))
            assert_close(model(x), outputs[-1], rtol=0, atol=0)
            timm_resnas.save_pretrained(model, tmp_path / str(i))
            loaded = timm.create_model(f"local-dir:{tmp_path / str(i)}", pretrained=True).eval()
            assert_close(loaded(x), outputs[-1], rtol=0, atol=0)
        timm_resnas.save_pretrained(net, tmp_path / "net")
        again = timm_resnas.load(tmp_path / "net", check=True).eval()
        again.set_arch(arch)
        assert again.space == space and again.qkv_bias_layout == layout
        assert_close(again(x), outputs[-1], rtol=0, atol=0)
    assert torch.stack(outputs).std(0).min() > 0.01  # they differ


@pytest.mark.parametrize("merge_rows", [0, 10**6])
@pytest.mark.parametrize("mode", ["sliced", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_equal_one_by_one(layout, mode, merge_rows, monkeypatch):
    """Outputs and gradients of several sub-networks in one pass: those of each alone, in double precision."""
    monkeypatch.setattr(elastic, "MERGE_ROWS", merge_rows)
    space = small_space(qkv_bias_layout=layout)
    net = perturbed(space)
    rng = np.random.default_rng(3)
    archs = [space.largest, space.smallest, *space.sample_many(3, rng), AutoFormerArch(28, (3.0, 0.1, 2.0), (3, 4, 1))]
    x = images(2 * len(archs), space)
    y = net(x, archs=archs, mode=mode)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    found = gradients(net, (y * weight).sum())
    with torch.device("meta"):
        plain = {arch: arch.create(**space.model_args) for arch in archs}
    each = [
        torch.func.functional_call(plain[arch], alone(net, arch, layout), (part,))
        for arch, part in zip(archs, x.chunk(len(archs)), strict=True)
    ]
    assert_close(y, torch.cat(each), rtol=1e-9, atol=1e-9)
    net.zero_grad()
    (torch.cat(each) * weight).sum().backward()
    for name, p in net.named_parameters():
        assert_close(found[name], torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("mode", ["sliced", "masked"])
def test_gradient_checkpointing(mode):
    space = small_space(drop_path_rate=0.3)
    net, archs = perturbed(space).train(), space.sample_many(3, np.random.default_rng(4))
    results = []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        results.append(gradients(net, net(images(6, space), archs=archs, mode=mode).square().sum()))
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_units(layout):
    """Cut equals masked; sorting keeps the function of the full network and turns that of the narrow ones."""
    space = small_space(qkv_bias_layout=layout)
    net, x = perturbed(space), images(2, space)
    keep = {u.name: u.count - 1 for u in net.units() if u.name.endswith("mlp")}
    args = {**space.model_args, **space.allocation.args()}
    hidden = net.blocks[0].mlp.fc1.out_features
    narrow = timm.create_model("autoformer", **{**args, "mlp_ratio": [(hidden - 0.5) / 28] * 4}).double().eval()
    with torch.inference_mode():
        narrow.load_state_dict(cut(net.state_dict(), net.units(), keep))
        masked = torch.func.functional_call(net, mask(net.state_dict(), net.units(), keep), (x,))
        assert_close(narrow(x), masked)
        before, small = net(x), net.extract(space.smallest)(x)
        net.sort_channels()
        assert_close(net(x), before)
        assert not torch.allclose(net.extract(space.smallest)(x), small)


def test_what_does_not_fit():
    space = small_space()
    net = perturbed(space)
    for arch, message in (
        (AutoFormerArch(29, (1.0,), (1,)), "width 29 and 1 layers, the supernet 28 and 4"),
        (AutoFormerArch(16, (1.0,) * 5, (1,) * 5), "5 layers, the supernet 28 and 4"),
        (AutoFormerArch(16, (1.0, 1.0), (1, 5)), "layer 1 has 5 heads and 16 hidden units, the supernet has 4 and 84"),
        (AutoFormerArch(28, (3.1,), (1,)), "layer 0 has 1 heads and 86 hidden units"),
        ({"embed_dim": 16, "mlp_ratio": [1, 2], "num_heads": [1]}, "must agree; got mlp_ratio 2, num_heads 1"),
    ):
        with pytest.raises(ArchError, match=message):
            net.set_arch(arch)
    with pytest.raises(ValueError, match="images of 32x32 do not match the supernet's 24x16"):
        net(torch.zeros(1, 3, 32, 32, dtype=torch.float64), archs=[space.smallest])
    with pytest.raises(ValueError, match="needs a space of its family, got one of 'vit_resnas'"):
        timm.create_model("autoformer_supernet", space="micro")


# -- spaces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, size, least, most, weights",
    [
        ("tiny", 1.06e9, 5.37, 10.52, 11.67),
        ("small", 7.71e13, 13.06, 34.79, 34.79),
        ("base", 1.01e13, 41.69, 76.88, 80.16),
    ],
)
def test_the_papers_spaces(name, size, least, most, weights):
    """Number of architectures; millions of parameters of the least, the greatest, and the supernet."""
    space = SearchSpace.preset(f"autoformer_{name}")
    assert space.size() == pytest.approx(size, rel=0.01)
    found = [space.costs(arch)["params"] / 1e6 for arch in (space.smallest, space.largest)]
    found.append(space.allocation.costs()["params"] / 1e6)
    assert found == pytest.approx([least, most, weights], abs=0.006)
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space


@pytest.mark.parametrize("space", [small_space(), small_space(rel_pos=False), SearchSpace.preset("autoformer_micro")])
def test_costs_are_those_of_built_networks(space):
    size = (3, *space.model_args["img_size"])
    for arch in (space.largest, space.smallest, *space.sample_many(6, np.random.default_rng(5))):
        model, x = space.network(arch).eval(), torch.zeros(1, *size)
        with torch.inference_mode(), LiveMemory(model, x) as memory:
            model(x)
        params = sum(p.numel() for p in model.parameters())
        assert space.costs(arch) == arch.costs(**space.model_args)
        assert space.costs(arch) == dict(macs=count_macs(model, size), params=params, memory=memory.peak)
        assert Arch.from_record(json.loads(json.dumps(arch.record()))) == arch
        assert space.decode(space.encode(arch)[None]) == [arch]


def test_depth_is_uniform():
    """With gaps between the choices as well; all layers of a gap are there or none."""
    space = AutoFormerSpace((16,), (7, 5, 2), (2, 1), (2, 1), head_dim=4)
    depths = [arch.depth for arch in space.sample_many(6000, np.random.default_rng(6))]
    assert set(depths) == {7, 5, 2}
    assert all(abs(depths.count(d) - 2000) < 200 for d in (7, 5, 2))
    assert space.size() == sum(4**d for d in (7, 5, 2))


def test_drawn_within_budgets():
    space, rng = SearchSpace.preset("autoformer_tiny"), np.random.default_rng(7)
    budget = Budget(params=6_000_000, lower=0.9)
    archs = space.sample_many(20, rng, budget)
    archs += space.mutate_many(archs, 10, rng, 0.2, budget) + space.crossover_many(archs, 10, rng, budget)
    assert len(archs) == 40 and len({arch.key() for arch in archs}) > 30
    assert all(not budget.check(arch.costs()) for arch in archs)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(depth=[]), "depth must be a list of 1 to 64 numbers"),
        (dict(mlp_ratio=[4, 4]), "mlp_ratio holds a choice twice"),
        (dict(num_heads=[2, 1.5]), "num_heads must be a positive integer, got 1.5"),
        (dict(embed_dim=[16, 0]), "embed_dim must be a positive integer, got 0"),
        (dict(allocated_dim=8), "allocated_dim 8 is less than the largest embed_dim, 16"),
        (dict(head_dims=3), "has embed_dim, depth, mlp_ratio and num_heads; got"),
        (dict(model_args=dict(head_dim=0)), "head_dim must be an integer from 1 to 65536, got 0"),
        (dict(model_args=dict(qkv_bias_layout="rows")), "must be 'prefix' or 'interleaved', got 'rows'"),
        (dict(model_args=dict(patch=3)), "unknown model argument 'patch'"),
        (dict(model_args=dict(img_size=100)), "image size 100x100 is not a multiple of the patch size 16"),
    ],
)
def test_malformed_spaces(change, message):
    data = dict(family="autoformer", embed_dim=[16], depth=[2], mlp_ratio=[2], num_heads=[2, 1])
    with pytest.raises(ValueError, match=message):
        SearchSpace.from_dict({**data, **change})


def test_networks_of_another_space():
    space = small_space()
    for arch, message in (
        (AutoFormerArch(17, (1.5, 1.5), (1, 1)), "embed_dim 17 is not one of the space's choices 24, 20, 16"),
        (AutoFormerArch(16, (1.5,) * 3, (1,) * 3), "depth 3 is not one of the space's choices 4, 2"),
        (AutoFormerArch(16, (1.5, 2.0), (1, 1)), "layer 1: mlp_ratio 2.0 is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            space.encode(arch)
