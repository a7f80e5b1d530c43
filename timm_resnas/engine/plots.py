"""Pictures of a search and of a training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..arch import Arch
from ..nas.evolution import rank_key
from ..nas.space import SearchSpace
from .run import atomic_write

__all__ = ["accuracies", "draw_choices", "draw_pareto", "draw_progress", "draw_speed", "draw_training", "objectives"]

COLORS = {"initial": "#9aa5b1", "random": "#9aa5b1", "mutation": "#3e7cb1", "crossover": "#81a4cd", "action": "#9aa5b1"}
TOP = 25  # networks whose choices are shown, where the search has no parents
ACCENT = "#d1495b"
UNITS = {"macs": "MACs", "params": " parameters", "memory": "B of memory"}
STRONG = {"largest": "#2b2d42", "smallest": ACCENT, "raw": "#2b2d42", "ema": ACCENT}


def save(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all."""
    with atomic_write(path) as fresh:
        figure.savefig(fresh, dpi=130, format="png")


def accuracies(results: dict[str, Any], records: list[dict[str, Any]], split: str) -> np.ndarray:
    """Accuracies of records on the search's validation ("val") or the test images ("test"), [records]."""
    key, total = {"val": ("score", "val_images"), "test": ("test", "test_images")}[split]
    return np.array([r[key] for r in records]) / results[total]


def objectives(results: dict[str, Any]) -> list[str]:
    """The costs that the front sets against accuracy."""
    return results.get("objectives", ["macs"])  # once the front was always one of MACs


def _unit(cost: str, most: float) -> tuple[float, str]:
    """(divisor, label) of an axis that shows costs up to ``most``."""
    if cost == "latency_ms":
        return 1, "latency in ms"
    scale, prefix = next((s for s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if most >= s[0]), (1, ""))
    return scale, prefix + UNITS[cost]


def draw_training(path: Path, records: list[dict[str, Any]]) -> None:
    """Validation accuracy (the learning rate where there is none) and loss by epoch."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [r["epoch"] for r in records]
    if records[-1]["accuracy"]:
        _draw_accuracy(left, records)
        left.set_ylabel("validation accuracy")
    else:
        left.plot(epochs, [r["lr"] for r in records], color="#2b2d42", marker="o", markersize=3)
        left.set_ylabel("learning rate")
    right.plot(epochs, [r["loss"] for r in records], color="#3e7cb1", marker="o", markersize=3)
    right.set_ylabel("training loss")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    save(figure, path)


def _draw_accuracy(axes: Any, records: list[dict[str, Any]]) -> None:
    epochs = [r["epoch"] for r in records]
    for name in records[-1]["accuracy"]:
        axes.plot(
            epochs,
            [r["accuracy"].get(name, np.nan) for r in records],
            marker="o",
            markersize=3,
            linewidth=2 if name in STRONG else 1,
            color=STRONG.get(name, "#9aa5b1"),
            label={"raw": "weights", "ema": "averaged weights"}.get(name, name),
        )
    axes.legend(fontsize=8, loc="lower right")


def draw_pareto(path: Path, results: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Accuracy against cost (the front's first) of all candidates, the front or chain, and networks to compare with."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    cost, *others = objectives(results)
    scale, label = _unit(cost, results["largest"][cost])

    def points(records: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([r[cost] for r in records]) / scale, accuracies(results, records, "val")

    chain = {p["key"] for p in results["front"]} if results.get("search") == "slimming" else set()
    for origin in dict.fromkeys(r["origin"] for r in history if r["key"] not in chain):
        records = [r for r in history if r["origin"] == origin and r["key"] not in chain]
        label_of = "rejected" if chain else origin
        axes.scatter(*points(records), s=14, color=COLORS[origin], alpha=0.6, linewidths=0, label=label_of)
    if results["spread"]:
        axes.scatter(
            *points(results["spread"]), s=14, marker="D", color="#edae49", linewidths=0, label="random, any cost"
        )
    if results["random"]:
        axes.scatter(
            *points(results["random"]), s=22, facecolors="none", edgecolors="#444444", label="random, of the budget"
        )
    axes.scatter(*points([results["largest"]]), s=50, marker="s", color="#2b2d42", label="largest network")
    front = results["front"]
    if chain:
        axes.plot(*points(front), color=ACCENT, linewidth=1, marker="o", markersize=3, label="chain")
    elif others:  # the front has more dimensions than the picture
        axes.scatter(*points(front), s=30, facecolors="none", edgecolors=ACCENT, label="front")
    else:
        axes.plot(*points(front), color=ACCENT, linewidth=1, drawstyle="steps-post", label="front")
    axes.scatter(*points([results["best"]]), s=110, marker="*", color=ACCENT, zorder=5, label="best")
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy on the search's validation images")
    axes.set_title(f"{results['candidates']} candidates on {results['dataset']}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.9, loc="lower right")
    save(figure, path)


def draw_progress(
    path: Path, results: dict[str, Any], history: list[dict[str, Any]], training: list[dict[str, Any]]
) -> None:
    """Sub-networks while the supernet trained, and candidates by generation."""
    panels = 1 + bool(training)  # a search in a given supernet trains none
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    *first, right = np.atleast_1d(figure.subplots(1, panels))
    for left in first:
        _draw_accuracy(left, training)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set_xlabel("epoch")
        left.set_title("sub-networks while the supernet trains", fontsize=10)
        left.grid(alpha=0.25)
    (*first, right)[0].set_ylabel("accuracy on the search's validation images")

    last = max(r["generation"] for r in history)
    score = np.array([r["score"] for r in history]) / results["val_images"]
    generation = np.array([r["generation"] for r in history])
    groups = [score[generation == g] for g in range(last + 1)]
    right.boxplot(groups, positions=range(1, last + 2), widths=0.6, showfliers=False, medianprops={"color": "#3e7cb1"})
    right.plot(
        range(1, last + 2), np.maximum.accumulate([g.max() for g in groups]), color=ACCENT, marker="*", label="best"
    )
    right.set_xlabel("generation")
    right.set_title("candidates per generation", fontsize=10)
    right.grid(alpha=0.25)
    right.legend(fontsize=8, loc="lower right")
    save(figure, path)


def draw_speed(path: Path, report: dict[str, Any]) -> None:
    """Images per second against MACs, of each model in each form; a report of recipes/benchmark_models.py."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = report["rows"]
    for form, marker in zip(dict.fromkeys(r["form"] for r in rows), "os^Dv*PX<>" * len(rows), strict=False):
        own = [r for r in rows if r["form"] == form]
        axes.scatter([r["macs"] / 1e9 for r in own], [r["images_per_second"] for r in own], marker=marker, label=form)
    for name in dict.fromkeys(r["model"] for r in rows):
        fastest = max((r for r in rows if r["model"] == name), key=lambda r: r["images_per_second"])
        point = (fastest["macs"] / 1e9, fastest["images_per_second"])
        axes.annotate(name, point, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="GMACs of an image", ylabel="images per second")
    axes.set_title(f"{report['device']}, {report['threads']} threads, batch {report['batch_size']}", fontsize=10)
    axes.margins(x=0.2, y=0.1)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8)
    save(figure, path)


def draw_choices(path: Path, results: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Choices of each stage: mean and spread of the first generation and of the best networks, and the best."""
    space = SearchSpace.from_dict(results["space_dict"])
    top = sorted(history, key=rank_key)[: results.get("parents") or TOP]
    groups = {
        "generation 1": ([r for r in history if r["generation"] == 0], COLORS["initial"], -0.18),
        f"best {len(top)}": (top, COLORS["mutation"], 0.0),
    }
    best = stage_means(space, [results["best"]])
    figure = Figure(figsize=(3 * len(best), 3.2), layout="constrained")
    panels = dict(zip(best, np.atleast_1d(figure.subplots(1, len(best))), strict=True))
    stage = np.arange(1, max(v.shape[1] for v in best.values()) + 1)
    for label, (records, color, shift) in groups.items():
        for name, values in stage_means(space, records).items():
            with warnings.catch_warnings():  # no network has a block there
                warnings.simplefilter("ignore", RuntimeWarning)
                mean, spread = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
            panels[name].errorbar(stage + shift, mean, spread, fmt="o", color=color, capsize=3, label=label)
    for name, axes in panels.items():
        axes.scatter(stage + 0.18, best[name][0], s=90, marker="*", color=ACCENT, zorder=5, label="best")
        axes.set_title({"exists": "blocks"}.get(name, f"{name}, mean of a stage"), fontsize=10)
        axes.set_xlabel("stage")
        axes.set_xticks(stage)
        axes.set_xlim(0.5, len(stage) + 0.5)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    next(iter(panels.values())).legend(fontsize=8, loc="lower right")
    save(figure, path)


def stage_means(space: SearchSpace, records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """By gene's name its mean choice in each stage, of presence genes the number present, [records, stages]."""
    rows = space.rows(Arch.from_record(r) for r in records)
    stages = max(gene.stage for gene in space.genes) + 1
    out: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(gene.name for gene in space.genes):
        values = np.full((len(rows), stages), np.nan)
        for s in range(stages):
            columns = [i for i, g in enumerate(space.genes) if (g.name, g.stage) == (name, s)]
            cells = []
            for i in columns:
                gene = space.genes[i]
                cell = np.array(gene.choices, dtype=float)[rows[:, i]]
                cells.append(cell if gene.presence is None else np.where(rows[:, gene.presence] == 0, cell, np.nan))
            if cells:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)
                    reduce = np.sum if space.genes[columns[0]].kind == "presence" else np.nanmean
                    values[:, s] = reduce(np.stack(cells), axis=0)
        out[name] = values
    return out
