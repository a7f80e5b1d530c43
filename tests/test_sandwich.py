"""Sandwich rule and NASViT's: losses and gradients against sub-networks computed one by one, and released code's."""

import json

import plain_vit  # noqa: F401
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.layers import DropPath
from torch import nn

from timm_resnas.nas.sampling import SandwichSampler
from timm_resnas.tasks import AlphaDivergence, NasVitTask, SandwichTask, merge_gradients

SUPERNETS = [
    *("vit_resnas_supernet", "plain_vit_supernet", "autoformer_supernet"),
    *("efficientformer_supernet", "efficientformerv2_supernet"),
]


def supernet(name, **kwargs):
    torch.manual_seed(0)
    net = timm.create_model(name, img_size=32, **kwargs).double().train()
    for m in net.modules():  # the batch decides nothing then
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.train = lambda mode: None
    return net


def batch(n=4):
    torch.manual_seed(1)
    return torch.randn(n, 3, 32, 32, dtype=torch.float64), torch.arange(n)


def three(net):
    return SandwichSampler(net.space, 3, seed=2, warmup_epochs=0).archs(0, 0)


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("name", SUPERNETS)
def test_sub_networks_on_the_whole_batch(name):
    net, archs = supernet(name), three(supernet(name))
    x, _ = batch()
    modes = net.modes
    wanted = torch.cat([net(x, archs=[arch]) for arch in archs])
    for mode in modes:
        torch.testing.assert_close(net(x, archs=archs, mode=mode, whole=True), wanted)
    with pytest.raises(ValueError, match="4 images cannot be cut into 0"):
        net(x, archs=[], whole=True)


@pytest.mark.parametrize("name", SUPERNETS)
def test_sandwich_is_its_networks_one_by_one(name):
    """The largest by labels; each other one, alone, by the largest one's probabilities, which are no variable."""
    net, (x, y) = supernet(name), batch()
    archs = three(net)
    task = SandwichTask(net, smoothing=0.2, verbose=False)
    result = task(x, y, archs=archs)
    found = gradients(net, result["loss"])

    logits = net(x, archs=[net.space.largest])
    taught = logits.detach().softmax(-1)
    losses = [F.cross_entropy(logits, y, label_smoothing=0.2)]
    losses += [-(taught * net(x, archs=[arch]).log_softmax(-1)).sum(-1).mean() for arch in archs[1:]]
    assert archs[0] == net.space.largest and archs[1] == net.space.smallest
    torch.testing.assert_close(result["loss"], sum(losses))
    torch.testing.assert_close(result["output"], logits)
    torch.testing.assert_close(result["others_loss"], sum(losses[1:]))
    wanted = gradients(net, sum(losses))
    assert found.keys() == wanted.keys() and len(found) > 20
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, msg=key)


def test_drop_path_is_for_the_largest_only():
    net, (x, y) = supernet("vit_resnas_supernet", drop_path_rate=0.5), batch()
    archs = three(net)
    rates = [m.drop_prob for m in net.modules() if isinstance(m, DropPath)]
    task = SandwichTask(net, verbose=False).train()
    kept = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses = task.losses(x, y, archs)
        first = next(losses)
        drawn = torch.get_rng_state()
        next(losses)
        assert torch.equal(torch.get_rng_state(), drawn)  # nothing is drawn for the others
        kept[seed] = first.item()
    assert kept[0] != kept[1]
    assert rates == [m.drop_prob for m in net.modules() if isinstance(m, DropPath)] and max(rates) == 0.5


def test_a_teacher_in_place_of_labels():
    net, (x, _) = supernet("plain_vit_supernet"), batch()
    torch.manual_seed(5)
    teacher = timm.create_model("plain_vit", pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3), std=(0.4,) * 3)).double()
    task = SandwichTask(net, teacher=teacher, temperature=0.2, dtype=torch.float64, verbose=False).train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    result = task(x, None, archs=three(net))
    mean = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).view(3, 1, 1)
    own = (x * 0.5 + 0.5 - mean) / 0.4
    wanted = -((5 * teacher(own)).softmax(-1) * net(x, archs=[net.space.largest]).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(result["largest_loss"], wanted.detach())
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        SandwichTask(net, teacher=teacher, temperature=0)


# -- AlphaNet's divergence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mild", "sharp", "wide"])
def test_adaptive_divergence_of_the_released_code(golden, case):
    with safe_open(golden("nasvit_alphadiv_a"), "pt") as f:
        given = {k.removeprefix(f"{case}/"): f.get_tensor(k) for k in f.keys() if k.startswith(f"{case}/")}
    student = given["student_logits"].requires_grad_()
    divergence = AlphaDivergence()
    values = divergence.values(student, given["teacher_logits"])
    torch.testing.assert_close(values[0], given["value_alpha_-1"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values[1], given["value_alpha_+1"], rtol=1e-6, atol=1e-6)
    loss = divergence(student, given["teacher_logits"])
    torch.testing.assert_close(loss, given["loss"][0], rtol=1e-6, atol=1e-6)
    loss.backward()
    torch.testing.assert_close(student.grad, given["grad_student"], rtol=1e-6, atol=1e-6)


def logit_pair(scale):
    torch.manual_seed(3)
    student, teacher = (scale * torch.randn(2, 5, 7, dtype=torch.float64)).unbind(0)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_gradient_is_that_of_the_divergence(alpha):
    """Of one order, unclipped: the surrogate's gradient against that of (sum p^a q^(1-a) - 1) / (a (a - 1))."""
    student, teacher = logit_pair(0.5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    if alpha == 1:
        value = (p * (p / q).log()).sum(-1)
    elif alpha == 0:
        value = (q * (q / p).log()).sum(-1)
    else:
        value = ((p**alpha * q ** (1 - alpha)).sum(-1) - 1) / (alpha * (alpha - 1))
    divergence = AlphaDivergence((alpha,), clip=1e9)
    torch.testing.assert_close(divergence.values(student.detach(), teacher)[0], value.detach())
    (wanted,) = torch.autograd.grad(value.mean(), student)
    (found,) = torch.autograd.grad(divergence(student, teacher), student)
    torch.testing.assert_close(found, wanted)


def test_the_larger_divergence_is_taken_for_each_image():
    student, teacher = logit_pair(1.5)
    both = AlphaDivergence()
    values = both.values(student.detach(), teacher)
    chosen = values.argmax(0)
    assert set(chosen.tolist()) == {0, 1}
    rows = [AlphaDivergence((both.alphas[c],))(student[i : i + 1], teacher[i : i + 1]) for i, c in enumerate(chosen)]
    torch.testing.assert_close(both(student, teacher), torch.stack(rows).mean())


# -- gradients that conflict ------------------------------------------------------------------------------------------


def test_projection_of_the_released_code(golden):
    with safe_open(golden("nasvit_gradproj_a"), "pt") as f:
        cases = json.loads(f.metadata()["cases"])
        given = {k: f.get_tensor(k) for k in f.keys()}
    assert len(cases) == 9
    for case, facts in cases.items():
        others, largest = ([given.get(f"{case}/g_{side}")] for side in ("subnets", "supernet"))
        (projected,), (added,) = (merge_gradients(others, largest, project=p) for p in (True, False))
        wanted = [given[f"{case}/out_{name}"] for name in ("projected", "plain_sum")]
        if others[0] is None:  # there the released code doubles it
            wanted = largest * 2
        torch.testing.assert_close([projected, added], wanted, rtol=1e-6, atol=1e-6, msg=case)
        if facts.get("coef"):
            found = ((projected - largest[0]) / others[0]).median().item() - 1
            assert found == pytest.approx(facts["coef"], rel=1e-3), case


def test_projected_gradients_are_orthogonal():
    torch.manual_seed(0)
    other, largest = torch.randn(2, 40, 5, dtype=torch.float64).unbind(0)
    largest = largest - 1.3 * other
    (merged,) = merge_gradients([other], [largest])
    assert ((merged - other) * other).sum().abs() < 1e-5 * other.square().sum()
    torch.testing.assert_close(merge_gradients([other], [largest], limit=0.0)[0], other + largest)
    (half,) = merge_gradients([other], [-5 * other])  # the largest coefficient is 2
    torch.testing.assert_close(half, 3 * other - 5 * other)
    assert merge_gradients([None], [None]) == [None]


def test_nasvit_merges_by_epoch_clips_one_side_and_minds_the_scale():
    net = supernet("plain_vit_supernet")
    task = NasVitTask(net, project_epoch=3, verbose=False)
    torch.manual_seed(0)
    others = [torch.randn(50, dtype=torch.float64), torch.randn(7, dtype=torch.float64), None]
    largest = [-0.2 * others[0] + 0.1, None, torch.ones(2, dtype=torch.float64)]
    norm = torch.cat(others[:2]).norm()
    clipped = [g / (norm + 1e-6) for g in others[:2]]
    for epoch, project in ((2, False), (3, True)):
        found = task.merge(largest, others, epoch)
        wanted = merge_gradients([*clipped, None], largest, project=project)
        torch.testing.assert_close(found, wanted)
        scaled = task.merge(
            [None if g is None else 1024 * g for g in largest], [1024 * g for g in others[:2]] + [None], epoch, 1024.0
        )
        torch.testing.assert_close([g / 1024 for g in scaled], found)
    small = [0.01 * g for g in others[:2]]
    torch.testing.assert_close(task.merge(largest[:2], small, 0), merge_gradients(small, largest[:2], project=False))
    free = NasVitTask(net, clip_others=None, verbose=False)
    torch.testing.assert_close(free.merge(largest, others, 0), merge_gradients(others, largest, project=False))


def test_nasvit_uses_its_divergence():
    net, (x, y) = supernet("plain_vit_supernet"), batch()
    archs = three(net)
    first, second = NasVitTask(net, verbose=False).losses(x, y, archs)
    largest, *others = (net(x, archs=[arch]) for arch in archs)
    torch.testing.assert_close(second, sum(AlphaDivergence()(o, largest.detach()) for o in others))
    torch.testing.assert_close(first, F.cross_entropy(largest, y, label_smoothing=0.1))


@pytest.mark.parametrize("name", ["vit_resnas_supernet", "autoformer_supernet", "efficientformerv2_supernet"])
def test_checkpointing_with_drop_path_is_refused(name):
    net = timm.create_model(name, img_size=32, drop_path_rate=0.1).train()
    net.set_grad_checkpointing()
    task = SandwichTask(net, verbose=False)
    x, archs = torch.zeros(2, 3, 32, 32), [net.space.largest, net.space.smallest]
    with pytest.raises(ValueError, match="checkpointing"):
        task(x, torch.zeros(2, dtype=torch.long), archs)
    for module in net.modules():
        assert getattr(module, "drop_prob", None) != 0.0
    with pytest.raises(ValueError, match="at least one other"):
        task(x, torch.zeros(2, dtype=torch.long), archs[:1])
