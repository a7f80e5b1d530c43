"""The counter of multiply-accumulates: known numbers, on any device, in any state, without a trace."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import timm_resnas  # noqa: F401  (registers the models)
from timm_resnas.nas.count import count_macs

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize(
    "name, macs",
    [
        ("sret_tiny", 1_112_444_672),
        ("vit_small_patch16_224", 4_598_882_304),
        ("vit_resnas_tiny", 1_782_630_272),
        ("vit_resnas_small", 2_845_501_856),
        ("vit_resnas_medium", 4_513_135_936),
        ("vit_res_tiny", 1_794_378_240),
    ],
)
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        "meta",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_known_models(name, macs, device):
    assert count_macs(timm.create_model(name, device=device), (3, 224, 224)) == macs


class Everything(nn.Module):
    """Each kind of layer that costs something, and some that must not matter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d((5, 3))
        self.qkv = nn.Linear(8, 24)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("order", torch.arange(15).flip(0), persistent=False)
        self.kept = {"scale": [torch.ones(8, requires_grad=True) * 2]}  # neither parameter nor buffer

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = self.pool(x).flatten(2).mT[:, self.order] * self.kept["scale"][0]
        q, k, v = self.qkv(self.drop(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.attn(x, x, x, need_weights=False)[0]
        return self.layer(x) @ torch.randn(8, 6, device=x.device, dtype=x.dtype)


TOKENS = 15
ATTENTION = 2 * TOKENS * TOKENS * 8
EVERYTHING = (
    8 * 2 * 9 * 11 * 7  # 22 x 14 images
    + TOKENS * 8 * 24
    + ATTENTION
    + TOKENS * 8 * 32
    + ATTENTION
    + TOKENS * 8 * (32 + 32)
    + ATTENTION
    + TOKENS * 8 * 6
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_every_kind_of_layer_by_hand(dtype, training):
    model = Everything().to(dtype).train(training)
    assert count_macs(model, (4, 22, 14)) == EVERYTHING


def test_nothing_is_changed():
    """Modes, also mixed ones, weights, statistics, gradients' flags and random numbers."""
    torch.manual_seed(0)
    model = Everything().train()
    model.norm.eval()
    model.qkv.bias.requires_grad_(False)
    model.attn.in_proj_weight.grad = torch.ones_like(model.attn.in_proj_weight)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    tensors = [(id(p), p.requires_grad, p.device, p.dtype) for p in [*model.parameters(), *model.buffers()]]
    keys = {name: set(vars(m)) for name, m in model.named_modules()}
    random = torch.get_rng_state()
    assert count_macs(model, [4, 22, 14]) == EVERYTHING
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert [(id(p), p.requires_grad, p.device, p.dtype) for p in [*model.parameters(), *model.buffers()]] == tensors
    assert {name: set(vars(m)) for name, m in model.named_modules()} == keys
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.kept["scale"][0].device.type == "cpu"


class Watch(TorchDispatchMode):
    """Remembers where results of operations lie."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.devices |= {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


def test_nothing_is_computed_or_copied():
    model = Everything()
    with Watch() as watch:
        count_macs(model, (4, 22, 14))
    assert watch.devices == {"meta"}


def test_gpu_in_half_precision_counts_the_same():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = timm.create_model("sret_tiny", device="cuda", dtype=torch.bfloat16).train()
    random = torch.cuda.get_rng_state()
    assert count_macs(model, (3, 224, 224)) == 1_112_444_672
    assert torch.equal(torch.cuda.get_rng_state(), random)


class Unknowable(nn.Module):
    def forward(self, x):
        return x[x > 0]


@pytest.mark.parametrize(
    "model, message",
    [
        (Unknowable(), "MACs of Unknowable cannot be counted for an image of 3 x 8 x 8"),
        (nn.Conv2d(4, 4, 3), "MACs of Conv2d cannot be counted for an image of 3 x 8 x 8"),
    ],
)
def test_what_cannot_be_counted(model, message):
    with pytest.raises(ValueError, match=message):
        count_macs(model, (3, 8, 8))


def test_wrong_image_size():
    model = timm.create_model("vit_tiny_patch16_224", device="meta")
    with pytest.raises(ValueError, match="image of 3 x 100 x 100: Input height"):
        count_macs(model, (3, 100, 100))
