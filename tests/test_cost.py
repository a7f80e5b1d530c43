"""Costs against the paper's tables, torch's counters and the built model; budgets."""

import json
import pickle
import weakref

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import timm_resnas  # noqa: F401  (registers the models)
from timm_resnas.arch import ArchError
from timm_resnas.models.network_def import NetworkDef
from timm_resnas.models.vit_resnas import VitResNas
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.count import count_macs
from timm_resnas.nas.space import SearchSpace


def macs(arch: NetworkDef, **model_args) -> int:
    return arch.costs(**model_args)["macs"]


def params(arch: NetworkDef, patch_head: bool = False, **model_args) -> int:
    """Of a built model: a patch head is a second classifier, which costs do not count."""
    classes = model_args.get("num_classes", arch.num_classes)
    return arch.costs(**model_args)["params"] + patch_head * (arch.head.dim + 1) * classes


def peak_memory(arch: NetworkDef, **model_args) -> int:
    return arch.costs(**model_args)["memory"]


TINY = SearchSpace.preset("vit_resnas_tiny").largest
SMALL = SearchSpace.preset("vit_resnas_small").largest

# parameters without and with patch head, MACs, MACs with distillation token
TABLE = {
    "vit_res_tiny": (42_012_736, 42_781_736, 1_794_378_240, 1_834_082_304),
    "vit_resnas_tiny": (40_793_552, 41_498_552, 1_782_630_272, 1_821_697_536),
    "vit_resnas_small": (63_724_108, 64_605_108, 2_845_501_856, 2_906_562_880),
    "vit_resnas_medium": (96_442_672, 97_323_672, 4_513_135_936, 4_605_815_296),
    "largest of tiny": (84_814_464, 85_839_464, 3_497_553_920, 3_578_324_992),
    "largest of small": (155_318_528, 156_599_528, 6_260_342_784, 6_409_476_096),
}


def named_arch(name: str) -> NetworkDef:
    if name.startswith("largest"):
        return {"tiny": TINY, "small": SMALL}[name.split()[-1]]
    with torch.device("meta"):
        return timm.create_model(name).arch


def build(arch: NetworkDef, device: str = "meta", **kwargs) -> nn.Module:
    with torch.device(device):
        model = timm.create_model("vit_resnas", network_def=arch.to_network_def(), **kwargs)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    arch = named_arch(name)
    got = params(arch), params(arch, patch_head=True), macs(arch), macs(arch, distill_token=True)
    assert got == TABLE[name]


def test_table_distilled_params():
    assert params(named_arch("vit_res_tiny"), distill_token=True) == 42_782_120


@pytest.mark.parametrize(
    "size, num_params, num_macs",
    [
        (224, 97_323_672, 4_513_135_936),
        (280, 97_389_192, 7_219_069_888),
        (336, 97_469_272, 10_739_099_456),
        (392, 97_563_912, 15_200_890_816),
    ],
)
def test_table_resolutions(size, num_params, num_macs):
    arch = named_arch("vit_resnas_medium")
    assert params(arch, img_size=size, patch_head=True) == num_params
    assert macs(arch, img_size=size) == num_macs


def test_hand_counted():
    # stem 16x16 -> 8x8 maps of 2 channels -> 2x2 patches; 5 tokens of 4 channels; 1 patch + 1 token of 6
    arch = NetworkDef.from_network_def(
        ((5, 4, 2), (1, (4, 3, 2), (4, 7), 1), (3, 4, 6), (1, (6, 1, 2), (6, 9), 0), (2, 6, 3))
    )
    stem = (1 * 2 * 9 + 2 * 2 * 2 * 9) * 64 + 4 * 2 * 16 * 4
    block = 5 * 4 * 18 + 2 * 5 * 5 * 6 + 5 * 6 * 4 + 2 * 5 * 4 * 7
    reduction = 4 * 6 * 9 * 1 + 4 * 6
    assert macs(arch, img_size=16, patch_size=8, in_chans=1) == stem + block + reduction + 6 * 3
    assert macs(arch, img_size=16, patch_size=8, in_chans=1, num_classes=0) == stem + block + reduction


@pytest.mark.parametrize("space, size", [("vit_resnas_tiny", 224), ("vit_resnas_small", 280)])
def test_equals_counter_of_built_models(space, size, monkeypatch):
    # neither initial values nor norms and activations count; without them a meta device is three times as fast
    monkeypatch.setattr(VitResNas, "init_weights", lambda self, needs_reset=True: None)
    space = SearchSpace.preset(space)
    rng = np.random.default_rng(size)
    for arch in space.build(space_picks(space, 13, rng)):
        model = build(arch, img_size=size)
        assert params(arch, img_size=size) == sum(p.numel() for p in model.parameters())
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.BatchNorm2d | nn.GELU):
                module.forward = nn.Identity().forward
        assert macs(arch, img_size=size) == count_macs(model, (3, size, size))


def space_picks(space: SearchSpace, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([rng.integers(len(gene.draws), size=n) for gene in space.searched], axis=1)


@pytest.mark.parametrize("kind", [(0,), (4,), (5, 10)])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(img_size=(64, 96), patch_size=8, in_chans=1, num_classes=7),
        dict(img_size=96, patch_size=4, in_chans=4, num_classes=0),
        dict(img_size=(128, 64), patch_size=16, num_classes=11, distill_token=True),
        dict(img_size=64, patch_size=8, num_classes=5, patch_head=True),
    ],
)
def test_equals_counter_of_unusual_models(kind, kwargs):
    arch = SearchSpace.preset("mini").sample(np.random.default_rng(1)).to_network_def()
    arch = NetworkDef.from_network_def(((kind[0], arch[0][1], *kind[1:]), *arch[1:]))
    model = build(arch, **kwargs)
    size = kwargs["img_size"]
    size = size if isinstance(size, tuple) else (size, size)
    assert params(arch, **kwargs) == sum(p.numel() for p in model.parameters())
    kwargs.pop("patch_head", None)
    assert macs(arch, **kwargs) == count_macs(model, (kwargs.get("in_chans", 3), *size))


class LiveMemory(TorchDispatchMode):
    """Largest sum of the sizes of the storages that operations made and something still names."""

    def __init__(self, model: nn.Module, image: torch.Tensor) -> None:
        super().__init__()
        fixed = [*model.parameters(), *model.buffers(), image]
        self.known = {t.untyped_storage()._cdata for t in fixed}
        self.live = self.peak = image.nbytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def freed(self, ident: int, size: int) -> None:
        self.known.discard(ident)
        self.live -= size


def measured_memory(arch: NetworkDef, img_size, in_chans: int = 3, **kwargs) -> int:
    model = build(arch, device="cpu", img_size=img_size, in_chans=in_chans, **kwargs)
    image = torch.zeros(1, in_chans, *model.img_size)
    with torch.inference_mode(), LiveMemory(model, image) as memory:
        model(image)
    return memory.peak


def test_peak_memory_of_built_models():
    space = SearchSpace.preset("micro")
    kwargs = {k: v for k, v in space.model_args.items() if k != "distill_token"}
    archs = [space.largest, space.smallest, *(space.sample(np.random.default_rng(i)) for i in range(4))]
    assert [peak_memory(a, **kwargs) for a in archs] == [measured_memory(a, **kwargs) for a in archs]


BLOCK = (1, (16, 1, 16), (16, 16), 1)


@pytest.mark.parametrize("distill_token", [False, True])
@pytest.mark.parametrize(
    "network_def",
    [
        ((0, 16), BLOCK, (2, 16, 5)),  # MLP output
        ((0, 16), (1, (16, 5, 16), (16, 16), 1), (2, 16, 5)),  # attention
        ((0, 16), (1, (16, 1, 16), (16, 90), 1), (2, 16, 5)),  # GELU
        ((0, 64), (1, (64, 1, 16), (64, 90), 0), (2, 64, 5)),  # position embedding
        ((0, 16), (3, 16, 20), (2, 20, 5)),  # reduction, joining
        ((0, 16), (3, 16, 200), (2, 200, 5)),  # reduction, adding
        ((4, 16), BLOCK, (2, 16, 5)),  # stem
        ((5, 900, 4), (2, 900, 5)),
        ((0, 16), BLOCK, (2, 16, 9000)),  # classifier
    ],
)
def test_peak_memory_of_each_part(network_def, distill_token):
    arch = NetworkDef.from_network_def(network_def)
    kwargs = dict(img_size=16, patch_size=4, in_chans=2, distill_token=distill_token)
    assert peak_memory(arch, **kwargs) == measured_memory(arch, **kwargs)


def test_absent_blocks_cost_nothing():
    arch = SearchSpace.preset("micro").smallest
    kwargs = dict(img_size=32, patch_size=4)
    assert arch.canonical() != arch
    for cost in (macs, params, peak_memory):
        assert cost(arch.canonical(), **kwargs) == cost(arch, **kwargs)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(img_size=200), "multiple of the total stride 56"),
        (dict(patch_size=7, img_size=28), "must be even"),
        (dict(in_chans=0), "in_chans must be an integer of at least 1, got 0"),
        (dict(num_classes=-1), "num_classes must be an integer of at least 0"),
        (dict(img_size=(224, 224, 3)), r"img_size must be a positive integer or \(height, width\)"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ArchError, match=message):
        macs(TINY, **kwargs)


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("macs=1.8G", dict(macs=1_800_000_000)),
        ("macs=1.7944G,latency=12ms", dict(macs=1_794_400_000, latency_ms=12.0)),
        ("latency=0.5s, params=30m", dict(latency_ms=500.0, params=30_000_000)),
        ("latency_ms=800us", dict(latency_ms=0.8)),
        ("memory=4MB,MACS=2e6", dict(memory=4_000_000, macs=2_000_000)),
        ("memory=4MiB", dict(memory=4 * 2**20)),
        ("memory=64k,lower=0.5", dict(memory=64_000, lower=0.5)),
        ("params=5.5K,lower=0", dict(params=5500, lower=0.0)),
    ],
)
def test_budget_parse(text, expected):
    budget = Budget.parse(text)
    assert budget == Budget(**expected)
    assert list(budget.limits) == [k for k in expected if k != "lower"]
    assert Budget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget
    assert pickle.loads(pickle.dumps(budget)) == budget


@pytest.mark.parametrize(
    "text, message",
    [
        ("macs", "cannot read 'macs'"),
        ("flops=1G", "cannot read 'flops=1G'"),
        ("macs=1.8Q", "cannot read '1.8Q'; expected a number, units: k, m, g"),
        ("macs=12ms", "cannot read '12ms'"),
        ("latency=12G", "units: ms, us, s"),
        ("macs=", "cannot read ''"),
        ("macs=1..8G", "cannot read"),
        ("macs=1G,macs=2G", "macs is given twice"),
        ("macs=0", "must be above 0"),
        ("lower=0.5", "at least one limit"),
        ("macs=1G,lower=1", "below 1"),
    ],
)
def test_budget_parse_errors(text, message):
    with pytest.raises(ValueError, match=message):
        Budget.parse(text)


def test_budget_constructor_errors():
    with pytest.raises(ValueError, match="unknown budget limit 'flops'; known: macs, params, latency_ms, memory"):
        Budget(flops=3)
    with pytest.raises(ValueError, match="finite number"):
        Budget(macs=float("nan"))
    with pytest.raises(AttributeError):
        Budget(macs=3).lower = 0.5


def test_budget_check():
    budget = Budget(params=1000, macs=2000)
    assert budget.check(dict(params=975, macs=1)) == []  # the band is the first-named limit's
    assert budget.check(dict(params=1000, macs=2000)) == []
    assert budget.check(dict(params=974, macs=2000)) == ["params"]
    assert budget.check(dict(params=1001, macs=2001)) == ["params", "macs"]
    assert budget.check(dict(params=float("nan"), macs=1)) == ["params"]
    assert Budget(params=1000, lower=0).check(dict(params=1)) == []
    with pytest.raises(ValueError, match="limits macs"):
        budget.check(dict(params=975))
    assert Budget(macs=1, params=2) != Budget(params=2, macs=1)


def test_budget_text():
    assert str(Budget(macs=1.8e9, latency_ms=12)) == "macs 1.755G to 1.8G, latency at most 12 ms"
    assert str(Budget(memory=3e6, lower=0)) == "memory at most 3 MB"
    assert eval(repr(Budget(macs=5, latency_ms=2.5)), {"Budget": Budget}) == Budget(macs=5, latency_ms=2.5)
