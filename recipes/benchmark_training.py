"""What the training of a supernet is worth: step rules against each other, and against networks trained alone.

    python recipes/benchmark_training.py steps --threads 1 --json steps.jsonl
    python recipes/benchmark_training.py steps --dataset fashion-mnist:data --space autoformer_micro --alone 8

`steps` compares the step rules of a supernet (`--step` of supernet.py and search.py) at equal CPU time of the process,
so that other programs on the machine weigh on none: a step of each is timed first, each rule trains for as many epochs,
with its learning rate and opening of choices over all of them, as take the time of `--epochs` of the first, and their
steps take turns. `--rules groups sandwich:16 groups+sampler=sandwich+switchable_scale=1` also takes a rule with batches
of its own size, and with other options of supernet.py. Then the smallest, random and the largest network are scored on
the search's validation images. With `--alone N`, N random networks are trained alone as well, from scratch, with the
optimizer, schedule and augmentation of the first rule and on as many images: how each rule's inherited accuracies rank
them is their Spearman correlation with those, and with the number of parameters. With `--json FILE` every seed's result
is added to the file, and seeds that are there already are not trained again.

    python recipes/benchmark_training.py inherited runs/digits-micro

`inherited` trains some networks of the space alone in the same way, on as many images in total as the supernet of a
finished run saw, and compares their test accuracy with the inherited weights'.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.utils import dispatch_clip_grad
from torch import nn

from timm_resnas.arch import Arch
from timm_resnas.data import eval_batches, eval_transform, train_loader, train_transform
from timm_resnas.engine.correlation import spearman
from timm_resnas.engine.data import augmentation
from timm_resnas.engine.options import parse
from timm_resnas.engine.run import Deadline, Run, RunError, check_output, cli_errors, format_minutes
from timm_resnas.engine.settings import SupernetOptions
from timm_resnas.engine.supernet import (
    SearchData,
    SupernetTraining,
    check_space,
    check_step,
    create_supernet,
    make_optimizer,
    open_run,
    open_space,
    prepare,
    val_batches,
)
from timm_resnas.engine.training import make_schedule
from timm_resnas.nas.cost import format_cost
from timm_resnas.nas.evaluate import Evaluator, count_correct
from timm_resnas.nas.jsonl import append_jsonl, read_jsonl
from timm_resnas.nas.supernet import Supernet

STEPS = ("groups", "single", "sandwich", "nasvit")
OWN = (  # options that a rule may have for itself
    *(
        "sampler",
        "num_archs",
        "switchable_scale",
        "temperature",
        "clip_others",
        "project_epoch",
        "mode",
        "lr",
        "min_lr",
    ),
    *("weight_decay", "clip_grad", "drop_path", "smoothing"),
)


def train_alone(options: SupernetOptions, data: SearchData, supernet: Supernet, arch: Arch, seed: int) -> nn.Module:
    """A network of the space from scratch, by the optimizer, schedule and augmentation of its supernet."""
    torch.manual_seed(seed)
    net = supernet.extract(arch)
    net.init_weights()
    loader = train_loader(
        data.splits.train.select(data.train),
        train_transform(data.config, **augmentation(options, data.splits, tuple(data.config["input_size"][1:]))),
        options.batch_size,
        seed=seed,
    )
    optimizer = make_optimizer(options, net)
    schedule = make_schedule(options, optimizer, len(loader))
    net.train()
    step = 0
    for epoch in range(options.epochs):
        for x, y in loader.epoch(epoch):
            schedule.step_update(step)
            loss = nn.functional.cross_entropy(net(x), y, label_smoothing=options.smoothing)
            loss.backward()
            if options.clip_grad:
                dispatch_clip_grad(net.parameters(), options.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return net.eval()


def inherited(args: argparse.Namespace) -> None:
    options, data, supernet = open_run(args.run_folder)
    if Run.read_config(args.run_folder / "config.yaml").get("supernet"):
        raise RunError(f"{args.run_folder} trained no supernet; give the run that trained the one it searched")
    space, splits, train = data.space, data.splits, data.train
    test = eval_batches(splits.test, eval_transform(data.config))
    print(f"{options.dataset}: {options.epochs} epochs of {len(train)} images, {len(splits.test)} to test")
    print("| MACs | inherited | trained alone | ratio |")
    print("|---|---|---|---|")
    ratios = []
    for i, arch in enumerate(space.sample_many(args.count, np.random.default_rng(args.seed))):
        supernet.set_arch(arch)
        correct, images = count_correct(supernet, test)
        alone, _ = count_correct(train_alone(options, data, supernet, arch, args.seed + i), test)
        ratios.append(correct / alone)
        macs = format_cost("macs", space.costs(arch)["macs"])
        print(f"| {macs} | {correct / images:.4f} | {alone / images:.4f} | {ratios[-1]:.4f} |", flush=True)
    print(f"ratio: mean {statistics.mean(ratios):.4f}, least {min(ratios):.4f}")


class Rule:
    """Training by a step rule, step by step.

    Attributes:
        seconds: CPU time of the process so far.
    """

    def __init__(self, options: SupernetOptions, accelerator: Accelerator, run: Run, data: SearchData) -> None:
        self.training = SupernetTraining(options, accelerator, run, data, create_supernet(options, data))
        self.training.sampler.archs(options.epochs, 0)  # what a sampler selects once is no part of a step's time
        self.seconds = 0.0
        self._steps = self._all()

    def step(self) -> bool:
        """One step; False when there are none left."""
        begin = time.process_time()
        done = next(self._steps, None)
        self.seconds += time.process_time() - begin
        return done is not None

    def time(self, rounds: int) -> float:
        """CPU seconds of an epoch, by steps early, midway and late in training; the weights are useless afterwards."""
        training, spent = self.training, []
        last = training.options.epochs
        for epoch in (0, 0, last // 4, last // 2, 3 * last // 4):
            batches = (batch for again in itertools.count() for batch in training.loader.epoch(epoch + again))
            begin = time.process_time()
            for step in range(rounds):
                training.step(*next(batches), epoch, step)
            spent.append(time.process_time() - begin)
        return training.steps * sum(spent[1:]) / rounds / (len(spent) - 1)  # the first steps are slower

    def _all(self) -> Iterator[int]:
        training = self.training
        for epoch in range(training.options.epochs):
            training.begin_epoch(epoch)
            for step, (images, labels) in enumerate(training.loader.epoch(epoch)):
                training.step(images, labels, epoch, step)
                yield training.state.step


def options_of(rule: str, batch_size: int) -> dict[str, Any]:
    """Of supernet.py, from ``STEP[:BATCH][+OPTION=VALUE]...``."""
    first, *others = rule.split("+")
    step, colon, batch = first.partition(":")
    given = {name.replace("-", "_"): value for name, _, value in (other.partition("=") for other in others)}
    if step not in STEPS or colon and not batch.isdecimal() or not set(OWN) >= set(given) or not all(given.values()):
        raise RunError(
            f"--rules {rule}: expected one of {', '.join(STEPS)}, at most with a batch size and some of "
            f"{', '.join(OWN)} behind it (sandwich:16, groups+sampler=sandwich)"
        )
    found = parse(SupernetOptions, [f"--{name.replace('_', '-')}={value}" for name, value in given.items()])
    return {"step": step, "batch_size": int(batch or batch_size), **{name: getattr(found, name) for name in given}}


def steps(args: argparse.Namespace) -> None:
    for name in ("epochs", "count", "rounds", "seeds"):
        if getattr(args, name) < 1:
            raise RunError(f"--{name} must be at least 1")
    given = {k: getattr(args, k) for k in ("dataset", "space", "img_size", "epochs", "batch_size", "lr")}
    base = SupernetOptions(**given, val_per_class=args.val_per_class, cpu=True)
    if len(set(args.rules)) < len(args.rules):
        raise RunError("--rules has an entry twice")
    for rule in args.rules:  # before the work
        own = dataclasses.replace(base, **options_of(rule, args.batch_size))
        check_step(own)
        check_space(own, open_space(args.space))
    asked = {k: v for k, v in vars(args).items() if k not in ("run", "seeds", "json", "threads")}
    known: dict[int, dict] = {}
    if args.json is not None:
        check_output(args.json)
        known = {r["seed"]: r for r in read_jsonl(args.json, mend=True) if r["asked"] == asked}
    accelerator, clock = Accelerator(cpu=True), Deadline()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            if seed in known:
                continue
            options = dataclasses.replace(base, seed=seed, output=folder, name=f"seed-{seed}")
            first = dataclasses.replace(options, **options_of(args.rules[0], args.batch_size))
            run = Run(first, accelerator, "")
            data = prepare(first, run)
            for rule in args.rules:
                if (batch := options_of(rule, args.batch_size)["batch_size"]) > len(data.train):
                    raise RunError(f"--rules {rule}: {batch} images are more than the {len(data.train)} to train on")
            run.begin()
            known[seed] = {"seed": seed, "asked": asked, **one_seed(args, options, accelerator, run, data)}
            if args.json is not None:
                append_jsonl(args.json, [known[seed]])
            print(f"seed {seed}, {format_minutes(clock.seconds())}: {json.dumps(known[seed])}", flush=True)
    print("\n" + table(args, [known[seed] for seed in range(args.seeds)]))


def one_seed(
    args: argparse.Namespace, options: SupernetOptions, accelerator: Accelerator, run: Run, data: SearchData
) -> dict[str, Any]:
    """Accuracies of each rule's networks, and of those that are trained alone."""

    def start(name: str, epochs: int) -> Rule:
        given = dict(epochs=epochs, arch_warmup_epochs=epochs, warmup_epochs=epochs / args.epochs)
        own = dataclasses.replace(options, **given, **options_of(name, args.batch_size))
        return Rule(own, accelerator, run, data)

    costs = {name: start(name, args.epochs).time(args.rounds) for name in args.rules}
    epochs = {name: max(1, round(args.epochs * costs[args.rules[0]] / costs[name])) for name in args.rules}
    rules = left = {name: start(name, epochs[name]) for name in args.rules}
    while left:
        behind = min(left, key=lambda name: left[name].seconds)
        if not left[behind].step():
            left = {name: r for name, r in left.items() if name != behind}
    space, batches = data.space, val_batches(data, torch.device("cpu"))
    rng = np.random.default_rng([options.seed, 1])
    archs = [space.smallest, *space.sample_many(args.count, rng), space.largest]
    single = space.sample_many(args.alone, np.random.default_rng([options.seed, 2])) if args.alone else []
    found: dict[str, Any] = {"rules": {}}
    for name, rule in rules.items():
        shares = [score / len(data.val) for score in Evaluator(rule.training.model, batches).score([*archs, *single])]
        accuracy = dict(smallest=shares[0], random=statistics.mean(shares[1 : 1 + args.count]))
        accuracy["largest"] = shares[1 + args.count]
        found["rules"][name] = {"epochs": epochs[name], "seconds": round(rule.seconds, 2), **accuracy}
        found["rules"][name]["inherited"] = shares[len(archs) :]
    first = rules[args.rules[0]].training
    found["params"] = [space.costs(arch)["params"] for arch in single]
    found["alone"] = [
        count_correct(train_alone(first.options, data, first.model, arch, i), batches)[0] / len(data.val)
        for i, arch in enumerate(single)
    ]
    return found


def table(args: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    """Means over the seeds."""
    names, first = ("smallest", "random", "largest"), args.rules[0]
    text = (
        f"{args.dataset}, {args.space}, {args.seeds} seeds, {torch.get_num_threads()} threads; accuracy on the "
        f"search's validation images ± standard error, and less that of {first} with the same seed"
    )
    heads = ["step", "epochs", "CPU s", "smallest", f"{args.count} random", "largest", *names]
    if args.alone:
        text += f"; rank: Spearman correlation with {args.alone} networks trained alone"
        heads.append("rank")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for rule in args.rules:
        own = [r["rules"][rule] for r in results]
        cells = ["/".join(str(e) for e in sorted({r["epochs"] for r in own}))]
        cells.append(f"{statistics.mean(r['seconds'] for r in own):.0f}")
        cells += [mean([r[n] for r in own]) for n in names]
        cells += [mean([r["rules"][rule][n] - r["rules"][first][n] for r in results], sign="+") for n in names]
        if args.alone:
            cells.append(mean([rank(r["rules"][rule]["inherited"], r["alone"]) for r in results]))
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    if args.alone:
        by_size = mean([rank(r["params"], r["alone"]) for r in results])
        alone = mean([statistics.mean(r["alone"]) for r in results])
        lines.append(f"\ntrained alone: {alone}; the number of parameters ranks them by {by_size}")
    return "\n".join([text, *lines])


def rank(a: list[float], b: list[float]) -> float:
    """Spearman correlation."""
    return spearman(np.array(a, float), np.array(b, float))


def mean(values: list[float], sign: str = "") -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.4f} ± {error:.4f}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="command", required=True)

    verb = verbs.add_parser("steps", help="step rules of a supernet at equal CPU time")
    verb.set_defaults(run=steps)
    verb.add_argument(
        "--rules",
        metavar="RULE[:BATCH][+OPTION=VALUE]",
        nargs="+",
        default=list(STEPS),
        help="step rules, batch sizes other than --batch-size, other options",
    )
    verb.add_argument("--dataset", default="digits")
    verb.add_argument("--space", default="micro")
    verb.add_argument("--img-size", type=int, nargs="+", help="of the images (default: the space's)")
    verb.add_argument("--val-per-class", type=int, default=SupernetOptions.val_per_class, help="images to score on")
    verb.add_argument("--epochs", type=int, default=12, help="of the first rule")
    verb.add_argument("--batch-size", type=int, default=64)
    verb.add_argument("--lr", type=float, default=2e-3)
    verb.add_argument("--count", type=int, default=20, help="random networks")
    verb.add_argument("--alone", type=int, default=0, metavar="N", help="networks that are trained alone as well")
    verb.add_argument("--rounds", type=int, default=2, help="steps of each kind that are timed")
    verb.add_argument("--seeds", type=int, default=3)
    verb.add_argument("--json", type=Path, metavar="FILE", help="results by seed, one a line")
    verb.add_argument("--threads", type=int, default=0)

    verb = verbs.add_parser("inherited", help="accuracy of inherited weights against training alone")
    verb.set_defaults(run=inherited)
    verb.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run of supernet.py or search.py")
    verb.add_argument("--count", type=int, default=5, help="networks, drawn at random from the space")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--threads", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with cli_errors("benchmark_training.py"):
        if args.threads:
            torch.set_num_threads(args.threads)
        args.run(args)


if __name__ == "__main__":
    main()
