"""What scores of a network say of its trained accuracy, beside what its size says: a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..arch import Arch
from ..nas.jsonl import append_jsonl, read_jsonl
from ..nas.proxies import PROXIES, proxy_scores
from ..nas.supernet import Supernet
from .correlation import interval, kendall, partial, spearman
from .run import RunError, read_json

__all__ = ["CONTROLS", "read_accuracies", "score_networks", "score_table"]

CONTROLS = ("params", "macs")


def read_accuracies(path: Path, name: str) -> list[tuple[Arch, dict[str, float]]]:
    """AutoFormer networks and their accuracies by name, from a list of ViT-Bench-101's.

    Args:
        path: JSON: lists by name, whose records have ``arch`` (``hidden_dim``, ``depth``, and ``mlp_ratio`` and
            ``num_heads`` of each layer) and accuracies ``*_acc``, null where none is known.
        name: Of the list.

    Raises:
        RunError: The file has no such list, or it holds something else.
    """
    data = read_json(path)
    if not isinstance(data, Mapping) or not isinstance(records := data.get(name), list):
        known = ", ".join(k for k, v in data.items() if isinstance(v, list)) if isinstance(data, Mapping) else "none"
        raise RunError(f"{path} has no list {name!r}; there are: {known}")
    try:
        return [
            (
                Arch.from_record(
                    {
                        "model": "autoformer",
                        "args": {
                            "embed_dim": r["arch"]["hidden_dim"],
                            "depth": r["arch"]["depth"],
                            "mlp_ratio": r["arch"]["mlp_ratio"],
                            "num_heads": r["arch"]["num_heads"],
                        },
                    }
                ),
                {k.removesuffix("_acc"): v for k, v in r.items() if k.endswith("_acc") and v is not None},
            )
            for r in records
        ]
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        raise RunError(f"{path}: {name} holds other than AutoFormer's networks ({type(e).__name__}: {e})") from None


def score_networks(
    net: Supernet,
    archs: Sequence[Arch],
    names: Sequence[str],
    images: torch.Tensor,
    labels: torch.Tensor,
    file: Path | None = None,
    asked: Any = None,
    report: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Training-free scores of networks, by name.

    Args:
        net: The supernet whose initial weights are used.
        archs: The networks.
        names: Scores, of `PROXIES`.
        images: See `proxy_scores`.
        labels: The same.
        file: Where scores are kept, a network a line; those there are not computed again.
        asked: What else decides scores: others' lines in the file are left alone.
        report: Called with the number of networks that are done.
    """
    known: dict[str, dict[str, float]] = {}
    for record in read_jsonl(file, mend=True) if file is not None else ():
        if record["asked"] == asked:
            known.setdefault(record["key"], {}).update(record["scores"])
    for done, arch in enumerate(archs, start=1):
        had = known.setdefault(arch.key(), {})
        fresh = proxy_scores([name for name in names if name not in had], net, arch, images, labels)
        had.update(fresh)
        if fresh and file is not None:
            append_jsonl(file, [{"key": arch.key(), "asked": asked, "scores": fresh}])
        if report is not None:
            report(done)
    return {name: np.array([known[arch.key()][name] for arch in archs]) for name in names}


def score_table(scores: Mapping[str, np.ndarray], accuracy: np.ndarray) -> str:
    """Rank correlations of scores with an accuracy, alone and with a control held fixed, as Markdown.

    The last columns are Spearman's correlation less that of the number of parameters, and what may be said by intervals
    of 95% over networks drawn with repetition: a score beats counting parameters where its correlation lies above 0 and
    above theirs.

    Args:
        scores: By name, `CONTROLS` among them, [networks] each.
        accuracy: [networks].
    """
    lines = [
        "| score | Kendall | Spearman | params held fixed | MACs held fixed | less that of params | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in [*CONTROLS, *(n for n in PROXIES if n in scores and n not in CONTROLS)]:
        score, control = scores[name], scores["params"]
        own = spearman(accuracy, score)
        shown = [f"{kendall(accuracy, score):.2f}", f"{own:.2f}"]
        shown += ["-" if name == c else f"{partial(accuracy, score, scores[c]):.2f}" for c in CONTROLS]
        low, high = interval(accuracy, score)
        said = "the wrong way" if high < 0 else "no better than chance" if low <= 0 else "no clear difference"
        if name == "params":
            shown += ["-", "the control" if low > 0 else f"the control: {said}"]
        else:
            less, more = interval(accuracy, score, control)
            if low > 0 and (less > 0 or more < 0):
                said = "beats counting parameters" if less > 0 else "worse than counting parameters"
            shown += [f"{own - spearman(accuracy, control):+.2f} ({less:+.2f} to {more:+.2f})", said]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)
