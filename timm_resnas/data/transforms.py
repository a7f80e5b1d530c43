"""Transforms: timm's factories with every random draw left to the loader's seeding, and a batched random shift."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import posterize
from timm.data.random_erasing import RandomErasing

from .images import WHITE, DataError, Images, first_rows, parse_background

__all__ = [
    "ImageTransform",
    "ShiftTransform",
    "adapt_channels",
    "channel_stats",
    "default_augment",
    "default_data_config",
    "eval_transform",
    "train_transform",
]


_GREY = (0.299, 0.587, 0.114)


class ImageTransform:
    """A PIL image in `mode` -> uint8 [C, H, W]; `normalize` finishes a whole batch.

    Normalising a batch instead of each image gives the same numbers as timm's `ToTensor` and `Normalize`, faster,
    and lets images travel and be cached as bytes.

    Args:
        data_config: As `timm.data.resolve_data_config` returns it: input_size (C, H, W), interpolation, mean, std,
            crop_pct, crop_mode; and `background`, the colour behind transparent pixels (default white), which the
            loaders paint before this transform.
        transform: PIL -> uint8 tensor.
        erasing: Applied to each normalised image [C, H, W], in place.
    """

    def __init__(self, data_config: dict, transform, erasing=None):
        self.data_config = data_config
        self.input_size = tuple(data_config["input_size"])
        self.background = parse_background(data_config.get("background", WHITE))
        self.mode = {1: "L", 3: "RGB"}.get(self.input_size[0], "")
        if not self.mode:
            raise DataError(f"models with {self.input_size[0]} input channels have no image data; use 3, or 1 for grey")
        if not len(data_config["mean"]) == len(data_config["std"]) == self.input_size[0]:
            raise DataError(
                f"mean and std need {self.input_size[0]} numbers each, got {data_config['mean']}, {data_config['std']} "
                "(--mean, --std)"
            )
        self.transform = transform
        self.erasing = erasing

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transform(image)

    def normalize(self, batch: torch.Tensor) -> torch.Tensor:
        """uint8 [B, C, H, W] -> float32, in the way and order of timm's per-image transforms."""
        mean, std = (
            torch.tensor(self.data_config[k], dtype=torch.float32, device=batch.device)[:, None, None]
            for k in ("mean", "std")
        )
        return batch.to(torch.float32).div_(255).sub_(mean).div_(std)


class ShiftTransform(ImageTransform):
    """The evaluation transform followed by random shifts and flips, drawn and done for whole batches at once.

    The fixed part's result can be kept, so an epoch of small images costs microseconds per image.
    """

    def __init__(self, data_config: dict, *, shift: int, hflip: float, vflip: float, pad_mode: str, erasing=None):
        super().__init__(data_config, _factory(data_config), erasing)
        if pad_mode not in ("constant", "reflect", "edge"):
            raise DataError(f"pad_mode must be 'constant', 'reflect' or 'edge', got {pad_mode!r}")
        if not 0 <= shift < min(self.input_size[1:]):
            raise DataError(f"shift must lie between 0 and the image's side {self.input_size[1:]}, got {shift}")
        self.shift, self.hflip, self.vflip, self.pad_mode = int(shift), hflip, vflip, pad_mode

    @property
    def padded_size(self) -> tuple[int, int, int]:
        """(C, H, W) of what `prepare` gives."""
        c, h, w = self.input_size
        return c, h + 2 * self.shift, w + 2 * self.shift

    def prepare(self, images: Sequence[Image.Image]) -> np.ndarray:
        """The part that is the same in every epoch: B PIL images -> uint8 [B, *padded_size]."""
        none, margin = (0, 0), (self.shift, self.shift)
        return np.pad(np.stack([self(i).numpy() for i in images]), (none, none, margin, margin), mode=self.pad_mode)

    def batch(self, padded: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Shifts and flips by draws, [B, 4] of the uniform distribution on [0, 1): uint8 [B, C, H, W]."""
        top, left = (draws[:, :2] * (2 * self.shift + 1)).astype(np.intp).T
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.input_size[1:], axis=(2, 3))
        images = windows[np.arange(len(padded)), :, top, left]
        for k, axis, p in ((2, 3, self.hflip), (3, 2, self.vflip)):
            if p > 0:
                flip = (draws[:, k] < p)[:, None, None, None]
                images = np.where(flip, np.flip(images, axis), images)
        return np.ascontiguousarray(images)


def eval_transform(data_config: dict) -> ImageTransform:
    """timm's evaluation transform for `data_config` (see `ImageTransform`)."""
    return ImageTransform(data_config, _factory(data_config))


def train_transform(
    data_config: dict,
    *,
    scale: tuple[float, float] | None = None,
    ratio: tuple[float, float] | None = None,
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float | Sequence[float] | None = 0.4,
    auto_augment: str | None = None,
    re_prob: float = 0.0,
    re_mode: str = "pixel",
    re_count: int = 1,
    shift: int | None = None,
    pad_mode: str = "constant",
    no_aug: bool = False,
    **kwargs,
) -> ImageTransform:
    """timm's training transform for `data_config`, or random shifts.

    Args:
        data_config: See `ImageTransform`.
        scale: Area of the random resized crop; timm's default is (0.08, 1).
        ratio: Its aspect ratio; timm's default is (3/4, 4/3).
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength; off with `auto_augment`, as in timm.
        auto_augment: timm's string, such as 'rand-m9-mstd0.5-inc1'.
        re_prob: Probability of random erasing, after normalising.
        re_mode: 'const', 'rand' or 'pixel'.
        re_count: Largest number of erased boxes.
        shift: Largest shift each way in pixels of the model's input, instead of the random resized crop. For
            data whose objects fill the picture at one scale, such as digits. Colours stay as they are: of the
            others, only flips and random erasing apply.
        pad_mode: What a shift uncovers: 'constant' (black), 'reflect' or 'edge'.
        no_aug: Only resize and crop to the centre.
        **kwargs: Passed to `timm.data.create_transform`: train_crop_mode, color_jitter_prob, grayscale_prob, …

    Raises:
        DataError: When options contradict each other.
    """
    erasing = None
    if re_prob > 0 and not no_aug:
        erasing = RandomErasing(re_prob, mode=re_mode, max_count=re_count, device="cpu")
    if shift is not None:
        others = {"scale": scale, "ratio": ratio, "auto_augment": auto_augment, **kwargs}
        if given := sorted(k for k, v in others.items() if v is not None):
            raise DataError(f"shift takes the place of {', '.join(given)}; give one or the other")
        if no_aug:
            shift, hflip, vflip = 0, 0.0, 0.0
        return ShiftTransform(data_config, shift=shift, hflip=hflip, vflip=vflip, pad_mode=pad_mode, erasing=erasing)
    transform = _factory(
        data_config,
        is_training=True,
        no_aug=no_aug,
        scale=scale,
        ratio=ratio,
        hflip=hflip,
        vflip=vflip,
        color_jitter=color_jitter,
        auto_augment=auto_augment,
        **kwargs,
    )
    transform.transforms.insert(0, _croppable)
    return ImageTransform(data_config, transform, erasing)


def _croppable(image: Image.Image) -> Image.Image:
    """Halves the sides of an image that is so large (90 to 179 million pixels) that Pillow warns at a crop of it."""
    limit = Image.MAX_IMAGE_PIXELS
    return image.reduce(2) if limit and image.width * image.height > limit else image


def _factory(data_config: dict, **kwargs):
    config = {"interpolation": "bicubic", "crop_pct": None, "crop_mode": None, **data_config}
    fields = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    config = {**{k: config[k] for k in fields}, **kwargs}
    transform = create_transform(**config, normalize=False)
    for step in transform.transforms:
        _keep_a_bit(step)
    return transform


def _keep_a_bit(step) -> None:
    """timm's strongest posterize keeps 0 bits (a black image), which Pillow 12 and later refuse with an error."""
    ops = step if isinstance(step, (list, tuple)) else getattr(step, "ops", None) or getattr(step, "policy", ())
    for op in ops:
        _keep_a_bit(op)
    if getattr(step, "aug_fn", None) is posterize:
        step.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, max(1, bits_to_keep))


def adapt_channels(data_config: dict, in_chans: int) -> dict:
    """A copy of a `data_config` with mean and std for 1 or 3 channels, where they are for 3 or 1.

    Grey is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601, as Pillow converts), and so is its mean. Its std is taken with
    the same weights, which is exact where channels vary together, as they nearly do in photographs. Colour from grey
    repeats the one number.

    Raises:
        DataError: For other numbers of channels.
    """
    out = {**data_config, "input_size": [in_chans, *data_config["input_size"][1:]]}
    for name in ("mean", "std"):
        values = [float(v) for v in data_config[name]]
        if (len(values), in_chans) == (3, 1):
            values = [round(sum(w * v for w, v in zip(_GREY, values, strict=True)), 4)]
        elif (len(values), in_chans) == (1, 3):
            values = values * 3
        if len(values) != in_chans:
            raise DataError(f"{name} has {len(values)} numbers, the model {in_chans} input channels; give --{name}")
        out[name] = values
    return out


def channel_stats(
    dataset,
    indices: Sequence[int] | None = None,
    *,
    in_chans: int = 3,
    limit: int = 2000,
    background: str = WHITE,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel (values 0 to 1) over the pixels of evenly spaced images; of the first
    ones of a stream.

    Each image counts the same, whatever its size. Rounded to 4 digits, plain floats.

    Args:
        dataset: Pass the training part only, or the test part leaks into the model.
        indices: Which images; default all.
        in_chans: 3, or 1 for grey.
        limit: Largest number of images that are read.
        background: Colour behind transparent pixels.

    Raises:
        DataError: When no image can be read.
    """
    if not hasattr(dataset, "__len__"):
        dataset = first_rows(dataset, limit)
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    if len(indices) > limit:
        indices = indices[np.linspace(0, len(indices) - 1, limit).astype(int)]
    mode = "RGB" if in_chans == 3 else "L"
    images = Images(
        dataset.select(indices.tolist()),
        mode=mode,
        cache_limit=0,
        shrink=256,
        background=background,
        max_corrupt=1.0,
    )
    moments = []
    for start in range(0, len(images), 256):
        for image in images.pil(range(start, min(start + 256, len(images)))):
            if image is not None:
                pixels = np.asarray(image, dtype=np.float64).reshape(-1, in_chans) / 255
                moments.append((pixels.mean(0), np.square(pixels).mean(0)))
    if not moments:
        raise DataError(f"none of {len(images)} images can be read")
    mean, square = np.mean(moments, axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))
    return tuple(round(float(v), 4) for v in mean), tuple(round(float(v), 4) for v in std)


def default_data_config(
    splits, img_size: int | tuple[int, int], *, in_chans: int = 3, mean=None, std=None, indices=None
) -> dict:
    """A `data_config` for a model trained on `splits` from scratch: JSON-plain, as timm names its entries.

    Small grey sets (digits, Fashion-MNIST) are used whole (crop_pct 1) and normalised by their own statistics;
    photographs get timm's defaults (crop_pct 0.875, ImageNet's mean and std; their own for one channel). A
    `background` other than white is an entry as well. To continue from a trained model use
    `timm.data.resolve_model_data_config(model)` instead.

    Args:
        splits: What `load_splits` returned.
        img_size: Side, or (h, w).
        in_chans: 3, or 1 for grey.
        mean: Overrides, per channel.
        std: Overrides, per channel.
        indices: The training images that statistics may be taken from; default all of `splits.train`.
    """
    size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
    whole = _is_small_grey(splits)
    if mean is None or std is None:
        stats = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        if whole or in_chans == 1:
            stats = channel_stats(splits.train, indices, in_chans=in_chans, background=splits.background)
        mean, std = stats[0] if mean is None else mean, stats[1] if std is None else std
    config = {
        "input_size": [in_chans, *size],
        "interpolation": "bicubic",
        "mean": list(mean),
        "std": list(std),
        "crop_pct": 1.0 if whole else 0.875,
        "crop_mode": "center",
    }
    # timm's configurations have no such entry; it appears where the user chose a colour
    return config if splits.background == WHITE else {**config, "background": splits.background}


def default_augment(splits, img_size: int | tuple[int, int]) -> dict:
    """Keyword arguments for `train_transform` that suit the data.

    digits: shifts of up to a tenth of the side, no flips. Fashion-MNIST: a sixteenth, horizontal flips.
    Photographs: crops of at least 35% of the area (small data sets learn little from timm's 8%), flips, colour jitter.
    """
    side = img_size if isinstance(img_size, int) else min(img_size)
    kind = splits.name.partition(":")[0]
    if kind == "digits":
        return {"shift": max(1, side // 10), "hflip": 0.0}
    if kind == "fashion-mnist":
        return {"shift": max(1, side // 16), "hflip": 0.5}
    return {"scale": (0.35, 1.0), "hflip": 0.5, "color_jitter": 0.4 if splits.in_chans == 3 else None}


def _is_small_grey(splits) -> bool:
    return splits.in_chans == 1 and max(splits.native_size) <= 64
