"""Writing a model's folder."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import nn

from ..version import __version__
from .checks import CONFIG, GOLDEN, golden_tensors, plain_name
from .errors import HubError, first_line

__all__ = ["save_pretrained"]

_logger = logging.getLogger(__name__)


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    info: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    golden: bool = True,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a model's folder for ``timm.create_model('local-dir:<folder>', pretrained=True)``.

    The folder appears whole or not at all; a model's folder that was there is replaced, with all that is in it.

    Args:
        model: A model made by `timm.create_model`.
        folder: Where to.
        info: JSON-plain facts about the model (costs, scores, how it was found), kept in config.json under
            ``timm_resnas``, which timm ignores.
        label_names: Class names in the order of the classifier's outputs.
        data_config: Preprocessing (``input_size, mean, std, crop_pct, interpolation, …``) where it differs from the
            model's own.
        golden: Store an input and its logits, too, which `load` can check.
        files: More text files, name -> content; `read_file` reads them back.

    Raises:
        ValueError: A model argument is not JSON-plain.
        HubError: The folder holds something else than a model.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise HubError(f"{folder} exists and holds no {CONFIG}; it would be replaced: give the name of a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"timm_resnas": {"version": __version__, **(info or {})}}
    if label_names is not None:
        config["label_names"] = list(label_names)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    before = fresh.with_name(f"{fresh.name}-before")
    try:
        fresh.chmod(0o755)
        timm.models.save_for_hf(
            model, fresh, model_config=config, safe_serialization=True, data_config=dict(data_config or {}) or None
        )
        if golden:
            size = json.loads((fresh / CONFIG).read_text(encoding="utf-8"))["pretrained_cfg"]["input_size"]
            try:
                save_file(golden_tensors(model, size), fresh / GOLDEN)
            except Exception as e:  # weights that were trained for days are not lost over this
                _logger.warning(f"{folder}: no {GOLDEN}, the model does not compute {size} images: {first_line(e)}")
        for name, content in (files or {}).items():
            (fresh / plain_name(name)).write_text(content, encoding="utf-8")
        if folder.exists():
            folder.rename(before)  # a kill leaves one of the two whole
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
    return folder
