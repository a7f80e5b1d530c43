"""Decoding: the images of a `datasets.Dataset`, as RGB or grey PIL images, kept in RAM where they fit."""

import logging
import os
import re
import struct
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import torch.utils.data
from PIL import Image, ImageColor

__all__ = ["WHITE", "DataError", "Images", "parse_background"]

_logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"),
)
GIB = 1 << 30
WHITE = "#ffffff"  # what viewers and web pages show behind a drawing; colours under transparent pixels are arbitrary
# how `sources` stores digits and Fashion-MNIST; Pillow's general way takes ten times as long for so small an image
_RAW_GREY = re.compile(rb"P5 (\d+) (\d+) 255\n")
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DataError(ValueError):
    """Data that cannot be used as asked; the message says what was wrong and what would be right."""


class _Quiet:
    """Ignores warnings from the first thread that enters to the last one that leaves.

    Filters belong to the process: were each thread to set and restore them, one that leaves would switch on the
    warnings of the others, and the last might leave all of them off for good.
    """

    def __init__(self):
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *error) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(*error)


quiet = _Quiet()  # Pillow's: on odd metadata (what matters is whether the pixels come), and as `_open` says


def require(module: str):
    """Imports a package of the extra `recipes`, or says how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"timm_resnas.data needs the package '{module.partition('.')[0]}' for this: "
            "pip install timm_resnas[recipes]"
        ) from error


def first_rows(stream, count: int):
    """The first rows of a `datasets.IterableDataset` with `image` and `label`, as a `Dataset` of undecoded images."""
    datasets = require("datasets")
    raw = stream.cast_column("image", datasets.Image(decode=False))
    features = datasets.Features({"image": datasets.Image(decode=False), "label": stream.features["label"]})
    return datasets.Dataset.from_list(list(raw.take(count)), features=features)


def parse_background(colour: str) -> str:
    """A colour by name or as '#rrggbb', '#rgb', 'rgb(…)' -> '#rrggbb'.

    Raises:
        DataError: It is not an opaque colour.
    """
    try:
        red, green, blue, *alpha = ImageColor.getrgb(colour)
    except (ValueError, AttributeError, TypeError):
        raise DataError(f"background must be a colour such as white, grey or #ff8800, got {colour!r}") from None
    if alpha and alpha[0] != 255:
        raise DataError(f"background must be an opaque colour, got {colour!r}")
    return f"#{red:02x}{green:02x}{blue:02x}"


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel of a loaded image is (partly) transparent; an alpha channel alone does not say so."""
    if not image.has_transparency_data:
        return False
    if image.mode.startswith("I"):
        return bool((np.asarray(image) == image.info["transparency"]).any())
    return _rgba(image).getchannel("A").getextrema()[0] < 255


def _rgba(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied grey, which Pillow converts to LA only
        image = image.convert("LA")
    return image if image.mode == "RGBA" else image.convert("RGBA")


def to_mode(image: Image.Image, mode: str, background: str = WHITE) -> Image.Image:
    """Converts to `mode` ('RGB' or 'L') by `Image.convert`, as timm's datasets do, with two differences.

    Transparent pixels show the `background`, not the colour that is stored under them; 16-bit greys and floats are
    scaled, not clipped.
    """
    alpha = None
    if image.mode.startswith("I"):  # I;16, I;16B, or I: how 16-bit PNG and TIFF arrive
        grey = np.asarray(image)
        if "transparency" in image.info:
            alpha = Image.fromarray(np.where(grey == image.info["transparency"], 0, 255).astype(np.uint8))
        if image.mode != "I" or grey.max(initial=0) > 255:
            grey = grey >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        grey = np.nan_to_num(np.asarray(image))
        scale = 255 if grey.max(initial=0) <= 1 else 1 if grey.max() <= 255 else 255 / 65535
        image = Image.fromarray((grey * scale).clip(0, 255).round().astype(np.uint8))
    if alpha is not None:
        image.putalpha(alpha)
    if image.has_transparency_data:
        image = _rgba(image)
        if image.getchannel("A").getextrema()[0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image if image.mode == mode else image.convert(mode)


def open_image(item: dict | None) -> Image.Image:
    """Opens one value of an undecoded `datasets.Image` column; pixels are read later."""
    if item is None or item["bytes"] is None and item["path"] is None:
        raise ValueError("the row holds no image")
    if item["bytes"] is None and "://" in item["path"]:
        return require("datasets").Image().decode_example(item)  # a remote file
    try:
        return _open(item["path"] if item["bytes"] is None else BytesIO(item["bytes"]))
    except (ValueError, SyntaxError, Image.UnidentifiedImageError):
        data = item["bytes"]
        if data is None:
            with open(item["path"], "rb") as file:
                data = file.read()
        if (pixels := _png_pixels(data)) is None:
            raise
        return _open(BytesIO(pixels))


def _open(source: str | BytesIO) -> Image.Image:
    with quiet:  # an image of 90 to 179 million pixels is large, not an attack; above, Pillow refuses
        return Image.open(source)


def _png_pixels(data: bytes) -> bytes | None:
    """A PNG without its metadata, in which Pillow refuses damage that leaves the pixels as they are; else None."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    out, start = [data[:8]], 8
    while start + 12 <= len(data):
        (size,), kind = struct.unpack(">I", data[start : start + 4]), data[start + 4 : start + 8]
        if kind[:1].isupper() or kind == b"tRNS":  # upper case: a chunk that is needed to show the image
            out.append(data[start : start + 12 + size])
        start += 12 + size
    return b"".join(out)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a loaded image upright; damaged EXIF data turns nothing."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION))
    except Exception:  # whatever Pillow raises there, the pixels are fine
        return None


def decode(item: dict | None, mode: str = "RGB", shrink: int | None = None, background: str = WHITE) -> Image.Image:
    """Decodes, converts to `mode` (see `to_mode`) and turns upright by the EXIF orientation, as `datasets` does.

    With `shrink`, an image whose shorter side has more pixels than that is reduced to it.
    """
    if item is not None and item["bytes"] is not None and (header := _RAW_GREY.match(item["bytes"])):
        size = (int(header[1]), int(header[2]))
        return to_mode(Image.frombytes("L", size, item["bytes"][header.end() :]), mode)
    with open_image(item) as image:
        small = None
        if shrink and min(image.size) > shrink:
            small = tuple(round(side * shrink / min(image.size)) for side in image.size)
            image.draft(None, (2 * small[0], 2 * small[1]))  # JPEG decodes at 1/2, 1/4, 1/8 much faster
        image.load()
        turn = _turn(image)
        out = to_mode(image, mode, background)
    if small:
        out = out.resize(small, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return out if turn is None else out.transpose(turn)


class Images(torch.utils.data.Dataset):
    """The decoded images and labels of a data set; also a map-style `(image, label)` data set as timm's are.

    When all of them are estimated to fit into `cache_limit` bytes they are decoded once, here, and stay in RAM
    (worker processes share them); otherwise each is decoded when asked for.

    An image that cannot be read is counted in `corrupt` and logged; `pil` gives None for it.

    Args:
        dataset: A `datasets.Dataset` with the columns `image` and `label`.
        mode: 'RGB', or 'L' for models with one input channel.
        cache_limit: Bytes of RAM for decoded images; 0 never keeps any.
        shrink: Pixels of the shorter side that larger images are reduced to. For training on photographs much
            larger than the model's input: they decode faster and fit the cache. Slightly softer pixels.
        background: Colour behind transparent pixels, as `parse_background` takes it.
        max_corrupt: Largest fraction of unreadable images (one is always allowed).
        transform: Applied to what `[i]` gives.

    Raises:
        DataError: When more than `max_corrupt` of the images cannot be read.
    """

    def __init__(
        self,
        dataset,
        *,
        mode: str = "RGB",
        cache_limit: int = GIB,
        shrink: int | None = None,
        background: str = WHITE,
        max_corrupt: float = 0.05,
        transform=None,
    ):
        feature = require("datasets").Image(decode=False)
        self._raw = dataset.select_columns(["image"]).cast_column("image", feature)
        self.labels = np.asarray(dataset["label"][:], dtype=np.int64)
        self.mode, self.shrink, self.transform = mode, shrink, transform
        self.background = parse_background(background)
        self.max_corrupt = max_corrupt
        self.corrupt: dict[int, str] = {}
        self._cache: list[Image.Image | None] | None = None
        if cache_limit and len(self) and self._estimate_bytes() <= cache_limit:
            self._cache = self._decode_all(cache_limit)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image, index = self.readable(index)
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])

    @property
    def cached(self) -> bool:
        return self._cache is not None

    def pil(self, indices) -> list[Image.Image | None]:
        """The images at `indices`; None for the unreadable ones."""
        if self._cache is not None:
            return [self._cache[i] for i in indices]
        items = self._raw[[int(i) for i in indices]]["image"]
        with quiet:
            return [self._decode(int(i), item) for i, item in zip(indices, items, strict=True)]

    def readable(self, index: int) -> tuple[Image.Image, int]:
        """The image at `index`, or the next readable one after it, and the index it came from."""
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            image = self.pil([candidate])[0]
            if image is not None:
                return image, candidate
        raise DataError("none of the images can be read")

    def report(self, corrupt: dict[int, str]) -> None:
        """Notes unreadable images (index and reason).

        Raises:
            DataError: When they exceed `max_corrupt`.
        """
        new = {index: reason for index, reason in corrupt.items() if index not in self.corrupt}
        self.corrupt.update(new)
        if not new or torch.utils.data.get_worker_info() is not None:
            return  # the loader reports a worker's findings again in the main process
        for index, reason in new.items():
            _logger.warning("%s cannot be read and is left out: %s", self._describe(index), reason)
        limit = max(1, int(self.max_corrupt * len(self)))
        if len(self.corrupt) > limit:
            raise DataError(
                f"{len(self.corrupt)} images of {len(self)} cannot be read, more than the {limit} allowed "
                f"(max_corrupt={self.max_corrupt:g}); the last: {reason}"
            ) from None

    def _describe(self, index: int) -> str:
        return f"image {index} of {len(self)}"

    def _decode(self, index: int, item: dict) -> Image.Image | None:
        try:
            return decode(item, self.mode, self.shrink, self.background)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's plugins raise nearly anything on broken files
            where = (item["path"] or "embedded image") if item else "empty row"
            self.report({index: f"{where}: {type(error).__name__}: {error}"})
            return None

    def _estimate_bytes(self) -> int:
        """Size of all decoded images (Pillow keeps 4 bytes per RGB pixel), from the headers of a few."""
        picks = np.unique(np.linspace(0, len(self) - 1, 64).astype(int))
        pixels = [1]
        for item in self._raw[picks.tolist()]["image"]:
            try:
                with open_image(item) as image:
                    w, h = image.size
            except Exception:  # counted when it is decoded
                continue
            pixels.append(w * h * min(1.0, self.shrink / min(w, h)) ** 2 if self.shrink else w * h)
        self._mean_pixels = float(np.mean(pixels))
        return int(len(self) * (self._mean_pixels * (4 if self.mode == "RGB" else 1) + 1500))

    def _decode_all(self, limit: int) -> list[Image.Image | None] | None:
        threads = (os.cpu_count() or 1) if self._mean_pixels > 128**2 else 1  # below, the GIL eats the gain
        out, used = [], 0
        with quiet, ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(self), 256):
                indices = range(start, min(start + 256, len(self)))
                items = self._raw[list(indices)]["image"]
                part = list((pool.map if threads > 1 else map)(self._decode, indices, items))
                used += sum(i.width * i.height * len(i.getbands()) for i in part if i is not None)
                if used > limit:  # the few headers looked at were not typical
                    return None
                out += part
        return out
