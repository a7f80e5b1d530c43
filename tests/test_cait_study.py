"""CaiT: the paper's missing models and its design study, against the released numbers and timm's own class."""

import math

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import Attention
from timm.models import cait
from torch.testing import assert_close

from timm_resnas.models.cait_study import checkpoint_filter_fn, layer_scale_init
from timm_resnas.nas.count import count_macs

# name, depth, width, heads, size, parameters, MACs: counted on the original class
TABLE = [
    ("cait_xs24_224", 24, 288, 6, 224, 26_560_648, 5_390_354_304),
    ("cait_xs36_224", 36, 288, 6, 224, 38_557_432, 8_030_088_576),
    ("cait_xs36_384", 36, 288, 6, 384, 38_666_872, 28_700_240_256),
    ("cait_s36_224", 36, 384, 8, 224, 68_220_712, 13_902_174_720),
    ("cait_s48_224", 48, 384, 8, 224, 89_525_224, 18_477_021_696),
    ("cait_s48_384", 48, 384, 8, 384, 89_671_144, 63_705_801_216),
    ("cait_m24_224", 24, 768, 16, 224, 185_850_088, 35_776_164_864),
    ("cait_m24_384", 24, 768, 16, 384, 186_141_928, 115_867_567_104),
    ("cait_m36_224", 36, 768, 16, 224, 270_929_512, 53_367_469_056),
]
SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=4, num_classes=5)


def small(**kwargs):
    """A small study model with no parameter left at 0 or 1, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model("cait_study", **{**SMALL, **kwargs})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def count(name, size, **kwargs):
    model = timm.create_model(name, device="meta", **kwargs)
    return dict(macs=count_macs(model, (3, size, size)), params=sum(p.numel() for p in model.parameters()))


def test_logits_of_the_released_code(golden):
    tensors = safetensors.torch.load_file(golden("cait_a"))
    released = {f"module.{k.removeprefix('state_dict/')}": v for k, v in tensors.items() if "state_dict/" in k}
    args = dict(img_size=64, embed_dim=48, depth=3, num_heads=4, num_classes=10)
    for name in ("cait_study", "cait_xs24_224"):
        model = timm.create_model(name, **args).eval()
        model.load_state_dict(checkpoint_filter_fn({"model": released}, model))
        with torch.no_grad():
            assert_close(model(tensors["input"]), tensors["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "depth", "width", "heads", "size", "params", "macs"), TABLE)
def test_size_of_the_paper_s_models(name, depth, width, heads, size, params, macs):
    assert count(name, size) == dict(macs=macs, params=params)
    model = timm.create_model(name, device="meta")
    assert isinstance(model, cait.Cait)
    assert len(model.blocks) == depth and model.embed_dim == width and model.patch_embed.img_size == (size, size)
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert model.init_values == layer_scale_init(depth)


@pytest.mark.parametrize("name", ["cait_xxs24_224", "cait_s36_224"])
def test_with_the_paper_s_settings_it_is_timm_s_model(name):
    """timm's own XXS24 and our S36 on timm's class, fewer blocks for speed; bit for bit."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, img_size=64, depth=3, num_classes=5).eval()
    args = dict(img_size=64, embed_dim=theirs.embed_dim, depth=3, num_heads=theirs.blocks[0].attn.num_heads)
    ours = timm.create_model("cait_study", num_classes=5, **args).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(size=64)
    assert torch.equal(ours(x), theirs(x))
    for model in (ours, theirs):
        model.train()(x).square().sum().backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key


@pytest.mark.parametrize(("depth", "value"), [(12, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6), (48, 1e-6)])
def test_layer_scale_rule(depth, value):
    assert layer_scale_init(depth) == value
    model = timm.create_model("cait_study", embed_dim=16, depth=depth, num_heads=2, img_size=32)
    assert_close(model.blocks[0].gamma_1.detach(), torch.full((16,), value))
    assert_close(model.blocks_token_only[1].gamma_2.detach(), torch.full((16,), value))


@pytest.mark.parametrize(
    ("residual", "init", "shape"),
    [("layer_scale", 0.1, (48,)), ("rezero", 0.0, (1,)), ("skip_init", 12**-0.5, (1,)), ("fixup", 1.0, (1,))],
)
def test_residual_scales_at_the_start(residual, init, shape):
    model = timm.create_model("cait_study", residual=residual, **SMALL)  # 12 branches: 2 x (4 + 2)
    for block in [*model.blocks, *model.blocks_token_only]:
        assert block.gamma_1.shape == block.gamma_2.shape == shape
        assert_close(block.gamma_2.detach(), torch.full(shape, init))
    if residual in ("rezero", "fixup"):  # every branch starts at zero: the blocks are the identity
        tokens = torch.randn(1, 16, 48)
        assert torch.equal(model.blocks(tokens), tokens)
    if residual == "fixup":
        reference = timm.create_model("cait_study", residual="none", **{**SMALL, "embed_dim": 384, "num_heads": 8})
        fixup = timm.create_model("cait_study", residual="fixup", **{**SMALL, "embed_dim": 384, "num_heads": 8})
        for key in ("attn.qkv", "mlp.fc1"):
            a, b = (m.blocks[0].get_submodule(key).weight.std() for m in (fixup, reference))
            assert_close(a / b, torch.tensor(12**-0.5), rtol=0.02, atol=0)
        assert not model.head.weight.any()


@pytest.mark.parametrize("residual", ["layer_scale", "rezero", "skip_init", "fixup", "none"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_residual_arithmetic(residual, pre_norm):
    block = small(residual=residual, pre_norm=pre_norm).blocks[1]
    x = torch.randn(2, 16, 48)
    with torch.no_grad():
        norm1, norm2 = (block.norm1, block.norm2) if pre_norm else (lambda t: t, lambda t: t)
        g1, g2 = (1, 1) if residual == "none" else (block.gamma_1, block.gamma_2)
        y = x + g1 * block.attn(norm1(x))
        assert_close(block(x), y + g2 * block.mlp(norm2(y)))
    names = {name for name, _ in block.named_parameters()}
    assert ("gamma_1" in names) == (residual != "none")
    assert ("norm1.weight" in names) == pre_norm


def test_residual_weights_survive_to_empty():
    for residual in ("layer_scale", "skip_init", "fixup", "none"):
        model = timm.create_model("cait_study", residual=residual, device="meta", **SMALL).to_empty(device="cpu")
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(math.nan)
        model.init_weights()
        fresh = timm.create_model("cait_study", residual=residual, **SMALL)
        for (key, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True):
            assert p.isfinite().all()
            if p.numel() > 1000:
                assert p.std().item() == pytest.approx(q.std().item(), rel=0.15), key
            elif "gamma" in key or "norm" in key:
                assert torch.equal(p, q), key


def test_class_token_in_front_of_a_block():
    """At layer 0 the network is a ViT: all blocks over [class, patches]."""
    model, x = small(class_token_layer=0), images()
    with torch.no_grad():
        tokens = model.patch_embed(x) + model.pos_embed
        tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], 1)
        for block in model.blocks:
            tokens = block(tokens)
        assert_close(model(x), model.head(model.norm(tokens)[:, 0]))
        late = small(class_token_layer=3)
        features, maps = late.forward_intermediates(x)
        assert_close(features, late.forward_features(x))
        assert features.shape == (2, 17, 48) and {m.shape for m in maps} == {(2, 48, 4, 4)}
        # the first three blocks do not see the token
        late.cls_token += 1
        changed = late.forward_intermediates(x, intermediates_only=True)
        assert [torch.equal(a, b) for a, b in zip(maps, changed, strict=True)] == [True, True, True, False]


def test_pruning_keeps_a_token_that_blocks_attend_to():
    model, x = small(class_token_layer=1), images()
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        model.prune_intermediate_layers([2])
        assert_close(model.forward_intermediates(x, indices=[2], intermediates_only=True)[0], maps[2])
    assert model.cls_token is not None
    model = small(class_token_layer=3)
    model.prune_intermediate_layers([1])
    assert model.cls_token is None and model.forward_features(x).shape == (2, 16, 48)


def test_average_pooling_instead_of_a_class_token(tmp_path):
    model, x = small(class_token=False), images()
    assert not [n for n, _ in model.named_parameters() if n == "cls_token" or n.startswith("blocks_token_only")]
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 16, 48)
        assert_close(model(x), model.head(features.mean(1)))
    # weights of a network with a class token fit, less the token and its blocks
    model.load_state_dict(checkpoint_filter_fn(small().state_dict(), model))


def test_talking_heads_and_drop_path():
    plain = small(talking_heads=False, drop_path_rate=0.3, drop_path_mode="linear")
    assert type(plain.blocks[0].attn) is Attention
    assert [getattr(b.drop_path, "drop_prob", 0) for b in plain.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert {b.drop_path.drop_prob for b in small(drop_path_rate=0.3).blocks} == {0.3}
    # talking heads that do not mix are plain attention
    talking = small()
    with torch.no_grad():
        for block in talking.blocks:
            for mix in (block.attn.proj_l, block.attn.proj_w):
                mix.weight.copy_(torch.eye(4))
                mix.bias.zero_()
        plain.load_state_dict(
            {k: v for k, v in talking.state_dict().items() if "proj_l" not in k and "proj_w" not in k}
        )
        assert_close(plain(images()), talking(images()))


def test_image_size_can_change(tmp_path):
    model = small()
    larger = timm.create_model("cait_study", **{**SMALL, "img_size": 64})
    larger.load_state_dict(checkpoint_filter_fn(model.state_dict(), larger))
    model.set_input_size((64, 64))
    with torch.no_grad():
        logits = model(images(size=64))
        assert_close(larger.eval()(images(size=64)), logits)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(size=64)), logits)


def saved(model, folder, **kwargs):
    """The model from a folder, with other arguments."""
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(class_token=False),  # global_pool and depth_token_only follow
        dict(class_token=False, global_pool=""),
        dict(class_token_layer=2),
        dict(residual="rezero"),
        dict(residual="fixup", depth_token_only=1),
        dict(talking_heads=False, pre_norm=False),
        dict(global_pool="avg", num_classes=0),
        dict(dynamic_img_size=True),
    ],
)
def test_what_is_saved_is_what_loads(kwargs, classes, tmp_path):
    model = small(**kwargs)
    if classes is not None:
        model.reset_classifier(classes)
    loaded = saved(model, tmp_path)
    with torch.no_grad():
        assert_close(loaded(images()), model(images()), rtol=0, atol=0)
    assert loaded.global_pool == model.global_pool


@pytest.mark.parametrize("old", [(32, 48), (48, 32), (16, 64), (64, 64)])
@pytest.mark.parametrize("new", [(64, 64), (48, 32), (64, 16), (32, 32)])
def test_rectangles_load_at_any_size(old, new, tmp_path):
    """As `set_input_size` would give; among them sizes with as many patches in another shape."""
    model = small(img_size=old)
    loaded = saved(model, tmp_path, img_size=new)
    model.set_input_size(new)
    x = torch.randn(1, 3, *new)
    with torch.no_grad():
        assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_grid_of_a_bare_checkpoint(tmp_path, caplog):
    state = small(img_size=(32, 64)).state_dict()
    wide, tall = small(img_size=(32, 64)), small(img_size=(64, 32))
    for model in (wide, tall, small()):  # not a square, and nothing says which of 4x8, 8x4, 2x16
        with pytest.raises(ValueError, match="32 positions, and nothing says in what height and width"):
            checkpoint_filter_fn(state, model)
    safetensors.torch.save_file(state, tmp_path / "wide.safetensors")
    overlay = dict(file=str(tmp_path / "wide.safetensors"), input_size=(3, 32, 64), num_classes=5)
    loaded = timm.create_model(
        "cait_study", pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, "img_size": (64, 32)}
    ).eval()
    wide.set_input_size((64, 32))
    assert torch.equal(loaded.pos_embed, wide.pos_embed)
    # 16 patches: a square, unless the model's own 16 are none
    with pytest.raises(ValueError, match="16 positions, and nothing says"):
        checkpoint_filter_fn(small().state_dict(), small(img_size=(16, 64)))
    checkpoint_filter_fn(small().state_dict(), small())
    assert caplog.records == []
    checkpoint_filter_fn(small().state_dict(), wide)
    assert "its 16 positions are taken for 4x4" in caplog.text
    model = small()
    model.pretrained_model_args = dict(img_size=64)
    with pytest.raises(ValueError, match="img_size 64 means 8x8 positions, but its pos_embed has 16"):
        checkpoint_filter_fn(small().state_dict(), model)


def test_input_size_that_does_not_change():
    model, x = small(img_size=(32, 48)), torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected, pos_embed = model(x), model.pos_embed
        for size in (dict(), dict(img_size=None, patch_size=None), dict(patch_size=8), dict(img_size=[32, 48])):
            model.set_input_size(**size)
            assert torch.equal(model(x), expected)
    assert model.pos_embed is pos_embed and model._model_args["img_size"] == (32, 48)


def test_other_patch_size(tmp_path):
    """The patch embedding is resampled as timm's, and a saved model keeps it."""
    model = small()
    model.set_input_size(patch_size=4, img_size=(16, 24))
    assert {info["reduction"] for info in model.feature_info} == {4}
    x = torch.randn(1, 3, 16, 24)
    loaded = saved(model, tmp_path)
    with torch.no_grad():
        assert_close(loaded(x), model(x), rtol=0, atol=0)
        assert model.forward_intermediates(x, intermediates_only=True)[0].shape == (1, 48, 4, 6)


@pytest.mark.parametrize("name", ["cait_study", "cait_xs24_224"])
@pytest.mark.parametrize("size", [(32, 32), (16, 64), (40, 24), (64, 8)])
def test_dynamic_image_size_is_set_input_size(name, size):
    torch.manual_seed(0)
    args = {**SMALL, "depth": 3}
    dynamic, fixed = (
        timm.create_model(name, dynamic_img_size=True, **args).eval(),
        timm.create_model(name, **args).eval(),
    )
    fixed.load_state_dict(dynamic.state_dict())
    with pytest.raises(AssertionError, match="should be divisible by patch size"):
        dynamic(torch.randn(1, 3, 32, 36))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        fixed.set_input_size(size)
        assert_close(dynamic(x), fixed(x), rtol=0, atol=0)
        maps = (m.forward_intermediates(x, intermediates_only=True) for m in (dynamic, fixed))
        assert_close(*maps, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(residual="zero"), "residual='zero'"),
        (dict(drop_path_mode="cubic"), "drop_path_mode='cubic'"),
        (dict(class_token_layer=4), "0 to depth - 1 = 3"),
        (dict(class_token_layer=0, class_token=False), "class_token=True"),
        (dict(class_token_layer=0, depth_token_only=2), "depth_token_only=2"),
        (dict(depth_token_only=0), "depth_token_only=0"),
        (dict(class_token=False, global_pool="token"), "class_token=True"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("cait_study", **SMALL, **kwargs)
