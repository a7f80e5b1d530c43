"""SepViT: what the released code computes, what the paper counts, and any image size."""

import json
import math

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from timm_resnas.models.sepvit import SeparableAttention, checkpoint_filter_fn

# parameters are the paper's in millions, MACs its GFLOPs (it gives none for Lite, nor parameters)
TABLE = [
    ("sepvit_lite", 3.66, 0.57),
    ("sepvit_tiny", 31.2, 4.5),
    ("sepvit_small", 46.6, 7.5),
    ("sepvit_base", 82.3, 13.1),
]
MINI = dict(
    img_size=160,
    embed_dims=(8, 12, 16, 24),
    depths=(1, 2, 3, 1),
    num_heads=(1, 2, 2, 3),
    window_sizes=((7,), (7, 14), (7, 0), (0,)),
    num_classes=5,
)


def mini(**kwargs):
    """A small network with no parameter left at 0 or 1, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model("sepvit_lite", **{**MINI, **kwargs})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def images(size=160, batch=2):
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


class Golden:
    """Tensors of the released code, and our model with their weights."""

    def __init__(self, path):
        with safetensors.safe_open(path, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {k: file.get_tensor(k) for k in file.keys()}
        names = ("embed_dims", "num_heads", "depths", "window_sizes", "img_size", "num_classes", "qkv_bias")
        self.args = {k: self.config[k] for k in names}
        self.released = {
            k.removeprefix("state_dict/"): v for k, v in self.tensors.items() if k.startswith("state_dict/")
        }

    def model(self, **kwargs):
        model = timm.create_model("sepvit_lite", **{**self.args, **kwargs}).eval()
        model.load_state_dict(checkpoint_filter_fn({"model": self.released}, model))
        return model

    def __getitem__(self, name):
        return self.tensors[name]


@pytest.mark.parametrize("fused", [True, False])
def test_outputs_of_the_released_code(golden, fused):
    case = Golden(golden("sepvit_a"))
    set_fused_attn(fused)
    try:
        model = case.model()
    finally:
        set_fused_attn(True)
    with torch.no_grad():
        assert_close(model(case["input"]), case["logits"], rtol=0, atol=1e-5)
        maps = model.forward_intermediates(case["input"], intermediates_only=True)
    for i in (2, 3):
        assert_close(maps[i].flatten(2).transpose(1, 2), case[f"stage{i + 1}_tokens"], rtol=1e-5, atol=4e-5)


def test_released_checkpoint_through_create_model(golden, tmp_path):
    """At its own size, at a larger one with our windows (0: the whole map), and at one where fewer windows remain."""
    case = Golden(golden("sepvit_a"))
    torch.save({"model": {f"module.{k}": v for k, v in case.released.items()}}, tmp_path / "sepvit.pth")
    load = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "sepvit.pth"), num_classes=10))
    args = dict(case.args, window_sizes=((7,), (7, 14), (7, 0), (0,)), **load)
    model = timm.create_model("sepvit_tiny", **args).eval()
    larger = timm.create_model("sepvit_tiny", **dict(args, img_size=256)).eval()
    smaller = timm.create_model("sepvit_tiny", **dict(args, img_size=96)).eval()
    with torch.no_grad():
        assert_close(model(case["input"]), case["logits"], rtol=0, atol=1e-5)
        x = images((256, 256))
        assert_close(larger(x), model(x))
        x = images((96, 96))
        assert_close(smaller(x), model(x))
    assert larger.stages[0].blocks[0].win_tokens.shape == (1, 16, 10, 10)
    assert smaller.stages[2].blocks[0].win_tokens is None


@pytest.mark.parametrize(("name", "params", "gmacs"), TABLE)
def test_size_of_the_paper_s_models(name, params, gmacs):
    model = timm.create_model(name, device="meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, rel=2e-3)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=0.06)


def test_blocks_of_the_paper_s_models():
    """Stages 2 and 3 alternate; a window of 14 covers the map of stage 3, one of 7 that of stage 4."""
    ours = timm.create_model("sepvit_small", device="meta")
    windows = [[b.window for b in stage.blocks] for stage in ours.stages]
    assert windows == [[7], [7, 14], [7, 0] * 7, [0, 0]]
    papers = timm.create_model("sepvit_small", device="meta", window_sizes=((7,), (7, 14), (7, 14), (7,)))
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, papers)]
    assert shapes[0] == shapes[1]
    tables = [[b.win_tokens is not None and tuple(b.win_tokens.shape[2:]) for b in s.blocks] for s in ours.stages]
    assert tables == [[(8, 8)], [(4, 4), (2, 2)], [(2, 2), False] * 7, [False, False]]
    assert not [n for n, _ in ours.stages[3].named_parameters() if "win" in n]
    assert ours.no_weight_decay() == {n for n, _ in ours.named_parameters() if n.endswith("win_tokens")} != set()


def attend(attn, qk, v):
    """Plain attention of `[N, 2C]` queries and keys over values `[N, heads, E]`."""
    q, k = qk.reshape(len(qk), 2, attn.num_heads, attn.head_dim).unbind(1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(attn.head_dim)
    return torch.einsum("hij,jhe->ihe", scores.softmax(-1), v)


def separable(attn, x, tokens):
    """The obvious version, pixel by pixel, without padding: `x` [H, W, C], `tokens` [rows, columns, C]."""
    H, W, C = x.shape
    w, (rows, cols) = attn.window, tokens.shape[:2]
    within, t = torch.empty(H, W, C), torch.empty(rows * cols, C)
    for i in range(rows * cols):
        ys = slice(i // cols * w, min((i // cols + 1) * w, H))
        xs = slice(i % cols * w, min((i % cols + 1) * w, W))
        window = torch.cat([tokens.flatten(0, 1)[i : i + 1], x[ys, xs].flatten(0, 1)])
        qk, v = attn.qkv(window).split([2 * C, C], dim=1)
        out = attend(attn, qk, v.unflatten(1, (attn.num_heads, -1))).flatten(1) + window
        t[i], within[ys, xs] = out[0], out[1:].reshape(x[ys, xs].shape)

    out, qk = within.clone(), attn.win_qk(F.gelu(attn.win_norm(t)))
    for dy in range(w):
        for dx in range(w):
            # what the windows hold at this place, nothing where one reaches over the map's edge
            place = torch.zeros(rows * cols, C)
            for i in range(rows * cols):
                y, x_ = i // cols * w + dy, i % cols * w + dx
                if y < H and x_ < W:
                    place[i] = within[y, x_]
            mixed = attend(attn, qk, place.unflatten(1, (attn.num_heads, -1))).flatten(1)
            for i in range(rows * cols):
                y, x_ = i // cols * w + dy, i % cols * w + dx
                if y < H and x_ < W:
                    out[y, x_] += mixed[i]
    return attn.proj(out)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [(6, 6), (6, 9), (7, 8), (4, 3), (1, 10)])
def test_attention_with_and_without_padding(size, fused):
    torch.manual_seed(0)
    attn = SeparableAttention(8, 2, window=3, between=True).eval()
    attn.fused_attn = fused
    x = torch.randn(2, *size, 8)
    tokens = torch.randn(1, -(-size[0] // 3), -(-size[1] // 3), 8)
    with torch.no_grad():
        assert_close(attn(x, tokens), torch.stack([separable(attn, image, tokens[0]) for image in x]))


@torch.no_grad()
def test_attention_between_windows_without_weights_averages_them():
    torch.manual_seed(0)
    attn = SeparableAttention(8, 2, window=3, between=True).eval()
    for p in attn.win_qk.parameters():
        p.zero_()
    maps = torch.randn(2, 4, 9, 8)
    assert_close(attn.attend_between(torch.randn(2, 4, 8), maps), maps + maps.mean(1, keepdim=True))


@torch.no_grad()
def test_one_window_needs_no_token():
    """A table of one token is left alone, whatever is in it; the block then attends to the whole map."""
    torch.manual_seed(0)
    attn = SeparableAttention(8, 2, window=7, between=True).eval()
    whole = SeparableAttention(8, 2, window=0, between=False).eval()
    whole.load_state_dict({k: v for k, v in attn.state_dict().items() if not k.startswith("win_")})
    x = torch.randn(2, 5, 7, 8)
    assert torch.equal(attn(x, torch.randn(1, 1, 1, 8)), whole(x))
    reference = []
    for tokens in x.flatten(1, 2):
        qk, v = attn.qkv(tokens).split([16, 8], dim=1)
        reference.append(attend(attn, qk, v.unflatten(1, (2, 4))).flatten(1) + tokens)
    assert_close(whole(x), attn.proj(torch.stack(reference)).unflatten(1, (5, 7)))


@pytest.mark.parametrize("size", [160, 224, (120, 90), (33, 200), 32])
def test_any_image_size(size):
    """The same as a network built for that size with resampled tables."""
    model, x = mini(), images(size)
    built = mini(img_size=x.shape[2:])
    built.load_state_dict(checkpoint_filter_fn(model.state_dict(), built))
    with torch.no_grad():
        logits = model(x)
        assert_close(built(x), logits)
    assert logits.isfinite().all() and not torch.allclose(logits[0], logits[1])
    for i, feature_map in enumerate(model.forward_intermediates(x, intermediates_only=True)):
        assert feature_map.shape[2:] == tuple(-(-s // 2 ** (i + 2)) for s in x.shape[2:])


@pytest.mark.parametrize(("first", "second"), [(160, 192), (160, 64), (64, 160), (64, (160, 96))])
def test_image_size_can_change(first, second, tmp_path):
    """What was saved after that is what loads, also where a window covered the first size but not the second."""
    model = mini(img_size=first)
    model.set_input_size(second)
    x = images(second)
    with torch.no_grad():
        logits = model(x)
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert_close(loaded(x), logits)
    with_table = [n for n, _ in loaded.named_parameters() if n.endswith("win_tokens")]
    assert set(with_table) <= {n for n, _ in model.named_parameters()}


def test_rectangles_are_not_squares():
    """4 x 4 windows and 2 x 8 are both 16; a table keeps its shape and is resampled as such."""
    square, wide = mini(img_size=112), mini(img_size=(56, 224))
    table = square.stages[0].blocks[0].win_tokens
    assert table.shape[2:] == (4, 4) and wide.stages[0].blocks[0].win_tokens.shape[2:] == (2, 8)
    filtered = checkpoint_filter_fn(square.state_dict(), wide)["stages.0.blocks.0.win_tokens"]
    assert_close(filtered, F.interpolate(table, (2, 8), mode="bicubic", antialias=True))


def test_batch_of_images_is_images_one_by_one():
    model, x = mini(), images(100, batch=3)
    with torch.no_grad():
        assert_close(model(x), torch.cat([model(x[i : i + 1]) for i in range(3)]))


def test_drop_path_grows_with_depth():
    model = timm.create_model("sepvit_tiny", drop_path_rate=0.2, device="meta")
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0.02 * i for i in range(11)])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(depths=(1, 2, 3)), "one entry per stage, but have 4, 3, 4 and 4"),
        (dict(num_heads=(1, 2, 3, 3)), "3 heads do not divide a width of 16"),
        (dict(depths=(1, 0, 2, 1)), "must be positive"),
        (dict(window_sizes=((7,), (), (7,), (7,))), "0 for the whole map"),
        (dict(window_sizes=((7,), (-1,), (7,), (7,))), "0 for the whole map"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        mini(**kwargs)


def test_smaller_images_leave_no_parameter_without_gradient():
    """At 96 pixels the third stage is one window, which has no others to mix with."""
    model = timm.create_model("sepvit_lite").train()
    model(torch.randn(2, 3, 96, 96)).sum().backward()
    assert not [name for name, param in model.named_parameters() if param.grad is None]
    unused = [m for m in model.stages[2].blocks if m.win_tokens is not None]
    assert unused and all(not m.win_tokens.grad.any() and not m.attn.win_qk.weight.grad.any() for m in unused)
