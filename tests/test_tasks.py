"""Training tasks: losses against slow references written out here, and what gradients reach."""

import math

import pytest
import timm
import torch
from torch import nn

import timm_resnas  # noqa: F401
from timm_resnas.data import TokenMix
from timm_resnas.hub import save_pretrained
from timm_resnas.nas.sampling import MultiArchSampler
from timm_resnas.tasks import (
    HardLabelDistillationTask,
    SoftLabelDistillationTask,
    SupernetTask,
    TokenLabelingTask,
    TokenLabelLoss,
)

MIXED = dict(smoothing=0.1, mixup_alpha=0.8)
SRET = dict(img_size=32, num_classes=5)


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("vit_resnas", **dict(dict(num_classes=4, patch_head=True), **kwargs))


def small_supernet(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("vit_resnas_supernet", **dict(dict(num_classes=4), **kwargs))


def log_softmax(row):
    top = max(row)
    total = math.log(sum(math.exp(v - top) for v in row)) + top
    return [v - total for v in row]


def cross_entropy(target, logits):
    """Of one row, number by number."""
    return -sum(t * v for t, v in zip(target, log_softmax(logits), strict=True))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


class Fixed(nn.Module):
    """Gives the same outputs for any images; they are its parameters."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = nn.ParameterList([nn.Parameter(o) for o in outputs])
        self.token_labeling = False
        self.num_classes, self.in_chans = outputs[0].shape[-1], 3
        self.pretrained_cfg = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def set_token_labeling(self, enable=True):
        self.token_labeling = enable

    def forward(self, x, archs=None, mode="auto"):
        self.seen = x, archs, mode
        return tuple(self.outputs) if self.token_labeling and self.training else self.outputs[0]


def logits_and_targets(seed=0):
    """Class and patch logits of 3 images, 4 tokens and 5 classes, and targets for them."""
    rng = torch.Generator().manual_seed(seed)
    logits = [torch.randn(*shape, generator=rng, dtype=torch.float64) * 3 for shape in ((3, 5), (3, 4, 5))]
    targets = [torch.rand(*shape, generator=rng, dtype=torch.float64).softmax(-1) for shape in ((3, 5), (3, 4, 5))]
    return logits, targets


# -- token labelling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("make", [TokenLabelingTask, lambda net, **kw: SupernetTask(net, token_labeling=True, **kw)])
def test_token_labeling_loss(make, weights):
    logits, targets = logits_and_targets()
    net = Fixed(*logits)
    result = make(net, cls_weight=weights[0], patch_weight=weights[1])(torch.zeros(3, 3, 8, 8), targets)
    cls = mean(cross_entropy(t, x) for t, x in zip(targets[0].tolist(), logits[0].tolist(), strict=True))
    rows = zip(targets[1].flatten(0, 1).tolist(), logits[1].flatten(0, 1).tolist(), strict=True)
    patch = mean(cross_entropy(t, x) for t, x in rows)
    assert result["cls_loss"].item() == pytest.approx(cls, rel=1e-12)
    assert result["patch_loss"].item() == pytest.approx(patch, rel=1e-12)
    assert result["loss"].item() == pytest.approx(weights[0] * cls + weights[1] * patch, rel=1e-12)
    assert torch.equal(result["output"], logits[0])
    result["loss"].backward()
    for i, (weight, count) in enumerate(zip(weights, (3, 12), strict=True)):  # softmax minus target
        wanted = weight * (logits[i].softmax(-1) - targets[i]) / count
        torch.testing.assert_close(net.outputs[i].grad, wanted)
    assert not result["cls_loss"].requires_grad and not result["patch_loss"].requires_grad


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_token_labeling_trains_both_heads(weights):
    net = small()
    task = TokenLabelingTask(net, cls_weight=weights[0], patch_weight=weights[1])
    mix = TokenMix(4, net.grids[-1], **MIXED)
    images, *target = mix(torch.randn(6, 3, *net.img_size), torch.randint(4, (6,)), 0)
    task(images, target)["loss"].backward()
    grads = {n: p.grad.abs().sum() for n, p in net.named_parameters()}
    assert (grads["head.weight"] > 0) == (weights[0] > 0)
    assert (grads["patch_head.weight"] > 0) == (weights[1] > 0)
    assert grads["pos_embed"] > 0
    assert net.eval()(images).shape == (6, 4)  # one output where nothing is trained
    with pytest.raises(RuntimeError, match="the model is in eval mode; call task.train"):
        task(images, target)


def test_token_labeling_of_what_does_not_fit():
    with pytest.raises(ValueError, match="patch_head=True"):
        TokenLabelingTask(small(patch_head=False))
    with pytest.raises(ValueError, match="ResNet has no patch classifier"):
        TokenLabelingTask(timm.create_model("test_resnet"))
    for weights in ((-1.0, 1.0), (0.0, 0.0)):
        with pytest.raises(ValueError, match="neither may be below 0, nor both 0"):
            TokenLabelLoss(*weights)
    logits, targets = logits_and_targets()
    task, images = TokenLabelingTask(Fixed(*logits)), torch.zeros(3, 3, 8, 8)
    with pytest.raises(ValueError, match=r"must be the pair \(targets, patch_targets\)"):
        task(images, targets[0])
    with pytest.raises(ValueError, match=r"patch targets of shape \[3, 3, 5\] do not fit .*\[3, 4, 5\].*grids\[-1\]"):
        task(images, (targets[0], targets[1][:, 1:]))
    with pytest.raises(ValueError, match=r"class targets of shape \[3, 4\]"):
        task(images, (targets[0][:, 1:], targets[1]))


def test_ema_of_a_token_labeling_model_evaluates():
    task = TokenLabelingTask(small())
    task.setup_ema(decay=0.5)
    assert task.get_eval_model(ema=True).eval()(torch.zeros(2, 3, *task.trainable_module.img_size)).shape == (2, 4)


# -- the supernet's step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_supernet_loss_of_labels(smoothing):
    logits, _ = logits_and_targets()
    labels = torch.tensor([4, 0, 2])
    net, images = Fixed(logits[0]), torch.zeros(3, 3, 8, 8)
    result = SupernetTask(net, smoothing=smoothing)(images, labels, archs=["a", "b", "c"], mode="masked")
    assert net.seen == (images, ["a", "b", "c"], "masked")
    rows = []
    for label, row in zip(labels.tolist(), logits[0].tolist(), strict=True):
        target = [smoothing / 5] * 5
        target[label] += 1 - smoothing
        rows.append(cross_entropy(target, row))
    assert result["loss"].item() == pytest.approx(mean(rows), rel=1e-12)
    assert set(result) == {"loss", "output"} and torch.equal(result["output"], logits[0])


@pytest.mark.parametrize("mode", ["sliced", "masked"])
@pytest.mark.parametrize("token_labeling", [False, True])
def test_supernet_step_is_the_mean_of_its_groups(token_labeling, mode):
    """Loss and gradients of one step, against each sub-network alone on its images."""
    net = small_supernet(patch_head=token_labeling or None).double()
    archs = MultiArchSampler(net.space, 2, 0, 0).archs(0, 0)
    images, labels = torch.randn(4, 3, *net.img_size, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    task = SupernetTask(net, token_labeling=token_labeling)
    target = labels
    if token_labeling:
        images, *target = TokenMix(4, net.grids[-1])(images, labels, 1, groups=2)
        target = [t.double() for t in target]
    task.train()
    for m in net.modules():  # batch norm couples the groups
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    whole = task(images, target, archs=archs, mode=mode)
    whole["loss"].backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    parts = []
    for i, arch in enumerate(archs):
        rows = slice(2 * i, 2 * i + 2)
        part = task(images[rows], [t[rows] for t in target] if token_labeling else target[rows], archs=[arch])
        (part["loss"] / 2).backward()
        parts.append(part)
    torch.testing.assert_close(whole["output"], torch.cat([p["output"] for p in parts]))
    for key in {"loss", "cls_loss", "patch_loss"} & set(whole):
        torch.testing.assert_close(whole[key], sum(p[key] for p in parts) / 2)
    for name, p in net.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, msg=name)
    assert token_labeling == ("patch_head.weight" in grads)
    assert not token_labeling or grads["patch_head.weight"].abs().sum() > 0


def test_the_task_trains_what_is_put_in_the_models_place():
    """As Accelerate's `prepare` does."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    net = small_supernet(patch_head=True)
    task = SupernetTask(net, token_labeling=True)
    task.trainable_module = Wrapper(net)
    images, *target = TokenMix(4, net.grids[-1])(torch.randn(2, 3, *net.img_size), torch.tensor([0, 1]), 0, groups=2)
    task.eval().train()
    task(images, target, archs=[net.space.largest, net.space.smallest])["loss"].backward()
    assert task.trainable_module.calls == 1 and net.patch_head.weight.grad.abs().sum() > 0
    assert set(task.get_checkpoint_state()["state_dict"]) == set(net.state_dict())


def test_a_supernet_without_patch_classifier():
    with pytest.raises(ValueError, match="patch_head=True"):
        SupernetTask(small_supernet(), token_labeling=True)


# -- distillation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_label_loss(temperature):
    """-sum softmax(teacher / T) log softmax(student / T), mean over the batch, without T^2."""
    (student_logits, _), _ = logits_and_targets()
    (teacher_logits, _), _ = logits_and_targets(seed=1)
    student, teacher = Fixed(student_logits.clone()), Fixed(teacher_logits.clone())
    task = SoftLabelDistillationTask(student, teacher, temperature=temperature, dtype=torch.float64)
    result = task(torch.zeros(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2]))
    rows = []
    for s, t in zip(student_logits.tolist(), teacher_logits.tolist(), strict=True):
        soft = [math.exp(v) for v in log_softmax([v / temperature for v in t])]
        rows.append(cross_entropy(soft, [v / temperature for v in s]))
    assert result["loss"].item() == pytest.approx(mean(rows), rel=1e-12) == result["kd_loss"].item()
    assert torch.equal(result["output"], student_logits)
    result["loss"].backward()
    difference = (student_logits / temperature).softmax(-1) - (teacher_logits / temperature).softmax(-1)
    torch.testing.assert_close(student.outputs[0].grad, difference / (3 * temperature))
    assert teacher.outputs[0].grad is None


def test_hard_label_loss():
    """A quarter labels with smoothing, three quarters the teacher's decisions."""
    (student_logits, _), _ = logits_and_targets()
    (teacher_logits, _), _ = logits_and_targets(seed=1)
    student, teacher = Fixed(student_logits.clone()), Fixed(teacher_logits.clone())
    weights = dict(task_loss_weight=0.25, distill_loss_weight=0.75, criterion_kwargs=dict(smoothing=0.1))
    task = HardLabelDistillationTask(student, teacher, dtype=torch.float64, **weights)
    labels = [0, 1, 2]
    result = task(torch.zeros(3, 3, 8, 8, dtype=torch.float64), torch.tensor(labels))
    rows = []
    for s, t, label in zip(student_logits.tolist(), teacher_logits.tolist(), labels, strict=True):
        k = len(s)
        smooth = [0.1 / k + 0.9 * (i == label) for i in range(k)]
        decided = [float(i == t.index(max(t))) for i in range(k)]
        rows.append(0.25 * cross_entropy(smooth, s) + 0.75 * cross_entropy(decided, s))
    assert result["loss"].item() == pytest.approx(mean(rows), rel=1e-12)
    result["loss"].backward()
    assert student.outputs[0].grad is not None and teacher.outputs[0].grad is None


def test_teacher_stays_as_it_is():
    """It sees images in its own normalisation, in eval mode, and gets no gradient."""
    torch.manual_seed(0)
    student = timm.create_model("sret", **SRET, pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25)))
    teacher = timm.create_model("test_resnet", num_classes=5)
    task = SoftLabelDistillationTask(student, teacher)
    seen = []
    teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.rand(2, 3, 32, 32)
    ours, theirs = (
        [torch.tensor(m.pretrained_cfg[k])[:, None, None] for k in ("mean", "std")] for m in (student, teacher)
    )
    task.train()
    assert student.training and not teacher.training
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    task((pixels - ours[0]) / ours[1])["loss"].backward()
    torch.testing.assert_close(seen[0], (pixels - theirs[0]) / theirs[1])
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    unreached = {n for n, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert not unreached
    assert not any("teacher" in k for k in task.get_checkpoint_state()["state_dict"])


def test_a_teacher_from_a_folder(tmp_path):
    teacher = timm.create_model("test_resnet", num_classes=5)
    save_pretrained(teacher, tmp_path / "teacher")
    student = timm.create_model("sret", **SRET)
    task = SoftLabelDistillationTask(student, f"local-dir:{tmp_path / 'teacher'}")
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in task.teacher.model.state_dict().items())
    other = timm.create_model("sret", **{**SRET, "num_classes": 7})
    with pytest.raises(ValueError, match="the teacher local-dir:.* has 5 classes, the student 7; .*data set"):
        SoftLabelDistillationTask(other, f"local-dir:{tmp_path / 'teacher'}")
    grey = timm.create_model("test_resnet", num_classes=5, in_chans=1)
    with pytest.raises(ValueError, match="has 1 input channels, the student 3"):
        SoftLabelDistillationTask(student, grey)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        SoftLabelDistillationTask(student, teacher, temperature=0)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        SoftLabelDistillationTask(student, "sret_tiny")
