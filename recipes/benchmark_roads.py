"""Which way to a small vision transformer ends best: roads to one budget, with as many image passes for each.

    python recipes/train.py --model vit_tiny_patch16_224 … --seed 0 --name base-0     # and so on for each seed
    python recipes/benchmark_roads.py --model runs/base-{seed}/best --dataset fashion-mnist:data --budget macs=40% \
        --epochs 10 --seeds 0 1 2 -- --lr 1e-3 --batch-size 64 --threads 1

For each seed `search.py --model` is run once for each road, without training the full model further: `evolution` from a
knapsack, `slimming`, `slim-masks` (half of the epochs train masks, half the network that they leave), `uniform` (of
every block the same share) and `random` (one random network of the budget), all fine-tuned alike, taught by the full
model. What follows `--` are further options of search.py. `{seed}` in `--model` stands for the seed.

Two more roads start from nothing, and train for the full model's epochs and `--epochs` together:

    … --roads evolution by-hand space --by-hand embed_dim=40 --space recipes/configs/vit_resnas_nano.json \
        --space-options "--batch-size 128 --threads 1" …

`by-hand` is the full model with the arguments of `--by-hand`, trained as the full model was. `space` is the best of a
supernet of `--space` (search.py, `--space-options`, half of the epochs), trained on as the full model was (the other
half). For these `--model` must be the best/ folder of a run of train.py.

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
from typing import Any, NamedTuple

from torch import nn

from timm_resnas.engine.models import open_model, parse_kwargs
from timm_resnas.engine.options import parse
from timm_resnas.engine.run import RunError, cli_errors, read_json
from timm_resnas.engine.settings import TrainOptions
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
    parser.add_argument("--budget", default="macs=50%", help="as for search.py, shares of the full model")
    parser.add_argument("--epochs", type=int, default=8, help="of each road in all, after those of the full model")
    parser.add_argument("--roads", nargs="+", choices=ROADS, default=list(SHRINKING))
    parser.add_argument("--by-hand", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the model")
    parser.add_argument("--space", help="as for search.py")
    parser.add_argument("--space-options", default="", metavar="OPTIONS", help="of search.py with --space, in one text")
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


def travel(args: argparse.Namespace, road: str, seed: int) -> End:
    """Runs of a road, made or continued where need be.

    Raises:
        RunError: A recipe failed, or what it wrote is damaged.
    """
    full, name = full_model(args, seed), f"{road}-{seed}"

    def run(recipe: str, name: str, *options: str) -> dict[str, Any]:
        common = ("--dataset", args.dataset, "--seed", str(seed), "--output", str(args.output), "--name", name)
        if subprocess.run([sys.executable, str(RECIPES / recipe), *common, *options], stdout=sys.stderr).returncode:
            raise RunError(f"the run {args.output / name} failed, see above; the same command continues")
        return read_json(args.output / name / "results.json")

    best = args.output / name / "best"
    if road in SHRINKING:
        how = ["--search", road, "--epochs", "0", "--finetune-epochs", str(args.epochs)]
        if road == "random":
            how += ["--population", "1", "--iterations", "1"]
        elif road == "slim-masks":
            how[-1] = str(args.epochs - args.epochs // 2)
            how += ["--mask-epochs", str(args.epochs // 2)]
        found = run("search.py", name, "--model", full, "--budget", args.budget, *how, *args.options)
        test = {row: r["test"] / found["images"]["test"] for row, r in found["networks"].items()}
        before = "found, by masks" if road == "slim-masks" else "found, repaired"
        return End(best, test["found, fine-tuned"], test[before], test["full model"])
    config, trained = training_of(full)
    epochs, how = trained.epochs + args.epochs, ["--model-kwargs"]
    if road == "by-hand":
        kwargs = parse_kwargs("--model-kwargs", trained.model_kwargs) | parse_kwargs("--by-hand", args.by_hand)
        how += [f"{k}={v}" for k, v in kwargs.items()]
    else:
        model = open_model(full, pretrained=True)
        costs = {"macs": macs_of(model), "params": sum(p.numel() for p in model.parameters())}
        limits = Budget.parse(args.budget, share_of=costs)
        budget = ",".join([*(f"{k}={v}" for k, v in limits), f"lower={limits.lower}"])
        options = ["--space", args.space, "--budget", budget, "--epochs", str(epochs // 2)]
        run("search.py", f"{name}-search", *options, *shlex.split(args.space_options))
        how += ["--model", f"local-dir:{args.output / f'{name}-search' / 'best'}", "--pretrained"]
        epochs -= epochs // 2
    found = run("train.py", name, "--config", str(config), "--epochs", str(epochs), *how)
    return End(best, found["test"]["best"]["top1"])


def table(args: argparse.Namespace, roads: dict[str, list[End]]) -> str:
    """MACs are means over the seeds, speeds those of the first seed's networks, batch 1."""
    models = {
        seed: {"full": open_model(full_model(args, seed), pretrained=True)}
        | {road: open_model(f"local-dir:{ends[i].best}", pretrained=True) for road, ends in roads.items()}
        for i, seed in enumerate(args.seeds)
    }
    times = measure_together(models[args.seeds[0]], Conditions.here(batch_size=1, device="cpu"))
    lines = ["| road | MACs | speed | not trained | in the end, each seed | full model |", "|---|---|---|---|---|---|"]
    for road, ends in roads.items():
        macs = statistics.mean(macs_of(m[road]) / macs_of(m["full"]) for m in models.values())
        before, full = (
            "" if getattr(ends[0], name) is None else f"{statistics.mean(getattr(e, name) for e in ends):.4f}"
            for name in ("before", "full")
        )
        test = f"{statistics.mean(e.test for e in ends):.4f} ({', '.join(f'{e.test:.4f}' for e in ends)})"
        lines.append(f"| {road} | {macs:.1%} | {times[road]['speedup']:.2f}x | {before} | {test} | {full} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with cli_errors("benchmark_roads.py"):
        if {"by-hand", "space"} & set(args.roads):
            for seed in args.seeds:  # before the work
                training_of(full_model(args, seed))
        print(table(args, {road: [travel(args, road, seed) for seed in args.seeds] for road in args.roads}))


if __name__ == "__main__":
    main()
