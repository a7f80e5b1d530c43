"""AutoFormer against its authors' code: sub-networks with weights of their supernets, and what the model adds."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from torch.testing import assert_close

import timm_resnas  # noqa: F401  (registers the models)
from timm_resnas.arch import ArchError
from timm_resnas.models.autoformer import checkpoint_filter_fn, relative_positions

pytestmark = pytest.mark.oldest

SMALL = dict(embed_dim=32, mlp_ratio=[2, 3, 1.5], num_heads=[2, 1, 3], head_dim=8, patch_size=8, num_classes=5)


def released(file, name):
    """Weights, input, and per sub-network its arguments and golden tensors."""
    weights, golden = {}, {}
    with safe_open(file, "pt") as f:
        supernet = json.loads(f.metadata()["supernets"])[name]
        for key in f.keys():
            if key.startswith(f"{name}/param/"):
                weights[key.split("/", 2)[2]] = f.get_tensor(key)
            elif key.startswith(f"{name}/cfg"):
                _, cfg, what = key.split("/", 2)
                golden.setdefault(int(cfg[3:]), {})[what] = f.get_tensor(key)
        images = f.get_tensor(f"{name}/input")
    own = supernet["supernet"]
    model_args = dict(
        img_size=own["img_size"],
        patch_size=own["patch_size"],
        num_classes=own["num_classes"],
        global_pool="avg" if own["gp"] else "token",
        rel_pos=own["relative_position"],
        max_relative_position=own["max_relative_position"],
    )
    archs = []
    for c in supernet["configs"]:
        c = c["config"]
        archs.append(dict(embed_dim=c["embed_dim"][0], mlp_ratio=c["mlp_ratio"], num_heads=c["num_heads"]))
    return weights, images, own, model_args, archs, golden


def by_kind(rows):
    """Interleaved rows of queries, keys and values as [3, heads * head_dim, ...]."""
    return rows.unflatten(0, (-1, 3)).transpose(0, 1)


@pytest.mark.parametrize("cfg", [0, 1])
@pytest.mark.parametrize("name", ["net0", "net1"])
def test_equals_the_authors_code(name, cfg, golden):
    """net1 is of their other kind: all query, key and value channels at any number of heads, in stacked rows."""
    weights, images, own, model_args, archs, tensors = released(golden("autoformer_a"), name)
    arch, tensors, factor, head_dim = archs[cfg], tensors[cfg], 1.0, 64
    if not own["change_qkv"]:
        head_dim = own["embed_dim"] // arch["num_heads"][0]
        # its logits are scaled for the width of the sub-network
        factor = (head_dim / (arch["embed_dim"] // arch["num_heads"][0])) ** 0.5
        for i in range(own["depth"]):
            weight, bias = (weights[f"blocks.{i}.attn.qkv.{k}"] for k in ("weight", "bias"))
            weight, bias = weight.unflatten(0, (3, -1)), bias.unflatten(0, (3, -1))
            weight[0] *= factor
            bias[0] *= factor
            weights[f"blocks.{i}.attn.qkv.weight"] = weight.transpose(0, 1).flatten(0, 1)
    model = timm.create_model("autoformer", head_dim=head_dim, **arch, **model_args).eval()
    model.load_state_dict(checkpoint_filter_fn({"model": weights}, model))
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    logits = model(images)
    assert_close(features, tensors["features"], rtol=1e-5, atol=1e-5)
    assert_close(logits, tensors["logits"], rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    found = {
        "blocks.0.attn.qkv.weight": model.blocks[0].attn.qkv.weight.grad.unflatten(0, (3, -1)),
        "blocks.0.attn.qkv.bias": model.blocks[0].attn.qkv.bias.grad.unflatten(0, (3, -1)),
        "blocks.0.fc1.weight": model.blocks[0].mlp.fc1.weight.grad,
        "pos_embed": model.pos_embed.grad,
    }
    for key, grad in found.items():
        want = tensors[f"grad/{key}"]
        if key.endswith("qkv.weight"):
            want = by_kind(want) if own["change_qkv"] else want.unflatten(0, (3, -1))
        elif key.endswith("qkv.bias"):  # of fewer heads the first entries of all
            grad, want = grad.flatten(), want
        if "qkv" in key:
            grad.unflatten(0, (3, -1))[0].mul_(factor) if grad.ndim == 1 else grad[0].mul_(factor)
        cut = tuple(slice(n) for n in grad.shape)
        assert_close(grad, want[cut], rtol=1e-4, atol=1e-5)
        want[cut] = 0
        assert not want.any()  # nothing outside the sub-network


@pytest.mark.parametrize(
    "name, params, macs",
    [
        ("autoformer_tiny", 5_867_944, 1_481_938_432),
        ("autoformer_small", 22_891_432, 5_161_400_832),
        ("autoformer_base", 53_691_688, 11_691_179_008),
    ],
)
def test_parameters_of_the_papers_networks(name, params, macs):
    from timm_resnas.nas.count import count_macs

    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params
    assert count_macs(model, (3, 224, 224)) == macs


def test_relative_positions_pair_by_pair():
    height, width, reach = 2, 4, 2
    rows, cols, places = relative_positions(torch.zeros(1), height, width, reach)
    grid = [(r, c) for r in range(height) for c in range(width)]
    for q, (r, c) in enumerate(grid, start=1):
        for k, (r_, c_) in enumerate(grid, start=1):
            (row,), (col,) = places[k, :height].nonzero(), places[k, height:-1].nonzero()
            assert rows[q, row] == max(-reach, min(reach, r_ - r)) + reach + 1
            assert cols[q, col] == max(-reach, min(reach, c_ - c)) + reach + 1
    assert not rows[0].any() and not cols[0].any()
    assert places[0].tolist() == [0] * 6 + [1] and places[1:].sum(1).eq(2).all()


@pytest.mark.parametrize("img_size", [(32, 48), (64, 16)])
def test_longer_tables_compute_the_same(img_size):
    """Of a shorter reach, on any grid."""
    args = dict(img_size=img_size, pretrained_cfg_overlay=dict(input_size=(3, *img_size)), **SMALL)
    torch.manual_seed(0)
    model = timm.create_model("autoformer", max_relative_position=2, **args).eval()
    longer = timm.create_model("autoformer", max_relative_position=9, **args).eval()
    assert longer.blocks[0].attn.rel_pos_k.vertical.shape == (20, 8)
    longer.load_state_dict(checkpoint_filter_fn(model.state_dict(), longer))
    x = torch.randn(2, 3, *img_size)
    assert_close(longer(x), model(x), rtol=0, atol=0)
    back = timm.create_model("autoformer", max_relative_position=2, **args)
    state = checkpoint_filter_fn(longer.state_dict(), back)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_initial_weights():
    """By Xavier's rule queries, keys and values are layers of their own."""
    torch.manual_seed(0)
    for init, std in (("", 0.02), ("moco", (2 / (32 + 16)) ** 0.5)):
        model = timm.create_model("autoformer", img_size=32, weight_init=init, **{**SMALL, "num_heads": 2})
        weights = torch.stack([block.attn.qkv.weight for block in model.blocks])
        assert weights.std().item() == pytest.approx(std, rel=0.05)
        assert model.blocks[0].attn.rel_pos_k.vertical.std().item() == pytest.approx(0.02, rel=0.2)


def test_dropout_of_attention_is_that_of_the_plain_form():
    """In the mean over many draws."""
    torch.manual_seed(0)
    model = timm.create_model("autoformer", img_size=32, attn_drop_rate=0.5, **SMALL)
    attn = model.blocks[0].attn
    positions = relative_positions(torch.zeros(1), 4, 4, model.max_relative_position)
    qkv = torch.randn(1, 17, 3 * 16).expand(4000, -1, -1)
    with torch.no_grad():
        for table in (attn.rel_pos_k, attn.rel_pos_v):
            table.vertical.normal_()
            table.horizontal.normal_()
        expected = attn.eval().attend(qkv[:1], *positions)
        assert_close(attn.train().attend(qkv, *positions).mean(0), expected[0], rtol=0, atol=0.15)


@pytest.mark.parametrize(
    "args, message",
    [
        (dict(mlp_ratio=[4, 4], num_heads=[1, 1, 1]), "must agree; got mlp_ratio 2, num_heads 3"),
        (dict(depth=2, num_heads=[1, 1, 1]), "must agree; got depth 2, num_heads 3"),
        (dict(depth=0), "depth must be a positive integer, got 0"),
        (dict(depth=2, embed_dim="wide"), "embed_dim must be a positive integer, got 'wide'"),
        (dict(depth=2, num_heads=2.0), "num_heads must be a positive integer, got 2.0"),
        (dict(depth=1, mlp_ratio=[1e-4]), "gives at least one hidden unit, got 0.0001"),
        (dict(depth=1, img_size=100), "image size 100x100 is not a multiple of the patch size 16"),
    ],
)
def test_malformed_architectures(args, message):
    with pytest.raises(ArchError, match=message):
        timm.create_model("autoformer", **{"mlp_ratio": 4, "num_heads": 2, "embed_dim": 32, **args})


def test_unknown_values():
    with pytest.raises(ValueError, match="qkv_bias_layout must be 'prefix' or 'interleaved', got 'rows'"):
        timm.create_model("autoformer", qkv_bias_layout="rows")
    with pytest.raises(ValueError, match="max_relative_position must be at least 1, got 0"):
        timm.create_model("autoformer", max_relative_position=0)
    with pytest.raises(ValueError, match="weight_init must be '' or 'moco', got 'jax'"):
        timm.create_model("autoformer", weight_init="jax")
    with pytest.raises(ValueError, match="global_pool must be"):
        timm.create_model("autoformer", global_pool="max")
