"""Evaluate a classifier: top-1, top-5, loss, calibration error, speed.

    python recipes/evaluate.py --model runs/digits-vit_resnas/best --dataset digits
    python recipes/evaluate.py --model hf-hub:<id> --dataset imagefolder:<ImageNet> --img-size 288 --crop-pct 1.0
    python recipes/evaluate.py --model vit_resnas_tiny --pretrained-path released.pth --real-labels \\
        --dataset imagefolder:<ImageNet>
    accelerate launch --multi_gpu --num_processes 8 recipes/evaluate.py --model … --dataset … --amp bf16 --json -

The model is a name that has pretrained weights, a run's folder, any folder that timm saved, or a Hub id. Images are
prepared as the model's own configuration says, unless options say otherwise; at another --img-size position embeddings
are resampled. `--split` takes `test`, `train`, or the name of any other split or folder of the data set.

Classes are matched by name where model and data set both name theirs: a data set with some of the model's classes
(ImageNet-A, ImageNet-R, mini-ImageNet with their WordNet folder names) is scored on these alone. `--valid-labels` does
so by number: a file with one of the model's class numbers per line, in the order of the data set's classes, or the name
of a list that timm has (imagenet_a, imagenet_r, mini_imagenet). `--real-labels` scores ImageNet's validation images by
the reassessed labels of arXiv 2006.07159 (timm's; or a JSON file of that form): right is any of an image's labels,
images without one are left out.

The calibration error is the expected one: 15 bins of equal width by confidence, mean difference of confidence and
accuracy, weighted by images. Speed is batch size by the median seconds of a full batch's forward pass, the first one
not counted; data loading is not part of it.

Errors: an unknown model or folder, a model without weights, an image size it cannot have, classes that do not fit;
each is one message.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from common import HelpFormatter, Progress, RunError, main_guard, parse, start
from timm.data import ImageNetInfo, RealLabelsImagenet, infer_imagenet_subset, resolve_model_data_config
from torch import nn
from training import add_model_options, open_model, pair, parse_kwargs

from timm_resnas.data import Splits, eval_batches, eval_transform, load_splits

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
        'images_per_second' of one process (None with fewer than two full batches).
    """
    model.eval()
    device = accelerator.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss
    bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # images, confidence, correct
    index = None if classes is None else torch.tensor(classes, device=device)
    seconds: list[tuple[int, float]] = []
    for done, (x, y) in enumerate(batches, start=1):
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
        size = max((n for n, _ in seconds), default=0)
        full = [s for n, s in seconds if n == size][1:]
        scores["images_per_second"] = size / statistics.median(full) if full else None
    return scores


def format_scores(scores: dict[str, Any]) -> str:
    """'top-1 0.9861  top-5 …' in one line."""
    names = {"top1": "top-1", "top5": "top-5", "loss": "loss", "ece": "calibration error"}
    parts = [f"{names[k]} {scores[k]:.4f}" for k in names if k in scores]
    if scores.get("images_per_second"):
        parts.append(f"{scores['images_per_second']:.1f} images/s")
    return f"{'  '.join(parts)}  ({scores['images']} images)"


# -- classes ----------------------------------------------------------------------------------------------------------


def class_names_of(model: nn.Module) -> list[str] | None:
    """Names of a model's classes: those it was saved with, or ImageNet's WordNet ids by their number."""
    if names := model.pretrained_cfg.get("label_names"):
        return list(names)
    # a folder or hub repository of any data set may have 1000 classes; it names them then
    subset = infer_imagenet_subset(model)
    return ImageNetInfo(subset).label_names() if subset else None


def match_classes(model: nn.Module, data_names: Sequence[str]) -> list[int] | None:
    """The model's class for each of the data's, or None where they are the same.

    Raises:
        RunError: Their classes do not fit.
    """
    names = class_names_of(model)
    if names is not None and list(names) == list(data_names):
        return None
    if names is not None and set(data_names) <= set(names):
        number = {name: i for i, name in enumerate(names)}
        return [number[name] for name in data_names]
    if model.num_classes == len(data_names) and (names is None or not set(data_names) & set(names)):
        return None  # other words for the same classes, as far as one can know
    missing = sorted(set(data_names) - set(names or []))
    raise RunError(
        f"the model has {model.num_classes} classes, the data {len(data_names)}, "
        + (f"of which the model does not know {', '.join(missing[:5])}" if names else "and the model's have no names")
        + "; take a model trained on these classes, or --valid-labels"
    )


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


# -- the recipe -------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_options(parser)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", default="digits", help="digits, fashion-mnist:<dir>, imagefolder:<dir> or hf:<id or folder>"
    )
    group.add_argument("--split", default="test", help="test, train, or another split's or folder's name")
    group.add_argument("--batch-size", type=int, default=256, help="images per batch of a process")
    group.add_argument("--workers", type=int, default=0, help="data loading processes")
    group.add_argument("--crop-pct", type=float, metavar="X", help="centre crop, as a share of the resized image")
    group.add_argument("--crop-mode", choices=["center", "squash", "border"], help="how an image becomes the crop")
    group.add_argument("--interpolation", choices=["bilinear", "bicubic", "nearest"], help="of resizing")
    group.add_argument("--valid-labels", metavar="FILE_OR_NAME", help="the model's class numbers that the data has")
    group.add_argument(
        "--real-labels", nargs="?", const="timm", metavar="FILE", help="ImageNet's reassessed labels (timm's, or JSON)"
    )
    group = parser.add_argument_group("run")
    group.add_argument("--config", metavar="FILE.yaml", help="defaults for any option; flags override them")
    group.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    group.add_argument("--amp", choices=["no", "bf16", "fp16"], default="no", help="mixed precision")
    group.add_argument("--threads", type=int, default=0, help="CPU threads per process, 0: cores / local processes")
    group.add_argument("--seed", type=int, default=0, help="of models that draw at random when they answer")
    group.add_argument("--json", metavar="FILE", help="write the scores there; - prints nothing else")
    parser.set_defaults(output=".", log_with=None)
    return parser


def open_split(args: argparse.Namespace) -> tuple[Splits, Any]:
    """The data set and the part of it that is asked for."""
    if args.split in ("train", "test"):
        splits = load_splits(args.dataset)
        return splits, getattr(splits, args.split)
    splits = load_splits(args.dataset, test_split=args.split)
    return splits, splits.test


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser()
    args = parse(parser, argv)
    with main_guard("evaluate.py"):
        if args.model is None:
            raise RunError("--model is missing: a name, a folder or hf-hub:<id>")
        if args.batch_size < 1:
            raise RunError(f"--batch-size must be at least 1, got {args.batch_size}")
        accelerator = start(args)
        model = open_model(
            args.model,
            pretrained=True,
            pretrained_path=args.pretrained_path,
            allow_pickle=args.allow_pickle,
            img_size=pair(args.img_size),
            kwargs=parse_kwargs("--model-kwargs", args.model_kwargs),
        ).to(accelerator.device)
        wanted = {k: getattr(args, k) for k in ("crop_pct", "crop_mode", "interpolation")}
        config = resolve_model_data_config(model, args={k: v for k, v in wanted.items() if v is not None})
        if args.img_size:
            config["input_size"] = (config["input_size"][0], *pair(args.img_size))
        splits, part = open_split(args)
        real = None
        if args.real_labels is not None:
            real = read_real_labels(args.real_labels, part)
            part = part.remove_columns("label").add_column("label", np.arange(len(part)))  # labels are images' numbers
            classes = None
        elif args.valid_labels is not None:
            classes = read_valid_labels(args.valid_labels, model, splits.num_classes)
        else:
            classes = match_classes(model, splits.class_names)
        batches = eval_batches(
            part,
            eval_transform(config),
            args.batch_size,
            memory_limit=0,  # one pass
            num_workers=args.workers,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            device=accelerator.device,
        )
        with Progress(len(batches), "evaluate", accelerator.is_local_main_process) as bar:
            scores = evaluate(accelerator, model, batches, classes=classes, real=real, timed=True, report=bar)
        result = {
            "model": args.model,
            "params": sum(p.numel() for p in model.parameters()),
            "dataset": args.dataset,
            "split": args.split,
            "classes": splits.num_classes if real is None else model.num_classes,
            "labels": "data" if real is None else "real",
            **{k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
            "batch_size": args.batch_size,
            "unreadable": len(batches.corrupt),
            **scores,
        }
        if accelerator.is_main_process:
            if args.json == "-":
                print(json.dumps(result, indent=1))
            else:
                print(f"{args.model} on {args.dataset}, {args.split}, {result['input_size'][1:]} px")
                print(format_scores(scores))
                if args.json:
                    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
            sys.stdout.flush()
        return result


if __name__ == "__main__":
    main()
