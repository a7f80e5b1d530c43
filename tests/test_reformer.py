"""Reformer: a reference implementation's numbers, attention by hashing against exact, reversible against autograd."""

import json
import math
from statistics import NormalDist

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, set_fused_attn, set_scriptable
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from timm_resnas.models._reversible import ReversibleBlocks
from timm_resnas.models.reformer import (
    LshAttention,
    checkpoint_filter_fn,
    fixed_rotations,
    hash_buckets,
    lsh_attention,
)

MINI = dict(
    img_size=32,
    patch_size=4,
    embed_dim=24,
    depth=3,
    num_heads=2,
    bucket_size=4,
    num_hashes=2,
    mlp_ratio=2.0,
    num_classes=5,
)
DROPS = dict(proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.3)


def mini(dtype=torch.float32, **kwargs):
    """A small network with no parameter left at 0 or 1, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model("reformer_tiny", **{**MINI, **kwargs})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.to(dtype).eval()


def images(size=32, batch=2):
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def heads(num_tokens, num_heads=2, head_dim=8, batch=2):
    """Queries and values."""
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(2, batch, num_heads, num_tokens, head_dim, generator=generator).unbind(0)


def backward(model, x):
    """Output and all gradients, that of the input first."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    out = model(x)
    out.square().mean().backward()
    return out.detach(), [x.grad, *(p.grad.clone() for p in model.parameters())]


def exact_attention(qk, v, scale, visible=None):
    """The obvious version; `visible` [B, heads, N, N] counts how often a query sees a key."""
    logits = scale * qk @ F.normalize(qk, dim=-1).mT
    logits = logits.masked_fill(torch.eye(qk.shape[2], dtype=torch.bool), -5e4)
    if visible is not None:
        logits = logits + visible.log()
    return logits.softmax(-1) @ v


# -- the reference implementation -------------------------------------------------------------------------------------


class Golden:
    """Tensors of reformer-pytorch, and our layers with their weights and rotations."""

    def __init__(self, path, **kwargs):
        with safetensors.safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
            self.tensors = {k: file.get_tensor(k) for k in file.keys()}
        released = {k.removeprefix("state_dict/"): v for k, v in self.tensors.items() if k.startswith("state_dict/")}
        released |= {k.replace(".blocks.", ".irrev_blocks."): v for k, v in released.items()}  # as in its checkpoints
        args = dict(embed_dim=config["dim"], depth=config["depth"], num_heads=config["heads"])
        args |= dict(bucket_size=config["bucket_size"], num_hashes=config["n_hashes"])
        args |= dict(ff_chunks=config["ff_chunks"], mlp_ratio=config["ff_mult"], img_size=64, patch_size=8)
        self.model = timm.create_model("reformer_tiny", **args, **kwargs).eval()
        filtered = checkpoint_filter_fn(released, self.model)
        keys = self.model.load_state_dict(filtered, strict=False)
        assert not keys.unexpected_keys and not [k for k in keys.missing_keys if k.startswith("blocks.")]
        for i, block in enumerate(self.model.blocks):
            block.attn.rotations = self.tensors[f"rotations/{i}"]
        self.config = config

    def __getitem__(self, name):
        return self.tensors[name]


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_outputs_of_the_reference(golden, fused):
    set_fused_attn(fused)
    try:
        case = Golden(golden("reformer_a"))
    finally:
        set_fused_attn(True)
    model, x = case.model, case["input"]
    assert_close(model.blocks(x), case["logits"], rtol=0, atol=1e-5)
    attn = model.blocks[0].attn
    assert_close(attn(x), case["attn_output"], rtol=0, atol=1e-5)
    model.set_attention("exact")
    assert_close(attn(x), case["full_attn_output"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_buckets_of_the_reference(golden):
    """Every one of them, in both layers."""
    case = Golden(golden("reformer_a"))
    x1 = x2 = case["input"]
    num_buckets = case.config["seq"] // case.config["bucket_size"]
    for i, block in enumerate(case.model.blocks):
        _, buckets = block.attend(x2, None)
        expected = case[f"eval/buckets_{i}"].reshape(*buckets.shape)  # numbered on from round to round
        offset = num_buckets * torch.arange(case.config["n_hashes"])[:, None]
        assert torch.equal(buckets.long() + offset, expected)
        x1, x2 = block(x1, x2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("reversible", [True, False])
def test_gradients_of_the_reference(golden, reversible, training):
    case = Golden(golden("reformer_a"), reversible=reversible, rotations="fixed")
    x = case["input"].clone().requires_grad_()
    out = case.model.train(training).blocks(x)
    assert_close(out, case["logits"], rtol=0, atol=1e-5)
    (out * case["grad/output_weight"]).mean().backward()
    block = case.model.blocks[0]
    for grad, name in (
        (x.grad, "input"),
        (block.attn.qk.weight.grad, "layers.blocks.0.f.net.fn.toqk.weight"),
        (block.mlp.fc1.weight.grad, "layers.blocks.0.g.net.fn.fn.w1.weight"),
    ):
        assert_close(grad, case[f"grad/{name}"], rtol=1e-4, atol=1e-8)


# -- attention by hashing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("num_tokens", [16, 15, 9])
def test_two_buckets_are_exact_attention(num_tokens, fused):
    """Both chunks see both, whatever is in which bucket; also with padding."""
    qk, v = heads(num_tokens)
    buckets = torch.randint(2, (2, 2, 1, num_tokens))
    expected = exact_attention(qk, v, 0.3)
    assert_close(lsh_attention(qk, v, buckets, 8, 0.3, fused=fused), expected)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("num_tokens", [32, 27, 5, 8, 2])
def test_one_bucket_of_all_tokens_is_exact_attention(num_tokens, fused):
    set_fused_attn(fused)
    try:
        lsh, exact = (LshAttention(16, 2, num_tokens, 16, 3, exact=e, seed=1).eval() for e in (False, True))
    finally:
        set_fused_attn(True)
    exact.load_state_dict(lsh.state_dict())
    x = torch.randn(2, num_tokens, 16)
    with torch.no_grad():
        qk, v = (f(x).unflatten(2, (2, 8)).transpose(1, 2) for f in (lsh.qk, lsh.v))
        expected = lsh.proj(exact_attention(qk, v, 8**-0.5).transpose(1, 2).flatten(2))
        assert_close(lsh(x), expected)
        assert_close(exact(x), expected)
        assert lsh.attend(x, None)[1] is None  # nothing was hashed


def what_is_seen(buckets, bucket_size):
    """How often a query sees a key, round by round and token by token, for a sequence of whole chunks."""
    rounds, num = buckets.shape
    chunks = []
    for r in range(rounds):
        order = sorted(range(num), key=lambda i: (buckets[r, i].item(), i))
        chunks += [order[i : i + bucket_size] for i in range(0, num, bucket_size)]
    seen = torch.zeros(num, num)
    for i, chunk in enumerate(chunks):
        for query in chunk:
            for key in chunk + chunks[i - 1]:
                seen[query, key] += 1
    return seen


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_hashing_is_exact_attention_to_what_is_seen(rounds, fused):
    """One softmax over all rounds, in which a key counts as often as it is seen."""
    qk, v = heads(24)
    buckets = hash_buckets(qk, torch.randn(8, rounds, 3, generator=torch.Generator().manual_seed(2)))
    assert buckets.shape == (2, 2, rounds, 24) and buckets.max() < 6
    seen = torch.stack([torch.stack([what_is_seen(b, 4) for b in image]) for image in buckets])
    assert 0 < (seen == 0).float().mean() < 1 and (rounds == 1 or seen.max() > 1)
    expected = exact_attention(qk, v, 0.5, visible=seen)
    assert_close(lsh_attention(qk, v, buckets, 4, 0.5, fused=fused), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_padding_is_not_seen(rounds, fused):
    """It sorts behind all tokens; what is there instead changes nothing. Gradients stay finite."""
    qk, v = heads(19)
    qk.requires_grad_()
    buckets = hash_buckets(qk, torch.randn(8, rounds, 3))
    out = lsh_attention(qk, v, buckets, 4, 0.5, fused=fused)
    qk24, v24 = (torch.cat([t.detach(), torch.zeros(2, 2, 5, 8)], dim=2) for t in (qk, v))
    seen = F.pad(buckets.long(), (0, 5), value=99)
    seen = torch.stack([torch.stack([what_is_seen(b, 4) for b in image]) for image in seen])
    seen[..., 19:] = 0
    seen += torch.eye(24) * (seen.sum(-1, keepdim=True) == 0)  # padded queries are cut off below
    expected = exact_attention(qk24, v24, 0.5, visible=seen)[:, :, :19]
    assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert qk.grad.isfinite().all()


def test_a_token_alone_attends_to_itself():
    """One token, and one whose neighbours are all padding."""
    qk, v = heads(1)
    assert_close(lsh_attention(qk, v, torch.zeros(2, 2, 3, 1, dtype=torch.long), 4, 1.0), v)
    qk, v = heads(5)
    buckets = torch.arange(5).expand(2, 2, 1, 5)  # chunks (0, 1), (2, 3), (4, padding), padding
    out = lsh_attention(qk, v, buckets, 2, 1.0)
    logits = (qk[:, :, 4:] @ F.normalize(qk[:, :, 2:4], dim=-1).mT).softmax(-1)
    assert_close(out[:, :, 4:], logits @ v[:, :, 2:4])


@torch.no_grad()
def test_more_rounds_come_closer_to_exact_attention():
    torch.manual_seed(0)
    qk, v = heads(256, head_dim=16)
    expected = exact_attention(qk, v, 0.25)
    errors = []
    for rounds in (1, 2, 4, 8):
        buckets = hash_buckets(qk, fixed_rotations(16, rounds, 32, 0, qk.device))
        errors.append((lsh_attention(qk, v, buckets, 8, 0.25) - expected).square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2


def test_hashing_finds_near_queries():
    """The nearest of many keys is in sight much more often than by chance."""
    torch.manual_seed(0)
    qk = F.normalize(torch.randn(1, 1, 512, 16), dim=-1)
    qk[:, :, 256:] = F.normalize(qk[:, :, :256] + 0.05 * torch.randn(1, 1, 256, 16), dim=-1)
    seen = what_is_seen(hash_buckets(qk, fixed_rotations(16, 1, 64, 0, qk.device))[0, 0], 8)
    pairs = seen + seen.T > 0
    assert pairs[torch.arange(256), torch.arange(256, 512)].float().mean() > 10 * pairs.float().mean()


def normal(index):
    """The fixed number of an index, by Python's own arithmetic."""
    x = (index + 0x9E3779B1) % 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return NormalDist().inv_cdf(((x ^ x >> 16) // 2**9 + 0.5) / 2**23)


def test_fixed_rotations():
    rotations = fixed_rotations(64, 4, 64, 0, torch.device("cpu"))
    assert rotations.shape == (64, 4, 32)
    # never to change: trained networks rely on them
    assert_close(rotations[0, 0, :4], torch.tensor([normal(i) for i in range(4)]), rtol=0, atol=1e-5)
    assert abs(rotations.mean()) < 0.03 and abs(rotations.std() - 1) < 0.03 and rotations.abs().max() < 6
    assert not torch.equal(rotations, fixed_rotations(64, 4, 64, 1, torch.device("cpu")))
    directions = F.normalize(rotations.flatten(1), dim=0)
    assert (directions.T @ directions - torch.eye(128)).abs().max() < 0.6  # no two alike


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_many_buckets_are_numbered(dtype):
    num = 128 if dtype == torch.uint8 else 129
    buckets = hash_buckets(torch.randn(1, 1, 4096, 64), torch.randn(64, 1, num))
    assert buckets.dtype == dtype and buckets.max() > 250 and buckets.min() >= 0
    assert len(buckets.unique()) > 200


# -- the reversible layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotations", ["fresh", "fixed"])
@pytest.mark.parametrize("attention", ["lsh", "exact"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_reversible_is_plain_autograd(rotations, attention, chunks):
    """With dropout and drop path: the same random numbers. Outputs bit for bit, gradients in float64 to rounding."""
    args = dict(rotations=rotations, attention=attention, ff_chunks=chunks, **DROPS)
    reversible, plain = (mini(torch.float64, reversible=r, **args).train() for r in (True, False))
    assert len([m for m in plain.modules() if isinstance(m, DropPath)]) == 2
    x = images().double()
    (out, grads), (expected, expected_grads) = backward(reversible, x), backward(plain, x)
    assert torch.equal(out, expected)
    assert_close(grads, expected_grads, rtol=1e-9, atol=1e-12)
    again, _ = backward(reversible, x)
    assert torch.equal(again, out)
    torch.manual_seed(2)
    assert not torch.allclose(reversible(x), out)  # it was random


def test_reversible_is_plain_autograd_in_float32():
    results = [backward(mini(reversible=r, **DROPS).train(), images()) for r in (True, False)]
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_recomputation_uses_the_same_buckets(monkeypatch):
    """Those of the forward pass, which rounding might change."""
    attend, calls = LshAttention.attend, []

    def record(self, x, buckets):
        y, used = attend(self, x, buckets)
        calls.append((buckets, used))
        return y, used

    monkeypatch.setattr(LshAttention, "attend", record)
    mini().train()(images()).sum().backward()
    assert [given is None for given, _ in calls] == [True] * 3 + [False] * 3
    for (_, used), (given, again) in zip(calls[:3], reversed(calls[3:]), strict=True):
        assert torch.equal(given, used) and torch.equal(again, used)


def test_recomputation_leaves_the_generator_alone():
    model = mini(**DROPS).train()
    out = model(images())
    state = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_inputs_come_back_from_outputs():
    model = mini(rotations="fixed")
    x1, x2 = torch.randn(2, 2, 64, 24).unbind(0)
    y1, y2 = model.blocks.run(x1, x2)
    for block in reversed(model.blocks):
        y2 = y2 - block.feed_forward(y1)
        y1 = y1 - block.attend(y2, None)[0]
    assert_close((y1, y2), (x1, x2), rtol=0, atol=1e-5)


class Kept:
    """Bytes that autograd keeps for the backward pass, weights apart."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        weights = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, torch.Tensor] = {}

        def pack(t):
            if t.untyped_storage().data_ptr() not in weights:
                kept[t.untyped_storage().data_ptr()] = t
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            out = self.model(x)
        self.floats = sum(t.untyped_storage().nbytes() for t in kept.values() if t.is_floating_point())
        self.integers = sum(t.untyped_storage().nbytes() for t in kept.values() if not t.is_floating_point())
        return out


@pytest.mark.parametrize("attention", ["lsh", "exact"])
def test_memory_does_not_grow_with_depth(attention):
    x = images()
    floats, integers, plain = [], [], []
    for depth in (1, 4, 16):
        for reversible in (True, False):
            model = mini(depth=depth, attention=attention, reversible=reversible, **DROPS).train()
            kept = Kept(model)
            kept(x)
            if reversible:
                floats.append(kept.floats)
                integers.append(kept.integers)
            else:
                plain.append(kept.floats)
    assert floats[0] == floats[1] == floats[2]
    assert plain[2] - plain[1] == pytest.approx(4 * (plain[1] - plain[0]), rel=0.1) and plain[2] > 50 * floats[2]
    # all that is added per layer: a byte per token, head and round
    per_layer = 2 * 64 * 2 * 2 if attention == "lsh" else 0
    assert [n - integers[0] for n in integers] == [0, 3 * per_layer, 15 * per_layer]


def test_memory_within_a_layer_shrinks_with_checkpointed_chunks():
    """What one layer's recomputation keeps at a time."""
    x = torch.randn(2, 64, 24)
    kept = []
    for chunks, checkpointing in ((1, False), (8, False), (8, True)):
        model = mini(ff_chunks=chunks, mlp_ratio=8.0)
        model.set_grad_checkpointing(checkpointing)
        block = model.blocks[0]
        layer = nn.Module()
        layer.forward = block.feed_forward
        layer.block = block
        counter = Kept(layer)
        counter(x.clone().requires_grad_())
        kept.append(counter.floats)
    assert kept[1] == pytest.approx(kept[0], rel=0.05) and kept[2] < kept[0] / 5


@torch.no_grad()
def test_chunks_change_nothing():
    x, expected = images(), mini()(images())
    for chunks in (2, 7, 100):
        assert_close(mini(ff_chunks=chunks)(x), expected)


@pytest.mark.parametrize("frozen", ["stem", "some", "all but head"])
def test_frozen_parameters(frozen):
    """Gradients reach what is not frozen, also where the input of the layers needs none."""
    grads = []
    for reversible in (True, False):
        model = mini(reversible=reversible, rotations="fixed").train()
        for name, p in model.named_parameters():
            stem = name.startswith(("patch_embed", "pos_embed"))
            some = ".norm1." in name or name.startswith("blocks.1.attn.v")
            wanted = dict([("stem", not stem), ("some", not some), ("all but head", name.startswith("head"))])
            p.requires_grad_(wanted[frozen])
        model(images()).square().sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_a_parameter_used_twice():
    """As a block that shares weights between its halves."""

    class Block(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def attend(self, x, kept):
            return self.linear(x), None

        def feed_forward(self, x):
            return self.linear(x).tanh()

        def forward(self, x1, x2):
            y1 = x1 + self.attend(x2, None)[0]
            return y1, x2 + self.feed_forward(y1)

    linear = nn.Linear(3, 3, dtype=torch.float64)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    grads = []
    for reversible in (True, False):
        blocks = ReversibleBlocks(Block(linear), Block(linear), reversible=reversible)
        grads.append(torch.autograd.grad(blocks(x).square().sum(), [x, linear.weight, linear.bias]))
    assert_close(grads[0], grads[1])
    blocks.reversible = True
    assert torch.autograd.gradcheck(blocks, (x,))


def test_changed_parameters_are_noticed():
    model = mini().train()
    loss = model(images()).sum()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="must not change between forward and backward pass"):
        loss.backward()


def test_second_derivatives_are_refused():
    model, x = mini(), images().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_is_restored_and_streams_stay_wide():
    """Under autocast the recomputation runs in bfloat16 as well; streams are in float32 in between."""
    seen = []
    results = []
    for reversible in (True, False):
        model = mini(reversible=reversible, rotations="fixed").train()
        hooks = [block.mlp.register_forward_hook(lambda m, args, out: seen.append(out.dtype)) for block in model.blocks]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = model.forward_features(images())
            streams = model.blocks.run(*torch.randn(2, 2, 64, 24).unbind(0))
        features.float().square().mean().backward()
        for hook in hooks:
            hook.remove()
        assert {s.dtype for s in streams} == {torch.float32}
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert set(seen) == {torch.bfloat16}
    # as near as bfloat16 is to itself
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()

    half = mini(rotations="fixed").to(torch.bfloat16)
    tokens = torch.randn(2, 64, 24, dtype=torch.bfloat16, requires_grad=True)
    assert half.blocks(tokens).dtype == torch.bfloat16
    half.blocks(tokens).float().sum().backward()
    assert tokens.grad.isfinite().all()


def test_checkpointing_changes_nothing():
    """In both kinds of layers, with dropout."""
    for reversible in (True, False):
        results = []
        for enable in (False, True):
            model = mini(torch.float64, reversible=reversible, ff_chunks=2, **DROPS).train()
            model.set_grad_checkpointing(enable)
            results.append(backward(model, images().double()))
        assert torch.equal(results[0][0], results[1][0])
        assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_compiled_training_is_the_same():
    model, x = mini(rotations="fixed"), images()
    out, grads = backward(model, x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled_out, compiled_grads = backward(compiled, x)
    assert_close(compiled_out, out)
    assert_close(compiled_grads, grads, rtol=1e-4, atol=1e-6)


# -- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "width", "params"), [("reformer_tiny", 192, 5.27), ("reformer_small", 384, 20.27)])
def test_size(name, width, params):
    model = timm.create_model(name, device="meta").eval().requires_grad_(False)
    layer = width * (3 * width + 1) + 8 * width**2 + 5 * width + 4 * width  # attention, feed-forward, norms
    stem = width * (3 * 8 * 8 + 1) + width * 28 * 28
    assert sum(p.numel() for p in model.parameters()) == 12 * layer + stem + 2 * width + 1000 * (width + 1)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=0.01)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    tokens, rounds, bucket, buckets = 784, 4, 49, 16
    per_layer = tokens * 11 * width**2  # linear layers
    per_layer += tokens * rounds * width * buckets // 2  # rotations
    per_layer += 2 * tokens * rounds * 2 * bucket * width  # products
    expected = 12 * per_layer + tokens * 3 * 64 * width + 1000 * width
    assert counter.get_total_flops() // 2 == expected


@torch.no_grad()
def test_evaluation_is_a_function(tmp_path):
    """Same logits bit for bit: called again, under another seed, alone, saved and loaded; training is random."""
    model, x = mini(), images(batch=3)
    logits = model(x)
    torch.manual_seed(7)
    assert torch.equal(model(x), logits)
    assert_close(torch.cat([model(x[i : i + 1]) for i in range(3)]), logits)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), logits)
    assert not torch.allclose(model.train()(x), logits)
    assert torch.equal(mini(rotations="fixed").train()(x), logits)


@torch.no_grad()
def test_layers_hash_differently():
    model = mini()
    rotations = [block.attn.rotations for block in model.blocks]
    assert rotations[0].shape == (12, 2, 8)
    assert not torch.equal(rotations[0], rotations[1])
    assert not [k for k in model.state_dict() if "rotations" in k]


@pytest.mark.parametrize("size", [32, 64, (36, 50), (20, 100), 8, 4, (5, 3)])
@pytest.mark.parametrize("axial", [False, True])
def test_any_image_size(size, axial):
    """The same as a network made for that size, with a resampled position embedding."""
    model, x = mini(axial_pos_embed=axial), images(size)
    built = mini(axial_pos_embed=axial, img_size=x.shape[2:])
    built.load_state_dict(checkpoint_filter_fn(model.state_dict(), built))
    with torch.no_grad():
        logits = model(x)
        assert_close(built(x), logits)
        features = model.forward_features(x)
    assert features.shape[2:] == tuple(math.ceil(s / 4) for s in x.shape[2:])
    assert logits.isfinite().all() and not torch.allclose(logits[0], logits[1])


def test_axial_position_embedding():
    model = mini(axial_pos_embed=True, img_size=(32, 64))
    assert model.pos_row.shape == (1, 24, 8, 1) and model.pos_col.shape == (1, 24, 1, 16)
    x = images((32, 64))
    with torch.no_grad():
        stem = model.forward_stem(x) - model.patch_embed(x)
    assert_close(stem[0, :, 3, 5], model.pos_row[0, :, 3, 0] + model.pos_col[0, :, 0, 5], rtol=1e-4, atol=1e-5)
    model.set_input_size((64, 64))
    assert model.pos_row.shape == (1, 24, 16, 1) and model.pos_col.shape == (1, 24, 1, 16)


@torch.no_grad()
def test_attention_is_a_switch(tmp_path):
    """The same weights by hashing and exact; what is saved after a change is what loads."""
    model, x = mini(), images()
    logits = model(x)
    model.set_attention("exact")
    exact = model(x)
    assert not torch.allclose(exact, logits)
    assert_close(mini(attention="exact")(x), exact, rtol=0, atol=0)
    model.set_attention("lsh", num_hashes=8)
    eight_rounds = model(x)
    assert not torch.allclose(eight_rounds, exact) and not torch.allclose(eight_rounds, logits)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), eight_rounds)
    model.set_attention(num_hashes=2)
    assert torch.equal(model(x), logits)


def test_scale_of_the_paper_s_code():
    """Keys of length 1 with factor 1 are keys of root mean square 1, scaled by the head width to the power -1/2."""
    attn = mini(attention="exact", qk_scale=1.0).blocks[0].attn
    x = torch.randn(2, 6, 24)
    with torch.no_grad():
        qk, v = (f(x).unflatten(2, (2, 12)).transpose(1, 2) for f in (attn.qk, attn.v))
        k = qk / qk.square().mean(-1, keepdim=True).sqrt()
        logits = (qk @ k.mT / 12**0.5).masked_fill(torch.eye(6, dtype=torch.bool), -1e5)
        assert_close(attn(x), attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("kwargs", [dict(), dict(attention="exact"), dict(axial_pos_embed=True, ff_chunks=3)])
def test_torchscript(kwargs):
    """Several rounds, exact, other sizes than the own one."""
    with set_scriptable(True):
        model = mini(**kwargs)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for size in (32, 48, (30, 20), 8):
            assert_close(scripted(images(size)), model(images(size)))


def test_maps_on_the_way():
    """Runs of reversible layers between the taps: the same maps and gradients as without."""
    x, results = images().double(), []
    for reversible in (True, False):
        model = mini(torch.float64, reversible=reversible, rotations="fixed")
        final, maps = model.forward_intermediates(x, indices=[0, 2])
        assert_close(final, model.forward_features(x))
        (early,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
        assert torch.equal(early, maps[0])
        (normed,) = model.forward_intermediates(x, indices=[2], norm=True, intermediates_only=True)
        assert_close(normed, final)
        sum(m.square().sum() for m in maps).backward()
        results.append([*maps, *(p.grad for n, p in model.named_parameters() if not n.startswith(("norm", "head")))])
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


def test_drop_path_grows_with_depth():
    model = timm.create_model("reformer_tiny", drop_path_rate=0.11, device="meta")
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in model.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(attention="full"), "attention='full' is not one of"),
        (dict(rotations="random"), "rotations='random' is not one of"),
        (dict(num_heads=5), "5 heads do not divide a width of 24"),
        (dict(bucket_size=0), "bucket_size=0 must be at least 1"),
        (dict(num_hashes=0), "num_hashes=0 must be at least 1"),
        (dict(depth=0), "depth=0 must be at least 1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        mini(**kwargs)
