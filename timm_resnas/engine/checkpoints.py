"""Checkpoints of a training: whole or not there, and checked before they are believed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from ..hub import sha256_of
from .run import Run, RunError, atomic_write

__all__ = ["Checkpoints", "check_weights", "diverged"]


def diverged(what: str, step: int) -> str:
    return f"{what} at step {step}; start another run (--name) with a lower --lr, --clip-grad 1, or --amp bf16 or no"


def check_weights(net: nn.Module, step: int) -> None:
    """Raises:
    RunError: A weight is not finite.
    """
    norms = torch.stack([p.detach().float().norm() for p in net.parameters()])
    if not torch.isfinite(norms).all():
        raise RunError(diverged("weights are not finite", step))


class Checkpoints:
    """The last two checkpoints of a run, state/training/step-<n>.pt: files of tensors and numbers.

    A file gets its name when it is whole, and its digest lies beside it. Any number of processes can continue from one.
    """

    def __init__(self, accelerator: Accelerator, run: Run) -> None:
        self.accelerator, self.run = accelerator, run
        self.folder = run.state / "training"

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the main process's ``state``, and remove all but the last two."""
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:09}.pt"
        with atomic_write(path) as fresh:
            torch.save({**state, "step": step}, fresh)
            with atomic_write(path.with_suffix(".sha256")) as digest:
                digest.write_text(sha256_of(fresh))
        for old in sorted(self.folder.glob("step-*.pt"))[:-2]:
            old.unlink()
            old.with_suffix(".sha256").unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, the same on all processes; a damaged one is reported and removed."""
        found = [None]
        if self.accelerator.is_main_process:
            for path in sorted(self.folder.glob("step-*.pt"), reverse=True):
                try:
                    self.read(path)
                except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as e:
                    why = (str(e).splitlines() or [type(e).__name__])[0]
                    self.run.print(f"note: {path} is damaged ({why:.80}); continuing from the one before")
                    path.unlink()
                    continue
                found = [str(path)]
                break
        path = broadcast_object_list(found)[0]
        return None if path is None else self.read(Path(path))

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """What `save` wrote.

        Raises:
            ValueError: Its digest or its step is another than was written; anything that `torch.load` raises when it
                is cut short.
        """
        digest = path.with_suffix(".sha256")
        if not digest.is_file() or digest.read_text().strip() != sha256_of(path):
            raise ValueError("its digest is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if path.name != f"step-{state['step']:09}.pt":
            raise ValueError(f"it holds step {state['step']}")
        return state
