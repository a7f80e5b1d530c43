"""What data sets are opened as: their training and test parts, or the one part that is evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .images import WHITE, DataError, is_transparent, open_image, parse_background, require
from .names import some
from .splits import take_per_class

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["EvalPart", "Reading", "Splits"]

TEST_SEED = 0  # cuts test parts; no option moves it, or scores would not compare
_LOOKED_AT = 1000  # images of each part whose transparency is counted


@dataclass(frozen=True)
class Reading:
    """How a data set is read where the usual names do not fit: the keywords of `load_splits` and `load_eval`.

    A recipe's options have the same names: `--image-key`, `--label-key`, `--hf-config`, …
    """

    image_key: str | None = None  # the image column
    label_key: str | None = None  # the label column
    hf_config: str | None = None  # the configuration: `datasets.load_dataset`'s second argument
    train_split: str | None = None  # the training split or folder
    test_split: str | None = None  # the test split or folder
    background: str = WHITE  # what transparent pixels show
    cache_dir: str | None = None  # of `datasets`

    def __post_init__(self) -> None:
        object.__setattr__(self, "background", parse_background(self.background))

    def refuse(self, name: str, *options: str) -> None:
        """Raises `DataError` for an option that would do nothing."""
        if given := [o for o in options if getattr(self, o) is not None]:
            flags = ", ".join("--" + o.replace("_", "-") for o in given)
            raise DataError(f"{name} has nothing that {flags} could choose; leave {flags} out")


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set's training and test parts: `datasets.Dataset`s with the columns `image` and `label`.

    `native_size` (h, w) and `in_chans` (1 when the source is grey) are those of the source: medians and majority
    of a few training images. Of a streamed data set `train` is a `datasets.IterableDataset`, for `stream_loader`.

    `background` ('#rrggbb') is what transparent pixels show: a `data_config` entry of that name hands it to
    transforms, and whoever uses a model that was trained on these images must show the same. `notes` are sentences
    for the user: parts that are not used, transparent images.
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
    background: str = WHITE
    notes: tuple[str, ...] = ()

    @property
    def num_train(self) -> int:
        return len(self.train) if self.streamed is None else self.streamed

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, eq=False)
class EvalPart:
    """The images that a model is evaluated on: a `datasets.Dataset` with the columns `image` and `label`.

    `split` names what was taken, `total` is how many images that split or folder holds; fewer were taken where a part
    was cut from it. The other fields are those of `Splits`.
    """

    name: str
    split: str
    dataset: "Dataset"
    total: int
    class_names: tuple[str, ...]
    native_size: tuple[int, int]
    in_chans: int
    background: str = WHITE
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def make_splits(name: str, train, test, reading: Reading, notes: Sequence[str] = (), **about) -> Splits:
    """Checks two parts and looks at their images."""
    class_names = tuple(train.features["label"].names)
    for part, dataset in (("training", train), ("test", test)):
        if not len(dataset):
            raise DataError(f"the {part} part of {name} is empty")
        check_labels(f"the {part} part of {name}", dataset)
    if len(class_names) < 2:
        raise DataError(f"{name} has the single class {class_names[0]!r}; classification needs at least two")
    seen = np.bincount(labels_of(train), minlength=len(class_names))
    if missing := [class_names[c] for c in np.flatnonzero(seen == 0)]:
        raise DataError(f"{name}: no training image of the class{'es' * (len(missing) > 1)} {some(missing)}")
    size, grey = look(train)
    notes = (*notes, *transparency([train, test], reading.background))
    return Splits(
        name, train, test, class_names, size, 1 if grey else 3, background=reading.background, notes=notes, **about
    )


def make_eval_part(name: str, split: str, dataset, total: int, reading: Reading, notes: Sequence[str] = ()) -> EvalPart:
    """Checks a part that is evaluated and looks at its images. It need not have images of every class."""
    if not len(dataset):
        raise DataError(f"{split} of {name} is empty")
    check_labels(f"{split} of {name}", dataset)
    size, grey = look(dataset)
    names = tuple(dataset.features["label"].names)
    notes = (*notes, *transparency([dataset], reading.background))
    return EvalPart(
        name, split, dataset, total, names, size, 1 if grey else 3, background=reading.background, notes=notes
    )


def whole_or_cut(
    name: str,
    shown: str,
    dataset,
    split: str | None,
    whole: bool,
    reading: Reading,
    test_fraction: float,
    notes: Sequence[str] = (),
) -> EvalPart:
    """A part as it is; or, where training would cut a test part from it, the `split` of these that is asked for."""
    if whole or split is None:
        if not whole:
            first = (
                f"{name} has no separate test part: all {len(dataset)} images are evaluated, also those that training"
            )
            notes = (*notes, f"{first} uses. --split test takes the ones that it keeps for testing")
        return make_eval_part(name, shown, dataset, len(dataset), reading, notes)
    parts = dict(zip(("train", "test"), cut_test(dataset, test_fraction), strict=True))
    return make_eval_part(name, f"{split} (cut from {shown})", parts[split], len(dataset), reading, notes)


def local_path(where: str) -> Path:
    """A path whose ~ is the user's folder."""
    try:
        return Path(where).expanduser()
    except RuntimeError:
        raise DataError(f"there is no user whose folder is {where}") from None


def labels_of(dataset) -> np.ndarray:
    """The labels, int64 [N]."""
    return np.asarray(dataset["label"][:], dtype=np.int64)


def check_labels(what: str, dataset) -> None:
    """Raises `DataError` for labels without a class, which parquet files may hold."""
    labels, count = labels_of(dataset), len(dataset.features["label"].names)
    if len(wrong := labels[(labels < 0) | (labels >= count)]):
        raise DataError(f"{what} has {len(wrong)} labels such as {wrong[0]}; 0 to {count - 1} were expected")


def cut_test(dataset, fraction: float):
    """Cuts the same images of each class off every time: training and test part."""
    labels = labels_of(dataset)
    names = dataset.features["label"].names
    classes, sizes = np.unique(labels, return_counts=True)
    if sizes.min(initial=2) < 2:
        raise DataError(
            f"class {names[classes[sizes.argmin()]]!r} has a single image; without a test part at least 2 per class "
            "are needed, one of them to test on"
        )
    counts = {int(c): min(max(1, round(fraction * n)), n - 1) for c, n in zip(classes, sizes, strict=True)}
    test = take_per_class(labels, counts, TEST_SEED)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return dataset.select(train.tolist()), dataset.select(test)


def look(dataset, count: int = 32) -> tuple[tuple[int, int], bool]:
    """Median (h, w) of a few images, and whether all of them are grey, by their headers."""
    sizes, modes, looked = [], set(), 0
    for item in _undecoded(dataset, count):
        looked += 1
        try:
            with open_image(item) as image:
                sizes.append((image.height, image.width))
                modes.add(image.mode)
        except Exception:  # an unreadable image is reported when it is decoded
            continue
    if not sizes:
        raise DataError(f"none of {looked} images looked at can be opened as an image")
    h, w = np.median(sizes, axis=0)
    return (int(h), int(w)), all(m in ("1", "L", "LA") or m.startswith("I") for m in modes)


def _undecoded(dataset, count: int):
    """Up to `count` evenly spaced images, as values of an undecoded `datasets.Image` column."""
    raw = dataset.select_columns(["image"]).cast_column("image", require("datasets").Image(decode=False))
    picks = np.unique(np.linspace(0, len(raw) - 1, min(count, len(raw))).astype(int)).tolist()
    for start in range(0, len(picks), 64):
        yield from raw[picks[start : start + 64]]["image"]


def transparency(parts: Sequence, background: str, what: str = "images") -> list[str]:
    """A note where images have transparent pixels; only images whose header allows some are decoded."""
    looked = found = 0
    for part in parts:
        for item in _undecoded(part, _LOOKED_AT):
            looked += 1
            try:
                with open_image(item) as image:
                    if image.has_transparency_data:
                        image.load()
                        found += is_transparent(image)
            except Exception:  # reported when it is decoded
                continue
    if not found:
        return []
    what += "" if looked == sum(map(len, parts)) else " looked at"
    return [
        f"{found} of {looked} {what} {'have' if found > 1 else 'has'} transparent pixels; they show the background "
        f"{background} (--background)"
    ]
