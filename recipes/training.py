"""What recipes that train or evaluate a model share: models by name, data, augmentation, schedule, checkpoints."""

import argparse
import ast
import contextlib
import difflib
import json
import os
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from common import Run, RunError
from safetensors import SafetensorError
from timm.models import load_state_dict, resolve_model_input_args
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

import timm_resnas  # noqa: F401  (registers the models)
from timm_resnas.data import (
    Splits,
    check_leak,
    content_hashes,
    default_augment,
    repeated,
    split_search_val,
    trained_on,
)
from timm_resnas.hub import HubError, fetch, read_file

__all__ = [
    "Checkpoints",
    "add_augmentation_options",
    "add_model_options",
    "agree",
    "augmentation",
    "check_weights",
    "cut_validation",
    "diverged",
    "full_precision",
    "make_schedule",
    "model_source",
    "open_model",
    "pair",
    "parse_kwargs",
    "record_of",
]

HASHED_IMAGES = 100_000  # larger data sets are not compared picture by picture


# -- options ----------------------------------------------------------------------------------------------------------


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which model, and with which weights."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        help="a name that timm.create_model knows, a folder that a recipe or timm saved (or local-dir:<folder>), or "
        "hf-hub:<id>",
    )
    group.add_argument(
        "--model-kwargs", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of the model, such as in_chans=1"
    )
    group.add_argument("--pretrained-path", metavar="FILE", help="weights from this file, as if they were its own")
    group.add_argument(
        "--allow-pickle", action="store_true", help="read a folder's or repository's pickled weights (weights_only)"
    )
    group.add_argument(
        "--img-size", type=int, nargs="+", metavar="N", help="side, or height and width (default: the model's)"
    )
    return group


def add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    """Augmentation of training images."""
    group = parser.add_argument_group("augmentation (timm's names; what is not given suits the data)")
    group.add_argument("--scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="area of the random crop")
    group.add_argument("--ratio", type=float, nargs=2, metavar=("MIN", "MAX"), help="aspect ratio of the random crop")
    group.add_argument(
        "--shift", type=int, metavar="PIXELS", help="random shifts instead of the random crop; 0: the crop"
    )
    group.add_argument("--hflip", type=float, metavar="P", help="probability of a horizontal flip")
    group.add_argument("--vflip", type=float, metavar="P", help="probability of a vertical flip")
    group.add_argument("--color-jitter", type=float, metavar="X", help="strength; without effect beside --aa")
    group.add_argument("--aa", metavar="NAME", help="auto-augment, such as rand-m9-mstd0.5-inc1")
    group.add_argument("--reprob", type=float, metavar="P", help="probability of random erasing")
    group.add_argument("--remode", choices=["const", "rand", "pixel"], help="what random erasing fills in")


def augmentation(args: argparse.Namespace, splits: Splits, size: tuple[int, int]) -> dict[str, Any]:
    """Arguments of `train_transform`: what suits the data, and what the options say.

    The default shifts of digits and Fashion-MNIST give way to a random crop that is asked for.
    """
    names = dict(aa="auto_augment", reprob="re_prob", remode="re_mode")
    ours = ("scale", "ratio", "shift", "hflip", "vflip", "color_jitter", "aa", "reprob", "remode")
    given = {names.get(k, k): getattr(args, k) for k in ours if getattr(args, k) is not None}
    default = default_augment(splits, size)
    if given.get("shift") == 0 or ("shift" not in given and {"scale", "ratio", "auto_augment"} & given.keys()):
        given.pop("shift", None)
        default.pop("shift", None)
    if "shift" in given:
        default.pop("scale", None)
    return {**default, **given}


def pair(size: list[int] | None) -> tuple[int, int] | None:
    """(height, width) from what --img-size was given.

    Raises:
        RunError: More than two numbers, or none above 0.
    """
    if size is None:
        return None
    if len(size) > 2 or min(size) < 1:
        raise RunError(f"--img-size takes one side, or height and width; got {' '.join(map(str, size))}")
    return (size[0], size[-1])


def parse_kwargs(option: str, items: list[str]) -> dict[str, Any]:
    """{'name': value} from 'name=value'; values are Python's literals, true, false, or else text.

    Raises:
        RunError: An item without '='.
    """
    out = {}
    for item in items:
        name, sign, text = item.partition("=")
        if not sign or not name.isidentifier():
            raise RunError(f"{option} takes NAME=VALUE, got {item!r}")
        try:
            out[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            out[name] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return out


# -- models -----------------------------------------------------------------------------------------------------------


def model_source(name: str) -> str:
    """What `timm.create_model` takes: a registered name, hf-hub:… or local-dir:…, which a folder becomes.

    Raises:
        RunError: There is no such model or folder, or the folder holds no model.
    """
    kind, _, where = name.partition(":")
    if kind in ("hf-hub", "hf_hub") and where:
        return f"hf-hub:{where}"
    if kind != "local-dir":
        if timm.is_model(name):
            return name
        where = name
    folder = Path(where).expanduser()
    if folder.is_dir():
        for found in (folder, folder / "best"):
            if (found / "config.json").is_file():
                return f"local-dir:{found}"
        raise RunError(
            f"{folder} holds no config.json; expected a folder that a recipe saved a model to, such as runs/<name>/best"
        )
    if kind == "local-dir" or os.sep in name:
        raise RunError(f"there is no folder {folder}")
    close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise RunError(f"{name!r} is neither a model that timm or timm_resnas knows nor a folder{hint}")


def open_model(
    name: str,
    *,
    pretrained: bool = False,
    pretrained_path: str | None = None,
    num_classes: int | None = None,
    img_size: tuple[int, int] | None = None,
    kwargs: dict[str, Any] | None = None,
    allow_pickle: bool = False,
) -> nn.Module:
    """A model by name or folder, for these classes and this image size.

    What comes from a folder or the Hub is checked before it is built, see `timm_resnas.hub.load`.

    Where the size is not the weights' own, position embeddings are resampled as they are loaded; a classifier for
    another number of classes starts anew.

    Args:
        name: See `model_source`.
        pretrained: Load its weights.
        pretrained_path: A file to load weights from instead.
        num_classes: Default: the model's own.
        img_size: (height, width); only given to models that are built for one size.
        kwargs: Further arguments of the model.
        allow_pickle: Read pickled weights, too, where a folder or repository has no safetensors.

    Raises:
        RunError: The model cannot be built or its weights cannot be loaded; the message says why.
    """
    source, kwargs = model_source(name), dict(kwargs or {})
    if taken := {"num_classes", "img_size"} & kwargs.keys():
        raise RunError(f"--model-kwargs cannot set {' and '.join(sorted(taken))}; the data and --img-size do")
    if pretrained_path is not None and not Path(pretrained_path).is_file():
        raise RunError(f"{pretrained_path}: there is no such file of weights")
    overlay = None
    try:
        if ":" in source:
            weights = pretrained and pretrained_path is None
            source = f"local-dir:{fetch(source, weights=weights, allow_pickle=allow_pickle)}"
        resolved = resolve_model_input_args(source, dict(img_size=img_size), num_classes=num_classes, **kwargs)
        if pretrained_path is not None:
            overlay = dict(file=pretrained_path, source="", **classes_in(pretrained_path, resolved["pretrained_cfg"]))
        return timm.create_model(
            pretrained=pretrained or pretrained_path is not None, pretrained_cfg_overlay=overlay, **resolved
        )
    except (RunError, HubError):
        raise
    except (
        *(TypeError, RuntimeError, LookupError, AssertionError, ValueError, OSError, struct.error),
        *(SafetensorError, pickle.UnpicklingError, EOFError),
    ) as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        # load_state_dict's first line only says that there was an error
        why = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else lines[0]
        if "No pretrained weights exist" in why:
            why = "it has no pretrained weights; leave --pretrained out, or give --pretrained-path"
        raise RunError(f"model {name}: {why:.300}") from e


def classes_in(path: str, cfg: dict[str, Any]) -> dict[str, int]:
    """'num_classes' of a file of weights, where it has a classifier that the model's configuration names."""
    names = cfg.get("classifier") or ()
    names = (*((names,) if isinstance(names, str) else names), "cls_head")  # the latter: ViT-ResNAS as released
    state = load_state_dict(path)
    found = [len(state[f"{n}.weight"]) for n in names if f"{n}.weight" in state]
    return {"num_classes": found[0]} if found else {}


def record_of(name: str) -> dict[str, Any] | None:
    """What a saved model says of the images that its weights were trained on (`training_record`), if it does.

    Raises:
        RunError: The record is damaged.
    """
    text = read_file(name, "training_data.json") if ":" in name else None
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        raise RunError(f"training_data.json of {name} is damaged: it is not JSON") from None


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


# -- data -------------------------------------------------------------------------------------------------------------


def cut_validation(
    splits: Splits, per_class: int, fraction: float, seed: int, record: dict[str, Any] | None = None
) -> tuple[list[int], list[int]]:
    """Indices of the training part to train on and to validate on.

    Pictures that are in the data twice are not validated on, nor are those that the weights were trained on before.

    Args:
        splits: The data.
        per_class: See `split_search_val`; 0 keeps all images for training.
        fraction: See `split_search_val`.
        seed: Decides the cut.
        record: `training_record` of the weights that training starts from.
    """
    if not per_class:
        return list(range(len(splits.train))), []
    # reading every image of a large set takes hours; its pictures are compared where that is asked for
    small = len(splits.train) + len(splits.test) <= HASHED_IMAGES
    hashes = content_hashes(splits.train) if small else None
    avoid = repeated(hashes, content_hashes(splits.test)) if small else [False] * len(splits.train)
    if record is not None:
        avoid = [a or b for a, b in zip(avoid, trained_on(record, splits.train, hashes), strict=True)]
    train, val = split_search_val(splits.train, per_class=per_class, fraction=fraction, seed=seed, avoid=avoid)
    if small:
        check_leak(splits.train, train, val, splits.test)
    return train, val


# -- training ---------------------------------------------------------------------------------------------------------


def make_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    """timm's schedule over all epochs, a function of the step; the warm-up is a part of it.

    Args:
        args: `sched` (default cosine), `epochs`, `min_lr`, `warmup_lr`, `warmup_epochs`.
        optimizer: Its learning rates are set by `schedule.step_update(step)`.
        steps: Steps of an epoch.
    """
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=getattr(args, "sched", "cosine"),
            num_epochs=args.epochs,
            min_lr=args.min_lr,
            warmup_lr=args.warmup_lr,
            warmup_epochs=args.warmup_epochs,
            warmup_prefix=False,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
    except ValueError as e:
        raise RunError(f"--sched {args.sched} with --epochs {args.epochs}: {e}") from None
    return schedule


def agree(accelerator: Accelerator, losses: list[torch.Tensor], late: bool) -> tuple[float, bool]:
    """The mean loss over processes and steps, and whether the clock of one of them says that it is late."""
    both = torch.stack([torch.stack(losses).float().mean(), losses[0].new_tensor(late, dtype=torch.float32)])
    loss, late = accelerator.reduce(both, "mean").tolist()
    return loss, late > 0


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

    A file gets its name when it is whole. Any number of processes can go on from one.
    """

    def __init__(self, accelerator: Accelerator, run: Run) -> None:
        self.accelerator, self.run = accelerator, run
        self.folder = run.state / "training"

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the main process's ``state``, and remove all but the last two."""
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / "unfinished"
        with fresh.open("wb") as f:
            torch.save({**state, "step": step}, f)
            f.flush()
            os.fsync(f.fileno())
        fresh.replace(self.folder / f"step-{step:09}.pt")
        for old in sorted(self.folder.glob("step-*.pt"))[:-2]:
            old.unlink()

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, the same on all processes; a damaged one is reported and removed."""
        found = [None]
        if self.accelerator.is_main_process:
            for path in sorted(self.folder.glob("step-*.pt"), reverse=True):
                try:
                    self.read(path)
                except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as e:
                    why = (str(e).splitlines() or [type(e).__name__])[0]
                    self.run.say(f"note: {path} is damaged ({why:.80}); going on from the one before")
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
            ValueError: It holds another step than its name says; anything that `torch.load` raises when it is cut
                short.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        if path.name != f"step-{state['step']:09}.pt":
            raise ValueError(f"it holds step {state['step']}")
        return state
