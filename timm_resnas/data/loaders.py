"""Loaders whose batches are a pure function of (seed, epoch, step): any number of workers or processes, any resume."""

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .images import GIB, DataError, Images
from .transforms import ImageTransform, ShiftTransform

__all__ = ["EvalBatches", "TrainLoader", "eval_batches", "train_loader"]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(z):
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014), on Python ints or uint64 arrays."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def sample_keys(seed: int, epoch: int, indices) -> np.ndarray:
    """One 64-bit key per sample (uint64 [N]): all that its augmentation may depend on."""
    base = _mix((_mix((seed + _GOLDEN) & _MASK) + (epoch + 1) * _GOLDEN) & _MASK)
    return _mix(np.asarray(indices, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(base))


def uniform_draws(keys: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the uniform distribution on [0, 1), float64 [N, count], from keys [N]."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (_mix(keys[:, None] + steps) >> np.uint64(11)) * 2.0**-53


@contextlib.contextmanager
def _restored_rng():
    """Puts back the global generators that timm's and torchvision's transforms draw from."""
    python, numpy, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_)


def _seed_rng(key: int) -> None:
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key >> 1)  # torch.manual_seed would also visit every accelerator


class _Samples(Dataset):
    """Batches of augmented images. Keys are (epoch, index), so that workers need not be told the epoch."""

    def __init__(self, images: Images, transform: ImageTransform, seed: int, *, late: bool, cache_limit: int):
        self.images, self.transform, self.seed, self.late = images, transform, seed, late
        self.padded: np.ndarray | None = None
        self.source: np.ndarray | None = None  # where the image at an index comes from, when its own is unreadable
        self.shifts = isinstance(transform, ShiftTransform)
        if self.shifts and len(images) * int(np.prod(transform.padded_size)) <= cache_limit:
            self.padded, self.source = self._prepare()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]):
        x, y, _ = self.__getitems__([key])
        return x[0], y[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]):
        epoch, indices = keys[0][0], np.array([index for _, index in keys])
        before = set(self.images.corrupt)
        seeds = sample_keys(self.seed, epoch, indices)
        if self.shifts:
            x, indices = self._padded(indices)
            x = torch.from_numpy(self.transform.batch(x, uniform_draws(seeds, 4)))
        else:
            pictures, indices = self._readable(indices)
            with _restored_rng():
                samples = []
                for seed, picture in zip(seeds.tolist(), pictures, strict=True):
                    _seed_rng(seed)
                    samples.append(self.transform(picture))
            x = torch.stack(samples)
        if not self.late:
            x = self.transform.normalize(x)
            if self.transform.erasing is not None:
                with _restored_rng():
                    for seed, sample in zip(seeds.tolist(), x, strict=True):
                        _seed_rng(seed ^ _MASK)  # not the crop's numbers again
                        self.transform.erasing(sample)
        corrupt = {i: r for i, r in self.images.corrupt.items() if i not in before}
        return x, torch.from_numpy(self.images.labels[indices]), corrupt

    def _readable(self, indices: np.ndarray):
        """The pictures at `indices`, and where they come from: the next readable one stands in for a broken one."""
        pictures, source = self.images.pil(indices), indices.copy()
        for k, picture in enumerate(pictures):
            if picture is None:
                pictures[k], source[k] = self.images.readable(int(indices[k]))
        return pictures, source

    def _padded(self, indices: np.ndarray):
        """The images before their shift, uint8 [B, C, H + 2 shift, W + 2 shift], and which they are."""
        if self.padded is not None:
            return self.padded[indices], self.source[indices]
        pictures, source = self._readable(indices)
        return self.transform.prepare(pictures), source

    def _prepare(self):
        out = np.empty((len(self.images), *self.transform.padded_size), dtype=np.uint8)
        source = np.arange(len(self.images))
        for start in range(0, len(self.images), 256):
            chunk = np.arange(start, min(start + 256, len(self.images)))
            out[chunk], source[chunk] = self._padded(chunk)
        return out, source


class _Steps:
    """Batch sampler: this process's share of each global batch, as (epoch, index) keys."""

    def __init__(self, size: int, batch_size: int, seed: int, rank: int, world: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        share = batch_size // world
        self.share = slice(rank * share, (rank + 1) * share)
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        return self.size // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        # RandomState: a stream that NumPy promises never to change
        return np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32, epoch]).permutation(self.size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order(self.epoch)
        for step in range(self.skip, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, int(i)) for i in batch[self.share]]


def _same(batch):
    return batch


class TrainLoader:
    """See `train_loader`. `len` is the number of steps of an epoch; `corrupt` maps unreadable images to reasons."""

    def __init__(self, samples: _Samples, steps: _Steps, num_workers: int, device):
        self._samples, self._steps, self._device = samples, steps, device
        self._loader = DataLoader(
            samples,
            batch_sampler=steps,
            collate_fn=_same,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device is not None and device.type == "cuda",
            generator=torch.Generator(),  # or each epoch takes a number from the global one
        )

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def corrupt(self) -> dict[int, str]:
        return self._samples.images.corrupt

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch, images float32 [B, C, H, W] and labels int64 [B].

        Args:
            epoch: Counts from 0; decides the order and all augmentation.
            skip: Steps done before; they cost nothing.
        """
        if not 0 <= skip <= len(self):
            raise DataError(f"cannot skip {skip} of {len(self)} steps")
        self._steps.epoch, self._steps.skip = epoch, skip
        for x, y, corrupt in self._loader:
            self._samples.images.report(corrupt)  # those a worker found
            if self._device is not None:
                x, y = (t.to(self._device, non_blocking=True) for t in (x, y))
            yield (self._samples.transform.normalize(x) if x.dtype == torch.uint8 else x), y


def train_loader(
    dataset,
    transform: ImageTransform,
    batch_size: int,
    *,
    seed: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str | None = None,
    cache_limit: int = GIB,
    shrink: int | None = None,
    max_corrupt: float = 0.05,
) -> TrainLoader:
    """Shuffled, augmented batches: `for x, y in loader.epoch(epoch, skip=…)`.

    The order is a function of (seed, epoch) and an image's augmentation of (seed, epoch, index), so that batches
    are the same for any number of workers and after any resume. With several processes, rank r gets the r-th
    contiguous part of each global batch. The last, incomplete batch of an epoch is dropped. The global random
    generators are left as they were.

    Args:
        dataset: A `datasets.Dataset` with `image` and `label`; select the training images before.
        transform: From `train_transform`.
        batch_size: Of all processes together.
        seed: 0 or more, below 2^64.
        num_workers: Worker processes; for small images kept in RAM none is fastest.
        rank: This process, counted from 0.
        world: How many processes.
        device: Where batches go; on an accelerator they travel as bytes and are normalised there.
        cache_limit: RAM for decoded images, in bytes; larger sets are decoded again in each epoch.
        shrink: See `Images`.
        max_corrupt: Largest fraction of images that may be unreadable. The next readable one takes such an image's
            place.

    Raises:
        DataError: For batch sizes that do not fit the data or the processes, or too many unreadable images.
    """
    if batch_size < 1 or batch_size % world:
        raise DataError(f"batch_size counts all processes: {batch_size} is not a positive multiple of {world}")
    if not 0 <= rank < world:
        raise DataError(f"rank must lie between 0 and {world - 1}, got {rank}")
    if len(dataset) < batch_size:
        raise DataError(f"a batch of {batch_size} is larger than the {len(dataset)} training images; take fewer")
    if not 0 <= seed <= _MASK:
        raise DataError(f"seed must lie between 0 and 2^64 - 1, got {seed}")
    shifts = isinstance(transform, ShiftTransform)  # these keep their own, prepared images
    images = Images(
        dataset,
        mode=transform.mode,
        cache_limit=0 if shifts else cache_limit,
        shrink=shrink,
        background=transform.background,
        max_corrupt=max_corrupt,
    )
    device = _accelerator(device)
    late = device is not None and transform.erasing is None
    samples = _Samples(images, transform, seed, late=late, cache_limit=cache_limit)
    return TrainLoader(samples, _Steps(len(images), batch_size, seed, rank, world), num_workers, device)


def _accelerator(device) -> torch.device | None:
    device = torch.device(device or "cpu")
    return None if device.type == "cpu" else device


class _EvalSamples(Dataset):
    def __init__(self, images: Images, transform: ImageTransform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]):
        before = set(self.images.corrupt)
        pictures = self.images.pil(indices)
        kept = [i for i, p in zip(indices, pictures, strict=True) if p is not None]
        x = [self.transform(p) for p in pictures if p is not None]
        x = torch.stack(x) if x else torch.empty((0, *self.transform.input_size), dtype=torch.uint8)
        corrupt = {i: r for i, r in self.images.corrupt.items() if i not in before}
        return x, torch.from_numpy(self.images.labels[kept]), corrupt


class EvalBatches:
    """See `eval_batches`. `cached` says whether the images are kept; `corrupt` which could not be read."""

    def __init__(self, samples: _EvalSamples, batches: list[range], num_workers: int, device, memory_limit: int):
        self._samples, self._device = samples, device
        self._batches = batches
        self._num_workers = num_workers
        self.images: torch.Tensor | None = None
        self.labels: torch.Tensor | None = None
        size = sum(map(len, batches)) * int(np.prod(samples.transform.input_size))
        if size <= memory_limit:
            self._fill(as_float=4 * size <= memory_limit)

    @property
    def cached(self) -> bool:
        return self.images is not None

    @property
    def corrupt(self) -> dict[int, str]:
        return self._samples.images.corrupt

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.images is None:
            for x, y in self._decoded():
                yield self._samples.transform.normalize(x), y
            return
        start = 0
        for batch in self._batches:
            stop = start + sum(i not in self.corrupt for i in batch)
            x, y = self.images[start:stop], self.labels[start:stop]
            yield (self._samples.transform.normalize(x) if x.dtype == torch.uint8 else x), y
            start = stop

    def _decoded(self):
        loader = DataLoader(
            self._samples,
            batch_sampler=self._batches,
            collate_fn=_same,
            num_workers=self._num_workers,
            pin_memory=self._device is not None and self._device.type == "cuda",
            generator=torch.Generator(),
        )
        for x, y, corrupt in loader:
            self._samples.images.report(corrupt)
            yield (x, y) if self._device is None else (x.to(self._device), y.to(self._device))

    def _fill(self, as_float: bool) -> None:
        count = sum(map(len, self._batches))
        dtype = torch.float32 if as_float else torch.uint8
        images = torch.empty((count, *self._samples.transform.input_size), dtype=dtype, device=self._device)
        labels = torch.empty(count, dtype=torch.int64, device=self._device)
        end = 0
        for x, y in self._decoded():
            images[end : end + len(x)] = self._samples.transform.normalize(x) if as_float else x
            labels[end : end + len(x)] = y
            end += len(x)
        self.images, self.labels = images[:end], labels[:end]


def eval_batches(
    dataset,
    transform: ImageTransform,
    batch_size: int = 256,
    *,
    indices: Sequence[int] | None = None,
    memory_limit: int = GIB,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str | None = None,
    max_corrupt: float = 0.05,
) -> EvalBatches:
    """The same batches, in the same order, each time they are iterated: for scoring many candidates.

    Images are transformed once and kept as one tensor: float32 when that fits `memory_limit`, else as bytes when
    these fit (normalised batch by batch), else not at all (decoded in every pass). The result is the same.
    Unreadable images are left out of their batch.

    Args:
        dataset: A `datasets.Dataset` with `image` and `label`.
        transform: From `eval_transform`.
        batch_size: Images of a batch; the last may be smaller.
        indices: Which images, in this order; default all.
        memory_limit: In bytes.
        num_workers: Worker processes for decoding.
        rank: With several processes, each gets every `world`-th batch: all images exactly once over the ranks.
        world: How many processes share the images.
        device: Where the tensor is kept and batches are given.
        max_corrupt: Largest fraction of images that may be unreadable.

    Raises:
        DataError: When there is no image, or too many are unreadable.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise DataError(f"batch_size must be positive and rank within 0…{world - 1}, got {batch_size} and {rank}")
    if indices is not None:
        dataset = dataset.select(list(indices))
    if not len(dataset):
        raise DataError("there are no images to evaluate on")
    images = Images(
        dataset, mode=transform.mode, cache_limit=0, background=transform.background, max_corrupt=max_corrupt
    )
    starts = range(0, len(images), batch_size)[rank::world]
    batches = [range(s, min(s + batch_size, len(images))) for s in starts]
    return EvalBatches(_EvalSamples(images, transform), batches, num_workers, _accelerator(device), memory_limit)
