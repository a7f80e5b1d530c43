"""Mixed-depth training: one step equals the weighted sum of its branches, and every depth learns."""

import pytest
import timm
import torch
from timm.task import TrainingTask
from torch.testing import assert_close

import timm_resnas.models.sret  # noqa: F401
from timm_resnas.tasks.mixed_depth import MixedDepthTask


def tiny(depths=(4, 2, 2), recursive_num=(2, 1, 1), **kwargs):
    torch.manual_seed(0)
    args = dict(img_size=32, patch_size=4, base_dims=(8, 8, 8), num_heads=(1, 2, 4), num_classes=5)
    return timm.create_model("sret", depths=depths, recursive_num=recursive_num, **dict(args, **kwargs))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_one_step_is_the_weighted_sum_of_single_branches(batch):
    weights = (1.0, 3.0)
    model = tiny(groups2=(1, 1, 1))
    task = MixedDepthTask(model, recursions=(1, 2), weights=weights, verbose=False)
    assert isinstance(task, TrainingTask)
    result = task(*batch)
    result["loss"].backward()
    mixed = grads(model)
    assert mixed.keys() == dict(model.named_parameters()).keys()  # nothing unused: DDP needs no search

    expected, losses = {}, []
    for recursions, weight in zip((1, 2), weights, strict=True):
        branch = tiny(groups2=(1, 1, 1))
        branch.set_recursions(recursions)
        loss = torch.nn.functional.cross_entropy(branch(batch[0]), batch[1])
        loss.backward()
        losses.append(loss.detach())
        for name, grad in grads(branch).items():
            expected[name] = expected.get(name, 0) + weight / sum(weights) * grad
    assert_close(result["loss_r1"], losses[0])
    assert_close(result["loss_r2"], losses[1])
    assert_close(result["loss"].detach(), 0.25 * losses[0] + 0.75 * losses[1])
    for name, grad in mixed.items():
        assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


def test_batch_statistics_are_taken_once(batch):
    model = tiny()
    MixedDepthTask(model, verbose=False)(*batch)
    assert model.patch_embed.bn1.num_batches_tracked == 1


def test_eval_is_a_plain_classifier_of_the_chosen_depth(batch):
    model = tiny()
    task = MixedDepthTask(model, verbose=False)
    task.eval()
    with torch.no_grad():
        full = task.get_eval_model()(batch[0])
        model.set_recursions(1)
        shallow = model(batch[0])
        model.set_recursions()
        assert torch.equal(model(batch[0]), full)
    assert full.shape == shallow.shape == (4, 5)
    assert not torch.allclose(full, shallow)
    with pytest.raises(RuntimeError, match="eval mode"):
        task(*batch)


def test_a_shallow_branch_is_the_network_built_with_fewer_recursions(batch):
    """Depth 1 of a network of 2 recursions has the weights of one pass and one projection per block."""
    deep = tiny(groups1=(1, 1, 1), groups2=(1, 1, 1)).eval()
    deep.set_recursions(1)
    shallow = tiny(depths=(2, 1, 1), groups1=(1, 1, 1), groups2=(1, 1, 1)).eval()
    shallow.load_state_dict({k: v for k, v in deep.state_dict().items() if ".nll.1." not in k})
    with torch.no_grad():
        assert torch.equal(deep(batch[0]), shallow(batch[0]))


def test_every_depth_learns(batch):
    model = tiny()
    task = MixedDepthTask(model, verbose=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = task(*batch)
    for _ in range(25):
        optimizer.zero_grad()
        result = task(*batch)
        result["loss"].backward()
        optimizer.step()
    for key in ("loss_r1", "loss_r2"):
        assert result[key] < 0.3 * first[key]


def test_ema_and_mixed_stage_depths(batch):
    """Stages with fewer recursions than a branch run all they have; the EMA copy is a plain classifier in eval."""
    model = tiny(depths=(2, 6, 2), recursive_num=(1, 2, 2))
    task = MixedDepthTask(model, verbose=False)
    assert task.recursions == (1, 2, 3)
    task.setup_ema(decay=0.9)
    task(*batch)["loss"].backward()
    task.update_ema()
    with torch.no_grad():
        assert task.get_eval_model(ema=True).eval()(batch[0]).shape == (4, 5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(recursions=(1,)), "full depth, 2"),
        (dict(recursions=(2, 1)), "must rise"),
        (dict(recursions=(0, 2)), "1 to 2"),
        (dict(recursions=(1, 2), weights=(1.0,)), "one for each"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MixedDepthTask(tiny(), verbose=False, **kwargs)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="ResNet has no set_mixed_depth"):
        MixedDepthTask(timm.create_model("test_resnet"), verbose=False)
