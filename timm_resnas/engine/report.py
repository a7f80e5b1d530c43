"""Report of a search, from the files in its run's folder; made again at any time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..nas.cost import Budget, format_cost
from ..nas.evaluate import in_answers
from ..nas.jsonl import read_jsonl
from . import shrink_report, training_free_report
from .baseline import describe, verdict
from .correlation import spearman
from .markdown import LABELS, family, network, provenance
from .plots import accuracies, draw_choices, draw_pareto, draw_progress, objectives
from .run import RunError, atomic_write, format_minutes, read_json, short_path

__all__ = ["report", "results_table", "train_command"]

RISING = 0.02  # accuracy that the largest network gained between its last two evaluations
RECORD = {"args", "generation", "key", "macs", "model", "origin", "score"}


def report(folder: Path) -> str:
    """Write the report and pictures of a run; returns the table of results, and what is to be said of the baseline.

    Raises:
        RunError: The folder holds no finished search, or a file of it is damaged; the message names it.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise RunError(f"{folder} holds no results.json; expected the folder of a finished search")
    results = read_json(path)
    if isinstance(results, dict) and "networks" in results:
        return shrink_report.report(folder)
    if isinstance(results, dict) and "training_free" in results:
        return training_free_report.report(folder)
    history = read_jsonl(folder / "history.jsonl")
    history = [in_answers(record) for record in history]
    training = read_jsonl(folder / "training.jsonl")
    if not history or not all(RECORD <= record.keys() for record in history):
        raise RunError(f"{folder / 'history.jsonl'} is damaged: its lines must have {', '.join(sorted(RECORD))}")
    try:
        results = {**results, "folder": str(folder)}
        table = "\n\n".join([results_table(results), *beside_baseline(results)])
        text = markdown(results, history, training, table)
        draw_pareto(folder / "pareto.png", results, history)
        draw_progress(folder / "progress.png", results, history, training)
        draw_choices(folder / "choices.png", results, history)
    except (LookupError, TypeError, AttributeError) as e:
        raise RunError(f"{path} is damaged: it is not what a search writes ({type(e).__name__}: {e})") from e
    with atomic_write(folder / "report.md") as fresh:
        fresh.write_text(text, encoding="utf-8")
    return table


def train_command(folder: str | Path, dataset: str) -> str:
    """How the found network is trained with all training images."""
    return (
        f"accelerate launch recipes/train.py --model {folder}/best --pretrained --dataset {dataset} "
        f"--val-per-class 0 --lr 2e-4"
    )


def improving(training: list[dict[str, Any]]) -> str | None:
    """A hint where the supernet had not finished learning, so that inherited weights say less than they could."""
    values = [r["accuracy"]["largest"] for r in training if "largest" in r["accuracy"]]
    if len(values) < 2 or values[-1] - values[-2] < RISING:
        return None
    return (
        f"**The supernet was still improving when its training ended** ({values[-2]:.3f} to {values[-1]:.3f} in its "
        f"last {training[-1]['epoch'] - training[-2]['epoch']} epochs): inherited weights are then well below what the "
        f"network reaches when it is trained by itself. More `--epochs`, or the command below."
    )


def beside_baseline(results: dict[str, Any]) -> list[str]:
    """What the baseline is, and whether the best network beats it; nothing of runs that had none."""
    if (baseline := results.get("baseline")) is None:
        return []
    weak = verdict(float(accuracies(results, [results["best"]], "test")[0]), baseline)
    return [describe(baseline), *([f"**{weak}**"] if weak else [])]


def results_table(results: dict[str, Any]) -> str:
    """Best, largest and random networks and the baseline, as Markdown that reads well in a terminal."""
    # the front's costs first; latency where a table predicts it
    names = [k for k in dict.fromkeys((*objectives(results), "macs", "params", "latency_ms")) if k in results["best"]]

    def row(name: str, costs: list[float], val: str, test: str) -> tuple[str, ...]:
        return name, *(format_cost(k, v) for k, v in zip(names, costs, strict=True)), val, test

    rows = [("network", *(LABELS[k] for k in names), "validation", "test")]
    for name in ("best", "largest"):
        r = results[name]
        val, test = (accuracies(results, [r], s)[0] for s in ("val", "test"))
        rows.append(row(name, [r[k] for k in names], f"{val:.4f}", f"{test:.4f}"))
    if randoms := results["random"]:
        shown = []
        for split in ("val", "test"):
            a = accuracies(results, randoms, split)
            shown.append(f"{a.mean():.4f} ± {a.std():.4f}")
        means = [float(np.mean([r[k] for r in randoms])) for k in names]
        rows.append(row(f"mean of {len(randoms)} random", means, *shown))
    if baseline := results.get("baseline"):
        rows.append(("random forest", *("-" for _ in names), "-", f"{baseline['test'] / baseline['images']:.4f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


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
            f"{spearman(val, test):.2f} (1: the score orders networks as the test images do; standard error "
            f"about {1 / np.sqrt(max(1, len(randoms) - 1)):.2f}).",
        ]
    scores = np.array([r.get("ranked_by", r["score"]) for r in history])
    lines.append(
        f"- {len(np.unique(scores))} different scores among {len(history)} candidates; "
        f"{int((scores == scores.max()).sum())} share the highest, of which fewer MACs decide."
    )
    if screen := results.get("prescreen"):
        lines.append(
            f"- Pre-screening on a part of the images stopped {screen['stopped']} candidates and saved "
            f"{screen['images_saved']:.0%} of the images. Scored in full afterwards, {screen['would_be_parents']} of "
            f"the {screen['rechecked']} closest to the parents would have been among them."
        )
    if finalists := results.get("finalists"):
        if where := results.get("latency"):
            lines.append(f"- Latency is that of {where}.")
        lines += [
            f"- Measured end to end: {f['ms']:.4g} ms (predicted {f['predicted_ms']:.4g})"
            + (", above the limit" if f["ms"] > results["budget"]["latency_ms"] else "")
            + (", the best" if f["key"] == results["best"]["key"] else ", not taken")
            for f in finalists
        ]
    return lines


def markdown(results: dict[str, Any], history: list[dict[str, Any]], training: list[dict[str, Any]], table: str) -> str:
    """The report's text."""
    limits = {k: v for k, v in results["budget"].items() if k != "asked"}
    budget = f"{Budget.from_dict(limits)} (asked: `{results['budget']['asked']}`)" if limits else "none"
    space, supernet = results["space"], results.get("supernet")
    if supernet and not supernet.startswith("hf-hub:"):
        space = space.replace(supernet, short_path(supernet))
    seconds = results["seconds"]
    leak = results.get("leak")
    lines = [
        f"# Search on {results['dataset']}, space {space}",
        "",
        f"Budget: {budget}. {results['candidates']} candidates out of {results['space_size']:.3g} sub-networks, scored "
        f"with the supernet's weights on {results['val_images']} images"
        + ("" if leak else " that were not trained on")
        + f". The {results['test_images']} test images were used for this table only.",
        *(["", f"**Leak:** {leak}."] if leak else []),
        "",
        table,
        "",
        "Validation: images cut from the training part, which candidates were scored on; test: images that nothing was "
        "chosen on.",
        *(["", hint] if (hint := improving(training)) else []),
        "",
        "Weights are inherited from the supernet. This trains the found network with all training images, those that "
        "candidates were scored on included:",
        "",
        "```bash",
        train_command(results["folder"], results["dataset"]),
        "```",
        *(["", f"The search ended early ({results['ended_early']})."] if results["ended_early"] else []),
        "",
        *statistics(results, history),
        "",
        *network(results),
        "```python",
        "import timm, timm_resnas",
        "model = timm.create_model('local-dir:best', pretrained=True)  # from this folder",
        "```",
        "",
        *family(results, objectives(results), results["val_images"], "pareto.png"),
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
        *provenance(
            results,
            f"training {format_minutes(seconds['training'])}, search {format_minutes(seconds['search'])}"
            + (", since the run was last continued" if results.get("resumed") else ""),
            f"- supernet: {supernet or 'trained by this run'}",
        ),
    ]
    return "\n".join(lines)
