"""Batches of several image sizes: one size for each step, larger ones in smaller batches (timm's sampler).

Multi-scale training as MobileViT has it (https://arxiv.org/abs/2110.02178) and ExMobileViT names it
(https://arxiv.org/abs/2309.01310).
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from timm.data import ScheduledBatchSampler
from torch.utils.data import DataLoader, Dataset, Sampler

from .images import GIB, DataError, Images
from .loaders import _accelerator, _same, _Samples, _Steps
from .transforms import ImageTransform, ShiftTransform

__all__ = ["MultiScaleLoader", "multiscale_loader"]


class _Order(Sampler):
    """All samples of an epoch as (epoch, index) keys, in the order that `train_loader` has them."""

    def __init__(self, size: int, seed: int):
        self._steps = _Steps(size, 1, seed, 0, 1)
        self.epoch = 0

    def __len__(self) -> int:
        return self._steps.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, int(i)) for i in self._steps.order(self.epoch))


class _Share:
    """Batch sampler: this process's part of each scheduled batch.

    The schedule is drawn for global batches, so that all processes have the same size in the same step, and that any
    number of them sees the same batches. (Accelerate would deal whole batches to processes instead.)
    """

    def __init__(self, scheduled: ScheduledBatchSampler, rank: int, world: int):
        self.scheduled, self.rank, self.world = scheduled, rank, world
        self.skip = 0

    def __len__(self) -> int:
        return len(self.scheduled)

    def __iter__(self) -> Iterator[list]:
        for batch in islice(iter(self.scheduled), self.skip, None):
            share = len(batch) // self.world
            yield batch[self.rank * share : (self.rank + 1) * share]


class _Choices(Dataset):
    """Samples at the size that their key names: ((epoch, index), choice)."""

    def __init__(self, samples: Sequence[_Samples]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples[0])

    def __getitems__(self, keys: Sequence[tuple[tuple[int, int], int]]):
        choice = keys[0][1]
        return (choice, *self.samples[choice].__getitems__([key for key, _ in keys]))


class MultiScaleLoader:
    """See `multiscale_loader`. `len` is the number of steps of an epoch; `batch_sizes` those of the sizes."""

    def __init__(self, samples: Sequence[_Samples], share: _Share, num_workers: int, device):
        self._samples, self._share, self._device = samples, share, device
        self.batch_sizes = share.scheduled.batch_sizes
        self._loader = DataLoader(
            _Choices(samples),
            batch_sampler=share,
            collate_fn=_same,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device is not None and device.type == "cuda",
            generator=torch.Generator(),  # or each epoch takes a number from the global one
        )

    def __len__(self) -> int:
        return len(self._share)

    @property
    def corrupt(self) -> dict[int, str]:
        return self._samples[0].images.corrupt

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch, images float32 [B, C, H, W] and labels int64 [B]; B, H and W vary.

        Args:
            epoch: Counts from 0; decides the order, the sizes and all augmentation.
            skip: Steps done before; they cost next to nothing.
        """
        if not 0 <= skip <= len(self):
            raise DataError(f"cannot skip {skip} of {len(self)} steps")
        self._share.scheduled.set_epoch(epoch)
        self._share.skip = skip
        for choice, x, y, corrupt in self._loader:
            self._samples[choice].images.report(corrupt)  # those a worker found
            if self._device is not None:
                x, y = (t.to(self._device, non_blocking=True) for t in (x, y))
            yield (self._samples[choice].transform.normalize(x) if x.dtype == torch.uint8 else x), y


def multiscale_loader(
    dataset,
    transforms: Sequence[ImageTransform],
    batch_size: int,
    *,
    base_size: tuple[int, int],
    multiple: int = 1,
    seed: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str | None = None,
    cache_limit: int = GIB,
    shrink: int | None = None,
    max_corrupt: float = 0.05,
) -> MultiScaleLoader:
    """Shuffled, augmented batches like `train_loader`'s, each of one of several image sizes.

    A size's batch is such that the number of pixels stays about that of ``batch_size`` images of ``base_size``.
    Which size a step has, all sizes alike on average, is a function of (seed, epoch, step), drawn by timm's
    ScheduledBatchSampler: an epoch shows every image at most once.

    Args:
        dataset: See `train_loader`.
        transforms: One for each image size, from `train_transform`.
        batch_size: Of all processes together, for images of ``base_size``.
        base_size: (h, w).
        multiple: Batches are multiples of this, and of ``world``.
        seed: See `train_loader`, as for the other arguments.

    Raises:
        DataError: For batch sizes that do not fit the data or the processes, or too many unreadable images.
    """
    if not transforms:
        raise DataError("multi-scale batches need at least one image size")
    if batch_size < 1 or multiple % world:
        raise DataError(
            f"batch_size must be positive and multiple one of {world} processes; got {batch_size}, {multiple}"
        )
    if not 0 <= rank < world:
        raise DataError(f"rank must lie between 0 and {world - 1}, got {rank}")
    if not 0 <= seed < 1 << 62:  # timm adds the epoch to it, and torch's generators take 64 bits
        raise DataError(f"seed must lie between 0 and 2^62, got {seed}")
    pixels = base_size[0] * base_size[1]
    sizes = [t.input_size[1] * t.input_size[2] for t in transforms]
    batches = [max(1, round(batch_size * pixels / size / multiple)) * multiple for size in sizes]
    if max(batches) > len(dataset):
        raise DataError(f"a batch of {max(batches)} is larger than the {len(dataset)} training images; take fewer")
    images = Images(
        dataset,
        mode=transforms[0].mode,
        cache_limit=cache_limit,
        shrink=shrink,
        background=transforms[0].background,
        max_corrupt=max_corrupt,
    )
    device = _accelerator(device)
    samples = []
    for transform in transforms:
        late = device is not None and transform.erasing is None
        limit = cache_limit // len(transforms) if isinstance(transform, ShiftTransform) else cache_limit
        samples.append(_Samples(images, transform, seed, late=late, cache_limit=limit))
    scheduled = ScheduledBatchSampler(_Order(len(images), seed), batches, seed=seed)
    return MultiScaleLoader(samples, _Share(scheduled, rank, world), num_workers, device)
