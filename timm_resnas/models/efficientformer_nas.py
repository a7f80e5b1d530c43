"""EfficientFormer of any depths and widths, at any image size: timm's class, for searched networks.

Paper: `EfficientFormer: Vision Transformers at MobileNet Speed` - https://arxiv.org/abs/2206.01191
Origin: https://github.com/snap-research/EfficientFormer

Four stages of blocks that pool (4-D), the last of which end in blocks that attend (3-D). Beyond timm's class, whose
layers, keys and numbers these are:

* ``img_size`` counts: tables of relative positions are made, resampled by `set_input_size` and by loading for it.
* ``num_vit`` may be 0, and ``depths`` may say which blocks of a supernet are left.
* `forward_features` holds no map longer than it needs it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ndgrid, resize_rel_pos_bias_table_simple, to_2tuple
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models import efficientformer as base
from timm.models._input import update_model_input_size
from torch import nn

from ..arch import ArchError
from .grid import checkpoint_grid

__all__ = ["EfficientFormerNas"]

STAGES = 4
STRIDE = 32  # of the last stage
MAX_BLOCKS, MAX_WIDTH = 64, 1 << 14  # of a stage; a description may come from the net
KEY_DIM, HEADS, VALUE_DIM = 32, 8, 128  # of timm's attention, whatever the width


# -- what both versions share -----------------------------------------------------------------------------------------


class Stages:
    """The stages of either version, in front of timm's class: one map after the other is let go."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Normed output of the last stage. [B, C, H, W] -> [B, N, C] (V1), [B, C, h, w] (V2)"""
        x = self.stem(x)
        for stage in self.stages:
            x = stage.downsample(x)
            if stage.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage.blocks, x)
            else:
                for block in stage.blocks:
                    x = block(x)
        return self.norm(x)

    @torch.jit.ignore
    def layer_starts(self) -> Iterator[nn.Module]:
        """Where the layers of `Arch.layers` begin."""
        yield self.stem
        for stage in self.stages:
            if not isinstance(stage.downsample, nn.Identity):
                yield stage.downsample
            yield from (block for block in stage.blocks if not isinstance(block, base.Flat))
        yield self.norm


def check_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of an image.

    Raises:
        ArchError: The sides are not positive multiples of 32.
    """
    sides = tuple(to_2tuple(img_size))
    if len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 or s % STRIDE for s in sides):
        raise ArchError(f"img_size must be one or two positive multiples of {STRIDE}, got {img_size!r:.60}")
    return sides


def check_depths(depths: Any) -> tuple[tuple[int, ...], ...]:
    """Depths of the stages as one 1 for each block, 0 for one that a supernet has there and this network has not.

    Raises:
        ArchError: They are malformed; the message says what was expected.
    """
    want = f"depths must be {STAGES} numbers of 1 to {MAX_BLOCKS} blocks, or lists of 1 (there) and 0 (absent)"
    if not isinstance(depths, list | tuple) or len(depths) != STAGES:
        raise ArchError(f"{want}; got {depths!r:.80}")
    clean = []
    for i, depth in enumerate(depths):
        flags = (1,) * min(depth, MAX_BLOCKS + 1) if _is_count(depth) else depth
        if not isinstance(flags, list | tuple) or not all(_is_count(f) and f <= 1 for f in flags):
            raise ArchError(f"{want}; got {depth!r:.60} in stage {i}")
        flags = tuple(flags)
        while flags and not flags[-1]:
            flags = flags[:-1]
        if not 1 <= len(flags) <= MAX_BLOCKS:
            raise ArchError(f"{want}; got {depth!r:.60} in stage {i}")
        clean.append(flags)
    return tuple(clean)


def plain_depths(depths: Sequence[Sequence[int]]) -> list[int | list[int]]:
    """The shortest form that `check_depths` reads as this."""
    return [len(flags) if all(flags) else list(flags) for flags in depths]


def check_widths(embed_dims: Any) -> tuple[int, ...]:
    """Widths of the stages.

    Raises:
        ArchError: They are not four positive integers, the first of them even.
    """
    good = isinstance(embed_dims, list | tuple) and len(embed_dims) == STAGES
    if not good or not all(_is_count(d) and 1 <= d <= MAX_WIDTH for d in embed_dims) or embed_dims[0] % 2:
        raise ArchError(
            f"embed_dims must be {STAGES} integers from 1 to {MAX_WIDTH}, the first of them even; got "
            f"{embed_dims!r:.80}"
        )
    return tuple(embed_dims)


def check_num_vit(num_vit: Any, depth: int, where: str = "the last stage") -> int:
    """Number of blocks with attention.

    Raises:
        ArchError: It is not from 0 to the number of blocks.
    """
    if not _is_count(num_vit) or num_vit > depth:
        raise ArchError(f"num_vit must be an integer from 0 to the {depth} blocks of {where}, got {num_vit!r:.40}")
    return num_vit


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def given_size(own: tuple[int, int], img_size: Any, patch_size: Any) -> tuple[int, int]:
    """The size that `set_input_size` is to make of ``own``.

    Raises:
        ValueError: A patch size is asked for, or the sides are not multiples of 32.
    """
    if patch_size not in (None, STRIDE, (STRIDE, STRIDE)):
        raise ValueError(f"the stride of the stages is {STRIDE}; it cannot be {patch_size}")
    return own if img_size is None else check_size(img_size)


def resample_bias(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Biases by distance between rows and between columns for another grid: [heads, h * w], bicubic.

    Args:
        table: For distances 0 to h - 1 and 0 to w - 1, rows first.
        old: h and w of the table.
        new: h and w of the result.
    """
    if tuple(old) == tuple(new):
        return table
    if table.is_meta:  # bicubic interpolation takes a tenth of a second even where nothing is computed
        return table.new_empty(len(table), new[0] * new[1])
    away = [torch.arange(1 - n, n, device=table.device).abs() for n in old]
    mirrored = table.unflatten(1, tuple(old))[:, away[0]][:, :, away[1]]
    shape = tuple(2 * n - 1 for n in new)
    resized = resize_rel_pos_bias_table_simple(mirrored.float(), new, (len(table), *shape))
    return resized[:, new[0] - 1 :, new[1] - 1 :].flatten(1).to(table.dtype)


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint as it was saved."""
    for wrapper in ("model_ema", "model", "state_dict"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


# -- the network ------------------------------------------------------------------------------------------------------


class EfficientFormerNas(Stages, base.EfficientFormer):
    """EfficientFormer, timm's.

    Args:
        depths: Blocks of each of the four stages: a number, or a list with 1 for each block and 0 for each that a
            supernet has there and this network has not.
        embed_dims: Channels of each stage.
        num_vit: Blocks at the end of the last stage that attend.
        img_size: Side, or (height, width), in pixels: multiples of 32.
        mlp_ratios: Hidden units of each block's MLP per channel; units are truncated to an integer.
        in_chans, num_classes, global_pool, layer_scale_init_value, drop_rate, proj_drop_rate, drop_path_rate, device,
            dtype: As timm's.

    Raises:
        ArchError: An argument is malformed.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        depths: Sequence[Any] = (3, 2, 6, 4),
        embed_dims: Sequence[int] = (48, 96, 224, 448),
        num_vit: int = 1,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        mlp_ratios: float = 4.0,
        layer_scale_init_value: float = 1e-5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        counts = tuple(sum(flags) for flags in check_depths(depths))
        num_vit = check_num_vit(num_vit, counts[-1])
        size = check_size(img_size)
        super().__init__(
            depths=counts,
            embed_dims=check_widths(embed_dims),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            num_vit=num_vit,
            mlp_ratios=check_ratio(mlp_ratios),
            layer_scale_init_value=layer_scale_init_value,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )
        self.mlp_ratios = mlp_ratios
        self.img_size = (7 * STRIDE, 7 * STRIDE)
        if not num_vit:
            self.stages[-1].blocks.append(base.Flat())
        if size != self.img_size:
            EfficientFormerNas.set_input_size(self, size)

    def mixers(self) -> list[base.Attention]:
        """Attention of the blocks that attend."""
        blocks = self.stages[-1].blocks if len(self.stages) == STAGES else ()
        return [block.token_mixer for block in blocks if isinstance(block, base.MetaBlock1d)]

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Resample the tables of relative positions for another image size.

        Raises:
            ValueError: The sides are not multiples of 32, or another stride is asked for.
        """
        size = given_size(self.img_size, img_size, patch_size)
        old, new = (tuple(side // STRIDE for side in sides) for sides in (self.img_size, size))
        for mixer in self.mixers() if old != new else ():
            table = mixer.attention_biases
            with torch.no_grad():
                resized = resample_bias(table, old, new)
            mixer.attention_biases = nn.Parameter(resized, table.requires_grad)
            mixer.attention_bias_idxs = _distances(new, table.device)
            mixer.attention_bias_cache = {}
        self.img_size = size
        update_model_input_size(self, size)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the constructor does; with ``needs_reset`` all parameters and buffers."""
        for module in self.modules() if needs_reset else ():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for mixer in self.mixers() if needs_reset else ():
            nn.init.zeros_(mixer.attention_biases)
            grid = tuple(side // STRIDE for side in self.img_size)
            mixer.attention_bias_idxs.copy_(_distances(grid, mixer.attention_bias_idxs.device))
            mixer.attention_bias_cache = {}
        self.apply(self._init_weights)


def _distances(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Index into a table of biases for each pair of positions, [N, N]."""
    rows, columns = (p.flatten() for p in ndgrid(*(torch.arange(n, device=device) for n in grid)))
    return (rows[:, None] - rows).abs() * grid[1] + (columns[:, None] - columns).abs()


def check_ratio(mlp_ratio: Any) -> float:
    """Hidden units per channel.

    Raises:
        ArchError: It is not a number above 0 and up to 64.
    """
    if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, int | float) or not 0 < mlp_ratio <= 64:
        raise ArchError(f"an MLP ratio must be a number above 0 and up to 64, got {mlp_ratio!r:.40}")
    return float(mlp_ratio)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: EfficientFormerNas) -> dict[str, torch.Tensor]:
    """Fit a checkpoint to a model: the released layout or timm's, wrapped or not, at another image size.

    Raises:
        ValueError: Nothing says for what grid the tables of relative positions were made, see `checkpoint_grid`.
    """
    state_dict = unwrap(state_dict)
    if any(key.startswith("patch_embed.") for key in state_dict):
        state_dict = base.checkpoint_filter_fn(state_dict, model)
    grid = tuple(side // STRIDE for side in model.img_size)
    out = {}
    for key, value in state_dict.items():
        if key.endswith("attention_biases"):
            value = resample_bias(value, checkpoint_grid(model, value.shape[1], STRIDE, grid), grid)
        elif key.endswith("attention_bias_idxs") and len(value) != grid[0] * grid[1]:
            value = _distances(grid, value.device)
        out[key] = value
    return out


def _create_efficientformer_nas(variant: str, pretrained: bool = False, **kwargs) -> EfficientFormerNas:
    return build_model_with_cfg(
        EfficientFormerNas,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", STAGES), feature_cls="getter"),
        **kwargs,
    )


def _cfg(**kwargs) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "fixed_input_size": True,
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": ("head", "head_dist"),
        "license": "apache-2.0",
        "paper_ids": "arXiv:2206.01191",
        "paper_name": "EfficientFormer: Vision Transformers at MobileNet Speed",
        "origin_url": "https://github.com/snap-research/EfficientFormer",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"efficientformer_nas": _cfg()})


@register_model
def efficientformer_nas(pretrained: bool = False, **kwargs) -> EfficientFormerNas:
    """EfficientFormer of any ``depths``, ``embed_dims``, ``num_vit`` and ``mlp_ratios``.

    What is not given is EfficientFormer-L1's: 12.29 M parameters, 1.29 GMACs. The paper's larger networks: L3 is depths
    4 4 12 6, widths 64 128 320 512, 4 blocks that attend; L7 is 6 6 18 8, 96 192 384 768, 8. timm's weights of these
    (``efficientformer_l1``, …) load.
    """
    return _create_efficientformer_nas("efficientformer_nas", pretrained=pretrained, **kwargs)
