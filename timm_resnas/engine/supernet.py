"""Training a supernet: data, space, sub-networks of each step, and the folder ``supernet/`` at the end."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from timm.data import resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from ..data import (
    EvalBatches,
    Splits,
    TokenMix,
    content_hashes,
    default_data_config,
    eval_batches,
    eval_transform,
    read_split,
    train_loader,
    train_transform,
    training_record,
)
from ..families.elastic_space import ElasticSpace
from ..hub import load, save_pretrained
from ..nas.count import count_macs
from ..nas.evaluate import count_correct
from ..nas.sampling import MultiArchSampler, SandwichSampler, SelectedSampler
from ..nas.space import SearchSpace
from ..nas.supernet import Supernet
from ..tasks import NasVitTask, SandwichTask, SupernetTask, TokenLabelLoss
from .data import (
    HASHED_IMAGES,
    augmentation,
    cached_parts,
    cut_validation,
    image_pair,
    open_splits,
    without_background,
)
from .processes import full_precision
from .run import Run, RunError, read_json
from .seeds import Stream, generator, step_seed
from .settings import SupernetOptions
from .train import make_teacher
from .training import Training, check_passes

__all__ = [
    "SearchData",
    "make_optimizer",
    "make_sampler",
    "networks_per_image",
    "open_run",
    "open_space",
    "prepare",
    "recalibrate",
    "seen_images",
    "train_supernet",
    "val_batches",
]

RECALIBRATION_BATCH = 64  # images whose statistics are taken at once
SAMPLERS = {"balanced": MultiArchSampler, "sandwich": SandwichSampler, "selected": SelectedSampler}


class SearchData(NamedTuple):
    """What a supernet is trained on and scored on."""

    splits: Splits
    space: SearchSpace
    train: list[int]  # indices into splits.train
    val: list[int]
    config: dict[str, Any]  # timm's data_config


def open_space(name: str) -> SearchSpace:
    """A search space by a preset's name, by a timm vision transformer's, whose narrower forms it then holds, or from a
    JSON file of what `SearchSpace.to_dict` gives.

    Raises:
        ValueError: The name is not known, or the file holds no space.
    """
    if not name.endswith(".json"):
        known = SearchSpace.preset_names()
        return ElasticSpace(name) if name not in known and timm.is_model(name) else SearchSpace.preset(name)
    try:
        return SearchSpace.from_dict(read_json(Path(name)))
    except ValueError as e:
        raise RunError(f"--space {name}: {e}") from None


def prepare(options: SupernetOptions, run: Run) -> SearchData:
    """Open the data, cut the search's validation set, fit the space to the images.

    Raises:
        ValueError: The data, the space, the image size or the groups cannot be used; the message says what would be
            right.
    """
    check_step(options, PartialState().num_processes)
    space = open_space(options.space or "micro")
    check_space(options, space)
    size = image_pair(options.img_size) or tuple(space.model_args["img_size"])
    space.at(img_size=size)  # raises before the data are read
    in_chans = space.model_args["in_chans"]
    if in_chans not in (1, 3):
        raise RunError(f"--space {options.space} is of images of {in_chans} channels; data sets have 3, or 1 for grey")
    splits = open_splits(options)
    sizes = (options.val_per_class, options.val_fraction, options.seed)
    train, val, _ = cached_parts(run, splits, lambda: cut_validation(splits, *sizes))
    if len(train) < options.batch_size:
        raise RunError(
            f"--batch-size {options.batch_size} is more than the {len(train)} training images of {options.dataset}"
        )
    config = default_data_config(splits, size, in_chans=in_chans, indices=train)
    config["background"] = splits.background
    return SearchData(splits, space.at(img_size=size, num_classes=splits.num_classes), train, val, config)


def check_step(options: SupernetOptions, world: int = 1) -> None:
    """Whether options fit the step rule, and batches the processes.

    Raises:
        RunError: They do not.
    """
    step = options.step
    check_passes(options, world, groups=num_archs(options) if step == "groups" else None)
    if step == "single" and num_archs(options) != 1:
        raise RunError(f"--step single trains one sub-network a step, not --num-archs {options.num_archs}")
    if step != "groups" and options.sampler != "balanced":
        raise RunError(f"--sampler {options.sampler} is for --step groups; --step {step} has its own draws")
    sandwich = step in ("sandwich", "nasvit")
    if (sandwich or step == "paths") and options.token_labeling:
        raise RunError(f"--token-labeling is for --step groups and single; {step} trains one classifier")
    if options.teacher is not None and not sandwich:
        raise RunError("--teacher is for --step sandwich and nasvit, in which the largest network learns from it")
    if options.teacher is None and options.teacher_path is not None:
        raise RunError("--teacher-path needs --teacher, the model that the file's weights are of")
    for name in ("clip_others", "project_epoch"):
        if getattr(options, name) is not None and step != "nasvit":
            raise RunError(f"--{name.replace('_', '-')} is for --step nasvit, not {step}")
    for name in ("mode", "num_archs"):
        if step == "paths" and getattr(options, name) != getattr(SupernetOptions(), name):
            option = f"--{name.replace('_', '-')}"
            raise RunError(f"{option} is for steps of sub-networks; --step paths trains the largest network")
    for name in ("path_noise", "path_temperature"):
        if getattr(options, name) != getattr(SupernetOptions(), name) and step != "paths":
            raise RunError(f"--{name.replace('_', '-')} is for --step paths, not {step}")


def check_space(options: SupernetOptions, space: SearchSpace) -> None:
    """Whether options fit the space.

    Raises:
        ValueError: They do not.
    """
    if options.token_labeling and "patch_head" not in space.training_args:
        raise RunError(
            f"--token-labeling needs a classifier of patches, which networks of --space {options.space} lack"
        )
    if options.step == "paths" and not space.mixes:
        raise RunError(
            f"--step paths is for blocks of several paths, as in --space efficientformer_micro; those of "
            f"{options.space or 'micro'} have one"
        )
    if options.switchable_scale is not None and not space.scales:
        raise RunError(
            f"--switchable-scale is for spaces of ViT-ResNAS and AutoFormer; blocks of {options.space} have none"
        )
    make_sampler(options, space)
    TokenLabelLoss(patch_weight=options.patch_weight)


def num_archs(options: SupernetOptions) -> int:
    """Sub-networks of a step."""
    return options.num_archs or (1 if options.step in ("single", "paths") else 4)


def networks_per_image(options: SupernetOptions, space: SearchSpace) -> float:
    """What a step computes of each image, at most, as a multiple of the largest network."""
    if options.step == "paths":
        with torch.device("meta"):
            mixed = timm.create_model(space.supernet, space=space.to_dict()).mixture("none", 1.0)
        size = (space.model_args["in_chans"], *space.model_args["img_size"])
        return count_macs(mixed, size) / space.costs(space.largest)["macs"]
    if options.step not in ("sandwich", "nasvit"):
        return 1.0
    least, most = space.cost_range("macs")
    return 1 + least / most + (num_archs(options) - 2) * (least + most) / 2 / most


def make_sampler(options: SupernetOptions, space: SearchSpace) -> MultiArchSampler:
    """What says which sub-networks a step trains."""
    kind = SAMPLERS["sandwich" if options.step in ("sandwich", "nasvit") else options.sampler]
    return kind(space, num_archs(options), options.seed, options.arch_warmup_epochs)


def make_task(options: SupernetOptions, net: Supernet, data: SearchData, device: torch.device) -> SupernetTask:
    """The step rule.

    Raises:
        ValueError: The teacher or the supernet does not fit it.
    """
    common: dict[str, Any] = dict(smoothing=options.smoothing, device=device, verbose=False)
    if options.step in ("groups", "single"):
        labels = dict(token_labeling=options.token_labeling, patch_weight=options.patch_weight)
        return SupernetTask(net, **labels, **common)
    if options.teacher is not None:
        common.update(teacher=make_teacher(options, data).to(device), temperature=options.temperature)
    if options.step == "sandwich":
        return SandwichTask(net, **common)
    clip = 1.0 if options.clip_others is None else options.clip_others
    first = max(1, options.epochs // 4) if options.project_epoch is None else options.project_epoch
    return NasVitTask(net, clip_others=clip, project_epoch=first, **common)


def val_batches(data: SearchData, device: torch.device, workers: int = 0) -> EvalBatches:
    """The search's validation images, in fixed batches."""
    transform = eval_transform(data.config)
    return eval_batches(data.splits.train, transform, indices=data.val, device=device, num_workers=workers)


def create_supernet(options: SupernetOptions, data: SearchData) -> Supernet:
    """The untrained supernet; it carries its data's preprocessing."""
    torch.manual_seed(step_seed(options.seed, Stream.WEIGHTS))
    given: dict[str, Any] = {"patch_head": True} if options.token_labeling else {}
    if options.switchable_scale is not None:
        given["switchable_scale"] = options.switchable_scale
    return timm.create_model(
        data.space.supernet,
        space=data.space.to_dict(),
        drop_path_rate=options.drop_path,
        pretrained_cfg_overlay={**without_background(data.config), "num_classes": data.splits.num_classes},
        **given,
    )


def recalibrate(options: SupernetOptions, net: Supernet, data: SearchData, device: torch.device) -> None:
    """Give a supernet with batch norm the training images, without augmentation, of its batch statistics."""
    count = min(options.calibration, len(data.train))
    count -= count % RECALIBRATION_BATCH if count > RECALIBRATION_BATCH else 0  # equal batches
    chosen = generator(options.seed, Stream.CALIBRATION).permutation(np.asarray(data.train))[:count]

    def batches() -> Iterator[torch.Tensor]:  # decoded where they are asked for
        transform = eval_transform(data.config)
        for images, _ in eval_batches(
            *(data.splits.train, transform, RECALIBRATION_BATCH),
            indices=chosen.tolist(),
            device=device,
            num_workers=options.workers,
        ):
            yield images

    net.recalibrate(batches())


class SupernetTraining(Training):
    """Each step trains sub-networks by the step rule of the options; see `train_supernet`."""

    def __init__(
        self,
        options: SupernetOptions,
        accelerator: Accelerator,
        run: Run,
        data: SearchData,
        net: Supernet,
        sort: bool = True,
    ) -> None:
        self.sort = sort
        loader = train_loader(
            data.splits.train.select(data.train),
            train_transform(data.config, **augmentation(options, data.splits, tuple(data.config["input_size"][1:]))),
            options.batch_size,
            seed=options.seed,
            num_workers=options.workers,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            device=accelerator.device,
        )
        if options.sync_bn and accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            net = convert_sync_batchnorm(net)  # timm's: torch's leaves out activations that are part of a norm
        self.net, model = net, net
        if options.step == "paths":
            model = net.mixture(options.path_noise, options.path_temperature)
            loss = nn.CrossEntropyLoss(label_smoothing=options.smoothing)
            task: TrainingTask = ClassificationTask(model, loss, device=accelerator.device, verbose=False)
        else:
            task = make_task(options, net, data, accelerator.device)
        self.mix = None
        if options.token_labeling:
            self.mix = TokenMix(net.num_classes, net.grids[-1], smoothing=options.smoothing)
        self.sampler = make_sampler(options, data.space)
        self.passes = accelerator.num_processes * options.accumulate
        self.batches = val_batches(data, accelerator.device, options.workers)
        rng = generator(options.seed, Stream.REFERENCES)
        randoms = {f"random {i + 1}": arch for i, arch in enumerate(data.space.sample_many(3, rng))}
        recalibrate(options, net, data, accelerator.device)
        self.references = {"largest": data.space.largest, "smallest": data.space.smallest, **randoms}
        super().__init__(options, accelerator, run, task, model, loader, make_optimizer(options, model))

    def begin_epoch(self, epoch: int) -> None:
        """Channels are put in order of importance while choices open."""
        if self.sort and epoch <= self.options.arch_warmup_epochs:
            self.net.sort_channels(self.optimizer)

    def loss(self, images: torch.Tensor, labels: torch.Tensor, epoch: int, step: int, number: int) -> torch.Tensor:
        """See `Training.loss`; of groups the pass's sub-networks are its share of the step's."""
        options, at = self.options, self.state.step
        if options.step == "paths":
            torch.manual_seed(step_seed(options.seed, Stream.DROP_PATH, at, number))
            with self.accelerator.autocast():
                return self.task(images, labels)["loss"]
        if options.step == "groups":
            archs = self.sampler.archs(epoch, step, number, self.passes)
        else:
            archs = self.sampler.archs(epoch, step)
        targets: Any = labels
        if self.mix is not None:  # within the pass, so that processes may share out passes as they like
            seed = step_seed(options.seed, Stream.MIX, at, number)
            images, *targets = self.mix(images, labels, seed, groups=len(archs))
        torch.manual_seed(step_seed(options.seed, Stream.DROP_PATH, at, number))
        with self.accelerator.autocast():
            return self.task(images, targets, archs=archs, mode=options.mode)["loss"]

    def backward(self, images: torch.Tensor, labels: torch.Tensor, epoch: int, step: int) -> torch.Tensor:
        """See `Training.backward`; where the rule has two sides, processes exchange both sides' gradients at once."""
        if not isinstance(self.task, SandwichTask):
            return super().backward(images, labels, epoch, step)
        accelerator, options = self.accelerator, self.options
        n, at = options.accumulate, self.state.step
        archs = self.sampler.archs(epoch, step)
        params = [p for p in self.model.parameters() if p.requires_grad]
        sides: list[list[torch.Tensor | None]] = [[None] * len(params) for _ in range(2)]
        total = images.new_zeros(())
        with accelerator.no_sync(self.task.trainable_module):
            for i, (x, y) in enumerate(zip(images.chunk(n), labels.chunk(n), strict=True)):
                torch.manual_seed(step_seed(options.seed, Stream.DROP_PATH, at, accelerator.process_index * n + i))
                losses = self.task.losses(x, y, archs, options.mode)
                for side in sides:
                    for p, grad in zip(params, side, strict=True):
                        p.grad = grad
                    with accelerator.autocast():
                        loss = next(losses) / n
                    accelerator.backward(loss)
                    side[:] = [p.grad for p in params]
                    if side is sides[0]:  # the others' may be no more than what has the right gradient
                        total += loss.detach()
        # a parameter that one process does not use still is part of the mean
        sides = [[torch.zeros_like(p) if g is None else g for p, g in zip(params, s, strict=True)] for s in sides]
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(torch.cat([g.flatten() for side in sides for g in side]), "mean")
            parts = iter(flat.split([p.numel() for p in params] * 2))
            sides = [[next(parts).view_as(p) for p in params] for _ in sides]
        scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        for p, grad in zip(params, self.task.merge(*sides, epoch, scale), strict=True):
            p.grad = grad
        return total

    def validate(self) -> dict[str, float]:
        """Accuracy of reference sub-networks on the search's validation images; processes share them out."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        results = []
        for name, arch in list(self.references.items())[rank::world]:
            with self.accelerator.autocast():
                self.net.eval().set_arch(arch)
                correct, images = count_correct(self.net, self.batches)
            results.append((name, correct / images))
        self.net.set_arch(None)
        gathered = dict(gather_object(results) if world > 1 else results)
        return {name: round(gathered[name], 5) for name in self.references}


def train_supernet(
    options: SupernetOptions, accelerator: Accelerator, run: Run, data: SearchData, net: Supernet | None = None
) -> Supernet:
    """Train the supernet, or load it where the run has it already. Ends with the folder `supernet/`.

    Args:
        options: Of the training.
        accelerator: See `Training`.
        run: Where it is kept.
        data: Its space is that of the sub-networks that steps train.
        net: One that has weights, with its channels in order; data.space is then a part of its space. None: a new one.

    Raises:
        RunError: Options do not fit each other, or the loss is not finite.
    """
    sort, space = net is None, data.space if net is None else net.space
    if (run / "supernet").exists():
        net = load(run / "supernet")
        if not isinstance(net, Supernet) or net.space != space:
            raise RunError(f"{run / 'supernet'} is not the supernet of this run; remove it, or give this run a --name")
        run.print(f"supernet: trained before, {run / 'supernet'}")
        net = net.to(accelerator.device)
        recalibrate(options, net, data, accelerator.device)
        return net
    training = SupernetTraining(options, accelerator, run, data, net or create_supernet(options, data), sort)
    net = training.net
    run.print(
        f"supernet: {data.space.size():.2g} sub-networks, {sum(p.numel() for p in net.parameters()):,} parameters; "
        f"{options.epochs} epochs of {training.steps} steps, {num_archs(options)} sub-networks per step"
        + (f"; continues at step {training.state.step} of {training.total}" if training.state.step else "")
    )
    training.run_epochs()
    training.share_buffers()
    recalibrate(options, net, data, accelerator.device)
    files = {} if net is training.model else {"paths.json": _paths(training.model, run)}
    if accelerator.is_main_process:
        info = {"space": space.to_dict(), "dataset": options.dataset, "seed": options.seed}
        with full_precision(net):
            save_pretrained(
                net,
                run / "supernet",
                info={**info, "epochs": options.epochs},
                label_names=data.splits.class_names,
                data_config=data.config,
                files={**seen_images(data.splits, data.val), **files},
            )
        shutil.rmtree(run.state / "training", ignore_errors=True)
    accelerator.wait_for_everyone()
    return net


def _paths(mixed: Any, run: Run) -> str:
    """What a trained mixture says of its blocks: a file's content, and a line of each stage."""
    stages = mixed.probabilities()
    for i, stage in enumerate(stages, start=1):
        shown = ", ".join(" ".join(f"{name} {p:.2f}" for name, p in place.items()) for place in stage)
        run.print(f"  paths of stage {i}, by place: {shown}")
    return json.dumps({"probabilities": stages, "most_probable": mixed.arch().args()}, indent=2) + "\n"


def seen_images(splits: Splits, val: Sequence[int]) -> dict[str, str]:
    """The file that tells later users of a supernet which images it was trained on."""
    hashes = content_hashes(splits.train) if len(splits.train) <= HASHED_IMAGES else None
    return {"training_data.json": json.dumps(training_record(splits.train, val, hashes)) + "\n"}


def make_optimizer(options: SupernetOptions, net: nn.Module) -> torch.optim.Optimizer:
    """AdamW; weight decay as the options say."""
    groups = None
    if options.decay_pos_embed:
        spared = {name for name in net.no_weight_decay() if not name.endswith("pos_embed")}
        groups = functools.partial(
            param_groups_weight_decay, weight_decay=options.weight_decay, no_weight_decay_list=spared
        )
    return create_optimizer_v2(
        net, opt="adamw", lr=options.lr, weight_decay=options.weight_decay, param_group_fn=groups
    )


def open_run(folder: Path) -> tuple[SupernetOptions, SearchData, Supernet]:
    """Options, data and supernet of a finished run of supernet.py or search.py.

    Raises:
        RunError: The folder holds no such run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunError(f"{folder} holds no config.yaml; expected the folder of a finished run")
    config = Run.read_config(path)
    known = {field.name for field in dataclasses.fields(SupernetOptions)}
    options = SupernetOptions(**{k: v for k, v in config.items() if k in known})
    splits, kept = open_splits(options), folder / "state" / "data.json"
    train, val = read_split(read_json(kept), splits.train, where=str(kept))
    net = load(config.get("supernet") or folder / "supernet").eval()
    space = net.space
    if config.get("supernet") and config.get("space"):  # a part of the supernet's
        space = open_space(config["space"]).at(**space.model_args)
    config = {**resolve_model_data_config(net), "background": splits.background}
    data = SearchData(splits, space, train, val, config)
    recalibrate(options, net, data, torch.device("cpu"))
    return options, data, net
