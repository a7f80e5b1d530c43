"""Training a supernet, run as a user runs it: killed and continued, in one process or two, on real images."""

import contextlib
import json
import math
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from recipe_server import RECIPES, Recipe, checkpoints, parts, wait_for_step, wait_until
from safetensors.torch import load_file
from test_efficientformer_supernet import small_v2

from recipes import supernet as recipe
from timm_resnas.data import TokenMix, load_splits
from timm_resnas.engine import supernet, training
from timm_resnas.engine.checkpoints import Checkpoints
from timm_resnas.engine.options import fixed_options, parse
from timm_resnas.engine.processes import start
from timm_resnas.engine.run import Run, RunError
from timm_resnas.engine.settings import SupernetOptions
from timm_resnas.engine.training import check_passes, make_schedule
from timm_resnas.families.vit_resnas import VitResNasSupernet
from timm_resnas.hub import save_pretrained
from timm_resnas.nas.jsonl import read_jsonl
from timm_resnas.nas.sampling import SandwichSampler
from timm_resnas.nas.space import SearchSpace

NANO = Path(__file__).with_name("nano.json")  # micro with half as many blocks, which are narrower
SPACE = SearchSpace.from_dict(json.loads(NANO.read_text()))  # of 16 px
# 14 steps an epoch on 16 px digits; channels are sorted at the start of either epoch
QUICK = [
    *("--space", str(NANO)),
    *("--cpu", "--threads", "1", "--img-size", "16", "--batch-size", "64", "--num-archs", "2", "--epochs", "2"),
    *("--arch-warmup-epochs", "1", "--warmup-epochs", "1", "--eval-every", "1", "--drop-path", "0.2"),
]


@pytest.fixture(scope="module")
def runs(recipe_server):
    return Recipe(recipe_server, "supernet", QUICK)


@pytest.fixture(scope="module")
def straight(runs, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    runs.run(folder)
    return folder


def weights(folder):
    return load_file(folder / "supernet" / "model.safetensors")


def records(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_jsonl(folder / "training.jsonl")]


def assert_equal_runs(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert records(one) == records(other)


def test_what_a_run_leaves(straight):
    assert {p.name for p in straight.iterdir()} == {
        *("config.yaml", "state", "supernet", "training.jsonl", "training.png"),
    }
    assert {p.name for p in (straight / "state").iterdir()} == {"data.json", "data.json.sha256", "lock"}
    lines = read_jsonl(straight / "training.jsonl")
    assert [(r["epoch"], r["step"]) for r in lines] == [(1, 14), (2, 28)]
    assert all(set(r["accuracy"]) == {"largest", "smallest", "random 1", "random 2", "random 3"} for r in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["accuracy"]["largest"] > 0.3
    assert 0 < lines[0]["seconds"] < lines[1]["seconds"]
    with Image.open(straight / "training.png") as image:
        assert image.size == (1300, 520)
    net = timm.create_model(f"local-dir:{straight / 'supernet'}", pretrained=True)
    assert net.space == SPACE
    train, val = parts(straight)
    assert not set(train) & set(val) and len(train) // 64 == 14


def test_killed_at_random_moments(runs, straight, tmp_path):
    """SIGKILL three times, once before the first checkpoint: the run ends bit-equal to one that was never killed."""
    folder, rng = tmp_path / "killed", random.Random(5)
    pid = runs.start(folder, "--checkpoint-steps", "3")
    wait_until((folder / "config.yaml").exists, pid, f"{folder}.log")
    time.sleep(0.3 * rng.random())
    runs.kill(pid)
    for _ in range(2):
        reached = int(checkpoints(folder)[-1].stem[5:]) if checkpoints(folder) else 0
        pid = runs.start(folder, "--checkpoint-steps", "3")
        wait_for_step(folder, reached + 3, pid)
        time.sleep(0.15 * rng.random())
        runs.kill(pid)
        assert len(checkpoints(folder)) <= 2
    runs.run(folder, "--checkpoint-steps", "3")
    log = Path(f"{folder}.log").read_text()
    assert log.count("continues at step") >= 2 and "damaged" not in log
    assert_equal_runs(folder, straight)


def test_a_damaged_checkpoint_and_an_epochs_boundary(runs, straight, tmp_path):
    """The newest checkpoint is cut short: the one before, at the end of an epoch, is taken, and channels are sorted."""
    folder = tmp_path / "damaged"
    pid = runs.start(folder, "--checkpoint-steps", "16")
    wait_for_step(folder, 16, pid)
    runs.kill(pid)
    for path in checkpoints(folder)[2:]:
        path.unlink()
    first, second = checkpoints(folder)
    assert (first.stem, second.stem) == ("step-000000014", "step-000000016")
    second.write_bytes(second.read_bytes()[:-1000])
    (folder / "state" / "training" / "unfinished").write_bytes(b"half of a checkpoint")
    with (folder / "training.jsonl").open("a") as f:  # killed between a record and its checkpoint, and within a line
        f.write(json.dumps({"epoch": 2, "step": 28, "loss": 0.0, "accuracy": {}, "seconds": 1.0}) + '\n{"epoch": 3')
    runs.run(folder)
    log = Path(f"{folder}.log").read_text()
    assert log.count("is damaged") == 1 and f"note: {second} is damaged" in log and "continues at step 14 of 28" in log
    assert_equal_runs(folder, straight)


# 7 steps an epoch
TWO = ["--batch-size", "128", "--epochs", "1", "--arch-warmup-epochs", "0", "--num-archs", "4", "--accumulate", "2"]


@pytest.fixture(scope="module")
def straight_two(runs, tmp_path_factory):
    """A run of two processes, of two passes each, that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    runs.run_two(folder, *TWO)
    return folder


@pytest.fixture(scope="module")
def nasvit(tmp_path_factory):
    """Options of runs of 3 steps an epoch, on few images."""
    photos = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 16), ("test", 2)):
        for label, level in (("dark", 40), ("light", 160)):
            (photos / part / label).mkdir(parents=True)
            for i in range(count):
                color = (level + 4 * i, level, level - 2 * i)
                Image.new("RGB", (16, 16), color).save(photos / part / label / f"{i}.png")
    return [
        *("--dataset", f"imagefolder:{photos}", "--step", "nasvit", "--num-archs", "3", "--batch-size", "8"),
        *("--val-fraction", "0.25", "--project-epoch", "1", "--clip-others", "0.5"),
    ]


def test_nasvit_killed_and_continued(runs, nasvit, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    runs.run(straight, *nasvit)
    pid = runs.start(killed, *nasvit, "--checkpoint-steps", "1")
    wait_for_step(killed, 2, pid)
    runs.kill(pid)
    runs.run(killed, *nasvit, "--checkpoint-steps", "1")
    assert "continues at step" in Path(f"{killed}.log").read_text()
    assert_equal_runs(killed, straight)
    assert [r["step"] for r in records(straight)] == [3, 6]
    assert 0.3 < records(straight)[-1]["loss"] < 2  # the largest network's, to labels


def test_nasvit_in_two_processes_and_in_two_passes(runs, nasvit, tmp_path):
    """Alike but for rounding; see `first_moments`."""
    found = []  # at a step of the second epoch, which has projection
    for name, passes in (("processes", "1"), ("passes", "2")):
        options = [*nasvit, "--accumulate", passes, "--lr", "1e-9", "--checkpoint-steps", "4", "--epochs", "4"]
        pids = runs.start_two(tmp_path / name, *options) if passes == "1" else [runs.start(tmp_path / name, *options)]
        wait_for_step(tmp_path / name, 4, pids[0])
        runs.kill(*pids)
        state = torch.load(tmp_path / name / "state" / "training" / "step-000000004.pt", weights_only=True)
        found.append([s["exp_avg"] for s in state["optimizer"]["state"].values()])
    assert len(found[0]) == len(found[1]) > 100
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def first_moments(runs, folder, processes, *options):
    """The loss of 6 steps and AdamW's running means of their gradients, by an optimizer that hardly moves the weights:
    steps of the usual size would turn rounding into other weights wherever a gradient is near zero."""
    options = [*options, *TWO[:-1], str(4 // processes), "--epochs", "2", "--checkpoint-steps", "6", "--lr", "1e-9"]
    pids = runs.start_two(folder, *options) if processes == 2 else [runs.start(folder, *options)]
    wait_for_step(folder, 6, pids[0])
    runs.kill(*pids)
    state = torch.load(folder / "state" / "training" / "step-000000006.pt", weights_only=True)
    assert state["state"]["loss_steps"] == 6
    return state["state"]["loss_sum"] / 6, [s["exp_avg"] for s in state["optimizer"]["state"].values()]


@pytest.mark.oldest
@pytest.mark.parametrize(
    "space, side", [(SPACE.at(in_chans=1), "16"), (small_v2(), "32")], ids=["vit_resnas, grey", "efficientformerv2"]
)
def test_processes_and_passes_train_alike(runs, tmp_path, space, side):
    """2 x 2 or 4: the same images, sub-networks and drop path; batch norm sees a quarter of the batch either way."""
    (tmp_path / "space.json").write_text(json.dumps(space.to_dict()))
    options = ["--space", str(tmp_path / "space.json"), "--img-size", side]
    loss, found = first_moments(runs, tmp_path / "processes", 2, *options)
    other, wanted = first_moments(runs, tmp_path / "passes", 1, *options)
    assert loss == pytest.approx(other, abs=1e-5)
    assert len(found) == len(wanted) > 80
    rounding = 1e-6 * max(b.norm() for b in wanted)  # all that a bias in front of a batch norm gets
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + rounding  # 1e-6 is usual


def test_all_processes_evaluate_the_weights_that_are_saved(straight_two, monkeypatch):
    """Batch norm's running statistics differ between processes; those of the first count."""
    where = ["--output", str(straight_two.parent), "--name", straight_two.name]
    args = parse(SupernetOptions, [*QUICK, *TWO, *where])
    accelerator = start(args)
    run = Run(args, accelerator, "")
    data = supernet.prepare(args, run)
    net = supernet.train_supernet(args, accelerator, run, data)
    loop = supernet.SupernetTraining(args, accelerator, run, data, net)
    shared = []
    monkeypatch.setattr(training, "broadcast", shared.extend)
    loop.share_buffers()
    assert loop.validate() == records(straight_two)[-1]["accuracy"]
    assert len(shared) == 9 and {id(b) for b in shared} == {id(b) for b in net.buffers()}

    with torch.no_grad():
        net.norm.bias[3] = torch.nan
    loop.state.step = 5
    with pytest.raises(RunError, match="weights are not finite at step 5"):
        loop.save_checkpoint()
    assert not checkpoints(straight_two)


def test_two_processes_killed_and_continued_by_two_and_by_one(runs, straight_two, tmp_path):
    killed = tmp_path / "killed"
    options = [*TWO, "--checkpoint-steps", "4"]
    pids = runs.start_two(killed, *options)
    wait_for_step(killed, 4, pids[0])
    runs.kill(*pids)
    alone = tmp_path / "alone"
    shutil.copytree(killed, alone)
    runs.run_two(killed, *options)
    runs.run(alone, *options)
    assert_equal_runs(killed, straight_two)
    for folder in (killed, alone):
        assert "continues at step" in Path(f"{folder}.log").read_text()
    assert records(alone)[0]["loss"] == pytest.approx(records(killed)[0]["loss"], abs=0.05)


TOKENS = [
    "--batch-size",
    "128",
    "--token-labeling",
    "--patch-weight",
    "0.5",
    "--img-size",
    "32",
    "--epochs",
    "1",
    "--arch-warmup-epochs",
    "0",
]


def test_token_labels(runs, tmp_path):
    straight = tmp_path / "straight"
    runs.run(straight, *TOKENS)
    assert 2 < records(straight)[0]["loss"] < 1.5 * math.log(10) + 0.3  # class loss, and half of the tokens'

    net = timm.create_model(f"local-dir:{straight / 'supernet'}", pretrained=True).eval()
    data = supernet.SearchData(load_splits("digits"), net.space, [], [], {})
    fresh = supernet.create_supernet(parse(SupernetOptions, [*QUICK, *TOKENS]), data)
    assert net.grids[-1] == (2, 2) and net.patch_head.weight.shape == (10, net.num_features)
    assert (net.patch_head.weight - fresh.patch_head.weight).abs().mean() > 1e-3  # it was trained
    best = net.extract(net.space.smallest)
    save_pretrained(best, tmp_path / "best")
    x = torch.randn(2, 3, 32, 32)
    for options in ({}, dict(patch_head=False)):  # a reader may leave the second classifier out
        loaded = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True, **options).eval()
        assert (loaded.patch_head is None) == bool(options)
        net.set_arch(net.space.smallest)
        torch.testing.assert_close(loaded(x), net(x))


class OneProcess:
    """Of several: what a pass asks of Accelerate. ``sums`` are what earlier ones have given to `reduce`."""

    scaler = None

    def __init__(self, rank, world=1, sums=None):
        self.process_index, self.num_processes, self.sums = rank, world, sums

    def reduce(self, tensor, how):
        assert how == "mean"
        self.sums.append(tensor)
        return torch.stack(self.sums).mean(0)

    def autocast(self):
        return contextlib.nullcontext()

    def no_sync(self, model):
        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()


def test_images_are_mixed_alike_by_processes_and_passes():
    """2 processes of 2 passes, 4 passes of one: the same mixed images for the same sub-networks, others each step."""

    def trained_on(world, accumulate, step):
        options = [*QUICK, *TOKENS, "--num-archs", "8", "--accumulate", str(accumulate)]
        x, y = torch.arange(16.0)[:, None, None, None].repeat(1, 3, 32, 32), torch.arange(16) % 10
        seen, weight = [], torch.nn.Parameter(torch.ones(()))

        def task(images, target, archs, mode):
            seen.append((images, *target, archs))
            return {"loss": weight.sum()}

        task.trainable_module = None
        for rank in range(world):
            loop = object.__new__(supernet.SupernetTraining)
            loop.options, loop.accelerator, loop.task = parse(SupernetOptions, options), OneProcess(rank), task
            loop.state, loop.passes = training.TrainState(step), world * accumulate
            loop.mix = TokenMix(10, 2, smoothing=loop.options.smoothing)
            loop.sampler = supernet.make_sampler(loop.options, SPACE.at(img_size=32))
            share = slice(rank * 16 // world, (rank + 1) * 16 // world)
            loop.backward(x[share], y[share], 0, step)
        return seen

    wanted = trained_on(1, 4, 7)
    for world, accumulate in ((2, 2), (4, 1)):
        for one, other in zip(wanted, trained_on(world, accumulate, 7), strict=True):
            assert one[-1] == other[-1] and all(map(torch.equal, one[:-1], other[:-1]))
    assert len({arch.key() for *_, archs in wanted for arch in archs}) > 4
    for c, (images, targets, patch_targets, _) in enumerate(wanted):
        assert 4 * c <= images.min() and images.max() <= 4 * c + 3  # partners are of the same pass
        assert targets.shape == (4, 10) and patch_targets.shape == (4, 4, 10)
        # the first image of each group is whole cells of CutMix, the second is Mixup's
        for i in (0, 2):
            assert set(images[i].unique().tolist()) <= {4 * c, 4 * c + 2}
    shares = [images[1, 0, 0, 0].item() - 4 * c for c, (images, *_) in enumerate(wanted)]
    assert len(set(shares)) > 1  # each pass draws its own
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(wanted, trained_on(1, 4, 8), strict=True))


def two_sided(argv, rank, world, sums):
    """A training of one process that computes in double precision, its batch norm by running statistics."""
    options = parse(SupernetOptions, [*QUICK, "--num-archs", "3", "--batch-size", "8", "--drop-path", "0", *argv])
    torch.manual_seed(1)
    net = timm.create_model(SPACE.supernet, space=SPACE.to_dict()).double().eval()
    loop = object.__new__(supernet.SupernetTraining)
    loop.options, loop.accelerator, loop.model = options, OneProcess(rank, world, sums), net
    loop.task = supernet.make_task(options, net, None, torch.device("cpu"))
    loop.sampler, loop.state = supernet.make_sampler(options, SPACE), training.TrainState(7)
    return loop


@pytest.mark.parametrize("argv", [["--step", "sandwich"], ["--step", "nasvit", "--clip-others", "0.1"]])
def test_two_sides_by_processes_and_passes(argv):
    """Gradients of 2 x 2 and of 1 x 4 passes: those of both sides computed at once."""
    torch.manual_seed(2)
    images, labels = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.arange(8)

    def backward(world, accumulate):
        sums = []  # what processes give away, so that the last one finds all of it
        for rank in range(world):
            loop = two_sided([*argv, "--accumulate", str(accumulate)], rank, world, sums)
            share = slice(rank * 8 // world, (rank + 1) * 8 // world)
            loop.backward(images[share], labels[share], 1, 0)
        return loop, {name: p.grad for name, p in loop.model.named_parameters()}

    loop, passes = backward(1, 4)
    _, processes = backward(2, 2)
    archs = loop.sampler.archs(1, 0)
    assert archs[0] == loop.model.space.largest and archs[1] == loop.model.space.smallest and len(archs) == 3
    sides = []
    for loss in loop.task.losses(images, labels, archs):
        loop.model.zero_grad()
        loss.backward()
        sides.append([p.grad.clone() for p in loop.model.parameters()])
    wanted = loop.task.merge(*sides, 1)
    assert any(not torch.allclose(a + b, w) for a, b, w in zip(*sides, wanted, strict=True)) is ("nasvit" in argv)
    for (name, one), other, value in zip(passes.items(), processes.values(), wanted, strict=True):
        torch.testing.assert_close(one, value, msg=name)
        torch.testing.assert_close(other, value, msg=name)


def test_a_single_sub_network_for_all_processes_and_passes():
    seen, weight = [], torch.nn.Parameter(torch.ones(()))

    def task(images, target, archs, mode):
        seen.append(archs)
        return {"loss": weight.sum()}

    task.trainable_module = None
    for rank in range(2):
        loop = two_sided(["--step", "single", "--num-archs", "1", "--accumulate", "2"], rank, 2, [])
        loop.task, loop.mix = task, None
        loop.backward(torch.zeros(4, 3, 16, 16), torch.zeros(4), 1, rank // 2)
    assert len(seen) == 4 and len(seen[0]) == 1 and all(archs == seen[0] for archs in seen)
    assert loop.sampler.archs(1, 1) != seen[0]


def test_other_ways_to_train(tmp_path, monkeypatch):
    folder, logged = tmp_path / "other", []
    sort, sorted_after = VitResNasSupernet.sort_channels, []

    def note_and_sort(net, optimizer):
        sorted_after.append(len(optimizer.state) and int(optimizer.state[net.cls_token]["step"]))
        sort(net, optimizer)

    forward, trained = VitResNasSupernet.forward, []

    def note_and_forward(net, x, archs=None, mode=None):
        trained.extend([] if archs is None else archs)
        assert archs is None or (len(x) == 128 and mode == "masked")
        return forward(net, x, archs, mode)

    monkeypatch.setattr(VitResNasSupernet, "forward", note_and_forward)
    monkeypatch.setattr(VitResNasSupernet, "sort_channels", note_and_sort)
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append((step, values)))
    options = ["--sampler", "sandwich", "--mode", "masked", "--clip-grad", "0.5", "--decay-pos-embed"]
    options += [
        *("--num-archs", "4", "--batch-size", "256", "--epochs", "4", "--eval-every", "4", "--accumulate", "2"),
    ]  # 3 steps each
    recipe.main([*QUICK, "--output", str(tmp_path), "--name", "other", *options])
    assert records(folder)[0]["loss"] < 2.4
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["mode"] == "masked" and config["clip_grad"] == 0.5
    sampler = SandwichSampler(SPACE, 4, 0, 1)
    assert trained == [a for epoch in range(4) for step in range(3) for a in sampler.archs(epoch, step)]
    assert sorted_after == [0, 3]  # --arch-warmup-epochs 1
    assert [step for step, _ in logged] == [3, 6, 9, 12, 12]
    assert sum(values["loss"] for _, values in logged[:4]) / 4 == pytest.approx(records(folder)[0]["loss"], abs=1e-5)
    assert logged[0][1]["lr"] == pytest.approx(1e-6 + (2e-3 - 1e-6) * 2 / 3)
    assert logged[3][1]["lr"] == pytest.approx(1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * 11 / 12)) / 2)
    assert logged[4][1]["accuracy/largest"] == records(folder)[0]["accuracy"]["largest"]


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(capsys, tmp_path, *options):
    with pytest.raises(SystemExit) as end:
        recipe.main([*QUICK, "--output", str(tmp_path), "--name", "run", *options])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    return error


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    options = ["--lr", "1e30", "--warmup-epochs", "0", "--epochs", "2", "--checkpoint-steps", "1"]
    error = refused(capsys, tmp_path, *options)
    assert "not finite" in error or "loss is nan" in error or "loss is inf" in error
    assert "lower --lr" in error
    assert not (tmp_path / "run" / "supernet").exists()
    for path in checkpoints(tmp_path / "run"):
        assert all(torch.isfinite(v).all() for v in Checkpoints.read(path)["raw"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-archs", "6", "--accumulate", "4"], "6 cannot be dealt evenly to 1 process of 4 passes.*multiple of 4"),
        (["--batch-size", "126", "--num-archs", "4"], "--batch-size 126 is not a multiple of --num-archs 4"),
        (["--sampler", "sandwich", "--num-archs", "1"], "num_archs 1 is under 2"),
        (["--step", "nasvit", "--num-archs", "1"], "num_archs 1 is under 2"),
        (["--step", "single", "--num-archs", "2"], "single trains one sub-network a step, not --num-archs 2"),
        (["--step", "nasvit", "--sampler", "sandwich"], "--sampler sandwich is for --step groups"),
        (["--step", "sandwich", "--token-labeling"], "--token-labeling is for --step groups and single"),
        (["--teacher", "vit_resnas_tiny"], "--teacher is for --step sandwich and nasvit"),
        (["--step", "nasvit", "--teacher-path", "x.pt"], "--teacher-path needs --teacher"),
        (["--step", "sandwich", "--clip-others", "1"], "--clip-others is for --step nasvit, not sandwich"),
        (["--step", "sandwich", "--teacher", "exmobilevit_576"], "exmobilevit_576: it has no pretrained weights"),
        (["--aa", "rand-m9", "--shift", "2"], "shift takes the place of auto_augment"),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path, capsys):
    assert re.search(message, refused(capsys, tmp_path, *options))
    assert not (tmp_path / "run" / "supernet").exists()


def test_other_options_need_another_folder(straight, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe.main([*QUICK, "--output", str(straight.parent), "--name", straight.name, "--sampler", "sandwich"])
    assert "sampler 'balanced' (now 'sandwich')" in capsys.readouterr().err


# -- options ----------------------------------------------------------------------------------------------------------


def test_every_option_that_decides_weights_is_fixed():
    free = {
        *("config", "output", "name", "cpu", "threads", "log_with", "workers", "eval_every"),
        *("checkpoint_minutes", "checkpoint_steps"),
    }
    options = parse(SupernetOptions, [])
    assert set(vars(options)) - free == set(fixed_options(options))


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_papers_settings(size):
    path = RECIPES / "configs" / f"vit_resnas_{size}_supernet.yaml"
    args = parse(SupernetOptions, ["--config", str(path), "--dataset", "imagefolder:there"])
    assert args.space == f"vit_resnas_{size}" and args.dataset == "imagefolder:there"
    assert SearchSpace.preset(args.space).model_args["img_size"] == args.img_size * 2
    assert (args.epochs, args.batch_size, args.num_archs, args.arch_warmup_epochs) == (120, 1024, 16, 30)
    assert (args.lr, args.min_lr, args.warmup_lr, args.warmup_epochs) == (1e-3, 1e-5, 1e-6, 5)
    assert (args.weight_decay, args.smoothing, args.amp, args.clip_grad) == (0.05, 0.1, "fp16", None)
    assert args.drop_path == {"tiny": 0.2, "small": 0.3}[size]
    assert (args.scale, args.aa, args.reprob, args.hflip) == ([0.08, 1.0], "rand-m9-mstd0.5-inc1", 0.25, 0.5)
    assert args.decay_pos_embed and args.val_per_class == 25
    assert args.token_labeling and args.patch_weight == 1
    check_passes(args, 8, groups=args.num_archs)
    with pytest.raises(RunError, match="multiple of 3"):
        check_passes(args, 3, groups=args.num_archs)


def test_learning_rate_of_the_papers_settings():
    """Linear from 1e-6 over 5 epochs, then the cosine over 120, of which these 5 are a part."""
    args = parse(SupernetOptions, ["--config", str(RECIPES / "configs" / "vit_resnas_tiny_supernet.yaml")])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=args.lr)
    schedule = make_schedule(args, optimizer, 10)
    rates = []
    for step in range(1200):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 1e-6 and rates[25] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[600] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[300] == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + 2**-0.5) / 2)
    assert 1e-5 < rates[-1] < 1.1e-5


@pytest.mark.parametrize("decay", [False, True])
def test_weight_decay(decay):
    net = timm.create_model("vit_resnas_supernet", distill_token=True)
    flag = "--decay-pos-embed" if decay else "--no-decay-pos-embed"
    optimizer = supernet.make_optimizer(parse(SupernetOptions, [flag]), net)
    names = {id(p): n for n, p in net.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert len(names) == sum(len(g["params"]) for g in optimizer.param_groups)
    assert all(g["weight_decay"] in (0, 0.05) for g in optimizer.param_groups)
    positions = {n for n in names.values() if n.endswith("pos_embed")}
    assert len(positions) == 3 and (positions <= decayed) is decay and (decay or not positions & decayed)
    params = dict(net.named_parameters())
    assert all(params[n].ndim > 1 for n in decayed) and not {"cls_token", "dist_token"} & decayed
    assert {"head.weight", "blocks.0.attn.qkv.weight", "patch_embed.conv_proj.weight"} <= decayed
