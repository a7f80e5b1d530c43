"""Cutting the search's validation set from the training set, and checking that no image leaks."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .images import DataError, Images, require
from .names import some

__all__ = [
    "check_leak",
    "content_hashes",
    "find_leaks",
    "read_split",
    "repeated",
    "split_record",
    "split_search_val",
    "trained_on",
    "training_record",
]

_logger = logging.getLogger(__name__)


def take_per_class(labels: np.ndarray, counts: dict[int, int], seed: int, allowed=True) -> list[int]:
    """Draws `counts[c]` indices of each class c, sorted; a class's draw does not depend on the other classes."""
    taken = []
    for c, count in counts.items():
        members = np.flatnonzero((labels == c) & allowed)
        # RandomState: NumPy promises that its stream never changes, so a split stays what it was
        taken.extend(np.random.RandomState([seed, c]).permutation(members)[:count].tolist())
    return sorted(taken)


def stratified_counts(labels: np.ndarray, total: int) -> dict[int, int]:
    """Shares `total` among the classes in proportion (largest remainders), at least one each, never all of one."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (total / sizes.sum())
    counts = np.clip(np.floor(exact).astype(int), 1, sizes - 1)
    for k in np.argsort(counts - exact, kind="stable")[: max(0, total - counts.sum())]:
        counts[k] = min(counts[k] + 1, sizes[k] - 1)
    return dict(zip(classes.tolist(), counts.tolist(), strict=True))


def split_search_val(
    dataset, *, per_class: int = 25, fraction: float = 0.2, seed: int = 0, avoid: Sequence[bool] | None = None
) -> tuple[list[int], list[int]]:
    """Cuts the search's own validation set from the training set, class by class.

    The ViT-ResNAS paper takes 25 images of each class of ImageNet. A class of fewer than 5 x `per_class` images
    gives `fraction` of its images instead, at least one.

    Args:
        dataset: The training part; only its column `label` is read.
        per_class: Images of each class.
        fraction: Share of a small class, between 0 and 1.
        seed: A different seed cuts differently; the same seed always cuts the same.
        avoid: One flag per image: flagged ones never go to validation (see `repeated`).

    Returns:
        Indices to train on and indices to validate on: sorted, disjoint, together all of `dataset`.

    Raises:
        DataError: When a class has too few images to be on both sides.
    """
    if per_class < 1 or not 0 < fraction < 1:
        raise DataError(f"per_class must be at least 1 and fraction between 0 and 1, got {per_class} and {fraction}")
    labels = np.asarray(dataset["label"][:], dtype=np.int64)
    allowed = ~np.asarray(avoid, dtype=bool) if avoid is not None else np.ones(len(labels), dtype=bool)
    classes, sizes = np.unique(labels, return_counts=True)
    counts = {}
    for c, size in zip(classes.tolist(), sizes.tolist(), strict=True):
        count = per_class if size >= 5 * per_class else max(1, round(fraction * size))
        if size < 2 or count > (labels[allowed] == c).sum() or count >= size:
            names = getattr(dataset.features.get("label"), "names", None)
            raise DataError(
                f"class {names[c] if names else c!r} has {size} training image{'s' * (size != 1)} "
                f"({int((labels[allowed] == c).sum())} of them usable for validation), too few to give {count} "
                "to the search's validation set and keep some for training; add images or leave the class out"
            )
        counts[c] = count
    val = take_per_class(labels, counts, seed, allowed)
    is_val = np.zeros(len(labels), dtype=bool)
    is_val[val] = True
    return np.flatnonzero(~is_val).tolist(), val


def content_hashes(dataset, indices: Sequence[int] | None = None, *, of: str = "pixels") -> list[str]:
    """Hashes of the images' content, one hex string of 32 digits each.

    `of='pixels'` hashes the decoded, upright RGB pixels and the size: the same picture is found again when it was
    renamed, saved in another lossless format or stripped of metadata. `of='bytes'` hashes the encoded file: many
    times faster on photographs (nothing is decoded), but only finds identical files. Neither sees that two
    different JPEG compressions show the same picture. Transparent pixels count as white, whatever is stored under
    them. A damaged file is hashed by its bytes; where there are none (a missing file, a row without an image), the
    hash is an empty string, which is never taken for another's.

    Raises:
        DataError: When `of` is something else.
    """
    if of not in ("pixels", "bytes"):
        raise DataError(f"of must be 'pixels' or 'bytes', got {of!r}")
    if indices is not None:
        dataset = dataset.select(list(indices))
    images = Images(dataset, cache_limit=0, max_corrupt=1.0) if of == "pixels" else None
    raw = dataset.select_columns(["image"]).cast_column("image", require("datasets").Image(decode=False))
    hashes = []
    for start in range(0, len(dataset), 256):
        chunk = list(range(start, min(start + 256, len(dataset))))
        pictures = images.pil(chunk) if images else [None] * len(chunk)
        for k, picture in zip(chunk, pictures, strict=True):
            digest = hashlib.blake2b(digest_size=16)
            if picture is None:  # encoded bytes asked for, or unreadable: then the file's bytes stand for it
                if (content := _file_content(raw[k]["image"])) is None:
                    hashes.append("")
                    continue
                digest.update(content)
            else:
                digest.update(repr(picture.size).encode())
                digest.update(picture.tobytes())
            hashes.append(digest.hexdigest())
    return hashes


def _file_content(item: dict | None) -> bytes | None:
    if item is None or item["bytes"] is not None:
        return item and item["bytes"]
    try:
        with open(item["path"], "rb") as file:
            return file.read()
    except (OSError, TypeError, ValueError):  # a broken link, no permission, no path
        return None


def repeated(hashes: Sequence[str], *others: Sequence[str]) -> list[bool]:
    """Flags the images whose hash occurs more than once in `hashes`, or in one of `others` (the test set's).

    Public data sets hold such images; kept out of validation (`split_search_val(avoid=…)`) they leak nothing. Images
    without content (see `content_hashes`) are flagged as well.
    """
    counts = Counter(hashes)
    elsewhere = {""}.union(*others)
    return [counts[h] > 1 or h in elsewhere for h in hashes]


def find_leaks(
    dataset, train_indices: Sequence[int], val_indices: Sequence[int], test=None, *, of: str = "pixels"
) -> dict[str, list]:
    """Looks for images that are where they must not be, by index and by content.

    Args:
        dataset: The training part that both index lists refer to.
        train_indices: What training uses.
        val_indices: What candidates are scored on.
        test: The test part.
        of: See `content_hashes`.

    Returns:
        Empty lists where all is well. `index`: indices in both lists. `train_val`, `val_test` and `train_test`:
        pairs of indices of the same picture (pairs of one and the same index are under `index` only).
    """
    both = sorted(set(train_indices) & set(val_indices))
    val_only = sorted(set(val_indices).difference(both))
    train = dict(zip(train_indices, content_hashes(dataset, train_indices, of=of), strict=True))
    val = dict(zip(val_only, content_hashes(dataset, val_only, of=of), strict=True))
    val.update({i: train[i] for i in both})
    tested = dict(enumerate(content_hashes(test, of=of))) if test is not None else {}

    def pairs(a: dict, b: dict, same_data: bool = False) -> list[tuple[int, int]]:
        first = {h: i for i, h in reversed(b.items())}
        return [(int(i), int(first[h])) for i, h in a.items() if h and h in first and not (same_data and i in b)]

    return {
        "index": [int(i) for i in both],
        "train_val": [(t, v) for v, t in pairs(val, train, same_data=True)],
        "val_test": pairs(val, tested),
        "train_test": pairs(train, tested),
    }


def check_leak(
    dataset, train_indices: Sequence[int], val_indices: Sequence[int], test=None, *, of: str = "pixels"
) -> dict[str, list]:
    """Refuses to continue when the search would be scored on images of the training or of the test data.

    Pictures that only the training and test parts share (a flaw of the data set, not of the search) are logged.
    Arguments and result as for `find_leaks`.

    Raises:
        DataError: When a validation image is trained on or is in the test part.
    """
    leaks = find_leaks(dataset, train_indices, val_indices, test, of=of)

    wrong = []
    if leaks["index"]:
        wrong.append(f"{len(leaks['index'])} are also trained on (indices {some(leaks['index'], 5)})")
    if leaks["train_val"]:
        wrong.append(
            f"{len(leaks['train_val'])} show a picture that is trained on (train, val: {some(leaks['train_val'], 5)})"
        )
    if leaks["val_test"]:
        wrong.append(
            f"{len(leaks['val_test'])} show a picture of the test part (val, test: {some(leaks['val_test'], 5)})"
        )
    if wrong:
        raise DataError(
            f"of {len(val_indices)} validation images " + "; ".join(wrong) + ". A search scored on them finds what was "
            "memorised: cut the validation set with split_search_val(avoid=repeated(…)), or allow the leak explicitly"
        )
    if leaks["train_test"]:
        shown, known = len(leaks["train_test"]), len({t for _, t in leaks["train_test"]})
        points = f"{100 * known / len(test):.{0 if known >= 0.1 * len(test) else 1}f}"
        _logger.warning(
            "%d training image%s show%s a picture of the test part. They stay in training, so at least %d of the %d "
            "test images can be answered from memory and the test score may be %s percentage points too high. Remove "
            "them from the data for a score without them (train, test: %s)",
            *(shown, "s" * (shown > 1), "s" * (shown == 1), known, len(test), points),
            some(leaks["train_test"], 5),
        )
    return leaks


def split_record(dataset, train_indices: Sequence[int], val_indices: Sequence[int]) -> dict[str, Any]:
    """What a run keeps of how its training part was cut, JSON-plain; `read_split` checks and takes it back."""
    train, val = ([int(i) for i in part] for part in (train_indices, val_indices))
    return {"data": _data_digest(dataset), "train": train, "val": val, "digest": _index_digest(train, val)}


def read_split(record: Any, dataset, where: str = "data.json") -> tuple[list[int], list[int]]:
    """The indices to train on and to validate on from a `split_record` that was read from a file.

    Args:
        record: What the file holds.
        dataset: The training part that it must fit.
        where: The file's name, for messages.

    Raises:
        DataError: The record is damaged, or was made for other data.
    """
    try:
        train, val, digest, data = (record[k] for k in ("train", "val", "digest", "data"))
        good = all(type(i) is int for i in (*train, *val)) and digest == _index_digest(train, val)
    except (KeyError, TypeError, IndexError):
        good = False
    if not good:
        raise DataError(f"{where} is damaged; remove the run's folder and start the run again")
    if data != _data_digest(dataset) or sorted(train + val) != list(range(len(dataset))):
        raise DataError(
            f"{where} was written for other data than the {len(dataset)} training images of now: other images, classes "
            f"or order. Give this run another --name, or bring the data back"
        )
    return train, val


def training_record(dataset, val_indices: Sequence[int], hashes: Sequence[str] | None = None) -> dict[str, Any]:
    """What later users of a model need to tell which images it was trained on, JSON-plain.

    Args:
        dataset: The training part that was cut.
        val_indices: Its images that were not trained on.
        hashes: `content_hashes` of all of its images, where they were computed.
    """
    val = set(val_indices)
    kept = None if hashes is None else sorted({h[:16] for i, h in enumerate(hashes) if h and i not in val})
    return {"labels": _digest(dataset), "val": sorted(val), "hashes": kept}


def trained_on(
    record: Mapping[str, Any], dataset, hashes: Sequence[str] | None = None, where: str = "training_data.json"
) -> list[bool]:
    """Flags the images of a data set that a model with this `training_record` was trained on.

    By index where the labels are those of the data that the record was made of, and by content where both sides have
    hashes.

    Args:
        record: What a file of the model holds.
        dataset: The images asked about.
        hashes: Their `content_hashes`, where these were computed.
        where: The record's file, for messages.

    Raises:
        DataError: The record is damaged.
    """
    fields = dict(record) if isinstance(record, Mapping) else {}
    labels, val, known = (fields.get(k, ...) for k in ("labels", "val", "hashes"))
    plain = isinstance(labels, str) and isinstance(val, list) and all(type(i) is int and i >= 0 for i in val)
    if not plain or not (known is None or isinstance(known, list) and all(isinstance(h, str) for h in known)):
        raise DataError(f"{where}, the record of what the model was trained on, is damaged")
    val, known = set(val), set(known or ())
    same = labels == _digest(dataset)
    if same and val and max(val) >= len(dataset):
        raise DataError(f"{where} names image {max(val)} of a data set of {len(dataset)}; it is damaged")
    flags = [same and i not in val for i in range(len(dataset))]
    return [f or h[:16] in known for f, h in zip(flags, hashes, strict=True)] if hashes is not None else flags


def _digest(dataset) -> str:
    labels = np.asarray(dataset["label"][:], dtype=np.int64)
    return hashlib.blake2b(labels.tobytes(), digest_size=16).hexdigest()


def _data_digest(dataset) -> str:
    names = json.dumps(dataset.features["label"].names)
    return hashlib.blake2b((_digest(dataset) + names).encode(), digest_size=16).hexdigest()


def _index_digest(train: list[int], val: list[int]) -> str:
    return hashlib.blake2b(json.dumps([train, val]).encode(), digest_size=16).hexdigest()
