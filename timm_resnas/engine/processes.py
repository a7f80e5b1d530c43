"""One process or many: Accelerate, threads, agreement."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, broadcast_object_list, set_seed
from torch import nn
from torch.distributed import TCPStore

from .launcher import end_with_launcher
from .run import RunError

__all__ = ["agree", "full_precision", "shared_counter", "start"]


def start(options: Any) -> Accelerator:
    """Accelerator, threads and seeds of this process; ``options`` as `settings.ProcessOptions`, or its subclass."""
    end_with_launcher()
    asked = int(os.environ.get("ACCELERATE_NUM_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    # a bare `accelerate launch` pins OpenMP to one thread
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(options.threads or max(1, cores // local))
    log_with = getattr(options, "log_with", None)
    _check_tracker(log_with)
    accelerator = Accelerator(
        cpu=options.cpu,
        mixed_precision=options.amp,
        log_with=log_with,
        project_dir=getattr(options, "output", "."),
    )
    if accelerator.num_processes != asked and accelerator.is_main_process:
        print(
            f"note: {asked} processes were asked for, this run has {accelerator.num_processes}. On a CPU, several need "
            f"`accelerate launch --multi_gpu --num_processes {asked} … --cpu`.",
            file=sys.stderr,
        )
    set_seed(options.seed)
    return accelerator


def _check_tracker(name: str | None) -> None:
    """Raises:
    RunError: The tracker is not known, or its package is missing: Accelerate would log nothing.
    """
    if name is None:
        return
    known = {str(tracker.value) for tracker in LoggerType}
    there = {str(tracker) for tracker in get_available_trackers()}
    if name not in known:
        raise RunError(f"--log-with {name} is not a tracker of Accelerate: {', '.join(sorted(known - {'all'}))}")
    if name != "all" and name not in there:
        raise RunError(f"--log-with {name} needs its package: pip install {name}")


def shared_counter(accelerator: Accelerator) -> Callable[[str], int] | None:
    """Counts calls by name over all processes, from 0; None for a single process. All must call this together."""
    if accelerator.num_processes == 1:
        return None
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")  # where the first process is
    store, port = None, [0]
    if accelerator.is_main_process:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port = [store.port]
    port = broadcast_object_list(port)
    store = store or TCPStore(host, port[0], is_master=False, wait_for_workers=False)
    return lambda name: store.add(name, 1) - 1


def agree(accelerator: Accelerator, losses: list[torch.Tensor], late: bool) -> tuple[float, bool]:
    """The mean loss over processes and steps, and whether the clock of one of them says that it is late."""
    both = torch.stack([torch.stack(losses).float().mean(), losses[0].new_tensor(late, dtype=torch.float32)])
    loss, late = accelerator.reduce(both, "mean").tolist()
    return loss, late > 0


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Without the autocast that Accelerate's `prepare` puts around the model's `forward` in mixed precision: logits
    that are stored with weights must be those that the loaded model computes."""
    wrapped = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped
