"""hf:<id or folder>: what `datasets.load_dataset` or `load_from_disk` opens, whole or as a stream."""

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .images import IMAGE_EXTENSIONS, DataError, first_rows, require
from .names import natural_key, part_kind, pick_part, some
from .parts import (
    EvalPart,
    Reading,
    Splits,
    cut_test,
    local_path,
    look,
    make_eval_part,
    make_splits,
    transparency,
    whole_or_cut,
)

__all__ = ["open_hf", "open_hf_eval", "open_hf_stream"]

_MAX_SECONDS = 60  # to look for the damaged file of a folder


def open_hf(name: str, where: str, reading: Reading, test_fraction: float) -> Splits:
    """The training and test splits.

    Raises:
        DataError: The data set cannot be opened, or splits or columns are not clear.
    """
    splits = _open(where, reading)
    train_key = _named(name, splits, reading.train_split, "--train-split") or pick_part(
        splits, "train", name, "--train-split"
    )
    if train_key is None:
        raise DataError(f"{name} has no split to train on; it has {some(list(splits))} (--train-split)")
    test_key = _named(name, splits, reading.test_split, "--test-split")
    image_key, label_key = _columns(name, splits[train_key], reading)
    if not _is_labelled(splits[train_key], label_key):
        raise DataError(f"the split {train_key!r} of {name} has images without a label")
    if test_key and not _is_labelled(splits[test_key], label_key):
        raise DataError(f"the split {test_key!r} of {name} has no labels; choose another (--test-split)")
    test_key = test_key or _labelled_test(name, splits, label_key, "--test-split", without=train_key)
    used = {k: splits[k] for k in (train_key, test_key) if k is not None}
    names, parts = _relabel(name, used, image_key, label_key)
    if test_key and (extra := sorted(set(names[test_key]) - set(names[train_key]), key=natural_key)):
        raise DataError(f"{name}: classes of the test split that the training split lacks: {some(extra)}")
    unused = [k for k in splits if k not in used]
    notes = [f"not used: {some([_described(splits, k, label_key) for k in unused])} of {name}"] if unused else []
    if test_key is None:
        notes.append(f"{name} has no test split with labels: one is cut from {train_key}")
    parts = list(parts.values()) if test_key else cut_test(parts[train_key], test_fraction)
    info = splits[train_key].info
    about = dict(description=info.description or "", license=info.license or "")
    return make_splits(name, *parts, reading, notes, **about)


def open_hf_eval(name: str, where: str, split: str | None, reading: Reading, test_fraction: float) -> EvalPart:
    """The split that is evaluated (see `load_eval`).

    Raises:
        DataError: As `open_hf`.
    """
    splits = _open(where, reading)
    label_key = _any_columns(name, splits, reading)[1]
    test = _labelled_test(name, splits, label_key, "--split")
    if split not in (None, "train", "test"):
        key, whole = _named(name, splits, split, "--split"), True
    elif test is not None and split != "train":
        key, whole = test, True
    elif train := pick_part(splits, "train", name, "--split"):
        key, whole = train, test is not None
    else:
        key, whole = (next(iter(splits)) if len(splits) == 1 and split is None else None), True
    if key is None:
        found = some([_described(splits, k, label_key) for k in splits])
        raise DataError(f"{name} has no {split or 'test'} split with labels; it has {found} (--split)")
    image_key, label_key = _columns(name, splits[key], reading)
    if not _is_labelled(splits[key], label_key):
        raise DataError(f"the split {key!r} of {name} has no labels; choose another (--split)")
    used = {key: splits[key]}
    if _is_plain(splits[key].features[label_key]):
        # they count the classes of all parts, so that a small one names them as training does
        others = {k: s for k, s in splits.items() if part_kind(k) and _is_labelled(s, label_key)}
        used |= {k: s for k, s in others.items() if _is_plain(s.features[label_key])}
    data = _relabel(name, used, image_key, label_key, only=key)[1][key]
    return whole_or_cut(name, key, data, split, whole, reading, test_fraction)


def open_hf_stream(name: str, where: str, reading: Reading, num_train: int | None) -> Splits:
    """A training split that is read while it is trained on, and a test split that is stored.

    Raises:
        DataError: As `open_hf`; or the data set does not say its classes or its size.
    """
    datasets = require("datasets")
    local = _local(where)
    if _saved_to_disk(local):
        raise DataError(f"{local} was written by save_to_disk and is read from there; it needs no streaming")

    def open_() -> tuple:
        builder = datasets.load_dataset_builder(_source(where), reading.hf_config, cache_dir=reading.cache_dir)
        return builder, builder.as_streaming_dataset()

    builder, streams = _tried(where, open_)
    _check_files(name, local, builder)
    train_key = _named(name, streams, reading.train_split, "--train-split") or pick_part(
        streams, "train", name, "--train-split"
    )
    test_key = _named(name, streams, reading.test_split, "--test-split")
    for kind in ("test", "val"):
        left = [k for k in streams if k != train_key]
        test_key = test_key or pick_part(left, kind, name, "--test-split")
    for key, part in ((train_key, "train"), (test_key, "test")):
        if key is None:
            raise DataError(
                f"{name} has no {part} split; it has {some(list(streams))} (--{part}-split). Streaming needs both"
            )
    parts, keys = [], ()
    for key in (train_key, test_key):
        stream = streams[key]
        if stream.features is None:
            raise DataError(f"{name} does not say what its columns hold; it cannot be streamed")
        image_key, label_key = keys = _columns(name, stream, reading)
        if not isinstance(stream.features[label_key], datasets.ClassLabel):
            raise DataError(
                f"the column {label_key!r} of {name} is {stream.features[label_key]}; to be streamed it must name its "
                f"classes (ClassLabel), as they cannot be collected before"
            )
        stream = stream.select_columns([image_key, label_key])
        renamed = {old: new for old, new in ((image_key, "image"), (label_key, "label")) if old != new}
        stream = stream.rename_columns(renamed) if renamed else stream
        if not isinstance(stream.features["image"], datasets.Image):
            stream = stream.cast_column("image", datasets.Image())
        parts.append(stream)
    train, test = parts
    if train.features["label"].names != test.features["label"].names:
        both = [some(part.features["label"].names) for part in parts]
        raise DataError(f"{name}: the splits name different classes: {both[0]} and {both[1]}")
    if num_train is None:
        known = (builder.info.splits or {}).get(train_key)
        num_train = known.num_examples if known is not None else None
        if not num_train:
            raise DataError(f"{name} does not say how many images its split {train_key!r} has (--num-train)")
    key = f"{builder.hash} {builder.config.name} {test_key} {keys}"
    test = _tried(where, lambda: _store(test, key, reading.cache_dir))
    if not _is_labelled(test, "label"):
        raise DataError(f"the split {test_key!r} of {name} has no labels; choose another (--test-split)")
    evaluated = make_eval_part(name, test_key, test, len(test), reading)
    first = _tried(where, lambda: first_rows(train, 32))
    size, grey = look(first)
    unused = [k for k in streams if k not in (train_key, test_key)]
    return Splits(
        name,
        train,
        test,
        tuple(train.features["label"].names),
        size,
        1 if grey else 3,
        description=builder.info.description or "",
        license=builder.info.license or "",
        streamed=num_train,
        background=reading.background,
        notes=(
            *([f"not used: {some(unused)} of {name}"] if unused else []),
            *transparency([first], reading.background, "first training images"),
            *evaluated.notes,
        ),
    )


# ---- opening ----------------------------------------------------------------------------------------------------


def _local(where: str) -> Path:
    return local_path(where).absolute()


def _source(where: str) -> str:
    # absolute: `datasets` takes names such as csv for its own readers
    return str(_local(where)) if os.path.exists(_local(where)) else where


def _saved_to_disk(local: Path) -> bool:
    return any(os.path.isfile(local / name) for name in ("dataset_dict.json", "state.json"))


def _open(where: str, reading: Reading) -> dict[str, Any]:
    """All splits that hold rows, by name."""
    datasets = require("datasets")
    local = _local(where)
    if _saved_to_disk(local):
        loaded = _tried(where, lambda: datasets.load_from_disk(str(local)))
    else:

        def load() -> Any:
            builder = datasets.load_dataset_builder(_source(where), reading.hf_config, cache_dir=reading.cache_dir)
            _check_files(where, local, builder)
            builder.download_and_prepare()
            return builder.as_dataset()

        loaded = _tried(where, load)
    splits = {s: d for s, d in (loaded if isinstance(loaded, dict) else {"train": loaded}).items() if len(d)}
    if not splits:
        raise DataError(f"hf:{where} holds no rows")
    return splits


def _tried(where: str, action: Callable[[], Any]) -> Any:
    """What `action` gives; errors of `datasets` and of the readers below it in one sentence that names the file."""
    datasets = require("datasets")
    try:
        return action()
    except (DataError, MemoryError):
        raise
    except Exception as error:  # the readers raise nearly anything on damaged files
        cause = error
        while type(cause).__module__.startswith("datasets") and cause.__cause__ is not None:
            cause = cause.__cause__  # "An error occurred while generating the dataset"
        if isinstance(cause, datasets.table.CastError):
            columns = " ".join(cause.details().split())
            raise DataError(f"the files of {where!r} must have the same columns, but {columns}") from error
        text = str(cause) if not isinstance(cause, KeyError) else f"{cause} is missing"
        lines = [line.strip() for line in text.split("\n") if line.strip()] or [type(cause).__name__]
        text = " ".join(lines[: 2 if "Config name is missing" in text else 1])  # the second line has the names
        if "Config" in text:
            raise DataError(f"datasets cannot open {where!r}: {text} (--hf-config)") from error
        if damaged := _damaged_file(_local(where)):
            raise DataError(f"{damaged[0]} cannot be read: {damaged[1]}") from error
        raise DataError(f"datasets cannot open {where!r}: {text}") from error


def _damaged_file(folder: Path) -> tuple[Path, str] | None:
    """The first table below a local folder that cannot be read, and why; None, also when looking takes too long."""
    import pandas
    import pyarrow as pa
    import pyarrow.parquet

    def read_arrow(path: Path) -> None:
        with pa.memory_map(str(path)) as source:
            try:
                pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                pa.ipc.open_file(source).read_all()

    def read_json(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        try:
            json.loads(text)
        except ValueError:
            for line in text.splitlines():
                if line.strip():
                    json.loads(line)

    readers = {
        ".parquet": lambda path: pyarrow.parquet.ParquetFile(path).read(),
        ".arrow": read_arrow,
        ".csv": lambda path: pandas.read_csv(path),
        ".tsv": lambda path: pandas.read_csv(path, sep="\t"),
        ".json": read_json,
        ".jsonl": read_json,
    }
    if not os.path.isdir(folder):
        return None
    begin = time.monotonic()
    for path in sorted(folder.rglob("*"), key=lambda p: natural_key(p.as_posix())):
        if time.monotonic() - begin > _MAX_SECONDS:
            return None
        if path.suffix.lower() in readers and path.is_file():
            try:
                readers[path.suffix.lower()](path)
            except MemoryError:
                raise
            except Exception as error:
                first = str(error).strip().split("\n")[0] or type(error).__name__
                return path, first
    return None


def _check_files(name: str, local: Path, builder) -> None:
    """`datasets` takes files of unusually spelled parts (Train/, Test/) for one split; refuse that."""
    for split, files in (getattr(builder.config, "data_files", None) or {}).items():
        kinds = {}
        for file in map(str, files):
            path = Path(file)
            if local not in path.parents:
                continue
            relative = path.relative_to(local)
            stem = [] if path.suffix.lower() in IMAGE_EXTENSIONS else re.findall("^[A-Za-z]+", path.stem)
            for part in (*relative.parts[:-1][:2], *stem):
                if kind := part_kind(part):
                    kinds.setdefault(kind, part)
                    break
        if len(kinds) > 1:
            raise DataError(
                f"datasets reads {some(sorted(kinds.values()))} of {name} as one split, {str(split)!r}; rename them to "
                f"{' and '.join('validation' if k == 'val' else k for k in sorted(kinds))}, or open class folders by "
                f"imagefolder:{local}"
            )


def _store(stream, key: str, cache_dir: str | None):
    """A stream as a `Dataset`, undecoded images as they are; kept in the cache under a name made of `key`."""
    datasets = require("datasets")
    raw = stream.cast_column("image", datasets.Image(decode=False))
    fingerprint = datasets.fingerprint.Hasher.hash(key)
    stored = datasets.Dataset.from_generator(
        lambda: iter(raw), features=raw.features, cache_dir=cache_dir, fingerprint=fingerprint
    )
    return stored.cast_column("image", datasets.Image())


# ---- splits and columns -----------------------------------------------------------------------------------------


def _named(name: str, splits: Mapping[str, Any], asked: str | None, flag: str) -> str | None:
    if asked is None or asked in splits:
        return asked
    near = [s for s in splits if s.lower() == asked.lower()]
    if flag == "--split":
        near = near or [s for s in splits if part_kind(s) and part_kind(s) == part_kind(asked)]
    if len(near) == 1:
        return near[0]
    raise DataError(f"{name} has no split {asked!r}; it has {some(list(splits))} ({flag})")


def _labelled_test(name: str, splits: Mapping, label_key: str, flag: str, without: str | None = None) -> str | None:
    """The test split, or else the validation split; public test splits often hide their labels."""
    for kind in ("test", "val"):
        left = [k for k in splits if k != without and _is_labelled(splits[k], label_key)]
        if found := pick_part(left, kind, name, flag):
            return found
    return None


def _described(splits: Mapping, key: str, label_key: str) -> str:
    return f"{key} ({len(splits[key])} images{'' if _is_labelled(splits[key], label_key) else ' without labels'})"


def _any_columns(name: str, splits: Mapping[str, Any], reading: Reading) -> tuple[str, str]:
    """The columns of the first split that has them."""
    *others, last = splits.values()
    for dataset in others:
        try:
            return _columns(name, dataset, reading)
        except DataError:
            continue
    return _columns(name, last, reading)


def _columns(name: str, dataset, reading: Reading) -> tuple[str, str]:
    """Names of the image and the label column."""
    datasets = require("datasets")
    features, image_key, label_key = dataset.features, reading.image_key, reading.label_key
    for key, flag in ((image_key, "--image-key"), (label_key, "--label-key")):
        if key is not None and key not in features:
            raise DataError(f"{name} has no column {key!r}; it has {some(list(features))} ({flag})")
    if image_key is None:
        images = [k for k, f in features.items() if isinstance(f, datasets.Image)]
        images = images or [k for k, f in features.items() if isinstance(f, dict) and "bytes" in f]
        if len(images) != 1:
            raise DataError(
                f"{name} has {f'{len(images)} image columns' if images else 'no image column'} among "
                f"{some(images or list(features))}; name one by --image-key"
            )
        image_key = images[0]
    elif not _holds_images(features[image_key]):
        raise DataError(f"the column {image_key!r} of {name} is {features[image_key]}, not an image (--image-key)")
    if label_key is None:
        labels = [k for k, f in features.items() if isinstance(f, datasets.ClassLabel)]
        labels = [k for k in ("label", "labels") if k in labels] or labels
        labels = labels or [k for k in ("label", "labels", "class", "target") if k in features]
        if len(labels) != 1:
            found = [
                f"{k} ({features[k].num_classes} classes)" if isinstance(features[k], datasets.ClassLabel) else k
                for k in labels or features
            ]
            raise DataError(f"{name}: which column is the label, {some(found)}? Name it by --label-key")
        label_key = labels[0]
    kind = features[label_key]
    if not (isinstance(kind, datasets.ClassLabel) or _is_plain(kind)):
        raise DataError(
            f"the column {label_key!r} of {name} is {kind}; a class label, text or integer is needed (--label-key)"
        )
    return image_key, label_key


def _holds_images(feature) -> bool:
    """Whether a column holds images, or what pandas and pyarrow write for them: encoded bytes, with a path or not."""
    datasets = require("datasets")
    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
        return True
    return isinstance(feature, datasets.Value) and "binary" in feature.dtype


def _is_plain(feature) -> bool:
    kinds = ("string", "int", "bool", "float")  # also large_string, uint8, …; floats as pandas has integers with gaps
    return isinstance(feature, require("datasets").Value) and any(kind in feature.dtype for kind in kinds)


def _is_labelled(dataset, label_key: str) -> bool:
    """Public test splits often hide their labels behind -1 or None."""
    feature = dataset.features.get(label_key)
    if not (isinstance(feature, require("datasets").ClassLabel) or _is_plain(feature)):
        return False
    missing = ("", -1, None)
    return all(v not in missing and not (isinstance(v, float) and math.isnan(v)) for v in set(dataset[label_key][:]))


def _relabel(
    name: str, parts: Mapping[str, Any], image_key: str, label_key: str, only: str | None = None
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Names that occur in each part, and the parts with the columns `image` and `label` only.

    Plain texts and numbers become classes, in natural order, as folders have it.
    """
    datasets = require("datasets")
    feature = next(iter(parts.values())).features[label_key]
    values = {k: part[label_key][:] for k, part in parts.items()}
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
        for part in parts.values():
            other = part.features[label_key]
            if not isinstance(other, datasets.ClassLabel) or other.names != names:
                shown = some(other.names) if isinstance(other, datasets.ClassLabel) else str(other)
                raise DataError(f"{name}: the splits name different classes: {some(names)} and {shown}")
        occur = {k: names for k in parts}
    else:
        values = {k: [_class_name(name, label_key, v) for v in part] for k, part in values.items()}
        occur = {k: sorted(set(part), key=natural_key) for k, part in values.items()}
        names = sorted(set().union(*occur.values()), key=natural_key)
        number = {v: k for k, v in enumerate(names)}
        values = {k: [number[v] for v in part] for k, part in values.items()}
    out = {}
    for key, part in parts.items():
        if only not in (None, key):
            continue
        part = part.select_columns([image_key])
        if image_key != "image":
            part = part.rename_column(image_key, "image")
        if not isinstance(part.features["image"], datasets.Image):
            part = part.cast_column("image", datasets.Image())
        labels = np.asarray(values[key], dtype=np.int64)
        out[key] = part.add_column("label", labels, feature=datasets.ClassLabel(names=list(names)))
    return occur, out


def _class_name(name: str, label_key: str, value: Any) -> str:
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(f"the column {label_key!r} of {name} holds {value}, not a class (--label-key)")
        value = int(value)
    return str(value)
