"""Writing a model's folder: what was written is read back as a stranger would before it replaces anything."""

import fnmatch
import json
import logging
import numbers
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from timm.models._hub import save_config_for_hf
from torch import nn

from ..version import __version__
from .checks import CONFIG, GOLDEN, WEIGHTS, plain_name
from .errors import HubError, first_line
from .load import fetch, load
from .weights import check_tensors, golden_input, outputs_of, sha256_of

__all__ = ["save_pretrained"]

_logger = logging.getLogger(__name__)

_READ_BACK = 1_000_000_000  # parameters; of a larger model, a second one is not held in memory only to compare

# what timm's configuration says of the weights that an architecture was released with, and of nothing else
_OF_RELEASED_WEIGHTS = ("tag", "license", "origin_url", "description", "notes")
_OF_PAPERS = ("paper_ids", "paper_name")


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    info: Mapping[str, Any] | None = None,
    label_names: Sequence[str | int] | None = None,
    data_config: Mapping[str, Any] | None = None,
    base_model: str | bool | None = None,
    golden: bool = True,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a model's folder for ``timm.create_model('local-dir:<folder>', pretrained=True)``.

    The folder appears whole or not at all; a model's folder that was there is replaced, with all that is in it. Before
    that, the new one is loaded, and its logits are compared with the model's own.

    Where the weights are from is what the caller says: ``info["license"]`` and ``base_model``. What timm says of the
    weights that this architecture was released with (tag, licence, origin) is left out, for these are others.

    Args:
        model: A model made by `timm.create_model`; also in channels_last, compiled, or in a DataParallel wrapper.
        folder: Where to.
        info: JSON-plain facts about the model (costs, scores, how it was found), kept in config.json under
            ``timm_resnas``, which timm ignores.
        label_names: Class names in the order of the classifier's outputs; integers are written as texts.
        data_config: Preprocessing (``input_size, mean, std, crop_pct, interpolation, …``) where it differs from the
            model's own; ``background`` is the colour behind transparent pixels.
        base_model: What the weights were trained on from: a repository or name; True for the weights that the model's
            ``pretrained_cfg`` names, of a model that was created with ``pretrained=True``.
        golden: Also store an input and its logits, which `load` can check.
        files: More text files, name -> content; `read_file` reads them back.

    Raises:
        ValueError: A model argument is not JSON-plain.
        HubError: The folder holds something else than a model, or what would be written is not this model: a layer was
            replaced by hand, weights are not finite, names do not fit the classes. What was there stays.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise HubError(f"{folder} exists and holds no {CONFIG}; it would be replaced: give the name of a new folder")
    model = _unwrapped(model)
    config: dict[str, Any] = {}
    if label_names is not None:
        config["label_names"] = _labels(label_names, model)
    block = {"version": __version__, **(info or {})}
    if base := _base(model, base_model):
        block["base_model"] = base
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    before = fresh.with_name(f"{fresh.name}-before")
    try:
        tensors = _tensors(model)
        check_tensors(tensors, "the model")
        save_file(tensors, fresh / WEIGHTS)
        del tensors
        block["sha256"] = {WEIGHTS: sha256_of(fresh / WEIGHTS)}
        config["timm_resnas"] = block
        preprocessing = dict(data_config or {})
        if (background := preprocessing.pop("background", None)) is not None:  # timm's configuration has no such field
            block["background"] = background
        save_config_for_hf(model, fresh / CONFIG, model_config=config, data_config=preprocessing or None)
        _state_origin(fresh / CONFIG, block.get("license"))
        stored = _read_back(model, fresh, folder)
        if golden and stored is not None:
            save_file(stored, fresh / GOLDEN)
        for name, content in (files or {}).items():
            (fresh / plain_name(name)).write_text(content, encoding="utf-8")
        _permit(fresh)
        if folder.exists():
            folder.rename(before)  # a kill leaves one of the two whole
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
    return folder


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that torch.compile, DataParallel or DistributedDataParallel were given."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            break
    if not hasattr(model, "pretrained_cfg"):
        raise HubError(f"a {type(model).__name__} cannot be saved for timm; expected a model of timm.create_model")
    return model


def _labels(names: Sequence[str | int], model: nn.Module) -> list[str]:
    wrong = [n for n in names if not isinstance(n, str | numbers.Integral) or isinstance(n, bool)]
    if isinstance(names, str) or wrong:
        raise HubError(
            f"label_names must be texts or integers, got {names if isinstance(names, str) else wrong[0]!r:.60}"
        )
    if len(names) != model.num_classes:
        raise HubError(f"label_names has {len(names)} names for a model of {model.num_classes} classes")
    return [n if isinstance(n, str) else str(int(n)) for n in names]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state as a file holds it: plain layout, nothing shared, compiled parts by their own names."""
    tensors, seen = {}, set()
    for name, value in model.state_dict().items():
        if value.is_meta:
            raise HubError("the model is on the meta device and has no weights to save")
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        tensors[name.replace("_orig_mod.", "")] = tensor
    return tensors


def _base(model: nn.Module, base_model: str | bool | None) -> dict[str, str] | None:
    if not base_model:
        return None
    if base_model is not True:
        return {"name": str(base_model)}
    cfg = model.pretrained_cfg
    name = cfg.get("hf_hub_id") or cfg.get("file") or cfg.get("url")
    if not name:
        raise HubError(f"base_model=True: {cfg.get('architecture')} has no pretrained weights; give their name")
    return {k: v for k, v in (("name", str(name)), ("license", cfg.get("license"))) if v}


def _state_origin(path: Path, license: str | None) -> None:
    """Take out of a config.json what timm says of other weights than these."""
    data = json.loads(path.read_text(encoding="utf-8"))
    cfg = data["pretrained_cfg"]
    for name in _OF_RELEASED_WEIGHTS:
        cfg.pop(name, None)
    if license:
        cfg["license"] = license
    # a paper is the architecture's where all released weights name the same
    architecture = data["architecture"]
    tagged = fnmatch.filter(timm.list_models(f"{architecture}*", include_tags=True), f"{architecture}.*")
    for name in _OF_PAPERS:
        stated = {str(getattr(get_pretrained_cfg(t), name, None)) for t in tagged or [architecture]}
        if name in cfg and len(stated) > 1:
            del cfg[name]
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _read_back(model: nn.Module, fresh: Path, folder: Path) -> dict[str, torch.Tensor] | None:
    """Load what was written and compare outputs; an input and its logits, None where the model computes none.

    Raises:
        HubError: What was written is not the model.
    """
    data = json.loads((fresh / CONFIG).read_text(encoding="utf-8"))
    size = data["pretrained_cfg"]["input_size"]
    x = golden_input(size)
    try:
        own = outputs_of(model, x)
    except Exception as e:  # weights that were trained for days are not lost over this
        own = None
        _logger.warning(f"{folder}: no {GOLDEN}, the model does not compute {size} images: {first_line(e)}")
    why = _difference(model, fresh, folder, x, own)
    if why is not None and data.get("model_args", {}).get("global_pool") != _given(model, "global_pool"):
        # timm notes the pooling that it finds in the model; what follows from other arguments is not found there
        data["model_args"].pop("global_pool")
        if (given := _given(model, "global_pool")) is not None:
            data["model_args"]["global_pool"] = given
        (fresh / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        if _difference(model, fresh, folder, x, own) is None:
            why = None
    if why is not None:
        raise HubError(
            f"{folder} is not written, and what was there stays: the model is not what its recorded arguments make "
            f"({why}); change it by reset_classifier, set_input_size or arguments of create_model"
        )
    return None if own is None else {"input": x.to(torch.float16), **own}


def _given(model: nn.Module, name: str) -> Any:
    return getattr(model, "_model_args", {}).get(name)


def _difference(
    model: nn.Module, fresh: Path, folder: Path, x: torch.Tensor, own: dict[str, torch.Tensor] | None
) -> str | None:
    """In what the folder's model differs from the model; None if in nothing. ``own`` becomes the folder's outputs where
    the model's are of another device or precision."""
    param = next(model.parameters())
    try:
        if sum(p.numel() for p in model.parameters()) > _READ_BACK:
            fetch(fresh)
            return None
        with torch.random.fork_rng(devices=[]):  # building draws numbers, and the caller's training may continue
            built = load(fresh).eval()
    except HubError as e:
        return str(e).replace(str(fresh), str(folder))
    if own is None:
        return None
    exact = param.device.type == "cpu" and param.dtype == torch.float32
    for name, got in outputs_of(built, x).items():
        expected = own[name]
        if got.shape != expected.shape:
            return f"its {name} have shape {list(expected.shape)}, those of the folder's model {list(got.shape)}"
        # elsewhere than on this processor, rounding of half precision and TF32
        rtol, atol = (1e-3, 1e-4) if exact else (0.0, 0.1 * expected.abs().max().item() + 1e-2)
        if not torch.allclose(got, expected, rtol=rtol, atol=atol, equal_nan=True):
            return f"the folder's model gives other {name}, by {(got - expected).abs().max().item():.3g}"
        if not exact:
            own[name] = got
    return None


def _permit(folder: Path) -> None:
    """The access that any new file gets here: safetensors and temporary folders are made for their owner alone."""
    mode = stat.S_IMODE((folder / CONFIG).stat().st_mode)
    for path in folder.iterdir():
        path.chmod(mode)
    folder.chmod(mode | (mode & 0o444) >> 2)
