"""EfficientFormerV2 of any depths, widths and expansions, at any image size: timm's class, for searched networks.

Paper: `Rethinking Vision Transformers for MobileNet Size and Speed` - https://arxiv.org/abs/2212.08059
Origin: https://github.com/snap-research/EfficientFormer

Four stages of convolutional MLPs with a depth-wise layer in the middle; the last blocks of the third and the fourth
stage attend as well. Beyond timm's class, whose layers, keys and numbers these are:

* Tables of relative positions are resampled by `set_input_size` and by loading for another image size.
* The third and the fourth stage may end in different numbers of blocks that attend (``num_vit``), and ``depths`` may
  say which blocks of a supernet are left.
* `checkpoint_filter_fn` maps the authors' checkpoints.
* `forward_features` holds no map longer than it needs it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models import efficientformer_v2 as base
from timm.models._input import update_model_input_size
from torch import nn

from ..arch import ArchError
from .efficientformer_nas import (
    STAGES,
    Stages,
    check_depths,
    check_num_vit,
    check_ratio,
    check_size,
    check_widths,
    given_size,
    resample_bias,
    unwrap,
)
from .efficientformer_nas import _cfg as _cfg_v1
from .grid import checkpoint_grid

__all__ = ["EfficientFormerV2Nas"]

VIT_STAGES = (2, 3)
S0 = dict(
    depths=(2, 2, 6, 4),
    embed_dims=(32, 48, 96, 176),
    mlp_ratios=(4, 4, (4, 3, 3, 3, 4, 4), (4, 3, 3, 4)),
    num_vit=2,
)


def with_defaults(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with what decides the architecture filled in: S0's; MLP ratios 4 where other depths are given."""
    own = {**S0, "mlp_ratios": 4} if args.get("depths") is not None else S0
    return {**own, **args}


def check_ratios(mlp_ratios: Any, counts: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """MLP ratios of the blocks of each stage, from one number, one for each stage, or one for each block.

    Raises:
        ArchError: They do not fit the numbers of blocks, or one is not a number above 0 and up to 64.
    """
    stages = mlp_ratios if isinstance(mlp_ratios, list | tuple) else (mlp_ratios,) * STAGES
    if len(stages) != STAGES:
        raise ArchError(f"mlp_ratios must be a number or have {STAGES} entries, got {mlp_ratios!r:.80}")
    clean = []
    for i, (ratios, count) in enumerate(zip(stages, counts, strict=True)):
        ratios = ratios if isinstance(ratios, list | tuple) else (ratios,) * count
        if len(ratios) != count:
            raise ArchError(f"stage {i} has {count} blocks and {len(ratios)} mlp_ratios")
        clean.append(tuple(check_ratio(ratio) for ratio in ratios))
    return tuple(clean)


def check_num_vits(num_vit: Any, counts: Sequence[int]) -> tuple[int, int]:
    """Numbers of blocks that attend, of the third and the fourth stage, from one number or two.

    Raises:
        ArchError: One is not from 0 to the number of blocks there.
    """
    pair = tuple(num_vit) if isinstance(num_vit, list | tuple) else (num_vit, num_vit)
    if len(pair) != len(VIT_STAGES):
        raise ArchError(f"num_vit must be a number, or one for each of the stages 2 and 3, got {num_vit!r:.60}")
    return tuple(check_num_vit(n, counts[i], f"stage {i}") for n, i in zip(pair, VIT_STAGES, strict=True))


class EfficientFormerV2Nas(Stages, base.EfficientFormerV2):
    """EfficientFormerV2, timm's.

    Args:
        depths: Blocks of each of the four stages: a number, or a list with 1 for each block and 0 for each that a
            supernet has there and this network has not.
        embed_dims: Channels of each stage.
        mlp_ratios: Hidden units of the MLP per channel, truncated to an integer: a number, one for each stage, or in a
            stage a list of one for each block that is there.
        num_vit: Blocks at the end of the third and of the fourth stage that attend: one number or two.
        img_size: Side, or (height, width), in pixels: multiples of 32.
        in_chans, num_classes, global_pool, layer_scale_init_value, drop_rate, proj_drop_rate, drop_path_rate,
            distillation, device, dtype: As timm's.

    Raises:
        ArchError: An argument is malformed.
    """

    def __init__(
        self,
        depths: Sequence[Any] = S0["depths"],
        embed_dims: Sequence[int] = S0["embed_dims"],
        mlp_ratios: Any = S0["mlp_ratios"],
        num_vit: int | Sequence[int] = S0["num_vit"],
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        layer_scale_init_value: float | None = 1e-5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        distillation: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        counts = tuple(sum(flags) for flags in check_depths(depths))
        num_vits = check_num_vits(num_vit, counts)
        super().__init__(
            depths=counts,
            embed_dims=check_widths(embed_dims),
            mlp_ratios=check_ratios(mlp_ratios, counts),
            num_vit=max(num_vits),
            img_size=check_size(img_size),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            layer_scale_init_value=layer_scale_init_value,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            distillation=distillation,
            device=device,
            dtype=dtype,
        )
        self.img_size = check_size(img_size)
        for i, count in zip(VIT_STAGES, num_vits, strict=True):
            for block in self.stages[i].blocks[: counts[i] - count]:
                block.token_mixer = block.ls1 = block.drop_path1 = None

    def mixers(self) -> Iterator[nn.Module]:
        """What attends, in blocks and between stages."""
        return (m for m in self.modules() if isinstance(m, base.Attention2d | base.Attention2dDownsample))

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Resample the tables of relative positions for another image size.

        Raises:
            ValueError: The sides are not multiples of 32, or another stride is asked for.
        """
        size = given_size(self.img_size, img_size, patch_size)
        for mixer in self.mixers() if size != self.img_size else ():
            old = mixer.resolution
            new = tuple(n * side // own for n, side, own in zip(old, size, self.img_size, strict=True))
            table = mixer.attention_biases
            with torch.no_grad():
                resized = resample_bias(table, old, new)
            mixer.attention_biases = nn.Parameter(resized, table.requires_grad)
            mixer.resolution, mixer.N = new, new[0] * new[1]
            rows = mixer.N
            if isinstance(mixer, base.Attention2dDownsample):
                mixer.resolution2 = tuple(n // 2 for n in new)
                rows = mixer.N2 = mixer.resolution2[0] * mixer.resolution2[1]
            mixer.attention_bias_idxs = mixer.attention_bias_idxs.new_empty(rows, mixer.N)
            mixer._init_buffers()
        self.img_size = size
        update_model_input_size(self, size)


# The authors' names; a stage and what is in front of it are numbered through
_RELEASED = [
    *((rf"^patch_embed\.{i}\.", f"stem.{name}.") for i, name in ((0, "conv1.conv"), (1, "conv1.bn"))),
    *((rf"^patch_embed\.{i}\.", f"stem.{name}.") for i, name in ((3, "conv2.conv"), (4, "conv2.bn"))),
    *((rf"\.mlp\.{a}\.", f".mlp.{b}.conv.") for a, b in (("fc1", "fc1"), ("mid", "mid"), ("fc2", "fc2"))),
    *((rf"\.mlp\.{a}\.", f".mlp.{b}.bn.") for a, b in (("norm1", "fc1"), ("mid_norm", "mid"), ("norm2", "fc2"))),
    (r"\.downsample\.(proj|conv)\.", ".downsample.conv.conv."),
    (r"\.downsample\.(norm|bn)\.", ".downsample.conv.bn."),
    (r"\.q\.local\.0\.", ".q.local."),
    (r"\.(q\.proj|q|k|v|v_local|stride_conv)\.0\.", r".\1.conv."),
    (r"\.(q\.proj|q|k|v|v_local|stride_conv)\.1\.", r".\1.bn."),
    (r"\.(token_mixer|attn)\.proj\.1\.", r".\1.proj.conv."),
    (r"\.(token_mixer|attn)\.proj\.2\.", r".\1.proj.bn."),
    (r"\.layer_scale_([12])$", r".ls\1.gamma"),
    (r"^dist_head\.", "head_dist."),
]


def _released(key: str) -> str:
    """The name here of a weight of the authors'."""
    if m := re.match(r"network\.(\d+)\.", key):
        number, rest = int(m[1]), key[m.end() :]
        key = f"stages.{(number + 1) // 2}." + ("downsample." if number % 2 else "blocks.") + rest
    for pattern, name in _RELEASED:
        key = re.sub(pattern, name, key)
    return key


def checkpoint_filter_fn(state_dict: dict[str, Any], model: EfficientFormerV2Nas) -> dict[str, torch.Tensor]:
    """Fit a checkpoint to a model: the released layout or timm's, wrapped or not, at another image size.

    Raises:
        ValueError: Nothing says for what grid the tables of relative positions were made, see `checkpoint_grid`.
    """
    state_dict = unwrap(state_dict)
    if any(key.startswith("patch_embed.") for key in state_dict):
        indices = ("attention_bias_idxs", "attention_bias_idxs_seg", ".ab")
        state_dict = {_released(k): v for k, v in state_dict.items() if not k.endswith(indices)}
        state_dict = {k: v.flatten() if k.endswith(".gamma") else v for k, v in state_dict.items()}
    grids = {f"{name}.attention_biases": m.resolution for name, m in model.named_modules() if hasattr(m, "resolution")}
    out = {}
    for key, value in state_dict.items():
        if grid := grids.get(key):
            stride = model.img_size[0] // grid[0]
            value = resample_bias(value, checkpoint_grid(model, value.shape[1], stride, grid), grid)
        out[key] = value
    return out


def _create_efficientformerv2_nas(variant: str, pretrained: bool = False, **kwargs) -> EfficientFormerV2Nas:
    return build_model_with_cfg(
        EfficientFormerV2Nas,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), feature_cls="getter"),
        **kwargs,
    )


def _cfg(**kwargs) -> dict[str, Any]:
    return _cfg_v1(
        first_conv="stem.conv1.conv",
        paper_ids="arXiv:2212.08059",
        paper_name="Rethinking Vision Transformers for MobileNet Size and Speed",
        **kwargs,
    )


default_cfgs = generate_default_cfgs({"efficientformerv2_nas": _cfg()})


@register_model
def efficientformerv2_nas(pretrained: bool = False, **kwargs) -> EfficientFormerV2Nas:
    """EfficientFormerV2 of any ``depths``, ``embed_dims``, ``mlp_ratios`` of each block, and ``num_vit``.

    What is not given is EfficientFormerV2-S0's (3.60 M parameters, 0.40 GMACs), MLP ratios 4 with other depths. timm's
    weights of the paper's networks (``efficientformerv2_s0``, …) load, and so do the authors' files.
    """
    return _create_efficientformerv2_nas("efficientformerv2_nas", pretrained=pretrained, **with_defaults(kwargs))
