"""SReT: what the released code computes, what the paper counts, and that the model is a function."""

import json

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import set_fused_attn
from torch.testing import assert_close

from timm_resnas.models.sret import checkpoint_filter_fn
from timm_resnas.models.sret_layers import GroupAttention, fixed_permutation
from timm_resnas.nas.count import count_macs

T = dict(
    base_dims=(32, 32, 32),
    depths=(4, 10, 6),
    recursive_num=(2, 5, 3),
    num_heads=(2, 4, 8),
    groups1=(8, 4, 1),
    groups2=(2, 1, 1),
    mlp_ratio=3.6,
    np_mlp_ratio=1,
)
LT = dict(T, mlp_ratio=4.0)
S = dict(T, base_dims=(42, 42, 42), num_heads=(3, 6, 12), mlp_ratio=3.0, np_mlp_ratio=2)
FULL = dict(groups1=(1, 1, 1), groups2=(1, 1, 1))
# name or configuration, image size, parameters, MACs: measured on the released code
TABLE = [
    ("sret_tiny", T, 224, 4_755_979, 1_112_444_672),
    ("sret_ltiny", LT, 224, 4_988_024, 1_164_477_184),
    (None, dict(LT, groups1=(16, 14, 1), groups2=(1, 1, 1)), 224, 4_988_024, 1_224_537_856),
    ("sret_small", S, 224, 20_899_692, 4_172_819_112),
    ("sret_tiny_unsliced", dict(T, **FULL), 224, 4_755_979, 1_365_682_944),
    ("sret_ltiny_unsliced", dict(LT, **FULL), 224, 4_988_024, 1_417_715_456),
    ("sret_small_unsliced", dict(S, **FULL), 224, 20_899_692, 4_671_381_960),
    ("sret_tiny_unsliced", dict(T, **FULL), 384, 4_853_259, 6_408_361_984),
    ("sret_small_unsliced", dict(S, **FULL), 384, 21_091_212, 18_443_154_240),
    ("sret_small_unsliced", dict(S, **FULL), 512, 21_317_004, 42_671_708_352),
]
MINI = dict(img_size=32, patch_size=2, base_dims=(8, 8, 8), num_heads=(1, 2, 4), num_classes=5)


def mini(seed=0, **kwargs):
    """A small network with no parameter left at 0 or 1, in eval mode."""
    torch.manual_seed(seed)
    model = timm.create_model("sret", **{**MINI, **kwargs})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def images(size=32, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def count(name, size=224, **kwargs):
    """Parameters and MACs of a model."""
    model = timm.create_model(name, device="meta", img_size=size, **kwargs)
    return dict(macs=count_macs(model, (3, size, size)), params=sum(p.numel() for p in model.parameters()))


class Golden:
    """Tensors of the released code, and our model with their weights."""

    def __init__(self, path, **kwargs):
        with safetensors.safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
            self.tensors = {k: file.get_tensor(k) for k in file.keys()}
        self.released = {
            k.removeprefix("state_dict/"): v for k, v in self.tensors.items() if k.startswith("state_dict/")
        }
        names = dict(image_size="img_size", heads="num_heads", depth="depths")
        args = {names.get(k, k): v for k, v in config.items() if k not in ("patch_size", "stride")}
        args = {**FULL, **args, **kwargs}
        self.model = timm.create_model("sret", **args).eval()
        self.model.load_state_dict(checkpoint_filter_fn(self.released, self.model))

    def __getitem__(self, name):
        return self.tensors[name]

    @torch.no_grad()
    def logits(self):
        return self.model(self["input"])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["sret_a", "sret_b"])
def test_logits_of_the_released_code(golden, name, fused):
    set_fused_attn(fused)
    try:
        case = Golden(golden(name))
    finally:
        set_fused_attn(True)
    assert_close(case.logits(), case["logits"], rtol=0, atol=1e-4)


def test_logits_with_recorded_permutations(golden, monkeypatch):
    path = golden("sret_c")
    case = Golden(path, eval_permutation="identity")
    assert_close(case.logits(), case["logits_identity_perm"], rtol=0, atol=1e-4)

    drawn = iter([case["perm/0"], case["perm/1"]])
    monkeypatch.setattr(torch, "randperm", lambda n, device: next(drawn))
    case = Golden(path, eval_permutation="random")  # the released behaviour: one draw per recursive pass, in order
    assert_close(case.logits(), case["logits"], rtol=0, atol=1e-4)
    assert next(drawn, None) is None
    assert (case["logits"] - case["logits_identity_perm"]).abs().max() > 0.01  # the permutations matter


def test_released_checkpoint_through_create_model(golden, tmp_path):
    """Wrapped as published, loaded strictly by timm, at another image size."""
    case = Golden(golden("sret_a"))
    torch.save({"model": {f"module.{k}": v for k, v in case.released.items()}}, tmp_path / "sret.pth")
    args = {k: v for k, v in case.model._model_args.items() if k != "img_size"}
    overlay = dict(file=str(tmp_path / "sret.pth"), num_classes=10)
    load = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    model = timm.create_model("sret", img_size=64, **load, **args).eval()
    with torch.no_grad():
        assert_close(model(case["input"]), case["logits"], rtol=0, atol=1e-4)
    larger = timm.create_model("sret", img_size=96, **load, **args).eval()
    assert larger.pos_embed.shape[-2:] == (12, 12)
    assert torch.equal(larger.stages[2].blocks[0].mlp.fc1.weight, model.stages[2].blocks[0].mlp.fc1.weight)


def test_copies_of_a_shared_block_have_to_agree(golden):
    case = Golden(golden("sret_a"))
    # released copies fill an unshared network of the same function
    unshared = timm.create_model("sret", **{**case.model._model_args, "recursive_num": (4, 6, 6)}).eval()
    unshared.load_state_dict(checkpoint_filter_fn(case.released, unshared))
    with torch.no_grad():
        assert torch.equal(unshared(case["input"]), case.logits())
    # but where they differ, they do not fit a shared block
    key = "transformers.0.blocks.2.norm1.weight"
    with pytest.raises(ValueError, match="copies of stages.0.blocks.0.norm1.weight differ"):
        checkpoint_filter_fn({**case.released, key: case.released[key] + 1}, case.model)


@pytest.mark.parametrize(("name", "config", "size", "params", "macs"), TABLE)
def test_size_of_the_paper_s_models(name, config, size, params, macs):
    expected = dict(macs=macs, params=params)
    assert count("sret", size, **config) == expected
    if name:
        assert count(name, size) == expected


def test_weights_are_stored_once(tmp_path):
    model = timm.create_model("sret_tiny", device="meta")
    assert len(list(model.parameters())) == 341
    assert len(model.state_dict()) == 341 + 9  # and batch norm statistics; permutations are not stored
    scalars = [p for n, p in model.named_parameters() if n.endswith((".identity", ".branch"))]
    assert sum(p.numel() for p in scalars) == 80


@pytest.mark.parametrize("size", [32, 40, 30])
def test_evaluation_is_a_function(size, tmp_path):
    """Same logits bit for bit: called again, under another seed, copied, saved and loaded."""
    model, x = mini(), images(size)
    with torch.no_grad():
        logits = model(x)
        torch.manual_seed(7)
        assert torch.equal(model(x), logits)
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        torch.manual_seed(8)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(loaded(x), logits)
        other_seed = mini(permutation_seed=100)
        assert not torch.equal(other_seed(x), logits)


def test_random_evaluation_and_training_are_seedable():
    model, x = mini(eval_permutation="random"), images()
    for module in (model, mini().train()):
        with torch.no_grad():
            torch.manual_seed(0)
            first, second = module(x), module(x)
            torch.manual_seed(0)
            assert torch.equal(module(x), first)
        assert not torch.allclose(first, second)


def test_gradient_checkpointing_draws_the_same_permutations():
    model, x = mini().train(), images()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert_close(grads[0], grads[1])


@pytest.mark.parametrize("num_tokens", [1, 7, 784])
def test_fixed_permutation(num_tokens):
    perm = fixed_permutation(num_tokens, 0, torch.device("cpu"))
    assert torch.equal(perm.sort().values, torch.arange(num_tokens))
    if num_tokens == 784:
        assert perm[:6].tolist() == [182, 591, 141, 528, 517, 219]  # never to change: trained networks rely on it
        assert not torch.equal(perm, fixed_permutation(num_tokens, 1, torch.device("cpu")))
        assert (perm[1:] - perm[:-1]).abs().float().mean() > 200  # a random one has 784 / 3


def test_permutation_buffers_follow_init_and_size():
    model = timm.create_model("sret", device="meta", **MINI).to_empty(device="cpu")
    model.init_weights()
    attn = model.stages[0].blocks[0].attn
    expected = torch.stack([fixed_permutation(256, seed, torch.device("cpu")) for seed in (0, 1)])
    assert torch.equal(attn.perm, expected)
    assert not [k for k in model.state_dict() if "perm" in k]
    model.set_input_size(64)
    assert torch.equal(attn.perm[1], fixed_permutation(1024, 1, torch.device("cpu")))
    assert model.pos_embed.shape[-2:] == (32, 32)


def grouped_attention(attn, x, index, perm):
    """The obvious version: one softmax over all tokens of the image, other groups masked out."""
    P = attn.num_prefix_tokens
    n = x.shape[1] - P
    size = -(-n // attn.groups[index])
    group = torch.empty(n, dtype=torch.long)
    group[torch.arange(n) if perm is None else perm] = torch.arange(n) // size
    group = torch.cat([torch.full((P,), -1), group])
    allowed = (group[:, None] == group[None]) | (group[:, None] == -1) | (group[None] == -1)
    q, k, v = attn.qkv(x).reshape(x.shape[0], P + n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1)) / attn.head_dim**0.5
    out = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    return attn.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("num_tokens", [24, 25, 9, 3])
@pytest.mark.parametrize("index", [0, 1])
def test_grouped_attention_is_masked_attention(index, num_tokens, prefix, fused):
    """Also where 8 groups do not divide the tokens."""
    torch.manual_seed(0)
    attn = GroupAttention(16, 2, num_tokens, groups=(8, 2), permute=(False, True), num_prefix_tokens=prefix)
    attn.eval().fused_attn = fused
    x = torch.randn(2, prefix + num_tokens, 16)
    with torch.no_grad():
        perm = attn.permutation(num_tokens, index, x.device)
        assert (perm is None) == (index == 0)
        assert_close(attn(x, index), grouped_attention(attn, x, index, perm))


def test_second_application_of_a_stage_is_the_recursive_pass():
    """Every second application is marked, whatever the sharing: with three recursions the marking drifts."""
    model = mini(depths=(6, 2, 2), recursive_num=(2, 1, 1), groups1=(8, 4, 2), groups2=(2, 1, 1))
    assert [b.attn.groups for b in model.stages[0].blocks] == [[8, 2, 8], [2, 8, 2]]
    assert [b.attn.permute for b in model.stages[0].blocks] == [[False, True, False], [True, False, True]]
    assert model.stages[1].blocks[0].attn.groups == [4, 1]
    assert not any(model.stages[1].blocks[0].attn.permute)  # one group: nothing to permute


def test_drop_path_of_the_released_code():
    model = timm.create_model("sret_tiny", drop_path_rate=0.1, device="meta")
    rates = [[getattr(b.drop_path, "drop_prob", 0.0) for b in stage.blocks] for stage in model.stages]
    for got, wanted in zip(rates, [[0, 0.005], [0.02, 0.025, 0.03, 0.035, 0.04], [0.07, 0.075, 0.08]], strict=True):
        assert got == pytest.approx(wanted)


@pytest.mark.parametrize(("residual", "names"), [("both", 2), ("identity", 1), ("branch", 1), ("none", 0)])
def test_residual_variants(residual, names):
    model = mini(residual=residual)
    res = model.stages[0].blocks[0].res1
    assert len(list(res.parameters())) == names
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    a = res.identity if residual in ("both", "identity") else 1
    b = res.branch if residual in ("both", "branch") else 1
    assert_close(res(x, y), a * x + b * y)
    assert model(images()).shape == (2, 5)


def test_without_projections_and_with_class_token():
    with torch.no_grad():
        bare = mini(np_mlp_ratio=0)
        assert not [n for n, _ in bare.named_parameters() if ".nll." in n]
        assert bare(images()).shape == (2, 5)
        model = mini(class_token=True)
        features = model.forward_features(images())
        assert features.shape == (2, 1 + 16, 32)
        assert_close(model.forward_head(features), model.head.fc(model.head.norm(features[:, 0])))
        output, maps = model.forward_intermediates(images())
        assert_close(output, features)
        assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
        # every patch reaches the token, though groups keep the patches apart
        model = mini(class_token=True, depths=(1, 1, 1), recursive_num=(1, 1, 1))
        changed = images()
        changed[:, :, -2:, -2:] += 1
        assert not torch.allclose(model(images()), model(changed))


@pytest.mark.parametrize("size", [(224, 224), (160, 160), (192, 256), (200, 200), (90, 131)])
def test_any_image_size(size):
    model = timm.create_model("sret_tiny", num_classes=3).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 3) and logits.isfinite().all()


def test_batch_of_images_is_images_one_by_one():
    model, x = mini(), images(batch=3)
    with torch.no_grad():
        assert_close(model(x), torch.cat([model(x[i : i + 1]) for i in range(3)]))


def test_set_recursions_uses_the_first_passes():
    model, x = mini(), images()
    with torch.no_grad():
        full = model(x)
        model.set_recursions(1)
        shallow = model(x)
        model.set_recursions()
        assert torch.equal(model(x), full)
    assert not torch.allclose(full, shallow)
    with pytest.raises(ValueError, match="1 to 2"):
        model.set_recursions(3)


@pytest.mark.parametrize(
    ("kwargs", "change"),
    [
        (dict(class_token=True), lambda m: None),  # global_pool follows class_token
        (dict(class_token=True, global_pool=""), lambda m: None),
        (dict(class_token=True, num_classes=0), lambda m: None),
        (dict(class_token=True), lambda m: m.reset_classifier(3)),
        (dict(class_token=True), lambda m: m.reset_classifier(3, "")),
        (dict(class_token=True, global_pool=""), lambda m: m.reset_classifier(3, "token")),
        (dict(global_pool="avgmax"), lambda m: m.reset_classifier(3)),
        (dict(), lambda m: m.reset_classifier(3, "max")),
        (dict(), lambda m: m.set_recursions(1)),
        (dict(recursions=1), lambda m: m.set_recursions()),
        (dict(img_size=(32, 48)), lambda m: m.set_input_size((48, 32))),
    ],
)
def test_what_is_saved_is_what_loads(kwargs, change, tmp_path):
    model = mini(**kwargs)
    change(model)
    x = torch.randn(2, 3, *(2 * side for side in model.pos_embed.shape[2:]))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert loaded.global_pool == model.global_pool and loaded.recursions == model.recursions


def test_input_size_that_does_not_change():
    model, x = mini(img_size=(32, 48)), torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected = model(x)
        for size in (dict(), dict(img_size=None, patch_size=None), dict(patch_size=2), dict(img_size=(32, 48))):
            model.set_input_size(**size)
            assert torch.equal(model(x), expected)
    assert model._model_args["img_size"] == (32, 48)
    with pytest.raises(ValueError, match="patch_size=4"):
        model.set_input_size(patch_size=4)


def test_very_deep_variant():
    """More than 100 layers, as the paper's abstract: 108 from 27 blocks."""
    deep = dict(depths=(20, 56, 32), recursive_num=(5, 14, 8))
    assert 15.0e6 < count("sret", **{**T, **deep})["params"] < 15.5e6
    model = timm.create_model("sret", **deep, **MINI)
    model(images()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(depths=(2, 2)), "lengths are"),
        (dict(depths=(2, 5, 2), recursive_num=(1, 2, 1)), "5 applications of 2 blocks"),
        (dict(groups1=(0, 1, 1)), "must be positive"),
        (dict(num_heads=(2, 3, 4)), "multiples of the one before"),
        (dict(patch_size=16), "patch_size=16"),
        (dict(residual="some"), "residual='some'"),
        (dict(eval_permutation="some"), "eval_permutation='some'"),
        (dict(global_pool="token"), "without a class token"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        mini(**kwargs)
