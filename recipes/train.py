"""Train or fine-tune any model of timm or timm_resnas: a name, a search's `best/`, any saved folder, a Hub id.

    accelerate launch recipes/train.py                                       # recipes/configs/digits.yaml, a CPU
    accelerate launch recipes/train.py --model runs/digits-micro/best --dataset digits          # from scratch
    accelerate launch recipes/train.py --model runs/digits-micro/best --pretrained --lr 2e-4    # inherited weights
    accelerate launch recipes/train.py --model runs/photos/best --pretrained --img-size 128 --dataset imagefolder:photos
    accelerate launch --multi_gpu --num_processes 8 recipes/train.py \\
        --config recipes/configs/vit_resnas_tiny.yaml --dataset imagefolder:imagenet

`recipes/configs/` has a file for each model, with its paper's numbers. What there is: timm's augmentations, optimizers
and schedules; learning rate by batch size (`--lr-base`), layer-wise decay of it; gradient clipping and accumulation;
weight averaging (`--ema`); drop path; Mixup and CutMix, or token-level mixing with token labels (`--mix token`); a
teacher (`--teacher`, `--distill`); several recursion depths at once (`--recursions`); batches of several image sizes
(`--multi-scale`); fine-tuning at another resolution (`--img-size`, position embeddings are resampled); bf16 and fp16;
one process or many.

Which weights are taken is never decided on test images. With a validation part, cut from the training images by seed
(`--val-per-class`), it is the epoch and the weights, raw or averaged, of highest validation accuracy, and the best
`--keep` are kept; without (0), it is the last epoch's, averaged ones if there are any. The test images are
looked at once, when training is over.

A run's folder holds `config.yaml`, `best/` (config.json and model.safetensors, for `timm.create_model`), `kept/`,
`training.jsonl`, `training.png`, `results.json` and `state/`. Killed at any moment and started with the same command, a
run goes on from its last checkpoint and ends with the same weights: batches, augmentation, mixing, drop path and
learning rate are functions of the seed and the step. Another number of processes may go on with it, too, unless
--multi-scale makes other batches for it.

Errors, each said before anything is trained: an unknown model, folder or data set, weights that do not fit, an image
size that the model cannot have, a batch that processes and passes do not divide, options that contradict each other or
those the run was started with. A loss that is not finite ends the run with the last good checkpoint in place.
"""

import argparse
import contextlib
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from common import (
    Clock,
    HelpFormatter,
    Progress,
    Run,
    RunError,
    add_run_options,
    dataset_name,
    format_minutes,
    main_guard,
    parse,
    start,
    step_seed,
)
from evaluate import evaluate, format_scores
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from timm.data import Mixup, resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.task import ClassificationTask, LogitDistillationTask, TokenDistillationTask, TrainingTask
from timm.utils import dispatch_clip_grad
from torch import nn
from training import (
    Checkpoints,
    add_augmentation_options,
    add_model_options,
    agree,
    augmentation,
    check_weights,
    cut_validation,
    diverged,
    full_precision,
    make_schedule,
    model_source,
    open_model,
    pair,
    parse_kwargs,
    record_of,
)

import timm_resnas
from timm_resnas.data import (
    EvalBatches,
    MultiScaleLoader,
    Splits,
    TokenMix,
    TrainLoader,
    default_data_config,
    eval_batches,
    eval_transform,
    load_splits,
    multiscale_loader,
    stream_loader,
    train_loader,
    train_transform,
)
from timm_resnas.hub import save_pretrained
from timm_resnas.nas.count import count_macs
from timm_resnas.nas.jsonl import append_jsonl, read_jsonl, write_jsonl
from timm_resnas.tasks import (
    HardLabelDistillationTask,
    MixedDepthTask,
    SoftLabelDistillationTask,
    TokenLabelingTask,
)

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"
CHECK_STEPS = 50  # how often processes agree on the loss and on whether a checkpoint is due
SCHEDULES = ("cosine", "tanh", "poly", "step", "multistep", "wsd", "constant")

# Options that do not decide the weights; a run with other values of all others needs another folder.
FREE = {
    *("config", "output", "name", "cpu", "threads", "log_with", "workers", "keep"),
    *("checkpoint_minutes", "checkpoint_steps", "allow_pickle"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_run_options(parser)
    group = add_model_options(parser)
    group.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="start from the model's weights: its folder's, the Hub's",
    )
    group.add_argument("--drop-path", type=float, metavar="P", help="stochastic depth rate")
    group.add_argument(
        "--grad-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute activations twice, to save memory",
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", default="digits", help="digits, fashion-mnist:<dir>, imagefolder:<dir> or hf:<id or folder>"
    )
    group.add_argument(
        "--val-per-class",
        type=int,
        default=25,
        metavar="N",
        help="images of each class, cut from the training part, that weights are chosen on; 0: take the last epoch's",
    )
    group.add_argument(
        "--val-fraction", type=float, default=0.1, help="the same for classes of under 5 times as many images"
    )
    group.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read the training part of hf:<id> while it is trained on, without storing it (with --val-per-class 0)",
    )
    group.add_argument("--num-train", type=int, metavar="N", help="images of a stream that does not say how many")
    group.add_argument(
        "--lanes", type=int, metavar="N", help="files of a stream that are read side by side; a multiple of processes"
    )
    group.add_argument("--crop-pct", type=float, metavar="X", help="centre crop at evaluation, of the resized image")
    group.add_argument("--crop-mode", choices=["center", "squash", "border"], help="how an image becomes that crop")
    group.add_argument("--interpolation", choices=["bilinear", "bicubic"], help="of resizing")
    group.add_argument("--mean", type=float, nargs="+", metavar="X", help="of pixels (default: the model's or data's)")
    group.add_argument("--std", type=float, nargs="+", metavar="X", help="of pixels (default: the model's or data's)")
    group.add_argument("--workers", type=int, default=0, help="data loading processes")
    group.add_argument(
        "--multi-scale",
        type=int,
        nargs="*",
        metavar="N",
        help="sides of training images, one drawn for each step; larger ones in smaller batches",
    )
    add_augmentation_options(parser)

    group = parser.add_argument_group("mixing")
    group.add_argument(
        "--mix",
        choices=["none", "mixup", "token"],
        default="none",
        help="timm's Mixup and CutMix, or CutMix on the token grid and Mixup with a label for every token",
    )
    group.add_argument("--mixup-alpha", type=float, default=0.8, metavar="X", help="of Mixup's Beta distribution")
    group.add_argument("--cutmix-alpha", type=float, default=1.0, metavar="X", help="of CutMix's (--mix mixup)")
    group.add_argument("--mix-prob", type=float, default=1.0, metavar="P", help="of mixing a batch (--mix mixup)")
    group.add_argument("--mix-switch-prob", type=float, default=0.5, metavar="P", help="of CutMix (--mix mixup)")
    group.add_argument("--mix-off-epochs", type=int, default=0, metavar="N", help="do not mix in the last N epochs")
    group.add_argument("--patch-weight", type=float, default=1.0, metavar="X", help="of the token loss (--mix token)")
    group.add_argument(
        "--fix-edges",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let boxes touch all edges alike (--mix token)",
    )
    group.add_argument("--smoothing", type=float, default=0.1, metavar="X", help="label smoothing")

    group = parser.add_argument_group("teacher")
    group.add_argument("--teacher", metavar="MODEL", help="a model with weights: a name, a folder or hf-hub:<id>")
    group.add_argument("--teacher-path", metavar="FILE", help="the teacher's weights, where its name has none")
    group.add_argument(
        "--distill",
        choices=["soft-label", "hard", "logit", "token"],
        default="soft-label",
        help="the teacher's probabilities alone (SReT), its decisions beside labels (CaiT), its probabilities beside "
        "labels (timm), or a distillation token (DeiT)",
    )
    group.add_argument("--distill-type", choices=["hard", "soft"], default="hard", help="of --distill token")
    group.add_argument("--distill-weight", type=float, default=0.5, metavar="X", help="the teacher's; labels: the rest")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="divides logits in distillation")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=30, help="training epochs")
    group.add_argument("--batch-size", type=int, default=64, help="images per step, over all processes and passes")
    group.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="passes that a process cuts its part of a step into"
    )
    group.add_argument(
        "--recursions", type=int, nargs="*", metavar="R", help="recursion depths to train at once (SReT only)"
    )
    group.add_argument("--opt", default="adamw", help="timm's name of an optimizer")
    group.add_argument("--opt-kwargs", nargs="*", default=[], metavar="NAME=VALUE", help="its further arguments")
    group.add_argument("--momentum", type=float, default=0.9, help="where the optimizer has it")
    group.add_argument("--weight-decay", type=float, default=0.05, help="not on biases, norms, tokens, positions")
    group.add_argument(
        "--decay-pos-embed",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="weight decay on position embeddings, too",
    )
    group.add_argument("--layer-decay", type=float, metavar="X", help="learning rate of a layer, by that of the next")
    group.add_argument("--lr", type=float, help="highest learning rate (default: by --lr-base)")
    group.add_argument(
        "--lr-base", type=float, default=5e-4, help="highest learning rate at --lr-base-size; it is linear in the batch"
    )
    group.add_argument("--lr-base-size", type=int, default=512, metavar="N", help="batch size that --lr-base is for")
    group.add_argument("--sched", choices=SCHEDULES, default="cosine", help="timm's schedule of the learning rate")
    group.add_argument("--min-lr", type=float, default=1e-5, help="learning rate at its end; not scaled by batch size")
    group.add_argument("--warmup-epochs", type=float, default=1, help="epochs of linear warm-up, a part of --epochs")
    group.add_argument("--warmup-lr", type=float, default=1e-6, help="learning rate that it starts from; not scaled")
    group.add_argument(
        "--clip-grad", type=float, metavar="X", help="largest gradient, as --clip-mode measures it; 0: any"
    )
    group.add_argument("--clip-mode", choices=["norm", "value", "agc"], default="norm", help="of gradient clipping")
    group.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="average the weights over steps, and evaluate these, too",
    )
    group.add_argument("--ema-decay", type=float, default=0.9998, metavar="X", help="share of the old average per step")
    group.add_argument(
        "--ema-warmup", action=argparse.BooleanOptionalAction, default=False, help="average over fewer steps at first"
    )
    group.add_argument(
        "--sync-bn",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="batch norm over all processes (CUDA only)",
    )
    group.add_argument("--eval-every", type=int, default=1, metavar="EPOCHS", help="how often to validate")
    group.add_argument("--keep", type=int, default=1, metavar="N", help="how many of the best weights to keep in kept/")
    group.add_argument(
        "--checkpoint-minutes", type=float, default=15, metavar="N", help="checkpoints within long epochs"
    )
    group.add_argument(
        "--checkpoint-steps", type=int, default=0, metavar="N", help="the same by steps; 0: by minutes only"
    )
    return parser


def check_options(args: argparse.Namespace, world: int) -> None:
    """Whether options fit each other.

    Raises:
        RunError: They do not.
    """
    low = dict(epochs=1, batch_size=1, accumulate=1, eval_every=1, keep=1, val_per_class=0, checkpoint_steps=0)
    for name, least in {**low, "mix_off_epochs": 0}.items():
        if getattr(args, name) < least:
            raise RunError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    passes = world * args.accumulate
    if args.batch_size % passes:
        raise RunError(
            f"--batch-size {args.batch_size} cannot be dealt evenly to {world} process{'es' * (world > 1)} of "
            f"{args.accumulate} pass{'es' * (args.accumulate > 1)}; take a multiple of {passes}"
        )
    if args.mix == "mixup" and args.batch_size // passes % 2:
        raise RunError(f"--mix mixup pairs images: a pass has {args.batch_size // passes} of them, an odd number")
    if args.mix == "mixup" and max(args.mixup_alpha, args.cutmix_alpha) <= 0:
        raise RunError("--mix mixup needs --mixup-alpha or --cutmix-alpha above 0; to mix nothing take --mix none")
    if args.opt.lower() not in list_optimizers():
        raise RunError(f"--opt {args.opt} is none of timm's: {', '.join(list_optimizers())}")
    if args.teacher is None and args.teacher_path is not None:
        raise RunError("--teacher-path needs --teacher, the model that the file's weights are of")
    if args.teacher is not None and args.mix == "token":
        raise RunError("--teacher and --mix token do not go together; take --mix mixup or none")
    if args.recursions and (args.teacher is not None or args.mix == "token"):
        raise RunError("--recursions goes neither with --teacher nor with --mix token")
    if args.streaming and (args.val_per_class or args.multi_scale):
        other = "--val-per-class 0: no validation images can be cut from it" if args.val_per_class else "one image size"
        raise RunError(f"--streaming reads the training part once an epoch, in order; it needs {other}")
    if args.multi_scale and args.mix == "token":
        raise RunError("--multi-scale does not go with --mix token, whose models have one image size")


def learning_rate(args: argparse.Namespace) -> float:
    """The highest learning rate: --lr, or --lr-base for the global batch."""
    return args.lr if args.lr is not None else args.lr_base * args.batch_size / args.lr_base_size


# -- data and model ---------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What a run trains on and chooses by."""

    splits: Splits
    train: list[int] | None  # indices into splits.train; None: a stream, all of it
    val: list[int]
    config: dict[str, Any]  # timm's data_config

    @property
    def num_train(self) -> int:
        return self.splits.num_train if self.train is None else len(self.train)


def prepare(args: argparse.Namespace, run: Run) -> tuple[nn.Module, Data]:
    """The model, untrained or with the weights it starts from, and the data as it needs them.

    Raises:
        ValueError: Data, model or image size cannot be used; the message says what would be right.
    """
    train: list[int] | None = None
    val: list[int] = []
    if args.streaming:
        splits = load_splits(args.dataset, streaming=True, num_train=args.num_train)
    else:
        splits = load_splits(args.dataset)
        record = record_of(model_source(args.model)) if args.pretrained else None
        sizes = (args.val_per_class, args.val_fraction, args.seed)
        train, val = run.once("data.json", lambda: cut_validation(splits, *sizes, record))
        if len(train) + len(val) != len(splits.train):
            raise RunError(f"{args.dataset} is not what {run.folder} was started with; give this run another --name")
    num_train = splits.num_train if train is None else len(train)
    if num_train < args.batch_size:
        raise RunError(f"--batch-size {args.batch_size} is more than the {num_train} training images of {args.dataset}")
    model = build(args, splits.num_classes)
    config = data_config(args, splits, train, model)
    if args.multi_scale and model.pretrained_cfg.get("fixed_input_size"):
        raise RunError(f"--multi-scale needs a model for images of any size; {args.model} is built for one image size")
    # what the task, the teacher and the saved folder take the model's preprocessing from
    model.pretrained_cfg.update(config, num_classes=splits.num_classes)
    return model, Data(splits, train, val, config)


def build(args: argparse.Namespace, num_classes: int) -> nn.Module:
    kwargs = parse_kwargs("--model-kwargs", args.model_kwargs)
    if args.drop_path is not None:
        kwargs["drop_path_rate"] = args.drop_path
    if args.mix == "token":
        kwargs.setdefault("patch_head", True)
    if args.teacher is not None and args.distill == "token" and args.model.startswith("vit_res"):
        kwargs.setdefault("distill_token", True)
    torch.manual_seed(step_seed(args.seed, 1))
    model = open_model(
        args.model,
        pretrained=args.pretrained,
        pretrained_path=args.pretrained_path,
        allow_pickle=args.allow_pickle,
        num_classes=num_classes,
        img_size=pair(args.img_size),
        kwargs=kwargs,
    )
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.mix != "token" and getattr(model, "patch_head", None) is not None:
        model.patch_head.requires_grad_(False)  # nothing trains it, and processes wait for all gradients
    return model


def data_config(args: argparse.Namespace, splits: Splits, train: list[int] | None, model: nn.Module) -> dict[str, Any]:
    """Preprocessing: the model's own; that of the data for small grey images and a model without weights."""
    in_chans, *size = model.pretrained_cfg["input_size"]
    in_chans = getattr(model, "in_chans", in_chans)
    size = list(pair(args.img_size) or size)
    if args.pretrained or args.pretrained_path or splits.in_chans != 1 or max(splits.native_size) > 64:
        config = resolve_model_data_config(model)
    else:
        config = default_data_config(splits, tuple(size), in_chans=in_chans, indices=train)
    given = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
    config.update({k: getattr(args, k) for k in given if getattr(args, k) is not None})
    config["input_size"] = [in_chans, *size]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


def make_task(args: argparse.Namespace, model: nn.Module, data: Data, device: torch.device) -> TrainingTask:
    """The timm task that gives the loss.

    Raises:
        ValueError: The model lacks what the task needs, or the teacher does not fit.
    """
    criterion = dict(soft_targets=True) if args.mix != "none" else dict(smoothing=args.smoothing)
    common: dict[str, Any] = dict(device=device, verbose=False)
    if args.teacher is not None:
        common["temperature"] = args.temperature
        teacher = make_teacher(args, data).to(device)
        if args.distill == "soft-label":
            return SoftLabelDistillationTask(model, teacher, **common)
        common["criterion_kwargs"] = criterion
        common.update(distill_loss_weight=args.distill_weight, task_loss_weight=1 - args.distill_weight)
        if args.distill == "hard":
            return HardLabelDistillationTask(model, teacher, **common)
        if args.distill == "logit":
            return LogitDistillationTask(model, teacher, **common)
        if not getattr(model, "has_dist", hasattr(model, "head_dist")):
            raise RunError(
                f"--distill token needs a model with a distillation token; {args.model} has none. "
                f"ViT-ResNAS: --model-kwargs distill_token=true"
            )
        return TokenDistillationTask(model, teacher, distill_type=args.distill_type, **common)
    if args.recursions:
        return MixedDepthTask(model, args.recursions, criterion_kwargs=criterion, **common)
    if args.mix == "token":
        return TokenLabelingTask(model, patch_weight=args.patch_weight, **common)
    return ClassificationTask(model, criterion_kwargs=criterion, **common)


def make_teacher(args: argparse.Namespace, data: Data) -> nn.Module:
    """The trained model to learn from, for the student's images."""
    teacher = open_model(
        args.teacher,
        pretrained=True,
        pretrained_path=args.teacher_path,
        allow_pickle=args.allow_pickle,
        img_size=tuple(data.config["input_size"][1:]),
    )
    if teacher.num_classes != data.splits.num_classes:
        raise RunError(
            f"--teacher {args.teacher} has {teacher.num_classes} classes, {args.dataset} {data.splits.num_classes}; "
            f"fine-tune it on this data first"
        )
    if teacher.pretrained_cfg["input_size"][0] != data.config["input_size"][0]:
        raise RunError(f"--teacher {args.teacher} takes images of another number of channels than the student")
    return teacher.eval().requires_grad_(False)


def make_mix(
    args: argparse.Namespace, model: nn.Module, data: Data
) -> Callable[[torch.Tensor, torch.Tensor, int], Any]:
    """A function of (images, labels, seed, whether to mix) that returns images and the task's target."""
    num_classes = data.splits.num_classes
    if args.mix == "none":
        return lambda x, y, seed, on: (x, y)
    if args.mix == "token":
        tokens = TokenMix(
            num_classes,
            model.grids[-1],
            smoothing=args.smoothing,
            mixup_alpha=args.mixup_alpha,
            fix_edges=args.fix_edges,
        )

        def mix_tokens(x, y, seed, on):
            if on:
                x, *targets = tokens(x, y, seed)
                return x, targets
            targets = tokens.one_hot(y)
            return x, (targets, targets[:, None].expand(-1, math.prod(model.grids[-1]), -1))

        return mix_tokens
    mixup = Mixup(
        mixup_alpha=args.mixup_alpha,
        cutmix_alpha=args.cutmix_alpha,
        prob=args.mix_prob,
        switch_prob=args.mix_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )

    def mix(x, y, seed, on):
        np.random.seed(seed & 0xFFFFFFFF)  # what timm's Mixup draws from
        mixup.mixup_enabled = on
        return mixup(x, y)

    return mix


def make_loader(args: argparse.Namespace, accelerator: Accelerator, data: Data) -> TrainLoader | MultiScaleLoader:
    """Training batches, this process's share of them."""
    size = tuple(data.config["input_size"][1:])
    given = dict(
        seed=args.seed,
        num_workers=args.workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
    )
    if not args.multi_scale:
        transform = train_transform(data.config, **augmentation(args, data.splits, size))
        if data.train is None:
            given.update(num_images=data.num_train, lanes=args.lanes)
            return stream_loader(data.splits.train, transform, args.batch_size, **given)
        return train_loader(data.splits.train.select(data.train), transform, args.batch_size, **given)
    images = data.splits.train.select(data.train)
    transforms = []
    for side in args.multi_scale:
        config = {**data.config, "input_size": [data.config["input_size"][0], side, side]}
        transforms.append(train_transform(config, **augmentation(args, data.splits, (side, side))))
    multiple = accelerator.num_processes * args.accumulate * (2 if args.mix == "mixup" else 1)
    return multiscale_loader(images, transforms, args.batch_size, base_size=size, multiple=multiple, **given)


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; weight decay and learning rates of layers as the options say.

    Raises:
        RunError: The optimizer refuses its arguments.
    """
    groups = None
    if args.decay_pos_embed or args.layer_decay is not None:
        spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
        if args.decay_pos_embed:
            spared = {name for name in spared if not name.endswith("pos_embed")}
        given: dict[str, Any] = dict(weight_decay=args.weight_decay, no_weight_decay_list=spared)
        groups = functools.partial(param_groups_weight_decay, **given)
        if args.layer_decay is not None:
            groups = functools.partial(param_groups_layer_decay, layer_decay=args.layer_decay, **given)
    try:
        return create_optimizer_v2(
            model,
            opt=args.opt,
            lr=learning_rate(args),
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            param_group_fn=groups,
            **parse_kwargs("--opt-kwargs", args.opt_kwargs),
        )
    except (TypeError, ValueError) as e:
        raise RunError(f"--opt {args.opt}: {e}") from None


# -- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Position:
    """Where training stands; part of every checkpoint."""

    step: int = 0
    loss_sum: float = 0.0  # over the steps since the last record
    loss_steps: int = 0
    seconds: float = 0.0


class Training:
    """A run's moving parts: task, optimizer, loader and where they stand."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, run: Run, model: nn.Module, data: Data):
        self.args, self.accelerator, self.run, self.data = args, accelerator, run, data
        if args.sync_bn and accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            model = convert_sync_batchnorm(model)
        self.model = model.to(accelerator.device)
        self.loader = make_loader(args, accelerator, data)
        self.steps = len(self.loader)
        self.mix = make_mix(args, model, data)
        self.task = make_task(args, model, data, accelerator.device)
        if args.ema:
            # before the model is wrapped; the task itself is never prepared, or it would be wrapped twice
            self.task.setup_ema(decay=args.ema_decay, use_warmup=args.ema_warmup)
        self.task.to(accelerator.device)
        optimizer = make_optimizer(args, model)
        self.schedule = make_schedule(args, optimizer, self.steps)
        self.task.trainable_module, self.optimizer = accelerator.prepare(model, optimizer)
        self.checkpoints = Checkpoints(accelerator, run)
        self.position = self.resume()

    @property
    def ema(self) -> nn.Module | None:
        """The model with averaged weights."""
        return self.task.get_trainable_module(ema=True).module if self.task.has_ema() else None

    def weights(self) -> dict[str, nn.Module]:
        """Models to choose from."""
        return {"raw": self.model, **({} if self.ema is None else {"ema": self.ema})}

    def resume(self) -> Position:
        state = self.checkpoints.newest()
        if state is None:
            return Position()
        if state.get("steps", self.steps) != self.steps:
            raise RunError(
                f"{self.run.folder} was started with {state['steps']} steps an epoch; with this number of processes "
                f"there are {self.steps} (--multi-scale). Go on with as many processes as before, or give this run "
                f"another --name"
            )
        for name, model in self.weights().items():
            model.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return Position(**state["position"])

    def save_checkpoint(self) -> None:
        """Save everything that going on needs.

        Raises:
            RunError: A weight is not finite.
        """
        check_weights(self.model, self.position.step)
        state: dict[str, Any] = {name: model.state_dict() for name, model in self.weights().items()}
        state.update(optimizer=self.optimizer.state_dict(), position=asdict(self.position), steps=self.steps)
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        self.checkpoints.save(self.position.step, state)

    def backward(self, x: torch.Tensor, y: torch.Tensor, on: bool) -> torch.Tensor:
        """Gradients of a step from this process's images, in one pass or several; returns the mean loss."""
        args, n = self.args, self.args.accumulate
        total = x.new_zeros(())
        first = self.accelerator.process_index * n  # passes of all processes count up from 0
        for i, (images, labels) in enumerate(zip(x.chunk(n), y.chunk(n), strict=True)):
            seed = step_seed(args.seed, 3, self.position.step, first + i)
            torch.manual_seed(seed)  # drop path, dropout, SReT's permutations
            images, target = self.mix(images, labels, seed, on)
            # processes exchange gradients once, in the last pass
            with self.accelerator.no_sync(self.task.trainable_module) if i + 1 < n else contextlib.nullcontext():
                with self.accelerator.autocast():
                    loss = self.task(images, target)["loss"] / n
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def step(self, x: torch.Tensor, y: torch.Tensor, on: bool) -> torch.Tensor:
        """One update of the weights, and of their average; returns the loss."""
        self.task.train()
        self.schedule.step_update(self.position.step)
        loss = self.backward(x, y, on)
        if self.args.clip_grad:
            self.accelerator.unscale_gradients(self.optimizer)
            dispatch_clip_grad(self.task.get_clip_parameters(), self.args.clip_grad, mode=self.args.clip_mode)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.position.step += 1
        self.task.update_ema(step=self.position.step)
        return loss

    def run_epochs(self, val: EvalBatches | None) -> None:
        """Train to the end.

        Raises:
            RunError: The loss or a weight is not finite.
        """
        args, accelerator, run, position = self.args, self.accelerator, self.run, self.position
        steps, total = self.steps, args.epochs * self.steps
        clock, begun, saved = Clock(), position.step, 0.0
        before = position.seconds
        losses: list[torch.Tensor] = []
        for epoch in range(position.step // steps, args.epochs):
            skip = position.step - epoch * steps
            on = epoch < args.epochs - args.mix_off_epochs
            with Progress(steps, f"epoch {epoch + 1}/{args.epochs}", accelerator.is_local_main_process) as bar:
                for step, (x, y) in enumerate(self.loader.epoch(epoch, skip), start=skip):
                    losses.append(self.step(x, y, on))
                    bar(step + 1)
                    ended = step + 1 == steps
                    due = args.checkpoint_steps > 0 and position.step % args.checkpoint_steps == 0
                    if not (ended or due or position.step % CHECK_STEPS == 0):
                        continue
                    late = clock.seconds() - saved > args.checkpoint_minutes * 60
                    loss, late = agree(accelerator, losses, late)
                    if not math.isfinite(loss):
                        raise RunError(diverged(f"the loss is {loss}", position.step))
                    position.loss_sum += loss * len(losses)
                    position.loss_steps += len(losses)
                    losses = []
                    position.seconds = before + clock.seconds()
                    accelerator.log({"loss": loss, "lr": self.learning_rate()}, step=position.step)
                    if ended and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs):
                        record = self.take_record(epoch, val)
                        left = clock.seconds() / (position.step - begun) * (total - position.step)
                        shown = "".join(f"  val {k} {v:.4f}" for k, v in record["accuracy"].items())
                        run.say(f"  epoch {epoch + 1:3}  loss {record['loss']:.3f}{shown}  left {format_minutes(left)}")
                    if ended or due or late:
                        self.save_checkpoint()
                        saved = clock.seconds()
                        if run.is_main:
                            self.drop_others()
            accelerator.wait_for_everyone()

    def learning_rate(self) -> float:
        """That of layers without layer-wise decay."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def share_buffers(self) -> None:
        """Running statistics of batch norm differ between processes; the first one's are those that count."""
        for model in self.weights().values():
            broadcast(list(model.buffers()))

    # -- records and the weights that are kept

    def records(self) -> list[dict[str, Any]]:
        return read_jsonl(self.run / "training.jsonl")

    def take_record(self, epoch: int, val: EvalBatches | None) -> dict[str, Any]:
        """Validate, put the result into training.jsonl, training.png and the tracker, keep weights of the best."""
        accuracy = {}
        if val is not None:
            self.share_buffers()
            for name, model in self.weights().items():
                accuracy[name] = round(evaluate(self.accelerator, model, val)["top1"], 5)
        position = self.position
        record = {
            "epoch": epoch + 1,
            "step": position.step,
            "loss": round(position.loss_sum / position.loss_steps, 5),
            "lr": self.learning_rate(),
            "accuracy": accuracy,
            "seconds": round(position.seconds, 2),
        }
        position.loss_sum, position.loss_steps = 0.0, 0
        self.accelerator.log({f"accuracy/{k}": v for k, v in accuracy.items()}, step=position.step)
        if self.run.is_main:
            append_jsonl(self.run / "training.jsonl", [record])
            records = self.records()
            draw_training(self.run / "training.png", records)
            for best, weights in best_of(records, self.args.keep):
                if best == epoch + 1:
                    self.save(self.kept(best, weights), record, weights)
        return record

    def kept(self, epoch: int, weights: str) -> Path:
        return self.run / "kept" / f"epoch-{epoch:03}-{weights}"

    def drop_others(self) -> None:
        """Remove weights that are no longer among the best; only once a checkpoint has the epoch that beat them."""
        wanted = {self.kept(*best).name for best in best_of(self.records(), self.args.keep)}
        for folder in (self.run / "kept").glob("*"):
            if folder.name not in wanted:
                shutil.rmtree(folder)

    def save(self, folder: Path, record: dict[str, Any], weights: str) -> None:
        """Today's weights, 'raw' or 'ema', as a folder that timm loads."""
        facts = {
            "weights": weights,
            "epoch": record["epoch"],
            "val_top1": record["accuracy"].get(weights),
            "trained": {k: getattr(self.args, k) for k in ("model", "dataset", "epochs", "seed", "pretrained")},
        }
        model = self.weights()[weights]
        with full_precision(model):
            save_pretrained(
                model, folder, info=facts, label_names=self.data.splits.class_names, data_config=self.data.config
            )


def best_of(records: list[dict[str, Any]], count: int) -> list[tuple[int, str]]:
    """(epoch, 'raw' or 'ema') of highest validation accuracy, best first; of equals, the later and the averaged."""
    found = [(a, r["epoch"], w == "ema", w) for r in records for w, a in r["accuracy"].items()]
    return [(epoch, w) for _, epoch, _, w in sorted(found, reverse=True)[:count]]


def draw_training(path: Path, records: list[dict[str, Any]]) -> None:
    """Validation accuracy where there is any, loss and learning rate, by epoch."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [r["epoch"] for r in records]
    if records[-1]["accuracy"]:
        for name, color in (("raw", "#2b2d42"), ("ema", "#d1495b")):
            if name in records[-1]["accuracy"]:
                values = [r["accuracy"][name] for r in records]
                label = {"raw": "weights", "ema": "averaged weights"}[name]
                left.plot(epochs, values, color=color, marker="o", markersize=3, label=label)
        left.set_ylabel("validation accuracy")
        left.legend(fontsize=8, loc="lower right")
    else:
        left.plot(epochs, [r["lr"] for r in records], color="#2b2d42", marker="o", markersize=3)
        left.set_ylabel("learning rate")
    right.plot(epochs, [r["loss"] for r in records], color="#3e7cb1", marker="o", markersize=3)
    right.set_ylabel("training loss")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    fresh = path.with_name(f".{path.name}.new")
    figure.savefig(fresh, dpi=130, format="png")
    fresh.replace(path)


# -- the end ----------------------------------------------------------------------------------------------------------


def finish(training: Training) -> dict[str, Any]:
    """best/, the test accuracies and results.json."""
    args, accelerator, run, data = training.args, training.accelerator, training.run, training.data
    check_weights(training.model, training.position.step)
    training.share_buffers()
    records = training.records()
    chosen = best_of(records, 1)
    weights = chosen[0][1] if chosen else list(training.weights())[-1]
    epoch = chosen[0][0] if chosen else args.epochs
    record = next(r for r in records if r["epoch"] == epoch)
    if run.is_main:
        if epoch == args.epochs:
            training.save(run / "best", record, weights)
        else:
            shutil.rmtree(run / "best", ignore_errors=True)
            shutil.copytree(training.kept(epoch, weights), run / "best")
    accelerator.wait_for_everyone()

    run.say(f"\ntest, {len(data.splits.test)} images that nothing was chosen on:")
    tests = {}
    # the folder is loaded and fed the way a user would
    best = timm.create_model(f"local-dir:{run / 'best'}", pretrained=True).to(accelerator.device)
    models = {**{f"last {k}": m for k, m in training.weights().items()}, "best": best}
    for name, model in models.items():
        config = resolve_model_data_config(model) if name == "best" else data.config
        batches = eval_batches(
            data.splits.test,
            eval_transform(config),
            num_workers=args.workers,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            device=accelerator.device,
        )
        tests[name] = evaluate(accelerator, model, batches)
        run.say(
            f"  {name + (f' (epoch {epoch}, {weights})' if name == 'best' else ''):24} {format_scores(tests[name])}"
        )
    results = {
        "command": " ".join(["accelerate", "launch", *sys.argv]),
        "model": args.model,
        "params": sum(p.numel() for p in training.model.parameters()),
        "macs": count_macs(best, tuple(data.config["input_size"])),
        "input_size": data.config["input_size"],
        "dataset": args.dataset,
        "images": {"train": data.num_train, "val": len(data.val), "test": len(data.splits.test)},
        "seed": args.seed,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": learning_rate(args),
        "chosen": {
            "epoch": epoch,
            "weights": weights,
            "by": "validation accuracy" if chosen else "being the last",
            "val_top1": record["accuracy"].get(weights),
        },
        "test": tests,
        "seconds": round(training.position.seconds, 1),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "versions": {m.__name__: m.__version__ for m in (timm_resnas, timm, torch, accelerate)},
    }
    run.write_json("results.json", results)
    if run.is_main:
        shutil.rmtree(run.state / "training", ignore_errors=True)
    accelerator.wait_for_everyone()
    return results


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not any(a.split("=")[0] in ("--model", "--config", "-h", "--help") for a in argv):
        argv = ["--config", str(DEFAULT_CONFIG), *argv]
    args = parse(make_parser(), argv)
    with main_guard("train.py"):
        if args.model is None:
            raise RunError("--model is missing: a name, a folder or hf-hub:<id>")
        accelerator = start(args)
        check_options(args, accelerator.num_processes)
        # runs/<name>/best and hub ids: the last part that says something
        parts = [p for p in Path(args.model.partition(":")[2] or args.model).parts if p != "best"]
        name = "-".join([dataset_name(args.dataset), *parts[-1:]])
        run = Run(args, accelerator, name, sorted(set(vars(args)) - FREE))
        if run.resumed and (run / "results.json").exists():
            tests = json.loads((run / "results.json").read_text())["test"]
            run.say(f"trained before: {run / 'best'}  test {format_scores(tests['best'])}")
            return
        model, data = prepare(args, run)
        training = Training(args, accelerator, run, model, data)
        run.begin()
        if run.is_main:  # a kill may have come between a record and its checkpoint
            write_jsonl(run / "training.jsonl", [r for r in training.records() if r["step"] <= training.position.step])
        val = None
        if data.val:
            val = eval_batches(
                data.splits.train,
                eval_transform(data.config),
                indices=data.val,
                num_workers=args.workers,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                device=accelerator.device,
            )
        total = args.epochs * training.steps
        scaled = "" if args.lr is not None else f" ({args.lr_base:g} x {args.batch_size} / {args.lr_base_size})"
        macs = count_macs(model, tuple(data.config["input_size"]))
        run.say(
            f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {macs / 1e6:,.1f} MMACs at "
            f"{data.config['input_size'][1]} x {data.config['input_size'][2]}; {data.num_train} images to train on, "
            f"{len(data.val)} to choose weights by, {len(data.splits.test)} to test\n"
            f"{args.epochs} epochs of {training.steps} steps of {args.batch_size} images, learning rate up to "
            f"{learning_rate(args):g}{scaled}"
            + (f"; goes on at step {training.position.step} of {total}" if training.position.step else "")
        )
        training.run_epochs(val)
        finish(training)
        run.say(f"done: {run / 'best'}")
        accelerator.end_training()


if __name__ == "__main__":
    main()
