"""Multiply-accumulates of any PyTorch model, counted while it runs without data.

What `cost` computes from an architecture, this counts on a built model, by the same rules: convolutions, linear layers
and the two products of attention.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "count_modules", "expected_macs", "macs_vary"]


def count_macs(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-accumulates of one inference forward of one image.

    Torch's ``FlopCounterMode`` counts, on a copy of the model on the meta device: nothing is computed, and attention
    and recurrent layers fall apart into matrix products there. Elsewhere they are fused kernels, not all of which the
    counter knows: before torch 2.15 it counts no attention on a CPU. Attention that has a plain form beside a fused one
    (timm's ``fused_attn``) is counted in its plain form, which is the one that papers count.

    Args:
        model: On any device, in any precision, training or not; it is left as it was, and so are torch's random
            numbers.
        input_size: (channels, height, width) of the image.

    Returns:
        Of a network that does more for some images than for others the most, see `macs_vary`.

    Raises:
        ValueError: The model takes no such image, or its shapes depend on values, not on shapes alone.
    """
    return count_modules(model, input_size)[""]


def macs_vary(model: nn.Module) -> bool:
    """Whether a network does more for some images than for others, as Adaptive Token Sampling does.

    Then `count_macs` tells the most that it may do, and `expected_macs` what it does for given images.
    """
    return hasattr(model, "macs_vary") and model.macs_vary()


@torch.inference_mode()
def expected_macs(model: nn.Module, images: torch.Tensor) -> float:
    """Multiply-accumulates of an image, by the rules of `count_macs`: mean over these, each alone.

    Args:
        model: Left as it was.
        images: [n, C, H, W] on the model's device.
    """
    plain = copy.deepcopy(model).eval()
    for module in plain.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        for x in images.split(1):
            plain(x)
    return counter.get_total_flops() / 2 / len(images)


def count_modules(model: nn.Module, input_size: Sequence[int]) -> dict[str, int]:
    """As `count_macs`, for each module by its name; the network itself is ``""``. Modules without any are left out."""
    skeleton = _on_meta(model).eval()
    for module in skeleton.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False
    try:
        with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():  # type: ignore[arg-type]
            skeleton(torch.empty(1, *input_size, device="meta"))
    except (AssertionError, RuntimeError) as e:
        size = " x ".join(map(str, input_size))
        raise ValueError(f"MACs of {type(model).__name__} cannot be counted for an image of {size}: {e}") from e
    counts = {"": counter.get_total_flops() // 2}
    for name, by_operation in counter.get_flop_counts().items():
        _, dot, module = name.partition(".")  # the first is the network's class
        if dot:
            counts[module] = sum(by_operation.values()) // 2
    return counts


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors have shapes only, and float32 for every floating type."""
    memo = {}
    for module in model.modules():
        for value in tree_leaves(vars(module)):  # parameters, buffers, and what is kept in other attributes
            if isinstance(value, torch.Tensor):
                dtype = torch.float32 if value.is_floating_point() else value.dtype
                shape = torch.empty_like(value, dtype=dtype, device="meta", requires_grad=False)
                memo[id(value)] = nn.Parameter(shape, False) if isinstance(value, nn.Parameter) else shape
    return copy.deepcopy(model, memo)
