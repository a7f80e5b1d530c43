"""Train a ViT-ResNAS supernet: many sub-networks in one forward-backward pass.

    accelerate launch recipes/supernet.py                                     # digits, micro space, a CPU, minutes
    accelerate launch recipes/supernet.py --dataset imagefolder:photos --space mini --epochs 200 --amp bf16
    accelerate launch --multi_gpu --num_processes 8 recipes/supernet.py \\
        --config recipes/configs/vit_resnas_tiny_supernet.yaml --dataset imagefolder:imagenet
    accelerate launch --multi_gpu --num_processes 2 recipes/supernet.py --cpu          # several processes on a CPU

Each step cuts the batch into groups and trains one sub-network on each (paper: arXiv 2109.00642, section 3.3). The
groups may lie in one process or in several (`--num-archs` counts them all), and go through the net at once or, to save
memory, in `--accumulate` passes: the same sub-networks see the same images, only batch norm's statistics are those of
a pass in its process (of all processes on CUDA, `--sync-bn`). At the start of each epoch of `--arch-warmup-epochs`
channels are put in order of importance, moments of the optimizer along with them. With `--token-labeling` images are
mixed by cells of the last stage's grid, and a second classifier learns what each cell shows (paper).

The images that a search will score candidates on are cut from the training set first, recorded in the run's
`state/data.json`, and never trained on; the test images are not looked at.

A run's folder holds `config.yaml`, `supernet/` (config.json and model.safetensors, for `timm.create_model`, and
training_data.json, which tells a later search what it was trained on),
`training.jsonl` (loss and accuracy of the largest, the smallest and some random
sub-networks), `training.png` and `state/`. Killed at any moment and started with the same command, a run goes on from
its last checkpoint and ends with the same weights: batches, augmentation, sub-networks, drop path and learning rate
are functions of the seed and the step. Another number of processes may go on with it, too.

Errors, each said before anything is trained: an unknown space or dataset, an image size that the total stride does
not divide, groups that do not divide the batch or the processes, options other than the run was started with. A loss
that is not finite ends the run with the last good checkpoint in place.
"""

import argparse
import contextlib
import functools
import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, gather_object
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
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn
from training import (
    HASHED_IMAGES,
    Checkpoints,
    add_augmentation_options,
    agree,
    augmentation,
    check_weights,
    cut_validation,
    diverged,
    full_precision,
    make_schedule,
    pair,
)

from timm_resnas import Arch
from timm_resnas.data import (
    EvalBatches,
    Splits,
    TokenMix,
    content_hashes,
    default_data_config,
    eval_batches,
    eval_transform,
    load_splits,
    train_loader,
    train_transform,
    training_record,
)
from timm_resnas.hub import save_pretrained
from timm_resnas.nas.evaluate import count_correct
from timm_resnas.nas.jsonl import append_jsonl, read_jsonl, write_jsonl
from timm_resnas.nas.sampling import MultiArchSampler, SandwichSampler
from timm_resnas.nas.space import SearchSpace
from timm_resnas.nas.supernet import MODES, VitResNasSupernet
from timm_resnas.tasks import SupernetTask, TokenLabelLoss

CHECK_STEPS = 50  # how often processes agree on the loss and on whether a checkpoint is due
SAMPLERS = {"balanced": MultiArchSampler, "sandwich": SandwichSampler}

# Options that decide the weights; a run with other values needs another folder.
FIXED = [
    *("seed", "amp", "dataset", "img_size", "val_per_class", "val_fraction", "batch_size", "space", "epochs"),
    *("num_archs", "arch_warmup_epochs", "lr", "min_lr", "warmup_epochs", "weight_decay", "drop_path", "smoothing"),
    *("sampler", "mode", "accumulate", "warmup_lr", "clip_grad", "decay_pos_embed", "sync_bn"),
    *("scale", "ratio", "shift", "hflip", "vflip", "color_jitter", "aa", "reprob", "remode"),
    *("token_labeling", "patch_weight"),
]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the data and of the supernet's training."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", default="digits", help="digits, fashion-mnist:<dir>, imagefolder:<dir> or hf:<id or folder>"
    )
    group.add_argument(
        "--img-size", type=int, nargs="+", metavar="N", help="side, or height and width (default: the space's)"
    )
    group.add_argument("--val-per-class", type=int, default=50, help="images of each class that the search scores on")
    group.add_argument(
        "--val-fraction", type=float, default=1 / 3, help="the same for classes of under 5 times as many"
    )
    group.add_argument("--workers", type=int, default=0, help="data loading processes")
    add_augmentation_options(parser)
    group = parser.add_argument_group("supernet")
    group.add_argument(
        "--space",
        default="micro",
        help="search space: vit_resnas_tiny, vit_resnas_small, mini, micro, or a .json file of SearchSpace.to_dict()",
    )
    group.add_argument("--epochs", type=int, default=12, help="training epochs")
    group.add_argument("--batch-size", type=int, default=64, help="images per step, over all processes and passes")
    group.add_argument("--num-archs", type=int, default=4, help="sub-networks per step, over all processes and passes")
    group.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="passes that a process cuts its part of a step into"
    )
    group.add_argument(
        "--sampler",
        choices=list(SAMPLERS),
        default="balanced",
        help="sub-networks of a step: balanced draws (the paper's), or the largest, the smallest and balanced draws",
    )
    group.add_argument("--mode", choices=MODES, default="auto", help="how several sub-networks are computed")
    group.add_argument(
        "--arch-warmup-epochs", type=int, default=12, help="epochs until all choices are open; channels are sorted"
    )
    group.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    group.add_argument("--min-lr", type=float, default=1e-5, help="learning rate at the end of the cosine")
    group.add_argument("--warmup-epochs", type=float, default=1, help="epochs of learning rate warm-up")
    group.add_argument("--warmup-lr", type=float, default=1e-6, help="learning rate that warm-up starts from")
    group.add_argument(
        "--weight-decay", type=float, default=0.05, help="AdamW's; not on biases, norms, tokens, positions"
    )
    group.add_argument(
        "--decay-pos-embed",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="weight decay on position embeddings, too (as the released code)",
    )
    group.add_argument("--clip-grad", type=float, metavar="NORM", help="largest norm of the gradient; 0: any")
    group.add_argument("--drop-path", type=float, default=0.0, help="stochastic depth rate of the last block")
    group.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    group.add_argument(
        "--token-labeling",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="mix images by cells, and train a second classifier on the tokens (paper's)",
    )
    group.add_argument(
        "--patch-weight", type=float, default=1.0, metavar="X", help="weight of the tokens' loss in token labelling"
    )
    group.add_argument(
        "--sync-bn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="batch norm over all processes (CUDA only)",
    )
    group.add_argument(
        "--eval-every", type=int, default=3, metavar="EPOCHS", help="how often sub-networks are evaluated"
    )
    group.add_argument(
        "--checkpoint-minutes", type=float, default=15, metavar="N", help="checkpoints within long epochs"
    )
    group.add_argument(
        "--checkpoint-steps", type=int, default=0, metavar="N", help="the same by steps; 0: by minutes only"
    )


def check_groups(args: argparse.Namespace, world: int) -> None:
    """Whether images, sub-networks, processes and passes fit each other.

    Raises:
        RunError: They do not.
    """
    least = dict(epochs=1, num_archs=1, accumulate=1, eval_every=1, checkpoint_steps=0, val_per_class=1)
    for name, low in least.items():
        if getattr(args, name) < low:
            raise RunError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    if args.num_archs % (world * args.accumulate):
        raise RunError(
            f"--num-archs {args.num_archs} cannot be dealt evenly to {world} process{'es' * (world > 1)} of "
            f"{args.accumulate} pass{'es' * (args.accumulate > 1)}; take a multiple of {world * args.accumulate}"
        )
    if args.batch_size % args.num_archs:
        raise RunError(f"--batch-size {args.batch_size} is not a multiple of --num-archs {args.num_archs}")


class Data(NamedTuple):
    """What a run trains on and scores on."""

    splits: Splits
    space: SearchSpace
    train: list[int]  # indices into splits.train
    val: list[int]
    config: dict[str, Any]  # timm's data_config


def open_space(name: str) -> SearchSpace:
    """A search space by a preset's name, or from a JSON file of what `SearchSpace.to_dict` gives.

    Raises:
        ValueError: The name is not known, or the file holds no space.
    """
    if not name.endswith(".json"):
        return SearchSpace.preset(name)
    try:
        return SearchSpace.from_dict(json.loads(Path(name).read_text(encoding="utf-8")))
    except OSError as e:
        raise RunError(f"--space {name}: {e.strerror}") from None
    except ValueError as e:
        raise RunError(f"--space {name}: {e}") from None


def prepare(args: argparse.Namespace, run: Run) -> Data:
    """Open the data, cut the search's validation set, fit the space to the images.

    Raises:
        ValueError: The data, the space, the image size or the groups cannot be used; the message says what would be
            right.
    """
    check_groups(args, PartialState().num_processes)
    space = open_space(args.space)
    make_sampler(args, space)
    TokenLabelLoss(patch_weight=args.patch_weight)
    size = pair(args.img_size) or space.model_args["img_size"]
    if isinstance(size, tuple) and size[0] == size[1]:
        size = size[0]
    space.largest.grids(size, space.model_args["patch_size"])
    splits = load_splits(args.dataset)
    train, val = run.once("data.json", lambda: cut_validation(splits, args.val_per_class, args.val_fraction, args.seed))
    if len(train) + len(val) != len(splits.train):
        raise RunError(f"{args.dataset} is not what {run.folder} was started with; give this run another --name")
    if len(train) < args.batch_size:
        raise RunError(
            f"--batch-size {args.batch_size} is more than the {len(train)} training images of {args.dataset}"
        )
    config = default_data_config(splits, size, indices=train)
    return Data(splits, space.with_model_args(img_size=size, num_classes=splits.num_classes), train, val, config)


def build(args: argparse.Namespace, data: Data) -> VitResNasSupernet:
    """The untrained supernet; it carries its data's preprocessing."""
    torch.manual_seed(step_seed(args.seed, 1))
    return timm.create_model(
        "vit_resnas_supernet",
        space=data.space.to_dict(),
        drop_path_rate=args.drop_path,
        patch_head=args.token_labeling or None,
        pretrained_cfg_overlay={**data.config, "num_classes": data.splits.num_classes},
    )


def val_batches(data: Data, device: torch.device, workers: int = 0) -> EvalBatches:
    """The search's validation images, in fixed batches."""
    transform = eval_transform(data.config)
    return eval_batches(data.splits.train, transform, indices=data.val, device=device, num_workers=workers)


def yardsticks(space: SearchSpace, seed: int, count: int = 3) -> dict[str, Arch]:
    """Sub-networks that training is watched by: the largest, the smallest and fixed random ones."""
    rng = np.random.default_rng([seed, 2])
    randoms = {f"random {i + 1}": arch for i, arch in enumerate(space.sample_many(count, rng))}
    return {"largest": space.largest, "smallest": space.smallest, **randoms}


@dataclass
class Position:
    """Where training stands; part of every checkpoint."""

    step: int = 0
    loss_sum: float = 0.0  # over the steps since the last record
    loss_steps: int = 0
    seconds: float = 0.0


def make_sampler(args: argparse.Namespace, space: SearchSpace) -> MultiArchSampler:
    """What says which sub-networks a step trains."""
    return SAMPLERS[args.sampler](space, args.num_archs, args.seed, args.arch_warmup_epochs)


def make_optimizer(args: argparse.Namespace, net: VitResNasSupernet) -> torch.optim.Optimizer:
    """AdamW; weight decay as the options say."""
    groups = None
    if args.decay_pos_embed:
        spared = {name for name in net.no_weight_decay() if not name.endswith("pos_embed")}
        groups = functools.partial(
            param_groups_weight_decay, weight_decay=args.weight_decay, no_weight_decay_list=spared
        )
    return create_optimizer_v2(net, opt="adamw", lr=args.lr, weight_decay=args.weight_decay, param_group_fn=groups)


def make_task(args: argparse.Namespace, net: VitResNasSupernet) -> tuple[SupernetTask, TokenMix | None]:
    """The loss, and what mixes images for it."""
    labels = dict(token_labeling=args.token_labeling, patch_weight=args.patch_weight, smoothing=args.smoothing)
    task = SupernetTask(net, **labels, verbose=False)
    mix = TokenMix(net.num_classes, net.grids[-1], smoothing=args.smoothing) if args.token_labeling else None
    return task, mix


def train(args: argparse.Namespace, accelerator: Accelerator, run: Run, data: Data) -> VitResNasSupernet:
    """Train the supernet, or load it where the run has it already. Ends with the folder `supernet/`.

    Raises:
        RunError: Options do not fit each other, or the loss is not finite.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    net = build(args, data)
    if (run / "supernet").exists():
        load_weights(net, run / "supernet")
        run.say(f"supernet: trained before, {run / 'supernet'}")
        return net.to(accelerator.device)

    loader = train_loader(
        data.splits.train.select(data.train),
        train_transform(data.config, **augmentation(args, data.splits, tuple(data.config["input_size"][1:]))),
        args.batch_size,
        seed=args.seed,
        num_workers=args.workers,
        rank=rank,
        world=world,
        device=accelerator.device,
    )
    sampler = make_sampler(args, data.space)
    if args.sync_bn and world > 1 and accelerator.device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    optimizer = make_optimizer(args, net)
    schedule = make_schedule(args, optimizer, len(loader))
    task, mix = make_task(args, net)
    task.trainable_module, optimizer = accelerator.prepare(net, optimizer)
    checkpoints = Checkpoints(accelerator, run)
    position = resume(accelerator, checkpoints, net, optimizer)
    if run.is_main:  # a kill may have come between a record and its checkpoint
        write_jsonl(run / "training.jsonl", [r for r in records_of(run) if r["step"] <= position.step])

    steps = len(loader)
    total = args.epochs * steps
    run.say(
        f"supernet: {data.space.size():.2g} sub-networks, {sum(p.numel() for p in net.parameters()):,} parameters; "
        f"{args.epochs} epochs of {steps} steps, {args.num_archs} sub-networks per step"
        + (f"; goes on at step {position.step} of {total}" if position.step else "")
    )
    watched = yardsticks(data.space, args.seed)
    batches = val_batches(data, accelerator.device, args.workers)
    clock, losses, begun = Clock(), [], position.step
    saved = 0.0
    before = position.seconds
    for epoch in range(position.step // steps, args.epochs):
        skip = position.step - epoch * steps
        if skip == 0 and epoch <= args.arch_warmup_epochs:  # within an epoch, a checkpoint has them in order
            net.sort_channels(optimizer)
        with Progress(steps, f"epoch {epoch + 1}/{args.epochs}", accelerator.is_local_main_process) as bar:
            for step, (x, y) in enumerate(loader.epoch(epoch, skip), start=skip):
                task.train()
                schedule.step_update(position.step)
                chunks = [(c, sampler.archs(epoch, step, c, world * args.accumulate)) for c in passes(args, rank)]
                losses.append(backward(args, accelerator, task, mix, x, y, chunks, position.step))
                if args.clip_grad:
                    accelerator.clip_grad_norm_(net.parameters(), args.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                position.step += 1
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
                accelerator.log({"loss": loss, "lr": optimizer.param_groups[0]["lr"]}, step=position.step)
                if ended and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs):
                    record = take_record(accelerator, run, net, batches, watched, position, epoch)
                    left = clock.seconds() / (position.step - begun) * (total - position.step)
                    shown = ", ".join(f"{name} {value:.3f}" for name, value in record["accuracy"].items())
                    run.say(f"  epoch {epoch + 1:3}  loss {record['loss']:.3f}  {shown}  left {format_minutes(left)}")
                if position.step < total and (ended or due or late):
                    save_checkpoint(accelerator, checkpoints, net, optimizer, position)
                    saved = clock.seconds()
    check_weights(net, position.step)
    if accelerator.is_main_process:
        info = {"space": data.space.to_dict(), "dataset": args.dataset, "seed": args.seed, "epochs": args.epochs}
        small = len(data.splits.train) <= HASHED_IMAGES
        seen = training_record(data.splits.train, data.val, content_hashes(data.splits.train) if small else None)
        files = {"training_data.json": json.dumps(seen) + "\n"}
        with full_precision(net):
            save_pretrained(net, run / "supernet", info=info, label_names=data.splits.class_names, files=files)
        shutil.rmtree(run.state / "training", ignore_errors=True)
    accelerator.wait_for_everyone()
    return net


def passes(args: argparse.Namespace, rank: int) -> range:
    """Numbers of this process's passes within a step; over all processes they count up from 0."""
    return range(rank * args.accumulate, (rank + 1) * args.accumulate)


def backward(
    args: argparse.Namespace,
    accelerator: Accelerator,
    task: SupernetTask,
    mix: TokenMix | None,
    x: torch.Tensor,
    y: torch.Tensor,
    chunks: list[tuple[int, list[Arch]]],
    step: int,
) -> torch.Tensor:
    """Gradients of a step from this process's images, in one pass or several; returns the mean loss."""
    total = x.new_zeros(())
    n = len(chunks)
    for i, ((number, archs), images, labels) in enumerate(zip(chunks, x.chunk(n), y.chunk(n), strict=True)):
        if mix is not None:  # within the pass, so that processes may share out passes as they like
            images, *labels = mix(images, labels, step_seed(args.seed, 4, step, number), groups=len(archs))
        torch.manual_seed(step_seed(args.seed, 3, step, number))  # drop path
        # processes exchange gradients once, in the last pass
        with accelerator.no_sync(task.trainable_module) if i + 1 < n else contextlib.nullcontext():
            with accelerator.autocast():
                loss = task(images, labels, archs=archs, mode=args.mode)["loss"] / n
            accelerator.backward(loss)
        total += loss.detach()
    return total


def records_of(run: Run) -> list[dict[str, Any]]:
    return read_jsonl(run / "training.jsonl")


def take_record(
    accelerator: Accelerator,
    run: Run,
    net: VitResNasSupernet,
    batches: EvalBatches,
    watched: dict[str, Arch],
    position: Position,
    epoch: int,
) -> dict[str, Any]:
    """Evaluate, and put the result into training.jsonl, training.png and the tracker."""
    accuracy = evaluate(accelerator, net, batches, watched)
    loss = position.loss_sum / position.loss_steps
    position.loss_sum, position.loss_steps = 0.0, 0
    record = {"epoch": epoch + 1, "step": position.step, "loss": round(loss, 5), "accuracy": accuracy}
    record["seconds"] = round(position.seconds, 2)
    accelerator.log({f"accuracy/{k}": v for k, v in accuracy.items()}, step=position.step)
    if run.is_main:
        append_jsonl(run / "training.jsonl", [record])
        draw_training(run / "training.png", records_of(run))
    return record


def draw_training(path: Path, records: list[dict[str, Any]]) -> None:
    """Accuracy of the watched sub-networks, and the loss, by epoch."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [r["epoch"] for r in records]
    colors = {"largest": "#2b2d42", "smallest": "#d1495b"}
    for name in records[-1]["accuracy"]:
        left.plot(
            epochs,
            [r["accuracy"][name] for r in records],
            marker="o",
            markersize=3,
            linewidth=2 if name in colors else 1,
            color=colors.get(name, "#9aa5b1"),
            label=name,
        )
    left.set_ylabel("accuracy on the search's validation images")
    left.legend(fontsize=8, loc="lower right")
    right.plot(epochs, [r["loss"] for r in records], color="#3e7cb1", marker="o", markersize=3)
    right.set_ylabel("training loss of the sampled sub-networks")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    fresh = path.with_name(f".{path.name}.new")
    figure.savefig(fresh, dpi=130, format="png")
    fresh.replace(path)


def evaluate(
    accelerator: Accelerator, net: VitResNasSupernet, batches: EvalBatches, archs: dict[str, Arch]
) -> dict[str, float]:
    """Accuracy of sub-networks on the search's validation images; each process takes its share of them."""
    rank, world = accelerator.process_index, accelerator.num_processes
    broadcast(list(net.buffers()))  # without --sync-bn, the first process's running statistics are those that count
    mine = list(archs.items())[rank::world]
    results = []
    for name, arch in mine:
        with accelerator.autocast():
            net.eval().set_arch(arch)
            correct, images = count_correct(net, batches)
        results.append((name, correct / images))
    net.set_arch(None)
    gathered = dict(gather_object(results) if world > 1 else results)
    return {name: round(gathered[name], 5) for name in archs}


def save_checkpoint(
    accelerator: Accelerator,
    checkpoints: Checkpoints,
    net: VitResNasSupernet,
    optimizer: torch.optim.Optimizer,
    position: Position,
) -> None:
    """Save everything that going on needs.

    Raises:
        RunError: A weight is not finite.
    """
    check_weights(net, position.step)
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "position": asdict(position)}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    checkpoints.save(position.step, state)


def resume(
    accelerator: Accelerator, checkpoints: Checkpoints, net: VitResNasSupernet, optimizer: torch.optim.Optimizer
) -> Position:
    """Restore the newest checkpoint."""
    state = checkpoints.newest()
    if state is None:
        return Position()
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return Position(**state["position"])


def load_weights(net: VitResNasSupernet, folder: Path) -> None:
    """Weights of a supernet's folder into a supernet of the same space.

    Raises:
        RunError: The folder holds no weights, or those of another space.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise RunError(f"{folder} holds no model.safetensors; expected a folder that a supernet was saved to")
    try:
        net.load_state_dict(load_file(path))
    except RuntimeError as e:
        raise RunError(f"{path} does not fit the space: {str(e).splitlines()[1].strip()}") from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_run_options(parser)
    add_options(parser)
    args = parse(parser, argv)
    with main_guard("supernet.py"):
        accelerator = start(args)
        run = Run(args, accelerator, f"{dataset_name(args.dataset)}-{Path(args.space).stem}-supernet", FIXED)
        data = prepare(args, run)
        run.begin()
        train(args, accelerator, run, data)
        run.say(f"done: {run / 'supernet'}")
        accelerator.end_training()


if __name__ == "__main__":
    main()
