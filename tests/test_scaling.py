"""Scales of branches that each depth and width of a sub-network has for itself."""

import copy
import json

import numpy as np
import pytest
import test_autoformer_supernet
import test_supernet
import timm
import torch
from recipe_server import Recipe
from test_supernet_recipe import QUICK
from torch import nn
from torch.testing import assert_close

import timm_resnas
from recipes import search as search_recipe
from recipes import supernet as recipe
from timm_resnas.nas.scaling import SwitchableScale


class Row(nn.Module):
    """What a plain block's branch is multiplied by."""

    def __init__(self, row):
        super().__init__()
        self.row = row

    def forward(self, x):
        return x * self.row


def make(family, init=0.75):
    """A supernet with scales that all differ, the same one without, sub-networks and images."""
    if family == "vit_resnas":
        space = test_supernet.small_space()
        plain = test_supernet.perturbed(space)
        archs, x = test_supernet.twins(space), test_supernet.images(plain, 12)
    else:
        space = test_autoformer_supernet.small_space()
        plain = test_autoformer_supernet.perturbed(space)
        rng = np.random.default_rng(3)
        archs = [space.largest, space.smallest, *space.sample_many(4, rng)]
        x = test_autoformer_supernet.images(12, space)
    net = timm.create_model(space.supernet, space=space.to_dict(), switchable_scale=init).to(x.dtype)
    missing, unexpected = net.load_state_dict(plain.state_dict(), strict=False)
    tables = {n: p for n, p in net.named_parameters() if n.endswith(".table")}
    assert set(missing) == set(tables) and not unexpected
    assert all((p == init).all() for p in tables.values())
    generator = torch.Generator().manual_seed(5)
    for table in tables.values():
        table.data += 0.3 * torch.rand(table.shape, generator=generator, dtype=table.dtype)
    return net.train(plain.training), plain, archs, x


def row_of(net, arch, block):
    """Entry of a block's tables, by hand: number of present blocks, and width."""
    if net.space.family == "autoformer":
        choices = net.space.choices_dict()
        return sorted(choices["depth"]).index(arch.depth), sorted(choices["embed_dim"]).index(arch.embed_dim)
    stage = sum(hasattr(b, "out_dim") for b in arch.blocks[:block])
    least = net.space.smallest.depths[stage]
    widths = [gene for gene in net.space.genes if gene.name == "embed_dim"][stage].choices
    return arch.depths[stage] - least, sorted(widths).index(arch.blocks[block].dim)


def by_hand(net, plain, arch):
    """The sub-network without scales, with what its branches are multiplied by put between its layers."""
    model = plain.extract(arch)
    test_supernet.freeze_bn(model)
    if net.space.family == "autoformer":
        there = list(range(arch.depth))
    else:
        there = [i for i, b in enumerate(arch.blocks) if getattr(b, "exists", True)]
    for i, block in zip(there, model.blocks, strict=True):
        if hasattr(block, "ls1"):
            at, dim = row_of(net, arch, i), block.norm1.weight.numel()
            block.ls1, block.ls2 = (Row(getattr(net.blocks[i], n).table[at][:dim]) for n in ("ls1", "ls2"))
    return model


@pytest.mark.parametrize("mode", ["sliced", "masked"])
@pytest.mark.parametrize("family", ["vit_resnas", "autoformer"])
def test_each_depth_and_width_has_its_own(family, mode):
    """Outputs, and gradients of all tables, are those of sub-networks made by hand."""
    net, plain, archs, x = make(family)
    assert len({row_of(net, a, 0) for a in archs}) > 2
    test_supernet.freeze_bn(net)
    y = net(x, archs=archs, mode=mode)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    tables = {n: p for n, p in net.named_parameters() if n.endswith(".table")}
    found = torch.autograd.grad((y * weight).sum(), list(tables.values()))
    each = torch.cat([by_hand(net, plain, arch)(part) for arch, part in zip(archs, x.chunk(len(archs)), strict=True)])
    assert_close(y, each, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad((each * weight).sum(), list(tables.values()), allow_unused=True)
    for name, grad, own in zip(tables, found, wanted, strict=True):
        assert_close(grad, torch.zeros_like(grad) if own is None else own, rtol=1e-9, atol=1e-9, msg=name)
    # all others, against one sub-network at a time
    net.zero_grad()
    (net(x, archs=archs, mode=mode) * weight).sum().backward()
    together = {n: p.grad for n, p in net.named_parameters()}
    net.zero_grad()
    for arch, part, w in zip(archs, x.chunk(len(archs)), weight.chunk(len(archs)), strict=True):
        (net(part, archs=[arch]) * w).sum().backward()
    for name, p in net.named_parameters():
        assert_close(together[name], p.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("family", ["vit_resnas", "autoformer"])
def test_folded_into_what_is_extracted(family, tmp_path):
    net, plain, archs, x = make(family)
    net, plain, x = net.float().eval(), plain.float().eval(), x.float()
    with torch.inference_mode():
        for arch in archs[:3]:
            net.set_arch(arch)
            model = net.extract(arch)
            assert model.state_dict().keys() == plain.extract(arch).state_dict().keys()
            assert not any(isinstance(m, SwitchableScale) for m in model.modules())
            assert_close(model(x), net(x), rtol=1e-4, atol=1e-4)
            assert_close(by_hand(net, plain, arch)(x), net(x), rtol=1e-4, atol=1e-4)
            assert (plain.extract(arch)(x) - net(x)).abs().max() > 1e-3
        # the full network's are the last of all, also where it is compiled or taken for a plain model
        net.set_arch(None)
        full = net(x)
        net.set_arch(getattr(net.space, "allocation", net.space.largest))
        assert_close(net(x), full, rtol=1e-4, atol=1e-4)
        net.set_arch(None)
        assert_close(net.ordinary()(x), full, rtol=0, atol=0)
        assert_close(torch.jit.script(net)(x), full, rtol=1e-4, atol=1e-4)
        timm_resnas.save_pretrained(net, tmp_path / "net")
        again = timm_resnas.load(tmp_path / "net", check=True).eval()
        again.set_arch(archs[1])
        net.set_arch(archs[1])
        assert torch.equal(again(x), net(x))
    # sorting channels changes no function of the full network, and decay spares scales
    net.set_arch(None)
    other = copy.deepcopy(net)
    other.sort_channels()
    with torch.inference_mode():
        assert_close(other(x), full, rtol=1e-4, atol=1e-4)
    assert {n for n, _ in net.named_parameters() if n.endswith(".table")} < net.no_weight_decay()
    assert not any(n.endswith(".table") for n in plain.no_weight_decay())


def test_widths_beside_the_choices_take_the_nearest():
    net, *_ = make("autoformer")
    widths, depths = (sorted(net.space.choices_dict()[n]) for n in ("embed_dim", "depth"))
    arch = net.space.largest
    beside = type(arch)(widths[0] + 1, arch.mlp_ratio[: depths[0]], (1,) * depths[0])
    assert net.scales_at(beside)[0] == (0, 0)


@pytest.mark.parametrize("init", [0, -1.0, True, float("inf"), "1"])
def test_a_first_value_that_is_none(init):
    with pytest.raises(ValueError, match="switchable_scale, the first value of scales, must be a number above 0"):
        timm.create_model("vit_resnas_supernet", switchable_scale=init)


def test_trained_by_the_recipe(recipe_server, tmp_path):
    """Scales move, are saved with the supernet, and a search on it ends in a plain network."""
    Recipe(recipe_server, "supernet", QUICK).run(tmp_path / "run", "--switchable-scale", "0.5", "--step", "sandwich")
    net = timm_resnas.load(tmp_path / "run" / "supernet")
    args = json.loads((tmp_path / "run" / "supernet" / "config.json").read_text())["model_args"]
    assert args["switchable_scale"] == 0.5
    table = torch.stack([p[:, :, 0] for n, p in net.named_parameters() if n.endswith("0.ls1.table")])
    assert table.unique().numel() > 1 and (table - 0.5).abs().max() < 0.4
    for arch in net.space.sample_many(2, np.random.default_rng(0)):
        model = net.extract(arch)
        assert not any("ls1" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("main", "given", "message"),
    [
        (recipe.main, ["--space", "efficientformer_micro"], "--switchable-scale is for spaces of ViT-ResNAS and Auto"),
        (recipe.main, ["--switchable-scale", "0"], "--switchable-scale"),
        (search_recipe.main, ["--supernet", "x"], "--switchable-scale is for training a supernet"),
    ],
)
def test_options_that_do_not_go_with_scales(main, given, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--cpu", "--switchable-scale", "0.5", *given, "--output", str(tmp_path)])
    assert message in capsys.readouterr().err
