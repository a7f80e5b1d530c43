"""How a program ends below `accelerate launch`: with its own message, and never later than its launcher.

Launchers print tracebacks of their own when a process fails; processes of a launcher that was killed train on unseen.
Both are prevented on Linux, on one machine. Like `options`, this module imports neither torch nor timm.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import typing
from pathlib import Path

__all__ = ["end_with_launcher", "fail"]

MODULES = {b"accelerate-launch", b"accelerate.commands.launch", b"torchrun", b"torch.distributed.run"}


def _launched() -> bool:
    """Whether the parent process is a launcher."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    names = {word.rpartition(b"/")[2] for word in words}
    return bool(names & MODULES) or {b"accelerate", b"launch"} <= names


def end_with_launcher() -> None:
    """Let this process be ended when its launcher is."""
    if sys.platform == "linux" and _launched():
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def fail(name: str, text: str, status: int = 2) -> typing.NoReturn:
    """End the program with one line on stderr, as its launcher's last one.

    The first process speaks. Another one does so a little later: where all have the error, they are ended by then.
    """
    rank, launched = int(os.environ.get("RANK") or 0), _launched()
    end_with_launcher()
    if rank:
        time.sleep(3)
        text = text.replace("error:", f"error in process {rank}:", 1)
    orphan = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == 1
    if _launched() or not (launched or orphan):
        print(f"{name}: {text}", file=sys.stderr, flush=True)
    if _launched():
        several = "RANK" in os.environ
        if not several or os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
            with contextlib.suppress(OSError):
                # torch's launcher of several processes answers any other signal with a traceback
                os.kill(os.getppid(), signal.SIGKILL if several else signal.SIGTERM)
    sys.exit(status)
