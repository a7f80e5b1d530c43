"""Save models in timm's own format: config.json and model.safetensors."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .version import __version__

__all__ = ["save_pretrained"]


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    info: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model's folder for ``timm.create_model('local-dir:<folder>', pretrained=True)``.

    The folder appears whole or not at all; one that was there is replaced.

    Args:
        model: A model made by `timm.create_model`.
        folder: Where to.
        info: JSON-plain facts about the model (costs, scores, how it was found), kept in config.json under
            ``timm_resnas``, which timm ignores.
        label_names: Class names in the order of the classifier's outputs.
        data_config: Preprocessing (``input_size, mean, std, crop_pct, interpolation, …``) where it differs from the
            model's own.

    Raises:
        ValueError: A model argument is not JSON-plain.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"timm_resnas": {"version": __version__, **(info or {})}}
    if label_names is not None:
        config["label_names"] = list(label_names)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fresh.chmod(0o755)
        timm.models.save_for_hf(
            model, fresh, model_config=config, safe_serialization=True, data_config=dict(data_config or {}) or None
        )
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder
