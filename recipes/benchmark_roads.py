"""Which way to a small vision transformer ends best: roads to a budget, with as many image passes for each.

    python recipes/train.py --model vit_tiny_patch16_224 … --seed 0 --name base-0     # and so on for each seed
    python recipes/benchmark_roads.py --model runs/base-{seed}/best --dataset fashion-mnist:data --budget macs=40% \
        --epochs 10 --seeds 0 1 2 -- --lr 1e-3 --batch-size 64 --threads 1

For each seed `search.py --model` is run once for each road, without training the full model further: `evolution` from a
knapsack, `slimming`, `slim-masks` (half of the epochs train masks, half the network that they leave), `uniform` (of
every block the same share) and `random` (one random network of the budget), all fine-tuned alike, taught by the full
model. What follows `--` are further options of search.py. `{seed}` in `--model` stands for the seed.

Two more roads start from nothing, and train for the full model's epochs and `--epochs` together:

    … --budget macs=50% macs=30% --roads evolution by-hand space --by-hand embed_dim=32 "embed_dim=24 depth=4" \
        --space recipes/configs/fashion_mnist_space.json --space-options "--batch-size 128 --threads 1" …

`by-hand` is the full model with other arguments, for each budget a text, trained as the full model was. `space` is the
best of a supernet (supernet.py, with `--space-options`, for half of the epochs; one for all budgets), trained on as the
full model was, for the other half. For these `--model` must be the best/ folder of a run of train.py.

MACs and speeds are those of the networks in the end, speeds of the first seed's, taking turns in one process. Runs are
kept in `--output`, and continued or read when the same command is given again. Test images were looked at once in each,
for its last table.
"""

import argparse
import dataclasses
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from torch import nn

from timm_resnas.engine.data import image_pair
from timm_resnas.engine.models import model_source, open_model, parse_kwargs
from timm_resnas.engine.options import parse
from timm_resnas.engine.run import RunError, cli_errors, read_json
from timm_resnas.engine.search import check_options
from timm_resnas.engine.settings import DataOptions, SearchOptions, SupernetOptions, TrainOptions
from timm_resnas.engine.supernet import check_space, check_step, open_space
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.count import count_macs
from timm_resnas.nas.timing import Conditions, measure_together

RECIPES = Path(__file__).parent
SHRINKING = ("evolution", "slimming", "slim-masks", "uniform", "random")
ROADS = (*SHRINKING, "by-hand", "space")
OURS = ("config", "dataset", "seed", "output", "name", "model", "budget", "search", "epochs", "finetune_epochs")
UNEQUAL = ("mask_epochs", "elastic_epochs", "keep_ratios")  # would not let all roads start, or train, alike


class End(NamedTuple):
    """Of a road.

    Attributes:
        best: Folder of the network.
        test: Its accuracy on the test images.
        before: The same before it was fine-tuned, where a trained network was cut.
        full: The full model's.
    """

    best: Path
    test: float
    before: float | None = None
    full: float | None = None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a timm name, a folder or hf-hub:<id>, with weights")
    parser.add_argument("--dataset", required=True, help="as for search.py")
    parser.add_argument("--budget", nargs="+", default=["macs=50%"], help="as for search.py; shares of the full model")
    parser.add_argument("--epochs", type=int, default=8, help="of each road in all, after those of the full model")
    parser.add_argument("--roads", nargs="+", choices=ROADS, default=list(SHRINKING))
    parser.add_argument("--by-hand", nargs="+", default=[], metavar="NAME=VALUE", help="for each budget, in one text")
    parser.add_argument("--space", help="as for supernet.py")
    parser.add_argument("--space-options", default="", metavar="OPTIONS", help="of supernet.py, in one text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/roads"), help="where runs are kept")
    parser.add_argument("options", nargs="*", help="of search.py with --model, after --")
    args = parser.parse_args(argv)
    if args.epochs < 2:
        parser.error("--epochs must be at least 2, so that masks and the network that they leave are both trained")
    for option, given in (("--budget", args.budget), ("--seeds", args.seeds), ("--roads", args.roads)):
        if len(set(given)) < len(given):
            parser.error(f"{option} has an entry twice")
    for road, option, value in (("by-hand", "--by-hand", args.by_hand), ("space", "--space", args.space)):
        if (road in args.roads) != bool(value):
            parser.error(f"the road {road} and {option} go together")
    if args.by_hand and len(args.by_hand) != len(args.budget):
        parser.error(f"--by-hand takes a text for each --budget: {len(args.budget)}, not {len(args.by_hand)}")
    args.asked = parse(SearchOptions, args.options)
    for name in (*OURS, *UNEQUAL):
        if getattr(args.asked, name) != getattr(SearchOptions(), name):
            parser.error(f"--{name.replace('_', '-')} is not among the options of all roads, which are to start alike")
    return args


def full_model(args: argparse.Namespace, seed: int) -> str:
    """Name or folder."""
    name = args.model.replace("{seed}", str(seed))
    return f"local-dir:{name}" if Path(name).is_dir() else name


def shrinking(args: argparse.Namespace, road: str, budget: str, seed: int) -> list[str]:
    """Options of search.py."""
    how = [*args.options, "--model", full_model(args, seed), "--budget", budget, "--search", road, "--epochs", "0"]
    if road == "random":
        how += ["--population", "1", "--iterations", "1"]
    masks = args.epochs // 2 if road == "slim-masks" else 0
    if masks:
        how += ["--mask-epochs", str(masks)]
    return [*how, "--finetune-epochs", str(args.epochs - masks)]


def training_of(model: str) -> tuple[Path, TrainOptions]:
    """The run of train.py that made a model: its config.yaml, and what that says.

    Raises:
        RunError: It is not the best/ folder of a run, or of one that started from trained weights.
    """
    config = Path(model.removeprefix("local-dir:")).parent / "config.yaml"
    if not config.is_file():
        raise RunError(f"by-hand and space train as the full model was trained, but there is no {config}")
    options = parse(TrainOptions, ["--config", str(config)])
    if options.pretrained or options.pretrained_path is not None:
        raise RunError(
            f"by-hand and space start from nothing; the full model started from trained weights, as {config} says, and "
            f"saw more images than they would"
        )
    return config, options


def by_hand(args: argparse.Namespace, budget: str, trained: TrainOptions) -> list[str]:
    """Arguments of the small model, NAME=VALUE."""
    texts = re.split(r"\s+(?=\w+=)", args.by_hand[args.budget.index(budget)].strip())  # values may have spaces
    own = parse_kwargs("--by-hand", texts)
    return [f"{k}={v}" for k, v in {**parse_kwargs("--model-kwargs", trained.model_kwargs), **own}.items()]


def training_supernet(args: argparse.Namespace, trained: TrainOptions) -> list[str]:
    """Options of supernet.py."""
    epochs = (trained.epochs + args.epochs) // 2
    return [*shlex.split(args.space_options), "--space", args.space, "--epochs", str(epochs)]


def check(args: argparse.Namespace) -> None:
    """What can be known before the work.

    Raises:
        RunError: What is wrong, of any road, budget or seed.
    """
    for seed in args.seeds:
        full = full_model(args, seed)
        model_source(full)
        for road in args.roads:
            for budget in args.budget:
                Budget.parse(budget, share_of=dict.fromkeys(("macs", "params", "memory", "latency_ms"), 10**12))
                if road in SHRINKING:
                    check_options(parse(SearchOptions, shrinking(args, road, budget, seed)))
                    continue
                _, trained = training_of(full)
                if road == "by-hand":
                    kwargs = parse_kwargs("--by-hand", by_hand(args, budget, trained))
                    open_model(trained.model, img_size=image_pair(trained.img_size), kwargs=kwargs)
                else:
                    own = parse(SupernetOptions, training_supernet(args, trained))
                    check_step(own)
                    check_space(own, open_space(args.space))


def travel(args: argparse.Namespace, budget: str, road: str, seed: int) -> End:
    """Runs of a road, made or continued where need be.

    Raises:
        RunError: A recipe failed, or what it wrote is damaged.
    """
    full, name = full_model(args, seed), f"{road}-{budget}-{seed}"

    def run(recipe: str, name: str, *options: str) -> Path:
        common = ("--dataset", args.dataset, "--seed", str(seed), "--output", str(args.output), "--name", name)
        if subprocess.run([sys.executable, str(RECIPES / recipe), *options, *common], stdout=sys.stderr).returncode:
            raise RunError(f"the run {args.output / name} failed, see above; the same command continues")
        return args.output / name

    if road in SHRINKING:
        folder = run("search.py", name, *shrinking(args, road, budget, seed))
        found = read_json(folder / "results.json")
        test = {row: r["test"] / found["images"]["test"] for row, r in found["networks"].items()}
        before = "found, by masks" if road == "slim-masks" else "found, repaired"
        return End(folder / "best", test["found, fine-tuned"], test[before], test["full model"])
    config, trained = training_of(full)
    epochs, how = trained.epochs + args.epochs, ["--model-kwargs"]
    if road == "by-hand":
        how += by_hand(args, budget, trained)
    else:
        model = open_full(args, seed)
        costs = {"macs": macs_of(model), "params": sum(p.numel() for p in model.parameters())}
        limits = Budget.parse(budget, share_of=costs)
        supernet = run("supernet.py", f"supernet-{seed}", *training_supernet(args, trained))
        found = f"local-dir:{run('search.py', f'{name}-search', *searching(supernet, limits)) / 'best'}"
        size = open_model(found).pretrained_cfg["input_size"][1:]
        how += ["--model", found, "--pretrained", "--img-size", *map(str, size)]
        epochs -= epochs // 2
    folder = run("train.py", name, "--config", str(config), "--epochs", str(epochs), *how)
    return End(folder / "best", read_json(folder / "results.json")["test"]["best"]["top1"])


def searching(supernet: Path, limits: Budget) -> list[str]:
    """Options of search.py on a trained supernet, with the data and the processor as for its training."""
    trained, default = parse(SupernetOptions, ["--config", str(supernet / "config.yaml")]), SupernetOptions()
    names = [field.name for field in dataclasses.fields(DataOptions) if field.name != "dataset"]
    how = ["--supernet", str(supernet / "supernet"), *(["--cpu"] if trained.cpu else [])]
    for name in (*names, "val_per_class", "val_fraction", "threads", "amp"):
        if getattr(trained, name) != getattr(default, name):
            how += [f"--{name.replace('_', '-')}", str(getattr(trained, name))]
    return [*how, "--budget", ",".join([*(f"{k}={v}" for k, v in limits), f"lower={limits.lower}"])]


def open_full(args: argparse.Namespace, seed: int) -> nn.Module:
    """The full model at the image size that it is cut at."""
    return open_model(full_model(args, seed), pretrained=True, img_size=image_pair(args.asked.img_size))


def macs_of(model: nn.Module) -> int:
    """At the image size that it is built for."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    return count_macs(model, (model.pretrained_cfg["input_size"][0], *size))


def table(args: argparse.Namespace, ends: dict[tuple[str, str], list[End]]) -> str:
    """MACs are means over the seeds, speeds those of the first seed's networks, batch 1."""
    models = {
        seed: {"full": open_full(args, seed)}
        | {at: open_model(f"local-dir:{each[i].best}", pretrained=True) for at, each in ends.items()}
        for i, seed in enumerate(args.seeds)
    }
    times = measure_together(models[args.seeds[0]], Conditions.here(batch_size=1, device="cpu"))
    lines = ["| road | MACs | speed | not trained | in the end, each seed | full model |", "|---|---|---|---|---|---|"]
    for at, each in ends.items():
        macs = statistics.mean(macs_of(m[at]) / macs_of(m["full"]) for m in models.values())
        before, full = (
            "" if getattr(each[0], name) is None else f"{statistics.mean(getattr(e, name) for e in each):.4f}"
            for name in ("before", "full")
        )
        test = f"{statistics.mean(e.test for e in each):.4f} ({', '.join(f'{e.test:.4f}' for e in each)})"
        lines.append(f"| {at[1]} | {macs:.1%} | {times[at]['speedup']:.2f}x | {before} | {test} | {full} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with cli_errors("benchmark_roads.py"):
        check(args)
        ends: dict[tuple[str, str], list[End]] = {(b, road): [] for b in args.budget for road in args.roads}
        for seed in args.seeds:
            for (budget, road), each in ends.items():
                each.append(travel(args, budget, road, seed))
        print(table(args, ends))


if __name__ == "__main__":
    main()
