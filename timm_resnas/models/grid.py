"""Grid of the position embedding in a checkpoint.

A position embedding [1, N, C] says how many positions there are, not their height and width; timm's
`resample_abs_pos_embed` takes any N for a square where it is not told.
"""

import logging
import math

from timm.layers import to_2tuple
from torch import nn

__all__ = ["checkpoint_grid"]

_logger = logging.getLogger(__name__)


def checkpoint_grid(
    model: nn.Module, num_positions: int, patch_size: int | tuple[int, int], own_grid: tuple[int, int]
) -> tuple[int, int]:
    """Height and width of the grid that a checkpoint's position embedding was made for.

    It is that of the image size in the checkpoint's config.json (timm hands it on as ``model.pretrained_model_args``);
    else that of ``input_size`` in the model's pretrained_cfg, where this has ``num_positions``; else a square, which is
    logged as a warning unless it is the model's own.

    Args:
        model: The model to load into.
        num_positions: Positions of the checkpoint, without prefix tokens.
        patch_size: Pixels per position.
        own_grid: Grid of the model.

    Raises:
        ValueError: The grid is not stated, and it need not be a square; or what is stated does not fit.
    """
    args = getattr(model, "pretrained_model_args", None) or {}
    if args.get("img_size") is not None:
        stated = _grid(args["img_size"], args.get("patch_size", patch_size))
        if math.prod(stated) != num_positions:
            raise ValueError(
                f"the checkpoint's img_size {args['img_size']} means {stated[0]}x{stated[1]} positions, but its "
                f"pos_embed has {num_positions}"
            )
        return stated
    input_size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if input_size is not None:
        stated = _grid(tuple(input_size[-2:]), patch_size)
        if math.prod(stated) == num_positions:
            return stated
    side = math.isqrt(num_positions)
    if side * side != num_positions or (num_positions == math.prod(own_grid) and own_grid[0] != own_grid[1]):
        raise ValueError(
            f"pos_embed of the checkpoint has {num_positions} positions, and nothing says in what height and width; "
            f"load it with pretrained_cfg_overlay=dict(input_size=(3, H, W)), the image size it was made for"
        )
    if (side, side) != tuple(own_grid):
        _logger.warning(
            f"nothing says for what image size the checkpoint's pos_embed was made; its {num_positions} positions are "
            f"taken for {side}x{side}"
        )
    return side, side


def _grid(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> tuple[int, int]:
    (height, width), (patch_height, patch_width) = to_2tuple(img_size), to_2tuple(patch_size)
    return height // patch_height, width // patch_width
