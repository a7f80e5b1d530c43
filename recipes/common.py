"""What the recipes share: options from YAML and flags, the run's folder, one process or many, plain error messages."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch.distributed import TCPStore
from tqdm.auto import tqdm

__all__ = [
    "Clock",
    "HelpFormatter",
    "Progress",
    "Run",
    "RunError",
    "add_run_options",
    "dataset_name",
    "format_minutes",
    "main_guard",
    "parse",
    "shared_counter",
    "start",
    "step_seed",
]


class RunError(ValueError):
    """A run cannot start or go on; the message says what is wrong and what would be right."""


# -- options ----------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options that every training or searching recipe has."""
    group = parser.add_argument_group("run")
    group.add_argument("--config", metavar="FILE.yaml", help="defaults for any option below; flags override them")
    group.add_argument("--output", default="runs", metavar="DIR", help="where runs are kept")
    group.add_argument("--name", metavar="NAME", help="the run's folder in --output (default: made from the options)")
    group.add_argument("--seed", type=int, default=0, help="decides every random choice")
    group.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    group.add_argument("--amp", choices=["no", "bf16", "fp16"], default="no", help="mixed precision")
    group.add_argument("--threads", type=int, default=0, help="CPU threads per process, 0: cores / local processes")
    group.add_argument(
        "--log-with", metavar="TRACKER", help="also log to a tracker of Accelerate (tensorboard, wandb, …)"
    )


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """timm's two stages: a YAML file sets defaults, flags override them; unknown keys are an error."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    if path is not None:
        parser.set_defaults(**_read_config(parser, path))
    return parser.parse_args(argv)


def _read_config(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as e:
        parser.error(f"--config {path}: {e.strerror}")
    except yaml.YAMLError as e:
        parser.error(f"--config {path} is not YAML: {str(e).splitlines()[0]}")
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    if not isinstance(data, dict):
        parser.error(f"--config {path} must hold 'option: value' lines, got {type(data).__name__}")
    unknown = sorted(str(k) for k in data if str(k).replace("-", "_") not in actions)
    if unknown:
        parser.error(f"--config {path} has unknown options: {', '.join(unknown)}; known: {', '.join(sorted(actions))}")
    clean = {}
    for key, value in data.items():
        action = actions[str(key).replace("-", "_")]
        flag = isinstance(action.const, bool) or isinstance(action, argparse.BooleanOptionalAction)
        if flag != isinstance(value, bool) and value is not None:
            parser.error(f"--config {path}: {key} must {'' if flag else 'not '}be true or false, got {value!r}")
        if value is not None and not flag:
            try:
                many = action.nargs not in (None, 0, "?")
                cast = action.type or str
                value = [cast(v) for v in value] if many else cast(value)
            except (TypeError, ValueError) as e:
                parser.error(f"--config {path}: {key}: {value!r} cannot be read ({e})")
            if action.choices is not None and value not in action.choices:
                parser.error(f"--config {path}: {key} must be one of {', '.join(action.choices)}, got {value!r}")
        clean[action.dest] = value
    return clean


# -- processes ----------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace) -> Accelerator:
    """Accelerator, threads and seeds of this process."""
    asked = int(os.environ.get("ACCELERATE_NUM_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    # a bare `accelerate launch` pins OpenMP to one thread
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(args.threads or max(1, cores // local))
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.amp, log_with=args.log_with, project_dir=args.output)
    if accelerator.num_processes != asked and accelerator.is_main_process:
        print(
            f"note: {asked} processes were asked for, this run has {accelerator.num_processes}. On a CPU, several need "
            f"`accelerate launch --multi_gpu --num_processes {asked} … --cpu`.",
            file=sys.stderr,
        )
    set_seed(args.seed)
    return accelerator


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


def step_seed(*numbers: int) -> int:
    """A seed that is a function of its numbers, for what draws from global generators inside a step."""
    value = 0x9E3779B97F4A7C15
    for n in numbers:
        value = ((value ^ (n + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 64)
    return value >> 1


@contextlib.contextmanager
def main_guard(name: str):
    """Turn expected errors into one message and exit status 2.

    The first process speaks. Another one does so a little later: where all have the error, the launcher has ended it
    by then.
    """
    try:
        yield
    except (ValueError, ImportError, FileNotFoundError) as e:
        if os.environ.get("TIMM_RESNAS_DEBUG"):
            raise
        rank = int(os.environ.get("RANK") or 0)
        if rank:
            time.sleep(3)
        print(f"{name}: error{f' in process {rank}' * bool(rank)}: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command continues the run", file=sys.stderr, flush=True)
        sys.exit(130)


# -- the run's folder ---------------------------------------------------------------------------------------------


class Run:
    """A run's folder, with the options it was made with.

    Args:
        args: The resolved options.
        accelerator: Only its main process writes.
        name: The folder's name where ``args`` has none.
        fixed: Options that decide results; a folder made with other values of these is refused.

    Raises:
        RunError: The folder belongs to a run with other options.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, name: str, fixed: list[str]) -> None:
        self.folder = Path(args.output) / (args.name or name)
        self.state = self.folder / "state"
        self.is_main = accelerator.is_main_process
        self._accelerator = accelerator
        self._config = {k: v for k, v in vars(args).items() if k != "config"}
        path = self.folder / "config.yaml"
        self.resumed = path.exists()
        if self.resumed:
            old = yaml.safe_load(path.read_text(encoding="utf-8"))
            changed = [k for k in fixed if old.get(k) != self._config[k]]
            if changed:
                was = ", ".join(f"{k} {old.get(k)!r} (now {self._config[k]!r})" for k in changed)
                raise RunError(
                    f"{self.folder} holds a run with other options: {was}. Give this run another --name, or remove "
                    f"that folder"
                )
        accelerator.wait_for_everyone()

    def begin(self) -> None:
        """Everything asked for is possible: the folder is this run's from now on (config.yaml), trackers start."""
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write_text("config.yaml", yaml.safe_dump(self._config, sort_keys=False))
        if self._config["log_with"]:
            plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in self._config.items()}
            self._accelerator.init_trackers("timm_resnas", plain)
        self._accelerator.wait_for_everyone()

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made by the main process once in the run's life and kept in state/<name> (JSON)."""
        path = self.state / name
        if self.is_main and not (self.resumed and path.exists()):
            made = make()
            self.state.mkdir(parents=True, exist_ok=True)
            self.write_text(f"state/{name}", json.dumps(made) + "\n")
        self._accelerator.wait_for_everyone()
        return json.loads(path.read_text(encoding="utf-8"))

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all; main process only."""
        if self.is_main:
            path = self.folder / name
            fresh = path.with_name(f".{path.name}.new")
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(path)

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(data, indent=1) + "\n")

    def say(self, text: str = "") -> None:
        """Print on the main process, clear of any progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


class Progress:
    """A bar on a terminal; nothing in a log, where `Run.say` prints lines."""

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


def format_minutes(seconds: float) -> str:
    """3:07 or 1:02:45."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def dataset_name(dataset: str) -> str:
    """Part of a run's folder name: 'digits', or the last folder of a path."""
    kind, _, where = dataset.partition(":")
    return "-".join([kind, *Path(where).parts[-1:]]) if where else kind


class Clock:
    """Seconds since the start, and a limit."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self.begin = time.monotonic()
        self.limit = None if max_minutes is None else max_minutes * 60

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def over(self, extra: float = 0.0) -> bool:
        """Whether the limit is passed, or would be after ``extra`` more seconds."""
        return self.limit is not None and self.seconds() + extra > self.limit
