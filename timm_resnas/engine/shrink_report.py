"""Report of a model that was shrunk, from the files in its run's folder; made again at any time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..nas.cost import Budget, format_cost
from ..nas.evaluate import in_answers
from ..nas.jsonl import read_jsonl
from ..nas.space import SearchSpace
from .baseline import describe, verdict
from .markdown import family, network, provenance
from .plots import ACCENT, draw_pareto, save
from .run import RunError, atomic_write, format_minutes, read_json, short_path

__all__ = ["report"]

GREY, DARK, BLUE = "#9aa5b1", "#2b2d42", "#3e7cb1"


def report(folder: Path) -> str:
    """Write report.md and the pictures of a run; returns the table of networks.

    Raises:
        RunError: The results are damaged.
    """
    path = folder / "results.json"
    results = read_json(path)
    try:
        table = "\n\n".join([networks_table(results), *beside_baseline(results)])
        text = markdown(results, table)
        draw_accuracy(folder / "shrunk.png", results)
        draw_widths(folder / "widths.png", results)
        if results.get("search") == "slimming":
            draw_chain(folder / "pareto.png", results, read_jsonl(folder / "history.jsonl"))
    except (LookupError, TypeError, AttributeError) as e:
        raise RunError(f"{path} is damaged: it is not what a search writes ({type(e).__name__}: {e})") from e
    with atomic_write(folder / "report.md") as fresh:
        fresh.write_text(text, encoding="utf-8")
    return table


def beside_baseline(results: dict[str, Any]) -> list[str]:
    """What the baseline is, and whether the found network beats it."""
    found = results["networks"]["found, fine-tuned"]["test"] / results["images"]["test"]
    weak = verdict(found, results["baseline"], pretrained=True)
    return [describe(results["baseline"]), *([f"**{weak}**"] if weak else [])]


def networks_table(results: dict[str, Any]) -> str:
    """Full, found, even and random networks, as Markdown that reads well in a terminal."""
    images = results["images"]["test"]
    rows = [("network", "MACs", "params", "latency", "speed", f"test ({images} images)")]
    for name, r in results["networks"].items():
        speed = f"{r['ms']:.3g} ms", f"{r['speedup']:.2f}x"
        costs = format_cost("macs", r["macs"]), format_cost("params", r["params"])
        rows.append((name, *costs, *speed, f"{r['test'] / images:.4f}"))
    if randoms := results["random"]:
        test = np.array([r["test"] for r in randoms]) / images
        costs = [format_cost(k, float(np.mean([r[k] for r in randoms]))) for k in ("macs", "params")]
        rows.append(
            (f"mean of {len(randoms)} random, repaired", *costs, "-", "-", f"{test.mean():.4f} ± {test.std():.4f}")
        )
    baseline = results["baseline"]
    rows.append(("random forest", "-", "-", "-", "-", f"{baseline['test'] / baseline['images']:.4f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def markdown(results: dict[str, Any], table: str) -> str:
    """The report's text."""
    limits = {k: v for k, v in results["budget"].items() if k != "asked"}
    budget = f"{Budget.from_dict(limits)} (asked: `{results['budget']['asked']}`)" if limits else "none"
    images, epochs = results["images"], results["epochs"]
    together = (
        f"narrower networks were trained with it at once for {epochs['elastic']} epochs, taught by it; "
        if epochs["elastic"]
        else ""
    )
    how = (
        f"{results['candidates']} candidates out of {results['space_size']:.3g} narrower networks, scored by "
        f"{results['score']} on {images['val']} images that were not trained on before."
    )
    made = "heads and hidden units were ranked, and narrowed layers repaired in closed form, on"
    if results.get("search") == "slim-masks":
        how = (
            f"Masks on attention and MLP were trained with the model for {epochs['masks']} epochs; of each kind, those "
            f"above one threshold are left, which bisection sets so that the network is within the budget."
        )
        if tokens := results["best"].get("tokens"):
            how += f" Tokens of its blocks: {', '.join(map(str, tokens))}; the layers below are listed with all."
        made = "for even and random cuts heads and hidden units were ranked, and layers repaired in closed form, on"
    elif results.get("search") == "uniform":
        how = "Nothing was searched: of every block the same share of heads and of hidden units was kept."
    late = "" if results["kept_latency"] else (
        "**The network does not keep the latency limit when measured end to end.**"
        if results.get("search") == "uniform" else
        "**None of the finalists keeps the latency limit when measured end to end**; the fastest was taken."
    )  # fmt: skip
    return "\n".join(
        [
            f"# {short_path(results['model'])} shrunk on {results['dataset']}",
            "",
            f"Budget: {budget}. {how} The {images['test']} test images were used for this table only.",
            "",
            table,
            "",
            *([late, ""] if late else []),
            f"Latency: median of interleaved rounds, {results['conditions']}. The full model was fine-tuned "
            f"for {epochs['full']} epochs on {images['train']} images; {together}{made} {results['calibration']} of "
            f"them. The found network was then fine-tuned for {epochs['finetune']} epochs on "
            f"{images['train'] + images['val']} images, taught by "
            f"the full model. Even and random cuts are repaired, not fine-tuned.",
            "",
            "![test accuracy against MACs](shrunk.png)",
            "",
            *chain(results),
            *network(results, "![heads and hidden units of each block](widths.png)"),
            "```python",
            "import timm, timm_resnas",
            "model = timm.create_model('local-dir:best', pretrained=True)  # from this folder",
            "```",
            "",
            *provenance(
                results,
                format_minutes(results["seconds"]) + (", since it was last continued" if results["resumed"] else ""),
                *([f"- the search ended early ({results['ended_early']})"] if results["ended_early"] else []),
            ),
        ]
    )


def chain(results: dict[str, Any]) -> list[str]:
    """The lines on a slimming's chain; none of other searches."""
    if results.get("search") != "slimming":
        return []
    return family(results, results["objectives"], results["images"]["val"], "pareto.png")


def draw_chain(path: Path, results: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """The chain of a slimming, and what was rejected on its way."""
    shown = {
        **results,
        "best": in_answers(results["best"]),
        "largest": results["front"][-1],
        "spread": [],
        "random": [],
        "val_images": results["images"]["val"],
    }
    draw_pareto(path, shown, [in_answers(record) for record in history])


def draw_accuracy(path: Path, results: dict[str, Any]) -> None:
    """Test accuracy against MACs of the compared networks."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    networks, images = results["networks"], results["images"]["test"]
    scale, unit = (1e9, "GMACs") if networks["full model"]["macs"] >= 1e9 else (1e6, "MMACs")
    if randoms := results["random"]:
        x = [r["macs"] / scale for r in randoms]
        axes.scatter(x, [r["test"] / images for r in randoms], s=18, color=GREY, label="random, repaired")
    looks = {"full model": (DARK, "s"), "found, fine-tuned": (ACCENT, "*")}
    looks |= dict.fromkeys(("found, repaired", "found, by masks"), (BLUE, "o"))
    for name, r in networks.items():
        color, marker = looks.get(name, (GREY, "D"))
        size = 170 if marker == "*" else 60
        x, y = r["macs"] / scale, r["test"] / images
        axes.scatter(x, y, s=size, color=color, marker=marker, label=name, edgecolors="white", zorder=3)
    axes.set_xlabel(f"{unit} at {' x '.join(map(str, _size(results)))} pixels")
    axes.set_ylabel("test accuracy")
    axes.set_xlim(0, 1.08 * networks["full model"]["macs"] / scale)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    save(figure, path)


def _size(results: dict[str, Any]) -> list[int]:
    return results["space_dict"]["model_args"]["img_size"]


def draw_widths(path: Path, results: dict[str, Any]) -> None:
    """Heads and hidden units that are left in each block, in front of those of the full model."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    widths = results["best"]["args"]["widths"]
    kept = np.array([own[:2] for own in widths])
    most = np.array([[heads[0], hidden[0]] for heads, hidden in results["space_dict"]["choices"]])
    titles = ["heads", "hidden units of the MLP"]
    if any(len(own) > 2 for own in widths):
        titles[0] = "entries of all heads"
        full = [attn.width for attn, _ in SearchSpace.from_dict(results["space_dict"]).structure.pairs]
        most[:, 0] *= full
        kept[:, 0] *= [own[2] if len(own) > 2 else width for own, width in zip(widths, full, strict=True)]
    for axes, column, title in zip(figure.subplots(1, 2), (0, 1), titles, strict=True):
        blocks = range(1, len(kept) + 1)
        axes.bar(blocks, most[:, column], color="#dfe3e8", label="full model")
        axes.bar(blocks, kept[:, column], color=BLUE, label="found")
        axes.set_xlabel("block")
        axes.set_title(title, fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    save(figure, path)
