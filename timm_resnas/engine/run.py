"""A run: its folder, its progress, its errors in one sentence."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import re
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from tqdm.auto import tqdm

from .launcher import fail
from .options import changed_options, fixed_options

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

__all__ = [
    "Deadline",
    "Progress",
    "Run",
    "RunError",
    "atomic_write",
    "check_output",
    "cli_errors",
    "dataset_name",
    "format_minutes",
    "read_json",
    "run_name",
    "short_path",
]

LONGEST_NAME = 100  # characters of a folder's name


class RunError(ValueError):
    """A run cannot start or continue; the message says what is wrong and what would be right."""


@contextlib.contextmanager
def cli_errors(name: str) -> Iterator[None]:
    """Turn expected errors into one message and exit status 2; see `launcher.fail`."""
    try:
        yield
    except (ValueError, ImportError, OSError) as e:
        if os.environ.get("TIMM_RESNAS_DEBUG"):
            raise
        text = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e) or type(e).__name__
        fail(name, f"error: {text}")
    except KeyboardInterrupt:
        fail(name, "interrupted; the same command continues the run", 130)


# -- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of ``path`` when it is whole and on the disk."""
    fresh = path.with_name(f".{path.name}.new")
    yield fresh
    with fresh.open("rb+") as f:
        os.fsync(f.fileno())
    fresh.replace(path)


def check_output(path: Path) -> None:
    """Whether a file can be written, before the work that it is to hold.

    Raises:
        RunError: It cannot.
    """
    if path.is_dir():
        raise RunError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise RunError(f"{path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RunError(f"{path} cannot be written: permission denied")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        RunError: It cannot be read; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise RunError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise RunError(f"{path} is damaged: it is not JSON ({str(e).splitlines()[0]:.80})") from None


class Run:
    """A run's folder, with the options it was made with. One process group at a time may have it.

    Args:
        options: The resolved options.
        accelerator: Only its main process writes.
        name: The folder's name where the options have none, see `run_name`.

    Attributes:
        resumed: Whether the folder was there before.

    Raises:
        RunError: The folder belongs to a run with other options, or another run is writing to it.
    """

    def __init__(self, options: Any, accelerator: Accelerator, name: str) -> None:
        self.folder = Path(options.output) / (options.name or name)
        self.state = self.folder / "state"
        self.is_main = accelerator.is_main_process
        self.num_processes = accelerator.num_processes
        self._accelerator = accelerator
        self._config = {k: v for k, v in dataclasses.asdict(options).items() if k != "config"}
        self._locked = False
        path = self.folder / "config.yaml"
        self.resumed = path.exists()
        if self.resumed:
            old = self.read_config(path)
            fixed = fixed_options(options)
            changed = [k for k, v in fixed.items() if k in old and old[k] != v]
            if changed:
                was = ", ".join(f"{k} {old.get(k)!r} (now {fixed[k]!r})" for k in changed)
                raise RunError(
                    f"{self.folder} holds a run with other options: {was}. Give this run another --name, or remove "
                    f"that folder"
                )
            self._take_lock()
        accelerator.wait_for_everyone()

    def part(self, name: str) -> Run:
        """A stage of this run with a folder of its own inside it: checkpoints, records and ``best/`` are kept there."""
        part = copy.copy(self)
        part.folder = self.folder / name
        part.state = part.folder / "state"
        if self.is_main:
            part.state.mkdir(parents=True, exist_ok=True)
        return part

    @staticmethod
    def read_config(path: Path) -> dict[str, Any]:
        """Options of a run's config.yaml.

        Raises:
            RunError: It is damaged.
        """
        try:
            old = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
            old = None
        if not isinstance(old, dict):
            raise RunError(f"{path} is damaged: it does not hold 'option: value' lines; give this run another --name")
        return old

    def _take_lock(self) -> None:
        if fcntl is None or not self.is_main or self._locked:
            return
        self.state.mkdir(parents=True, exist_ok=True)
        path = self.state / "lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, lock)  # held as long as this run, and until its process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = path.read_text(encoding="utf-8", errors="replace").strip() or "another run"
            raise RunError(
                f"{self.folder} is in use by {owner}; wait until it ends, end it, or give this run another --name"
            ) from None
        except OSError:  # a file system without locks
            return
        os.truncate(lock, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
        self._locked = True

    def begin(self) -> None:
        """Everything asked for is possible: the folder is this run's from now on (config.yaml), trackers start."""
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self.write_text("config.yaml", yaml.safe_dump(self._config, sort_keys=False))
        if self._config["log_with"]:
            plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in self._config.items()}
            self._accelerator.init_trackers("timm_resnas", plain)
        self._accelerator.wait_for_everyone()

    def cached(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made by the main process once in the run's life and kept in state/<name> (JSON).

        Raises:
            RunError: What was kept is damaged.
        """
        path = self.state / name
        if self.is_main and not (self.resumed and path.exists()):
            text = json.dumps(make()) + "\n"
            self.state.mkdir(parents=True, exist_ok=True)
            self.write_text(f"state/{name}", text)
            self.write_text(f"state/{name}.sha256", hashlib.sha256(text.encode()).hexdigest() + "\n")
        self._accelerator.wait_for_everyone()
        digest = path.with_name(f"{name}.sha256")
        if digest.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != digest.read_text().strip():
            raise RunError(f"{path} is damaged: it is not what this run wrote; give this run another --name")
        return read_json(path)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all; main process only."""
        if self.is_main:
            with atomic_write(self.folder / name) as fresh:
                fresh.write_text(text, encoding="utf-8")

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(data, indent=1) + "\n")

    def print(self, text: str = "") -> None:
        """Print on the main process, clear of any progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


# -- progress ---------------------------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal; nothing in a log, where `Run.print` prints lines."""

    def __init__(self, total: int, text: str, enabled: bool = True) -> None:
        self._bar = tqdm(
            total=total, desc=text, leave=False, dynamic_ncols=True, disable=not (enabled and sys.stderr.isatty())
        )

    def __enter__(self) -> Callable[..., None]:
        def update(count: int | None = None, **shown: Any) -> None:
            self._bar.update(1 if count is None else count - self._bar.n)
            if shown:
                self._bar.set_postfix(shown, refresh=False)

        return update

    def __exit__(self, *_) -> None:
        self._bar.close()


class Deadline:
    """Seconds since the start, and a limit."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self.begin = time.monotonic()
        self.limit = None if max_minutes is None else max_minutes * 60

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def over(self, extra: float = 0.0) -> bool:
        """Whether the limit is passed, or would be after ``extra`` more seconds."""
        return self.limit is not None and self.seconds() + extra > self.limit


def format_minutes(seconds: float) -> str:
    """3:07 or 1:02:45."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def dataset_name(dataset: str) -> str:
    """Part of a run's folder name: 'digits', or the last folder of a path."""
    kind, _, where = dataset.partition(":")
    return "-".join([kind, *Path(where).parts[-1:]]) if where else kind


def short_path(where: str) -> str:
    """The last two parts of a folder's path or a Hub id: 'digits-micro/supernet', 'owner/name'."""
    return "/".join([part for part in (where.partition(":")[2] or where).split("/") if part][-2:])


def run_name(options: Any, parts: Iterable[str], shown: Iterable[str]) -> str:
    """A run's folder name: 'digits-micro', and what was changed: 'digits-micro-seed=3-epochs=20'.

    The file of ``--config`` is named as well, and only what differs from it. A digest ends a name that does not show
    all: it is cut, or a value has characters that do not suit a file's name.

    Args:
        options: As they were given.
        parts: The name where nothing was changed.
        shown: Options that ``parts`` show.
    """
    name = "-".join(parts)
    if options.config is not None:
        path = Path(options.config)
        file = path.parent.name if path.name == "config.yaml" else path.stem  # config.yaml: that of a run
        file = file.removeprefix(name).strip("-")
        if file.replace("-", "_") not in name.replace("-", "_"):
            name = f"{name}-{file}"
    changed = {k: v for k, v in changed_options(options).items() if k not in shown}
    values = [_in_a_name(v) for v in changed.values()]
    safe = [re.sub(r"[^\w.+-]", "_", v, flags=re.ASCII) for v in values]
    pairs = [f"{k}={v}" for k, v in zip(changed, safe, strict=True)]
    whole = "-".join([name, *pairs])
    if safe == values and len(whole) <= LONGEST_NAME:
        return whole
    digest = hashlib.sha256(json.dumps([whole, changed]).encode()).hexdigest()[:8]
    name = name[: LONGEST_NAME // 2]
    while pairs and len(f"{name}-{pairs[0]}-{digest}") <= LONGEST_NAME:
        name = f"{name}-{pairs.pop(0)}"
    return f"{name}-{digest}"


def _in_a_name(value: Any) -> str:
    """An option's value: 0.002, true, rand-m9, 32+64 (a list), macs40pct+params2M (macs=40%,params=2M)."""
    if isinstance(value, list):
        return "+".join(map(_in_a_name, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    return text.translate(str.maketrans({"%": "pct", "=": "", ",": "+"}))
