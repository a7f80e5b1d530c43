"""What is particular to the ViT-ResNAS family; what every timm model must do is in test_models.py."""

import json
import logging

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close

from timm_resnas.models.network_def import NetworkDef
from timm_resnas.models.vit_resnas import SpatialReduction, checkpoint_filter_fn

pytestmark = pytest.mark.oldest

SMALL = ((4, 16), (1, (16, 2, 8), (16, 24), 1), (3, 16, 24), (1, (24, 3, 8), (24, 40), 1), (2, 24, 5))


def build(network_def=SMALL, img_size=32, patch_size=4, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_resnas", network_def=network_def, img_size=img_size, patch_size=patch_size, **kwargs
    ).eval()


def read_golden(path):
    with safe_open(path, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
        meta = json.loads(f.metadata()["meta"])
    state = {k.removeprefix("state_dict/"): v for k, v in tensors.items() if k.startswith("state_dict/")}
    return tensors, state, meta


@pytest.fixture(params="abcd")
def released(request, golden):
    tensors, state, meta = read_golden(golden(f"vit_resnas_{request.param}"))
    net = timm.create_model(
        "vit_resnas",
        network_def=meta["network_def"],
        img_size=meta["img_size"],
        distill_token=meta["distill_token"],
        patch_head=meta["patch_output"],
    ).eval()
    return net, tensors, state, meta


@torch.no_grad()
def test_released_outputs(released):
    net, tensors, state, meta = released
    assert sum(p.numel() for p in net.parameters()) == meta["n_params"]
    net.load_state_dict(checkpoint_filter_fn(state, net))
    logits = tensors["logits"]
    if meta["distill_token"]:
        logits = (logits + tensors["logits_dist"]) / 2
    assert_close(net(tensors["input"]), logits, atol=1e-4, rtol=0)
    features = net.forward_features(tensors["input"])
    assert_close(features[:, : net.num_prefix_tokens], tensors["token_features"], atol=1e-4, rtol=0)

    if "patch_embed_out" in tensors:
        first = slice(1), slice(8)  # what is kept: tokens of the first image
        assert_close(net.patch_embed(tensors["input"])[first], tensors["patch_embed_out"], atol=1e-4, rtol=0)
        outputs = []
        hooks = [block.register_forward_hook(lambda *call: outputs.append(call[-1])) for block in net.blocks]
        net.forward_features(tensors["input"])
        for i, (hook, x) in enumerate(zip(hooks, outputs, strict=True)):
            hook.remove()
            assert_close(x[first], tensors[f"block_out/{i}"], atol=1e-4, rtol=0)

    if meta["distill_token"]:
        net.train().set_distilled_training()
        cls, dist = net(tensors["input"])  # conv stem in train mode: batch statistics, so only the forms are compared
        assert cls.shape == dist.shape == logits.shape


@torch.no_grad()
def test_released_training_outputs(released):
    net, tensors, state, _ = released
    if "train/cls_logits" not in tensors:
        with pytest.raises(ValueError, match="patch_head=True"):
            net.set_token_labeling()
        return
    net.load_state_dict(checkpoint_filter_fn(state, net))
    net.train().set_token_labeling()
    cls, patch = net(tensors["input"])
    assert_close(cls, tensors["train/cls_logits"], atol=1e-4, rtol=0)
    assert_close(patch, tensors["train/patch_logits"], atol=1e-4, rtol=0)


def test_released_file_through_create_model(released, tmp_path):
    """The file as the authors wrap it, loaded the way a user would; with and without absent blocks and patch head."""
    net, tensors, state, meta = released
    net.load_state_dict(checkpoint_filter_fn(state, net))
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {}, "model_ema": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    arch = NetworkDef.from_network_def(meta["network_def"])
    other = timm.create_model(
        "vit_resnas",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path), num_classes=meta["num_classes"]),
        network_def=arch.canonical().to_network_def(),
        img_size=meta["img_size"],
        distill_token=meta["distill_token"],
    ).eval()
    with torch.no_grad():
        assert_close(other(tensors["input"]), net(tensors["input"]), atol=1e-6, rtol=0)


def test_checkpoint_of_another_architecture_is_refused():
    net, other = build(), build(SMALL[:1] + SMALL[1:2] * 2 + SMALL[2:])
    with pytest.raises(ValueError, match="has 4 blocks and reductions, the model 3"):
        checkpoint_filter_fn(other.state_dict(), net)
    with pytest.raises(RuntimeError, match=r"norm\.bias"):
        state = net.state_dict()
        del state["norm.bias"]
        net.load_state_dict(checkpoint_filter_fn(state, net))


def test_native_checkpoint_passes_unchanged():
    net = build(patch_head=True)
    state = net.state_dict()
    out = checkpoint_filter_fn(state, net)
    assert list(out) == list(state) and all(out[k] is state[k] for k in state)


@pytest.mark.parametrize("kwargs", [{}, {"distill_token": True}])
def test_checkpoint_at_another_size_is_resampled(kwargs, tmp_path):
    """Equal to building at the first size and calling set_input_size."""
    small = build(img_size=(32, 48), **kwargs)
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    small.set_input_size((48, 56))
    large = build(img_size=(48, 56), **kwargs)
    large.pretrained_model_args = {"img_size": [32, 48]}  # what timm records for hub and local-dir sources
    state = timm.models.load_state_dict(str(tmp_path / "w.safetensors"))
    large.load_state_dict(checkpoint_filter_fn(state, large))
    x = torch.randn(2, 3, 48, 56)
    with torch.no_grad():
        assert_close(large(x), small(x), rtol=0, atol=0)
    reduction = next(b for b in large.blocks if isinstance(b, SpatialReduction))
    assert reduction.pos_embed.shape[1] == 6 * 7 and large.pos_embed.shape[1] == 12 * 14 + large.num_prefix_tokens


def saved(model, folder, **kwargs):
    """The model from a folder, with other arguments."""
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),  # num_classes follows network_def
        dict(network_def=(*SMALL[:-1], (2, 24, 0))),
        dict(num_classes=1000),
        dict(num_classes=0),
        dict(distill_token=True),
        dict(patch_head=True, global_pool="avg"),
        dict(global_pool=""),
        dict(dynamic_img_size=True),
    ],
)
def test_what_is_saved_is_what_loads(kwargs, classes, tmp_path):
    model, x = build(**kwargs), torch.randn(2, 3, 32, 32)
    if classes is not None:
        model.reset_classifier(classes)
    loaded = saved(model, tmp_path)
    with torch.no_grad():
        assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert loaded.global_pool == model.global_pool and loaded.num_classes == model.num_classes


@pytest.mark.parametrize("old", [(32, 48), (16, 64), (64, 64)])
@pytest.mark.parametrize("new", [(64, 64), (48, 32), (64, 16), (32, 32)])
def test_rectangles_load_at_any_size(old, new, tmp_path):
    """As `set_input_size` would give; among them sizes with as many patches in another shape."""
    model = build(img_size=old)
    loaded = saved(model, tmp_path, img_size=new)
    model.set_input_size(new)
    x = torch.randn(1, 3, *new)
    with torch.no_grad():
        assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_grid_of_a_bare_checkpoint():
    state = build(img_size=(32, 64)).state_dict()
    for size in ((32, 64), (64, 32), (32, 32)):
        with pytest.raises(ValueError, match="128 positions, and nothing says in what height and width"):
            checkpoint_filter_fn(state, build(img_size=size))
    with pytest.raises(ValueError, match="grid of 7x7, which 1 reductions cannot halve"):
        checkpoint_filter_fn({**state, "pos_embed": torch.zeros(1, 50, 16)}, build())
    model = build(img_size=(64, 32))
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 32, 64))
    model.load_state_dict(checkpoint_filter_fn(state, model))
    other = build(img_size=(32, 64))
    other.load_state_dict(state)
    other.set_input_size((64, 32))
    assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_input_size_that_does_not_change():
    model, x = build(img_size=(32, 48)), torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected, pos_embed = model(x), model.pos_embed
        for size in (dict(), dict(img_size=None, patch_size=None), dict(patch_size=4), dict(img_size=[32, 48])):
            model.set_input_size(**size)
            assert torch.equal(model(x), expected)
    assert model.pos_embed is pos_embed and model._model_args["img_size"] == (32, 48)
    with pytest.raises(ValueError, match="patch_size 8: the network is built for 4"):
        model.set_input_size(patch_size=8)


@pytest.mark.parametrize("kwargs", [dict(img_size=(32, 48)), dict(distill_token=True), dict(patch_head=True)])
@pytest.mark.parametrize("size", [(32, 48), (48, 32), (64, 24), (8, 8)])
def test_dynamic_image_size_is_set_input_size(kwargs, size):
    dynamic, fixed = build(dynamic_img_size=True, **kwargs), build(**kwargs)
    fixed.load_state_dict(dynamic.state_dict())
    with pytest.raises(AssertionError, match="width must be a multiple of 8"):
        dynamic(torch.randn(1, 3, 32, 36))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        fixed.set_input_size(size)
        assert_close(dynamic(x), fixed(x), rtol=0, atol=0)
        maps = (m.forward_intermediates(x, intermediates_only=True) for m in (dynamic, fixed))
        assert_close(*maps, rtol=0, atol=0)
        dynamic.set_grad_checkpointing()
    assert_close(dynamic(x), fixed(x))
    dynamic.set_input_size(size)  # and both together
    assert_close(dynamic(x), fixed(x))


def test_resampling_is_plain_bicubic():
    net = build(img_size=32)
    grid = net.pos_embed[:, 1:].detach().reshape(1, 8, 8, 16).permute(0, 3, 1, 2).clone()
    token = net.pos_embed[:, :1].detach().clone()
    net.set_input_size(40)
    expected = torch.nn.functional.interpolate(grid, size=(10, 10), mode="bicubic", align_corners=False)
    assert_close(net.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))
    assert_close(net.pos_embed[:, :1], token)
    assert net(torch.randn(1, 3, 40, 40)).shape == (1, 5)
    with pytest.raises(AssertionError, match="height does not match the model's 40"):
        net(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("first", [(0, 16), (4, 16), (5, 16, 6)])
@pytest.mark.parametrize("patch_size", [4, 6])
def test_patch_embeddings_and_non_square_images(first, patch_size):
    net = build((first, *SMALL[1:]), img_size=(4 * patch_size, 6 * patch_size), patch_size=patch_size, in_chans=1)
    assert net.patch_embed(torch.randn(2, 1, 4 * patch_size, 6 * patch_size)).shape == (2, 24, 16)
    assert net(torch.randn(2, 1, 4 * patch_size, 6 * patch_size)).shape == (2, 5)


def test_absent_block_is_a_bypass_that_keeps_indices():
    absent = (1, (16, 1, 8), (16, 8), 0)
    with_gap = build((SMALL[0], absent, *SMALL[1:]))
    plain = build()
    assert {k.split(".")[1] for k in with_gap.state_dict() if k.startswith("blocks.")} == {"1", "2", "3"}
    plain.load_state_dict(checkpoint_filter_fn(with_gap.state_dict(), plain))
    x = torch.randn(2, 3, 32, 32)
    assert_close(plain(x), with_gap(x), rtol=0, atol=0)
    back = checkpoint_filter_fn(plain.state_dict(), with_gap)
    assert list(back) == list(with_gap.state_dict())


@pytest.mark.parametrize("slots, expected", [("present", [0.0, 0.1, 0.2]), ("all", [0.0, 0.2 / 3, 0.2])])
def test_drop_path_rates(slots, expected):
    block, absent = SMALL[1], (*SMALL[1][:3], 0)
    net = build((SMALL[0], block, block, absent, *SMALL[2:]), drop_path_rate=0.2, drop_path_slots=slots)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in net.blocks if hasattr(b, "drop_path1")]
    assert rates == pytest.approx(expected)


def test_num_classes_comes_from_the_network_def_unless_given():
    assert build().num_classes == 5 and build().head.out_features == 5
    assert build(num_classes=7).head.out_features == 7


def test_heads_have_the_last_width():
    net = build(distill_token=True)
    net.reset_classifier(9)
    assert net.head.weight.shape == net.head_dist.weight.shape == (9, 24)
    assert net.get_classifier() == (net.head, net.head_dist)


def test_distilled_net_averages_its_heads_in_eval_only():
    net = build(distill_token=True)
    x = torch.randn(2, 3, 32, 32)
    mean = net(x)
    features = net.forward_features(x)
    assert_close(mean, (net.head(features[:, 0]) + net.head_dist(features[:, 1])) / 2)
    net.train().set_distilled_training()
    assert isinstance(net(x), tuple)
    net.set_distilled_training(False)
    assert net(x).shape == (2, 5)


def test_exclusive_arguments():
    with pytest.raises(ValueError, match="exclude each other"):
        build(distill_token=True, patch_head=True)
    with pytest.raises(ValueError, match="global_pool must be 'token'"):
        build(distill_token=True, global_pool="avg")
    with pytest.raises(ValueError, match="JSON-plain"):
        build(NetworkDef.from_network_def(SMALL))
    with pytest.raises(ValueError, match="two heads"):
        build().set_distilled_training()


def test_dropout_rates_reach_their_layers():
    net = build(drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4)
    block = net.blocks[0]
    rates = [net.head_drop.p, net.pos_drop.p, block.attn.proj_drop.p, block.mlp.drop1.p, block.attn.attn_drop.p]
    assert rates == [0.1, 0.2, 0.3, 0.3, 0.4]


def test_patch_head_is_left_out_or_kept_as_the_model_has_it(caplog):
    with_head, without = build(patch_head=True), build()
    assert "patch_head.weight" not in checkpoint_filter_fn(with_head.state_dict(), without)
    with caplog.at_level(logging.WARNING):
        with_head.load_state_dict(checkpoint_filter_fn(without.state_dict(), with_head))
