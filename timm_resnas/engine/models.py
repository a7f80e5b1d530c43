"""Models by name, folder or Hub id, as recipes take them."""

from __future__ import annotations

import ast
import difflib
import json
import os
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import load_state_dict, resolve_model_input_args
from torch import nn

from ..data import match_classes
from ..hub import HubError, check_tensors, fetch, read_file
from .data import image_pair
from .run import RunError
from .settings import ModelOptions

__all__ = [
    "align_classes",
    "background_of",
    "class_names_of",
    "classes_in",
    "model_source",
    "open_model",
    "open_prepared",
    "parse_kwargs",
    "record_of",
]


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
    another number of classes is initialised.

    Args:
        name: See `model_source`.
        pretrained: Load its weights.
        pretrained_path: A file to load weights from instead.
        num_classes: Default: the model's own.
        img_size: (height, width); only given to models that are built for one size.
        kwargs: Further arguments of the model.
        allow_pickle: Read pickled weights where a folder or repository has no safetensors.

    Raises:
        RunError: The model cannot be built or its weights cannot be loaded; the message says why.
    """
    source, kwargs = model_source(name), dict(kwargs or {})
    if taken := {"num_classes", "img_size"} & kwargs.keys():
        raise RunError(f"--model-kwargs cannot set {' and '.join(sorted(taken))}; the data and --img-size do")
    if pretrained_path is not None and not Path(pretrained_path).is_file():
        raise RunError(f"{pretrained_path}: this file of weights does not exist")
    overlay = None
    try:
        if ":" in source:
            weights = pretrained and pretrained_path is None
            source = f"local-dir:{fetch(source, weights=weights, allow_pickle=allow_pickle)}"
        resolved = resolve_model_input_args(source, dict(img_size=img_size), num_classes=num_classes, **kwargs)
        if pretrained_path is not None:
            overlay = dict(file=pretrained_path, source="", **classes_in(pretrained_path, resolved["pretrained_cfg"]))
        pretrained = pretrained or pretrained_path is not None
        model = timm.create_model(pretrained=pretrained, pretrained_cfg_overlay=overlay, **resolved)
        if pretrained:
            check_tensors(model.state_dict(), pretrained_path or name)
        return model
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


def open_prepared(options: ModelOptions, pretrained: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """The model that options name, and how its images are prepared: as it says itself, unless options say otherwise.

    Raises:
        RunError: As `open_model`.
    """
    model = open_model(
        options.model,
        pretrained=pretrained,
        pretrained_path=options.pretrained_path,
        allow_pickle=options.allow_pickle,
        img_size=image_pair(options.img_size),
        kwargs=parse_kwargs("--model-kwargs", options.model_kwargs),
    )
    wanted = {k: getattr(options, k) for k in ("crop_pct", "crop_mode", "interpolation")}
    config = resolve_model_data_config(model, args={k: v for k, v in wanted.items() if v is not None})
    if options.img_size:
        config["input_size"] = (config["input_size"][0], *image_pair(options.img_size))
    return model, config


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


def class_names_of(model: nn.Module) -> list[str] | None:
    """Names of a model's classes: those it was saved with, or ImageNet's WordNet ids by their number."""
    if names := model.pretrained_cfg.get("label_names"):
        return list(names)
    # a folder or hub repository of any data set may have 1000 classes; it names them then
    subset = infer_imagenet_subset(model)
    return ImageNetInfo(subset).label_names() if subset else None


def align_classes(model: nn.Module, data_names: Sequence[str], what: str, data: str) -> str | None:
    """Bring the outputs of a model's classifiers into the data's order of classes, matched by name.

    Args:
        model: Its ``pretrained_cfg`` names its classes (``label_names``) and classifiers.
        data_names: The data's classes.
        what: What messages call the model.
        data: What messages call the data set.

    Returns:
        A note where the model does not name its classes, so that their order cannot be checked.

    Raises:
        ValueError: The classes differ; both lists are shown.
    """
    names = class_names_of(model)
    if names is None:
        if model.num_classes != len(data_names):
            raise RunError(f"{what} has {model.num_classes} classes, {data} has {len(data_names)}")
        return f"{what} does not name its classes; their order is taken to be that of {data}"
    order = match_classes(names, data_names, model=what, data=data)
    if order is not None:
        cfg = model.pretrained_cfg
        found = cfg.get("classifier") or ()
        heads = {found} if isinstance(found, str) else set(found)
        heads |= {name for name in ("patch_head",) if getattr(model, name, None) is not None}
        with torch.no_grad():
            for name in heads:
                head = model.get_submodule(name)
                for tensor in (head.weight, head.bias):
                    tensor.copy_(tensor[order].clone())
        cfg["label_names"] = list(data_names)
    return None


def background_of(name: str) -> str | None:
    """The colour behind transparent pixels that a saved model was trained with, where it says so."""
    text = read_file(name, "config.json") if ":" in name else None
    block = json.loads(text).get("timm_resnas") if text else None
    return block.get("background") if isinstance(block, dict) else None
