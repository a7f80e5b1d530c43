"""Data of a run: its parts, and augmentation as the options say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..data import (
    Splits,
    check_leak,
    content_hashes,
    default_augment,
    load_splits,
    read_split,
    repeated,
    split_record,
    split_search_val,
    trained_on,
)
from .run import Run, RunError
from .settings import AugmentOptions, DataOptions

__all__ = [
    "HASHED_IMAGES",
    "augmentation",
    "cached_parts",
    "cut_validation",
    "image_pair",
    "open_splits",
    "without_background",
]


HASHED_IMAGES = 100_000  # larger data sets are not compared picture by picture


def augmentation(options: AugmentOptions, splits: Splits, size: tuple[int, int]) -> dict[str, Any]:
    """Arguments of `train_transform`: what suits the data, and what the options say.

    The default shifts of digits and Fashion-MNIST give way to a random crop that is asked for.
    """
    names = dict(aa="auto_augment", reprob="re_prob", remode="re_mode")
    ours = ("scale", "ratio", "shift", "hflip", "vflip", "color_jitter", "aa", "reprob", "remode")
    given = {names.get(k, k): getattr(options, k) for k in ours if getattr(options, k) is not None}
    default = default_augment(splits, size)
    if given.get("shift") == 0 or ("shift" not in given and {"scale", "ratio", "auto_augment"} & given.keys()):
        given.pop("shift", None)
        default.pop("shift", None)
    if "shift" in given:
        default.pop("scale", None)
    return {**default, **given}


def image_pair(size: list[int] | None) -> tuple[int, int] | None:
    """(height, width) from what --img-size was given.

    Raises:
        RunError: More than two numbers, or none above 0.
    """
    if size is None:
        return None
    if len(size) > 2 or min(size) < 1:
        raise RunError(f"--img-size takes one side, or height and width; got {' '.join(map(str, size))}")
    return (size[0], size[-1])


def cut_validation(
    splits: Splits, per_class: int, fraction: float, seed: int, record: dict[str, Any] | None = None
) -> tuple[list[int], list[int]]:
    """Indices of the training part to train on and to validate on.

    Pictures that are in the data twice are not validated on, nor are those that the weights were trained on before.

    Args:
        splits: The data.
        per_class: See `split_search_val`; 0 keeps all images for training.
        fraction: See `split_search_val`.
        seed: Decides the cut.
        record: `training_record` of the weights that training starts from.
    """
    if not per_class:
        return list(range(len(splits.train))), []
    # reading every image of a large set takes hours; its pictures are compared where that is asked for
    small = len(splits.train) + len(splits.test) <= HASHED_IMAGES
    hashes = content_hashes(splits.train) if small else None
    avoid = repeated(hashes, content_hashes(splits.test)) if small else [False] * len(splits.train)
    if record is not None:
        avoid = [a or b for a, b in zip(avoid, trained_on(record, splits.train, hashes), strict=True)]
    train, val = split_search_val(splits.train, per_class=per_class, fraction=fraction, seed=seed, avoid=avoid)
    if small:
        check_leak(splits.train, train, val, splits.test)
    return train, val


def open_splits(options: DataOptions, **given: Any) -> Splits:
    """The training and test parts that the options name.

    Raises:
        ValueError: They cannot be opened; the message says what would be right.
    """
    names = ("label_key", "image_key", "train_split", "test_split", "hf_config", "background")
    asked = {k: getattr(options, k) for k in names if getattr(options, k) is not None}
    return load_splits(options.dataset, **asked, **given)


def cached_parts(run: Run, splits: Splits, cut: Callable[[], tuple]) -> tuple[list[int], list[int], list[Any]]:
    """Indices to train on and to validate on, cut once in a run's life, and whatever else ``cut`` returns with them.

    Raises:
        ValueError: What the run keeps is damaged, or is of other data.
    """

    def make() -> dict[str, Any]:
        train, val, *more = cut()
        return {**split_record(splits.train, train, val), "more": more}

    kept = run.cached("data.json", make)
    train, val = read_split(kept, splits.train, where=str(run.state / "data.json"))
    return train, val, kept["more"]


def without_background(config: dict[str, Any]) -> dict[str, Any]:
    """Preprocessing as timm's pretrained_cfg holds it, which has no field for the colour behind transparent pixels."""
    return {k: v for k, v in config.items() if k != "background"}
