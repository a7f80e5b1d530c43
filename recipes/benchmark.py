"""Measurements of parts: what is compared runs interleaved in one process; speed as ratios, medians and spread.

    python recipes/benchmark.py supernet-step --num-archs 16
    python recipes/benchmark.py supernet-step --num-archs 2 --batch-size 128 --device cuda --dtype bfloat16

`supernet-step` times forward and backward of one training step of a supernet: `masked` and `sliced`
multi-architecture computation of the same sub-networks, the plain largest network, and a plain network whose MACs are
the mean of the sub-networks'. The arithmetic limit is the largest network's MACs over the sub-networks' mean: what
sliced would gain over the largest if arithmetic were all that counts. Peak memory is what a step adds to what the
network itself takes, each in a separate process.

    python recipes/benchmark.py search --space vit_resnas_tiny --images 256

`search` times scoring the same candidates in three ways: our evaluator within a search; building each candidate,
loading its slice of the weights and evaluating it; and the forward passes of our evaluator alone. The overhead is what
a search spends outside of forward passes.

    python recipes/benchmark.py versus runs/seed-0 runs/seed-1 runs/seed-2

`versus` compares searches with random search: on each finished run's supernet, budget and validation images, as many
random networks of the budget are scored as the run had candidates; the winners of both meet on the test images.

    python recipes/benchmark.py repair runs/digits-micro --budget macs=20%

`repair` extracts random ViT-ResNAS networks of a run's supernet as they are and repaired (`extract(arch, repair=…)`) on
training images, and compares their test accuracies; with `--best` the best candidates of the run's search instead.

    python recipes/benchmark.py scores vit_bench_101.json --threads 1 --json scores.jsonl

`scores` asks what training-free scores (`--score` of search.py) say of accuracies: rank correlation over networks that
were trained, alone and with the number of parameters or the MACs held fixed, and whether a score ranks networks better
than counting their parameters does. The file, which is not in this repository, is ViT-Bench-101 as published with
Auto-Prox (AAAI 2024, Apache-2.0; the gt_results folder of its public repository), its lists of AutoFormer-T networks
as JSON: {"autoformer_1": [{"arch": {"hidden_dim": 192, "depth": 12, "mlp_ratio": [...], "num_heads": [...]},
"c100_base_acc": 68.66, ...}, ...]}; accuracies in percent, trained from scratch (base), with a teacher (kd), or
inherited from the supernet. All networks are slices of one untrained supernet; snip and naswot look at `--images`
images of `--dataset`, with its own labels. With `--json FILE` scores are kept, and not computed again.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch

import timm_resnas  # noqa: F401  (registers the models)
from timm_resnas.arch import Arch
from timm_resnas.data import (
    default_data_config,
    eval_batches,
    eval_transform,
    load_splits,
)
from timm_resnas.engine.run import Progress, RunError, check_output, cli_errors
from timm_resnas.engine.score_table import CONTROLS, read_accuracies, score_networks, score_table
from timm_resnas.engine.supernet import (
    open_run,
    val_batches,
)
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.evaluate import Evaluator, count_correct
from timm_resnas.nas.evolution import RandomSearch, rank_key
from timm_resnas.nas.jsonl import read_jsonl, write_jsonl
from timm_resnas.nas.proxies import PROXIES
from timm_resnas.nas.sampling import MultiArchSampler
from timm_resnas.nas.space import SearchSpace

MODES = ("masked", "sliced", "largest", "average")


def average_network(space: SearchSpace, macs: float) -> Arch:
    """A sub-network whose MACs are nearest to ``macs``."""
    candidates = space.sample_many(2000, np.random.default_rng(0))
    return min(candidates, key=lambda a: abs(space.costs(a)["macs"] - macs))


def make_steps(args: argparse.Namespace, modes: tuple[str, ...]) -> tuple[dict[str, Callable[[int], None]], float]:
    """One function per mode that runs forward and backward of a step; and the arithmetic limit."""
    space = SearchSpace.preset(args.space)
    if args.img_size:
        space = space.at(img_size=args.img_size)
    sampler = MultiArchSampler(space, args.num_archs, args.seed, warmup_epochs=0)
    sampled = [a for step in range(args.rounds + 1) for a in sampler.archs(0, step)]
    mean = statistics.mean(space.costs(a)["macs"] for a in sampled)
    limit = space.costs(space.largest)["macs"] / mean
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    nets: dict[str, torch.nn.Module] = {}
    if {"masked", "sliced", "largest"} & set(modes):
        supernet = timm.create_model(space.supernet, space=space.to_dict()).to(args.device).train()
        nets = dict.fromkeys(("masked", "sliced", "largest"), supernet)
    if "average" in modes:
        nets["average"] = space.network(average_network(space, mean))
        nets["average"] = nets["average"].to(args.device).train()
    model_args = space.model_args
    size = model_args["img_size"]
    x = torch.randn(args.batch_size, model_args["in_chans"], *size, device=args.device)
    y = torch.randint(0, model_args["num_classes"], (args.batch_size,), device=args.device)

    def make(mode: str) -> Callable[[int], None]:
        net = nets[mode]
        forward = torch.compile(net) if args.compile and mode in ("largest", "average") else net

        def step(i: int) -> None:
            net.zero_grad(set_to_none=True)
            with torch.autocast(args.device, dtype=dtype, enabled=dtype is not torch.float32):
                if mode in ("masked", "sliced"):
                    out = forward(x, archs=sampler.archs(0, i), mode=mode)
                else:
                    out = forward(x)
                loss = torch.nn.functional.cross_entropy(out, y)
            loss.backward()
            if args.device == "cuda":
                torch.cuda.synchronize()

        return step

    return {mode: make(mode) for mode in modes}, limit


def peak_memory(args: argparse.Namespace, mode: str) -> float:
    """Bytes that a step takes beyond what was there before it."""
    steps, _ = make_steps(args, (mode,))
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps[mode](0)
        return torch.cuda.max_memory_allocated() - before
    with open("/proc/self/statm") as f:
        before = int(f.read().split()[1]) * resource.getpagesize()
    steps[mode](0)
    with open("/proc/self/status") as f:  # rusage's peak includes that of the process that started this one
        peak = next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))
    return peak * 1024 - before


def supernet_step(args: argparse.Namespace) -> None:
    if args.memory_of:
        print(peak_memory(args, args.memory_of))
        return
    steps, limit = make_steps(args, MODES)
    for step in steps.values():
        step(0)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for i in range(1, args.rounds + 1):
        order = MODES[i % len(MODES) :] + MODES[: i % len(MODES)]
        for mode in order:
            begin = time.perf_counter()
            steps[mode](i)
            seconds[mode].append(time.perf_counter() - begin)
    memory = {}
    for mode in MODES:
        done = subprocess.run([sys.executable, *sys.argv, "--memory-of", mode], capture_output=True, text=True)
        memory[mode] = float(done.stdout) if done.returncode == 0 else float("nan")
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.space}, batch {args.batch_size} in {args.num_archs} groups, {args.dtype}, {name}, "
        f"{args.rounds} rounds; arithmetic limit {limit:.2f}x the largest"
    )
    print("| computation | ms, median (min to max) | images/s | speed against masked | against largest | peak memory |")
    print("|---|---|---|---|---|---|")
    for mode in MODES:
        s = seconds[mode]
        ratio = {
            other: statistics.median(o / m for o, m in zip(seconds[other], s, strict=True))
            for other in ("masked", "largest")
        }
        print(
            f"| {mode} | {1e3 * statistics.median(s):.0f} ({1e3 * min(s):.0f} to {1e3 * max(s):.0f}) "
            f"| {args.batch_size / statistics.median(s):.1f} | {ratio['masked']:.2f}x | {ratio['largest']:.2f}x "
            f"| {memory[mode] / 2**20:.0f} MiB |"
        )
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"args": vars(args) | {"run": None}, "seconds": seconds, "memory": memory, "limit": limit}, f)


def search(args: argparse.Namespace) -> None:
    space = SearchSpace.preset(args.space)
    model_args = space.model_args
    torch.manual_seed(args.seed)
    net = timm.create_model(space.supernet, space=space.to_dict()).eval()
    x = torch.randn(args.images, model_args["in_chans"], *net.img_size)
    y = torch.randint(0, model_args["num_classes"], (args.images,))
    batches = list(zip(x.split(64), y.split(64), strict=True))
    largest = space.costs(space.largest)
    budget = Budget.parse(args.budget, share_of=largest)
    search = RandomSearch(
        space,
        budget,
        args.seed,
        population=args.candidates,
        iterations=args.rounds,
        mutations=args.candidates,
        crossovers=0,
    )
    inside = 0.0
    original = net.forward_shared

    def timed(h: torch.Tensor) -> torch.Tensor:
        nonlocal inside
        begin = time.perf_counter()
        out = original(h)
        inside += time.perf_counter() - begin
        return out

    net.forward_shared = timed
    ours, forward, singly, build = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        evaluator = Evaluator(net, batches, folder=folder)
        evaluator.score([space.smallest])  # what networks share, once in a search
        while not search.done:
            inside, begin = 0.0, time.perf_counter()
            archs = search.ask()
            scores = evaluator.score(archs)
            search.tell(zip(archs, scores, strict=True))
            write_jsonl(Path(folder) / "history.jsonl", search.history)
            ours.append((time.perf_counter() - begin) / len(archs))
            forward.append(inside / len(archs))
            built = 0.0
            begin = time.perf_counter()
            for arch, score in zip(archs, scores, strict=True):
                start = time.perf_counter()
                model = space.network(arch)
                model.load_state_dict(net.sliced_state_dict(arch, model))
                built += time.perf_counter() - start
                if count_correct(model.eval(), batches)[0] != score:
                    raise RunError(f"{arch} scores differently when it is built singly")
            singly.append((time.perf_counter() - begin) / len(archs))
            build.append(built / len(archs))
    print(
        f"{args.space}, {args.images} images of {net.img_size[0]} px, {args.candidates} candidates of {budget}, "
        f"{args.rounds} rounds, CPU, {torch.get_num_threads()} threads; medians per candidate"
    )
    ratio = statistics.median(b / a for a, b in zip(ours, singly, strict=True))
    share = statistics.median(1 - f / a for a, f in zip(ours, forward, strict=True))
    a, f, b, c = (statistics.median(v) for v in (ours, forward, singly, build))
    print(f"ours          {1e3 * a:9.1f} ms, {1 / a:7.2f} candidates/s; outside of forward passes {share:.1%}")
    print(f"built singly  {1e3 * b:9.1f} ms, {1 / b:7.2f} candidates/s; building and loading {1e3 * c:.1f} ms")
    print(f"ours is {ratio:.2f}x as fast (median of the rounds' ratios)")


def versus(args: argparse.Namespace) -> None:
    rows = []
    print("| run | candidates | budget | search: val | test | random: val | test |")
    print("|---|---|---|---|---|---|---|")
    for folder in args.run_folders:
        options, data, net = open_run(folder)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        limits = {k: v for k, v in results["budget"].items() if k != "asked"}
        budget = Budget.from_dict(limits) if limits else None
        history = read_jsonl(folder / "history.jsonl")
        random = RandomSearch(data.space, budget, options.seed, population=len(history), iterations=1)
        evaluator = Evaluator(net, val_batches(data, torch.device("cpu")))
        archs = random.ask()
        random.tell(zip(archs, evaluator.score(archs), strict=True))
        tester = Evaluator(net, eval_batches(data.splits.test, eval_transform(data.config)))
        row = []
        for record in (min(history, key=rank_key), random.best):
            (test,) = tester.score([Arch.from_record(record)])
            row += [record["score"] / len(data.val), test / results["test_images"]]
        rows.append(row)
        shown = " | ".join(f"{v:.4f}" for v in row)
        print(f"| {folder.name} | {len(history)} and {len(archs)} | {budget or 'none'} | {shown} |", flush=True)
    means = " | ".join(
        f"{statistics.mean(c):.4f} ± {statistics.stdev(c) if len(c) > 1 else 0:.4f}" for c in zip(*rows, strict=True)
    )
    print(f"| mean ± s.d. | | | {means} |")
    for name, i in (("validation", 0), ("test", 1)):
        gains = [r[i] - r[i + 2] for r in rows]
        wins, ties = sum(g > 0 for g in gains), sum(g == 0 for g in gains)
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        print(
            f"{name}: search - random {100 * statistics.mean(gains):+.2f} points, standard error {100 * error:.2f}; "
            f"higher in {wins} of {len(gains)}, equal in {ties}"
        )


def repair(args: argparse.Namespace) -> None:
    options, data, supernet = open_run(args.run_folder)
    space, splits, transform = data.space, data.splits, eval_transform(data.config)
    chosen = np.random.default_rng(args.seed).permutation(data.train)[: args.images].tolist()
    images = torch.cat([x for x, _ in eval_batches(splits.train, transform, indices=chosen)])
    test = eval_batches(splits.test, transform)
    if args.best:
        history = sorted(read_jsonl(args.run_folder / "history.jsonl"), key=rank_key)
        archs, which = [Arch.from_record(record) for record in history[: args.count]], "networks, the search's best"
    else:
        budget = None if args.budget == "none" else Budget.parse(args.budget, space.costs(space.largest))
        archs = space.sample_many(args.count, np.random.default_rng(args.seed), budget)
        which = f"random networks, budget {args.budget}"
    pairs = []
    for arch in archs:
        with torch.inference_mode():
            counts = [count_correct(supernet.extract(arch, repair=r), test) for r in (None, images)]
        pairs.append([correct / total for correct, total in counts])
    plain, repaired = (statistics.mean(column) for column in zip(*pairs, strict=True))
    gains = [b - a for a, b in pairs]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    print(
        f"{options.dataset}, {len(pairs)} {which}, repaired on {len(images)} images: as "
        f"trained {plain:.4f}, repaired {repaired:.4f}, {100 * (repaired - plain):+.2f} points, standard error "
        f"{100 * error:.2f}; higher for {sum(g > 0 for g in gains)}, lower for {sum(g < 0 for g in gains)}"
    )


def scores(args: argparse.Namespace) -> None:
    known = {name: read_accuracies(args.file, name) for name in args.lists}
    if unknown := set(args.scores) - set(PROXIES):
        raise RunError(f"--scores {' '.join(sorted(unknown))}: known are {', '.join(PROXIES)}")
    names = [*CONTROLS, *(name for name in PROXIES if name in args.scores and name not in CONTROLS)]
    if args.json is not None:
        check_output(args.json)
    size = (args.img_size, args.img_size)
    space = SearchSpace.preset(args.space, img_size=size, num_classes=args.num_classes)
    splits = load_splits(args.dataset)
    config = default_data_config(splits, size)
    batches = eval_batches(splits.train, eval_transform(config), indices=range(args.images))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    torch.manual_seed(args.seed)
    net = timm.create_model(space.supernet, space=space.to_dict()).eval()
    asked = {k: getattr(args, k) for k in ("space", "img_size", "num_classes", "dataset", "images", "seed")}
    print(
        f"{args.file.name}: networks of {args.space} at {args.img_size} px, {args.num_classes} classes, seed "
        f"{args.seed}; {args.images} images of {args.dataset} for snip and naswot"
    )
    for name, records in known.items():
        archs = [arch for arch, _ in records]
        with Progress(len(archs), name, True) as bar:
            found = score_networks(net, archs, names, images, labels, args.json, asked, bar)
        for accuracy in dict.fromkeys(k for _, values in records for k in values):
            rows = [i for i, (_, values) in enumerate(records) if accuracy in values]
            of = np.array([records[i][1][accuracy] for i in rows])
            print(f"\n{name}, {accuracy}: {len(rows)} networks, {of.min():.1f} to {of.max():.1f}\n")
            print(score_table({k: v[rows] for k, v in found.items()}, of), flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("supernet-step", help="a training step: masked, sliced, plain networks")
    verb.set_defaults(run=supernet_step)
    verb.add_argument("--space", default="vit_resnas_tiny")
    verb.add_argument("--img-size", type=int)
    verb.add_argument("--batch-size", type=int, default=32)
    verb.add_argument("--num-archs", type=int, default=16)
    verb.add_argument("--rounds", type=int, default=5)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    verb.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    verb.add_argument("--threads", type=int, default=0)
    verb.add_argument("--compile", action="store_true", help="torch.compile the plain networks")
    verb.add_argument("--json", metavar="FILE", help="also write every measurement")
    verb.add_argument("--memory-of", choices=MODES, help=argparse.SUPPRESS)

    verb = verbs.add_parser("search", help="scoring candidates: ours against building each one")
    verb.set_defaults(run=search)
    verb.add_argument("--space", default="vit_resnas_tiny")
    verb.add_argument("--budget", default="macs=50%")
    verb.add_argument("--images", type=int, default=256)
    verb.add_argument("--candidates", type=int, default=5, help="candidates of a round")
    verb.add_argument("--rounds", type=int, default=3)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--threads", type=int, default=0)

    verb = verbs.add_parser("versus", help="finished searches against random search at as many evaluations")
    verb.set_defaults(run=versus)
    verb.add_argument("run_folders", type=Path, nargs="+", metavar="RUN", help="folders of recipes/search.py")
    verb.add_argument("--threads", type=int, default=0)

    verb = verbs.add_parser("repair", help="sub-networks of a ViT-ResNAS supernet, repaired in closed form or not")
    verb.set_defaults(run=repair)
    verb.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run of supernet.py or search.py")
    which = verb.add_mutually_exclusive_group()
    which.add_argument("--budget", default="macs=20%", help="of random networks; none: any")
    which.add_argument("--best", action="store_true", help="the best candidates of the run's search")
    verb.add_argument("--images", type=int, default=512)
    verb.add_argument("--count", type=int, default=20)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--threads", type=int, default=0)

    verb = verbs.add_parser("scores", help="training-free scores against trained accuracies")
    verb.set_defaults(run=scores)
    verb.add_argument("file", type=Path, metavar="FILE", help="ViT-Bench-101 as JSON")
    verb.add_argument("--lists", nargs="+", default=["autoformer_1", "autoformer_2"], metavar="NAME")
    verb.add_argument("--scores", nargs="+", default=list(PROXIES), metavar="SCORE", help=", ".join(PROXIES))
    verb.add_argument("--space", default="autoformer_tiny")
    verb.add_argument("--img-size", type=int, default=224)
    verb.add_argument("--num-classes", type=int, default=100)
    verb.add_argument("--dataset", default="digits")
    verb.add_argument("--images", type=int, default=8)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--json", type=Path, metavar="FILE", help="scores by network, one a line")
    verb.add_argument("--threads", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with cli_errors("benchmark.py"):
        if args.threads:
            torch.set_num_threads(args.threads)
        args.run(args)


if __name__ == "__main__":
    main()
