"""Token-level mixing: CutMix on the grid of the last stage's tokens, and Mixup, with a target for every token.

Paper: "Searching for Efficient Multi-Stage Vision Transformers" - https://arxiv.org/abs/2109.00642 (token labelling);
the distribution of boxes is the released code's.
"""

from typing import NamedTuple

import numpy as np
import torch

__all__ = ["MixedBatch", "TokenMix", "draw_boxes"]


class MixedBatch(NamedTuple):
    """Mixed images and what each image, and each token of the last stage, shows."""

    images: torch.Tensor  # [B, C, H, W]
    targets: torch.Tensor  # [B, num_classes], each row sums to 1
    patch_targets: torch.Tensor  # [B, N, num_classes], cells row by row


def draw_boxes(draws: np.ndarray, grid_size: tuple[int, int], *, fix_edges: bool = False) -> np.ndarray:
    """Boxes of cells, from uniform numbers.

    A share of the cells, U(0, 1), gives the area a in whole cells; the height is uniform in
    [1, max(1, min(rows, a) - 2)], the width a // height; a width beyond the grid becomes all columns, with height
    a // columns. A box is never the whole grid and may be empty. Its place is uniform among those that leave the last
    row and the last column free (unless it spans all rows or columns), as in the released code.

    Args:
        draws: Float64 in [0, 1), [..., 4]: for area, height, top and left.
        grid_size: Rows and columns.
        fix_edges: All places are equally likely, those at the bottom and right edge included.

    Returns:
        int64 [..., 4]: top, left, height, width, in cells.
    """
    rows, columns = grid_size
    draws = np.asarray(draws, dtype=np.float64)
    area = (rows * columns * draws[..., 0]).astype(np.int64)
    heights = np.maximum(1, np.minimum(rows, area) - 2)  # how many there are to choose from
    height = 1 + (heights * draws[..., 1]).astype(np.int64)
    width = area // height
    wide = width > columns
    height, width = np.where(wide, area // columns, height), np.where(wide, columns, width)

    def start(free: np.ndarray, draw: np.ndarray) -> np.ndarray:
        places = free + 1 if fix_edges else np.maximum(free, 1)
        return (places * draw).astype(np.int64)

    return np.stack(
        [start(rows - height, draws[..., 2]), start(columns - width, draws[..., 3]), height, width], axis=-1
    )


class TokenMix:
    """CutMix for the first half of a batch, Mixup for the second; one box, share and permutation for each.

    CutMix: a box of whole cells (`draw_boxes`) comes from another image, at the same place. The class target is mixed
    by the share of cells, a token of the box has the other image's label. Mixup: the share is Beta(alpha, alpha); the
    class and all tokens have the mixed target. Labels are smoothed before. Of an odd number of images Mixup takes one
    more; an image may be its own partner, and a batch of one stays as it is.

    A mixed batch is a function of its arguments alone: no random generator is used or changed.

    Args:
        num_classes: Number of classes.
        grid_size: The last stage's token grid, a side or rows and columns: ``model.grids[-1]`` of a ViT-ResNAS.
        smoothing: Label smoothing: ``smoothing / num_classes`` for every class, the rest for the label.
        mixup_alpha: Of Mixup's Beta distribution.
        fix_edges: Let boxes touch the bottom and right edge as often as top and left. The released code's never do,
            unless they span that axis.

    Raises:
        ValueError: A setting is out of range.

    Example:
        mix = TokenMix(10, model.grids[-1])
        images, targets, patch_targets = mix(images, labels, seed=step)
    """

    def __init__(
        self,
        num_classes: int,
        grid_size: int | tuple[int, int],
        *,
        smoothing: float = 0.1,
        mixup_alpha: float = 0.8,
        fix_edges: bool = False,
    ) -> None:
        grid = (grid_size, grid_size) if isinstance(grid_size, int) else tuple(grid_size)
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"TokenMix: grid_size must be a side, or rows and columns, at least 1; got {grid_size}")
        if num_classes < 1:
            raise ValueError(f"TokenMix: num_classes must be at least 1, got {num_classes}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"TokenMix: smoothing must lie in [0, 1), got {smoothing}")
        if not mixup_alpha > 0:
            raise ValueError(f"TokenMix: mixup_alpha must be above 0, got {mixup_alpha}")
        self.num_classes = num_classes
        self.grid_size = grid
        self.smoothing = smoothing
        self.mixup_alpha = mixup_alpha
        self.fix_edges = fix_edges

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, seed: int, *, groups: int = 1) -> MixedBatch:
        """Mix a batch, on its device.

        Args:
            images: Float [B, C, H, W].
            labels: int64 [B].
            seed: Decides all random numbers.
            groups: Number of equal contiguous groups in the batch, such as the sub-networks of a supernet's step; the
                first half of each gets CutMix, the second Mixup. Partners come from all groups.

        Returns:
            New tensors; targets are float32 on the images' device.

        Raises:
            ValueError: The grid does not divide the images, or the groups not the batch; or images are not float, or
                labels not one class number for each.
        """
        self._check(images, labels, groups)
        size = len(images) // groups
        half = size // 2
        # RandomState: a stream that NumPy promises never to change
        rng = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
        place = draw_boxes(rng.random_sample(4), self.grid_size, fix_edges=self.fix_edges)
        top, left, height, width = place.tolist()
        lam = float(rng.beta(self.mixup_alpha, self.mixup_alpha))
        member = np.arange(len(images)).reshape(groups, size)
        partner = np.concatenate([rng.permutation(part.ravel()) for part in (member[:, :half], member[:, half:])])
        partner = torch.from_numpy(partner).to(images.device, non_blocking=True)
        first, second = (p.unflatten(0, (groups, -1)) for p in partner.split([groups * half, groups * (size - half)]))

        rows, columns = self.grid_size
        cell = (images.shape[2] // rows, images.shape[3] // columns)
        box = (slice(top * cell[0], (top + height) * cell[0]), slice(left * cell[1], (left + width) * cell[1]))
        mixed = images.clone()
        parts = mixed.unflatten(0, (groups, size))
        parts[:, :half, :, box[0], box[1]] = images[..., box[0], box[1]][first]
        parts[:, half:] = parts[:, half:].lerp(images[second], 1 - lam)

        # each target's share of the other image: column 0 the class, then the tokens
        share = torch.zeros(groups, size, 1 + rows * columns, device=images.device)
        share[:, :half, 0] = height * width / (rows * columns)
        tokens = share[:, :half, 1:].unflatten(2, (rows, columns))
        tokens[:, :, top : top + height, left : left + width] = 1
        share[:, half:] = 1 - lam
        own = self.one_hot(labels.to(images.device)).unflatten(0, (groups, size))
        other = own.flatten(0, 1)[torch.cat([first, second], dim=1)]
        targets = own[:, :, None].lerp(other[:, :, None], share[..., None]).flatten(0, 1)
        return MixedBatch(mixed, targets[:, 0], targets[:, 1:])

    def one_hot(self, labels: torch.Tensor) -> torch.Tensor:
        """Smoothed targets, float32 [B, num_classes]."""
        off = self.smoothing / self.num_classes
        out = torch.full((len(labels), self.num_classes), off, device=labels.device)
        return out.scatter_(1, labels[:, None], 1 - self.smoothing + off)

    def _check(self, images: torch.Tensor, labels: torch.Tensor, groups: int) -> None:
        height, width = images.shape[2:]
        rows, columns = self.grid_size
        if height % rows or width % columns:
            raise ValueError(
                f"TokenMix: images of {height}x{width} cannot be cut into {rows}x{columns} equal cells; take sides "
                f"that are multiples of {rows} and {columns}, or the grid of the model's last stage"
            )
        if groups < 1 or len(images) % groups:
            raise ValueError(f"TokenMix: a batch of {len(images)} images cannot be cut into {groups} equal groups")
        if not images.is_floating_point():
            raise ValueError(f"TokenMix: images must be normalised floats, got {images.dtype}")
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"TokenMix: labels must be {len(images)} class numbers (int64), got {labels.dtype} "
                f"of shape {list(labels.shape)}"
            )
