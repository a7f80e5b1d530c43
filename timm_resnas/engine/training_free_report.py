"""Report of a search that trained nothing, from the files in its run's folder; made again at any time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..nas.cost import Budget, format_cost
from ..nas.jsonl import read_jsonl
from .correlation import spearman
from .markdown import network, provenance
from .plots import draw_choices
from .run import RunError, atomic_write, format_minutes, read_json

__all__ = ["report", "train_command"]

LABELS = {"macs": "MACs", "params": "params", "latency_ms": "latency"}


def train_command(folder: str | Path, dataset: str) -> str:
    """How the found network is trained."""
    return f"accelerate launch recipes/train.py --model {folder}/best --dataset {dataset}"


def report(folder: Path) -> str:
    """Write report.md and choices.png of a run; returns the table of networks, and what the score follows.

    Raises:
        RunError: The results are damaged.
    """
    path = folder / "results.json"
    results, history = read_json(path), read_jsonl(folder / "history.jsonl")
    try:
        table = "\n\n".join([networks_table(results), follows(results, history)])
        text = markdown(results, table, folder)
        draw_choices(folder / "choices.png", results, history)
    except (LookupError, TypeError, AttributeError) as e:
        raise RunError(f"{path} is damaged: it is not what a search writes ({type(e).__name__}: {e})") from e
    with atomic_write(folder / "report.md") as fresh:
        fresh.write_text(text, encoding="utf-8")
    return table


def networks_table(results: dict[str, Any]) -> str:
    """Best, largest and random networks, as Markdown."""
    names = [name for name in LABELS if name in results["best"]]
    head = ("network", *(LABELS[name] for name in names), results["training_free"])
    rows = [
        (name, *(format_cost(k, results[name][k]) for k in names), f"{results[name]['value']:.6g}")
        for name in ("best", "largest")
    ]
    if randoms := results["random"]:
        values = np.array([r["value"] for r in randoms])
        costs = [format_cost(k, float(np.mean([r[k] for r in randoms]))) for k in names]
        rows.append((f"mean of {len(randoms)} random", *costs, f"{values.mean():.6g} ± {values.std():.3g}"))
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def follows(results: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """How the score ranks candidates by their size: what it might be no more than."""
    values = np.array([r["value"] for r in history])
    shown = [
        f"{spearman(values, np.array([r[name] for r in history])):.2f} with {LABELS[name]}"
        for name in ("params", "macs")
    ]
    return (
        f"Rank correlation of {results['training_free']} over the {len(history)} candidates: {' and '.join(shown)}. "
        f"What it says beyond these, nothing here has measured: no network was trained."
    )


def markdown(results: dict[str, Any], table: str, folder: Path) -> str:
    """The report's text."""
    limits = {k: v for k, v in results["budget"].items() if k != "asked"}
    budget = f"{Budget.from_dict(limits)} (asked: `{results['budget']['asked']}`)" if limits else "none"
    front = [
        f"- pareto/{k}: {format_cost('macs', p['macs'])} MACs, {format_cost('params', p['params'])} parameters, "
        f"{results['training_free']} {p['value']:.6g}"
        for k, p in enumerate(results["front"], start=1)
    ]
    return "\n".join(
        [
            f"# Training-free search for {results['dataset']}, space {results['space']}",
            "",
            f"Budget: {budget}. {results['candidates']} candidates out of {results['space_size']:.3g} networks, by the "
            f"score {results['training_free']} (`timm_resnas.nas.proxies`).",
            "",
            table,
            "",
            "`best/` holds the network with untrained weights. This trains it:",
            "",
            "```bash",
            train_command(folder, results["dataset"]),
            "```",
            *(["", f"The search ended early ({results['ended_early']})."] if results["ended_early"] else []),
            "",
            *network(results),
            *(["## Front", "", *front, ""] if front else []),
            "What was chosen in each stage: the first generation, the best networks of the whole search, and the best.",
            "",
            "![choices](choices.png)",
            "",
            *provenance(results, format_minutes(results["seconds"])),
        ]
    )
