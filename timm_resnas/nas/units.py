"""Units: interchangeable heads or hidden units, and the parameter slices that are theirs.

Any order of the heads of an attention, or of the hidden units of an MLP, computes the same. One table of `Units` per
network serves sorting by importance, cutting and masking.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..arch import Part, Units

__all__ = ["Importance", "cut", "magnitude", "mask", "pre_norm_units", "sort_units"]


Importance = Callable[[Units, Mapping[str, torch.Tensor]], torch.Tensor]
"""Importance of each unit, [count], given the parameters by name."""


def pre_norm_units(name: str, block: nn.Module) -> tuple[Units, Units]:
    """Heads and hidden units of a transformer block with timm's ``attn`` (joint qkv) and ``mlp``.

    Args:
        name: The block's name in the network.
        block: The block.
    """
    attn, hidden, width = block.attn, block.mlp.fc1.out_features, block.attn.head_dim
    heads = [Part(f"{name}.attn.qkv.weight", 0, 3, width), Part(f"{name}.attn.qkv.bias", 0, 3, width)]
    heads = heads[: 1 + (attn.qkv.bias is not None)] + [Part(f"{name}.attn.proj.weight", 1, 1, width)]
    mlp = (Part(f"{name}.mlp.fc1.weight", 0), Part(f"{name}.mlp.fc1.bias", 0), Part(f"{name}.mlp.fc2.weight", 1))
    return Units(f"{name}.attn", attn.num_heads, tuple(heads)), Units(f"{name}.mlp", hidden, mlp)


@torch.no_grad()
def magnitude(units: Units, params: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the absolute weights and biases that make and use each unit (arXiv 2109.00642, section 3.3)."""
    total: Any = 0
    for part in units.parts:
        param = params[part.param]
        # double, so that no order of summation decides which comes first
        dtype = torch.float32 if param.device.type == "mps" else torch.float64
        others = [d for d in range(param.ndim) if d != part.dim]
        strength = param.abs().sum(dim=others, dtype=dtype) if others else param.abs().to(dtype)
        total = total + strength.view(part.runs, units.count, part.width).sum(dim=(0, 2))
    return total


@torch.no_grad()
def sort_units(
    units: Iterable[Units],
    params: Mapping[str, torch.Tensor],
    importance: Importance = magnitude,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Put the units of each layer in order of importance, the most important first. Stable and in place.

    Gradients are reordered as well, and so are the optimizer's moments.

    Raises:
        ValueError: The optimizer keeps a state that is not per weight, such as factored moments.
    """
    state = {} if optimizer is None else optimizer.state
    for unit in units:
        order = torch.argsort(importance(unit, params), descending=True, stable=True)
        for part in unit.parts:
            param = params[part.param]
            index = _index(part, unit.count, order)
            for tensor in _per_weight(param, state):
                tensor.copy_(tensor.index_select(part.dim, index))


def cut(params: Mapping[str, torch.Tensor], units: Iterable[Units], keep: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Parameters in which the named units are reduced to their first ``keep[name]``."""
    out = dict(params)
    for unit in units:
        if unit.name in keep:
            for part in unit.parts:
                kept = torch.arange(keep[unit.name], device=out[part.param].device)
                out[part.param] = out[part.param].index_select(part.dim, _index(part, unit.count, kept)).contiguous()
    return out


@torch.no_grad()
def mask(
    params: Mapping[str, torch.Tensor], units: Iterable[Units], keep: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Parameters in which the units beyond the first ``keep[name]`` are silenced: the function that cutting keeps."""
    out = {name: param.clone() for name, param in params.items()}
    for unit in units:
        if unit.name in keep:
            part = unit.parts[-1]
            gone = torch.arange(keep[unit.name], unit.count, device=out[part.param].device)
            out[part.param].index_fill_(part.dim, _index(part, unit.count, gone), 0)
    return out


def _index(part: Part, count: int, order: torch.Tensor) -> torch.Tensor:
    """Positions along the part's dimension that belong to these units, in this order."""
    one = (order[:, None] * part.width + torch.arange(part.width, device=order.device)).flatten()
    return torch.cat([one + run * count * part.width for run in range(part.runs)])


def _per_weight(param: torch.Tensor, state: Mapping[torch.Tensor, dict[str, Any]]) -> list[torch.Tensor]:
    """A parameter, its gradient, and what an optimizer keeps for each of its weights."""
    tensors = [param] if param.grad is None else [param, param.grad]
    for name, value in state.get(param, {}).items():
        if isinstance(value, torch.Tensor) and value.shape == param.shape:
            tensors.append(value)
        elif isinstance(value, torch.Tensor) and value.numel() > 1:
            raise ValueError(
                f"the optimizer's state {name!r} of shape {list(value.shape)} cannot be sorted along with a parameter "
                f"of shape {list(param.shape)}; sort_channels needs an optimizer with state per weight, such as AdamW"
            )
    return tensors
