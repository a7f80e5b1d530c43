"""One training loop for every task of `timm.task`: epochs, passes, checkpoints, records; killed and resumed alike.

Everything that a step draws is a function of the run's seed and the step, so that a run that was killed ends with the
weights that it would have had.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch import nn

from ..nas.jsonl import append_jsonl, read_jsonl, write_jsonl
from .checkpoints import Checkpoints, check_weights, diverged
from .plots import draw_training
from .processes import agree
from .run import Deadline, Progress, Run, RunError, format_minutes

__all__ = ["TrainState", "Training", "check_passes", "make_schedule"]

CHECK_STEPS = 50  # how often processes agree on the loss and on whether a checkpoint is due
BUSY_SHARE = 0.75  # of the wall time that the main thread runs, below which other programs are in the way


@dataclass
class TrainState:
    """Where training stands; part of every checkpoint."""

    step: int = 0
    loss_sum: float = 0.0  # over the steps since the last record
    loss_steps: int = 0
    seconds: float = 0.0


class Training(ABC):
    """A training's moving parts, and its loop.

    Args:
        options: ``epochs, accumulate, clip_grad, eval_every, checkpoint_minutes, checkpoint_steps, seed`` and what
            `make_schedule` reads.
        accelerator: Prepares model and optimizer; the task itself is never prepared, or it would be wrapped twice.
        run: Where checkpoints and records go.
        task: Gives the loss; an average of weights is set up before.
        model: The model inside the task.
        loader: ``loader.epoch(epoch, skip)`` gives this process's (images, labels) from a step on.
        optimizer: Of the model.
    """

    def __init__(
        self,
        options: Any,
        accelerator: Accelerator,
        run: Run,
        task: TrainingTask,
        model: nn.Module,
        loader: Any,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.options, self.accelerator, self.run = options, accelerator, run
        self.task, self.model, self.loader = task, model, loader
        self.steps = len(loader)
        self.total = options.epochs * self.steps
        self.schedule = make_schedule(options, optimizer, self.steps)
        task.trainable_module, self.optimizer = accelerator.prepare(model, optimizer)
        self.checkpoints = Checkpoints(accelerator, run)
        self.state = self._resume()

    # -- a job supplies ---------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, images: torch.Tensor, labels: torch.Tensor, epoch: int, step: int, number: int) -> torch.Tensor:
        """Loss of a pass; ``step`` counts within the epoch, ``number`` the passes of all processes within a step."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first step of an epoch."""
        return

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Accuracies by name, the same on all processes; empty where there is nothing to validate on."""

    def keep(self, record: dict[str, Any]) -> None:
        """Called on the main process with each new record, which is in training.jsonl."""
        return

    def saved(self) -> None:
        """Called on the main process after each checkpoint."""
        return

    # -- weights ----------------------------------------------------------------------------------------------------

    @property
    def ema(self) -> nn.Module | None:
        """The model with averaged weights."""
        return self.task.get_trainable_module(ema=True).module if self.task.has_ema() else None

    def weights(self) -> dict[str, nn.Module]:
        """Models with trained weights: 'raw', and 'ema' where they are averaged."""
        return {"raw": self.model, **({} if self.ema is None else {"ema": self.ema})}

    def share_buffers(self) -> None:
        """Running statistics of batch norm differ between processes; the first one's are those that count."""
        for model in self.weights().values():
            broadcast(list(model.buffers()))

    def _resume(self) -> TrainState:
        state = self.checkpoints.newest()
        if state is None:
            return TrainState()
        if state["steps"] != self.steps:
            raise RunError(
                f"{self.run.folder} was started with {state['steps']} steps an epoch; with this number of processes "
                f"there are {self.steps} (--multi-scale). Continue with as many processes as before, or give this run "
                f"another --name"
            )
        for name, model in self.weights().items():
            model.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return TrainState(**state["state"])

    def save_checkpoint(self) -> None:
        """Save everything that continuing needs.

        Raises:
            RunError: A weight is not finite.
        """
        check_weights(self.model, self.state.step)
        state: dict[str, Any] = {name: model.state_dict() for name, model in self.weights().items()}
        state.update(optimizer=self.optimizer.state_dict(), state=asdict(self.state), steps=self.steps)
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        self.checkpoints.save(self.state.step, state)
        if self.run.is_main:
            self.saved()

    # -- steps ------------------------------------------------------------------------------------------------------

    def backward(self, images: torch.Tensor, labels: torch.Tensor, epoch: int, step: int) -> torch.Tensor:
        """Gradients of a step from this process's images, in one pass or several; returns the mean loss."""
        n = self.options.accumulate
        total = images.new_zeros(())
        first = self.accelerator.process_index * n
        for i, (x, y) in enumerate(zip(images.chunk(n), labels.chunk(n), strict=True)):
            # processes exchange gradients once, in the last pass
            with self.accelerator.no_sync(self.task.trainable_module) if i + 1 < n else contextlib.nullcontext():
                loss = self.loss(x, y, epoch, step, first + i) / n
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def step(self, images: torch.Tensor, labels: torch.Tensor, epoch: int, step: int) -> torch.Tensor:
        """One update of the weights, and of their average; returns the loss."""
        self.task.train()
        self.schedule.step_update(self.state.step)
        loss = self.backward(images, labels, epoch, step)
        if self.options.clip_grad:
            self.accelerator.unscale_gradients(self.optimizer)
            mode = getattr(self.options, "clip_mode", "norm")
            dispatch_clip_grad(self.task.get_clip_parameters(), self.options.clip_grad, mode=mode)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.task.update_ema(step=self.state.step)
        return loss

    def learning_rate(self) -> float:
        """That of layers without layer-wise decay."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def run_epochs(self) -> None:
        """Train to the end.

        Raises:
            RunError: The loss or a weight is not finite.
        """
        options, accelerator, run, state = self.options, self.accelerator, self.run, self.state
        if run.is_main:  # a kill may have come between a record and its checkpoint
            write_jsonl(run / "training.jsonl", [r for r in self.records() if r["step"] <= state.step])
        clock, begun, saved = Deadline(), state.step, 0.0
        before, busy = state.seconds, _Contention(accelerator, run)
        losses: list[torch.Tensor] = []
        for epoch in range(state.step // self.steps, options.epochs):
            skip = state.step - epoch * self.steps
            if skip == 0:
                self.begin_epoch(epoch)
            with Progress(self.steps, f"epoch {epoch + 1}/{options.epochs}", accelerator.is_local_main_process) as bar:
                for step, (images, labels) in enumerate(self.loader.epoch(epoch, skip), start=skip):
                    losses.append(self.step(images, labels, epoch, step))
                    bar(step + 1)
                    busy.step()
                    ended = step + 1 == self.steps
                    due = options.checkpoint_steps > 0 and state.step % options.checkpoint_steps == 0
                    if not (ended or due or state.step % CHECK_STEPS == 0):
                        continue
                    late = clock.seconds() - saved > options.checkpoint_minutes * 60
                    loss, late = agree(accelerator, losses, late)
                    if not math.isfinite(loss):
                        raise RunError(diverged(f"the loss is {loss}", state.step))
                    state.loss_sum += loss * len(losses)
                    state.loss_steps += len(losses)
                    losses = []
                    state.seconds = before + clock.seconds()
                    accelerator.log({"loss": loss, "lr": self.learning_rate()}, step=state.step)
                    if ended and ((epoch + 1) % options.eval_every == 0 or epoch + 1 == options.epochs):
                        record = self._record(epoch)
                        rest = clock.seconds() / (state.step - begun) * (self.total - state.step)
                        shown = "".join(f"  {k} {v:.4f}" for k, v in record["accuracy"].items())
                        run.print(
                            f"  epoch {epoch + 1:3}  loss {record['loss']:.3f}{shown}  training ends in "
                            f"{format_minutes(rest)}"
                        )
                    if ended or due or late:
                        self.save_checkpoint()
                        saved = clock.seconds()
            accelerator.wait_for_everyone()
        check_weights(self.model, state.step)

    # -- records ----------------------------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]]:
        """What training.jsonl holds."""
        return read_jsonl(self.run / "training.jsonl")

    def _record(self, epoch: int) -> dict[str, Any]:
        """Validate, and put the result into training.jsonl, training.png and the tracker."""
        self.share_buffers()
        accuracy = self.validate()
        state = self.state
        record = {
            "epoch": epoch + 1,
            "step": state.step,
            "loss": round(state.loss_sum / state.loss_steps, 5),
            "lr": self.learning_rate(),
            "accuracy": accuracy,
            "seconds": round(state.seconds, 2),
        }
        state.loss_sum, state.loss_steps = 0.0, 0
        self.accelerator.log({f"accuracy/{k}": v for k, v in accuracy.items()}, step=state.step)
        if self.run.is_main:
            append_jsonl(self.run / "training.jsonl", [record])
            draw_training(self.run / "training.png", self.records())
            self.keep(record)
        return record


class _Contention:
    """Says once, after the first steps on a CPU, that other programs hold the process up."""

    STEPS = 20

    def __init__(self, accelerator: Accelerator, run: Run) -> None:
        self.run = run
        self.count = 0 if accelerator.device.type == "cpu" else None
        self.begin = (0.0, 0.0)

    def step(self) -> None:
        if self.count is None:
            return
        self.count += 1
        if self.count == 1:  # the first step is slower
            self.begin = time.perf_counter(), time.thread_time()
        elif self.count > self.STEPS:
            wall, own = time.perf_counter() - self.begin[0], time.thread_time() - self.begin[1]
            if own < BUSY_SHARE * wall and torch.get_num_threads() > 1:
                self.run.print(
                    f"note: other programs use the CPU: training ran {own / wall:.0%} of the time. With --threads 1 it "
                    f"is usually faster then, for threads do not wait for each other (stop it, and add the option: it "
                    f"continues where it was)"
                )
            self.count = None


def check_passes(options: Any, world: int, groups: int | None = None) -> None:
    """Whether a batch can be dealt to processes and passes, and with it ``groups`` sub-networks.

    Raises:
        RunError: It cannot.
    """
    passes = world * options.accumulate
    where = f"{world} process{'es' * (world > 1)} of {options.accumulate} pass{'es' * (options.accumulate > 1)}"
    if groups is not None and groups % passes:
        raise RunError(f"--num-archs {groups} cannot be dealt evenly to {where}; take a multiple of {passes}")
    if groups is not None and options.batch_size % groups:
        raise RunError(f"--batch-size {options.batch_size} is not a multiple of --num-archs {groups}")
    if options.batch_size % passes:
        raise RunError(
            f"--batch-size {options.batch_size} cannot be dealt evenly to {where}; take a multiple of {passes}"
        )
    if options.warmup_epochs > options.epochs:
        raise RunError(f"--warmup-epochs {options.warmup_epochs:g} is more than --epochs {options.epochs}")


def make_schedule(options: Any, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    """timm's schedule over all epochs, a function of the step; the warm-up is a part of it.

    Args:
        options: ``sched`` (default cosine), ``epochs``, ``min_lr``, ``warmup_lr``, ``warmup_epochs``.
        optimizer: Its learning rates are set by ``schedule.step_update(step)``.
        steps: Steps of an epoch.
    """
    sched = getattr(options, "sched", "cosine")
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=sched,
            num_epochs=options.epochs,
            min_lr=options.min_lr,
            warmup_lr=options.warmup_lr,
            warmup_epochs=options.warmup_epochs,
            warmup_prefix=False,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
    except ValueError as e:
        raise RunError(f"--sched {sched} with --epochs {options.epochs}: {e}") from None
    return schedule
