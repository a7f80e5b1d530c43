"""Report and pictures of a search, from the files in its run's folder; made again at any time.

    python recipes/report.py runs/digits-micro

Reads results.json, history.jsonl and training.jsonl; writes report.md, pareto.png, progress.png and choices.png.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from common import RunError, format_minutes, main_guard

from timm_resnas import Arch
from timm_resnas.nas.cost import Budget, format_cost
from timm_resnas.nas.evolution import rank_key
from timm_resnas.nas.jsonl import read_jsonl

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

COLORS = {"initial": "#9aa5b1", "random": "#9aa5b1", "mutation": "#3e7cb1", "crossover": "#81a4cd"}
LABELS = {"macs": "MACs", "params": "params", "memory": "memory", "latency_ms": "latency"}
TOP = 25  # networks whose choices are shown, where the search has no parents
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
    draw_choices(folder / "choices.png", results, history)
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


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; NaN where one side has no differences."""

    def ranks(x: np.ndarray) -> np.ndarray:  # the mean rank where values are equal
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale else float("nan")


def statistics(results: dict[str, Any], history: list[dict[str, Any]]) -> list[str]:
    """What scores are worth: how they rank networks, and where the best stands among random ones."""
    lines = []
    if randoms := results["random"]:
        val, test = (accuracies(results, randoms, s) for s in ("val", "test"))
        best = accuracies(results, [results["best"]], "test")[0]
        lines += [
            f"- Of the {len(randoms)} random networks, {int((test < best).sum())} have a lower test accuracy than the "
            f"best, {int((test == best).sum())} the same, {int((test > best).sum())} a higher one.",
            f"- Rank correlation of score and test accuracy over these random networks: "
            f"{rank_correlation(val, test):.2f} (1: the score orders networks as the test images do; standard error "
            f"about {1 / np.sqrt(max(1, len(randoms) - 1)):.2f}).",
        ]
    scores = np.array([r["score"] for r in history])
    lines.append(
        f"- {len(np.unique(scores))} different scores among {len(history)} candidates; "
        f"{int((scores == scores.max()).sum())} share the highest, of which fewer MACs decide."
    )
    if look := results.get("first_look"):
        lines.append(
            f"- First looks ended {look['ended']} candidates and saved {look['images_saved']:.0%} of the images. "
            f"Scored in full afterwards, {look['would_be_parents']} of the {look['rechecked']} closest to the parents "
            f"would have been among them."
        )
    if finalists := results.get("finalists"):
        lines += [
            f"- Measured end to end: {f['ms']:.4g} ms (predicted {f['predicted_ms']:.4g})"
            + (", above the limit" if f["ms"] > results["budget"]["latency_ms"] else "")
            + (", the best" if f["key"] == results["best"]["key"] else ", not taken")
            for f in finalists
        ]
    return lines


def markdown(results: dict[str, Any], history: list[dict[str, Any]], table: str) -> str:
    arch = Arch.from_network_def(results["best"]["network_def"])
    stages = ["| stage | embed_dim | blocks | heads | mlp_hidden |", "|---|---|---|---|---|"]
    for i, (dim, blocks) in enumerate(zip(arch.embed_dims, arch.stages, strict=True), start=1):
        present = [b for b in blocks if b.exists]
        heads, hidden = (" ".join(str(getattr(b, k)) for b in present) for k in ("num_heads", "mlp_hidden"))
        stages.append(f"| {i} | {dim} | {len(present)} of {len(blocks)} | {heads} | {hidden} |")
    shown = [name for name in LABELS if name in results["front"][0]]
    points = [
        "| folder | " + " | ".join(LABELS[name] for name in shown) + " | search-val |",
        "|---|" + "---|" * (len(shown) + 1),
    ]
    for k, p in enumerate(results["front"], start=1):
        costs = " | ".join(format_cost(name, p[name]) for name in shown)
        points.append(f"| pareto/{k} | {costs} | {p['score'] / results['val_images']:.4f} |")
    limits = {k: v for k, v in results["budget"].items() if k != "asked"}
    budget = f"{Budget.from_dict(limits)} (asked: `{results['budget']['asked']}`)" if limits else "none"
    objectives = results.get("objectives", ["macs"])
    seconds = results["seconds"]
    leak = results.get("leak")
    lines = [
        f"# Search on {results['dataset']}, space {results['space']}",
        "",
        f"Budget: {budget}. {results['candidates']} candidates out of {results['space_size']:.3g} sub-networks, scored "
        f"with the supernet's weights on {results['val_images']} images"
        + ("" if leak else " that were not trained on")
        + f". The {results['test_images']} test images were used for this table only.",
        *(["", f"**Leak:** {leak}."] if leak else []),
        "",
        table,
        "",
        "Weights are inherited from the supernet; training the found network from scratch is a run of its own.",
        *(["", f"The search ended early ({results['ended_early']})."] if results["ended_early"] else []),
        "",
        *statistics(results, history),
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
        f"## Front of accuracy against {' and '.join(LABELS[name] for name in objectives)}",
        "",
        *points,
        "",
        "![score against MACs](pareto.png)",
        "",
        "## Progress",
        "",
        "![progress](progress.png)",
        "",
        *(
            [
                "Hypervolume after each generation (1 is a network of no cost without errors): "
                + ", ".join(f"{v:.4f}" for v in results["hypervolumes"]),
                "",
            ]
            if results.get("hypervolumes")
            else []
        ),
        "What was chosen in each stage: the first generation, the best networks of the whole search, and the best.",
        "",
        "![choices](choices.png)",
        "",
        "## How it was made",
        "",
        f"- command: `{results['command']}`",
        f"- supernet: {results.get('supernet') or 'trained by this run'}",
        f"- seed {results['seed']}, {results['processes']} process{'es' * (results['processes'] > 1)}",
        f"- training {format_minutes(seconds['training'])}, search {format_minutes(seconds['search'])}"
        + (", since the run was last continued" if results.get("resumed") else ""),
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
    front = results["front"]
    if len(results.get("objectives", ["macs"])) > 1:  # the front has more dimensions than the picture
        axes.scatter(*points(front), s=30, facecolors="none", edgecolors=ACCENT, label="front")
    else:
        axes.plot(*points(front), color=ACCENT, linewidth=1, drawstyle="steps-post", label="front")
    axes.scatter(*points([results["best"]]), s=110, marker="*", color=ACCENT, zorder=5, label="best")
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


def draw_choices(path: Path, results: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Widths and depths per stage: mean and spread of the first generation and of the best networks, and the best."""

    def features(record: dict[str, Any]) -> np.ndarray:  # [4, stages]
        arch = Arch.from_network_def(record["network_def"])
        rows = []
        for dim, blocks in zip(arch.embed_dims, arch.stages, strict=True):
            present = [b for b in blocks if b.exists]
            rows.append(
                [
                    dim,
                    len(present),
                    np.mean([b.num_heads for b in present]) if present else np.nan,
                    np.mean([b.mlp_hidden for b in present]) if present else np.nan,
                ]
            )
        return np.array(rows, dtype=float).T

    top = sorted(history, key=rank_key)[: results.get("parents") or TOP]
    groups = {
        "generation 1": ([r for r in history if r["generation"] == 0], COLORS["initial"], -0.18),
        f"best {len(top)}": (top, COLORS["mutation"], 0.0),
    }
    best = features(results["best"])
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained")
    stage = np.arange(1, best.shape[1] + 1)
    for label, (records, color, shift) in groups.items():
        values = np.stack([features(r) for r in records])
        with warnings.catch_warnings():  # no network has a block there
            warnings.simplefilter("ignore", RuntimeWarning)
            mean, spread = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        for i, axes in enumerate(panels):
            axes.errorbar(stage + shift, mean[i], spread[i], fmt="o", color=color, capsize=3, label=label)
    for i, (axes, title) in enumerate(zip(panels, ("embed_dim", "blocks", "heads", "mlp_hidden"), strict=True)):
        axes.scatter(stage + 0.18, best[i], s=90, marker="*", color=ACCENT, zorder=5, label="best")
        axes.set_title(title + (", mean of a stage's blocks" if i > 1 else ""), fontsize=10)
        axes.set_xlabel("stage")
        axes.set_xticks(stage)
        axes.set_xlim(0.5, len(stage) + 0.5)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    panels[0].legend(fontsize=8, loc="lower right")
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
