"""Scores of a classifier, and how its classes meet those of the data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import ImageNetInfo, RealLabelsImagenet, infer_imagenet_subset
from torch import nn

from ..data import DataError, EvalPart, load_eval, match_classes
from ..data.images import WHITE, parse_background
from .models import background_of, class_names_of, model_source
from .run import RunError
from .settings import EvaluateOptions, ExportOptions

__all__ = [
    "chosen_background",
    "evaluate",
    "format_scores",
    "matched_classes",
    "open_part",
    "read_real_labels",
    "read_valid_labels",
]


BINS = 15


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    classes: Sequence[int] | None = None,
    real: Sequence[Sequence[int]] | None = None,
    timed: bool = False,
    report=None,
) -> dict[str, Any]:
    """Scores of a classifier over the batches of all processes.

    Args:
        accelerator: Joins the processes' sums; its mixed precision is used.
        model: On the batches' device; it is put in eval mode.
        batches: This process's share of (images, labels).
        classes: The model's class for each of the data's; others are left out of its answers.
        real: Right answers of every image of the data set, by its number; labels are these numbers then. Loss and
            calibration are not computed.
        timed: Measure the forward pass.
        report: Called with the number of batches done.

    Returns:
        'images', 'correct', 'top1', and 'top5' where there are more than 5 classes; 'loss' and 'ece' (see the module);
        'images_per_second' of one process.
    """
    model.eval()
    device = accelerator.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss
    bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # images, confidence, correct
    index = None if classes is None else torch.tensor(classes, device=device)
    seconds: list[tuple[int, float]] = []
    first: Any = None
    for done, (x, y) in enumerate(batches, start=1):
        first = x if first is None else first
        if timed and x.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        with accelerator.autocast():
            logits = model(x)
        if timed:
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds.append((len(x), time.perf_counter() - begin))
        logits = logits.float() if index is None else logits.float()[:, index]
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        if real is None:
            hit = top == y[:, None]
        else:
            right = [real[i] for i in y.tolist()]
            kept = torch.tensor([bool(r) for r in right], device=device)
            rows = zip(top.tolist(), right, strict=True)
            hit = torch.tensor([[t in r for t in row] for row, r in rows], device=device)[kept]
        sums[0] += len(hit)
        sums[1] += hit[:, 0].sum()
        sums[2] += hit.any(dim=1).sum()
        if real is None:
            sums[3] += F.cross_entropy(logits, y, reduction="sum")
            confidence = logits.softmax(dim=1).amax(dim=1)
            which = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # (0, 1/15], … as in arXiv 1706.04599
            ones = torch.ones_like(confidence)
            for row, values in zip(bins, (ones, confidence, hit[:, 0]), strict=True):
                row.index_add_(0, which, values.double())
        if report is not None:
            report(done)
    sums, bins = accelerator.reduce(sums, "sum"), accelerator.reduce(bins, "sum")
    images, correct, among_five, loss = sums.tolist()
    if not images:
        raise RunError("there are no images to evaluate on")
    num_classes = model.num_classes if classes is None else len(classes)
    scores: dict[str, Any] = {"images": int(images), "correct": int(correct), "top1": correct / images}
    if num_classes > 5:
        scores["top5"] = among_five / images
    if real is None:
        scores["loss"] = loss / images
        scores["ece"] = float((bins[1] - bins[2]).abs().sum() / images)
    if timed:
        size = max(n for n, _ in seconds)
        full = [s for n, s in seconds if n == size][1:]
        scores["images_per_second"] = size / statistics.median(full or [_seconds(accelerator, model, first)])
    return scores


def _seconds(accelerator: Accelerator, model: nn.Module, x: torch.Tensor) -> float:
    """Of the forward pass of a single batch, which was seen once before."""
    if x.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    with torch.no_grad(), accelerator.autocast():
        model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def format_scores(scores: dict[str, Any]) -> str:
    """'top-1 0.9861  top-5 …' in one line."""
    names = {"top1": "top-1", "top5": "top-5", "loss": "loss", "ece": "calibration error"}
    parts = [f"{names[k]} {scores[k]:.4f}" for k in names if k in scores]
    if scores.get("images_per_second"):
        parts.append(f"{scores['images_per_second']:.1f} images/s")
    return f"{'  '.join(parts)}  ({scores['images']} images)"


def matched_classes(model: nn.Module, data_names: Sequence[str]) -> list[int] | None:
    """The model's output for each of the data's classes, or None where they are the same or the model names none.

    Raises:
        ValueError: Their classes do not fit.
    """
    names = class_names_of(model)
    hint = "; take a model trained on these classes, or --valid-labels"
    if names is None:
        if model.num_classes != len(data_names):
            raise RunError(f"the model has {model.num_classes} classes without names, the data {len(data_names)}{hint}")
        return None
    aliases = []
    if subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
        aliases = [info.label_descriptions(detailed=detailed) for detailed in (False, True)]
    try:
        return match_classes(names, data_names, aliases=aliases, subset=True)
    except DataError as e:
        raise RunError(f"{e}{hint}") from None


def read_valid_labels(name: str, model: nn.Module, count: int) -> list[int]:
    """Class numbers from a file, or from a list that timm has.

    Raises:
        RunError: There is no such list, or it does not fit model and data.
    """
    path = Path(name)
    if not path.is_file():
        folder = Path(timm.data.__file__).parent / "_info"
        path = folder / f"{name.replace('-', '_')}_indices.txt"
        if not path.is_file():
            known = sorted(p.name.removesuffix("_indices.txt") for p in folder.glob("*_indices.txt"))
            raise RunError(f"--valid-labels {name} is neither a file nor one of timm's lists: {', '.join(known)}")
    try:
        numbers = [int(line) for line in path.read_text().split()]
    except ValueError:
        raise RunError(f"--valid-labels {name}: expected one class number per line") from None
    if len(numbers) != count or not all(0 <= n < model.num_classes for n in numbers):
        raise RunError(
            f"--valid-labels {name} has {len(numbers)} numbers up to {max(numbers, default=0)}; the data has {count} "
            f"classes, the model {model.num_classes}"
        )
    return numbers


def read_real_labels(where: str, dataset) -> list[list[int]]:
    """Right classes of every image, by timm's reader of the reassessed labels.

    Raises:
        RunError: The images are not those of ImageNet's validation set.
    """
    import datasets

    raw = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    files = [Path(item["path"] or "").name for item in raw["image"]]
    try:
        labels = RealLabelsImagenet(files, real_json=None if where == "timm" else where).real_labels
    except AssertionError:
        raise RunError(
            f"--real-labels are for all images of ImageNet's validation set; this part has {len(files)}"
        ) from None
    except (OSError, ValueError) as e:
        raise RunError(f"--real-labels {where} cannot be read: {e}") from None
    unknown = [f for f in files if f not in labels]
    if unknown:
        raise RunError(f"--real-labels know images by names such as {next(iter(labels))}; found {unknown[0]!r}")
    return [labels[f] for f in files]


def chosen_background(options: EvaluateOptions | ExportOptions) -> str:
    """The colour behind transparent pixels, '#rrggbb': what was asked for, or the model's own, or white."""
    return parse_background(options.background or background_of(model_source(options.model)) or WHITE)


def open_part(options: EvaluateOptions | ExportOptions) -> EvalPart:
    """The images to evaluate on: a part that is asked for, or else what `load_eval` finds, whole."""
    for name in ("train_split", "test_split"):
        if getattr(options, name) is not None:
            raise RunError(f"--{name.replace('_', '-')} is for training; --split names what is evaluated")
    asked = {k: getattr(options, k) for k in ("label_key", "image_key", "hf_config")}
    return load_eval(options.dataset, options.split, background=chosen_background(options), **asked)
