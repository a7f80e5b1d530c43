"""UniNet: what the released code computes, what the paper counts, and the operators that were never released."""

import json

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn, set_scriptable
from timm.models._input import get_model_traits
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from timm_resnas.models.uninet import (
    ConvBlock,
    GlobalDownsample,
    LocalGlobalDownsample,
    TokenMlp,
    checkpoint_filter_fn,
)

# name, size, parameters in millions counted on the released code, GMACs (that count included norms)
TABLE = [
    ("uninet_b0", 160, 11.45, 0.555),
    ("uninet_b1", 224, 11.45, 1.12),
    ("uninet_b2", 256, 16.21, 2.16),
    ("uninet_b3", 288, 24.02, None),  # counting takes seconds
    ("uninet_b4", 320, 43.80, None),
    ("uninet_b5", 384, 72.88, None),
    ("uninet_b6", 448, 116.69, None),
]
MINI = dict(
    img_size=64,
    repeats=(1, 1, 1, 1, 2, 1),
    channels=(8, 12, 16, 24, 24, 32),
    stem_width=8,
    head_width=40,
    head_dim=8,
    num_classes=5,
)
UNRELEASED = dict(
    block_ops=("conv", "conv", "mlp", "attn", "mlp", "attn"),
    downsamples=("l", "g", "lg", "g", "g"),
)


def mini(**kwargs):
    """A small network with no parameter left at 0 or 1, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model("uninet", **{**MINI, **kwargs})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def images(size=64, batch=2):
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def macs(model, size):
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


class Golden:
    """Tensors of the released code, and the arguments of our model."""

    def __init__(self, path):
        with safetensors.safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
            self.tensors = {k: file.get_tensor(k) for k in file.keys()}
        self.released = {
            k.removeprefix("state_dict/"): v for k, v in self.tensors.items() if k.startswith("state_dict/")
        }
        names = dict(
            repeats="repeats",
            expansion="expansions",
            channels="channels",
            strides="strides",
            img_size="img_size",
            head_dim="head_dim",
            final_head_dim="head_width",
            init_values="init_values",
            stem_dim="stem_width",
            block_ops="block_ops",
            num_classes="num_classes",
        )
        self.args = {ours: config[theirs] for theirs, ours in names.items()}
        self.args["downsamples"] = [op.removesuffix("dsm") for op in config["ds_ops"]]

    def __getitem__(self, name):
        return self.tensors[name]


@pytest.mark.parametrize("fused", [True, False])
def test_outputs_of_the_released_code(golden, fused):
    case = Golden(golden("uninet_a"))
    set_fused_attn(fused)
    try:
        model = timm.create_model("uninet", **case.args).eval()
    finally:
        set_fused_attn(True)
    model.load_state_dict(checkpoint_filter_fn(case.released, model))
    with torch.no_grad():
        assert_close(model(case["input"]), case["logits"], rtol=0, atol=1e-5)
        features = model.forward_features(case["input"])
        assert_close(model.forward_head(features, pre_logits=True), case["pooled_features"], rtol=0, atol=1e-5)


def test_released_checkpoint_through_create_model(golden, tmp_path):
    case = Golden(golden("uninet_a"))
    torch.save({"model": {f"module.{k}": v for k, v in case.released.items()}}, tmp_path / "uninet.pth")
    overlay = dict(file=str(tmp_path / "uninet.pth"), num_classes=10)
    model = timm.create_model("uninet_b1", pretrained=True, pretrained_cfg_overlay=overlay, **case.args).eval()
    with torch.no_grad():
        assert_close(model(case["input"]), case["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "size", "params", "gmacs"), TABLE)
def test_size_of_the_paper_s_models(name, size, params, gmacs):
    model = timm.create_model(name, device="meta").eval()
    assert timm.get_pretrained_cfg(name).input_size == (3, size, size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, rel=1e-3)
    if gmacs:
        assert macs(model, size) / 1e9 == pytest.approx(gmacs, rel=0.025)


def test_taps():
    model = timm.create_model("uninet_b0", device="meta")
    assert [tap["reduction"] for tap in model.feature_info] == [2, 4, 8, 16, 16, 32]
    backbone = timm.create_model("uninet_b0", features_only=True, device="meta")
    assert backbone.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert backbone.feature_info.channels() == [24, 48, 80, 128, 256]


def test_conv_blocks_start_as_their_shortcuts():
    torch.manual_seed(0)
    model = timm.create_model("uninet", **MINI).eval()
    x = torch.randn(2, 16, 8, 8)
    block = model.stages[2].blocks[0]
    assert isinstance(block, ConvBlock)
    assert torch.equal(block(x), x)
    x = torch.randn(2, 8, 32, 32)
    first = ConvBlock(8, 12, 1, 1, nn.GELU, 0.0)
    assert isinstance(first.expand, nn.Identity)  # as many hidden channels as there are
    assert_close(first.shortcut(x), first.shortcut[1](F.max_pool2d(x, 3, 1, 1)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("size", "stride"), [((6, 6), 2), ((5, 8), 2), ((4, 3), 1)])
def test_local_global_downsampling_is_cross_attention(size, stride, fused):
    torch.manual_seed(0)
    module = LocalGlobalDownsample(12, 16, stride, 8, nn.LayerNorm).eval()
    module.fused_attn = fused
    reference = nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        # queries are not projected again
        reference.in_proj_weight.copy_(torch.eye(16).repeat(3, 1))
        reference.in_proj_bias.zero_()
        reference.out_proj.load_state_dict(module.proj.state_dict())
        x = torch.randn(2, 12, *size)
        q = module.q(x)
        k, v = module.kv(module.kv_norm(x.flatten(2).mT)).chunk(2, dim=-1)
        out, _ = reference(module.q_norm(q.flatten(2).mT), k, v)
        assert q.shape[2:] == tuple(-(-s // stride) for s in size)
        assert_close(module(x), module.shortcut(x) + out.mT.reshape(q.shape))


@torch.no_grad()
def test_unreleased_operators():
    torch.manual_seed(0)
    mixer = TokenMlp(12, 2, nn.GELU, drop=0.0)
    x = torch.randn(2, 12, 5)
    w1, w2 = mixer.mlp.fc1, mixer.mlp.fc2
    assert w1.weight.shape == (24, 12)
    hidden = F.gelu(torch.einsum("hn,bnc->bhc", w1.weight, x) + w1.bias[:, None])
    assert_close(mixer(x), torch.einsum("nh,bhc->bnc", w2.weight, hidden) + w2.bias[:, None])

    down = GlobalDownsample(4, 6, 2, (5, 8), nn.LayerNorm)
    x = torch.randn(2, 4, 5, 8)
    tokens = down.norm(x.flatten(2).mT)
    mixed = torch.einsum("mn,bnc->bmc", down.tokens.weight, tokens) + down.tokens.bias[:, None]
    assert_close(down(x), down.shortcut(x) + down.proj(mixed).mT.reshape(2, 6, 3, 4))


def test_network_of_unreleased_operators():
    """Builds, trains a step, saves, and its MACs are counted."""
    model, x = mini(**UNRELEASED).train(), images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(x), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    meta = timm.create_model("uninet", device="meta", **MINI)
    mixing = timm.create_model("uninet", device="meta", **dict(MINI, block_ops=("conv",) * 4 + ("mlp", "attn")))
    n, dim = 16, 24  # tokens and width of stage 4, two blocks: attention gives way to an MLP over tokens
    attention = 4 * n * dim**2 + 2 * n**2 * dim
    token_mlp = 2 * dim * n * (2 * n)
    assert macs(meta, 64) - macs(mixing, 64) == 2 * (attention - token_mlp)


def test_networks_made_for_one_size_say_so(tmp_path):
    assert not get_model_traits(mini())["fixed_input_size"]
    for kwargs in (UNRELEASED, dict(downsamples=("l", "l", "g", "l", "l"))):
        model = mini(**kwargs)
        assert get_model_traits(model)["fixed_input_size"]
        with pytest.raises(AssertionError, match=r"made for images of \(64, 64\)"):
            model(images(96))
        with pytest.raises(ValueError, match=r"made for images of \(64, 64\)"):
            model.set_input_size(96)
        model.set_input_size([64, 64])

    wide = mini(img_size=(64, 96), **UNRELEASED)
    with pytest.raises(AssertionError, match="made for images of"):
        wide(images((96, 64)))  # as many tokens, but other ones
    timm.models.save_for_hf(wide, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images((64, 96))
    with torch.no_grad():
        assert_close(loaded(x), wide(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_networks_made_for_one_size_can_be_compiled():
    x = images()
    with set_scriptable(True):
        model = mini(**UNRELEASED)
    with torch.no_grad():
        expected = model(x)
        assert_close(torch.jit.script(model)(x), expected)
        assert_close(torch.fx.symbolic_trace(model)(x), expected)


@pytest.mark.parametrize("size", [224, (64, 96), (33, 70), 20])
def test_any_image_size(size):
    model, x = mini(), images(size)
    with torch.no_grad():
        logits = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
    assert logits.isfinite().all() and not torch.allclose(logits[0], logits[1])
    for tap, feature_map in zip(model.feature_info, maps, strict=True):
        assert feature_map.shape[2:] == tuple(-(-s // tap["reduction"]) for s in x.shape[2:])


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(init_values=-1),
        dict(strides=(2, 2, 2, 1, 1, 2)),
        dict(block_ops=("attn",) * 6, downsamples=("lg",) * 5, channels=(8, 16, 16, 24, 24, 32)),
        dict(repeats=(1, 2), channels=(8, 16), expansions=(1, 2.5), block_ops=("conv", "attn"), downsamples=("lg",))
        | dict(strides=(2, 2)),
    ],
)
def test_free_configurations(kwargs):
    model, x = mini(**kwargs), images()
    assert [s.shape[2] for s in model.forward_intermediates(x, intermediates_only=True)] == [
        64 // tap["reduction"] for tap in model.feature_info
    ]
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if "init_values" in kwargs:
        assert not [n for n, _ in model.named_parameters() if "gamma" in n]


def test_drop_path_grows_with_depth():
    model = timm.create_model("uninet_b0", drop_path_rate=0.22, device="meta")
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(23)])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(repeats=(1, 1)), "one entry per stage"),
        (dict(downsamples=("l",) * 6), "one less in downsamples"),
        (dict(repeats=(1, 0, 1, 1, 1, 1)), "must be positive"),
        (dict(block_ops=("conv", "some") + ("attn",) * 4), r"block_ops has \['some'\]"),
        (dict(downsamples=("ldsm",) * 5), r"downsamples has \['ldsm'\]"),
        (dict(channels=(8, 12, 16, 24, 20, 32)), "stage 4 has attention, so its width 20 must be a multiple of 8"),
        (dict(block_ops=("attn",) * 6, downsamples=("l",) * 5, channels=(16,) * 6), "needs channels"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        mini(**kwargs)
