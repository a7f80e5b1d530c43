"""Training batches from a stream: data sets that are read as they are trained on, from the net or a disk."""

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from .images import DataError, Images, quiet, require
from .loaders import TrainLoader, _accelerator, _Samples
from .transforms import ImageTransform

__all__ = ["stream_loader"]

_READ = 256  # rows at a time
_MOST_SHARDS = 16


def stream_loader(
    dataset,
    transform: ImageTransform,
    batch_size: int,
    *,
    num_images: int,
    seed: int = 0,
    buffer_size: int = 4096,
    num_shards: int | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    device=None,
    shrink: int | None = None,
    max_corrupt: float = 0.05,
) -> TrainLoader:
    """Shuffled, augmented batches of a stream, used as `train_loader`'s: `for x, y in loader.epoch(epoch, skip=…)`.

    The stream's files are dealt to `num_shards` shards, in an order drawn for each epoch. A shard's files are read one
    after the other, blocks of `buffer_size / num_shards` images are shuffled, and each batch has an equal part of every
    shard. So batches are a function of (seed, epoch, step) alone: the same for any number of workers, for any number of
    processes that divides the shards (each reads only its own), and after any resume. To skip steps, what came before
    is read again but not decoded.

    An epoch is `num_images // batch_size` steps. Where files differ in size, so do shards: one that runs out starts
    again, and the end of a long one's last file is not seen in that epoch. The next epoch deals otherwise, if shards
    have several files each; with one each, give all of them the same size. Images of one class that lie together in
    large files are mixed only as far as shards and buffer reach.

    Args:
        dataset: A `datasets.IterableDataset` with the columns `image` and `label`.
        transform: From `train_transform`.
        batch_size: Of all processes together; a multiple of `num_shards`.
        num_images: Images of the whole stream.
        seed: 0 or more, below 2^64.
        buffer_size: Undecoded images that the shards of all processes shuffle at a time; as many again are read ahead.
        num_shards: Default: the most, up to 16, that divide the batch and get at least 4 files each.
        num_workers: Processes that decode and augment.
        rank: This process, counted from 0.
        world: How many processes.
        device: Where batches go.
        shrink: See `Images`.
        max_corrupt: Largest fraction of images that may be unreadable. Another one of its batch takes such an image's
            place.

    Raises:
        DataError: For sizes that do not fit each other, a stream without labels or shorter than said, or too many
            unreadable images.
    """
    if num_shards is None:
        num_shards = default_shards(batch_size, dataset.num_shards)
    if not 0 < num_shards <= dataset.num_shards:
        raise DataError(
            f"num_shards (--stream-shards) must lie between 1 and the stream's {dataset.num_shards} files, got "
            f"{num_shards}"
        )
    if batch_size < 1 or batch_size % num_shards:
        raise DataError(
            f"batch_size counts all processes: {batch_size} is not a positive multiple of the {num_shards} shards"
        )
    if num_shards % world:
        raise DataError(
            f"{world} processes cannot share {num_shards} shard{'s' * (num_shards > 1)} of a stream with "
            f"{dataset.num_shards} files evenly; give num_shards (--stream-shards), a multiple of {world}"
        )
    if not 0 <= rank < world:
        raise DataError(f"rank must lie between 0 and {world - 1}, got {rank}")
    if not 0 <= seed < 1 << 64:
        raise DataError(f"seed must lie between 0 and 2^64 - 1, got {seed}")
    if num_images < batch_size:
        raise DataError(f"a batch of {batch_size} is larger than the {num_images} training images; take fewer")
    if buffer_size < num_shards:
        raise DataError(f"buffer_size must be at least num_shards, {num_shards}; got {buffer_size}")
    device = _accelerator(device)
    late = device is not None and transform.erasing is None
    items = _Items(transform.mode, shrink, transform.background, num_images, max_corrupt)
    samples = _StreamSamples(items, transform, seed, late=late)
    each, block = batch_size // num_shards, buffer_size // num_shards
    steps = _StreamSteps(dataset, num_images // batch_size, each, num_shards, block, seed)
    steps.mine = range(rank * num_shards // world, (rank + 1) * num_shards // world)
    return TrainLoader(samples, steps, num_workers, device)


def default_shards(batch_size: int, files: int) -> int:
    return max(n for n in range(1, _MOST_SHARDS + 1) if n == 1 or (files >= 4 * n and batch_size % n == 0))


class _StreamSteps:
    """Batch sampler: this process's part of each batch as keys (epoch, position, label, undecoded image).

    It runs in the main process, so that keys do not depend on the workers that decode them.
    """

    def __init__(self, dataset, steps: int, each: int, num_shards: int, block: int, seed: int):
        self.names = dataset.features["label"].names
        raw = require("datasets").Image(decode=False)
        self.dataset = dataset.select_columns(["image", "label"]).cast_column("image", raw).with_format("arrow")
        self.steps, self.each, self.num_shards, self.block, self.seed = steps, each, num_shards, block, seed
        self.mine = range(num_shards)
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple]]:
        with ThreadPoolExecutor(len(self.mine)) as pool:  # each shard's next block is read while this one is used
            streams = [self._ahead(pool, shard) for shard in self.mine]
            for _ in range(self.skip, self.steps):
                yield [key for stream in streams for key in islice(stream, self.each)]

    def _ahead(self, pool: ThreadPoolExecutor, shard: int) -> Iterator[tuple]:
        done = self.skip * self.each
        blocks = self._blocks(shard, done // self.block)
        block, start = pool.submit(next, blocks, None), done % self.block
        while keys := block.result():
            block = pool.submit(next, blocks, None)
            yield from keys[start:]
            start = 0

    def _rng(self, *numbers: int) -> np.random.RandomState:
        # a stream that NumPy promises never to change
        return np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32, self.epoch, *numbers])

    def _blocks(self, shard: int, first: int) -> Iterator[list[tuple]]:
        """Shuffled blocks of a shard, the first ones left out. The last holds what the epoch still needs."""
        rows = self._rows(shard, first * self.block)
        for number, start in enumerate(range(first * self.block, self.steps * self.each, self.block), start=first):
            part = islice(rows, min(self.block, self.steps * self.each - start))
            block = [
                (self.epoch, position * self.num_shards + shard, label, image)
                for position, (image, label) in enumerate(part, start=start)
            ]
            yield [block[i] for i in self._rng(shard, number).permutation(len(block))]

    def _rows(self, shard: int, skip: int) -> Iterator[tuple[dict, int]]:
        """Images and labels of a shard's files, over and over."""
        files = self._rng().permutation(self.dataset.num_shards)[shard :: self.num_shards]
        while True:
            empty = True
            for file in files:
                part = self.dataset.shard(num_shards=self.dataset.num_shards, index=int(file))
                for table in self._tables(part, int(file)):
                    empty = empty and not len(table)
                    if skip >= len(table):
                        skip -= len(table)
                        continue
                    table, skip = table.slice(skip), 0
                    labels = table["label"].to_pylist()
                    if wrong := [v for v in labels if v is None or not 0 <= v < len(self.names)]:
                        last = len(self.names) - 1
                        raise DataError(f"an image of the stream has the label {wrong[0]}; 0 to {last} were expected")
                    yield from zip(table["image"].to_pylist(), labels, strict=True)
            if empty:
                raise DataError(f"{len(files)} of the stream's {self.dataset.num_shards} files hold no image")

    def _tables(self, part, file: int) -> Iterator:
        try:
            yield from part.iter(batch_size=_READ)
        except Exception as error:  # the readers below `datasets` raise nearly anything on damaged files
            first = str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
            count = self.dataset.num_shards
            raise DataError(f"file {file + 1} of the stream's {count} cannot be read: {first}") from error


class _Items(Images):
    """The images of one batch, by their positions in the stream."""

    def __init__(self, mode: str, shrink: int | None, background: str, num_images: int, max_corrupt: float):
        self.mode, self.shrink, self.transform, self.max_corrupt = mode, shrink, None, max_corrupt
        self.background = background
        self.corrupt: dict[int, str] = {}
        self._cache, self._size = None, num_images
        self.hold([])

    def __len__(self) -> int:
        return self._size

    def hold(self, keys: Sequence[tuple[int, int, int, dict]]) -> None:
        self._held = {position: item for _, position, _, item in keys}
        self.labels: Any = _Lookup({position: label for _, position, label, _ in keys})

    def pil(self, indices) -> list[Image.Image | None]:
        # an image has another position in each epoch; unreadable ones are counted by their content
        items = [self._held[int(i)] for i in indices]
        names = [zlib.crc32((item and (item["bytes"] or (item["path"] or "").encode())) or b"") for item in items]
        with quiet:
            return [self._decode(name, item) for name, item in zip(names, items, strict=True)]

    def readable(self, index: int) -> tuple[Image.Image, int]:
        held = list(self._held)
        start = held.index(index)
        for candidate in held[start:] + held[:start]:
            if (image := self.pil([candidate])[0]) is not None:
                return image, candidate
        raise DataError("none of the images of a batch can be read")

    def _describe(self, index: int) -> str:
        return "an image of the stream"


class _Lookup(dict):
    """Labels by positions, indexed as an array is."""

    def __getitem__(self, indices):
        return np.array([super(_Lookup, self).__getitem__(int(i)) for i in indices], dtype=np.int64)


class _StreamSamples(_Samples):
    """Batches of augmented images from keys that hold the images."""

    def __init__(self, items: _Items, transform: ImageTransform, seed: int, *, late: bool):
        super().__init__(items, transform, seed, late=late, cache_limit=0)

    def __getitems__(self, keys: Sequence[tuple[int, int, int, dict]]):
        self.images.hold(keys)
        return super().__getitems__([key[:2] for key in keys])
