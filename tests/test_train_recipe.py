"""Training a model, run as a user runs it: killed and continued, in one process or two, from every configuration."""

import ast
import json
import math
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from recipe_server import RECIPES, Recipe, checkpoints, parts, wait_for_step, wait_until
from safetensors.torch import load_file, save_file
from test_stream import write
from timm.data import resolve_model_data_config

from recipes import train as recipe
from timm_resnas.data import load_splits, train_transform
from timm_resnas.data.multiscale import multiscale_loader
from timm_resnas.engine import train
from timm_resnas.engine.checkpoints import Checkpoints
from timm_resnas.engine.data import augmentation
from timm_resnas.engine.models import open_model, parse_kwargs
from timm_resnas.engine.options import fixed_options, parse
from timm_resnas.engine.run import RunError
from timm_resnas.engine.settings import TrainOptions
from timm_resnas.engine.training import make_schedule
from timm_resnas.hub import HubError, check_tensors, save_pretrained
from timm_resnas.models.network_def import NetworkDef
from timm_resnas.nas.jsonl import read_jsonl

CONFIGS = sorted(
    p.stem
    for p in (RECIPES / "configs").glob("*.yaml")
    if not p.stem.startswith("accelerate") and "supernet" not in p.stem
)
# 16 px, 4 x 4 and 2 x 2 tokens
TINY = "network_def=((4,16),(1,(16,2,8),(16,32),1),(3,16,24),(1,(24,2,12),(24,48),1),(2,24,10))"
PLAIN = TINY.replace("(4,16)", "(0,16)")  # no batch norm
MODEL = ["--cpu", "--threads", "1", "--model", "vit_resnas", "--img-size", "16", "--model-kwargs", "patch_size=4"]
# 10 steps an epoch
QUICK = [
    *(*MODEL, TINY, "--batch-size", "128", "--epochs", "2", "--lr", "4e-3", "--val-per-class", "10", "--keep", "3"),
    *("--mix", "token", "--mix-off-epochs", "1", "--drop-path", "0.2", "--clip-grad", "1"),
    *("--ema", "--ema-decay", "0.8", "--warmup-epochs", "0.5"),
]


@pytest.fixture(scope="module")
def runs(recipe_server):
    return Recipe(recipe_server, "train", QUICK)


@pytest.fixture(scope="module")
def straight(runs, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    runs.run(folder)
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def records(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_jsonl(folder / "training.jsonl")]


def assert_equal_runs(one, other):
    """Bit for bit: what was chosen, everything kept, and what was written down."""
    assert records(one) == records(other)
    names = {p.name for p in (one / "kept").iterdir()}
    assert names == {p.name for p in (other / "kept").iterdir()}
    for name in ("best", *(f"kept/{n}" for n in names)):
        first, second = weights(one / name), weights(other / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(v, second[k]) for k, v in first.items()), name


def results(folder):
    return json.loads((folder / "results.json").read_text())


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.oldest
def test_what_a_run_leaves(straight):
    assert {p.name for p in straight.iterdir()} == {
        *("best", "config.yaml", "kept", "results.json", "state", "training.jsonl", "training.png"),
    }
    assert {p.name for p in (straight / "state").iterdir()} == {"data.json", "data.json.sha256", "lock"}
    lines = read_jsonl(straight / "training.jsonl")
    assert [(r["epoch"], r["step"]) for r in lines] == [(1, 10), (2, 20)]
    assert lines[1]["loss"] < lines[0]["loss"] and 0 < lines[0]["seconds"] < lines[1]["seconds"]
    assert lines[0]["lr"] == pytest.approx(1e-5 + (4e-3 - 1e-5) * (1 + math.cos(math.pi * 9 / 20)) / 2)
    with Image.open(straight / "training.png") as image:
        assert image.size == (1300, 520)
    train_part, val = parts(straight)
    assert not set(train_part) & set(val) and len(val) == 100 and len(train_part) // 128 == 10
    arch = NetworkDef.from_network_def(ast.literal_eval(TINY.removeprefix("network_def=")))
    assert results(straight)["macs"] == arch.costs(img_size=16, patch_size=4)["macs"]  # attention's products as well


def test_the_chosen_weights(straight):
    """The best of the validation accuracies written down, and what timm makes of their folder."""
    lines, end = records(straight), results(straight)
    scores = {(r["epoch"], k): v for r in lines for k, v in r["accuracy"].items()}
    assert set(scores) == {(1, "raw"), (1, "ema"), (2, "raw"), (2, "ema")}
    chosen = end["chosen"]
    assert chosen["by"] == "validation accuracy"
    assert chosen["val_top1"] == max(scores.values()) == scores[chosen["epoch"], chosen["weights"]] > 0.2
    order = sorted(scores, key=lambda k: (scores[k], k[0], k[1] == "ema"), reverse=True)
    assert {p.name for p in (straight / "kept").iterdir()} == {f"epoch-{e:03}-{w}" for e, w in order[:3]}
    one, other = weights(straight / "best"), weights(straight / "kept" / "epoch-{:03}-{}".format(*order[0]))
    assert all(torch.equal(v, other[k]) for k, v in one.items())

    net = timm.create_model(f"local-dir:{straight / 'best'}", pretrained=True)
    config = resolve_model_data_config(net)
    assert config["input_size"] == (3, 16, 16) and config["crop_pct"] == 1.0
    assert net.pretrained_cfg["label_names"] == [str(n) for n in range(10)]
    assert end["params"] == sum(p.numel() for p in net.parameters())
    assert set(end["test"]) == {"last raw", "last ema", "best"} and end["images"]["test"] == 360
    last = end["test"][f"last {chosen['weights']}"]
    assert (end["test"]["best"] == pytest.approx(last, abs=1e-5)) is (chosen["epoch"] == 2)
    assert end["test"]["best"]["top1"] > 0.2
    simple, log = end["baseline"]["test"] / end["baseline"]["images"], Path(f"{straight}.log").read_text()
    assert f"random forest            top-1 {simple:.4f}" in log and simple > 0.95
    assert ("does not beat a simple classifier" in log) is (end["test"]["best"]["top1"] <= simple)


def test_killed_at_random_moments(runs, straight, tmp_path):
    """SIGKILL before the first checkpoint and within an epoch; the last life ends as if never killed."""
    folder, rng = tmp_path / "killed", random.Random(5)
    pid = runs.start(folder, "--checkpoint-steps", "3")
    wait_until((folder / "config.yaml").exists, pid, f"{folder}.log")
    runs.kill(pid)
    pid = runs.start(folder, "--checkpoint-steps", "3")
    wait_for_step(folder, 6, pid)
    time.sleep(0.1 * rng.random())
    runs.kill(pid)
    assert len(checkpoints(folder)) <= 2
    runs.run(folder, "--checkpoint-steps", "3")
    log = Path(f"{folder}.log").read_text()
    assert log.count("continues at step") >= 1 and "damaged" not in log
    assert_equal_runs(folder, straight)
    runs.run(folder)
    assert Path(f"{folder}.log").read_text().count("trained before") == 1


# -- processes and passes ---------------------------------------------------------------------------------------------

SGD = ["--opt", "sgd", "--lr", "0.05", "--epochs", "1", "--weight-decay", "0", "--warmup-epochs", "0"]


def assert_close_runs(one, other, **tolerance):
    assert records(one)[0]["loss"] == pytest.approx(records(other)[0]["loss"], abs=2e-5)
    first, second = weights(one / "best"), weights(other / "best")
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], msg=lambda m, key=key: f"{key}: {m}", **tolerance)


def test_two_processes_train_as_one(runs, tmp_path):
    """No batch norm, no randomness within the step: the same gradients, so the same weights after an epoch."""
    plain = ["--model-kwargs", "patch_size=4", PLAIN, "--mix", "none", "--drop-path", "0", "--no-ema", *SGD]
    plain += ["--clip-grad", "0.5"]
    one, two = tmp_path / "one", tmp_path / "two"
    runs.run(one, *plain)
    runs.run_two(two, *plain)
    assert results(two)["processes"] == 2 and results(one)["processes"] == 1
    assert results(two)["test"]["best"]["images"] == 360
    assert_close_runs(one, two, rtol=0, atol=2e-6)


def test_processes_and_passes_train_alike(runs, tmp_path):
    """2 x 1 or 1 x 2: mixing, drop path and multi-scale batches are those of the pass, whoever runs it."""
    options = ["--model", "exmobilevit_576", "--model-kwargs", "--img-size", "32", "--multi-scale", "32", "64"]
    options += ["--mix", "mixup", "--drop-path", "0.1", "--batch-size", "16", "--val-per-class", "0", *SGD]
    folder = tmp_path / "images"
    make_images(folder, 16)
    # its batch norm sees a pass either way, but running statistics are the first process's or all passes': compare
    # what training moves
    options += ["--dataset", f"imagefolder:{folder}", "--no-ema", "--scale", "0.5", "1"]
    passes, two = tmp_path / "passes", tmp_path / "two"
    runs.run(passes, *options, "--accumulate", "2")
    runs.run_two(two, *options)
    first, second = weights(passes / "best"), weights(two / "best")
    moved = [k for k in first if "running" not in k and "num_batches" not in k]
    assert len(moved) > 150
    for key in moved:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


# -- every configuration ----------------------------------------------------------------------------------------------


def make_images(folder, count, side=40):
    """`count` training images and 4 test images of two classes."""
    rng = np.random.default_rng(0)
    for part, n in (("train", count), ("test", 4)):
        for i in range(n):
            path = folder / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    make_images(folder, 8)
    return folder


# The smallest of each family, at a size it can have; all else is the configuration's.
SHRUNK = {
    "vit_res": ["--model", "vit_resnas", "--img-size", "32", "--model-kwargs", "patch_size=4", TINY],
    "sret": [
        *("--model", "sret", "--img-size", "64", "--model-kwargs", "base_dims=(8,8,8)", "depths=(2,2,2)"),
        *("recursive_num=(1,1,1)", "num_heads=(1,2,4)", "groups1=(4,1,1)", "groups2=(2,1,1)"),
    ],
    "exmobilevit": ["--img-size", "64", "--multi-scale", "64", "96"],
    "cait": ["--model", "cait_study", "--img-size", "32", "--model-kwargs", "embed_dim=24", "depth=2", "num_heads=2"],
    "dynamicvit": [
        *("--model", "deit_tiny_patch16_224", "--img-size", "32", "--model-kwargs", "patch_size=8", "embed_dim=24"),
        *("depth=4", "num_heads=2"),
    ],
    "digits": ["--img-size", "32"],
    "fashion_mnist": ["--img-size", "32"],
}


def shrunk(name):
    return next(options for prefix, options in SHRUNK.items() if name.startswith(prefix))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_takes_two_steps(name, images, tmp_path, capsys):
    config = yaml.safe_load((RECIPES / "configs" / f"{name}.yaml").read_text())
    options = ["--config", str(RECIPES / "configs" / f"{name}.yaml"), *shrunk(name)]
    if config.get("pretrained"):  # a fine-tuning starts from a folder, at another size
        given = shrunk(name)
        kwargs = parse_kwargs("", given[given.index("--model-kwargs") + 1 :])
        source = timm.create_model(given[1], img_size=64, num_classes=2, **kwargs)
        save_pretrained(source, tmp_path / "source" / "best")
        options += ["--model", str(tmp_path / "source"), "--model-kwargs"]
    options += ["--dataset", f"imagefolder:{images}", "--batch-size", "4", "--epochs", "1", "--val-per-class", "0"]
    options += [
        "--warmup-epochs",
        "1",
        "--cpu",
        "--threads",
        "1",
        "--amp",
        "no",
        "--workers",
        "0",
        "--output",
        str(tmp_path),
        "--name",
        "run",
    ]
    args = parse(TrainOptions, options)
    if "shift" in config:
        assert augmentation(args, load_splits("digits"), (32, 32))["shift"] == config["shift"]
    recipe.main(options)
    (record,) = records(tmp_path / "run")
    # multi-scale: batches of 4 at 64 px and of 2 at 96 px, as they are drawn
    assert (record["step"] >= 2 if config.get("multi_scale") else record["step"] == 2) and math.isfinite(record["loss"])
    chosen = results(tmp_path / "run")["chosen"]
    assert chosen["weights"] == ("ema" if config.get("ema") else "raw") and chosen["by"] == "being the last"
    net = timm.create_model(f"local-dir:{tmp_path / 'run' / 'best'}", pretrained=True).eval()
    assert net(torch.zeros(1, *net.pretrained_cfg["input_size"])).shape == (1, 2)


PAPERS = {
    "vit_res_tiny": (300, 1e-3, 5, 0.2),
    "vit_resnas_tiny": (300, 1e-3, 5, 0.2),
    "vit_resnas_small": (300, 1e-3, 5, 0.3),
    "vit_resnas_medium": (300, 1e-3, 5, 0.3),
    "vit_resnas_medium_280": (30, 2.5e-6, 5, 0.75),
    "vit_resnas_medium_392": (30, 2.5e-6, 5, 0.75),
    "sret_tiny": (300, 2e-3, 30, 0.1),
    "sret_small": (300, 2e-3, 30, 0.2),
    "exmobilevit_928": (300, 2e-3, 12, None),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_settings(name):
    args = parse(TrainOptions, ["--config", str(RECIPES / "configs" / f"{name}.yaml")])
    found = (args.epochs, pytest.approx(train.learning_rate(args)), args.warmup_epochs, args.drop_path)
    assert found == PAPERS[name] and timm.is_model(args.model)
    if name.startswith("vit_res"):
        assert (args.mix, args.mixup_alpha, args.smoothing, args.ema_decay) == ("token", 0.8, 0.1, 0.99996)
        assert (args.scale, args.aa, args.reprob) == ([0.08, 1.0], "rand-m9-mstd0.5-inc1", 0.25)
        assert args.decay_pos_embed and args.clip_grad is None
    train.check_options(args, 6 if "exmobile" in name else 8)


def test_learning_rate_of_the_papers_settings():
    """Linear from 1e-6 over 5 epochs, then the cosine over 300, of which these 5 are a part."""
    args = parse(TrainOptions, ["--config", str(RECIPES / "configs" / "vit_resnas_tiny.yaml")])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=train.learning_rate(args))
    schedule = make_schedule(args, optimizer, 10)
    rates = []
    for step in range(3000):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 1e-6 and rates[25] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[1500] == pytest.approx((1e-3 + 1e-5) / 2)
    assert 1e-5 < rates[-1] < 1.01e-5


def test_every_schedule_falls():
    for sched in ("cosine", "tanh", "poly", "step", "multistep", "wsd", "constant"):
        args = parse(TrainOptions, ["--sched", sched, "--epochs", "100", "--warmup-epochs", "5"])
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
        schedule = make_schedule(args, optimizer, 4)
        rates = []
        for step in range(400):
            schedule.step_update(step)
            rates.append(optimizer.param_groups[0]["lr"])
        assert rates[0] < 1e-4 and max(rates) <= 0.1 + 1e-9, sched
        assert rates[-1] < rates[50] or sched == "constant", sched


# -- parts ------------------------------------------------------------------------------------------------------------


def options(*given):
    return parse(TrainOptions, list(given))


def test_every_other_option_is_fixed():
    """An option that is not known to be harmless makes another run."""
    free = {
        *("config", "output", "name", "cpu", "threads", "log_with", "workers", "allow_pickle", "keep"),
        *("checkpoint_minutes", "checkpoint_steps"),
    }
    assert set(vars(options())) - free == set(fixed_options(options()))


@pytest.mark.parametrize("decay", [False, True])
def test_layers_and_weight_decay(decay):
    net = timm.create_model("vit_resnas", **parse_kwargs("", [TINY]), patch_size=4, img_size=16)
    flag = "--decay-pos-embed" if decay else "--no-decay-pos-embed"
    args = options(flag, "--layer-decay", "0.5", "--lr", "0.1", "--weight-decay", "0.3")
    optimizer = train.make_optimizer(args, net)
    names = {id(p): n for n, p in net.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    wd = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert scale.keys() == set(names.values())
    # blocks 0, 1 (the reduction) and 2 between the stem and the head
    assert scale["head.weight"] == 1 and scale["blocks.2.mlp.fc1.weight"] / scale["blocks.1.pos_embed"] == 2
    assert scale["blocks.0.mlp.fc1.weight"] / scale["patch_embed.conv_proj.weight"] == 2
    assert wd["pos_embed"] == wd["blocks.1.pos_embed"] == (0.3 if decay else 0)
    assert wd["cls_token"] == wd["head.bias"] == 0 and wd["head.weight"] == 0.3
    schedule = make_schedule(args, optimizer, 10)
    schedule.step_update(10)  # warm-up is over
    assert [g["lr"] / g["lr_scale"] for g in optimizer.param_groups] == pytest.approx(
        [0.1] * len(optimizer.param_groups), rel=0.01
    )


def test_augmentation_by_data_and_options():
    splits = load_splits("digits")
    assert augmentation(options(), splits, (32, 32)) == {"shift": 3, "hflip": 0.0}
    found = augmentation(options("--aa", "rand-m9", "--reprob", "0.2"), splits, (32, 32))
    assert found == {"hflip": 0.0, "auto_augment": "rand-m9", "re_prob": 0.2}
    found = augmentation(options("--shift", "0", "--scale", "0.5", "1"), splits, (32, 32))
    assert found == {"hflip": 0.0, "scale": [0.5, 1.0]}
    assert augmentation(options("--shift", "1", "--hflip", "0.5"), splits, (32, 32)) == {"shift": 1, "hflip": 0.5}


def test_kwargs():
    items = ["a=1", "b=true", "c=1e-3", "d=(1,2)", "e=some text", "f=none", "g=x=y"]
    found = {"a": 1, "b": True, "c": 1e-3, "d": (1, 2), "e": "some text", "f": None, "g": "x=y"}
    assert parse_kwargs("--k", items) == found
    with pytest.raises(RunError, match="--k takes NAME=VALUE, got 'a'"):
        parse_kwargs("--k", ["a"])


def test_the_best_records():
    lines = [
        {"epoch": 1, "accuracy": {"raw": 0.5, "ema": 0.7}},
        {"epoch": 2, "accuracy": {"raw": 0.7, "ema": 0.7}},
        {"epoch": 3, "accuracy": {"raw": 0.6, "ema": 0.1}},
    ]
    assert train.best_of(lines, 4) == [(2, "ema"), (2, "raw"), (1, "ema"), (3, "raw")]
    assert train.best_of([{"epoch": 1, "accuracy": {}}], 2) == []


def test_mixing():
    """A function of images and seed; without mixing, smoothed labels of the same form."""
    net = timm.create_model("vit_resnas", **parse_kwargs("", [TINY]), patch_size=4, img_size=16)
    data = train.TrainData(load_splits("digits"), [], [], {})
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8)
    for kind in ("mixup", "token"):
        mix = train.make_mix(options("--mix", kind, "--smoothing", "0.2"), net, data)
        first, target = mix(x.clone(), y, 5, True)
        torch.rand(3), np.random.rand()
        second, again = mix(x.clone(), y, 5, True)
        assert torch.equal(first, second) and not torch.equal(first, x)
        assert not torch.equal(first, mix(x.clone(), y, 6, True)[0])
        plain, unmixed = mix(x.clone(), y, 5, False)
        assert torch.equal(plain, x)
        smooth = torch.full((8, 10), 0.02).scatter_(1, y[:, None], 0.82)
        if kind == "token":
            assert torch.equal(target[1], again[1])
            torch.testing.assert_close(unmixed[1], smooth[:, None].expand(-1, 4, -1))
            target, unmixed = target[0], unmixed[0]
        torch.testing.assert_close(target.sum(dim=1), torch.ones(8))
        torch.testing.assert_close(unmixed, smooth)
    x, y = train.make_mix(options("--mix", "none"), net, data)(x, y, 5, True)
    assert torch.equal(y, torch.arange(8))


def test_multi_scale_batches():
    """Every image at most once an epoch; sizes are mixed; the parts of two processes are the batches of one."""
    splits = load_splits("digits")
    config = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    transforms = [train_transform({**config, "input_size": [3, s, s]}, shift=1, hflip=0.0) for s in (8, 16, 24)]
    part = splits.train.select(range(400))
    part = part.remove_columns("label").add_column("label", np.arange(400))

    def loader(**given):
        return multiscale_loader(part, transforms, 16, base_size=(16, 16), multiple=4, seed=3, **given)

    whole = loader()
    assert whole.batch_sizes == (64, 16, 8)
    batches = list(whole.epoch(1))
    assert len(batches) == len(whole)
    assert {(x.shape[2], len(x)) for x, _ in batches} == {(8, 64), (16, 16), (24, 8)}
    seen = torch.cat([y for _, y in batches])
    assert len(seen) == len(seen.unique()) > 390
    assert not torch.equal(seen, torch.cat([y for _, y in whole.epoch(2)]))
    for given, skip in (({}, 2), (dict(num_workers=1), 1)):
        for (x, y), (a, b) in zip(batches[skip:], loader(**given).epoch(1, skip), strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)
    halves = [list(loader(rank=r, world=2).epoch(1)) for r in range(2)]
    for (x, y), *both in zip(batches, *halves, strict=True):
        assert torch.equal(x, torch.cat([a for a, _ in both])) and torch.equal(y, torch.cat([b for _, b in both]))


# -- other ways to train ----------------------------------------------------------------------------------------------


def run(tmp_path, name, images, *given):
    data = ["--dataset", f"imagefolder:{images}", "--batch-size", "4", "--epochs", "1", "--val-per-class", "0"]
    data += ["--lr", "1e-3", "--warmup-epochs", "0"]
    recipe.main([*MODEL, TINY, *data, "--output", str(tmp_path), "--name", name, *given])
    return tmp_path / name


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory):
    """A folder with another normalisation and size than the students have."""
    net = timm.create_model("vit_resnas", **parse_kwargs("", [TINY]), patch_size=4, img_size=32, num_classes=2)
    net.pretrained_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return save_pretrained(net, tmp_path_factory.mktemp("teacher") / "best")


@pytest.mark.parametrize("distill", ["soft-label", "hard", "logit", "token"])
def test_teachers(distill, teacher, images, tmp_path, monkeypatch):
    seen = []
    forward = timm.task.DistillationTeacher.forward
    monkeypatch.setattr(
        timm.task.DistillationTeacher, "forward", lambda s, x, **k: seen.append(x.shape) or forward(s, x, **k)
    )
    mix = ["--mix", "mixup"] if distill != "token" else []
    folder = run(tmp_path, "run", images, "--teacher", str(teacher), "--distill", distill, *mix)
    assert seen == [(4, 3, 16, 16)] * 2
    args = yaml.safe_load((folder / "config.yaml").read_text())
    assert args["teacher"] == str(teacher)
    net = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True)
    assert net.has_dist is (distill == "token")


def test_several_depths(images, tmp_path):
    given = shrunk("sret_tiny")
    kwargs = [k.replace("recursive_num=(1,1,1)", "recursive_num=(2,2,2)") for k in given]
    folder = run(tmp_path, "run", images, *kwargs[:-2], "groups1=(1,1,1)", "groups2=(1,1,1)", "--recursions", "1")
    assert math.isfinite(records(folder)[0]["loss"])


SMALL_VIT = ["--model", "deit_tiny_patch16_224", "--img-size", "32", "--model-kwargs"]
SMALL_VIT += ["patch_size=8", "depth=4", "embed_dim=24", "num_heads=2"]


@pytest.mark.parametrize("method", ["ats", "patchmerger", "dynamicvit"])
def test_fewer_tokens(method, images, tmp_path, capsys):
    plain = run(tmp_path, "plain", images, *SMALL_VIT) / "best"
    given = ["--model", str(plain), "--model-kwargs", "--pretrained", "--img-size", "32", "--reduce-tokens", method]
    given += ["--freeze-epochs", "1", "--epochs", "2"] if method == "dynamicvit" else []
    folder = run(tmp_path, "run", images, *given)
    net = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True)
    assert net.method == method and net.pretrained_cfg["architecture"] == "vit_tokens"
    printed, found = capsys.readouterr().out, results(folder)
    assert found["macs"] < results(plain.parent)["macs"] or method == "ats"
    # how many tokens ATS keeps is up to the image
    assert ("macs_expected" in found) == ("MMACs" in printed and "at most" in printed) == (method == "ats")
    if method == "ats":
        assert found["macs_images"] == found["images"]["test"] and 0 < found["macs_expected"] < found["macs"]
    old, new = weights(plain), weights(folder / "best")
    moved = {key for key in old if not torch.equal(old[key], new[key])}
    if method != "dynamicvit":
        assert moved == set(old)
        return
    assert "from now on: 0.70, 0.49, 0.34" in printed
    # a hundredth of the learning rate, in the second epoch; tokens and positions never
    assert set(old) - moved == {"cls_token", "pos_embed"}
    # a folder of one goes on as one, and only its predictors at first
    again = run(tmp_path, "again", images, "--model", str(folder), "--model-kwargs", "--pretrained", "--img-size", "32")
    first = weights(again / "best")
    moved = {key for key in new if not torch.equal(new[key], first[key])}
    assert moved and all(key.startswith("score_predictor.") for key in moved)


@pytest.mark.parametrize(
    "given",
    [
        ("--clip-grad", "0.01", "--clip-mode", "agc", "--opt", "lamb"),
        ("--clip-grad", "0.1", "--clip-mode", "value", "--opt-kwargs", "betas=(0.8,0.9)", "--grad-checkpointing"),
        ("--model", "test_resnet", "--model-kwargs", "--img-size", "24", "32", "--mix", "mixup", "--sched", "constant"),
    ],
)
def test_other_options(given, images, tmp_path):
    folder = run(tmp_path, "run", images, *given)
    assert math.isfinite(records(folder)[0]["loss"])
    if "test_resnet" in given:
        assert results(folder)["input_size"] == [3, 24, 32]
        net = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True)
        assert net.pretrained_cfg["input_size"] == (3, 24, 32) or net.pretrained_cfg["input_size"] == [3, 24, 32]


def test_inherited_weights(teacher, images, tmp_path):
    """With --pretrained a run starts from the folder's weights, without it from new ones of the same architecture."""
    given = ["--model", str(teacher), "--img-size", "32"]
    source = weights(teacher)
    for flag in ([], ["--pretrained"], ["--pretrained-path", str(teacher / "model.safetensors")]):
        net = train.create_model(parse(TrainOptions, [*given, *flag]), 2)
        state = net.state_dict()
        assert all(torch.equal(state[k], v) for k, v in source.items()) is bool(flag)
        assert state.keys() == source.keys()
    wider = train.create_model(
        parse(TrainOptions, [*given[:1], "vit_resnas", "--model-kwargs", "patch_size=4", TINY, *given[2:], *flag]), 5
    )
    assert wider.head.out_features == 5 and torch.equal(
        wider.norm.weight, source["norm.weight"]
    )  # the file has 2 classes
    smaller = train.create_model(
        parse(TrainOptions, ["--model", str(teacher.parent), "--img-size", "16", "--pretrained"]), 5
    )
    assert smaller.head.out_features == 5 and smaller.pos_embed.shape == (1, 17, 16)
    assert torch.equal(smaller.norm.weight, source["norm.weight"])


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(capsys, tmp_path, *given):
    with pytest.raises(SystemExit) as end:
        recipe.main([*QUICK, "--output", str(tmp_path), "--name", "run", *given])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    return error


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    """Wherever they come from; those of folders and of the Hub are checked as they are read."""
    model = timm.create_model("test_vit", num_classes=10)
    model.blocks[1].mlp.fc1.weight.data[2, 3] = float("inf")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(HubError, match=r"w.safetensors holds numbers that are not finite.* in blocks.1.mlp.fc1.weight"):
        open_model("test_vit", pretrained_path=str(tmp_path / "w.safetensors"))
    check_tensors({"attn.q_proj.input_min": torch.tensor(-torch.inf)}, "gemma4_vit, whose bounds do nothing at first,")
    with pytest.raises(HubError, match="not finite"):
        check_tensors({"attn.q_proj.input_min": torch.tensor(torch.nan)}, "the same")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "vit_resnas_tyni"], "neither a model .* did you mean vit_resnas_tiny"),
        (["--model", "local-dir:nowhere"], "there is no folder nowhere"),
        (["--model", str(RECIPES)], "holds no config.json; expected a folder that a recipe saved"),
        (["--img-size", "20"], "20x20 is not a multiple of the total stride 8 .* 16x16"),
        (["--img-size", "16", "16", "16"], "one side, or height and width; got 16 16 16"),
        (["--pretrained"], "no pretrained weights; leave --pretrained out"),
        (["--pretrained-path", "nowhere.pth"], "nowhere.pth: this file of weights does not exist"),
        (["--model-kwargs", "patch_size"], "NAME=VALUE, got 'patch_size'"),
        (["--model-kwargs", "flavour=3"], "unexpected keyword argument 'flavour'"),
        (["--model-kwargs", "num_classes=3"], "--model-kwargs cannot set num_classes"),
        (["--dataset", "imagenet"], "unknown data set 'imagenet'"),
        (["--batch-size", "126", "--accumulate", "4"], "126 cannot be dealt evenly to 1 process of 4 passes"),
        (["--batch-size", "2000"], "2000 is more than the 1337 training images"),
        (["--mix", "mixup", "--batch-size", "63"], "63 of them, an odd number"),
        (["--opt", "adamv"], "--opt adamv is not one of timm's: .*adamw"),
        (["--opt-kwargs", "colour=1"], "--opt adamw: .*colour"),
        (["--epochs", "0"], r"argument --epochs: must be in \[1, inf\), got 0"),
        (["--teacher", "test_vit", "--mix", "token"], "--teacher and --mix token do not go together"),
        (["--recursions", "1", "--mix", "none"], "has no set_mixed_depth"),
        (["--model", "test_resnet", "--model-kwargs"], "unexpected keyword argument 'patch_head'"),
        (["--multi-scale", "16", "32", "--mix", "none"], "one image size"),
        (["--reduce-kwargs", "keep_ratios=0.5"], "--reduce-kwargs needs --reduce-tokens"),
        (["--reduce-tokens", "dynamicvit"], "starts from trained weights: give --pretrained or --pretrained-path"),
        (["--reduce-tokens", "ats"], "--reduce-tokens ats on vit_resnas: .* has its own forward"),
        (
            [*SMALL_VIT, "--mix", "none", "--reduce-tokens", "ats", "--reduce-kwargs", "a=1"],
            "unexpected keyword argument 'a'",
        ),
    ],
)
def test_options_that_do_not_fit(given, message, tmp_path, capsys):
    assert re.search(message, refused(capsys, tmp_path, *given))
    assert not (tmp_path / "run" / "best").exists()


def test_a_broken_checkpoint(teacher, tmp_path, capsys):
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "config.json").write_bytes((teacher / "config.json").read_bytes())
    data = (teacher / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    given = ["--model", str(tmp_path), "--pretrained", "--model-kwargs"]
    assert f"{folder}: model.safetensors is not a safetensors file" in refused(capsys, tmp_path / "runs", *given)
    (folder / "config.json").write_text("{")
    assert f"{folder}: config.json" in refused(capsys, tmp_path / "runs", *given)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    given = ["--lr", "1e30", "--warmup-epochs", "0", "--clip-grad", "1e30", "--checkpoint-steps", "1", "--epochs", "1"]
    error = refused(capsys, tmp_path, *given)
    assert "not finite" in error or "loss is nan" in error or "loss is inf" in error
    assert "lower --lr" in error and not (tmp_path / "run" / "best").exists()
    for path in checkpoints(tmp_path / "run"):
        state = Checkpoints.read(path)
        assert all(torch.isfinite(v).all() for v in state["raw"].values())


def test_other_options_need_another_folder(straight, capsys):
    with pytest.raises(SystemExit):
        recipe.main([*QUICK, "--output", str(straight.parent), "--name", straight.name, "--smoothing", "0.2"])
    assert "smoothing 0.1 (now 0.2)" in capsys.readouterr().err


# -- streams and pickles ----------------------------------------------------------------------------------------------


def test_training_from_a_stream(tmp_path):
    folder = write(tmp_path / "repo", "train", [20] * 3)
    write(tmp_path / "repo", "test", [9], start=100)
    options = [*MODEL, TINY, "--dataset", f"hf:{folder}", "--streaming", "--num-train", "60", "--val-per-class", "0"]
    options += ["--batch-size", "12", "--epochs", "2", "--output", str(tmp_path)]
    for name in ("one", "two"):
        recipe.main([*options, "--name", name])
    found = results(tmp_path / "one")
    assert (found["baseline"]["train_images"], found["baseline"]["images"]) == (60, 9)
    assert found["images"] == {"train": 60, "val": 0, "test": 9} and found["chosen"]["by"] == "being the last"
    assert records(tmp_path / "one")[-1]["step"] == 2 * 5
    first, second = (weights(tmp_path / name / "best") for name in ("one", "two"))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    with pytest.raises(SystemExit):
        recipe.main([*options, "--val-per-class", "5", "--name", "three"])


def test_pickled_weights_are_read_only_when_allowed(straight, tmp_path, capsys):
    folder = tmp_path / "pickled"
    shutil.copytree(straight / "best", folder)
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    options = ["--cpu", "--threads", "1", "--model", str(folder), "--pretrained", "--epochs", "1"]
    options += ["--batch-size", "128", "--lr", "1e-30", "--warmup-lr", "0", "--min-lr", "0", "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        recipe.main([*options, "--name", "refused"])
    assert "--allow-pickle" in capsys.readouterr().err
    recipe.main([*options, "--name", "allowed", "--allow-pickle"])
    key = "blocks.0.attn.qkv.weight"
    assert torch.equal(weights(tmp_path / "allowed" / "best")[key], weights(straight / "best")[key])
