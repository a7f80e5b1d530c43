"""Report and pictures of a search, from the files in its run's folder; made again at any time.

    python recipes/report.py runs/digits-micro

Reads results.json, history.jsonl and training.jsonl; writes report.md, pareto.png and progress.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from common import RunError, format_minutes, main_guard

from timm_resnas import Arch
from timm_resnas.nas.cost import Budget, format_cost
from timm_resnas.nas.jsonl import read_jsonl

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

COLORS = {"initial": "#9aa5b1", "random": "#9aa5b1", "mutation": "#3e7cb1", "crossover": "#81a4cd"}
ACCENT = "#d1495b"


def report(folder: Path) -> str:
    """Write the report and pictures of a run; returns the table of results.

    Raises:
        RunError: The folder holds no finished search.
    """
    if not (folder / "results.json").is_file():
        raise RunError(f"{folder} holds no results.json; expected the folder of a finished search")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    history = read_jsonl(folder / "history.jsonl")
    training = read_jsonl(folder / "training.jsonl")
    draw_pareto(folder / "pareto.png", results, history)
    draw_progress(folder / "progress.png", results, history, training)
    table = results_table(results)
    fresh = folder / ".report.md.new"
    fresh.write_text(markdown(results, history, table), encoding="utf-8")
    fresh.replace(folder / "report.md")
    return table


def accuracies(results: dict[str, Any], records: list[dict[str, Any]], split: str) -> np.ndarray:
    key, total = {"val": ("score", "val_images"), "test": ("test", "test_images")}[split]
    return np.array([r[key] for r in records]) / results[total]


def results_table(results: dict[str, Any]) -> str:
    """Best, largest and random networks, as Markdown that reads well in a terminal."""

    def row(name: str, macs: float, params: float, val: str, test: str) -> tuple[str, ...]:
        return name, format_cost("macs", macs), format_cost("params", params), val, test

    rows = [("network", "MACs", "params", "search-val", "test")]
    for name in ("best", "largest"):
        r = results[name]
        val, test = (accuracies(results, [r], s)[0] for s in ("val", "test"))
        rows.append(row(name, r["macs"], r["params"], f"{val:.4f}", f"{test:.4f}"))
    if randoms := results["random"]:
        shown = []
        for split in ("val", "test"):
            a = accuracies(results, randoms, split)
            shown.append(f"{a.mean():.4f} ± {a.std():.4f}")
        macs, params = (float(np.mean([r[k] for r in randoms])) for k in ("macs", "params"))
        rows.append(row(f"mean of {len(randoms)} random", macs, params, *shown))
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def markdown(results: dict[str, Any], history: list[dict[str, Any]], table: str) -> str:
    arch = Arch.from_network_def(results["best"]["network_def"])
    stages = ["| stage | embed_dim | blocks | heads | mlp_hidden |", "|---|---|---|---|---|"]
    for i, (dim, blocks) in enumerate(zip(arch.embed_dims, arch.stages, strict=True), start=1):
        present = [b for b in blocks if b.exists]
        heads, hidden = (" ".join(str(getattr(b, k)) for b in present) for k in ("num_heads", "mlp_hidden"))
        stages.append(f"| {i} | {dim} | {len(present)} of {len(blocks)} | {heads} | {hidden} |")
    points = ["| MACs | params | search-val |", "|---|---|---|"]
    for p in results["front"]:
        score = p["score"] / results["val_images"]
        points.append(f"| {format_cost('macs', p['macs'])} | {format_cost('params', p['params'])} | {score:.4f} |")
    budget = {k: v for k, v in results["budget"].items() if k != "asked"}
    seconds = results["seconds"]
    lines = [
        f"# Search on {results['dataset']}, space {results['space']}",
        "",
        f"Budget: {Budget.from_dict(budget)} (asked: `{results['budget']['asked']}`). "
        f"{results['candidates']} candidates out of {results['space_size']:.3g} sub-networks, scored with the "
        f"supernet's weights on {results['val_images']} images that were not trained on. The {results['test_images']} "
        "test images were used for this table only.",
        "",
        table,
        "",
        "Weights are inherited from the supernet; training the found network from scratch is a run of its own.",
        *(["", f"The search ended early ({results['ended_early']})."] if results["ended_early"] else []),
        "",
        "## The network",
        "",
        *stages,
        "",
        "```",
        str(arch.canonical()),
        "```",
        "",
        "```python",
        "import timm, timm_resnas",
        "model = timm.create_model('local-dir:best', pretrained=True)  # from this folder",
        "```",
        "",
        "## Front of accuracy against MACs",
        "",
        *points,
        "",
        "![score against MACs](pareto.png)",
        "",
        "## Progress",
        "",
        "![progress](progress.png)",
        "",
        "## How it was made",
        "",
        f"- command: `{results['command']}`",
        f"- seed {results['seed']}, {results['processes']} process{'es' * (results['processes'] > 1)}",
        f"- training {format_minutes(seconds['training'])}, search {format_minutes(seconds['search'])}",
        "- " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()),
        "",
    ]
    return "\n".join(lines)


def draw_pareto(path: Path, results: dict[str, Any], history: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    scale = 1e9 if results["largest"]["macs"] >= 1e9 else 1e6

    def points(records: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([r["macs"] for r in records]) / scale, accuracies(results, records, "val")

    for origin in dict.fromkeys(r["origin"] for r in history):
        records = [r for r in history if r["origin"] == origin]
        axes.scatter(*points(records), s=14, color=COLORS[origin], alpha=0.6, linewidths=0, label=origin)
    axes.scatter(*points(results["spread"]), s=14, marker="D", color="#edae49", linewidths=0, label="random, any cost")
    if results["random"]:
        axes.scatter(
            *points(results["random"]), s=22, facecolors="none", edgecolors="#444444", label="random, of the budget"
        )
    axes.scatter(*points([results["largest"]]), s=50, marker="s", color="#2b2d42", label="largest network")
    axes.plot(*points(results["front"]), color=ACCENT, linewidth=1, drawstyle="steps-post", label="front")
    axes.scatter(*points([results["best"]]), s=110, marker="*", color=ACCENT, zorder=5, label="best within the budget")
    axes.set_xlabel(f"{'G' if scale == 1e9 else 'M'}MACs")
    axes.set_ylabel("accuracy on the search's validation images")
    axes.set_title(f"{results['candidates']} candidates on {results['dataset']}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.9, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_progress(
    path: Path, results: dict[str, Any], history: list[dict[str, Any]], training: list[dict[str, Any]]
) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    if training:
        epochs = [r["epoch"] for r in training]
        for name in training[-1]["accuracy"]:
            strong = name in ("largest", "smallest")
            left.plot(
                epochs,
                [r["accuracy"][name] for r in training],
                marker="o",
                markersize=3,
                linewidth=2 if strong else 1,
                color={"largest": "#2b2d42", "smallest": ACCENT}.get(name, "#9aa5b1"),
                label=name,
            )
        left.legend(fontsize=8, loc="lower right")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_xlabel("epoch")
    left.set_ylabel("accuracy on the search's validation images")
    left.set_title("sub-networks while the supernet trains", fontsize=10)
    left.grid(alpha=0.25)

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
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished search")
    args = parser.parse_args(argv)
    with main_guard("report.py"):
        print(report(args.run))


if __name__ == "__main__":
    main()
