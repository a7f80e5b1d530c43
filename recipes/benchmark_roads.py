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
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from torch import nn

from timm_resnas.engine.models import open_model, parse_kwargs
from timm_resnas.engine.options import parse
from timm_resnas.engine.run import RunError, cli_errors, read_json
from timm_resnas.engine.settings import SupernetOptions, TrainOptions
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.count import count_macs
from timm_resnas.nas.timing import Conditions, measure_together

RECIPES = Path(__file__).parent
SHRINKING = ("evolution", "slimming", "slim-masks", "uniform", "random")
ROADS = (*SHRINKING, "by-hand", "space")


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
    for option in ("--elastic-epochs", "--keep-ratios"):  # before some roads are gone, and others refuse
        if any(given.partition("=")[0] == option for given in args.options):
            parser.error(f"{option} is not for all roads, which are to start alike")
    if args.epochs < 2:
        parser.error("--epochs must be at least 2, so that masks and the network that they leave are both trained")
    for road, option, value in (("by-hand", "--by-hand", args.by_hand), ("space", "--space", args.space)):
        if (road in args.roads) != bool(value):
            parser.error(f"the road {road} and {option} go together")
    if args.by_hand and len(args.by_hand) != len(args.budget):
        parser.error(f"--by-hand takes a text for each --budget: {len(args.budget)}, not {len(args.by_hand)}")
    return args


def full_model(args: argparse.Namespace, seed: int) -> str:
    """Name or folder."""
    name = args.model.replace("{seed}", str(seed))
    return f"local-dir:{name}" if Path(name).is_dir() else name


def training_of(model: str) -> tuple[Path, TrainOptions]:
    """The run of train.py that made a model: its config.yaml, and what that says.

    Raises:
        RunError: It is not the best/ folder of a run.
    """
    config = Path(model.removeprefix("local-dir:")).parent / "config.yaml"
    if not config.is_file():
        raise RunError(f"by-hand and space train as the full model was trained, but there is no {config}")
    return config, parse(TrainOptions, ["--config", str(config)])


def macs_of(model: nn.Module) -> int:
    """At the image size that it is saved for."""
    return count_macs(model, model.pretrained_cfg["input_size"])


def travel(args: argparse.Namespace, budget: str, road: str, seed: int) -> End:
    """Runs of a road, made or continued where need be.

    Raises:
        RunError: A recipe failed, or what it wrote is damaged.
    """
    full, name = full_model(args, seed), f"{road}-{budget}-{seed}"

    def run(recipe: str, name: str, *options: str) -> Path:
        common = ("--dataset", args.dataset, "--seed", str(seed), "--output", str(args.output), "--name", name)
        if subprocess.run([sys.executable, str(RECIPES / recipe), *common, *options], stdout=sys.stderr).returncode:
            raise RunError(f"the run {args.output / name} failed, see above; the same command continues")
        return args.output / name

    if road in SHRINKING:
        how = ["--search", road, "--epochs", "0", "--finetune-epochs", str(args.epochs)]
        if road == "random":
            how += ["--population", "1", "--iterations", "1"]
        elif road == "slim-masks":
            how[-1] = str(args.epochs - args.epochs // 2)
            how += ["--mask-epochs", str(args.epochs // 2)]
        folder = run("search.py", name, "--model", full, "--budget", budget, *how, *args.options)
        found = read_json(folder / "results.json")
        test = {row: r["test"] / found["images"]["test"] for row, r in found["networks"].items()}
        before = "found, by masks" if road == "slim-masks" else "found, repaired"
        return End(folder / "best", test["found, fine-tuned"], test[before], test["full model"])
    config, trained = training_of(full)
    epochs, how = trained.epochs + args.epochs, ["--model-kwargs"]
    if road == "by-hand":
        own = parse_kwargs("--by-hand", args.by_hand[args.budget.index(budget)].split())
        how += [f"{k}={v}" for k, v in {**parse_kwargs("--model-kwargs", trained.model_kwargs), **own}.items()]
    else:
        model = open_model(full, pretrained=True)
        costs = {"macs": macs_of(model), "params": sum(p.numel() for p in model.parameters())}
        limits = Budget.parse(budget, share_of=costs)
        options = ["--space", args.space, "--epochs", str(epochs // 2), *shlex.split(args.space_options)]
        supernet = run("supernet.py", f"supernet-{seed}", *options)
        as_trained = parse(SupernetOptions, ["--config", str(supernet / "config.yaml")])
        options = ["--supernet", str(supernet / "supernet"), "--threads", str(as_trained.threads)]
        options += ["--val-per-class", str(as_trained.val_per_class), *(["--cpu"] if as_trained.cpu else [])]
        options += ["--budget", ",".join([*(f"{k}={v}" for k, v in limits), f"lower={limits.lower}"])]
        found = run("search.py", f"{name}-search", *options)
        how += ["--model", f"local-dir:{found / 'best'}", "--pretrained"]
        epochs -= epochs // 2
    folder = run("train.py", name, "--config", str(config), "--epochs", str(epochs), *how)
    return End(folder / "best", read_json(folder / "results.json")["test"]["best"]["top1"])


def table(args: argparse.Namespace, ends: dict[tuple[str, str], list[End]]) -> str:
    """MACs are means over the seeds, speeds those of the first seed's networks, batch 1."""
    models = {
        seed: {"full": open_model(full_model(args, seed), pretrained=True)}
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
        if {"by-hand", "space"} & set(args.roads):
            for seed in args.seeds:  # before the work
                training_of(full_model(args, seed))
        ends: dict[tuple[str, str], list[End]] = {(b, road): [] for b in args.budget for road in args.roads}
        for seed in args.seeds:
            for (budget, road), each in ends.items():
                each.append(travel(args, budget, road, seed))
        print(table(args, ends))


if __name__ == "__main__":
    main()
