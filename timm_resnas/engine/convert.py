"""Checkpoint files of a paper's authors, made into folders that timm loads."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..hub import GOLDEN, check_golden, filter_fn_of, load, save_pretrained, sha256_of
from .run import RunError
from .settings import CHECKPOINT_WRAPPERS, ConvertOptions

__all__ = ["convert"]

TOLERANCE = 1e-4


def read_checkpoint(path: Path, weights: str | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights in an authors' file, and what it says about them.

    Raises:
        RunError: It is not there, would run code, or holds no weights of that name.
    """
    if not path.is_file():
        raise RunError(f"there is no file {path}")
    try:
        # released files hold their command's options, which are plain data
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # damaged files raise anything, some of it without a text
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise RunError(f"{path} is not a checkpoint of tensors that can be read safely: {why}") from None
    if not isinstance(data, dict):
        raise RunError(f"{path} holds a {type(data).__name__}, expected a checkpoint's dict")
    found = [w for w in CHECKPOINT_WRAPPERS if isinstance(data.get(w), dict)]
    if weights is not None and weights not in found:
        raise RunError(f"{path} holds no {weights!r}; it has: {', '.join(found) or 'bare weights'}")
    name = weights or (found[0] if found else None)
    state = data[name] if name else data
    tensors = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise RunError(f"{path} holds no tensors" + (f" under {name!r}" if name else ""))
    facts = {"weights": name or "the whole file"}
    if isinstance(data.get("epoch"), int):
        facts["epoch"] = data["epoch"]
    return tensors, facts


def create_model(options: ConvertOptions, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model with the checkpoint's weights.

    Raises:
        RunError: The architecture does not exist, or the weights are not its own.
    """
    if not timm.is_model(options.model):
        near = ", ".join(timm.list_models(f"*{options.model.split('_')[0]}*")[:8])
        raise RunError(f"unknown model {options.model!r}" + (f"; similar: {near}" if near else ""))
    try:
        model = timm.create_model(
            options.model, pretrained_cfg_overlay={"license": options.license}, **read_model_args(options)
        )
        # strictly: timm's own way of loading would leave out a head of another size
        model.load_state_dict(filter_fn_of(options.model)(dict(tensors), model))
    except (RuntimeError, ValueError, KeyError, TypeError) as e:
        if isinstance(e, RunError):
            raise
        text = " ".join(str(e).split())
        raise RunError(f"{options.checkpoint} does not fit {options.model}: {text:.400}") from None
    if getattr(model, "patch_head", None) is not None and "patch_head.weight" not in tensors:
        raise RunError(f"{options.checkpoint} has no patch_head; leave patch_head out of --model-args")
    return model.eval()


def read_model_args(options: ConvertOptions) -> dict[str, Any]:
    try:
        given = json.loads(options.model_args)
    except ValueError as e:
        raise RunError(f"--model-args is not JSON: {e}") from None
    if not isinstance(given, dict):
        raise RunError("--model-args must be a JSON object of the model's arguments")
    return given


def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(x)


def compare(model: torch.nn.Module, reference: Path) -> float:
    """Largest difference from the logits that the authors' code computed.

    Raises:
        RunError: It is above the tolerance, or the file does not hold input and logits.
    """
    try:
        stored = load_file(reference)
        x, expected = stored["input"].float(), stored["logits"].float()
    except (OSError, SafetensorError, KeyError) as e:
        raise RunError(f"{reference} must be a safetensors file with input and logits ({e})") from None
    got = logits(model, x)
    if got.shape != expected.shape:
        raise RunError(f"{reference}: logits have shape {list(expected.shape)}, the model's {list(got.shape)}")
    worst = (got - expected).abs().max().item()
    if not worst <= TOLERANCE:
        raise RunError(f"the logits differ from those of {reference} by {worst:.3g}, more than {TOLERANCE:g}")
    return worst


def convert(options: ConvertOptions) -> None:
    """Write the folder of a checkpoint.

    Raises:
        RunError: It cannot be read, does not fit, or gives other logits than it should.
    """
    for name in ("model", "license", "source"):
        if getattr(options, name) is None:
            raise RunError(f"--{name} is missing; `python recipes/convert.py --help` says what it means")
    checkpoint = Path(options.checkpoint)
    output = Path(options.output) if options.output else checkpoint.with_name(checkpoint.stem)
    if output.exists():
        raise RunError(f"{output} exists; give another --output")
    tensors, facts = read_checkpoint(checkpoint, options.weights)
    model = create_model(options, tensors)
    source = {"file": checkpoint.name, "sha256": sha256_of(checkpoint), "url": options.source, **facts}
    info = {"converted_from": source, "license": options.license}
    if options.reference:
        difference = compare(model, Path(options.reference))
        info["reference"] = {"file": Path(options.reference).name, "largest_difference": difference}
        print(f"logits are those of {options.reference} to {difference:.2g}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = save_pretrained(model, Path(scratch) / output.name, info=info)
        if not (folder / GOLDEN).is_file():
            raise RunError(f"{options.model} does not compute images of its own input size; see the message above")
        again = load(folder, check=True).eval()
        if check_golden(again, folder / GOLDEN) != 0:
            raise RunError("the logits before and after saving are not equal; nothing was written")
        folder.rename(output)
    params = sum(p.numel() for p in model.parameters())
    print(f"{options.checkpoint} ({len(tensors)} tensors, {facts['weights']}) -> {output}: {params:,} parameters")
    left = [k for k in tensors if k.startswith("patch_head.")] if getattr(model, "patch_head", 0) is None else []
    if left:
        print(f"left out, used in training only (patch_head=true keeps it): {', '.join(left)}")
    print("logits before and after are equal")
    print(f"\n    import timm, timm_resnas\n    model = timm.create_model('local-dir:{output}', pretrained=True)")
