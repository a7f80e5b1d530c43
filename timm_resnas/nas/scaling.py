"""Switchable scales of residual branches: each depth and width of a sub-network has its own.

NASViT (ICLR 2022, section 3): sub-networks that share weights may still differ in how much each branch adds. Its public
code indexes the second axis by the number of tokens modulo 8, not by the width that the paper names; this follows the
paper. (There a branch is multiplied by 8 / embed_dim as well, and scales begin at 1e-4.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["LAYERS", "SwitchableScale", "add_scales", "nearest", "scaled", "scaled_one"]

# where a block multiplies: the layer whose output that is
LAYERS = {"ls1": "attn.proj", "ls2": "mlp.fc2"}


class SwitchableScale(nn.Module):
    """A factor for each channel of a branch, by the depth and the width of the sub-network.

    As a module it is the full network's.

    Args:
        depths: Number of depths.
        widths: Number of widths.
        dim: Channels of the full network.
        init: The first value of all.
    """

    def __init__(self, depths: int, widths: int, dim: int, init: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.full((depths, widths, dim), float(init), device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> [..., dim]"""
        return x * self.table[-1, -1].to(x.dtype)


def scaled(scale: nn.Module, y: torch.Tensor, blocks: Sequence[Any]) -> torch.Tensor:
    """A branch of several groups, [groups * images, N, dim] or [groups, images, N, dim], each by its own scale.

    As it is where ``scale`` is not switchable. ``block.scale`` is a group's entry of the table: its depth and width.
    """
    if not isinstance(scale, SwitchableScale):
        return y
    widths, cuda = scale.table.shape[1], y.device.type == "cuda"
    at = torch.tensor([depth * widths + width for depth, width in (block.scale for block in blocks)], pin_memory=cuda)
    rows = scale.table.flatten(0, 1).index_select(0, at.to(y.device, non_blocking=True))
    rows = rows[:, None, None, : y.shape[-1]].to(y.dtype)
    return (y.unflatten(0, (len(blocks), -1)) * rows).flatten(0, 1) if y.ndim == 3 else y * rows


def scaled_one(scale: nn.Module, y: torch.Tensor, block: Any) -> torch.Tensor:
    """As `scaled` of one group, without what gradients need. [B, N, dim]"""
    if not isinstance(scale, SwitchableScale):
        return y
    return y * scale.table[block.scale][: y.shape[-1]].to(y.dtype)


def add_scales(block: nn.Module, depths: int, widths: int, init: float) -> None:
    """Give both branches of a block switchable scales.

    Raises:
        ValueError: ``init`` is not a number above 0.
    """
    if isinstance(init, bool) or not isinstance(init, int | float) or not 0 < init < float("inf"):
        raise ValueError(f"switchable_scale, the first value of scales, must be a number above 0, got {init!r:.40}")
    for which, layer in LAYERS.items():
        weight = block.get_submodule(layer).weight
        setattr(block, which, SwitchableScale(depths, widths, len(weight), init, weight.device, weight.dtype))


def nearest(values: Sequence[int], value: int) -> int:
    """Index of the value that is nearest."""
    return min(range(len(values)), key=lambda i: abs(values[i] - value))
