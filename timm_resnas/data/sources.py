"""Data sets by name or path: digits, fashion-mnist:<dir>, imagefolder:<dir>, hf:<id>."""

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .folders import make_dataset, must_be_folder, open_folder, open_folder_eval
from .hf import open_hf, open_hf_eval, open_hf_stream
from .images import WHITE, DataError, require
from .names import part_kind
from .parts import TEST_SEED, EvalPart, Reading, Splits, local_path, make_eval_part, make_splits
from .splits import stratified_counts, take_per_class

__all__ = ["load_eval", "load_splits"]


def load_splits(
    name: str,
    *,
    cache_dir: str | os.PathLike | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    hf_config: str | None = None,
    background: str = WHITE,
    test_fraction: float = 0.2,
    streaming: bool = False,
    num_train: int | None = None,
) -> Splits:
    """Opens a data set's training and test parts.

    * `digits`: scikit-learn's 1,797 grey 8x8 digits; 360 of them, stratified, are the test part.
    * `fashion-mnist:<dir>`: the four idx files, gzipped or not.
    * `imagefolder:<dir>`: the folders of the parts with one folder per class each, or the class folders directly.
      Images of any size and colour; whatever lies below a class's folder is of that class.
    * `hf:<id>`: a repository of the Hugging Face Hub or a local folder that `datasets.load_dataset` (or
      `load_from_disk`) opens.

    Parts are known by their usual names in upper or lower case (train, training; test, testing, eval, or else val,
    validation, valid, dev). Without a test part, `test_fraction` of each class is cut off, always the same images.
    What is there and not used is said in the result's `notes`.

    Args:
        name: One of the above.
        cache_dir: Where `hf:` data sets are cached; the default is that of `datasets`.
        train_split: The training split or folder, where it has another name; '.' for class folders that look like
            parts.
        test_split: The test split or folder.
        image_key: The image column of an `hf:` data set, where several could be meant.
        label_key: Its label column.
        hf_config: Its configuration (`load_dataset`'s second argument).
        background: Colour behind transparent pixels: a name, '#rrggbb' or 'rgb(…)'.
        test_fraction: Share of each class, between 0 and 1.
        streaming: Read the training part of an `hf:` data set while it is trained on, instead of storing it first.
            It needs a separate test split, which is stored, and labels with class names (`ClassLabel`).
        num_train: Number of training images, where a streamed data set does not say it.

    Raises:
        DataError: For an unknown name, missing or unfit files, or splits that do not fit each other.
        ImportError: When the extra `recipes` is not installed.
    """
    reading = Reading(image_key, label_key, hf_config, train_split, test_split, background, _text(cache_dir))
    kind, where = _kind(name, test_fraction)
    if streaming and kind != "hf":
        raise DataError(f"only hf:<id> can be streamed, not {name}")
    if kind == "digits":
        return _digits(reading)
    if kind == "fashion-mnist":
        return _fashion_mnist(name, local_path(where), reading)
    if kind == "imagefolder":
        return open_folder(name, local_path(where), reading, test_fraction)
    if streaming:
        return open_hf_stream(name, where, reading, num_train)
    return open_hf(name, where, reading, test_fraction)


def load_eval(
    name: str,
    split: str | None = None,
    *,
    cache_dir: str | os.PathLike | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    hf_config: str | None = None,
    background: str = WHITE,
    test_fraction: float = 0.2,
) -> EvalPart:
    """Opens what a model is evaluated on.

    Without `split` that is the test part, or else the validation part, and of a data set without these (class folders,
    a single split) all of it: nothing is cut off. A data set may have nothing but a test part.

    Args:
        name: See `load_splits`, as for the other arguments.
        split: 'test' or 'train': the part that training tests or trains on; where a data set has no such parts, what
            `load_splits` cuts off, or the rest. Any other name: that split or folder, whole ('.' for class folders
            that look like parts).

    Raises:
        DataError: As `load_splits`.
        ImportError: When the extra `recipes` is not installed.
    """
    reading = Reading(image_key, label_key, hf_config, None, None, background, _text(cache_dir))
    kind, where = _kind(name, test_fraction)
    if kind == "imagefolder":
        return open_folder_eval(name, local_path(where), split, reading, test_fraction)
    if kind == "hf":
        return open_hf_eval(name, where, split, reading, test_fraction)
    part = "test" if split is None else part_kind(split)
    if part not in ("train", "test"):
        raise DataError(f"{name} has no split {split!r}; it has train, test (--split)")
    if kind == "fashion-mnist":
        reading.refuse(name, "image_key", "label_key", "hf_config")
        data = _fashion_part(local_path(where), part)
        return make_eval_part(name, part, data, len(data), reading)
    splits = _digits(reading)
    data = getattr(splits, part)
    return make_eval_part(name, part, data, len(splits.train) + len(splits.test), reading)


def _text(path: str | os.PathLike | None) -> str | None:
    return None if path is None else str(path)


def _kind(name: str, test_fraction: float) -> tuple[str, str]:
    kind, _, where = name.partition(":")
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    if name != "digits" and not (kind in ("fashion-mnist", "imagefolder", "hf") and where):
        raise DataError(
            f"unknown data set {name!r}; known are digits, fashion-mnist:<dir>, imagefolder:<dir> and hf:<id>"
        )
    return kind, where


# ---- digits -----------------------------------------------------------------------------------------------------


def _digits(reading: Reading) -> Splits:
    reading.refuse("digits", "image_key", "label_key", "hf_config", "train_split", "test_split")
    digits = require("sklearn.datasets").load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    labels = digits.target.astype(np.int64)
    test = take_per_class(labels, stratified_counts(labels, 360), TEST_SEED)
    train = np.setdiff1d(np.arange(len(labels)), test)
    names = [str(n) for n in digits.target_names]
    return make_splits(
        "digits",
        _grey_dataset(pixels[train], labels[train], names),
        _grey_dataset(pixels[test], labels[test], names),
        reading,
        description="Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, 1998; UCI Machine Learning "
        "Repository), the 1,797 images of 8x8 pixels that scikit-learn ships",
    )


def _grey_dataset(pixels: np.ndarray, labels: np.ndarray, names: Sequence[str]):
    """[N, H, W] uint8 -> Dataset. Each image is stored as binary PGM: raw pixels behind a header."""
    import pyarrow as pa

    header = f"P5 {pixels.shape[2]} {pixels.shape[1]} 255\n".encode()
    encoded = pa.array([header + image.tobytes() for image in pixels], type=pa.binary())
    paths = pa.nulls(len(pixels), pa.string())
    return make_dataset(pa.StructArray.from_arrays([encoded, paths], names=["bytes", "path"]), labels, names)


# ---- fashion-mnist ----------------------------------------------------------------------------------------------

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_MAX_IDX = 1 << 31  # bytes of a file; Fashion-MNIST has 47 million


def _fashion_mnist(name: str, folder: Path, reading: Reading) -> Splits:
    reading.refuse(name, "image_key", "label_key", "hf_config", "train_split", "test_split")
    return make_splits(
        name,
        _fashion_part(folder, "train"),
        _fashion_part(folder, "test"),
        reading,
        description="Fashion-MNIST (H. Xiao, K. Rasul and R. Vollgraf, 2017): grey pictures of clothes, 28x28 pixels",
        license="MIT",
    )


def _fashion_part(folder: Path, part: str):
    must_be_folder(folder)
    require("datasets")
    stem = {"train": "train", "test": "t10k"}[part]
    images = _read_idx(_find_idx(folder, f"{stem}-images", 3), 3)
    labels = _read_idx(_find_idx(folder, f"{stem}-labels", 1), 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels in the {stem} files")
    if len(labels) and labels.max() >= len(_FASHION):
        raise DataError(f"{folder}: label {labels.max()} in the {stem} files, but Fashion-MNIST has classes 0 to 9")
    return _grey_dataset(images, labels.astype(np.int64), _FASHION)


def _find_idx(folder: Path, stem: str, ndim: int) -> Path:
    names = [f"{stem}{sep}idx{ndim}-ubyte{ext}" for ext in ("", ".gz") for sep in "-."]
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise DataError(f"{folder} holds no {names[0]} (or .gz); the four idx files of Fashion-MNIST were expected")


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads an idx file of bytes: magic 0x0000 0x08 ndim, big-endian sizes, data."""
    expected, start = bytes((0, 0, 8, ndim)), 4 * (ndim + 1)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(start)
            sizes = [int.from_bytes(header[4 * k : 4 * k + 4], "big") for k in range(1, ndim + 1)]
            size = math.prod(sizes) if header[:4] == expected else 0
            data = file.read(min(size, _MAX_IDX) + 1)  # one byte more shows a file that is too long
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if header[:4] != expected:
        raise DataError(f"{path} is not an idx file: it starts with {header[:4].hex()!r}, not with {expected.hex()!r}")
    if len(data) != size:
        more = "more than " if len(data) > size else ""
        raise DataError(f"{path} is damaged: its header says {sizes}, but {more}{min(len(data), size)} bytes follow")
    return np.frombuffer(data, np.uint8).reshape(sizes)
