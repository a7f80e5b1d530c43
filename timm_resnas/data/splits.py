"""Cutting the search's validation set from the training set, and checking that no image leaks."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .images import DataError, Images, require

__all__ = [
    "check_leak",
    "content_hashes",
    "find_leaks",
    "repeated",
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
    different JPEG compressions show the same picture.

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
                item = raw[k]["image"]
                if item["bytes"] is None:
                    with open(item["path"], "rb") as file:
                        digest.update(file.read())
                else:
                    digest.update(item["bytes"])
            else:
                digest.update(repr(picture.size).encode())
                digest.update(picture.tobytes())
            hashes.append(digest.hexdigest())
    return hashes


def repeated(hashes: Sequence[str], *others: Sequence[str]) -> list[bool]:
    """Flags the images whose hash occurs more than once in `hashes`, or in one of `others` (the test set's).

    Public data sets hold such images; kept out of validation (`split_search_val(avoid=…)`) they leak nothing.
    """
    counts = Counter(hashes)
    elsewhere = set().union(*others)
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
        return [(int(i), int(first[h])) for i, h in a.items() if h in first and not (same_data and i in b)]

    return {
        "index": [int(i) for i in both],
        "train_val": [(t, v) for v, t in pairs(val, train, same_data=True)],
        "val_test": pairs(val, tested),
        "train_test": pairs(train, tested),
    }


def check_leak(
    dataset, train_indices: Sequence[int], val_indices: Sequence[int], test=None, *, of: str = "pixels"
) -> dict[str, list]:
    """Refuses to go on when the search would be scored on images of the training or of the test data.

    Pictures that only the training and test parts share (a flaw of the data set, not of the search) are logged.
    Arguments and result as for `find_leaks`.

    Raises:
        DataError: When a validation image is trained on or is in the test part.
    """
    leaks = find_leaks(dataset, train_indices, val_indices, test, of=of)

    def some(items: list) -> str:
        return ", ".join(map(str, items[:5])) + (", …" if len(items) > 5 else "")

    wrong = []
    if leaks["index"]:
        wrong.append(f"{len(leaks['index'])} are also trained on (indices {some(leaks['index'])})")
    if leaks["train_val"]:
        wrong.append(
            f"{len(leaks['train_val'])} show a picture that is trained on (train, val: {some(leaks['train_val'])})"
        )
    if leaks["val_test"]:
        wrong.append(f"{len(leaks['val_test'])} show a picture of the test part (val, test: {some(leaks['val_test'])})")
    if wrong:
        raise DataError(
            f"of {len(val_indices)} validation images " + "; ".join(wrong) + ". A search scored on them finds what was "
            "memorised: cut the validation set with split_search_val(avoid=repeated(…)), or allow the leak explicitly"
        )
    if leaks["train_test"]:
        _logger.warning("%d training images show a picture of the test part", len(leaks["train_test"]))
    return leaks


def training_record(dataset, val_indices: Sequence[int], hashes: Sequence[str] | None = None) -> dict[str, Any]:
    """What later users of a model need to tell which images it was trained on, JSON-plain.

    Args:
        dataset: The training part that was cut.
        val_indices: Its images that were not trained on.
        hashes: `content_hashes` of all of its images, where they were computed.
    """
    val = set(val_indices)
    kept = None if hashes is None else sorted({h[:16] for i, h in enumerate(hashes) if i not in val})
    return {"labels": _digest(dataset), "val": sorted(val), "hashes": kept}


def trained_on(record: Mapping[str, Any], dataset, hashes: Sequence[str] | None = None) -> list[bool]:
    """Flags the images of a data set that a model with this `training_record` was trained on.

    By index where the labels are those of the data that the record was made of, and by content where both sides have
    hashes.

    Raises:
        DataError: The record is damaged.
    """
    try:
        labels, val, known = record["labels"], {int(i) for i in record["val"]}, record["hashes"]
        known = set() if known is None else {str(h) for h in known}
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"the record of what was trained on is damaged: {type(e).__name__} {e}") from None
    same = labels == _digest(dataset)
    flags = [same and i not in val for i in range(len(dataset))]
    return [f or h[:16] in known for f, h in zip(flags, hashes, strict=True)] if hashes is not None else flags


def _digest(dataset) -> str:
    labels = np.asarray(dataset["label"][:], dtype=np.int64)
    return hashlib.blake2b(labels.tobytes(), digest_size=16).hexdigest()
