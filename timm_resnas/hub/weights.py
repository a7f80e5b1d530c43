"""Weights and the outputs that belong to them, checked before they are believed.

`check_weights` compares a file's header with a network on meta, `check_tensors` looks at the numbers themselves: of
weights from the net, of a run's own checkpoint, of a model that is about to be saved. What a tensor is called, of which
type and shape it is, whether its numbers are finite and, of a running variance, not negative.
"""

import hashlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models._registry import model_entrypoint
from torch import nn

from .bounds import SmallTensors
from .checks import Config
from .errors import HubError

__all__ = [
    "check_golden",
    "check_tensors",
    "check_values",
    "check_weights",
    "golden_input",
    "outputs_of",
    "read_header",
    "sha256_of",
]

_Header = dict[str, tuple[Any, tuple[int, ...]]]  # of each tensor: torch.dtype, or its name in a file; shape
_MAX_HEADER_BYTES = 8 << 20
_SPARE = 1 << 22  # elements that a network may have beyond four times its file's

# types by their names in a safetensors file, for each kind of tensor that a network has
_KINDS = {
    "floating-point numbers": {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    },
    "integers": {"I64": torch.int64, "I32": torch.int32},
    "truth values": {"BOOL": torch.bool},
}


def _kind(dtype: torch.dtype | str) -> str | None:
    for kind, dtypes in _KINDS.items():
        if dtype in (dtypes if isinstance(dtype, str) else dtypes.values()):
            return kind
    return None


def check_weights(path: str | os.PathLike, config: Config, model: nn.Module, where: str | None = None) -> None:
    """Compare the header of a safetensors file with a network on meta; no tensor is read.

    Raises:
        HubError: The file is not a safetensors file, its tensors are not those of the network, or its digest is not
            the one in config.json.
    """
    path, where = Path(path), where or str(path)
    found = read_header(path, where)
    expected = model.state_dict()
    for name, (dtype, _) in found.items():
        if _kind(dtype) is None:
            raise HubError(
                f"{where}: {_some([name])} is stored as {_type_name(dtype)}, a type that weights do not have"
            )
    if {k: shape for k, (_, shape) in found.items()} != {k: tuple(v.shape) for k, v in expected.items()}:
        # what a conversion makes is as large as the configuration says; the file must be about as large
        stored = sum(math.prod(shape) for _, shape in found.values())
        needed = sum(t.numel() for t in expected.values())
        found = _filtered(found, config, model, where)
        if needed > 4 * stored + _SPARE and found.keys() == expected.keys():
            raise HubError(
                f"{where} holds {stored:,} numbers, too few for the network that config.json describes: {needed:,}"
            )
    _compare(found, expected, where, f"the weights of {config.architecture}")
    stated = config.info.get("sha256")
    digest = stated.get(path.name) if isinstance(stated, Mapping) else None
    if digest is not None and digest != sha256_of(path):
        raise HubError(
            f"{where} is not the file that was saved: its sha256 differs from the one in config.json; it was changed "
            f"or damaged afterwards"
        )


def check_tensors(
    tensors: Mapping[str, torch.Tensor], where: str, expected: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Refuse weights that cannot be a network's.

    Args:
        tensors: The weights, by name.
        where: What messages call them.
        expected: A state of the network (on meta, if need be): the names, types and shapes must be its own. A
            floating-point tensor of another precision is taken.

    Raises:
        HubError: Naming the first tensors that are wrong: missing or unknown, of a type or shape that the network does
            not have, not finite (scalars may be infinite, as the bounds of gemma4_vit's activations are), or a negative
            running variance.
    """
    if expected is not None:
        _compare({k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}, expected, where, "the network's weights")
    bad: dict[str, list[str]] = {
        "of a type that weights do not have": [],
        "not finite (NaN or infinite)": [],
        "negative variances": [],
    }
    for name, tensor in tensors.items():
        kind = _kind(tensor.dtype)
        if kind is None:
            bad["of a type that weights do not have"].append(f"{name} ({_type_name(tensor.dtype)})")
        elif kind == "floating-point numbers" and (~tensor.isfinite() if tensor.ndim else tensor.isnan()).any():
            bad["not finite (NaN or infinite)"].append(name)
        elif name.rpartition(".")[2] == "running_var" and tensor.numel() and tensor.min() < 0:
            bad["negative variances"].append(name)
    for why, names in bad.items():
        if names:
            raise HubError(f"{where} holds numbers that are {why} in {_some(names)}")


def check_values(path: str | os.PathLike, where: str) -> None:
    """`check_tensors` of a safetensors file, one tensor at a time.

    Raises:
        HubError: See `check_tensors`.
    """
    with safe_open(path, "pt") as f:
        for name in f.keys():
            check_tensors({name: f.get_tensor(name)}, where)


def _compare(
    found: Mapping[str, tuple[torch.dtype | str, tuple[int, ...]]],
    expected: Mapping[str, torch.Tensor],
    where: str,
    what: str,
) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"has {_some(unknown)} that the network lacks"] if unknown else []
        raise HubError(f"{where} does not hold {what}: it " + " and ".join(parts))
    for name, (dtype, shape) in found.items():
        needed = expected[name]
        if shape != tuple(needed.shape):
            raise HubError(f"{where}: {name} has shape {list(shape)}, the network needs {list(needed.shape)}")
        if _kind(dtype) != _kind(needed.dtype):
            raise HubError(
                f"{where}: {name} is stored as {_type_name(dtype)}, the network needs {_kind(needed.dtype)} "
                f"({_type_name(needed.dtype)})"
            )


def _type_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")[:20]


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            found.update(chunk)
    return found.hexdigest()


def read_header(path: Path, where: str) -> _Header:
    """Dtype and shape of each tensor of a safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            first = f.read(8)
            start = f.read(1)
    except FileNotFoundError:
        raise HubError(f"{where} does not exist") from None
    except OSError as e:
        raise HubError(f"{where} cannot be read: {e.strerror}") from None
    length = int.from_bytes(first, "little")
    if len(first) < 8 or start != b"{" or 8 + length > size:
        pickled = first[:2] == b"PK" or first[:1] == b"\x80"
        kind = "it is a pickle, which can run code" if pickled else "its header is damaged or cut off"
        raise HubError(f"{where} is not a safetensors file: {kind}")
    if length > _MAX_HEADER_BYTES:
        raise HubError(f"{where} has a header of {length:,} bytes; at most {_MAX_HEADER_BYTES:,} are read")
    try:
        with safe_open(path, "pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}
            return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as e:
        raise HubError(f"{where} is not a safetensors file: {str(e):.200}") from None


def _filtered(found: _Header, config: Config, model: nn.Module, where: str) -> _Header:
    """The header after timm's checkpoint_filter_fn of the architecture, for layouts that it converts."""
    if sum(math.prod(shape) for _, shape in found.values()) > 2 * sum(t.numel() for t in model.state_dict().values()):
        return found  # not this network in another layout
    types = {name: dtype for dtypes in _KINDS.values() for name, dtype in dtypes.items()}
    tensors = {k: torch.empty(shape, dtype=types[dtype], device="meta") for k, (dtype, shape) in found.items()}
    try:
        with SmallTensors(where):
            filtered = filter_fn_of(config.architecture)(tensors, model)
    except HubError:
        raise
    except ValueError as e:
        raise HubError(f"{where}: {str(e):.300}") from None
    except Exception:
        return found
    return {k: (v.dtype, tuple(v.shape)) for k, v in filtered.items() if isinstance(v, torch.Tensor)}


def filter_fn_of(architecture: str) -> Callable[[dict[str, torch.Tensor], nn.Module], dict[str, torch.Tensor]]:
    """The function of an architecture's file that converts other layouts of its weights; idle where there is none."""
    module = sys.modules[model_entrypoint(architecture).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda state_dict, model: state_dict)


def _some(names: Sequence[str]) -> str:
    names = [n if n.isprintable() else repr(n) for n in names]  # they may be a stranger's
    names = [n if len(n) <= 60 else n[:57] + "..." for n in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- the stored logits -----------------------------------------------------------------------------------------------


def golden_input(input_size: Sequence[int], images: int = 2) -> torch.Tensor:
    """The input that is stored with a model, always the same for a size.

    Args:
        input_size: Channels, height and width of its images.
        images: How many.

    Returns:
        ``[images, C, H, W]``, whose values are exact in float16.
    """
    x = torch.randn(images, *input_size, generator=torch.Generator().manual_seed(0))
    return x.to(torch.float16).float()


def outputs_of(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """A model's ``logits`` in evaluation mode; of a supernet also ``logits_smallest``, of its smallest sub-network."""
    param = next(model.parameters())
    x = x.to(param.device, param.dtype)
    modes = [(module, module.training) for module in model.modules()]  # a frozen part may be in another than the rest
    model.eval()
    try:
        with torch.inference_mode():
            if not hasattr(model, "space"):
                outputs = {"logits": model(x)}
            else:
                active = model.active
                outputs = {}
                try:
                    with model.as_saved():
                        for name, arch in (("logits", None), ("logits_smallest", model.space.smallest)):
                            model.set_arch(arch)
                            outputs[name] = model(x)
                finally:
                    model.set_arch(active)
    finally:
        for module, training in modes:
            module.training = training
    return {k: v.float().cpu().contiguous().clone() for k, v in outputs.items()}


def check_golden(model: nn.Module, path: str | os.PathLike, where: str | None = None) -> float:
    """Compare a model's outputs with the stored ones.

    Returns:
        The largest difference of a logit; 0.0 on the machine that stored them, rounding elsewhere.

    Raises:
        HubError: The file does not belong to the model, or its outputs are others.
    """
    where = where or str(path)
    shapes = {k: s for k, (_, s) in read_header(Path(path), where).items()}
    size = tuple(timm.data.resolve_model_data_config(model)["input_size"])
    images = (shapes.get("input") or (0,))[0]
    if not 1 <= images <= 16 or shapes["input"] != (images, *size) or "logits" not in shapes:
        raise HubError(f"{where} must hold input, 1 to 16 images of {list(size)}, and logits; it has {shapes!r:.200}")
    stored = load_file(path)
    outputs = outputs_of(model, stored["input"].float())
    worst = 0.0
    for name, expected in stored.items():
        if name == "input":
            continue
        got = outputs.get(name)
        if got is None or got.shape != expected.shape:
            raise HubError(f"{where}: {name} {list(expected.shape)} is not an output of this model")
        difference = (got - expected).abs().max().item()
        # timm's tolerance between machines
        if not torch.allclose(got, expected.float(), rtol=1e-3, atol=1e-4):
            raise HubError(
                f"{where}: {name} of the loaded model differ from the stored ones by {difference:.3g}; the weights "
                f"or the code that computes the model have changed"
            )
        worst = max(worst, difference)
    return worst
