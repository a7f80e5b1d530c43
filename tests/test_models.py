"""What timm 1.0.31 asks of its models in tests/test_models.py, asked of every name that this package registers.

A network as registered is checked on the meta device: shapes, names, gradients that exist, at no arithmetic. Numbers
are checked on a relative with fewer channels and blocks and smaller images (:data:`FAMILIES`). A new name of a known
family is covered as it is; a new family needs a line there.
"""

import copy
import fnmatch
import functools
import importlib
import inspect
import json
import math
import operator
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import get_notrace_functions, get_notrace_modules, set_fused_attn, set_scriptable
from timm.models import FeatureInfo
from timm.models._features import FeatureGetterNet
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn
from torch.testing import assert_close

import timm_resnas  # noqa: F401  (registers the models)
from timm_resnas.families.efficientformer_space import EfficientFormerSpace
from timm_resnas.families.efficientformerv2_space import EfficientFormerV2Space
from timm_resnas.families.elastic_space import ElasticSpace
from timm_resnas.families.elastic_tokens import TokenSpace
from timm_resnas.nas.supernet import is_supernet

PACKAGE = "timm_resnas"
BY_RECIPES_ONLY = {"accelerate", "datasets", "matplotlib", "pandas", "pymoo", "sklearn", "tqdm.auto", "yaml"}


def entry_module(name: str) -> str:
    """Module that registered ``name``."""
    return timm.model_entrypoint(name).__module__


@functools.cache
def narrow(name: str) -> dict:
    """An eighth of the channels, the first two blocks of each stage; the same for all networks that were searched."""
    network_def, depth = [], 0
    shown = name if name == "vit_res_tiny" else "vit_resnas_tiny"
    for kind, *rest in on_meta(shown).arch.to_network_def():
        depth = depth + 1 if kind == 1 else 0
        if kind == 2:
            network_def.append((2, rest[0] // 8, rest[1]))
        elif kind != 1:
            network_def.append((kind, *(channels // 8 for channels in rest)))
        elif depth <= 2:
            (dim, heads, head_dim), (_, hidden), exists = rest
            network_def.append((1, (dim // 8, heads, head_dim // 8), (dim // 8, hidden // 8), exists))
    return dict(network_def=network_def, img_size=112)


@dataclass(frozen=True)
class Family:
    """What the tests have to know about a model file.

    Attributes:
        layout: Of ``forward_features``: 'NLC' (token models) or 'NCHW' (maps).
        size: Side of small images.
        pool: Another pooling than the default one.
        small: Arguments that make the model of a name quick; a function of the name or a dict.
        lacks: What timm's own class of such a network does without, and ours with it.
    """

    layout: str
    size: int
    pool: str
    small: Callable[[str], dict] | dict
    lacks: tuple[str, ...] = ()


FAMILIES = {
    "models.autoformer": Family(
        "NLC",
        size=64,
        pool="token",
        small=dict(img_size=64, embed_dim=48, mlp_ratio=[4, 2, 3.5], num_heads=[2, 3, 1], depth=3, head_dim=16),
    ),
    "models.vit_resnas": Family("NLC", size=112, pool="avg", small=narrow),
    "families.autoformer": Family("NLC", size=32, pool="token", small=dict(space="autoformer_micro")),
    "families.efficientformer_nas": Family(
        "NLC",
        size=64,
        pool="avg",
        small=dict(
            space=EfficientFormerSpace(
                [[24, 16], [32, 24], [32, 24], [48, 32]], (1, 2, 1, 3), num_vit=2, img_size=64, num_classes=10
            ).to_dict()
        ),
        lacks=("fused attention", "another pooling", "dynamic_img_size", "tokens of taps", "classifiers of taps"),
    ),
    "families.efficientformerv2_nas": Family(
        "NCHW",
        size=64,
        pool="avg",
        small=dict(
            space=EfficientFormerV2Space(
                *([[24, 16], [24], [32, 24], [40, 32]], (1, 1, 2, 2), [[2, 1]] * 4),
                **dict(num_vit=(1, 2), img_size=64, num_classes=10),
            ).to_dict()
        ),
        lacks=("fused attention", "another pooling"),
    ),
    "families.vit_resnas": Family("NLC", size=32, pool="avg", small=dict(space="micro")),
    "models.vit_elastic": Family(
        "NLC",
        size=32,
        pool="avg",
        small=dict(base="deit_tiny_patch16_224", img_size=32, depth=3, widths=[[2, 96], [1, 768], [3, 200]]),
    ),
    "models.vit_tokens": Family(
        "NLC",
        size=32,
        pool="avg",
        small=dict(base="deit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, keep_ratios=0.8),
    ),
    "families.elastic": Family(
        "NLC",
        size=32,
        pool="avg",
        small=dict(space=ElasticSpace("deit_tiny_patch16_224", img_size=32, depth=3).to_dict()),
    ),
    "families.elastic_tokens": Family(
        "NLC",
        size=32,
        pool="avg",
        small=dict(space=TokenSpace("deit_tiny_patch16_224", img_size=32, patch_size=8, depth=4).to_dict()),
    ),
    "models.reformer": Family(
        "NCHW",
        size=64,
        pool="max",
        # one round of hashing: torch's fused attention has no sums to combine more
        small=dict(img_size=64, patch_size=4, embed_dim=48, depth=3, num_heads=3, bucket_size=16, num_hashes=1),
    ),
    "models.sepvit": Family(
        "NCHW",
        size=128,
        pool="max",
        small=dict(img_size=128, embed_dims=(16, 24, 32, 48), depths=(1, 2, 2, 1), num_heads=(1, 2, 2, 4)),
    ),
    "models.sret": Family(
        "NCHW",
        size=64,
        pool="max",
        small=dict(
            **dict(img_size=64, depths=(2, 4, 2), recursive_num=(1, 2, 1), base_dims=(16, 16, 16)),
            **dict(num_heads=(2, 4, 8), mlp_ratio=3.0, np_mlp_ratio=2.0),
        ),
    ),
    "models.uninet": Family(
        "NCHW",
        size=64,
        pool="max",
        small=dict(
            repeats=(1, 1, 1, 1, 1, 2),
            channels=(16, 16, 24, 24, 32, 48),
            stem_width=16,
            head_width=64,
            head_dim=8,
        ),
    ),
    "models.efficientformer_nas": Family(
        "NLC",
        size=64,
        pool="avg",
        small=dict(img_size=64, depths=(1, [1, 0, 1], 1, 3), embed_dims=(16, 24, 32, 40), num_vit=2),
        lacks=("fused attention", "another pooling", "dynamic_img_size", "tokens of taps", "classifiers of taps"),
    ),
    "models.efficientformerv2_nas": Family(
        "NCHW",
        size=64,
        pool="avg",
        small=dict(
            **dict(img_size=64, depths=(1, [1, 0, 1], 2, 2), embed_dims=(16, 24, 32, 40), num_vit=(1, 2)),
            mlp_ratios=[2, [1, 3], [2, 1.5], 2],
        ),
        lacks=("fused attention", "another pooling"),
    ),
    "models.exmobilevit": Family(
        "NCHW",
        size=64,
        pool="max",
        # that of 928 channels follows from a ratio, others are given
        small=lambda name: {} if name == "exmobilevit_928" else dict(widths=(32, 64, 480)),
    ),
    "models.cait_study": Family(
        "NLC", size=64, pool="avg", small=dict(img_size=64, depth=3, embed_dim=96, num_heads=2)
    ),
}

ALL = [name for name in timm.list_models() if entry_module(name).startswith(PACKAGE + ".")]
# names whose small relative is that of another name; test_alike holds them to it
ALIKE = {
    name: shown
    for shown, pattern in {
        "autoformer_tiny": "autoformer|autoformer_(small|base)",
        "cait_xs24_224": r"cait_(?!xs24_224)\w+_\d+",
        "exmobilevit_576": "exmobilevit_640",
        "reformer_tiny": "reformer_small",
        "sepvit_lite": "sepvit_(tiny|small|base)",
        "sret_tiny": "sret|sret_(ltiny|small)",
        "sret_tiny_unsliced": "sret_(ltiny|small)_unsliced",
        "uninet_b0": "uninet|uninet_b[1-6]",
        "vit_resnas_tiny": "vit_resnas|vit_resnas_(small|medium)",
        "vit_resnas_supernet": "vit_resnas_(tiny|small)_supernet",
    }.items()
    for name in ALL
    if re.fullmatch(pattern, name)
}
ALL = [*(name for name in ALL if name not in ALIKE), *ALIKE]
# module scope: all tests of a name run in a row and share its models
every_name = pytest.mark.parametrize("name", ALL, scope="module")
every_distinct_name = pytest.mark.parametrize("name", ALL[: len(ALL) - len(ALIKE)], scope="module")
# torch.jit warns of its end with every call
jit = pytest.mark.filterwarnings("ignore:.torch.jit")


def family(name: str) -> Family:
    return FAMILIES[entry_module(name).removeprefix(PACKAGE + ".")]


def on_meta(name: str, **kwargs) -> nn.Module:
    """The network as registered, without memory."""
    return timm.create_model(name, device="meta", **kwargs).eval()


def meta_images(name: str) -> torch.Tensor:
    return torch.zeros(2, *timm.get_pretrained_cfg(name).input_size, device="meta")


def build(name: str, **kwargs) -> nn.Module:
    """The small relative of a network, freshly initialised."""
    small = family(name).small
    return timm.create_model(name, **{**(small(name) if callable(small) else small), **kwargs}).eval()


def images(name: str, batch: int = 2, in_chans: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, in_chans, family(name).size, family(name).size, generator=generator)


@pytest.fixture(scope="module")
def registered(name):
    """The network as registered, on meta. Not to be changed: take a copy."""
    return on_meta(name)


@pytest.fixture(scope="module")
def net(name):
    """The small relative with no weight left at a special value (0, 1). Not to be changed: take a copy."""
    torch.manual_seed(0)
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # pytest would keep the weights of three runs


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of each parameter; fails for a parameter that has none."""
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient for {missing}"
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def backward(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    out = model(x)
    out.square().mean().backward()
    return out.detach(), gradients(model)


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    heads = model.get_classifier()
    return tuple(heads) if isinstance(heads, tuple | list) else (heads,)


def names_in(cfg_entry: str | tuple | list) -> tuple[str, ...]:
    return (cfg_entry,) if isinstance(cfg_entry, str) else tuple(cfg_entry)


# -- the registry -----------------------------------------------------------------------------------------------------


def test_every_family_is_known():
    assert {"vit_res_tiny", "vit_resnas_tiny", "vit_resnas_small", "vit_resnas_medium", "vit_resnas"} <= set(ALL)
    unknown = {name for name in ALL if entry_module(name).removeprefix(PACKAGE + ".") not in FAMILIES}
    assert not unknown, f"add the module of {unknown} to FAMILIES"


_IMPORT = """
import json, sys, warnings
import timm
names = sys.argv[1:]
taken = [n for n in names if timm.is_model(n)]
origin = {n: timm.model_entrypoint(n).__module__ for n in timm.list_models()}
files, pretrained, modules = timm.list_modules(), timm.list_pretrained(), set(sys.modules)
warnings.simplefilter("error")
import timm_resnas
print(json.dumps(dict(
    taken=taken,
    replaced=[n for n, module in origin.items() if timm.model_entrypoint(n).__module__ != module],
    missing=[n for n in names if not timm.is_model(n)],
    files=files,
    pretrained=sorted(set(timm.list_pretrained()) - set(pretrained)),
    modules=sorted(set(sys.modules) - modules),
)))
warnings.simplefilter("ignore")  # at exit, torch 2.6 has one about a temporary folder of its own
"""


@pytest.fixture(scope="module")
def fresh_import(python):
    """What ``import timm_resnas`` does to a fresh process that has imported timm; any warning is an error there."""
    done = python.run(_IMPORT, *ALL)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.oldest
def test_import_registers_new_names_only(fresh_import):
    assert fresh_import["missing"] == []
    assert fresh_import["taken"] == []
    assert fresh_import["replaced"] == []


def test_files_do_not_merge_into_timms(fresh_import):
    # timm.list_modules() keeps the last part of a module's path only
    assert not {entry_module(name).rpartition(".")[2] for name in ALL} & set(fresh_import["files"])


@pytest.mark.oldest
def test_import_loads_nothing_of_the_recipes(fresh_import):
    assert "timm_resnas" in fresh_import["modules"]
    assert not BY_RECIPES_ONLY & set(fresh_import["modules"])


def test_no_pretrained_weights_are_claimed(fresh_import):
    assert fresh_import["pretrained"] == []


# -- the network as registered ----------------------------------------------------------------------------------------


@every_name
def test_default_cfg(name, registered):
    cfg = timm.get_pretrained_cfg(name)
    assert not cfg.has_weights
    for key in ("architecture", "crop_pct", "interpolation", "mean", "std", "num_classes"):
        assert getattr(cfg, key), f"{key} is not filled in"
    for key in ("license", "origin_url", "paper_ids", "paper_name"):
        assert getattr(cfg, key), f"{key} is not filled in"
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", cfg.paper_ids)
    assert cfg.architecture == name
    state = registered.state_dict()
    assert registered.in_chans == cfg.input_size[0]
    assert registered.num_classes == cfg.num_classes
    for conv in names_in(cfg.first_conv):
        assert state[f"{conv}.weight"].shape[1] == cfg.input_size[0]
    for head in names_in(cfg.classifier):
        assert state[f"{head}.weight"].shape[0] == cfg.num_classes
    assert [registered.get_submodule(head) for head in names_in(cfg.classifier)] == list(classifiers(registered))


@every_name
def test_arguments(name, registered):
    # timm's training script always passes these
    model = timm.create_model(
        name, device="meta", dtype=torch.float64, num_classes=42, in_chans=5, drop_rate=0.1, drop_path_rate=0.1
    )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [n for n, t in tensors if t.device.type != "meta"] == []
    assert [n for n, t in tensors if t.is_floating_point() and t.dtype != torch.float64] == []
    assert model.num_classes == 42 and model.in_chans == 5
    assert any(isinstance(m, nn.Dropout) and m.p == 0.1 for m in model.modules())
    assert sum(p.numel() for p in model.parameters()) != sum(p.numel() for p in registered.parameters())
    with pytest.raises(TypeError, match="not_a_model_arg"):
        timm.create_model(name, device="meta", not_a_model_arg=1)


@every_name
def test_shapes_and_gradients(name, registered):
    cfg = timm.get_pretrained_cfg(name)
    model = copy.deepcopy(registered).train()
    features = model.forward_features(meta_images(name))
    if family(name).layout == "NCHW":
        assert features.shape == (2, model.num_features, *cfg.pool_size)
    else:
        assert features.shape == (2, model.num_prefix_tokens + math.prod(cfg.pool_size), model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    logits = model.forward_head(features)
    assert logits.shape == (2, cfg.num_classes)
    if name not in ALIKE:  # of others `test_alike` has gradients
        logits.mean().backward()
        assert gradients(model).keys() == {n for n, _ in model.named_parameters()}


@every_name
def test_reset_classifier_keeps_device_dtype_mode_and_freeze(name, registered):
    assert inspect.signature(registered.reset_classifier).parameters["global_pool"].default is None
    model = copy.deepcopy(registered).to(torch.float64)
    for training in (True, False):
        model.train(training)
        model.reset_classifier(0)
        model.reset_classifier(2)
        assert model.num_classes == 2
        assert {p.shape[0] for head in classifiers(model) for p in head.parameters()} == {2}
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
        assert {m.training for m in model.modules()} == {training}

    model.requires_grad_(False)
    model.reset_classifier(0)
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=tuple(2 * s for s in timm.get_pretrained_cfg(name).input_size[1:]))
    model.reset_classifier(0, "")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == []


@every_name
def test_parameter_groups(name, registered):
    groups = group_parameters(registered, registered.group_matcher(coarse=False), reverse=True)
    assert set(groups) == {n for n, _ in registered.named_parameters()}
    assert len(set(groups.values())) > 1
    coarse = group_parameters(registered, registered.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) <= len(set(groups.values()))

    names = [n for n, _ in registered.named_parameters()]
    spared = registered.no_weight_decay() if hasattr(registered, "no_weight_decay") else set()
    for entry in spared:
        if name.startswith(("vit_elastic", "vit_tokens")) and not hasattr(registered, entry):
            continue  # timm's VisionTransformer names that of its distilled relative
        # a parameter that this variant does without (None) may be named
        known = fnmatch.filter(names, entry) or operator.attrgetter(entry)(registered) is None
        assert known, f"no_weight_decay() entry {entry!r} names no parameter"
    # what timm's train.py makes of both
    optimizer = create_optimizer_v2(registered, opt="adamw", lr=1.0, weight_decay=0.5, layer_decay=0.5)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for key, parameter in registered.named_parameters():
        is_spared = parameter.ndim <= 1 or any(fnmatch.fnmatch(key, entry) for entry in spared)
        assert decay[id(parameter)] == (0.0 if is_spared else 0.5), key
    assert len({g["lr_scale"] for g in optimizer.param_groups}) == len(set(groups.values()))


# -- numbers, on the small relative -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALIKE)
def test_alike(name):
    """With the weights of the other name's small relative, that of this one has the same outputs and gradients."""
    model, shown = build(name).train(), build(ALIKE[name]).train()
    model.load_state_dict(shown.state_dict())
    assert str(model) == str(shown) and family(name) is family(ALIKE[name])
    assert_close(backward(model, images(name)), backward(shown, images(name)), rtol=0, atol=0)


@every_distinct_name
def test_forward(name, net):
    x = images(name)
    with torch.no_grad():
        out = net(x)
        assert out.shape == (2, net.num_classes)
        assert out.isfinite().all()
        assert not torch.allclose(out[0], out[1], atol=1e-3)  # looks at the images
        assert_close(net(x[1:]), out[1:], rtol=1e-4, atol=1e-5)  # and at one at a time
        assert_close(net.forward_head(net.forward_features(x)), out)


@every_distinct_name
def test_grad_checkpointing_changes_nothing(name, net):
    x, calls = images(name), 0

    def count(*_):
        nonlocal calls
        calls += 1

    results = []
    for enable in (False, True):
        model = copy.deepcopy(net).train()
        model.set_grad_checkpointing(enable)
        with torch.nn.modules.module.register_module_forward_pre_hook(count):
            results.append((*backward(model, x), calls))
        calls = 0
    (out, grads, plain_calls), (checkpointed_out, checkpointed_grads, checkpointed_calls) = results
    assert checkpointed_calls > plain_calls  # something was computed twice
    assert all(g.isfinite().all() for g in grads.values())
    assert_close(checkpointed_out, out, rtol=1e-4, atol=1e-5)
    assert_close(checkpointed_grads, grads, rtol=1e-4, atol=1e-5)


@every_distinct_name
def test_dtype_change_after_forward(name, net):
    x, model = images(name), copy.deepcopy(net)
    with torch.no_grad():
        expected = model(x)  # fills whatever the model caches
        assert_close(model.double()(x.double()), expected.double(), rtol=1e-3, atol=1e-4)
        assert_close(model.float()(x), expected)
        # nothing is promoted to float32; on meta, since not every CPU computes in bfloat16
        half = dict(device="meta", dtype=torch.bfloat16)
        assert model.to(**half)(x.to(**half)).dtype == torch.bfloat16


@every_distinct_name
def test_fused_attention_agrees_with_plain(name, net, monkeypatch):
    if "fused attention" in family(name).lacks:
        assert not [m for m in net.modules() if hasattr(m, "fused_attn")]
        return
    calls = 0
    fused = torch.nn.functional.scaled_dot_product_attention

    def count(*args, **kwargs):
        nonlocal calls
        calls += 1
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    x, model = images(name), copy.deepcopy(net)
    getattr(model, "score_predictor", nn.Module()).requires_grad_(False)  # DynamicViT's: none outside training
    expected, expected_grads = backward(model, x)
    layers = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    assert layers and calls >= len(layers)
    for layer in layers:
        layer.fused_attn = False
    calls = 0
    out, grads = backward(model, x)
    assert calls == 0
    assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert_close(grads, expected_grads, rtol=1e-3, atol=1e-5)

    set_fused_attn(False)
    try:
        assert not any(getattr(m, "fused_attn", False) for m in on_meta(name).modules())
    finally:
        set_fused_attn(True)


@every_distinct_name
def test_reset_classifier_keeps_pooling(name, net):
    x, model = images(name), copy.deepcopy(net)

    def pooled():
        with torch.no_grad():
            return model.forward_head(model.forward_features(x), pre_logits=True)

    default = pooled()
    model.reset_classifier(5)
    assert_close(pooled(), default, rtol=0, atol=0)
    if "another pooling" in family(name).lacks:
        with pytest.raises(AssertionError, match="Only avg"):
            model.reset_classifier(5, "max")
        return
    model.reset_classifier(5, family(name).pool)
    other = pooled()
    assert not torch.allclose(other, default)
    model.reset_classifier(7)
    assert_close(pooled(), other, rtol=0, atol=0)
    assert model(x).shape == (2, 7)
    assert model(x).std() > 0  # a new head is initialised
    model.reset_classifier(0)
    assert_close(model(x), other, rtol=0, atol=0)


@every_distinct_name
def test_removed_classifier(name, net):
    x, model = images(name), copy.deepcopy(net)
    with torch.no_grad():
        features = net.forward_features(x)
        pooled = net.forward_head(features, pre_logits=True)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert_close(model(x), pooled)
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape
        assert build(name, num_classes=0)(x).shape == pooled.shape
        assert build(name, num_classes=0, global_pool="")(x).shape == features.shape


@every_distinct_name
def test_other_image_sizes(name, net):
    side = family(name).size
    height, width = side, 2 * side
    x = torch.randn(1, 3, height, width)
    with torch.no_grad():
        if not timm.get_pretrained_cfg(name).fixed_input_size:
            assert net(x).isfinite().all()
        if not hasattr(net, "set_input_size"):
            return
        for size in ((height, width), [height, width]):  # a tuple comes back from config.json as a list
            assert build(name, img_size=size)(x).isfinite().all()
        # resizing is the same as building at that size and loading through the filter
        resized = copy.deepcopy(net)
        resized.set_input_size(img_size=(height, width))
        built = build(name, img_size=(height, width))
        built.load_state_dict(filter_of(net)(net.state_dict(), built))
        assert_close(resized(x), built(x))
        resized.set_input_size(img_size=None, patch_size=None)  # keeps the size
        assert_close(resized(x), built(x))
        resized.set_input_size(img_size=side)
        assert resized(images(name)).isfinite().all()


@pytest.mark.parametrize(
    "name",
    [n for n in ALL if family(n).layout == "NLC" and n not in ALIKE and "dynamic_img_size" not in family(n).lacks],
    scope="module",
)
@jit
@pytest.mark.filterwarnings("ignore:The TorchScript type system")
def test_dynamic_image_size(name, net):
    """As `set_input_size`, at any size, also scripted and traced."""
    with set_scriptable(True):
        model = build(name, dynamic_img_size=True)
    model.load_state_dict(net.state_dict())
    scripted, fixed = torch.jit.script(model), copy.deepcopy(net)
    # that timm's resampling is a leaf, fx reads in the module of the outermost forward
    graph = traced(model.ordinary() if is_supernet(model) else model)
    side = family(name).size
    with torch.no_grad():
        for size in ((side, side), (side, 2 * side), (2 * side, side)):
            fixed.set_input_size(size)
            x = torch.randn(2, 3, *size)
            expected = fixed(x)
            assert_close(model(x), expected, rtol=0, atol=0)
            assert_close(graph(x), expected, rtol=0, atol=0)
            assert_close(scripted(x), expected)
            fixed = copy.deepcopy(net)
    assert timm.models._input.get_model_args(model)["dynamic_img_size"] is True
    assert not timm.models._input.get_model_input_config(model)["fixed_input_size"]


@every_distinct_name
@jit
def test_torchscript(name, net):
    with set_scriptable(True):
        model = build(name)
    model.load_state_dict(net.state_dict())
    scripted, x = torch.jit.script(model), images(name)
    with torch.no_grad():
        assert_close(scripted(x), net(x))
        if is_supernet(model):  # it stays one
            arch = model.space.smallest
            assert_close(model(x, archs=[arch]), net(x, archs=[arch]))
            model.set_arch(arch)
            with pytest.raises(ValueError, match="extract"):
                torch.jit.script(model)


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, tuple(get_notrace_modules())) or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module) -> torch.fx.GraphModule:
    tracer = _Tracer(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)
    graph = tracer.trace(model)
    return torch.fx.GraphModule(tracer.root, graph)


@every_distinct_name
@jit
@pytest.mark.filterwarnings("ignore:The TorchScript type system")  # speaks of GraphModule.__init__
def test_fx_forward_and_script(name, net):
    with set_scriptable(True):
        model = build(name)
    model.load_state_dict(net.state_dict())
    graph, x = traced(model), images(name)
    with torch.no_grad():
        expected = net(x)
        assert_close(graph(x), expected, rtol=0, atol=0)
        assert_close(torch.jit.script(graph)(x), expected)


@every_distinct_name
def test_fx_backward(name, net):
    expected, expected_grads = backward(copy.deepcopy(net).train(), images(name))
    out, grads = backward(traced(copy.deepcopy(net).train()), images(name))
    assert_close(out, expected, rtol=0, atol=0)
    assert_close(grads, expected_grads)


# -- feature maps -----------------------------------------------------------------------------------------------------


def check_maps(name: str, info: FeatureInfo, maps: list[torch.Tensor]) -> None:
    assert len(maps) == len(info.channels())
    for channels, reduction, features in zip(info.channels(), info.reduction(), maps, strict=True):
        side = family(name).size / reduction
        assert features.shape[:2] == (2, channels)
        for actual in features.shape[2:]:
            assert side / 2 < actual <= math.ceil(side) + 1
        assert features.isfinite().all()


@every_distinct_name
def test_intermediates(name, net):
    info = FeatureInfo(net.feature_info, len(net.feature_info))
    assert len(net.feature_info) >= 3
    for tap in net.feature_info:
        net.get_submodule(tap["module"])
    x, last = images(name), len(net.feature_info) - 1
    with torch.no_grad():
        final, maps = net.forward_intermediates(x, output_fmt="NCHW")
        check_maps(name, info, maps)
        assert_close(final, net.forward_features(x), rtol=1e-5, atol=1e-8)

        only = net.forward_intermediates(x, intermediates_only=True)
        assert_close(only, maps, rtol=0, atol=0)
        some = net.forward_intermediates(x, indices=[0, last], intermediates_only=True)
        assert_close(some, [maps[0], maps[last]], rtol=0, atol=0)
        some = net.forward_intermediates(x, indices=2, intermediates_only=True)
        assert_close(some, maps[-2:], rtol=0, atol=0)
        if family(name).layout == "NLC" and "tokens of taps" not in family(name).lacks:
            rows = net.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
            assert_close(rows, [m.flatten(2).transpose(1, 2) for m in maps], rtol=0, atol=0)
            (normed,) = net.forward_intermediates(x, indices=[last], norm=True, intermediates_only=True)
            rows = normed.flatten(2).transpose(1, 2)
            # zero where tokens were dropped
            assert_close(rows[rows.any(-1)], final[:, net.num_prefix_tokens :].flatten(0, 1))

    model = copy.deepcopy(net)
    model.set_grad_checkpointing()
    checkpointed, checkpointed_maps = model.forward_intermediates(x)
    assert_close(checkpointed, final, rtol=1e-4, atol=1e-5)
    assert_close(checkpointed_maps, maps, rtol=1e-4, atol=1e-5)


@every_distinct_name
def test_features_only(name, net):
    x, num_taps = images(name), len(net.feature_info)
    with torch.no_grad():
        maps = net.forward_intermediates(x, intermediates_only=True)
        backbone = build(name, features_only=True)
        check_maps(name, backbone.feature_info, backbone(x))
        for indices in (None, (0, num_taps - 1), (-2,)):
            kwargs = {} if indices is None else dict(out_indices=indices)
            backbone = build(name, features_only=True, feature_cls="getter", **kwargs)
            assert isinstance(backbone, FeatureGetterNet)
            missing, _ = backbone.model.load_state_dict(net.state_dict(), strict=False)
            assert missing == []
            # without a choice, the default taps of the file
            wanted = backbone.out_indices if indices is None else indices
            assert_close(backbone(x), [maps[i] for i in wanted], rtol=0, atol=0)
            assert backbone.feature_info.channels() == [maps[i].shape[1] for i in wanted]


@every_distinct_name
def test_prune_intermediate_layers(name, net):
    x, last = images(name), len(net.feature_info) - 1
    with torch.no_grad():
        expected = net(x)
        maps = net.forward_intermediates(x, intermediates_only=True)
        pruned = copy.deepcopy(net)
        assert list(pruned.prune_intermediate_layers([last], prune_head=False)) == [last]
        assert_close(pruned(x), expected)
        assert list(pruned.prune_intermediate_layers([-1])) == [last]
    for i, expected_map in enumerate(maps):
        with torch.no_grad():
            (early,) = net.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
            assert_close(early, expected_map)
            for prune_norm in (False, True):
                pruned = copy.deepcopy(net)
                taken = pruned.prune_intermediate_layers([i], prune_norm=prune_norm)
                assert list(taken) == [i]
                (kept,) = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
                assert_close(kept, expected_map)
            features = pruned.forward_features(x)
            if features.ndim == 4 and i < last:  # the features end at the tap
                assert_close(features, expected_map)
            assert pruned(x).shape[0] == 2
        pruned.train()
        maps_again = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
        sum(f.square().sum() for f in [*maps_again, pruned.forward_features(x)]).backward()
        gradients(pruned)
        if i < last and "classifiers of taps" in family(name).lacks:
            continue
        pruned.eval().reset_classifier(3, "avg")  # fits the width of the tap
        assert pruned(x).shape == (2, 3)


# -- weights ----------------------------------------------------------------------------------------------------------


def filter_of(model: nn.Module) -> Callable[[dict, nn.Module], dict]:
    return importlib.import_module(type(model).__module__).checkpoint_filter_fn


@every_name
def test_state_dict_is_plain(name, net):
    state = net.state_dict()
    storages = [tensor.untyped_storage().data_ptr() for tensor in state.values()]
    assert len(set(storages)) == len(state), "two entries share memory; safetensors refuses that"
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert {n for n, _ in net.named_parameters()} <= set(state)


@every_name
def test_init_weights_fills_everything(name):
    torch.manual_seed(0)
    expected = build(name)
    model = build(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(math.nan if tensor.is_floating_point() else 77)
    torch.manual_seed(0)
    model.init_weights()
    for (key, value), (_, reference) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert value.isfinite().all(), key
        # the same distribution: spread within a factor where there are enough numbers to tell
        if value.numel() >= 64:
            assert_close(value.std(), reference.std(), rtol=0.5, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")
            assert_close(value.mean(), reference.mean(), rtol=0.5, atol=0.1, msg=lambda m, key=key: f"{key}: {m}")
    assert_close(dict(model.named_buffers()), dict(expected.named_buffers()), rtol=0, atol=0)
    with torch.no_grad():
        assert model(images(name)).isfinite().all()


@every_name
def test_native_checkpoints_pass_the_filter(name, net):
    headless = copy.deepcopy(net)
    headless.reset_classifier(0)
    for source, kwargs in ((net, {}), (headless, dict(num_classes=0))):
        reloaded = build(name, **kwargs)
        state = dict(sorted(source.state_dict().items()))  # safetensors sorts
        filtered = filter_of(source)(state, reloaded)
        assert sorted(filtered) == sorted(state)
        assert all(torch.equal(filtered[key], state[key]) for key in state)
        reloaded.load_state_dict(filtered)
        with torch.no_grad():
            assert_close(reloaded(images(name)), source(images(name)), rtol=0, atol=0)


@every_name
def test_pretrained_weights_fit_other_channels_and_classes(name, net, folder):
    file = folder / "model.safetensors"
    safetensors.torch.save_file(net.state_dict(), file)
    cfg = timm.get_pretrained_cfg(name)
    source = net.state_dict()
    convs = {f"{conv}.weight" for conv in names_in(cfg.first_conv)}
    heads = tuple(f"{head}." for head in names_in(cfg.classifier))
    for num_classes in (5, 0):
        model = build(
            name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), in_chans=1, num_classes=num_classes
        )
        assert model.num_classes == num_classes
        state = model.state_dict()
        for key in state:
            if key in convs:
                assert_close(state[key], source[key].sum(dim=1, keepdim=True))
            elif key.startswith(heads):
                assert state[key].shape[0] == 5
            else:
                assert torch.equal(state[key], source[key]), key
        assert any(key.startswith(heads) for key in state) == (num_classes > 0)
        with torch.no_grad():
            assert model(images(name, in_chans=1)).shape == (2, num_classes or model.head_hidden_size)


@every_name
def test_saved_model_loads_bit_equal(name, net, folder):
    timm.models.save_for_hf(net, folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == name
    rebuilt = timm.create_model(name, device="meta", **config["model_args"])
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(loaded) is type(net)
    assert_close(loaded.state_dict(), net.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        assert_close(loaded(images(name)), net(images(name)), rtol=0, atol=0)
