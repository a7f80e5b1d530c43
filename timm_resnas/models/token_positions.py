"""Fewer tokens by where they are: patches that masks left out are gathered away, for all images alike.

What masks of ViT-Slim (arXiv 2201.00814) leave of the tokens; see `timm_resnas.families.slim_masks`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn

from .narrow import Absent
from .token_reduction import METHODS, State, TokenError, TokenReduction, _check_blocks, _depths

__all__ = ["TokenPositions", "check_all_patches"]


def check_all_patches(model: nn.Module) -> None:
    """Whether blocks get every patch in training as well, so that each is known by its position.

    Raises:
        TokenError: Some are dropped at random.
    """
    if getattr(getattr(model, "patch_drop", None), "prob", 0) > 0:
        raise TokenError(
            f"a {type(model).__name__} with patch_drop_rate drops patches at random in training; positions and masks "
            f"of tokens need all of them"
        )


class TokenPositions(TokenReduction):
    """Some blocks leave out patches at fixed positions; what one drops, no later one has.

    A masked token still is a key: of zeros, so that the biases of keys and values are seen in its place, as often as
    there are such tokens. One token of zeros stands for all of them, its logit raised by the logarithm of their number:
    the network computes what the masked one does. No TorchScript.
    """

    method = "positions"

    def set_up(
        self,
        blocks: Sequence[int] | None = None,
        positions: Sequence[Sequence[int]] | None = None,
        grid: Sequence[int] | None = None,
    ) -> None:
        """Choose the patches that stay.

        Args:
            blocks: Numbers of the blocks before which patches are dropped. Default: the one in the middle.
            positions: For each of them the patches that stay, row by row from 0. Default: every second one.
            grid: Height and width of the grid that positions are counted in. Default: the model's; for another one
                the nearest patch decides.

        Raises:
            TokenError: Options or blocks that do not fit, patches that are dropped at random, or a classifier that
                reads patches.
        """
        check_all_patches(self)
        depth, own = len(self.blocks), tuple(self.patch_embed.grid_size)
        blocks = [depth // 2] if blocks is None else blocks
        self.dropping = _depths("blocks", blocks, depth)
        self.position_grid = _grid(own if grid is None else grid)
        total = math.prod(self.position_grid)
        if positions is None:
            positions = [list(range(0, total, 2)) for _ in self.dropping]
        self.positions = _positions(positions, len(self.dropping), total)
        _check_blocks(self, range(self.dropping[0], depth), self.method, (Attention, Absent))
        if self.global_pool != "token" or self.attn_pool is not None or not self.num_prefix_tokens:
            raise TokenError("positions drops patches for good, so that the classifier must read the class token alone")
        self.place()

    def place(self) -> None:
        """Find the patches of today's grid that stay."""
        height, width = self.patch_embed.grid_size
        self.placed, before = height * width, list(range(height * width))
        rows, columns = self.position_grid
        nearest = [i * rows // height * columns + j * columns // width for i in range(height) for j in range(width)]
        for s, kept in enumerate(self.positions):
            stays = set(kept)
            now = [p for p in before if nearest[p] in stays] or before[:1]  # no image loses all of its patches
            device = next(self.parameters()).device
            place = {p: k for k, p in enumerate(before)}
            index = torch.tensor([place[p] for p in now], device=device)
            self.register_buffer(f"kept_{s}", index, persistent=False)
            before = now

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """See timm's VisionTransformer; positions follow."""
        super().set_input_size(*args, **kwargs)
        self.place()

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """See timm's VisionTransformer; buffers are filled as well."""
        super().init_weights(*args, **kwargs)
        if hasattr(self, "positions"):
            self.place()

    def options(self) -> dict[str, Any]:
        """See `set_up`."""
        return {
            "blocks": list(self.dropping),
            "positions": [list(kept) for kept in self.positions],
            "grid": list(self.position_grid),
        }

    def before(
        self,
        i: int,
        x: torch.Tensor,
        kept: torch.Tensor | None,
        weight: torch.Tensor | None,
        total: int,
    ) -> State:
        """Gather the patches that stay."""
        for s, block in enumerate(self.dropping):
            if block == i:
                torch._assert(total == self.placed, "tokens are dropped at positions of one grid; see set_input_size")
                index = getattr(self, f"kept_{s}")
                prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
                x = torch.cat([prefix, patches.index_select(1, index)], dim=1)
                kept = index.expand(x.shape[0], -1) if kept is None else kept.index_select(1, index)
        return x, kept, weight

    def run(self, i: int, x: torch.Tensor, kept: torch.Tensor | None, weight: torch.Tensor | None, total: int) -> State:
        """Block i, with one token of zeros for those that are gone."""
        gone = total - (x.shape[1] - self.num_prefix_tokens)
        if not gone or isinstance(self.blocks[i].attn, Absent):
            return super().run(i, x, kept, weight, total)
        return self.checkpointed(_with_gone, self.blocks[i], x, gone), kept, weight

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """See timm's VisionTransformer."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        self.dropping = [i for i in self.dropping if i < len(self.blocks)]
        self.positions = self.positions[: len(self.dropping)]
        return taken

    def __prepare_scriptable__(self) -> None:
        raise ValueError("a network with token positions is not scripted; export it by torch.export or ONNX")


def _with_gone(block: Block, x: torch.Tensor, gone: int) -> torch.Tensor:
    """timm's Block among ``gone`` more tokens whose normed input is zero. [B, T, dim] -> [B, T, dim]"""
    y = F.pad(block.norm1(x), (0, 0, 0, 1))
    seen = F.pad(y.new_zeros(1, 1, 1, x.shape[1]), (0, 1), value=math.log(gone))
    x = x + block.drop_path1(block.ls1(block.attn(y, attn_mask=seen)[:, : x.shape[1]]))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _grid(values: Any) -> tuple[int, int]:
    good = isinstance(values, Sequence) and len(values) == 2
    if not good or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 1 << 12 for n in values):
        raise TokenError(f"grid must be a height and a width in patches, got {values!r:.60}")
    return tuple(values)


def _positions(values: Any, count: int, total: int) -> list[list[int]]:
    lists = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []
    good = len(lists) == count and all(isinstance(kept, Sequence) and kept for kept in lists)
    good = good and all(type(p) is int and 0 <= p < total for kept in lists for p in kept)
    good = good and all(list(kept) == sorted(set(kept)) for kept in lists)
    good = good and all(set(b) <= set(a) for a, b in itertools.pairwise(lists))
    if not good:
        raise TokenError(
            f"positions must be rising numbers of patches from 0 to {total - 1}, one list for each of the {count} "
            f"blocks, each within the one before; got {values!r:.60}"
        )
    return [list(kept) for kept in lists]


METHODS[TokenPositions.method] = TokenPositions
