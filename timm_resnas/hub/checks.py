"""What a model's folder from the net may ask for, checked before anything is built.

A config.json is data: it names a registered architecture and its arguments. It may still ask for a network or an image
of any size, or be malformed to harm the reader. `read_config` checks its form, `build_on_meta` builds the network
without memory and stops when it grows too large or takes too long. Nothing here allocates in proportion to a number
that the file states.
"""

import dataclasses
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn
from torch.utils._pytree import tree_iter

from .bounds import bounded
from .errors import HubError

__all__ = ["Config", "build_on_meta", "plain_name", "read_config"]

CONFIG, WEIGHTS, GOLDEN, CARD = "config.json", "model.safetensors", "test_tensors.safetensors", "README.md"
EXPORTS = "export"  # folder of a model's files for other runtimes
PICKLES = ("pytorch_model.bin", "pytorch_model.pth", "model.pth")

MAX_PARAMS = 8_000_000_000  # the largest models of timm have 7
MAX_CONFIG_BYTES = 4 << 20  # the largest legitimate ones list 21,000 class names
_MAX_NESTING = 16
_MAX_VALUES = 200_000
_MAX_TEXT = 65536
_MAX_ARG = 1 << 16  # any number among a model's arguments
_MAX_INPUT = 4096  # pixels
_MAX_IMAGE = 1 << 26  # numbers of an image, over all channels
_MAX_RESIZED = 8192  # pixels of a side before it is cropped
_MAX_CHANNELS = 512
_INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "random")
_CROP_MODES = ("border", "center", "squash")
_MAX_TABLES = 128 << 20  # bytes of tables that are in no file, beside as many as the weights have

# arguments of timm's builder rather than of a model
_BUILDER_ARGS = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn"),
    *("pretrained_model_args", "checkpoint_path", "cache_dir", "features_only", "feature_cfg", "kwargs_filter"),
    *("model_cls", "model_name", "variant", "scriptable", "exportable", "no_jit", "device", "dtype"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A checked config.json."""

    where: str
    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    info: dict[str, Any]  # ours, the block timm_resnas
    data: dict[str, Any]  # the whole file


# -- config.json --------------------------------------------------------------------------------------------------


def read_config(path: str | os.PathLike, where: str | None = None) -> Config:
    """Read and check a model's config.json.

    Args:
        path: The file.
        where: What messages call it.

    Raises:
        HubError: It is not JSON of timm's form, or holds values that no model has.
    """
    path, where = Path(path), where or str(path)
    data = _read_json(path, where)
    if not isinstance(data, dict):
        raise HubError(f"{where} must hold a JSON object, got {type(data).__name__}")
    architecture = data.get("architecture")
    if not isinstance(architecture, str) or not architecture:
        raise HubError(f"{where}: architecture must be the name of a timm model, got {_short(architecture)}")
    if not timm.is_model(architecture):
        raise HubError(
            f"{where}: architecture {_short(architecture)} is not registered with timm; import the package that "
            f"defines it, or update timm (here {timm.__version__}) and timm_resnas"
        )
    model_args = data.get("model_args", {})
    if not isinstance(model_args, dict):
        raise HubError(f"{where}: model_args must be an object, got {type(model_args).__name__}")
    _check_args(model_args, f"{where}: model_args")
    # the oldest form of timm has everything at the top
    cfg = data.get("pretrained_cfg", {k: v for k, v in data.items() if k not in ("architecture", "num_features")})
    if not isinstance(cfg, dict):
        raise HubError(f"{where}: pretrained_cfg must be an object, got {type(cfg).__name__}")
    _check_cfg(cfg, f"{where}: pretrained_cfg", "pretrained_cfg" in data, model_args.get("in_chans"))
    if "num_classes" in data:
        _integer(data["num_classes"], f"{where}: num_classes", 0)
    _check_labels(data, where)
    info = data.get("timm_resnas", {})
    if not isinstance(info, dict):
        raise HubError(f"{where}: timm_resnas must be an object, got {type(info).__name__}")
    return Config(where, architecture, model_args, cfg, info, data)


def _read_json(path: Path, where: str) -> Any:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise HubError(f"{where} is not a regular file")
        size = found.st_size
        if size > MAX_CONFIG_BYTES:
            raise HubError(f"{where} has {size:,} bytes; a config.json has at most {MAX_CONFIG_BYTES:,}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HubError(f"{where} does not exist; expected a model's folder with config.json") from None
    except UnicodeDecodeError:
        raise HubError(f"{where} is not UTF-8 text") from None
    except OSError as e:
        raise HubError(f"{where} cannot be read: {e.strerror}") from None

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not a JSON number")

    try:
        data = json.loads(text, parse_constant=constant)
    except RecursionError:
        raise HubError(f"{where} is nested too deeply; at most {_MAX_NESTING} levels are read") from None
    except ValueError as e:
        raise HubError(f"{where} is not JSON: {str(e):.100}") from None
    _check_nesting(data, where)
    return data


def _check_nesting(data: Any, where: str) -> None:
    level, count, nesting = [data], 0, 0
    while level:
        count += len(level)
        if nesting > _MAX_NESTING:
            raise HubError(f"{where} is nested too deeply; at most {_MAX_NESTING} levels are read")
        if count > _MAX_VALUES:
            raise HubError(f"{where} holds more than {_MAX_VALUES:,} values")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, float) and not math.isfinite(value):
                raise HubError(f"{where} holds a number that is not finite")
        level, nesting = inner, nesting + 1


def _check_args(args: dict[str, Any], where: str) -> None:
    for name, value in args.items():
        if not name.isidentifier() or name.startswith("_"):
            raise HubError(f"{where}: {_short(name)} is not the name of a model's argument")
        if name in _BUILDER_ARGS:
            raise HubError(f"{where}: {name} is not for a config.json to set")
        for leaf in tree_iter(value):
            if isinstance(leaf, str) and len(leaf) > _MAX_TEXT:
                raise HubError(f"{where}: {name} holds a text of {len(leaf):,} characters; at most {_MAX_TEXT:,}")
            if isinstance(leaf, int | float) and not -1 <= leaf <= _MAX_ARG:
                raise HubError(f"{where}: {name} holds {_short(leaf)}; expected numbers from 0 to {_MAX_ARG}")
        if name in ("num_classes", "in_chans"):
            _integer(value, f"{where}: {name}", 1 if name == "in_chans" else 0)
        if name == "img_size":
            for side in value if isinstance(value, list) and len(value) == 2 else [value]:
                _integer(side, f"{where}: img_size", 1, _MAX_INPUT)


def _check_cfg(cfg: dict[str, Any], where: str, strict: bool, in_chans: Any) -> None:
    known = {f.name for f in dataclasses.fields(PretrainedCfg)}
    unknown = sorted(set(cfg) - known)
    if unknown and strict:
        raise HubError(f"{where} has unknown keys: {', '.join(map(_short, unknown[:5]))}")
    for name in ("state_dict", "hf_hub_filename", "custom_load"):
        if cfg.get(name):
            raise HubError(f"{where}: {name} is not for a config.json to set; weights are in model.safetensors")
    channels = in_chans or (cfg.get("input_size") or [3])[0]
    crops = [cfg[name] for name in ("crop_pct", "test_crop_pct") if cfg.get(name) is not None]
    for name in ("crop_pct", "test_crop_pct"):
        if cfg.get(name) is not None and not (_is_number(cfg[name]) and 0.05 <= cfg[name] <= 4):
            raise HubError(f"{where}: {name} must be a number from 0.05 to 4, got {_short(cfg[name])}")
    for name in ("input_size", "test_input_size", "min_input_size"):
        size = cfg.get(name)
        if size is None:
            continue
        if not isinstance(size, list) or len(size) != 3:
            raise HubError(f"{where}: {name} must be [channels, height, width], got {_short(size)}")
        for value in size:
            _integer(value, f"{where}: {name}", 1, _MAX_INPUT)
        if size[0] > _MAX_CHANNELS or math.prod(size) > _MAX_IMAGE:
            raise HubError(f"{where}: {name} {size} is too large; at most {_MAX_IMAGE:,} numbers are read")
        if crops and max(size[1:]) / min(crops) > _MAX_RESIZED:
            side = max(size[1:]) / min(crops)
            raise HubError(
                f"{where}: {name} {size} with crop_pct {min(crops)} would resize images to {side:,.0f} pixels; at most "
                f"{_MAX_RESIZED:,}"
            )
    for name in ("mean", "std"):
        values = cfg.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or not all(_is_number(v) and abs(v) < 1e4 for v in values):
            raise HubError(f"{where}: {name} must be a list of numbers, got {_short(values)}")
        if isinstance(channels, int) and len(values) not in (1, channels):
            raise HubError(f"{where}: {name} has {len(values)} numbers, expected one for each of {channels} channels")
        if name == "std" and not all(v >= 1e-4 for v in values):
            raise HubError(f"{where}: std must be at least 0.0001, got {_short(values)}")
    for name, choices in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES)):
        if cfg.get(name) is not None and cfg[name] not in choices:
            raise HubError(f"{where}: {name} must be one of {', '.join(choices)}, got {_short(cfg[name])}")
    for name in ("num_classes", "label_offset"):
        if cfg.get(name) is not None:
            _integer(cfg[name], f"{where}: {name}", 0)
    for name in ("tag", "architecture", "license", "description", "origin_url", "paper_name"):
        if cfg.get(name) is not None and not isinstance(cfg[name], str):
            raise HubError(f"{where}: {name} must be a text, got {_short(cfg[name])}")
    for name in ("first_conv", "classifier"):
        names = cfg.get(name)
        names = names if isinstance(names, list) else [names]
        if not all(n is None or isinstance(n, str) for n in names):
            raise HubError(f"{where}: {name} must name layers, got {_short(cfg[name])}")
    for name in ("fixed_input_size", "custom_load"):
        if cfg.get(name) is not None and not isinstance(cfg[name], bool):
            raise HubError(f"{where}: {name} must be true or false, got {_short(cfg[name])}")


def _check_labels(data: dict[str, Any], where: str) -> None:
    labels = data.get("label_names")
    names = list(labels.values()) if isinstance(labels, dict) else labels
    if labels is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise HubError(f"{where}: label_names must be a list of texts, got {_short(labels)}")
    descriptions = data.get("label_descriptions")
    if descriptions is not None and not isinstance(descriptions, dict):
        raise HubError(f"{where}: label_descriptions must be an object, got {_short(descriptions)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integer(value: Any, what: str, minimum: int = 1, maximum: int = _MAX_ARG) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise HubError(f"{what} must be an integer from {minimum} to {maximum}, got {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a larger number"
    return text if len(text) <= 60 else text[:57] + "..."


# -- the network --------------------------------------------------------------------------------------------------


def build_on_meta(config: Config, max_params: int = MAX_PARAMS) -> nn.Module:
    """The network that a config.json describes, without memory for its weights.

    Raises:
        HubError: Its constructor refuses the arguments, or it would be too large.
    """
    cfg = {k: v for k, v in config.pretrained_cfg.items() if k not in ("source", "file", "url", "hf_hub_id")}
    if "num_classes" in config.data:
        cfg["num_classes"] = config.data["num_classes"]
    try:
        with bounded(config.where, max_params), torch.device("meta"):
            model = timm.create_model(config.architecture, pretrained_cfg=cfg or None, **config.model_args)
    except HubError:
        raise
    except Exception as e:  # whatever a constructor does with bad arguments
        raise HubError(
            f"{config.where}: {config.architecture} cannot be built from these model_args: "
            f"{type(e).__name__}: {' '.join(str(e).split()):.300}"
        ) from None
    # where they differ, timm would leave the classifier's weights out without a word
    stated = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if stated is not None and stated != getattr(model, "num_classes", stated):
        raise HubError(f"{config.where}: num_classes is {stated}, but model_args make a model of {model.num_classes}")
    stored = sum(t.nbytes for t in model.state_dict().values())
    tables = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - stored
    if tables > _MAX_TABLES + stored:
        raise HubError(f"{config.where} describes a network with tables of {tables:,} bytes beside its weights")
    return model


# -- weights ------------------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    if name != os.path.basename(name) or name.startswith(".") or "\\" in name:
        raise HubError(f"{name!r} is not the plain name of a file beside a model")
    return name
