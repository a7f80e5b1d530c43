"""Data sets by name or path, their splits, transforms and loaders.

Needs the extra `recipes` (`datasets`; scikit-learn for the embedded digits) once a data set is opened.
"""

from .images import DataError, Images
from .loaders import EvalBatches, TrainLoader, eval_batches, train_loader
from .mix import MixedBatch, TokenMix
from .multiscale import MultiScaleLoader, multiscale_loader
from .names import match_classes, natural_key
from .parts import EvalPart, Splits
from .sources import load_eval, load_splits
from .splits import (
    check_leak,
    content_hashes,
    find_leaks,
    read_split,
    repeated,
    split_record,
    split_search_val,
    trained_on,
    training_record,
)
from .stream import stream_loader
from .transforms import (
    ImageTransform,
    ShiftTransform,
    adapt_channels,
    channel_stats,
    default_augment,
    default_data_config,
    eval_transform,
    train_transform,
)

__all__ = [
    "DataError",
    "EvalBatches",
    "EvalPart",
    "ImageTransform",
    "Images",
    "MixedBatch",
    "MultiScaleLoader",
    "ShiftTransform",
    "Splits",
    "TokenMix",
    "TrainLoader",
    "adapt_channels",
    "channel_stats",
    "check_leak",
    "content_hashes",
    "default_augment",
    "default_data_config",
    "eval_batches",
    "eval_transform",
    "find_leaks",
    "load_eval",
    "load_splits",
    "match_classes",
    "multiscale_loader",
    "natural_key",
    "read_split",
    "repeated",
    "split_record",
    "split_search_val",
    "stream_loader",
    "train_loader",
    "train_transform",
    "trained_on",
    "training_record",
]
