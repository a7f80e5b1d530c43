"""Measure a latency table on this device, and how well it predicts whole networks.

    python recipes/latency.py --space micro --batch-size 32 --threads 1 --output latency.json
    python recipes/latency.py --space vit_resnas_tiny --device cuda --batch-size 64 --precision amp --output h200.json
    python recipes/latency.py --supernet runs/digits-micro/supernet --batch-size 1 --threads 2 --output latency.json
    accelerate launch recipes/search.py --latency-table latency.json --budget latency=40%

A table is for one device, number of threads, batch size, image size and precision, and for the networks of one space,
as a user deploys them: the plain timm network in eval and inference mode. The first line takes some minutes. Let the
machine do nothing else meanwhile: what is read is the wall clock, and a note says so where other programs took much.

How it is measured (see `timm_resnas.nas.latency`): some tens of networks that together hold every piece of the space
run from end to end with a time stamp between the pieces, taking turns in `--rounds` rounds; the fastest repeat of all
rounds counts, their median and spread are kept beside it. A line through the sums, fitted on `--calibration` random
networks, makes them the latency of a whole network.

Then `--verify` other random networks, spread evenly over the space's range of MACs, are measured from end to end, in
rounds of their own, and compared with the prediction: median and largest error, rank correlation, beside what MACs
alone predict. The machine's speed may have changed since the table was measured; by how much is told from the
calibration networks, which are measured again.

Files: FILE, the table (readable, with the comparison in its notes); FILE's name with .png, predicted against measured;
with .records.jsonl every measurement. Started again with the same command, it goes on where it was; remove the records
to measure anew.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from common import HelpFormatter, Progress, RunError, format_minutes, main_guard, parse

from timm_resnas import Arch
from timm_resnas.nas.cost import format_cost
from timm_resnas.nas.jsonl import append_jsonl, read_jsonl
from timm_resnas.nas.latency import (
    LatencyTable,
    fit_line,
    spread_networks,
)
from timm_resnas.nas.space import SearchSpace
from timm_resnas.nas.timing import PRECISIONS, Conditions, LatencyTimer, run_rounds, summary

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BUSY = 0.05  # share of the time that other programs may take before it is said

Jobs = dict[str, tuple[Arch, bool]]


def get_space(args: argparse.Namespace) -> SearchSpace:
    """The space whose networks are measured, with the model arguments that they are deployed with."""
    if args.supernet is not None:
        from timm_resnas.hub import load

        net = load(args.supernet)
        if not hasattr(net, "space"):
            raise RunError(f"--supernet {args.supernet} is a {type(net).__name__}; expected a supernet")
        space = net.space
    else:
        named = args.space if not args.space.endswith(".json") else json.loads(Path(args.space).read_text())
        space = SearchSpace.create(named)
    names = ("img_size", "in_chans", "num_classes")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "img_size" in given:
        size = given["img_size"]
        if len(size) > 2:
            raise RunError(f"--img-size takes one side, or height and width; got {size}")
        given["img_size"] = size[0] if len(size) == 1 else size
    return space.at(**given) if given else space


class Records:
    """Measurements in a file, of one setting and space; what a broken run measured is kept."""

    def __init__(self, path: Path, setup: dict[str, Any]) -> None:
        self.path = path
        found = read_jsonl(path, mend=True)
        setup = json.loads(json.dumps(setup))
        if found and found[0] != setup:
            old = found[0]
            wrong = ", ".join(f"{k} {old.get(k)!r:.120} (now {v!r:.120})" for k, v in setup.items() if old.get(k) != v)
            raise RunError(f"{path} is of other options: {wrong}. Remove it, or give another --output")
        if not found:
            append_jsonl(path, [setup])
        self.list = found[1:]

    def measure(self, timer: LatencyTimer, jobs: Jobs, rounds: int, what: str) -> None:
        """All jobs in interleaved rounds; each measurement is written at once."""
        total, begin, fresh = rounds * len(jobs), time.monotonic(), 0
        names = set(jobs)
        there = sum(r["job"] in names for r in self.list)
        print(f"{what}: {len(jobs)} networks in {rounds} rounds" + (f", {there} of {total} measured" * (there > 0)))
        last = begin
        with Progress(total, what) as update:
            for record in run_rounds(timer, jobs, rounds, self.list):
                append_jsonl(self.path, [record])
                self.list.append(record)
                fresh += 1
                update(there + fresh)
                now = time.monotonic()
                if now - last >= 15:
                    last = now
                    left = (now - begin) / fresh * (total - there - fresh)
                    done = f"{there + fresh} of {total}"
                    print(f"{what}: {done}, {format_minutes(now - begin)}, left {format_minutes(left)}", flush=True)

    def totals(self, jobs: Jobs) -> list[dict[str, float]]:
        """Fastest, median and spread of each network that was measured from end to end."""
        return [summary([r["ms"] for r in self.list if r["job"] == name]) for name in jobs]


def compare(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Relative errors, and Spearman's rank correlation."""
    error = np.abs(predicted / measured - 1)
    return {
        "median_error": float(np.median(error)),
        "max_error": float(error.max()),
        "rank_correlation": float(np.corrcoef(ranks(predicted), ranks(measured))[0, 1]) if len(error) > 1 else 1.0,
    }


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value; equal ones share their mean rank."""
    return np.array([(np.sum(values < v) + np.sum(values <= v) - 1) / 2 for v in values])


def verify(table: LatencyTable, space: SearchSpace, jobs: Jobs, again: Jobs, records: Records) -> dict[str, Any]:
    """Predicted against measured latency of networks that the table has not seen, and what MACs alone predict."""
    archs = [arch for arch, _ in jobs.values()]
    measured = records.totals(jobs)
    ms = np.array([m["ms"] for m in measured])
    macs = np.array([space.costs(a)["macs"] for a in archs])
    # the yardsticks are fitted on the same networks as the table's own line
    known = table.notes["calibration"]
    known_macs = [space.costs(Arch.from_record(n))["macs"] for n in known]
    known_ms = [n["ms"] for n in known]
    guesses = {"table": np.array([table.predict(a, **space.model_args) for a in archs])}
    for name, through_zero in (("proportional to MACs", True), ("linear in MACs", False)):
        start, slope = fit_line(known_macs, known_ms, through_zero)
        guesses[name] = start + slope * macs
    waited = float(np.mean([r["contention"] for r in records.list if r["job"] in jobs]))
    drift = float(np.median([m["ms"] / n["ms"] for m, n in zip(records.totals(again), known, strict=True)]))
    guesses["table, drift taken out"] = guesses["table"] * drift
    return {
        "drift": drift,
        "contention": round(waited, 4),
        "results": {name: compare(guess, ms) for name, guess in guesses.items()},
        "networks": [
            {**a.record(), "macs": int(c), "predicted_ms": float(p), **m}
            for a, c, p, m in zip(archs, macs, guesses["table"], measured, strict=True)
        ],
    }


def report(table: LatencyTable, space: SearchSpace) -> str:
    found = table.notes["verification"]
    whole = [n["iqr"] / n["ms"] for n in found["networks"]]
    parts = [p["iqr"] / p["ms"] for p in table.layers.values()]
    least, most, overhead = (
        format_cost("latency_ms", v)
        for v in (
            table.predict(space.smallest, **space.model_args),
            table.predict(space.largest, **space.model_args),
            table.overhead_ms,
        )
    )
    lines = [
        f"{len(table.layers)} layers; a network takes {overhead} + {table.scale:.4f} x the sum of its layers",
        f"smallest network {least}, largest {most}",
        f"spread over rounds (interquartile range, median): {np.median(parts):.1%} of a layer, {np.median(whole):.1%} "
        f"of a network; networks took {found['drift']:.3f}x as long as when the table was measured",
        "",
        f"predicted against measured, {len(found['networks'])} networks spread over the range of MACs:",
        "| prediction | median error | largest | rank correlation |",
        "|---|---|---|---|",
    ]
    for name, r in found["results"].items():
        lines.append(f"| {name} | {r['median_error']:.1%} | {r['max_error']:.1%} | {r['rank_correlation']:.4f} |")
    if (waited := max(found["contention"], table.notes["contention"])) > BUSY:
        lines += ["", f"note: other programs took {waited:.0%} of the time; measure again when the machine is idle"]
    return "\n".join(lines)


def draw(path: Path, table: LatencyTable, title: str) -> None:
    """Predicted against measured: the fastest round, and the median one."""
    found = table.notes["verification"]
    x, y, middle = (np.array([n[k] for n in found["networks"]]) for k in ("predicted_ms", "ms", "median_ms"))
    figure, axes = plt.subplots(figsize=(5.5, 5), layout="constrained")
    ends = np.array([min(x.min(), y.min()) * 0.9, max(x.max(), middle.max()) * 1.05])
    axes.plot(ends, ends, color="#52606d", linewidth=1)
    axes.fill_between(ends, 0.9 * ends, 1.1 * ends, color="#9aa5b1", alpha=0.25, linewidth=0, label="± 10 %")
    axes.vlines(x, y, middle, linewidth=1, color="#9aa5b1", label="to the median of the rounds")
    axes.plot(x, y, "o", markersize=4, color="#3e7cb1", label="random networks, fastest round")
    axes.set(xlim=ends, ylim=ends, xlabel="predicted latency, ms", ylabel="measured latency, ms")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False)
    fresh = path.with_name(f".{path.name}.new.png")
    figure.savefig(fresh, dpi=150)
    fresh.replace(path)
    plt.close(figure)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config", metavar="FILE.yaml", help="defaults for any option below; flags override them")
    parser.add_argument("--output", default="latency.json", metavar="FILE", help="the table")
    group = parser.add_argument_group("what is measured")
    group.add_argument("--space", default="micro", help="search space: a preset's name, or a .json file of one")
    group.add_argument("--supernet", metavar="WHERE", help="take the space of a supernet: its folder, or hf-hub:…")
    group.add_argument("--img-size", type=int, nargs="+", metavar="N", help="side, or height and width (space's own)")
    group.add_argument("--in-chans", type=int, metavar="N", help="channels of an image (default: the space's)")
    group.add_argument("--num-classes", type=int, metavar="N", help="classes (default: the space's)")
    group.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    group.add_argument("--threads", type=int, default=1, help="CPU threads, 0: torch's default")
    group.add_argument("--batch-size", type=int, default=32, help="images per forward")
    group.add_argument("--precision", choices=list(PRECISIONS), default="float32", help="of weights, or autocast (amp)")
    group = parser.add_argument_group("how")
    group.add_argument("--rounds", type=int, default=10, help="times that each network is measured")
    group.add_argument("--min-run-time", type=float, default=0.1, help="seconds of each, but at least three repeats")
    group.add_argument("--calibration", type=int, default=8, help="networks that the table's line is fitted on")
    group.add_argument("--verify", type=int, default=30, help="networks to compare with the prediction; 0: none")
    group.add_argument("--seed", type=int, default=0, help="decides the random networks")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parse(make_parser(), argv)
    with main_guard("latency.py"):
        for name, least in (("rounds", 1), ("calibration", 1), ("verify", 0), ("threads", 0)):
            if getattr(args, name) < least:
                raise RunError(f"--{name} must be at least {least}, got {getattr(args, name)}")
        space = get_space(args)
        setting = Conditions.here(
            device=args.device,
            num_threads=args.threads or torch.get_num_threads(),
            batch_size=args.batch_size,
            precision=args.precision,
        )
        output = Path(args.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        jobs = LatencyTable.jobs(space, args.calibration, args.seed)
        if not any(name.startswith("calibration") for name in jobs):
            raise RunError("the space has no two networks of different MACs; there is nothing to choose by latency")
        setup = {
            "conditions": vars(setting),
            "space": space.to_dict(),
            **{k: getattr(args, k) for k in ("rounds", "min_run_time", "calibration", "seed")},
        }
        records = Records(output.with_suffix(".records.jsonl"), setup)
        begin = time.monotonic()
        print(f"{setting}, torch {setting.torch}; {space.size():.3g} networks")
        timer = LatencyTimer(space, setting, args.min_run_time)
        records.measure(timer, jobs, args.rounds, "table")
        table = LatencyTable.from_records(space, setting, jobs, records.list)
        if args.verify:
            seen = [arch for arch, _ in jobs.values()]
            new = spread_networks(space, args.verify, args.seed + 1, avoid=seen)
            verified = {f"verification {i} of {args.verify}": (arch, False) for i, arch in enumerate(new)}
            again = {f"{k}, again": job for k, job in jobs.items() if k.startswith("calibration")}
            records.measure(timer, verified | again, args.rounds, "verification")
            table.notes["verification"] = verify(table, space, verified, again, records)
        table.save(output)
        print(f"\n{table}; measured in {format_minutes(time.monotonic() - begin)}")
        if args.verify:
            print(report(table, space))
            draw(output.with_suffix(".png"), table, str(setting))
        print(f"\ntable: {output}; for a search: --latency-table {output} --budget latency=40%")


if __name__ == "__main__":
    main()
