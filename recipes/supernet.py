"""Train a ViT-ResNAS supernet: many sub-networks in one forward-backward pass.

    accelerate launch recipes/supernet.py                                     # digits, micro space, a CPU, minutes
    accelerate launch recipes/supernet.py --dataset imagefolder:photos --space mini --epochs 200 --amp bf16
    accelerate launch recipes/supernet.py --config recipes/configs/vit_resnas_tiny_supernet.yaml --dataset imagefolder:…

Each step cuts the batch into groups and trains one sub-network on each (paper: arXiv 2109.00642, section 3.3). The
images that a search will score candidates on are cut from the training set first, recorded in the run's
`state/data.json`, and never trained on; the test images are not looked at.

A run's folder holds `config.yaml`, `supernet/` (config.json and model.safetensors, for `timm.create_model` and for
`recipes/search.py --supernet`), `training.jsonl`, `training.png` and `state/`. Killed at any moment and started with
the same command, a run goes on from its last checkpoint and ends with the same weights: batches, augmentation,
sub-networks, drop path and learning rate are functions of the seed and the step.
"""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
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
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from timm_resnas import Arch
from timm_resnas.data import (
    EvalBatches,
    Splits,
    check_leak,
    content_hashes,
    default_augment,
    default_data_config,
    eval_batches,
    eval_transform,
    load_splits,
    repeated,
    split_search_val,
    train_loader,
    train_transform,
)
from timm_resnas.hub import save_pretrained
from timm_resnas.nas.evaluate import count_correct
from timm_resnas.nas.jsonl import append_jsonl
from timm_resnas.nas.sampling import MultiArchSampler
from timm_resnas.nas.space import SearchSpace
from timm_resnas.nas.supernet import VitResNasSupernet

HASHED_IMAGES = 100_000  # larger data sets are not compared picture by picture

# Options that decide the weights; a run with other values needs another folder.
FIXED = [
    *("seed", "amp", "dataset", "img_size", "val_per_class", "val_fraction", "batch_size", "space", "epochs"),
    *("num_archs", "arch_warmup_epochs", "lr", "min_lr", "warmup_epochs", "weight_decay", "drop_path", "smoothing"),
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
    group = parser.add_argument_group("supernet")
    group.add_argument(
        "--space", default="micro", help="search space: vit_resnas_tiny, vit_resnas_small, mini or micro"
    )
    group.add_argument("--epochs", type=int, default=50, help="training epochs")
    group.add_argument("--batch-size", type=int, default=64, help="images per step, over all processes")
    group.add_argument("--num-archs", type=int, default=4, help="sub-networks per step, over all processes")
    group.add_argument("--arch-warmup-epochs", type=int, default=10, help="epochs until all choices are open")
    group.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    group.add_argument("--min-lr", type=float, default=1e-5, help="learning rate at the end of the cosine")
    group.add_argument("--warmup-epochs", type=float, default=3, help="epochs of learning rate warm-up")
    group.add_argument(
        "--weight-decay", type=float, default=0.05, help="AdamW's; not on biases, norms, positions, tokens"
    )
    group.add_argument("--drop-path", type=float, default=0.0, help="stochastic depth rate of the last block")
    group.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    group.add_argument(
        "--eval-every", type=int, default=10, metavar="EPOCHS", help="how often sub-networks are evaluated"
    )


class Data(NamedTuple):
    """What a run trains on and scores on."""

    splits: Splits
    space: SearchSpace
    train: list[int]  # indices into splits.train
    val: list[int]
    config: dict[str, Any]  # timm's data_config


def prepare(args: argparse.Namespace, run: Run) -> Data:
    """Open the data, cut the search's validation set, fit the space to the images.

    Raises:
        ValueError: The data, the space or the image size cannot be used; the message says what would be right.
    """
    space = SearchSpace.create(args.space)
    size = space.model_args["img_size"] if args.img_size is None else args.img_size
    if isinstance(size, list):
        if len(size) > 2:
            raise RunError(f"--img-size takes one side, or height and width; got {size}")
        size = size[0] if len(size) == 1 else tuple(size)
    space.largest.grids(size, space.model_args["patch_size"])
    splits = load_splits(args.dataset)
    train, val = run.once("data.json", lambda: cut(args, splits))
    if len(train) + len(val) != len(splits.train):
        raise RunError(f"{args.dataset} is not what {run.folder} was started with; give this run another --name")
    if len(train) < args.batch_size:
        raise RunError(
            f"--batch-size {args.batch_size} is more than the {len(train)} training images of {args.dataset}"
        )
    config = default_data_config(splits, size, indices=train)
    return Data(splits, space.with_model_args(img_size=size, num_classes=splits.num_classes), train, val, config)


def cut(args: argparse.Namespace, splits: Splits) -> tuple[list[int], list[int]]:
    """Indices to train on and to score on. Pictures that are in the data twice are not scored on."""
    # reading every image of a large set takes hours; its pictures are compared where that is asked for
    small = len(splits.train) + len(splits.test) <= HASHED_IMAGES
    avoid = repeated(content_hashes(splits.train), content_hashes(splits.test)) if small else None
    train, val = split_search_val(
        splits.train, per_class=args.val_per_class, fraction=args.val_fraction, seed=args.seed, avoid=avoid
    )
    if small:
        check_leak(splits.train, train, val, splits.test)
    return train, val


def build(args: argparse.Namespace, data: Data) -> VitResNasSupernet:
    """The untrained supernet; it carries its data's preprocessing."""
    torch.manual_seed(step_seed(args.seed, 1))
    return timm.create_model(
        "vit_resnas_supernet",
        space=data.space.to_dict(),
        drop_path_rate=args.drop_path,
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


class Position:
    """Where training stands; saved and restored with the weights."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = int(state["step"])


def train(args: argparse.Namespace, accelerator: Accelerator, run: Run, data: Data) -> VitResNasSupernet:
    """Train the supernet, or load it where the run has it already. Ends with the folder `supernet/`."""
    net = build(args, data)
    if (run / "supernet").exists():
        load_weights(net, run / "supernet")
        run.say(f"supernet: trained before, {run / 'supernet'}")
        return net.to(accelerator.device)

    rank, world = accelerator.process_index, accelerator.num_processes
    loader = train_loader(
        data.splits.train.select(data.train),
        train_transform(data.config, **default_augment(data.splits, tuple(data.config["input_size"][1:]))),
        args.batch_size,
        seed=args.seed,
        num_workers=args.workers,
        rank=rank,
        world=world,
        device=accelerator.device,
    )
    sampler = MultiArchSampler(data.space, args.num_archs, args.seed, args.arch_warmup_epochs)
    sampler.archs(0, 0, rank, world)  # says now where groups and processes do not fit
    optimizer = create_optimizer_v2(net, opt="adamw", lr=args.lr, weight_decay=args.weight_decay)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_lr=1e-6,
        warmup_epochs=args.warmup_epochs,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    position = Position()
    accelerator.register_for_checkpointing(position)
    model, optimizer = accelerator.prepare(net, optimizer)
    resume(accelerator, run, position)

    total = args.epochs * len(loader)
    run.say(
        f"supernet: {data.space.size():.2g} sub-networks, {sum(p.numel() for p in net.parameters()):,} parameters; "
        f"{args.epochs} epochs of {len(loader)} steps, {args.num_archs} sub-networks per step"
        + (f"; goes on at step {position.step} of {total}" if position.step else "")
    )
    watched = yardsticks(data.space, args.seed)
    batches = val_batches(data, accelerator.device, args.workers)
    clock, losses, begun = Clock(), [], position.step
    for epoch in range(position.step // len(loader), args.epochs):
        skip = position.step - epoch * len(loader)
        with Progress(len(loader), f"epoch {epoch + 1}/{args.epochs}", accelerator.is_local_main_process) as bar:
            for step, (x, y) in enumerate(loader.epoch(epoch, skip), start=skip):
                model.train()
                torch.manual_seed(step_seed(args.seed, 3, position.step, rank))  # drop path, dropout
                schedule.step_update(position.step)
                with accelerator.autocast():
                    logits = model(x, archs=sampler.archs(epoch, step, rank, world))
                    loss = F.cross_entropy(logits, y, label_smoothing=args.smoothing)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                position.step += 1
                losses.append(loss.detach())
                bar(step + 1)
        last = epoch + 1 == args.epochs
        if last or (epoch + 1) % args.eval_every == 0:
            loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            losses = []
            accuracy = evaluate(accelerator, net, batches, watched)
            record = {"epoch": epoch + 1, "step": position.step, "loss": round(loss, 5), "accuracy": accuracy}
            record["seconds"] = round(clock.seconds(), 2)
            accelerator.log({"loss": loss, **{f"accuracy/{k}": v for k, v in accuracy.items()}}, step=position.step)
            left = clock.seconds() / (position.step - begun) * (total - position.step)
            if run.is_main:
                append_jsonl(run / "training.jsonl", [record])
            shown = ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
            run.say(f"  epoch {epoch + 1:3}  loss {loss:.3f}  {shown}  left {format_minutes(left)}")
        if not math.isfinite(losses[-1].item() if losses else 0.0):
            raise RunError(f"the loss is {losses[-1].item()} in epoch {epoch + 1}; lower --lr or use --amp bf16 or no")
        if not last:
            checkpoint(accelerator, run, position)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        info = {"space": data.space.to_dict(), "dataset": args.dataset, "seed": args.seed, "epochs": args.epochs}
        save_pretrained(net, run / "supernet", info=info, label_names=data.splits.class_names)
        shutil.rmtree(run.state / "training", ignore_errors=True)
    accelerator.wait_for_everyone()
    return net


def evaluate(
    accelerator: Accelerator, net: VitResNasSupernet, batches: EvalBatches, archs: dict[str, Arch]
) -> dict[str, float]:
    """Accuracy of sub-networks on the search's validation images; each process takes its share of them."""
    rank, world = accelerator.process_index, accelerator.num_processes
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


def checkpoint(accelerator: Accelerator, run: Run, position: Position) -> None:
    """Save everything that going on needs; the folder gets its name when it is whole."""
    folder = run.state / "training"
    fresh = folder / "unfinished"
    accelerator.save_state(str(fresh))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        fresh.rename(folder / f"step-{position.step:09}")
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, run: Run, position: Position) -> None:
    """Restore the newest checkpoint, if there is one.

    Raises:
        RunError: It does not hold the step that its name says.
    """
    if accelerator.is_main_process:
        shutil.rmtree(run.state / "training" / "unfinished", ignore_errors=True)
    accelerator.wait_for_everyone()
    found = sorted((run.state / "training").glob("step-*"))
    if not found:
        return
    accelerator.load_state(str(found[-1]))
    if position.step != int(found[-1].name.removeprefix("step-")):
        raise RunError(f"{found[-1]} is damaged: it holds step {position.step}; remove it to go on from the one before")


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
        run = Run(args, accelerator, f"{dataset_name(args.dataset)}-{args.space}-supernet", FIXED)
        data = prepare(args, run)
        train(args, accelerator, run, data)
        run.say(f"done: {run / 'supernet'}")
        accelerator.end_training()


if __name__ == "__main__":
    main()
