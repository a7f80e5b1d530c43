"""Training or fine-tuning any model: options that fit, data and model as the run needs them, weights that are kept."""

from __future__ import annotations

import functools
import inspect
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import numpy as np
import timm
import torch
from accelerate import Accelerator
from timm.data import Mixup, resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.task import ClassificationTask, LogitDistillationTask, TokenDistillationTask, TrainingTask
from torch import nn

import timm_resnas

from ..data import (
    EvalBatches,
    MultiScaleLoader,
    Splits,
    TokenMix,
    TrainLoader,
    adapt_channels,
    default_data_config,
    multiscale_loader,
    stream_loader,
    train_loader,
    train_transform,
)
from ..hub import save_pretrained
from ..models.token_reduction import DynamicViT
from ..models.vit_tokens import reduce_tokens
from ..nas.count import expected_macs, macs_vary
from ..tasks import (
    DynamicViTTask,
    HardLabelDistillationTask,
    MixedDepthTask,
    SoftLabelDistillationTask,
    TokenLabelingTask,
    dynamicvit_groups,
)
from .baseline import describe, score_baseline, verdict
from .data import augmentation, cached_parts, cut_validation, image_pair, open_splits, without_background
from .evaluate import evaluate, format_scores
from .models import align_classes, class_names_of, model_source, open_model, parse_kwargs, record_of
from .processes import full_precision
from .run import Run, RunError
from .seeds import Stream, step_seed
from .settings import TrainOptions
from .training import Training, check_passes

__all__ = ["ModelTraining", "TrainData", "check_options", "finish", "learning_rate", "make_teacher", "prepare"]

COUNTED = 64  # images, at most, that expected MACs are the mean of


def check_options(options: TrainOptions, world: int) -> None:
    """Whether options fit each other.

    Raises:
        RunError: They do not.
    """
    if options.model is None:
        raise RunError("--model is missing: a name, a folder or hf-hub:<id>")
    check_passes(options, world)
    passes = world * options.accumulate
    if options.mix == "mixup" and options.batch_size // passes % 2:
        raise RunError(f"--mix mixup pairs images: a pass has {options.batch_size // passes} of them, an odd number")
    if options.mix == "mixup" and max(options.mixup_alpha, options.cutmix_alpha) <= 0:
        raise RunError("--mix mixup needs --mixup-alpha or --cutmix-alpha above 0; to mix nothing take --mix none")
    if options.opt.lower() not in list_optimizers():
        raise RunError(f"--opt {options.opt} is not one of timm's: {', '.join(list_optimizers())}")
    if options.teacher is None and options.teacher_path is not None:
        raise RunError("--teacher-path needs --teacher, the model that the file's weights are of")
    if options.teacher is not None and options.mix == "token":
        raise RunError("--teacher and --mix token do not go together; take --mix mixup or none")
    if options.recursions and (options.teacher is not None or options.mix == "token"):
        raise RunError("--recursions goes neither with --teacher nor with --mix token")
    if options.reduce_kwargs and options.reduce_tokens is None:
        raise RunError("--reduce-kwargs needs --reduce-tokens, the method that they are of")
    if options.reduce_tokens == "dynamicvit" and not (options.pretrained or options.pretrained_path):
        raise RunError("--reduce-tokens dynamicvit starts from trained weights: give --pretrained or --pretrained-path")
    if options.streaming and (options.val_per_class or options.multi_scale):
        other = (
            "--val-per-class 0: no validation images can be cut from it" if options.val_per_class else "one image size"
        )
        raise RunError(f"--streaming reads the training part once an epoch, in order; it needs {other}")
    if options.multi_scale and options.mix == "token":
        raise RunError("--multi-scale does not go with --mix token, whose models have one image size")


def learning_rate(options: TrainOptions) -> float:
    """The highest learning rate: --lr, or --lr-base for the global batch."""
    return options.lr if options.lr is not None else options.lr_base * options.batch_size / options.lr_base_size


class TrainData(NamedTuple):
    """What a run trains on and chooses by."""

    splits: Splits
    train: list[int] | None  # indices into splits.train; None: a stream, all of it
    val: list[int]
    config: dict[str, Any]  # timm's data_config

    @property
    def num_train(self) -> int:
        return self.splits.num_train if self.train is None else len(self.train)


def prepare(options: TrainOptions, run: Run) -> tuple[nn.Module, TrainData]:
    """The model, untrained or with the weights it starts from, and the data as it needs them.

    Raises:
        ValueError: Data, model or image size cannot be used; the message says what would be right.
    """
    train: list[int] | None = None
    val: list[int] = []
    if options.streaming:
        splits = open_splits(options, streaming=True, num_train=options.num_train)
    else:
        splits = open_splits(options)
        record = record_of(model_source(options.model)) if options.pretrained else None
        sizes = (options.val_per_class, options.val_fraction, options.seed)
        train, val, _ = cached_parts(run, splits, lambda: cut_validation(splits, *sizes, record))
    num_train = splits.num_train if train is None else len(train)
    if num_train < options.batch_size:
        raise RunError(
            f"--batch-size {options.batch_size} is more than the {num_train} training images of {options.dataset}"
        )
    for note in splits.notes:
        run.print(f"note: {note}")
    model = create_model(options, splits.num_classes)
    fits = True
    if options.pretrained or options.pretrained_path:
        fits = start_from_classes(model, splits, options, run)
    if options.reduce_tokens is not None:
        model = reduced(model, options)
    if isinstance(model, DynamicViT) and not fits:
        raise RunError(
            f"{options.model} was trained on other classes than those of {options.dataset}; a DynamicViT learns from "
            f"the network that it starts from: fine-tune that on this data first"
        )
    if isinstance(model, DynamicViT) and not (options.pretrained or options.pretrained_path):
        raise RunError(f"{options.model} is a DynamicViT, which starts from trained weights: give --pretrained")
    config = data_config(options, splits, train, model)
    if options.multi_scale and model.pretrained_cfg.get("fixed_input_size"):
        raise RunError(
            f"--multi-scale needs a model for images of any size; {options.model} is built for one image size"
        )
    # what the task, the teacher and the saved folder take the model's preprocessing from
    model.pretrained_cfg.update(without_background(config), num_classes=splits.num_classes)
    return model, TrainData(splits, train, val, config)


def create_model(options: TrainOptions, num_classes: int) -> nn.Module:
    kwargs = parse_kwargs("--model-kwargs", options.model_kwargs)
    if options.drop_path is not None:
        kwargs["drop_path_rate"] = options.drop_path
    if options.mix == "token":
        kwargs.setdefault("patch_head", True)
    if options.teacher is not None and options.distill == "token" and options.model.startswith("vit_res"):
        kwargs.setdefault("distill_token", True)
    torch.manual_seed(step_seed(options.seed, Stream.WEIGHTS))
    model = open_model(
        options.model,
        pretrained=options.pretrained,
        pretrained_path=options.pretrained_path,
        allow_pickle=options.allow_pickle,
        num_classes=num_classes,
        img_size=image_pair(options.img_size),
        kwargs=kwargs,
    )
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    if options.mix != "token" and getattr(model, "patch_head", None) is not None:
        model.patch_head.requires_grad_(False)  # nothing trains it, and processes wait for all gradients
    return model


def reduced(model: nn.Module, options: TrainOptions) -> nn.Module:
    """The model with fewer tokens.

    Raises:
        RunError: The method or its options do not fit the model.
    """
    torch.manual_seed(step_seed(options.seed, Stream.WEIGHTS, 1))  # predictors, a merger
    try:
        return reduce_tokens(model, options.reduce_tokens, **parse_kwargs("--reduce-kwargs", options.reduce_kwargs))
    except (TypeError, ValueError) as e:
        raise RunError(f"--reduce-tokens {options.reduce_tokens} on {options.model}: {e}") from None


def start_from_classes(model: nn.Module, splits: Splits, options: TrainOptions, run: Run) -> bool:
    """Bring a loaded classifier into the data's order of classes; one of other classes is initialised.

    Returns:
        Whether it was trained on the data's classes, as far as the model tells.
    """
    if class_names_of(model) is None:
        return model.pretrained_cfg["num_classes"] == splits.num_classes
    try:
        align_classes(model, splits.class_names, options.model, options.dataset)
    except ValueError:
        if model.num_classes == splits.num_classes:
            model.reset_classifier(splits.num_classes)
            run.print(f"note: {options.model} was trained on other classes; its classifier is initialised")
        return False
    return True


def data_config(options: TrainOptions, splits: Splits, train: list[int] | None, model: nn.Module) -> dict[str, Any]:
    """Preprocessing: the model's own; that of the data for small grey images and a model without weights."""
    in_chans, *size = model.pretrained_cfg["input_size"]
    in_chans = getattr(model, "in_chans", in_chans)
    size = list(image_pair(options.img_size) or size)
    if options.pretrained or options.pretrained_path or splits.in_chans != 1 or max(splits.native_size) > 64:
        config = resolve_model_data_config(model)
    else:
        config = default_data_config(splits, tuple(size), in_chans=in_chans, indices=train)
    given = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
    config.update({k: getattr(options, k) for k in given if getattr(options, k) is not None})
    config["input_size"] = [in_chans, *size]
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    return {**adapt_channels(config, in_chans), "background": splits.background}


def make_task(options: TrainOptions, model: nn.Module, data: TrainData, device: torch.device) -> TrainingTask:
    """The timm task that gives the loss.

    Raises:
        ValueError: The model lacks what the task needs, or the teacher does not fit.
    """
    criterion = dict(soft_targets=True) if options.mix != "none" else dict(smoothing=options.smoothing)
    common: dict[str, Any] = dict(device=device, verbose=False)
    if isinstance(model, DynamicViT):
        if options.teacher is not None or options.recursions or options.mix == "token":
            raise RunError(
                f"{options.model} is trained as a DynamicViT, whose teacher is itself with all of its tokens: without "
                f"--teacher, --recursions and --mix token"
            )
        return DynamicViTTask(model, criterion_kwargs=criterion, ratio_weight=options.ratio_weight, **common)
    if options.teacher is not None:
        common["temperature"] = options.temperature
        teacher = make_teacher(options, data).to(device)
        if options.distill == "soft-label":
            return SoftLabelDistillationTask(model, teacher, **common)
        common["criterion_kwargs"] = criterion
        common.update(distill_loss_weight=options.distill_weight, task_loss_weight=1 - options.distill_weight)
        if options.distill == "hard":
            return HardLabelDistillationTask(model, teacher, **common)
        if options.distill == "logit":
            return LogitDistillationTask(model, teacher, **common)
        if not getattr(model, "has_dist", hasattr(model, "head_dist")):
            raise RunError(
                f"--distill token needs a model with a distillation token; {options.model} has none. "
                f"ViT-ResNAS: --model-kwargs distill_token=true"
            )
        return TokenDistillationTask(model, teacher, distill_type=options.distill_type, **common)
    if options.recursions:
        return MixedDepthTask(model, options.recursions, criterion_kwargs=criterion, **common)
    if options.mix == "token":
        return TokenLabelingTask(model, patch_weight=options.patch_weight, **common)
    return ClassificationTask(model, criterion_kwargs=criterion, **common)


def make_teacher(options: Any, data: Any) -> nn.Module:
    """The trained model to learn from, for the student's images.

    Args:
        options: ``teacher, teacher_path, dataset``, and ``allow_pickle`` where there is one.
        data: The student's ``splits`` and ``config``.
    """
    teacher = open_model(
        options.teacher,
        pretrained=True,
        pretrained_path=options.teacher_path,
        allow_pickle=getattr(options, "allow_pickle", False),
        img_size=tuple(data.config["input_size"][1:]),
    )
    try:
        align_classes(teacher, data.splits.class_names, f"--teacher {options.teacher}", options.dataset)
    except ValueError as e:
        raise RunError(f"{e}; fine-tune the teacher on this data first") from None
    if teacher.pretrained_cfg["input_size"][0] != data.config["input_size"][0]:
        raise RunError(f"--teacher {options.teacher} takes images of another number of channels than the student")
    return teacher.eval().requires_grad_(False)


def make_mix(
    options: TrainOptions, model: nn.Module, data: TrainData
) -> Callable[[torch.Tensor, torch.Tensor, int], Any]:
    """A function of (images, labels, seed, whether to mix) that returns images and the task's target."""
    num_classes = data.splits.num_classes
    if options.mix == "none":
        return lambda x, y, seed, on: (x, y)
    if options.mix == "token":
        tokens = TokenMix(
            num_classes,
            model.grids[-1],
            smoothing=options.smoothing,
            mixup_alpha=options.mixup_alpha,
            fix_edges=options.fix_edges,
        )

        def mix_tokens(x, y, seed, on):
            if on:
                x, *targets = tokens(x, y, seed)
                return x, targets
            targets = tokens.one_hot(y)
            return x, (targets, targets[:, None].expand(-1, math.prod(model.grids[-1]), -1))

        return mix_tokens
    mixup = Mixup(
        mixup_alpha=options.mixup_alpha,
        cutmix_alpha=options.cutmix_alpha,
        prob=options.mix_prob,
        switch_prob=options.mix_switch_prob,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
    )

    def mix(x, y, seed, on):
        np.random.seed(seed & 0xFFFFFFFF)  # what timm's Mixup draws from
        mixup.mixup_enabled = on
        return mixup(x, y)

    return mix


def make_loader(options: TrainOptions, accelerator: Accelerator, data: TrainData) -> TrainLoader | MultiScaleLoader:
    """Training batches, this process's share of them."""
    size = tuple(data.config["input_size"][1:])
    given = dict(
        seed=options.seed,
        num_workers=options.workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
    )
    if not options.multi_scale:
        transform = train_transform(data.config, **augmentation(options, data.splits, size))
        if data.train is None:
            given.update(num_images=data.num_train, num_shards=options.stream_shards)
            return stream_loader(data.splits.train, transform, options.batch_size, **given)
        return train_loader(data.splits.train.select(data.train), transform, options.batch_size, **given)
    images = data.splits.train.select(data.train)
    transforms = []
    for side in options.multi_scale:
        config = {**data.config, "input_size": [data.config["input_size"][0], side, side]}
        transforms.append(train_transform(config, **augmentation(options, data.splits, (side, side))))
    multiple = accelerator.num_processes * options.accumulate * (2 if options.mix == "mixup" else 1)
    return multiscale_loader(images, transforms, options.batch_size, base_size=size, multiple=multiple, **given)


def make_optimizer(options: TrainOptions, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; weight decay and learning rates of layers as the options say.

    Raises:
        RunError: The optimizer refuses its arguments.
    """
    groups = None
    if isinstance(model, DynamicViT):
        if options.decay_pos_embed or options.layer_decay is not None:
            raise RunError(
                "a DynamicViT has learning rates of its own, and frozen positions: leave out --layer-decay and "
                "--decay-pos-embed"
            )
        groups = functools.partial(
            dynamicvit_groups, weight_decay=options.weight_decay, backbone_scale=options.backbone_lr
        )
    elif options.decay_pos_embed or options.layer_decay is not None:
        spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
        if options.decay_pos_embed:
            spared = {name for name in spared if not name.endswith("pos_embed")}
        given: dict[str, Any] = dict(weight_decay=options.weight_decay, no_weight_decay_list=spared)
        groups = functools.partial(param_groups_weight_decay, **given)
        if options.layer_decay is not None:
            groups = functools.partial(param_groups_layer_decay, layer_decay=options.layer_decay, **given)
    try:
        return create_optimizer_v2(
            model,
            opt=options.opt,
            lr=learning_rate(options),
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            param_group_fn=groups,
            **parse_kwargs("--opt-kwargs", options.opt_kwargs),
        )
    except (TypeError, ValueError) as e:
        raise RunError(f"--opt {options.opt}: {e}") from None


class ModelTraining(Training):
    """Trains one model; the best weights by validation accuracy, raw or averaged, are kept.

    Args:
        options: The job's options.
        accelerator: See `Training`.
        run: See `Training`.
        model: See `prepare`.
        data: See `prepare`.
        val: Validation images, this process's share; None: the last epoch's weights are taken.
        facts: More to be said of the weights in the config.json of saved folders, JSON-plain.
    """

    def __init__(
        self,
        options: TrainOptions,
        accelerator: Accelerator,
        run: Run,
        model: nn.Module,
        data: TrainData,
        val: EvalBatches | None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.facts = dict(facts or {})
        self.shares: list[torch.Tensor] = []  # of tokens that a DynamicViT kept in the last pass
        if options.sync_bn and accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            model = convert_sync_batchnorm(model)
        model = model.to(accelerator.device)
        self.data, self.val = data, val
        self.mix = make_mix(options, model, data)
        task = self.make_task(options, model, accelerator.device)
        if options.ema:  # before the model is wrapped
            task.setup_ema(decay=options.ema_decay, use_warmup=options.ema_warmup)
        task.to(accelerator.device)
        loader = make_loader(options, accelerator, data)
        super().__init__(options, accelerator, run, task, model, loader, self.make_optimizer(options, model))

    def make_task(self, options: TrainOptions, model: nn.Module, device: torch.device) -> TrainingTask:
        """What gives the loss, see `make_task`."""
        return make_task(options, model, self.data, device)

    def make_optimizer(self, options: TrainOptions, model: nn.Module) -> torch.optim.Optimizer:
        """See `make_optimizer`."""
        return make_optimizer(options, model)

    def loss(self, images: torch.Tensor, labels: torch.Tensor, epoch: int, step: int, number: int) -> torch.Tensor:
        """See `Training.loss`."""
        seed = step_seed(self.options.seed, Stream.DROP_PATH, self.state.step, number)
        torch.manual_seed(seed)  # drop path, dropout, SReT's permutations
        images, target = self.mix(images, labels, seed, epoch < self.options.epochs - self.options.mix_off_epochs)
        with self.accelerator.autocast():
            found = self.task(images, target)
        self.shares = [share for name, share in found.items() if name.startswith("kept_")]
        return found["loss"]

    def step(self, images: torch.Tensor, labels: torch.Tensor, epoch: int, step: int) -> torch.Tensor:
        """See `Training.step`; all but a DynamicViT's predictors stand still at first."""
        for group in self.optimizer.param_groups:
            if group.get("backbone"):
                group["lr_scale"] = 0.0 if epoch < self.options.freeze_epochs else self.options.backbone_lr
        return super().step(images, labels, epoch, step)

    def validate(self) -> dict[str, float]:
        """Top-1 accuracy of the weights, raw and averaged."""
        if self.val is None:
            return {}
        models = self.weights().items()
        return {name: round(evaluate(self.accelerator, model, self.val)["top1"], 5) for name, model in models}

    def keep(self, record: dict[str, Any]) -> None:
        """Save weights that are among the best."""
        for best, weights in best_of(self.records(), self.options.keep):
            if best == record["epoch"]:
                self.save(self.kept(best, weights), record, weights)

    def saved(self) -> None:
        """Remove weights that are no longer among the best; only once a checkpoint has the epoch that beat them."""
        wanted = {self.kept(*best).name for best in best_of(self.records(), self.options.keep)}
        for folder in (self.run / "kept").glob("*"):
            if folder.name not in wanted:
                shutil.rmtree(folder)

    def kept(self, epoch: int, weights: str) -> Path:
        """Folder of kept weights."""
        return self.run / "kept" / f"epoch-{epoch:03}-{weights}"

    def save(self, folder: Path, record: dict[str, Any], weights: str) -> None:
        """Today's weights, 'raw' or 'ema', as a folder that timm loads."""
        facts = {
            "weights": weights,
            "epoch": record["epoch"],
            "val_top1": record["accuracy"].get(weights),
            "trained": {k: getattr(self.options, k) for k in ("model", "dataset", "epochs", "seed", "pretrained")},
            **self.facts,
        }
        model, data = self.weights()[weights], self.data
        with full_precision(model):
            save_pretrained(
                model,
                folder,
                info=facts,
                label_names=data.splits.class_names,
                data_config=data.config,
                base_model=True if self.options.pretrained and timm.is_model(self.options.model) else None,
            )

    def choose(self) -> dict[str, Any]:
        """Make ``best/``; returns 'epoch', 'weights', 'by' and 'val_top1'."""
        self.share_buffers()
        records, run = self.records(), self.run
        chosen = best_of(records, 1)
        epoch, weights = chosen[0] if chosen else (self.options.epochs, list(self.weights())[-1])
        record = next(r for r in records if r["epoch"] == epoch)
        if run.is_main:
            if epoch == self.options.epochs:
                self.save(run / "best", record, weights)
            else:
                shutil.rmtree(run / "best", ignore_errors=True)
                shutil.copytree(self.kept(epoch, weights), run / "best")
        self.accelerator.wait_for_everyone()
        return {
            "epoch": epoch,
            "weights": weights,
            "by": "validation accuracy" if chosen else "being the last",
            "val_top1": record["accuracy"].get(weights),
        }


def _takes(model: str, argument: str) -> bool:
    """Whether a registered model's class has a constructor argument of this name."""
    if ":" in model or not timm.is_model(model):
        return False
    with torch.device("meta"):
        return argument in inspect.signature(type(timm.create_model(model)).__init__).parameters


def best_of(records: list[dict[str, Any]], count: int) -> list[tuple[int, str]]:
    """(epoch, 'raw' or 'ema') of highest validation accuracy, best first; of equals, the later and the averaged."""
    found = [(a, r["epoch"], w == "ema", w) for r in records for w, a in r["accuracy"].items()]
    return [(epoch, w) for _, epoch, _, w in sorted(found, reverse=True)[:count]]


def finish(training: ModelTraining, macs: int, batches: Callable[..., Any]) -> dict[str, Any]:
    """best/, the test accuracies and results.json.

    Args:
        training: At its end.
        macs: Of the model; the most, where they depend on the image.
        batches: A function of (images, data_config) that gives a part's batches.
    """
    options, accelerator, run, data = training.options, training.accelerator, training.run, training.data
    chosen = training.choose()
    if training.shares:
        kept, aims = (", ".join(f"{float(s):.2f}" for s in n) for n in (training.shares, training.model.keep_ratios))
        run.print(
            f"shares of tokens kept in the last pass: {kept}; from now on: {aims}. The nearer they are, the less is "
            f"lost: by more --epochs, or a higher --ratio-weight"
        )
    run.print(f"\ntest, {len(data.splits.test)} images that nothing was chosen on:")
    tests = {}
    # the folder is loaded and fed the way a user would
    best = timm.create_model(f"local-dir:{run / 'best'}", pretrained=True).to(accelerator.device)
    models = {**{f"last {k}": m for k, m in training.weights().items()}, "best": best}
    for name, model in models.items():
        config = data.config
        if name == "best":
            config = {**resolve_model_data_config(model), "background": data.splits.background}
        tests[name] = evaluate(accelerator, model, batches(data.splits.test, config))
        which = f" (epoch {chosen['epoch']}, {chosen['weights']})" if name == "best" else ""
        run.print(f"  {name + which:24} {format_scores(tests[name])}")
    baseline, expected = None, {}
    if run.is_main:
        if macs_vary(best):
            seen = next(iter(batches(data.splits.test, data.config)))[0][:COUNTED]
            expected = {"macs_expected": round(expected_macs(best, seen)), "macs_images": len(seen)}
            mean, most = expected["macs_expected"] / 1e6, macs / 1e6
            run.print(f"  {'MACs':24} {mean:,.1f} M expected, mean of {len(seen)} test images; at most {most:,.1f} M")
        baseline = score_baseline(data.splits, data.config, options.workers)
        run.print(f"  {'random forest':24} top-1 {baseline['test'] / baseline['images']:.4f}")
        weak = verdict(tests["best"]["top1"], baseline, options.pretrained or options.pretrained_path is not None)
        run.print("\n".join([describe(baseline), *([weak] if weak else [])]))
    results = {
        "command": shlex.join(["accelerate", "launch", *sys.argv]),
        "model": options.model,
        "params": sum(p.numel() for p in training.model.parameters()),
        "macs": macs,
        **expected,
        "input_size": data.config["input_size"],
        "dataset": options.dataset,
        "images": {"train": data.num_train, "val": len(data.val), "test": len(data.splits.test)},
        "seed": options.seed,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": learning_rate(options),
        "chosen": chosen,
        "test": tests,
        "baseline": baseline,
        "seconds": round(training.state.seconds, 1),
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
