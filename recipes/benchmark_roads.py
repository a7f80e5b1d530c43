"""Which way of shrinking a trained vision transformer ends best: roads to one budget, with as many epochs for each.

    python recipes/train.py --model vit_tiny_patch16_224 … --seed 0 --name base-0     # and so on for each seed
    python recipes/benchmark_roads.py --model runs/base-{seed}/best --dataset fashion-mnist:data --budget macs=40% \
        --epochs 10 --seeds 0 1 2 -- --lr 1e-3 --batch-size 64 --threads 1

For each seed `search.py --model` is run once for each road, without training the full model further: `evolution` from a
knapsack, `slimming`, `slim-masks` (half of the epochs train masks, half the network that they leave), `uniform` (of
every block the same share) and `random` (one random network of the budget), all fine-tuned alike, taught by the full
model. What follows `--` are further options of search.py. `{seed}` in `--model` stands for the seed.

Runs are kept in `--output`, and continued or read when the same command is given again. Test images were looked at once
in each, for its last table.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from timm_resnas.engine.run import RunError, cli_errors, read_json

SEARCH = Path(__file__).parent / "search.py"
ROADS = ("evolution", "slimming", "slim-masks", "uniform", "random")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a timm name, a folder or hf-hub:<id>, with weights")
    parser.add_argument("--dataset", required=True, help="as for search.py")
    parser.add_argument("--budget", default="macs=50%", help="as for search.py")
    parser.add_argument("--epochs", type=int, default=8, help="of each road in all")
    parser.add_argument("--roads", nargs="+", choices=ROADS, default=list(ROADS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/roads"), help="where runs are kept")
    parser.add_argument("options", nargs="*", help="of search.py, after --")
    args = parser.parse_args(argv)
    for option in ("--elastic-epochs", "--keep-ratios"):  # before some roads are gone, and others refuse
        if any(given.partition("=")[0] == option for given in args.options):
            parser.error(f"{option} is not for all roads, which are to start alike")
    if args.epochs < 2:
        parser.error("--epochs must be at least 2, so that masks and the network that they leave are both trained")
    return args


def options_of(road: str, epochs: int) -> list[str]:
    """Of search.py."""
    if road == "slim-masks":
        half = epochs // 2
        return ["--search", road, "--mask-epochs", f"{half}", "--finetune-epochs", f"{epochs - half}"]
    one = ["--population", "1", "--iterations", "1"] if road == "random" else []
    return ["--search", road, *one, "--finetune-epochs", f"{epochs}"]


def travel(args: argparse.Namespace, road: str, seed: int) -> dict[str, Any]:
    """Results of a road's run, which is made or continued where need be.

    Raises:
        RunError: search.py failed, or what it wrote is damaged.
    """
    name = f"{road}-{seed}"
    model = args.model.replace("{seed}", str(seed))
    if Path(model).is_dir():
        model = f"local-dir:{model}"
    command = [
        *(sys.executable, str(SEARCH), "--model", model, "--dataset", args.dataset, "--budget", args.budget),
        *("--epochs", "0", "--seed", str(seed), "--output", str(args.output), "--name", name),
        *options_of(road, args.epochs),
        *args.options,
    ]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise RunError(f"the run {args.output / name} failed, see above; the same command continues")
    return read_json(args.output / name / "results.json")


def row(road: str, runs: list[dict[str, Any]]) -> str:
    """A line of the table."""
    images = runs[0]["images"]["test"]
    networks = [run["networks"] for run in runs]
    cut = "found, by masks" if road == "slim-masks" else "found, repaired"
    share = statistics.mean(n["found, fine-tuned"]["macs"] / n["full model"]["macs"] for n in networks)
    speed = statistics.mean(n["found, fine-tuned"]["speedup"] for n in networks)
    found, before, full = (
        [n[name]["test"] / images for n in networks] for name in ("found, fine-tuned", cut, "full model")
    )
    return (
        f"| {road} | {share:.1%} | {speed:.2f}x | {statistics.mean(before):.4f} | {statistics.mean(found):.4f} "
        f"({', '.join(f'{x:.4f}' for x in found)}) | {statistics.mean(full):.4f} |"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with cli_errors("benchmark_roads.py"):
        lines = [
            "| road | MACs | speed | not trained | fine-tuned, each seed | full model |",
            "|---|---|---|---|---|---|",
        ]
        for road in args.roads:
            lines.append(row(road, [travel(args, road, seed) for seed in args.seeds]))
        print("\n".join(lines))


if __name__ == "__main__":
    main()
