"""Measuring a latency table, and how well it predicts whole networks."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..arch import Arch
from ..hub import load
from ..nas.cost import format_cost
from ..nas.jsonl import append_jsonl, read_jsonl
from ..nas.latency import LatencyTable, fit_line, open_timer, spread_networks
from ..nas.onnx_timer import OnnxTimer
from ..nas.space import SearchSpace
from ..nas.supernet import Supernet
from ..nas.timing import Conditions, LatencyTimer, run_rounds, summary
from .correlation import spearman
from .data import image_pair
from .plots import save
from .run import Progress, RunError, format_minutes
from .settings import LatencyOptions
from .supernet import open_space

__all__ = ["measure_table"]

BUSY = 0.05  # share of the time that other programs may take before it is said

Jobs = dict[str, tuple[Arch, bool]]


def latency_space(options: LatencyOptions) -> SearchSpace:
    """The space whose networks are measured, with the model arguments that they are deployed with."""
    if options.supernet is not None:
        net = load(options.supernet)
        if not isinstance(net, Supernet):
            raise RunError(f"--supernet {options.supernet} is a {type(net).__name__}; expected a supernet")
        space = net.space
    else:
        space = open_space(options.space)
    names = ("img_size", "in_chans", "num_classes")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "img_size" in given:
        given["img_size"] = image_pair(options.img_size)
    return space.at(**given) if given else space


class Records:
    """Measurements in a file, of one space under one set of conditions; what a broken run measured is kept."""

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

    def measure(self, timer: LatencyTimer | OnnxTimer, jobs: Jobs, rounds: int, what: str) -> None:
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
                    print(f"{what}: {done}, {format_minutes(now - begin)}, ends in {format_minutes(left)}", flush=True)

    def totals(self, jobs: Jobs) -> list[dict[str, float]]:
        """Fastest, median and spread of each network that was measured from end to end."""
        return [summary([r["ms"] for r in self.list if r["job"] == name]) for name in jobs]


def compare(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Relative errors, and Spearman's rank correlation."""
    error = np.abs(predicted / measured - 1)
    return {
        "median_error": float(np.median(error)),
        "max_error": float(error.max()),
        "rank_correlation": spearman(predicted, measured) if len(error) > 1 else 1.0,
    }


def verify(table: LatencyTable, space: SearchSpace, jobs: Jobs, again: Jobs, records: Records) -> dict[str, Any]:
    """Predicted against measured latency of networks that the table has not seen, and what MACs alone predict."""
    archs = [arch for arch, _ in jobs.values()]
    measured = records.totals(jobs)
    ms = np.array([m["ms"] for m in measured])
    macs = np.array([space.costs(a)["macs"] for a in archs])
    # what it is compared with is fitted on the same networks as the table's own line
    known = table.notes["calibration"]
    known_macs = [space.costs(Arch.from_record(n))["macs"] for n in known]
    known_ms = [n["ms"] for n in known]
    guesses = {"table": np.array([table.predict(a, **space.model_args) for a in archs])}
    for name, through_zero in (("proportional to MACs", True), ("linear in MACs", False)):
        start, slope = fit_line(known_macs, known_ms, through_zero)
        guesses[name] = start + slope * macs
    busy = float(np.mean([r["contention"] for r in records.list if r["job"] in jobs]))
    drift = float(np.median([m["ms"] / n["ms"] for m, n in zip(records.totals(again), known, strict=True)]))
    guesses["table, drift taken out"] = guesses["table"] * drift
    return {
        "drift": drift,
        "contention": round(busy, 4),
        "results": {name: compare(guess, ms) for name, guess in guesses.items()},
        "networks": [
            {**a.record(), "macs": int(c), "predicted_ms": float(p), **m}
            for a, c, p, m in zip(archs, macs, guesses["table"], measured, strict=True)
        ],
    }


def report(table: LatencyTable, space: SearchSpace) -> str:
    """The table in words, and how well it predicts."""
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
    if (busy := max(found["contention"], table.notes["contention"])) > BUSY:
        lines += ["", f"note: other programs took {busy:.0%} of the time; measure again when the machine is idle"]
    return "\n".join(lines)


def draw(path: Path, table: LatencyTable, title: str) -> None:
    """Predicted against measured: the fastest round, and the median one."""
    found = table.notes["verification"]
    x, y, middle = (np.array([n[k] for n in found["networks"]]) for k in ("predicted_ms", "ms", "median_ms"))
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    ends = np.array([min(x.min(), y.min()) * 0.9, max(x.max(), middle.max()) * 1.05])
    axes.plot(ends, ends, color="#52606d", linewidth=1)
    axes.fill_between(ends, 0.9 * ends, 1.1 * ends, color="#9aa5b1", alpha=0.25, linewidth=0, label="± 10 %")
    axes.vlines(x, y, middle, linewidth=1, color="#9aa5b1", label="to the median of the rounds")
    axes.plot(x, y, "o", markersize=4, color="#3e7cb1", label="random networks, fastest round")
    axes.set(xlim=ends, ylim=ends, xlabel="predicted latency, ms", ylabel="measured latency, ms")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False)
    save(figure, path)


def measure_table(options: LatencyOptions) -> LatencyTable:
    """Measure a table, compare it with whole networks, and write it.

    Raises:
        RunError: The space or the output cannot be used, or the records are of other options.
    """
    space = latency_space(options)
    conditions = Conditions.here(
        device=options.device,
        num_threads=options.threads or torch.get_num_threads(),
        batch_size=options.batch_size,
        precision=options.precision,
        runtime=options.runtime,
    )
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_dir():
        raise RunError(f"--output {output} is a folder; expected the name of a file, such as {output / 'latency.json'}")
    jobs = LatencyTable.jobs(space, options.calibration, options.seed)
    if not any(name.startswith("calibration") for name in jobs):
        raise RunError("the space has no two networks of different MACs; there is nothing to choose by latency")
    setup = {
        "conditions": vars(conditions),
        "space": space.to_dict(),
        **{k: getattr(options, k) for k in ("rounds", "min_run_time", "calibration", "seed")},
    }
    records = Records(output.with_suffix(".records.jsonl"), setup)
    begin = time.monotonic()
    print(f"{conditions}, torch {conditions.torch}; {space.size():.3g} networks")
    graphs = output.with_suffix(".graphs")
    timer = open_timer(space, conditions, options.min_run_time, graphs)
    records.measure(timer, jobs, options.rounds, "table")
    table = LatencyTable.from_records(space, conditions, jobs, records.list)
    new: list[Arch] = []
    if options.verify:
        seen = [arch for arch, _ in jobs.values()]
        new = spread_networks(space, options.verify, options.seed + 1, avoid=seen)
        if not new:
            print("note: every network of the space was measured for the table; none is left to verify it by")
    if new:
        verified = {f"verification {i} of {options.verify}": (arch, False) for i, arch in enumerate(new)}
        again = {f"{k}, again": job for k, job in jobs.items() if k.startswith("calibration")}
        records.measure(timer, verified | again, options.rounds, "verification")
        table.notes["verification"] = verify(table, space, verified, again, records)
    table.save(output)
    if isinstance(timer, OnnxTimer):
        shutil.rmtree(graphs, ignore_errors=True)
    print(f"\n{table}; measured in {format_minutes(time.monotonic() - begin)}")
    if new:
        print(report(table, space))
        draw(output.with_suffix(".png"), table, str(conditions))
    print(f"\ntable: {output}; for a search: --latency-table {output} --budget latency=40%")
    return table
