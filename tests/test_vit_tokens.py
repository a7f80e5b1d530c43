"""Fewer tokens in timm's ViTs: the papers' numbers, the base where nothing is dropped, what timm asks of a model."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.testing import assert_close

import timm_resnas
from recipes import benchmark_shrink
from timm_resnas.arch import attention, mlp
from timm_resnas.models import token_layers, token_reduction, vit_tokens
from timm_resnas.models.token_layers import at_most, sample
from timm_resnas.models.token_reduction import METHODS, TokenError, reduce_in_place, unreduced
from timm_resnas.nas.count import count_macs, expected_macs, macs_vary
from timm_resnas.tasks import DynamicViTTask, dynamicvit_groups

SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")


def read(path):
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
        config = json.loads(file.metadata()["config"])
    state = {k.removeprefix("state_dict/"): v for k, v in tensors.items() if k.startswith("state_dict/")}
    return tensors, config, state


def golden_vit(config, method, **options):
    model = VisionTransformer(**{k: config[k] for k in SIZES})
    return reduce_in_place(model, method, **options).eval()


# -- the papers' released code -----------------------------------------------------------------------------------------


def golden_dynamicvit(golden):
    tensors, config, state = read(golden("dynamicvit_a"))
    model = golden_vit(config, "dynamicvit", locations=config["pruning_loc"], keep_ratios=config["token_ratio"])
    model.load_state_dict(state)
    return tensors, model


def on_image(values, where, total):
    """[B, n, ...] of tokens to where they are in the image; -1: nowhere."""
    out = torch.zeros(len(values), total, *values.shape[2:])
    for row, of, at in zip(out, values, where, strict=True):
        row[at[at >= 0]] = of[at >= 0]
    return out


def test_dynamicvit_evaluates_as_released(golden):
    tensors, model = golden_dynamicvit(golden)
    scores = []
    for predictor in model.score_predictor:
        predictor.register_forward_hook(lambda _, __, out: scores.append(out))
    with torch.inference_mode():
        assert_close(model(tensors["input"]), tensors["logits"], rtol=1e-5, atol=1e-5)
        kept = [kept for _, kept, _ in model.steps(tensors["input"])]
    ours = theirs = torch.arange(196).expand(2, -1)
    for s, score in enumerate(scores[:3]):
        reference = on_image(tensors[f"eval/predictor_log_prob_{s}"], theirs, 196)
        assert_close(on_image(score, ours, 196), reference, rtol=1e-5, atol=1e-5)
        # theirs are in descending order of score, ours in that of the image
        theirs = theirs.gather(1, tensors[f"eval/kept_token_index_{s}"][:, 1:] - 1)
        ours = kept[model.locations[s]]
        assert torch.equal(ours, theirs.sort(dim=1)[0])


def golden_noise(monkeypatch, tensors):
    """torch draws its Gumbel noise as -log of exponential numbers."""
    noise = iter([torch.exp(-tensors[f"train/gumbel_noise_{s}"]) for s in range(3)])
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, *_: self.copy_(next(noise)))


def test_dynamicvit_trains_as_released(golden, monkeypatch):
    tensors, model = golden_dynamicvit(golden)
    golden_noise(monkeypatch, tensors)
    model.train().set_masked_training()
    out = model(tensors["input"])
    assert_close(out.logits, tensors["train/logits"], rtol=1e-5, atol=1e-5)
    assert_close(out.features, tensors["train/features"], rtol=1e-5, atol=1e-5)
    for s, decision in enumerate(out.decisions):
        assert torch.equal(decision, tensors[f"train/keep_decision_{s}"])


class Recorded(nn.Module):
    """A teacher whose answers are known."""

    def __init__(self, tokens, logits):
        super().__init__()
        self.tokens, self.logits = tokens, logits

    def forward_features(self, x):
        return F.pad(self.tokens, (0, 0, 1, 0))

    def forward_head(self, x):
        return self.logits


def test_dynamicvit_losses_and_gradients_as_released(golden, monkeypatch):
    tensors, model = golden_dynamicvit(golden)
    golden_noise(monkeypatch, tensors)
    task = DynamicViTTask(model, criterion_kwargs=dict(soft_targets=True), verbose=False).train()
    task.teacher = Recorded(tensors["train/teacher_tokens"], tensors["train/teacher_logits"])
    found = task(tensors["input"], tensors["train/soft_labels"])
    found["loss"].backward()
    expected = {
        "task_loss": tensors["train/loss_cls"][0],
        "ratio_loss": tensors["train/loss_ratio_sum"][0] / 3,
        "kd_loss": tensors["train/loss_cls_kl"][0],
        "token_loss": tensors["train/loss_token"][0],
        "loss": tensors["train/loss_total"][0],
    }
    assert_close({k: found[k].detach() for k in expected}, expected, rtol=1e-5, atol=1e-6)
    for key, gradient in tensors.items():
        if key.startswith("train/grad/"):
            own = model.get_parameter(key.removeprefix("train/grad/")).grad
            assert_close(own, gradient, rtol=1e-4, atol=1e-6)
    kept = [found[f"kept_{s}"] for s in range(3)]
    assert_close(torch.stack(kept), torch.stack([tensors[f"train/keep_decision_{s}"].mean() for s in range(3)]))


def test_dynamicvit_trains_from_the_network_that_it_was():
    base = make("deit_tiny_patch16_224", drop_path_rate=0.5)
    model = timm_resnas.reduce_tokens(base)
    task = DynamicViTTask(model, verbose=False).train()
    x = images(base)
    assert not task.teacher.training and task.trainable_module.training
    assert torch.equal(task.teacher(x), base(x))
    groups = dynamicvit_groups(model, 0.3, 0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    decay = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert set(names.values()) - set(scale) == {"pos_embed", "cls_token"}
    assert scale["score_predictor.2.out_conv.0.weight"] == 1 and scale["blocks.3.mlp.fc1.weight"] == 0.01
    assert decay["score_predictor.0.in_conv.0.weight"] == decay["head.bias"] == 0 and decay["head.weight"] == 0.3
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        task(x, torch.tensor([0, 1, 2]))["loss"].backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert torch.equal(task.teacher(x), base(x)) and not torch.equal(unreduced(model)(x), base(x))
    with pytest.raises(RuntimeError, match="eval mode"):
        task.eval()(x, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="VisionTransformer has no predictors; make one by"):
        DynamicViTTask(base)


def test_ats_evaluates_as_released(golden, monkeypatch):
    tensors, config, state = read(golden("ats_a"))
    model = golden_vit(config, "ats", blocks=config["ats_blocks"])
    model.load_state_dict(state)
    scores, significance = [], token_reduction.significance
    monkeypatch.setattr(token_reduction, "significance", lambda *args: scores.append(significance(*args)) or scores[-1])
    with torch.inference_mode():
        assert_close(model(tensors["input"]), tensors["logits"], rtol=1e-5, atol=1e-5)
        scores.clear()
        states = [(kept, there) for _, kept, there in model.steps(tensors["input"])]
    ours = theirs = torch.arange(144).expand(3, -1)
    for j, block in enumerate(config["ats_blocks"]):
        reference = on_image(tensors[f"eval/score_{j}"], theirs, 144)
        assert_close(on_image(scores[j], ours, 144), reference, rtol=1e-5, atol=1e-6)
        positions = tensors[f"eval/sampled_position_{j}"]  # in what enters the block; 0: none
        theirs = torch.where(positions > 0, theirs.gather(1, (positions - 1).clamp_min(0)), -1)
        kept, there = states[block]
        ours = kept if there is None else torch.where(there, kept, -1)
        for row, reference in zip(ours, theirs, strict=True):
            assert torch.equal(row[row >= 0], reference[reference >= 0].sort()[0])


VIT_PYTORCH = {  # its names of a ViT's layers, and timm's
    r"^to_patch_embedding\.": "patch_embed.",
    r"^pos_embedding": "pos_embed",
    r"^mlp_head\.1": "head",
    r"^transformer\.layers\.(\d+)\.0\.norm": r"blocks.\1.norm1",
    r"^transformer\.layers\.(\d+)\.0\.to_qkv": r"blocks.\1.attn.qkv",
    r"^transformer\.layers\.(\d+)\.0\.to_out\.0": r"blocks.\1.attn.proj",
    r"^transformer\.layers\.(\d+)\.1\.net\.0": r"blocks.\1.norm2",
    r"^transformer\.layers\.(\d+)\.1\.net\.1": r"blocks.\1.mlp.fc1",
    r"^transformer\.layers\.(\d+)\.1\.net\.4": r"blocks.\1.mlp.fc2",
    r"^transformer\.": "",
}


def test_patchmerger_evaluates_as_released(golden):
    tensors, config, state = read(golden("patchmerger_a"))
    merger = token_layers.PatchMerger(config["embed_dim"], config["num_tokens"])
    merger.load_state_dict({k.rpartition("merger.")[2]: v for k, v in state.items() if "patch_merger" in k})
    with torch.inference_mode():
        assert_close(merger(tensors["merger_input"]), tensors["merger_output"], rtol=1e-5, atol=1e-6)

    for pattern, name in VIT_PYTORCH.items():
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    state["pos_embed"] = state["pos_embed"][:, :-1]  # the last row is of no token
    dim, patch = config["embed_dim"], config["patch_size"]
    model = VisionTransformer(
        **{k: config[k] for k in SIZES},
        mlp_ratio=config["mlp_dim"] / dim,
        qkv_bias=False,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        norm_layer=nn.LayerNorm,
    )
    # flat patches in the order height, width, channel, normed before and after they are embedded
    model.patch_embed = nn.Sequential(
        nn.Identity(), nn.LayerNorm(3 * patch**2), nn.Linear(3 * patch**2, dim), nn.LayerNorm(dim)
    )
    model = reduce_in_place(model, "patchmerger", after_block=config["patch_merge_layer"]).eval()
    model.load_state_dict(vit_tokens.checkpoint_filter_fn(state, model))
    x = tensors["input"].unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1)
    with torch.inference_mode():
        assert_close(model(x.flatten(3).flatten(1, 2)), tensors["logits"], rtol=1e-5, atol=1e-5)


# -- any of timm's -----------------------------------------------------------------------------------------------------

# two heads, registers without a class token, layer scale and registers, attention pool, q/k norm, ours
BASES = {
    name: dict(img_size=32, patch_size=8, embed_dim=96, num_heads=3, depth=4) | own
    for name, own in {
        "deit_tiny_patch16_224": {},
        "deit_tiny_distilled_patch16_224": dict(img_size=(24, 32)),
        "vit_little_patch16_reg4_gap_256": {},
        "vit_small_patch14_reg4_dinov2": dict(img_size=28, patch_size=7),
        "vit_base_patch16_siglip_224": {},
        "vit_tiny_patch16_224": dict(img_size=(32, 40), qk_norm=True, init_values=0.1),
        "vit_elastic": dict(widths=[[2, 96, 16], [0, 192], [3, 0], [1, 64]]),
    }.items()
}
WITH_CLASS_TOKEN = [n for n in BASES if n not in ("vit_little_patch16_reg4_gap_256", "vit_base_patch16_siglip_224")]
CASES = [(n, m) for n in BASES for m in METHODS if m not in ("ats", "positions") or n in WITH_CLASS_TOKEN]
NEW = {"dynamicvit": "score_predictor.", "ats": "none", "positions": "none", "patchmerger": "patch_merger."}


def make(name, **more):
    """The base with weights that depend on every parameter."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **{**BASES[name], **more}).eval()
    with torch.no_grad():
        for key, param in model.named_parameters():
            # attention that prefers some tokens
            param.add_(torch.randn_like(param) * (0.2 if "qkv.weight" in key else 0.03))
    return model


def images(model, n=3, seed=1):
    return torch.randn(n, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_stays_what_it_was(name, method):
    base = make(name)
    base.set_grad_checkpointing()
    model = timm_resnas.reduce_tokens(base, method)
    assert isinstance(model, type(base)) and not model.training and model.grad_checkpointing
    assert model.pretrained_cfg["architecture"] == "vit_tokens" and base.pretrained_cfg["architecture"] == name
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all(key.startswith(NEW[method]) for key in missing)
    assert bool(missing) == (NEW[method] != "none")
    assert_close({k: v for k, v in model.state_dict().items() if k in base.state_dict()}, base.state_dict())
    assert base.no_weight_decay() == model.no_weight_decay()
    assert type(unreduced(model)) is type(base)
    x = images(model)
    with torch.inference_mode():
        assert torch.equal(unreduced(model)(x), base(x))
        logits = model(x)
        assert not torch.allclose(logits, base(x), atol=1e-3)
        features = model.forward_features(x)
        assert features.shape[1] < base.forward_features(x).shape[1]
        assert_close(model.forward_head(features), logits, rtol=0, atol=0)
        # each image for itself
        assert_close(torch.cat([model(one) for one in x.split(1)]), logits, rtol=1e-4, atol=1e-5)

    # other sizes and classes, and back
    height, width = (2 * side for side in model.patch_embed.img_size)
    model.set_input_size((height, width + model.patch_embed.patch_size[1]))
    model.reset_classifier(3)
    with torch.inference_mode():
        assert model(images(model)).shape == (3, 3)
    args = json.loads(json.dumps(timm.models.get_model_args(model)))
    assert timm.create_model("vit_tokens", **args).patch_embed.img_size == model.patch_embed.img_size


@pytest.mark.parametrize(
    ("name", "method"),
    [("deit_tiny_distilled_patch16_224", "dynamicvit"), ("vit_elastic", "ats"), ("vit_elastic", "patchmerger")],
)
def test_saved_and_loaded(name, method, tmp_path):
    base = make(name)
    model = timm_resnas.reduce_tokens(base, method)
    timm_resnas.save_pretrained(model, tmp_path / "saved")
    again = timm_resnas.load(f"local-dir:{tmp_path / 'saved'}", check=True).eval()
    assert type(again) is type(model) and again.options() == model.options()
    with torch.inference_mode():
        assert torch.equal(again(images(model)), model(images(model)))
    # weights of the base, as a file
    timm_resnas.save_pretrained(base, tmp_path / "base")
    args = json.loads((tmp_path / "saved" / "config.json").read_text())["model_args"]
    overlay = dict(file=str(tmp_path / "base" / "model.safetensors"), num_classes=7)
    fresh = timm.create_model("vit_tokens", pretrained=True, pretrained_cfg_overlay=overlay, **args)
    assert_close({k: v for k, v in fresh.state_dict().items() if k in base.state_dict()}, base.state_dict())


def test_several_mergers(tmp_path):
    """One after the other, each in its place; saved, loaded, and the layout of one merger's file is read, too."""
    base = make("deit_tiny_patch16_224")
    model = timm_resnas.reduce_tokens(base, "patchmerger", after_block=[1, 3], num_tokens=[6, 2])
    x = images(model)
    with torch.inference_mode():
        tokens = base.norm_pre(base._pos_embed(base.patch_embed(x)))
        for i, block in enumerate(base.blocks):
            if i in (1, 3):
                tokens = torch.cat([tokens[:, :1], model.patch_merger[i // 2](tokens[:, 1:])], dim=1)
            tokens = block(tokens)
        assert_close(model.forward_features(x), base.norm(tokens))
        timm_resnas.save_pretrained(model, tmp_path / "several")
        assert torch.equal(timm_resnas.load(tmp_path / "several", check=True).eval()(x), model(x))
        single = timm_resnas.reduce_tokens(base, "patchmerger", after_block=2, num_tokens=5)
        old = {k.replace("patch_merger.0.", "patch_merger."): v for k, v in single.state_dict().items()}
        fresh = timm_resnas.reduce_tokens(base, "patchmerger", after_block=2, num_tokens=5)
        fresh.load_state_dict(vit_tokens.checkpoint_filter_fn(old, fresh))
        assert torch.equal(fresh(x), single(x))
    assert model.options() == {"after_block": [1, 3], "num_tokens": [6, 2], "scaled": True}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_trains(name, method):
    model = timm_resnas.reduce_tokens(make(name), method).double().train()
    x, grads = images(model).double(), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        model.zero_grad()
        out = model(x)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        missing = [k for k, p in model.named_parameters() if p.grad is None]
        assert not missing
        grads.append({k: p.grad for k, p in model.named_parameters()})
    assert_close(grads[0], grads[1])
    assert all(g.isfinite().all() for g in grads[0].values())


USUAL = [  # sides of photographs
    ("deit_tiny_patch16_224", dict(patch_size=16, img_size=224)),
    ("deit_tiny_patch16_224", dict(patch_size=16, img_size=(224, 336))),
    ("vit_small_patch14_reg4_dinov2", dict(patch_size=14, img_size=336)),
    ("vit_base_patch16_siglip_224", dict(patch_size=16, img_size=336)),
]


@pytest.mark.parametrize(("name", "more"), [*((name, {}) for name in BASES), *USUAL])
def test_nothing_dropped_is_the_base_bit_for_bit(name, more, monkeypatch):
    base = make(name, **more)
    x = images(base, n=1 if more else 3)
    with torch.inference_mode():
        logits = base(x)
        assert torch.equal(timm_resnas.reduce_tokens(base, keep_ratios=1.0)(x), logits)
        if name in WITH_CLASS_TOKEN:
            model = timm_resnas.reduce_tokens(base, "ats")
            monkeypatch.setattr(token_reduction, "sample", lambda score, *_: torch.ones_like(score, dtype=torch.bool))
            assert torch.equal(model(x), logits)


@pytest.mark.parametrize("name", BASES)
def test_dropped_tokens_are_as_masked_ones(name, monkeypatch):
    """The decisions of eval mode, taken in training: no token of them is seen, in attention or in pooling."""
    model = timm_resnas.reduce_tokens(make(name), keep_ratios=[0.8, 0.5, 0.3])
    x, (kept, total) = images(model), (None, math.prod(model.patch_embed.grid_size))
    with torch.inference_mode():
        logits = model(x)
        *_, (tokens, kept, _) = model.steps(x)
        assert tokens.shape[1] == model.num_prefix_tokens + kept.shape[1] == model.num_prefix_tokens + int(0.3 * total)
    stage, there = iter(model.keep_ratios), torch.ones(len(x), total, dtype=torch.bool)

    def best(score, hard):
        nonlocal there
        index = score[..., 0].masked_fill(~there, -torch.inf).topk(int(next(stage) * total), dim=1)[1]
        there = torch.zeros_like(there).scatter(1, index, True)
        return F.one_hot((~there).long(), 2).to(score)

    monkeypatch.setattr(F, "gumbel_softmax", best)
    monkeypatch.setattr(token_layers, "EPS", 0.0)  # what the released code adds while it trains
    model.train()
    with torch.inference_mode():
        out = model(x)
    assert_close(out, logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(there.nonzero()[:, 1].view(len(x), -1), kept)


def test_gradients_of_decisions_in_a_mean():
    model = timm_resnas.reduce_tokens(make("vit_little_patch16_reg4_gap_256")).train()
    x = torch.randn(2, 4 + 16, 96, dtype=torch.double)
    weight = (torch.rand(2, 16, dtype=torch.double) < 0.6).double().requires_grad_()
    pooled = model.pool(model.without_gaps(x, weight))
    patches = x[:, 4:]
    expected = (patches * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    assert_close(pooled, expected)
    towards = torch.randn_like(pooled)
    assert_close(*(torch.autograd.grad(y, weight, towards)[0] for y in (pooled, expected)))


def test_features_are_where_they_were():
    model = timm_resnas.reduce_tokens(make("vit_tiny_patch16_224"), locations=[1, 2], keep_ratios=[0.5, 0.25])
    x = images(model)
    with torch.no_grad():
        states = list(model.steps(x))
        maps = model.forward_intermediates(x, intermediates_only=True)
        last, (rows,) = model.forward_intermediates(x, [2], output_fmt="NLC", stop_early=True)
    assert [m.shape for m in maps] == [(3, 96, 4, 5)] * 4
    assert_close(rows, maps[2].flatten(2).transpose(1, 2))
    assert_close(last, model.norm(states[2][0]))
    for (tokens, kept, _), found in zip(states, maps, strict=True):
        rows = found.flatten(2).transpose(1, 2)
        for b in range(3):
            there = torch.arange(20) if kept is None else kept[b]
            assert_close(rows[b, there], tokens[b, 1:])
            assert rows[b].any(-1).sum() == len(there)


def test_merged_tokens_have_no_map():
    model = timm_resnas.reduce_tokens(make("deit_tiny_patch16_224"), "patchmerger", after_block=2, num_tokens=3)
    x = images(model)
    assert [m.shape for m in model.forward_intermediates(x, [0, 1], intermediates_only=True)] == [(3, 96, 4, 4)] * 2
    assert model.forward_intermediates(x, [3], output_fmt="NLC", intermediates_only=True)[0].shape == (3, 3, 96)
    with pytest.raises(ValueError, match="merged tokens have no place in the image; take output_fmt='NLC'"):
        model.forward_intermediates(x)
    pruned = timm_resnas.reduce_tokens(make("deit_tiny_patch16_224"), "patchmerger", after_block=[1, 3])
    pruned.prune_intermediate_layers([1])
    assert {key for key in pruned.state_dict() if "merger" in key} == {
        f"patch_merger.0.{name}" for name in ("queries", "norm.weight", "norm.bias")
    }
    assert pruned.forward_features(x).shape == (3, 1 + 8, 96)
    # an average over inputs, whatever their order and number
    (merger,) = model.patch_merger
    for n in (2, 30):
        tokens = torch.randn(2, n, 96)
        merged = merger(tokens)
        assert merged.shape == (2, 3, 96)
        assert_close(merger(tokens.flip(1)), merged)
        assert (merged.amax(1) <= merger.norm(tokens).amax(1) + 1e-5).all()


# -- adaptive sampling -------------------------------------------------------------------------------------------------


def test_sampling_follows_the_scores():
    even, one = torch.full((1, 50), 1 / 50), torch.full((1, 50), 1e-6)
    one[0, 17] = 1
    none_lost = torch.tensor([False])
    assert sample(even, 50, none_lost).sum() >= 48
    assert sample(one, 50, none_lost).sum() <= 3 and sample(one, 50, none_lost)[0, 17]
    scores = torch.rand(4, 50, generator=torch.Generator().manual_seed(0)).pow(3)
    scores = scores / scores.sum(1, keepdim=True)
    picked = sample(scores, 50, torch.tensor([False, True, False, True]))
    # in padded company, with removed tokens anywhere
    padded = torch.cat([torch.zeros(4, 6), scores, torch.zeros(4, 3)], dim=1)
    assert torch.equal(sample(padded, 50, torch.ones(4, dtype=torch.bool))[1::2, 6:-3], picked[1::2])
    few = at_most(picked, scores, torch.tensor([5, 1, 50, 2]))
    assert few.sum(1).tolist() == [5, 1, int(picked[2].sum()), 2]
    for b in range(4):
        dropped = picked[b] & ~few[b]
        assert not dropped.any() or scores[b][few[b]].min() >= scores[b][dropped].max()


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax"])
def test_images_that_keep_different_numbers(pool):
    """Each as alone, whatever else is in the batch; the padding is in no feature."""
    model = timm_resnas.reduce_tokens(make("vit_small_patch14_reg4_dinov2", global_pool=pool), "ats")
    x = images(model, 6) * torch.linspace(0.1, 4, 6)[:, None, None, None]
    with torch.inference_mode():
        states = list(model.steps(x))
        counts = [None if there is None else there.sum(1) for _, _, there in states]
        assert len(set(counts[-1].tolist())) > 1
        assert all((b <= a).all() for a, b in itertools.pairwise(c for c in counts if c is not None))
        assert all(tokens.shape[1] <= 5 + 16 for tokens, *_ in states)
        for order in (torch.arange(6), torch.tensor([4, 1])):
            assert_close(model(x[order]), torch.cat([model(x[i : i + 1]) for i in order]), rtol=1e-5, atol=1e-5)
        maps = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert torch.equal(maps[-1].flatten(2).any(1).sum(1), counts[-1])
    assert not torch.equal(counts[1], counts[-1])


def test_a_cap_on_sampled_tokens():
    base = make("deit_tiny_patch16_224", img_size=64)
    x = images(base)
    for most, expected in ((20, 20), (0.25, 16), (0.01, 8)):
        model = timm_resnas.reduce_tokens(base, "ats", blocks=[1], max_tokens=most)
        with torch.inference_mode():
            (_, (tokens, kept, there), *_) = model.steps(x)
        counts = torch.full((3,), kept.shape[1]) if there is None else there.sum(1)
        assert tokens.shape[1] == 1 + counts.max() and counts.max() <= expected


# -- costs, export, what is refused ------------------------------------------------------------------------------------


def test_multiply_accumulates():
    base = make("deit_tiny_patch16_224")  # 16 patches, 4 blocks of width 96
    ends = 16 * 96 * 3 * 64 + 96 * 7

    def blocks(*tokens):
        return sum(sum(layer.macs for layer in (attention(t, 96, 3, 32), mlp(t, 96, 384))) for t in tokens)

    def predictor(n):
        return n * (96 * 96 + 96 * 48 + 48 * 24 + 24 * 2)

    assert count_macs(base, (3, 32, 32)) == ends + blocks(17, 17, 17, 17)
    model = timm_resnas.reduce_tokens(base, locations=[1, 3], keep_ratios=[0.7, 0.3])
    found = ends + blocks(17, 12, 12, 5) + predictor(16) + predictor(11)
    assert count_macs(model, (3, 32, 32)) == found == count_macs(model.train(), (3, 32, 32))
    model = timm_resnas.reduce_tokens(base, "patchmerger", after_block=3, num_tokens=5)
    assert count_macs(model, (3, 32, 32)) == ends + blocks(17, 17, 17, 6) + 2 * 5 * 16 * 96
    model = timm_resnas.reduce_tokens(base, "patchmerger", after_block=[1, 3], num_tokens=[9, 4])
    merged = 2 * 9 * 16 * 96 + 2 * 4 * 9 * 96
    assert count_macs(model, (3, 32, 32)) == ends + blocks(17, 10, 10, 5) + merged
    model = timm_resnas.reduce_tokens(base, "ats", blocks=[2, 3], max_tokens=9)

    def sampled(entering, leaving):  # the class token's row twice: for the scores, and for the output
        rows = 3 * 96 * 96 * entering + 96 * entering + 2 * leaving * entering * 96
        return rows + leaving * (96 * 96 + 2 * 96 * 384)

    assert count_macs(model, (3, 32, 32)) == ends + blocks(17, 17) + sampled(17, 10) + sampled(10, 10)
    assert macs_vary(model) and not macs_vary(base)
    # what they are for images, each by the number of tokens that it keeps
    x, kept = images(model, 6), []
    for one in x.split(1):
        *_, before, after = (tokens.shape[1] for tokens, _, _ in model.steps(one))
        kept.append(ends + blocks(17, 17) + sampled(17, before) + sampled(before, after))
    assert expected_macs(model, x) == sum(kept) / 6 <= count_macs(model, (3, 32, 32)) and len(set(kept)) > 1
    fixed = timm_resnas.reduce_tokens(base, "ats", blocks=[2, 3], keep_ratios=[0.5, 0.5])
    assert not macs_vary(fixed) and expected_macs(fixed, x) == count_macs(fixed, (3, 32, 32))


@pytest.mark.parametrize("method", ["dynamicvit", "patchmerger"])
def test_exported(method):
    model = timm_resnas.reduce_tokens(make("deit_tiny_patch16_224"), method)
    x = images(model)
    with torch.no_grad():
        assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize(
    ("name", "method", "options", "message"),
    [
        ("deit_tiny_patch16_224", "tome", {}, "method must be dynamicvit, ats, patchmerger, positions, got 'tome'"),
        ("deit_tiny_patch16_224", "dynamicvit", dict(locations=[3, 1]), "locations must be rising .* from 0 to 3"),
        ("deit_tiny_patch16_224", "dynamicvit", dict(locations=[4]), "locations must be rising .* from 0 to 3"),
        ("deit_tiny_patch16_224", "dynamicvit", dict(keep_ratios=[0.5, 0.7, 0.3]), "none higher than the one before"),
        ("deit_tiny_patch16_224", "dynamicvit", dict(keep_ratios=1.5), "keep_ratios must be shares"),
        ("deit_tiny_patch16_224", "ats", dict(max_tokens=0), "max_tokens must be a whole number from 1, or a share"),
        ("deit_tiny_patch16_224", "patchmerger", dict(after_block=4), "after_block must be .* from 1 to 3, got 4"),
        ("deit_tiny_patch16_224", "patchmerger", dict(num_tokens=2.5), "num_tokens must be a whole number from 1"),
        (
            "deit_tiny_patch16_224",
            "patchmerger",
            dict(after_block=[]),
            "after_block must be .* from 1 to 3, got \\[\\]",
        ),
        ("deit_tiny_patch16_224", "patchmerger", dict(after_block=[2, 2]), "must be rising numbers, got"),
        (
            "deit_tiny_patch16_224",
            "patchmerger",
            dict(after_block=[1, 2, 3], num_tokens=[8, 4]),
            "one for each of the 3 mergers; got \\[8, 4\\]",
        ),
        ("vit_base_patch16_siglip_224", "ats", {}, "what the class token sees; this VisionTransformer has none"),
        ("vit_elastic", "ats", dict(blocks=[1]), "ats knows timm's Attention, but blocks.1.attn is a Absent"),
        ("beit_base_patch16_224", "dynamicvit", {}, "timm's VisionTransformer; a Beit has its own forward"),
        ("vit_base_patch16_rpn_224", "dynamicvit", {}, "knows timm's Block, but blocks.3 is a ResPostBlock"),
        ("vit_dlittle_patch16_reg1_gap_256", "dynamicvit", {}, "but blocks.3.attn is a DiffAttention"),
        ("test_resnet", "ats", {}, "timm's VisionTransformer; a ResNet has its own forward"),
        ("vit_tokens", "ats", {}, "are reduced already, by dynamicvit"),
    ],
)
def test_what_does_not_fit_is_named(name, method, options, message):
    model = timm.create_model(name, device="meta", **BASES.get(name, {}))
    with pytest.raises(TokenError, match=message):
        timm_resnas.reduce_tokens(model, method, **options)
    assert "TokenReduction" not in [c.__name__ for c in type(model).__mro__] or name == "vit_tokens"


def test_other_wrong_input():
    model = make("deit_tiny_patch16_224")
    with pytest.raises(TypeError, match="num_tokens"):
        timm_resnas.reduce_tokens(model, "ats", num_tokens=4)
    with pytest.raises(TypeError, match="num_tokens"):
        timm.create_model("vit_tokens", method="ats", num_tokens=4)
    with pytest.raises(ValueError, match="base must be the name of a vision transformer that timm knows"):
        timm.create_model("vit_tokens", base="vit_tokens")
    with pytest.raises(TokenError, match="was not made by timm.create_model"):
        timm_resnas.reduce_tokens(VisionTransformer(**BASES["deit_tiny_patch16_224"]))
    with pytest.raises(ValueError, match="those of vit_tokens change"):
        timm_resnas.reduce_tokens(model).forward_intermediates(images(model), attn_mask=torch.ones(17, 17))


def test_the_benchmark_of_fewer_tokens(tmp_path, capsys):
    timm_resnas.save_pretrained(make("deit_tiny_patch16_224"), tmp_path / "base")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)):
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    given = ["--model", str(tmp_path / "base"), "--probe", f"imagefolder:{tmp_path / 'images'}", "--tokens", "0.5"]
    given += ["--seeds", "2", "--held", "4"]
    benchmark_shrink.main([*given, "--json", str(tmp_path / "rows")])
    rows = {r["network"]: r for r in json.loads((tmp_path / "rows").read_text())["rows"]}
    assert list(rows) == [
        *("full model", "0.5, random predictors", "0.5, ATS", "ATS, its own numbers there"),
        "ATS, in every block from there",
    ]
    drawn = rows["0.5, random predictors"]["cosine"]
    assert drawn[0] != drawn[1] and max(drawn) < rows["ATS, its own numbers there"]["cosine"][0] < 1
    assert rows["0.5, ATS"]["macs"] < rows["ATS, its own numbers there"]["macs"] < 1.1
    with pytest.raises(SystemExit):
        benchmark_shrink.main(["--model", str(tmp_path / "base"), "--probe", "digits"])
    assert "--calibrate is missing; only --tokens needs none" in capsys.readouterr().err


def test_a_model_that_was_refused_is_what_it_was():
    model = timm.create_model("test_vit")
    kind = type(model)
    with pytest.raises(TokenError, match="rising numbers of blocks"):
        reduce_in_place(model, "dynamicvit", locations=[99])
    assert type(model) is kind
