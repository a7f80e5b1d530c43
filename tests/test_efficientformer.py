"""EfficientFormer V1 and V2 as networks: timm's numbers and weights, other image sizes, the authors' keys."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import efficientformer, efficientformer_v2
from torch.testing import assert_close

import timm_resnas  # noqa: F401  (registers the models)
from timm_resnas.arch import ArchError
from timm_resnas.models.efficientformer_nas import resample_bias
from timm_resnas.nas.count import count_macs

pytestmark = pytest.mark.oldest

V1 = {
    f"efficientformer_{n}": dict(
        depths=efficientformer.EfficientFormer_depth[n],
        embed_dims=efficientformer.EfficientFormer_width[n],
        num_vit=num_vit,
    )
    for n, num_vit in (("l1", 1), ("l3", 4), ("l7", 8))
}
V2 = {
    f"efficientformerv2_{n.lower()}": dict(
        depths=efficientformer_v2.EfficientFormer_depth[n],
        embed_dims=efficientformer_v2.EfficientFormer_width[n],
        mlp_ratios=efficientformer_v2.EfficientFormer_expansion_ratios[n],
        num_vit=num_vit,
    )
    for n, num_vit in (("S0", 2), ("S1", 2), ("S2", 4), ("L", 6))
}
SMALL_V1 = dict(depths=(1, 2, 1, 3), embed_dims=(8, 12, 16, 20), num_vit=2)
SMALL_V2 = dict(depths=(1, 1, 2, 2), embed_dims=(8, 12, 16, 20), mlp_ratios=(2, 3, (1, 2), (2, 1)), num_vit=1)
BOTH = pytest.mark.parametrize(
    "name, small", [("efficientformer_nas", SMALL_V1), ("efficientformerv2_nas", SMALL_V2)], ids=["v1", "v2"]
)


def generic(name: str) -> str:
    return name.rpartition("_")[0] + "_nas"


def scattered(model):
    """Every weight with a value of its own."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point():
                t.normal_(std=0.3, generator=g).add_(t.ndim == 1 and not name.endswith("bias"))
            if name.endswith("running_var"):
                t.abs_().add_(0.5)
    return model.eval()


@pytest.mark.parametrize(
    "name, millions, gmacs",
    [
        ("efficientformer_l1", 12.29, 1.29),
        ("efficientformer_l3", 31.41, 3.91),
        ("efficientformer_l7", 82.23, 10.12),
        ("efficientformerv2_s0", 3.60, 0.40),
        ("efficientformerv2_s1", 6.19, 0.65),
        ("efficientformerv2_s2", 12.71, 1.25),
        ("efficientformerv2_l", 26.32, 2.55),
    ],
)
def test_published_networks(name, millions, gmacs):
    """timm's tensors, by name and shape; the papers' counts, with the head for distillation."""
    model = timm.create_model(generic(name), **{**V1, **V2}[name], device="meta")
    theirs = timm.create_model(name, device="meta")
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert round(count_macs(model, (3, 224, 224)) / 1e9, 2) == gmacs
    assert isinstance(model, type(theirs))


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0"])
def test_defaults_are_the_smallest_published_networks(name):
    assert {k: v.shape for k, v in timm.create_model(generic(name), device="meta").state_dict().items()} == {
        k: v.shape for k, v in timm.create_model(name, device="meta").state_dict().items()
    }


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0"])
def test_timms_weights_load_and_give_the_same(name, tmp_path):
    theirs = scattered(timm.create_model(name))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    overlay = dict(file=str(tmp_path / "model.safetensors"))
    model = timm.create_model(generic(name), pretrained=True, pretrained_cfg_overlay=overlay, **{**V1, **V2}[name])
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert_close(model.eval()(x), theirs(x), rtol=0, atol=0)
        larger = timm.create_model(generic(name), True, overlay, img_size=(224, 256), **{**V1, **V2}[name]).eval()
        model.set_input_size((224, 256))
        x = torch.randn(2, 3, 224, 256, generator=torch.Generator().manual_seed(1))
        assert_close(larger(x), model(x), rtol=0, atol=0)


def test_resampled_bias():
    """Of a table that is linear in both distances, the same function of the distances in the new grid's steps."""
    rows, columns = torch.arange(9.0)[:, None], torch.arange(7.0)
    table = (rows + 2 * columns).flatten()[None]
    assert resample_bias(table, (9, 7), (9, 7)) is table
    there = resample_bias(table, (9, 7), (18, 13)).unflatten(1, (18, 13))[0]
    y, x = torch.arange(18.0)[:, None] * 17 / 35, torch.arange(13.0) * 13 / 25
    # but at distance 0, where a mirrored line has a kink, and at the ends
    assert_close(there[4:12, 4:9], (y + 2 * x)[4:12, 4:9], rtol=0, atol=0.15)
    assert (there.diff(dim=0) > 0).all() and (there.diff(dim=1) > 0).all()
    turned = table.unflatten(1, (9, 7)).mT.flatten(1)
    assert_close(resample_bias(turned, (7, 9), (13, 18)).unflatten(1, (13, 18))[0], there.T)
    assert_close(resample_bias(table[:, :1], (1, 1), (3, 2)), table[:, :1].expand(1, 6))


@BOTH
def test_every_size_that_the_stride_divides(name, small):
    for size in ((32, 32), (96, 32), (64, 160)):
        x = torch.randn(2, 3, *size)
        model = timm.create_model(name, img_size=size, num_classes=3, **small).eval()
        assert model(x).shape == (2, 3)
        assert [tuple(m.shape[2:]) for m in model.forward_intermediates(x, intermediates_only=True)] == [
            tuple(side // stride for side in size) for stride in (4, 8, 16, 32)
        ]
        features = timm.create_model(name, img_size=size, features_only=True, **small)(x)
        assert [f.shape[1] for f in features] == list(small["embed_dims"])
    frozen = timm.create_model(name, **small).requires_grad_(False)
    frozen.set_input_size(64)
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(ValueError, match="the stride of the stages is 32; it cannot be 16"):
        frozen.set_input_size(patch_size=16)


def test_v1_without_attention():
    """Tokens in any case, and what attends only at the end."""
    model = scattered(timm.create_model("efficientformer_nas", **{**SMALL_V1, "num_vit": 0}, img_size=64))
    assert model.forward_features(torch.randn(2, 3, 64, 64)).shape == (2, 4, 20)
    assert "stages.3.blocks.2.mlp.norm1.weight" in model.state_dict()
    some = timm.create_model("efficientformer_nas", **SMALL_V1, device="meta").stages[-1].blocks
    assert [type(b).__name__ for b in some] == ["MetaBlock2d", "Flat", "MetaBlock1d", "MetaBlock1d"]


def test_v2_attention_of_each_stage():
    model = timm.create_model("efficientformerv2_nas", **{**SMALL_V2, "num_vit": [0, 2]}, device="meta")
    assert [[b.token_mixer is not None for b in s.blocks] for s in model.stages] == [
        *([False], [False]),
        *([False, False], [True, True]),
    ]
    assert model.stages[3].downsample.attn is not None and model.stages[2].downsample.attn is None
    x = torch.randn(2, 3, 64, 64)
    model = scattered(timm.create_model("efficientformerv2_nas", **{**SMALL_V2, "num_vit": [0, 2]}, img_size=64))
    assert model(x).isfinite().all()
    assert {m.mlp.fc1.conv.out_channels for m in model.stages[2].blocks} == {16, 32}


@BOTH
def test_features_hold_no_more_maps_than_needed(name, small):
    """timm's own forward, which runs whole stages, gives the same."""
    model, x = scattered(timm.create_model(name, img_size=64, **small)), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert_close(model.forward_features(x), model.norm(model.stages(model.stem(x))), rtol=0, atol=0)


# -- the authors' checkpoints -----------------------------------------------------------------------------------------

# as in their files, for depths 1, 1, 2, 2 with one block that attends in each of the last two stages
RELEASED_V2 = {
    "patch_embed.0.weight": "stem.conv1.conv.weight",
    "patch_embed.1.running_mean": "stem.conv1.bn.running_mean",
    "patch_embed.3.bias": "stem.conv2.conv.bias",
    "patch_embed.4.num_batches_tracked": "stem.conv2.bn.num_batches_tracked",
    "network.0.0.mlp.fc1.weight": "stages.0.blocks.0.mlp.fc1.conv.weight",
    "network.0.0.mlp.norm1.weight": "stages.0.blocks.0.mlp.fc1.bn.weight",
    "network.0.0.mlp.mid.bias": "stages.0.blocks.0.mlp.mid.conv.bias",
    "network.0.0.mlp.mid_norm.running_var": "stages.0.blocks.0.mlp.mid.bn.running_var",
    "network.0.0.mlp.fc2.weight": "stages.0.blocks.0.mlp.fc2.conv.weight",
    "network.0.0.mlp.norm2.bias": "stages.0.blocks.0.mlp.fc2.bn.bias",
    "network.0.0.layer_scale_2": "stages.0.blocks.0.ls2.gamma",
    "network.1.proj.weight": "stages.1.downsample.conv.conv.weight",
    "network.1.norm.weight": "stages.1.downsample.conv.bn.weight",
    "network.3.proj.bias": "stages.2.downsample.conv.conv.bias",
    "network.4.1.layer_scale_1": "stages.2.blocks.1.ls1.gamma",
    "network.4.1.token_mixer.attention_biases": "stages.2.blocks.1.token_mixer.attention_biases",
    "network.4.1.token_mixer.stride_conv.0.weight": "stages.2.blocks.1.token_mixer.stride_conv.conv.weight",
    "network.4.1.token_mixer.stride_conv.1.bias": "stages.2.blocks.1.token_mixer.stride_conv.bn.bias",
    "network.4.1.token_mixer.q.0.weight": "stages.2.blocks.1.token_mixer.q.conv.weight",
    "network.4.1.token_mixer.k.1.weight": "stages.2.blocks.1.token_mixer.k.bn.weight",
    "network.4.1.token_mixer.v_local.0.bias": "stages.2.blocks.1.token_mixer.v_local.conv.bias",
    "network.4.1.token_mixer.talking_head1.weight": "stages.2.blocks.1.token_mixer.talking_head1.weight",
    "network.4.1.token_mixer.proj.1.weight": "stages.2.blocks.1.token_mixer.proj.conv.weight",
    "network.4.1.token_mixer.proj.2.running_mean": "stages.2.blocks.1.token_mixer.proj.bn.running_mean",
    "network.5.conv.weight": "stages.3.downsample.conv.conv.weight",
    "network.5.bn.bias": "stages.3.downsample.conv.bn.bias",
    "network.5.attn.q.local.0.weight": "stages.3.downsample.attn.q.local.weight",
    "network.5.attn.q.proj.0.bias": "stages.3.downsample.attn.q.proj.conv.bias",
    "network.5.attn.q.proj.1.weight": "stages.3.downsample.attn.q.proj.bn.weight",
    "network.5.attn.v.0.weight": "stages.3.downsample.attn.v.conv.weight",
    "network.5.attn.proj.2.weight": "stages.3.downsample.attn.proj.bn.weight",
    "network.6.1.token_mixer.v.1.bias": "stages.3.blocks.1.token_mixer.v.bn.bias",
    "norm.running_var": "norm.running_var",
    "head.weight": "head.weight",
    "dist_head.bias": "head_dist.bias",
}


def as_released(net):
    """A network's weights under the authors' names, layer scales as maps of one pixel, with tables of indices."""
    out = {}
    pairs = {"stem.conv1.conv": "patch_embed.0", "stem.conv1.bn": "patch_embed.1", "stem.conv2.conv": "patch_embed.3"}
    pairs |= {"stem.conv2.bn": "patch_embed.4", "head_dist": "dist_head"}
    for key, value in net.state_dict().items():
        for ours, theirs in pairs.items():
            key = re.sub(rf"^{ours}\.", f"{theirs}.", key)
        if m := re.match(r"stages\.(\d)\.(downsample|blocks)\.(.*)", key):
            stage, kind, rest = int(m[1]), m[2], m[3]
            between = kind == "downsample"
            if between and stage < 3:
                rest = rest.replace("conv.conv.", "proj.").replace("conv.bn.", "norm.")
            elif between:
                rest = re.sub(r"^conv\.(conv|bn)\.", r"\1.", rest).replace("q.local.", "q.local.0.")
            for i, name in ((1, "fc1"), (2, "fc2")):
                rest = rest.replace(f"mlp.{name}.conv.", f"mlp.{name}.").replace(f"mlp.{name}.bn.", f"mlp.norm{i}.")
            rest = rest.replace("mlp.mid.conv.", "mlp.mid.").replace("mlp.mid.bn.", "mlp.mid_norm.")
            rest = re.sub(r"(token_mixer|attn)\.proj\.conv\.", r"\1.proj.1.", rest)
            rest = re.sub(r"(token_mixer|attn)\.proj\.bn\.", r"\1.proj.2.", rest)
            rest = re.sub(r"(q\.proj|q|k|v|v_local|stride_conv)\.conv\.", r"\1.0.", rest)
            rest = re.sub(r"(q\.proj|q|k|v|v_local|stride_conv)\.bn\.", r"\1.1.", rest)
            rest = re.sub(r"ls([12])\.gamma", r"layer_scale_\1", rest)
            value = value[:, None, None] if "layer_scale" in rest else value
            key = f"network.{2 * stage - between}.{rest}"
        out[key] = value
        if key.endswith("attention_biases"):
            out[key.replace("attention_biases", "attention_bias_idxs")] = torch.zeros(1, 1, dtype=torch.int64)
    return out


def test_released_v2_weights(tmp_path):
    net = scattered(timm.create_model("efficientformerv2_nas", img_size=64, **SMALL_V2))
    released, own = as_released(net), net.state_dict()
    assert all(released[theirs].flatten().equal(own[ours].flatten()) for theirs, ours in RELEASED_V2.items())
    torch.save({"model": released, "epoch": 300}, tmp_path / "eformer.pth")
    overlay = dict(file=str(tmp_path / "eformer.pth"), input_size=(3, 64, 64))
    again = timm.create_model("efficientformerv2_nas", True, overlay, img_size=64, **SMALL_V2)
    assert again.state_dict().keys() == own.keys()
    assert all(v.equal(own[k]) for k, v in again.state_dict().items())
    # at another size the tables are resampled
    wide = timm.create_model("efficientformerv2_nas", True, overlay, img_size=(64, 96), **SMALL_V2).eval()
    net.set_input_size((64, 96))
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        assert_close(wide(x), net(x), rtol=0, atol=0)


def test_released_v1_weights(tmp_path):
    net = scattered(timm.create_model("efficientformer_nas", img_size=64, **SMALL_V1))
    own, released = net.state_dict(), {}
    for key, value in own.items():
        for i, name in enumerate(("conv1", "norm1", None, "conv2", "norm2")):
            key = key.replace(f"stem.{name}.", f"patch_embed.{i}.")
        if m := re.match(r"stages\.(\d)\.(blocks|downsample)\.(.*)", key):
            rest = m[3].replace("conv.", "proj.") if m[2] == "downsample" else m[3]
            key = f"network.{2 * int(m[1]) - (m[2] == 'downsample')}.{rest}"
        released[re.sub(r"ls(\d)\.gamma", r"layer_scale_\1", key).replace("head_dist", "dist_head")] = value
    assert {"network.3.proj.weight", "network.3.norm.bias", "network.6.3.token_mixer.qkv.weight"} <= released.keys()
    torch.save({"model": released}, tmp_path / "eformer.pth")
    overlay = dict(file=str(tmp_path / "eformer.pth"), input_size=(3, 64, 64))
    again = timm.create_model("efficientformer_nas", True, overlay, img_size=64, **SMALL_V1)
    assert all(v.equal(own[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("efficientformer_nas", dict(img_size=72), "img_size must be one or two positive multiples of 32, got 72"),
        ("efficientformer_nas", dict(depths=(1, 2, 3)), "depths must be 4 numbers of 1 to 64 blocks, or lists"),
        ("efficientformer_nas", dict(depths=(1, 0, 3, 1)), "got 0 in stage 1"),
        ("efficientformer_nas", dict(depths=(1, 1, [0, 0], 1)), r"got \[0, 0\] in stage 2"),
        ("efficientformer_nas", dict(depths=(1, 1, [1, 2], 1)), r"got \[1, 2\] in stage 2"),
        ("efficientformer_nas", dict(depths=(1, 1, 1, 65)), "got 65 in stage 3"),
        ("efficientformer_nas", dict(num_vit=4), "an integer from 0 to the 3 blocks of the last stage, got 4"),
        ("efficientformer_nas", dict(embed_dims=(8, 12, 16)), "embed_dims must be 4 integers"),
        ("efficientformer_nas", dict(embed_dims=(7, 12, 16, 20)), "the first of them even; got"),
        ("efficientformer_nas", dict(mlp_ratios=0), "an MLP ratio must be a number above 0 and up to 64, got 0"),
        ("efficientformerv2_nas", dict(img_size=(64, 0)), "positive multiples of 32"),
        ("efficientformerv2_nas", dict(num_vit=[1, 3]), "from 0 to the 2 blocks of stage 3, got 3"),
        ("efficientformerv2_nas", dict(num_vit=[1, 2, 1]), "one for each of the stages 2 and 3"),
        ("efficientformerv2_nas", dict(mlp_ratios=(4, 4, 4)), "mlp_ratios must be a number or have 4 entries"),
        ("efficientformerv2_nas", dict(mlp_ratios=(4, 4, (4, 3, 2), 4)), "stage 2 has 2 blocks and 3 mlp_ratios"),
        ("efficientformerv2_nas", dict(mlp_ratios=(4, 4, (4, -1), 4)), "up to 64, got -1"),
    ],
)
def test_bad_arguments(name, change, message):
    small = SMALL_V1 if name == "efficientformer_nas" else SMALL_V2
    with pytest.raises(ArchError, match=message):
        timm.create_model(name, **{**small, **change})
