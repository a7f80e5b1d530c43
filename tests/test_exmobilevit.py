"""ExMobileViT: the released numbers on the released body, timm's MobileViT underneath ours, any image size."""

import pytest
import safetensors.torch
import timm
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from timm_resnas.models.exmobilevit import checkpoint_filter_fn

SMALL = dict(body="mobilevit_xxs", num_classes=5)


@pytest.fixture(scope="module")
def released(golden):
    tensors = safetensors.torch.load_file(golden("exmobilevit_a"))
    return tensors, {k.removeprefix("state_dict/"): v for k, v in tensors.items() if k.startswith("state_dict/")}


def small(**kwargs):
    """A network with no batch norm statistics left at 0 or 1, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model("exmobilevit_928", **{**SMALL, **kwargs})
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bn.weight", "running_var")):
                value.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                value.normal_(std=0.1)
    return model.eval()


def count(name, **kwargs):
    # on meta: before torch 2.15 the counter does not know the CPU's fused attention
    model = timm.create_model(name, device="meta", **kwargs).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 256, 256, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def test_logits_of_the_released_code(released):
    tensors, state_dict = released
    model = timm.create_model("exmobilevit_928", body="paper", num_classes=10).eval()
    wrapped = {"state_dict": {f"model.{k}": v for k, v in state_dict.items()}}  # as Lightning saves
    model.load_state_dict(checkpoint_filter_fn(wrapped, model))
    with torch.no_grad():
        logits = model(tensors["input"])
    assert_close(logits, tensors["logits"], rtol=0, atol=1e-4)
    assert (logits - tensors["logits_orig_pool"]).abs().max() > 0.1  # the released windows miss part of the maps


def test_released_checkpoint_through_create_model(released, tmp_path):
    tensors, state_dict = released
    safetensors.torch.save_file(state_dict, tmp_path / "ex.safetensors")
    overlay = dict(file=str(tmp_path / "ex.safetensors"), num_classes=10)
    model = timm.create_model("exmobilevit_928", body="paper", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        assert_close(model(tensors["input"]), tensors["logits"], rtol=0, atol=1e-4)


# counted on the released code; its classifier has no bias
@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("exmobilevit_928", 5_958_064, 1_778_198_784),
        ("exmobilevit_640", 5_630_576, 1_765_786_624),
        ("exmobilevit_576", 5_558_256, 1_763_625_472),
    ],
)
def test_size_of_the_released_body(name, params, macs):
    assert count(name, body="paper") == (params + 1000, macs)


@pytest.mark.parametrize(
    ("name", "params"),
    [("exmobilevit_928", 5_899_976), ("exmobilevit_640", 5_572_488), ("exmobilevit_576", 5_500_168)],
)
def test_size_on_timm_s_body(name, params):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params
    assert model.num_features == model.head_hidden_size == int(name[-3:])


@pytest.mark.parametrize("body", ["mobilevit_s", "mobilevit_xs", "mobilevit_xxs"])
def test_without_shortcuts_it_is_timm_s_mobilevit(body):
    torch.manual_seed(0)
    theirs = timm.create_model(body, num_classes=5).eval()
    width = theirs.num_features
    ours = timm.create_model("exmobilevit_928", body=body, widths=(0, 0, width), num_classes=5).eval()
    state_dict = {k.replace("final_conv", "shortcuts.2"): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state_dict)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_features_are_the_paper_s_vector():
    """The global average of the one map is the concatenation of the pooled, projected taps."""
    model = small(widths=(8, 16, 24))
    taps = {}
    for i in (2, 3, 4):
        model.stages[i].register_forward_hook(lambda m, args, out, i=i: taps.update({i: out}))
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = [model.shortcuts[i](taps[i + 2]).mean((2, 3)) for i in range(3)]
        assert [t.shape[-1] for t in taps.values()] == [12, 6, 3]
        assert features.shape == (2, 48, 3, 3)
        assert_close(features.mean((2, 3)), torch.cat(pooled, 1))
        assert_close(model(x), model.head.fc(torch.cat(pooled, 1)))


@pytest.mark.parametrize(
    ("body", "sizes"), [("mobilevit_xxs", (160, 192, 224, 256, 288, 320)), ("paper", (160, 224, 320))]
)
def test_any_image_size_and_multi_scale_training(body, sizes):
    model = small(body=body)
    with torch.no_grad():
        for size in sizes:
            assert model(torch.randn(1, 3, size, size)).isfinite().all()
        assert model(torch.randn(1, 3, 100, 150)).shape == (1, 5)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for size in (64, 96, 128):
        optimizer.zero_grad()
        model(torch.randn(2, 3, size, size)).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()


def test_ratio_and_widths():
    assert timm.create_model("exmobilevit_928", device="meta").widths == [128, 160, 640]
    model = timm.create_model("exmobilevit_928", device="meta", body="mobilevit_xs")
    assert model.widths == [88, 104, 384]  # 64, 80, 96 x (4/3, 5/4, 4) to multiples of 8
    model = timm.create_model("exmobilevit_576", device="meta", shortcut_ratio=[1, 0, 4])
    assert model.widths == [96, 0, 640]
    assert model.forward_features(torch.zeros(1, 3, 64, 64, device="meta")).shape == (1, 736, 2, 2)


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(widths=(8, 16, 24), global_pool="max"),
        dict(shortcut_ratio=[1, 0, 4]),  # displaces the widths of the name
        dict(num_classes=0, se=True),
        dict(stem_stride=1, output_stride=16),
        dict(body="paper"),
    ],
)
def test_what_is_saved_is_what_loads(kwargs, classes, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("exmobilevit_576", **{**SMALL, **kwargs}).eval()
    if classes is not None:
        model.reset_classifier(classes)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded, x = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_squeeze_and_excitation_variant():
    plain, se = (timm.create_model("exmobilevit_928", device="meta", se=se) for se in (False, True))
    extra = 0
    for stage in plain.stages:
        for block in stage:
            if hasattr(block, "conv2_kxk"):
                channels = block.conv2_kxk.conv.out_channels
                reduced = timm.layers.make_divisible(channels / 8, 8, round_limit=0.0)
                extra += 2 * channels * reduced + channels + reduced
    assert sum(p.numel() for p in se.parameters()) - sum(p.numel() for p in plain.parameters()) == extra
    assert small(se=True)(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_small_images():
    model = small(stem_stride=1, output_stride=16)
    assert [info["reduction"] for info in model.feature_info] == [1, 2, 4, 8, 8]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert [f.shape[-1] for f in model.forward_intermediates(x)[1]] == [32, 16, 8, 4, 4]
        assert model(x).shape == (2, 5)


def test_saved_and_loaded(tmp_path):
    model, x = small(widths=(8, 16, 24), se=True), torch.randn(1, 3, 64, 64)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(body="mobilevit_m"), "body='mobilevit_m'"),
        (dict(widths=(1, 2)), "three numbers"),
        (dict(widths=(8, 8, 0)), "three numbers"),
        (dict(widths=(8, 8, 8), shortcut_ratio=(1, 1, 1)), "not both"),
        (dict(stem_stride=4), "1 or 2"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("exmobilevit_928", device="meta", **kwargs)
