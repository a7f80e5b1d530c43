"""ViT-Slim: masks against the released code's numbers, and the smaller network against the masked one."""

import copy
import itertools
import json

import pytest
import timm
import torch
from safetensors import safe_open

import timm_resnas
from timm_resnas.families.slim_masks import MaskedViT, monotone, rectangle, threshold
from timm_resnas.models.narrow import NarrowError
from timm_resnas.models.token_reduction import TokenError
from timm_resnas.nas.cost import Budget, BudgetError
from timm_resnas.nas.count import count_macs
from timm_resnas.tasks import SlimMaskTask


def released(golden, case):
    """The network of the released code's numbers, and these."""
    with safe_open(golden("vitslim_a"), "pt") as file:
        found = {k.removeprefix(f"{case}/"): file.get_tensor(k) for k in file.keys() if k.startswith(f"{case}/")}
        config, cases = (json.loads(file.metadata()[name]) for name in ("model", "cases"))
    params = {k.removeprefix("param/"): v for k, v in found.items() if k.startswith("param/")}
    model = timm.create_model("vit_tiny_patch16_224", **config)
    net = MaskedViT(model, "entries" if case == "full" else "uniform", tokens=True).eval()
    own = {}
    for i in range(config["depth"]):
        own[f"attention.{i}"] = params.pop(f"blocks.{i}.attn.zeta")
        own[f"mlp.{i}"] = params.pop(f"blocks.{i}.mlp.zeta")
        own[f"tokens.{i}"] = params.pop(f"blocks.{i}.attn.patch_zeta")
    net.load_state_dict({**own, **{f"model.{name}": value for name, value in params.items()}})
    return net, found, cases[case]["budgets"]


@pytest.mark.parametrize("case", ["full", "uniform"])
def test_numbers_of_the_released_code(golden, case):
    net, found, budgets = released(golden, case)
    with torch.no_grad():
        torch.testing.assert_close(net(found["input"]), found["logits_soft_masks"], rtol=1e-5, atol=1e-5)
        prices = torch.stack([net.prices()[kind] for kind in ("attention", "mlp", "tokens")])
    torch.testing.assert_close(prices, found["l1_attn_mlp_patch"], rtol=1e-6, atol=1e-4)
    for b, budget in enumerate(budgets):
        keep = {"attention": budget["attn"], "mlp": budget["mlp"], "tokens": budget["patch"]}
        with torch.no_grad():
            limits = [threshold(net.values(kind), keep[kind])[0].item() for kind in keep]
        assert limits == budget["thresholds"]
        masks = net.masks(keep)
        for i, (entries, hidden, tokens) in enumerate(zip(*masks, strict=True)):
            shared = entries if case == "full" else entries[:1]
            assert torch.equal(shared.float(), found[f"b{b}/mask/blocks.{i}.attn"][0, 0, :, 0])
            assert case == "full" or (entries == entries[:1]).all()
            assert torch.equal(hidden.float(), found[f"b{b}/mask/blocks.{i}.mlp"][0, 0])
            assert torch.equal(tokens.float(), found[f"b{b}/mask/blocks.{i}.patch"][0, :, 0])
        net.fixed = masks
        with torch.no_grad():
            torch.testing.assert_close(net(found["input"]), found[f"b{b}/logits"], rtol=1e-5, atol=1e-5)
            # with all tokens: the network that is really smaller
            net.fixed = masks._replace(tokens=None)
            small = net.shrink(net.fixed)
            torch.testing.assert_close(small(found["input"]), net(found["input"]), rtol=1e-5, atol=1e-5)
        net.fixed = None
        macs = net.costs(masks._replace(tokens=None))["macs"]
        assert count_macs(small, (3, 28, 28)) == macs < net.costs()["macs"]


def test_monotone_tokens():
    masks = [torch.tensor(row, dtype=torch.bool) for row in ([1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0])]
    assert torch.stack(monotone(masks)).int().tolist() == [[1, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0]]


def test_threshold_keeps_ties_and_signs():
    values = [torch.tensor([0.5, -2.0]), torch.tensor([[0.5, 1.0]])]
    limit, masks = threshold(values, 0.5)
    assert limit == 0.5 and [m.tolist() for m in masks] == [[True, False], [[True, True]]]
    assert all(m.all() for m in threshold(values, 1.0)[1])
    for keep in (0, 1.1):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            threshold(values, keep)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_rectangle(seed):
    """Against all choices of heads and of entries for each number of heads."""
    torch.manual_seed(seed)
    values = torch.randn(3, 5) + 0.5
    for keep in range(1, 16):
        mask = rectangle(values, keep)
        counts = mask.sum(1)
        assert len(set(counts[counts > 0].tolist())) == 1
        best = -float("inf")
        for heads in range(1, 4):
            each = min(5, round(keep / heads))
            if each == 0 or abs(heads * each - keep) > heads / 2:
                continue
            for which in itertools.combinations(range(3), heads):
                best = max(best, sum(values[h].sort(descending=True).values[:each].sum().item() for h in which))
        assert values[mask].sum().item() == pytest.approx(best)
    assert rectangle(values - 5, 15).all()  # also a head whose masks are all negative
    eights = rectangle(torch.rand(6, 64), 200, 8).sum(1)
    assert set((eights % 8).tolist()) == {0} and abs(int(eights.sum()) - 200) <= 24


def randomised(name, attention="entries", tokens=False, seed=0, **kwargs):
    """With masks and biases that are not alike."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    net = MaskedViT(model, attention, tokens).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 5)
        for kind in (net.attention, net.mlp, net.tokens):
            for mask in kind.values():
                mask.add_(torch.randn_like(mask) / 2)
    return net


STAGES = ((0, 32), (1, (32, 2, 16), (32, 64), 1), (3, 32, 48), (1, (48, 3, 16), (48, 96), 1), (2, 48, 10))
CASES = [
    ("test_vit", "entries", dict(img_size=32)),
    ("test_vit", "heads", dict(img_size=32)),
    ("test_vit", "uniform", dict(img_size=32)),
    ("vit_tiny_patch16_224", "entries", dict(img_size=32, depth=3, qkv_bias=False)),
    ("vit_small_patch14_reg4_dinov2", "entries", dict(img_size=28, depth=2)),
    ("deit_tiny_distilled_patch16_224", "entries", dict(img_size=32, depth=2)),
    ("beit_base_patch16_224", "heads", dict(img_size=32, depth=2, embed_dim=48, num_heads=4)),
    ("eva02_tiny_patch14_224", "heads", dict(img_size=28, depth=2, embed_dim=48, num_heads=4)),
    ("vit_resnas", "entries", dict(img_size=32, patch_size=8, network_def=STAGES)),
]


@pytest.mark.parametrize("name, attention, kwargs", CASES, ids=lambda c: c if isinstance(c, str) else "")
def test_the_smaller_network_computes_what_the_masked_one_does(name, attention, kwargs):
    net = randomised(name, attention, **kwargs)
    x = torch.randn(2, 3, kwargs["img_size"], kwargs["img_size"])
    for keep in (0.8, 0.3, 0.01):  # the last leaves most layers without a unit
        ragged = net.masks({"attention": keep, "mlp": keep})
        for masks in (ragged, net.shaped(ragged)):
            net.fixed = masks
            small = net.shrink(masks)
            with torch.no_grad():
                torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-4)
            assert count_macs(small, (3, *x.shape[2:])) == net.costs(masks)["macs"] < net.costs()["macs"]
            assert sum(p.numel() for p in small.parameters()) == net.costs(masks)["params"]


def test_masks_of_one_change_nothing():
    net = randomised("test_vit", img_size=32, tokens=False)
    net.fixed = net.masks({})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.model(x), rtol=0, atol=0)
    assert net.arch(net.fixed) == net.arch() == net.space.largest


def test_masks_learn_and_copies_are_their_own():
    net = randomised("test_vit", img_size=32, tokens=True)
    x = torch.randn(2, 3, 32, 32)
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    twin = copy.deepcopy(net)
    with torch.no_grad():
        before = net(x)
        for mask in twin.tokens.values():
            mask.zero_()
        torch.testing.assert_close(net(x), before, rtol=0, atol=0)
        assert (twin(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["entries", "heads", "uniform"])
def test_networks_within_a_budget(attention):
    net = randomised("vit_tiny_patch16_224", attention, img_size=64, depth=4)
    full = net.costs()
    for share in (0.8, 0.5, 0.3):
        for name in ("macs", "params"):
            masks = net.within(Budget(**{name: int(share * full[name])}))
            got = net.costs(masks)[name] / full[name]
            assert share - (0.06 if attention == "entries" else 0.12) < got <= share, (name, share, got)
            counts = [m.sum(1)[m.any(1)] for m in masks.attention]
            assert all(len(set(c.tolist())) <= 1 for c in counts)  # nothing is padded
    assert net.arch(net.within(Budget(macs=full["macs"]))) == net.space.largest
    both = Budget(macs=int(0.9 * full["macs"]), params=int(0.4 * full["params"]))
    costs = net.costs(net.within(both))
    assert costs["params"] <= both.limits["params"] and costs["macs"] < 0.6 * full["macs"]


def test_saved_and_loaded(tmp_path):
    net = randomised("test_vit", img_size=32)
    small = net.shrink(net.within(Budget(macs=int(0.6 * net.costs()["macs"]))))
    timm_resnas.save_pretrained(small, tmp_path / "small")
    again = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["architecture"] == "vit_elastic" and len(config["model_args"]["widths"]) == 6


def test_what_is_refused():
    for name, kwargs, message in (
        ("cait_xxs24_224", dict(depth=2), "normed or mixed together"),
        ("eva02_tiny_patch14_224", dict(img_size=28, depth=2), "mask whole heads"),
        ("test_convnext", {}, "no blocks of attention and MLP"),
    ):
        with pytest.raises(NarrowError, match=message):
            MaskedViT(timm.create_model(name, **kwargs))
    model = timm.create_model("test_vit", img_size=32)
    with pytest.raises(ValueError, match="masks of attention are entries, heads, uniform"):
        MaskedViT(model, "head")
    net = MaskedViT(model)
    with pytest.raises(ValueError, match="there are no masks of tokens"):
        net.masks({"tokens": 0.5})
    broken = MaskedViT(timm.create_model("test_vit", img_size=32))
    broken.mlp["3"].data[0, 0, 7] = float("nan")
    with pytest.raises(ValueError, match="masks of mlp are not finite"):
        broken.within(Budget(macs=broken.costs()["macs"] // 2))
    with pytest.raises(BudgetError, match="the budget names latency_ms"):
        net.within(Budget(latency_ms=1.0))
    with pytest.raises(BudgetError, match="below the smallest"):
        net.within(Budget(macs=1000))
    with pytest.raises(BudgetError, match="masks are so alike"):
        net.within(Budget(macs=net.costs()["macs"] // 2))
    # said before they are trained, where some are not going to be
    net.check_budget(Budget(macs=net.costs()["macs"] // 2))
    SlimMaskTask(net, prices={"mlp": 1e-4}, verbose=False)
    with pytest.raises(BudgetError, match="the smallest network of masks"):
        net.check_budget(Budget(macs=net.costs()["macs"] // 2))
    # a mask in force is unknown to the backward pass of checkpointed blocks
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match="again without its masks"):
        net(torch.randn(1, 3, 32, 32))
    with torch.no_grad():
        net(torch.randn(1, 3, 32, 32))


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("test_vit", dict(img_size=64, patch_size=8)),
        ("vit_small_patch14_reg4_dinov2", dict(img_size=56, depth=3)),
        ("deit_tiny_distilled_patch16_224", dict(img_size=64, depth=3)),
    ],
)
def test_tokens_are_gathered_and_logits_are_the_masked_ones(name, kwargs):
    net = randomised(name, tokens=True, **kwargs)
    x = torch.randn(2, 3, kwargs["img_size"], kwargs["img_size"])
    for keep in (0.7, 0.3, 0.01):
        masks = net.shaped(net.masks({"attention": 0.7, "mlp": 0.7, "tokens": keep}))
        small = net.shrink(masks)
        net.fixed = masks
        counts = [int(mask.sum()) for mask in masks.tokens]
        assert counts == sorted(counts, reverse=True) and counts[-1] < len(masks.tokens[0])
        with torch.no_grad():
            torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-4)
            net.fixed = masks._replace(tokens=None)
            assert (small(x) - net(x)).abs().max() > 1e-3
        tokens = small.forward_features(x).shape[1]
        assert tokens == counts[-1]
        macs = count_macs(small, (3, *x.shape[2:]))
        assert macs == net.costs(masks)["macs"] < net.costs(masks._replace(tokens=None))["macs"]


def test_patches_that_are_dropped_at_random_are_refused():
    model = timm.create_model("test_vit", img_size=64, patch_drop_rate=0.25)
    for make in (lambda: MaskedViT(model, tokens=True), lambda: timm_resnas.reduce_tokens(model, "positions")):
        with pytest.raises(TokenError, match="patch_drop_rate"):
            make()
    MaskedViT(model)


def test_tokens_that_come_back_are_refused():
    net = randomised("test_vit", tokens=True, img_size=64)
    masks = net.masks({})
    tokens = [mask.clone() for mask in masks.tokens]
    tokens[0][3] = False
    for mask in tokens[1:]:
        mask[5] = False  # as many as before, but others
    with pytest.raises(TokenError, match="an earlier one leaves out"):
        net.shrink(masks._replace(tokens=tuple(tokens)))


def test_a_budget_with_fewer_tokens(golden):
    net, found, _ = released(golden, "full")
    full = net.costs()["macs"]
    for tokens in (None, 0.5):
        masks = net.within(Budget(macs=int(0.5 * full)), tokens)
        small = net.shrink(masks)
        macs = count_macs(small, (3, 28, 28))
        assert 0.44 * full < macs <= 0.5 * full
        net.fixed = masks
        with torch.no_grad():
            torch.testing.assert_close(small(found["input"]), net(found["input"]), rtol=1e-5, atol=1e-5)
        net.fixed = None


def test_the_least_budget_with_fewer_tokens():
    """What only fewer tokens can keep is no reason to refuse before masks are trained."""
    plain, net = (randomised("test_vit", img_size=64, tokens=tokens) for tokens in (False, True))
    few = net.shaped(net.masks(dict.fromkeys(("attention", "mlp", "tokens"), 1e-6)))
    budget = Budget(macs=net.costs(few)["macs"], lower=0)
    with pytest.raises(BudgetError, match="one unit in each layer, has macs"):
        plain.check_budget(budget)
    assert net.costs(net.within(budget))["macs"] <= budget.limits["macs"]
    with pytest.raises(BudgetError, match="with 90% of the token masks kept, no threshold of the others"):
        net.within(budget, tokens=0.9)
    with pytest.raises(BudgetError, match="one unit in each layer and of one patch, has macs"):
        net.check_budget(Budget(macs=int(0.99 * budget.limits["macs"]), lower=0))


def test_networks_of_fewer_tokens_are_saved_and_follow_the_image_size(tmp_path):
    net = randomised("test_vit", img_size=64, patch_size=8, tokens=True)
    small = net.shrink(net.shaped(net.masks({"attention": 0.7, "mlp": 0.7, "tokens": 0.5})))
    timm_resnas.save_pretrained(small, tmp_path / "small", data_config={"input_size": [3, 64, 64]})
    again = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)
    # every patch of twice the grid asks the one that it lies in
    larger = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True, img_size=128).eval()
    again.set_input_size(img_size=128)
    kept = [p for p in range(64) if p in set(small.positions[0])]
    wanted = [i * 16 + j for i in range(16) for j in range(16) if (i // 2) * 8 + j // 2 in kept]
    assert larger.kept_0.tolist() == again.kept_0.tolist() == wanted
    with torch.no_grad():
        assert larger(torch.randn(1, 3, 128, 128)).isfinite().all()
        maps = small.forward_intermediates(x, indices=1, intermediates_only=True)[0]
    with pytest.raises(AssertionError, match="see set_input_size"):
        small(torch.randn(1, 3, 128, 128))
    gone = [p for p in range(64) if p not in small.positions[-1]]
    assert maps.flatten(2)[:, :, gone].eq(0).all()


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("test_vit", dict(blocks=[1], positions=[[0, 4]]), "rising numbers of patches from 0 to 3"),
        ("test_vit", dict(blocks=[1, 2], positions=[[0], [1]]), "each within the one before"),
        ("test_vit", dict(blocks=[9]), "blocks must be rising numbers"),
        ("test_vit", dict(grid=[2]), "grid must be a height and a width"),
        ("vit_base_patch16_siglip_224", {}, "the classifier must read the class token alone"),
    ],
)
def test_positions_that_do_not_fit(name, given, message):
    model = timm.create_model(name, img_size=32)
    with pytest.raises(ValueError, match=message):
        timm_resnas.reduce_tokens(model, "positions", **given)
    with pytest.raises(ValueError, match="leave out the class token"):
        net = randomised("test_vit", img_size=32, tokens=True)
        masks = net.masks({})
        net.shrink(masks._replace(tokens=tuple(mask & (torch.arange(5) > 0) for mask in masks.tokens)))
