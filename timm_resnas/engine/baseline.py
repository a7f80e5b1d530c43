"""What every result is set beside: a simple classifier on the same images, in seconds.

A forest of scikit-learn's extremely randomised trees, which are as good as those of a random forest here and many times
faster. It is trained on the training part and scored once on the test part. No option moves it: the same data gives
the same answers.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data import Splits, eval_batches, eval_transform
from ..data.images import first_rows, require

__all__ = ["describe", "score_baseline", "verdict"]

NAME = "random forest (extra-trees) on 16x16 pixels and colours"
SEED = 0
TRAIN_IMAGES, TEST_IMAGES = 5_000, 10_000  # more are not read
TREES = 100
SIDE = 16
COLOURS = 64  # of the histogram: 4 levels of each channel, or 64 of grey
LANES = 16  # places that a stream is read at


def score_baseline(splits: Splits, config: dict[str, Any], workers: int = 0) -> dict[str, Any]:
    """Train on the training part, images that a run validates on included, and score on the test part.

    Args:
        splits: The data; at most `TRAIN_IMAGES` and `TEST_IMAGES` of it are read.
        config: The run's data_config: the forest sees what the model sees.
        workers: Processes that decode images.

    Returns:
        'name', 'test' (correct answers), 'images' (tested), 'train_images', 'seconds'.
    """
    trees = require("sklearn.tree")
    begin = time.perf_counter()
    x, y = features(sample(splits.train, TRAIN_IMAGES), config, workers)
    test, labels = features(sample(splits.test, TEST_IMAGES), config, workers)
    classes, y = np.unique(y, return_inverse=True)
    # a tree's leaves hold a number for each class: one tree at a time, and fewer of them where there are many classes
    votes = sum(
        trees.ExtraTreeClassifier(random_state=SEED + k).fit(x, y).predict_proba(test)
        for k in range(min(TREES, max(10, 10_000 // len(classes))))
    )
    return {
        "name": NAME,
        "test": int((classes[votes.argmax(axis=1)] == labels).sum()),
        "images": len(labels),
        "train_images": len(y),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def sample(dataset: Any, limit: int) -> Any:
    """A data set of at most ``limit`` images, always the same ones; of a stream, the first ones at several places."""
    if not hasattr(dataset, "__len__"):
        lanes = min(LANES, dataset.num_shards)
        parts = [first_rows(dataset.shard(lanes, lane), limit // lanes) for lane in range(lanes)]
        return require("datasets").concatenate_datasets(parts)
    if len(dataset) <= limit:
        return dataset
    # RandomState: a stream that NumPy promises never to change
    return dataset.select(np.sort(np.random.RandomState(SEED).permutation(len(dataset))[:limit]))


def features(dataset: Any, config: dict[str, Any], workers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Float32 [N, C * SIDE^2 + COLOURS], values 0 to 1, and labels int64 [N], of the images that can be read.

    Those of an image are the means over a grid of `SIDE` x `SIDE` cells and the shares of each colour.
    """
    channels = config["input_size"][0]
    transform = eval_transform({**config, "mean": [0.0] * channels, "std": [1.0] * channels})
    levels = round(COLOURS ** (1 / channels))
    rows, labels = [], []
    batches = eval_batches(dataset, transform, 64, memory_limit=0, num_workers=workers, max_corrupt=1.0)
    for x, y in batches:  # [B, C, H, W], values 0 to 1
        cells = F.adaptive_avg_pool2d(x, SIDE).flatten(1)
        colours = torch.zeros(x.shape[0], x.shape[2] * x.shape[3], dtype=torch.int64)
        for channel in x.unbind(1):
            colours = colours * levels + (channel * levels).long().clamp(max=levels - 1).flatten(1)
        shares = torch.zeros(len(x), COLOURS).scatter_add_(1, colours, torch.ones(colours.shape))
        rows.append(torch.cat([cells, shares / colours.shape[1]], dim=1))
        labels.append(y)
    return torch.cat(rows).numpy(), torch.cat(labels).numpy()


def describe(baseline: dict[str, Any]) -> str:
    """One sentence on what the baseline is."""
    return (
        f"Baseline: a {baseline['name']}, trained on {baseline['train_images']} training images (validation images "
        f"are among them) and scored on {baseline['images']} test images, in {baseline['seconds']:.1f} s."
    )


def verdict(accuracy: float, baseline: dict[str, Any], pretrained: bool = False) -> str | None:
    """What is to be said where a network's test accuracy is not above the baseline's, and what would help.

    Args:
        accuracy: The network's, 0 to 1.
        baseline: What `score_baseline` returned.
        pretrained: Whether the network started from weights already.
    """
    simple = baseline["test"] / baseline["images"]
    if accuracy > simple:
        return None
    start = "" if pretrained else "a pretrained timm model to start from (--model NAME; train.py: --pretrained), "
    return (
        f"The network does not beat a simple classifier: it answers {accuracy:.4f} of the test images right, the "
        f"random forest {simple:.4f}. Coarse shapes and colours tell these classes apart at least as well as what it "
        f"has learned. What would help: {start}more images, more --epochs."
    )
