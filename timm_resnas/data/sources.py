"""Data sets by name or path: digits, fashion-mnist:<dir>, imagefolder:<dir>, hf:<id>."""

import gzip
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .images import DataError, first_rows, open_image, require
from .splits import stratified_counts, take_per_class

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["Splits", "load_splits"]

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")
_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("test", "testing", "val", "validation", "valid", "dev")
_TEST_SEED = 0  # cuts test parts; no option moves it, or scores would not compare


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set's training and test parts: `datasets.Dataset`s with the columns `image` and `label`.

    `native_size` (h, w) and `in_chans` (1 when the source is grey) are those of the source: medians and majority
    of a few training images. Of a streamed data set `train` is a `datasets.IterableDataset`, for `stream_loader`.
    """

    name: str
    train: "Dataset | IterableDataset"
    test: "Dataset"
    class_names: tuple[str, ...]
    native_size: tuple[int, int]
    in_chans: int
    description: str = ""
    license: str = ""
    streamed: int | None = None  # training images of a stream

    @property
    def num_train(self) -> int:
        return len(self.train) if self.streamed is None else self.streamed

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def load_splits(
    name: str,
    *,
    cache_dir: str | os.PathLike | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    config: str | None = None,
    test_fraction: float = 0.2,
    streaming: bool = False,
    num_train: int | None = None,
) -> Splits:
    """Opens a data set.

    * `digits`: scikit-learn's 1,797 grey 8x8 digits; 360 of them, stratified, are the test part.
    * `fashion-mnist:<dir>`: the four idx files, gzipped or not.
    * `imagefolder:<dir>`: `train/` and `test/` (or `val/`, `validation/`) with one folder per class, or the class
      folders directly. Images of any size and colour; whatever lies below a class's folder is of that class.
    * `hf:<id>`: a repository of the Hugging Face Hub or a local folder that `datasets.load_dataset` (or
      `load_from_disk`) opens.

    Without a test part, `test_fraction` of each class is cut off, always the same images.

    Args:
        name: One of the above.
        cache_dir: Where `hf:` data sets are cached; the default is that of `datasets`.
        train_split: The training split's (or folder's) name, where it is not `train`.
        test_split: The test split's (or folder's) name.
        image_key: The image column of an `hf:` data set, where several could be meant.
        label_key: Its label column.
        config: Its configuration (`load_dataset`'s second argument).
        test_fraction: Share of each class, between 0 and 1.
        streaming: Read the training part of an `hf:` data set while it is trained on, instead of storing it first.
            It needs a test split of its own, which is stored, and labels with class names (`ClassLabel`).
        num_train: Number of training images, where a streamed data set does not say it.

    Raises:
        DataError: For an unknown name, missing or unfit files, or splits that do not fit each other.
        ImportError: When the extra `recipes` is not installed.
    """
    kind, _, where = name.partition(":")
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    if streaming and kind != "hf":
        raise DataError(f"only hf:<id> can be streamed, not {name}")
    if name == "digits":
        return _digits()
    if kind == "fashion-mnist" and where:
        return _fashion_mnist(name, Path(where).expanduser())
    if kind == "imagefolder" and where:
        return _imagefolder(name, Path(where).expanduser(), train_split, test_split, test_fraction)
    if kind == "hf" and where:
        keys = (image_key, label_key)
        if streaming:
            return _hf_stream(name, where, config, cache_dir, train_split, test_split, keys, num_train)
        return _hf(name, where, config, cache_dir, train_split, test_split, keys, test_fraction)
    raise DataError(f"unknown data set {name!r}; known are digits, fashion-mnist:<dir>, imagefolder:<dir> and hf:<id>")


# ---- digits -----------------------------------------------------------------------------------------------------


def _digits() -> Splits:
    digits = require("sklearn.datasets").load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    labels = digits.target.astype(np.int64)
    test = take_per_class(labels, stratified_counts(labels, 360), _TEST_SEED)
    train = np.setdiff1d(np.arange(len(labels)), test)
    names = [str(n) for n in digits.target_names]
    return _splits(
        "digits",
        _grey_dataset(pixels[train], labels[train], names),
        _grey_dataset(pixels[test], labels[test], names),
        description="Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, 1998; UCI Machine Learning "
        "Repository), the 1,797 images of 8x8 pixels that scikit-learn ships",
    )


def _grey_dataset(pixels: np.ndarray, labels: np.ndarray, names: Sequence[str]):
    """[N, H, W] uint8 -> Dataset. Each image is stored as binary PGM: raw pixels behind a header."""
    import pyarrow as pa

    header = f"P5 {pixels.shape[2]} {pixels.shape[1]} 255\n".encode()
    encoded = pa.array([header + image.tobytes() for image in pixels], type=pa.binary())
    paths = pa.nulls(len(pixels), pa.string())
    return _dataset(pa.StructArray.from_arrays([encoded, paths], names=["bytes", "path"]), labels, names)


def _file_dataset(paths: list[str], labels: Sequence[int], names: Sequence[str]):
    import pyarrow as pa

    files = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), pa.array(paths)], names=["bytes", "path"])
    return _dataset(files, labels, names)


def _dataset(images, labels: Sequence[int], names: Sequence[str]):
    import pyarrow as pa

    datasets = require("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    table = pa.table({"image": images, "label": pa.array(np.asarray(labels, dtype=np.int64))})
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


# ---- fashion-mnist ----------------------------------------------------------------------------------------------

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def _fashion_mnist(name: str, folder: Path) -> Splits:
    _must_be_folder(folder)
    require("datasets")
    parts = []
    for part in ("train", "t10k"):
        images = _read_idx(_find_idx(folder, f"{part}-images", 3), 3)
        labels = _read_idx(_find_idx(folder, f"{part}-labels", 1), 1)
        if len(images) != len(labels):
            raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels in the {part} files")
        if len(labels) and labels.max() >= len(_FASHION):
            raise DataError(f"{folder}: label {labels.max()} in the {part} files, but Fashion-MNIST has classes 0 to 9")
        parts.append(_grey_dataset(images, labels.astype(np.int64), _FASHION))
    return _splits(
        name,
        *parts,
        description="Fashion-MNIST (H. Xiao, K. Rasul and R. Vollgraf, 2017): grey pictures of clothes, 28x28 pixels",
        license="MIT",
    )


def _find_idx(folder: Path, stem: str, ndim: int) -> Path:
    names = [f"{stem}{sep}idx{ndim}-ubyte{ext}" for ext in ("", ".gz") for sep in "-."]
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise DataError(f"{folder} holds no {names[0]} (or .gz); the four idx files of Fashion-MNIST were expected")


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads an idx file of bytes: magic 0x0000 0x08 ndim, big-endian sizes, data."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    expected = bytes((0, 0, 8, ndim))
    if data[:4] != expected:
        raise DataError(f"{path} is no idx file: it starts with {data[:4].hex()!r}, not with {expected.hex()!r}")
    sizes = [int.from_bytes(data[4 * k : 4 * k + 4], "big") for k in range(1, ndim + 1)]
    start = 4 * (ndim + 1)
    if len(data) - start != np.prod(sizes, dtype=np.int64):
        raise DataError(f"{path} is damaged: its header says {sizes}, but {len(data) - start} bytes follow")
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes)


# ---- imagefolder ------------------------------------------------------------------------------------------------


def _imagefolder(name: str, folder: Path, train_split, test_split, test_fraction: float) -> Splits:
    _must_be_folder(folder)
    require("datasets")
    subfolders = {entry.name: entry for entry in _folders(folder)}
    train_dir = _pick(subfolders, train_split, _TRAIN_NAMES, folder)
    test_dir = _pick(subfolders, test_split, _TEST_NAMES, folder)
    # a folder called "train" with images right in it may also be a class (of trains)
    if train_split is None and train_dir and not _folders(train_dir):
        if set(subfolders) <= {*_TRAIN_NAMES, *_TEST_NAMES}:
            raise DataError(f"{train_dir} holds no class folders; expected {train_dir / '<class>'}/<images>")
        train_dir = None
    if train_dir is None:
        if test_split is not None:
            raise DataError(
                f"{folder} has a test folder {test_split!r} but no train/ beside it; name it by train_split"
            )
        train_dir, test_dir = folder, None
    paths, labels, names = _class_folders(train_dir)
    if test_dir is None:
        train = _file_dataset(paths, labels, names)
        return _splits(name, *_cut_test(train, test_fraction))
    test_paths, test_labels, test_names = _class_folders(test_dir)
    if test_names != names:
        only = [sorted(set(a) - set(b)) for a, b in ((names, test_names), (test_names, names))]
        raise DataError(
            f"the class folders differ: only in {train_dir}: {_some(only[0])}; only in {test_dir}: {_some(only[1])}; "
            "both need the same classes"
        )
    return _splits(name, _file_dataset(paths, labels, names), _file_dataset(test_paths, test_labels, names))


def _must_be_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}")


def _folders(folder: Path) -> list[Path]:
    found = (e for e in folder.iterdir() if e.is_dir() and not e.name.startswith((".", "__")))
    return sorted(found, key=lambda e: _natural(e.name))


def _natural(text: str) -> list:
    """Sort key that puts 'class10' behind 'class2', as timm orders classes."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text.lower())]


def _pick(subfolders: dict[str, Path], asked: str | None, usual: Sequence[str], folder: Path) -> Path | None:
    if asked is not None:
        if asked not in subfolders:
            raise DataError(f"{folder} has no folder {asked!r}; it has {_some(list(subfolders))}")
        return subfolders[asked]
    return next((subfolders[n] for n in usual if n in subfolders), None)


def _class_folders(folder: Path) -> tuple[list[str], list[int], list[str]]:
    classes = _folders(folder)
    if not classes:
        loose = any(e.suffix.lower() in IMAGE_EXTENSIONS for e in folder.iterdir())
        raise DataError(
            f"{folder} holds {'images but no class folders' if loose else 'no class folders'}; "
            f"expected {folder / '<class>'}/<images>, one folder per class"
        )
    paths, labels = [], []
    for c, class_folder in enumerate(classes):
        found = []
        for root, dirs, files in os.walk(class_folder, followlinks=True):
            dirs[:] = [d for d in dirs if not d.startswith(".")]
            found += [
                os.path.join(root, f) for f in files if f.lower().endswith(IMAGE_EXTENSIONS) and not f.startswith(".")
            ]
        if not found:
            raise DataError(f"the class folder {class_folder} holds no images ({' '.join(IMAGE_EXTENSIONS)})")
        paths += sorted(found, key=_natural)
        labels += [c] * len(found)
    return paths, labels, [c.name for c in classes]


# ---- hf ---------------------------------------------------------------------------------------------------------


def _hf(name, where, config, cache_dir, train_split, test_split, keys, test_fraction: float) -> Splits:
    datasets = require("datasets")
    loaded = _open_hf(datasets, where, config, cache_dir)
    splits = {s: d for s, d in loaded.items() if len(d)}
    train_key = train_split or next((s for s in _TRAIN_NAMES if s in splits), None)
    if train_key not in splits:
        raise DataError(f"{name} has no split {train_key or 'train'!r}; it has {_some(list(splits))} (train_split=…)")
    if test_split is not None and test_split not in splits:
        raise DataError(f"{name} has no split {test_split!r}; it has {_some(list(splits))} (test_split=…)")
    image_key, label_key = _columns(datasets, name, splits[train_key], *keys)
    candidates = [test_split] if test_split else [s for s in _TEST_NAMES if s in splits and s != train_key]
    test_key = next((s for s in candidates if _is_labelled(splits[s], label_key)), None)
    if test_split and test_key is None:
        raise DataError(f"the split {test_split!r} of {name} has no labels; choose another (test_split=…)")
    used = [splits[train_key]] + ([splits[test_key]] if test_key else [])
    if not _is_labelled(used[0], label_key):
        raise DataError(f"the split {train_key!r} of {name} has images without a label")
    parts = _relabel(datasets, name, used, image_key, label_key)
    if test_key is None:
        parts = _cut_test(parts[0], test_fraction)
    info = used[0].info
    return _splits(name, *parts, description=info.description or "", license=info.license or "")


def _hf_stream(name, where, config, cache_dir, train_split, test_split, keys, num_train: int | None) -> Splits:
    datasets = require("datasets")
    local = Path(where).expanduser()
    if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        raise DataError(f"{local} was written by save_to_disk and is read from there; it needs no streaming")
    where = str(local) if local.exists() else where
    cache_dir = None if cache_dir is None else str(cache_dir)
    try:
        builder = datasets.load_dataset_builder(where, config, cache_dir=cache_dir)
        streams = builder.as_streaming_dataset()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().split("\n")[0]
        raise DataError(f"datasets cannot open {where!r}: {first}") from error
    train_key = train_split or next((s for s in _TRAIN_NAMES if s in streams), None)
    test_key = test_split or next((s for s in _TEST_NAMES if s in streams and s != train_key), None)
    for key, part in ((train_key, "train"), (test_key, "test")):
        if key not in streams:
            raise DataError(
                f"{name} has no split {key or part!r}; it has {_some(list(streams))} ({part}_split=…). Streaming needs "
                f"both"
            )
    parts = []
    for key in (train_key, test_key):
        stream = streams[key]
        if stream.features is None:
            raise DataError(f"{name} does not say what its columns hold; it cannot be streamed")
        image_key, label_key = _columns(datasets, name, stream, *keys)
        if not isinstance(stream.features[label_key], datasets.ClassLabel):
            raise DataError(
                f"the column {label_key!r} of {name} is {stream.features[label_key]}; to be streamed it must name its "
                f"classes (ClassLabel), as they cannot be collected before"
            )
        stream = stream.select_columns([image_key, label_key])
        renamed = {old: new for old, new in ((image_key, "image"), (label_key, "label")) if old != new}
        parts.append(stream.rename_columns(renamed) if renamed else stream)
    train, test = parts
    if train.features["label"].names != test.features["label"].names:
        both = [_some(part.features["label"].names) for part in parts]
        raise DataError(f"{name}: the splits name different classes: {both[0]} and {both[1]}")
    if num_train is None:
        known = (builder.info.splits or {}).get(train_key)
        num_train = known.num_examples if known is not None else None
        if not num_train:
            raise DataError(f"{name} does not say how many images its split {train_key!r} has (num_train=…)")
    test = _store(datasets, test, f"{builder.hash} {builder.config.name} {test_key} {keys}", cache_dir)
    if not _is_labelled(test, "label"):
        raise DataError(f"the split {test_key!r} of {name} has no labels; choose another (test_split=…)")
    if not len(test):
        raise DataError(f"the test part of {name} is empty")
    sizes, grey = _look(first_rows(train, 32))
    about = dict(description=builder.info.description or "", license=builder.info.license or "")
    names = tuple(train.features["label"].names)
    return Splits(name, train, test, names, sizes, 1 if grey else 3, **about, streamed=num_train)


def _store(datasets, stream, key: str, cache_dir: str | None):
    """A stream as a `Dataset`, undecoded images as they are; kept in the cache under a name made of `key`."""
    raw = stream.cast_column("image", datasets.Image(decode=False))
    fingerprint = datasets.fingerprint.Hasher.hash(key)
    stored = datasets.Dataset.from_generator(
        lambda: iter(raw), features=raw.features, cache_dir=cache_dir, fingerprint=fingerprint
    )
    return stored.cast_column("image", datasets.Image())


def _open_hf(datasets, where: str, config: str | None, cache_dir):
    local = Path(where).expanduser()
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            loaded = datasets.load_from_disk(str(local))
        else:
            where = str(local) if local.exists() else where
            loaded = datasets.load_dataset(where, config, cache_dir=None if cache_dir is None else str(cache_dir))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().split("\n")[0]
        raise DataError(f"datasets cannot open {where!r}: {first}") from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _columns(datasets, name: str, dataset, image_key: str | None, label_key: str | None) -> tuple[str, str]:
    features = dataset.features
    for key in (image_key, label_key):
        if key is not None and key not in features:
            raise DataError(f"{name} has no column {key!r}; it has {_some(list(features))}")
    if image_key is None:
        images = [k for k, f in features.items() if isinstance(f, datasets.Image)]
        if len(images) != 1:
            raise DataError(
                f"{name} has {len(images) or 'no'} image columns among {_some(list(features))}; name one (image_key=…)"
            )
        image_key = images[0]
    elif not isinstance(features[image_key], datasets.Image):
        raise DataError(f"the column {image_key!r} of {name} is {features[image_key]}, not an image")
    if label_key is None:
        labels = [k for k, f in features.items() if isinstance(f, datasets.ClassLabel)]
        labels = [k for k in ("label", "labels") if k in labels] or labels
        labels = labels or [k for k in ("label", "labels", "class", "target") if k in features]
        if len(labels) != 1:
            raise DataError(f"{name}: which column of {_some(list(features))} is the label? name it (label_key=…)")
        label_key = labels[0]
    kind = features[label_key]
    plain = isinstance(kind, datasets.Value) and (kind.dtype == "string" or "int" in kind.dtype)
    if not (plain or isinstance(kind, datasets.ClassLabel)):
        raise DataError(f"the column {label_key!r} of {name} is {kind}; a class label, string or integer is needed")
    return image_key, label_key


def _is_labelled(dataset, label_key: str) -> bool:
    """Public test splits often hide their labels behind -1 or None."""
    return label_key in dataset.features and all(v is not None and v != -1 for v in set(dataset[label_key][:]))


def _relabel(datasets, name: str, parts: list, image_key: str, label_key: str) -> list:
    """Columns `image` and `label` only; plain strings and integers become classes, in sorted order."""
    values = [part[label_key][:] for part in parts]
    feature = parts[0].features[label_key]
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
        for part in parts[1:]:
            if part.features[label_key].names != names:
                raise DataError(
                    f"{name}: the splits name different classes: {_some(names)} and "
                    f"{_some(part.features[label_key].names)}"
                )
    else:
        found = sorted(set(values[0]))
        names, number = [str(v) for v in found], {v: k for k, v in enumerate(found)}
        if extra := sorted(set().union(*values[1:]) - set(found)):
            raise DataError(f"{name}: classes of the test split that the training split lacks: {_some(extra)}")
        values = [[number[v] for v in part] for part in values]
    out = []
    for part, labels in zip(parts, values, strict=True):
        part = part.select_columns([image_key])
        if image_key != "image":
            part = part.rename_column(image_key, "image")
        part = part.add_column("label", np.asarray(labels, dtype=np.int64), feature=datasets.ClassLabel(names=names))
        out.append(part)
    return out


# ---- common -----------------------------------------------------------------------------------------------------


def _cut_test(dataset, fraction: float):
    labels = np.asarray(dataset["label"][:], dtype=np.int64)
    names = dataset.features["label"].names
    classes, sizes = np.unique(labels, return_counts=True)
    if sizes.min() < 2:
        raise DataError(
            f"class {names[classes[sizes.argmin()]]!r} has a single image; without a test part at least 2 per class "
            "are needed, one of them to test on"
        )
    counts = {int(c): min(max(1, round(fraction * n)), n - 1) for c, n in zip(classes, sizes, strict=True)}
    test = take_per_class(labels, counts, _TEST_SEED)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return dataset.select(train.tolist()), dataset.select(test)


def _splits(name: str, train, test, **about) -> Splits:
    for part, dataset in (("training", train), ("test", test)):
        if not len(dataset):
            raise DataError(f"the {part} part of {name} is empty")
    class_names = tuple(train.features["label"].names)
    seen = np.bincount(np.asarray(train["label"][:], dtype=np.int64), minlength=len(class_names))
    if len(class_names) < 2:
        raise DataError(f"{name} has the single class {class_names[0]!r}; classification needs at least two")
    if missing := [class_names[c] for c in np.flatnonzero(seen == 0)]:
        raise DataError(f"{name}: no training image of the class{'es' * (len(missing) > 1)} {_some(missing)}")
    sizes, grey = _look(train)
    return Splits(name, train, test, class_names, sizes, 1 if grey else 3, **about)


def _look(dataset, count: int = 32) -> tuple[tuple[int, int], bool]:
    """Median (h, w) of a few images, and whether all of them are grey, by their headers."""
    raw = dataset.select_columns(["image"]).cast_column("image", require("datasets").Image(decode=False))
    picks = np.unique(np.linspace(0, len(raw) - 1, count).astype(int)).tolist()
    sizes, modes = [], set()
    for item in raw[picks]["image"]:
        try:
            with open_image(item) as image:
                sizes.append((image.height, image.width))
                modes.add(image.mode)
        except Exception:  # an unreadable image is reported when it is decoded
            continue
    if not sizes:
        raise DataError(f"none of {len(picks)} images looked at can be opened as an image")
    h, w = np.median(sizes, axis=0)
    return (int(h), int(w)), all(m in ("1", "L", "LA") or m.startswith("I") for m in modes)


def _some(items: Sequence, limit: int = 8) -> str:
    shown = ", ".join(str(i) for i in items[:limit])
    return (shown + (f", … ({len(items)} in all)" if len(items) > limit else "")) or "none"
