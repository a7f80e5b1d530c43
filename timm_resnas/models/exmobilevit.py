"""ExMobileViT: MobileViT with shortcuts from its early stages to the classifier.

Paper: `ExMobileViT: Lightweight Classifier Extension for Mobile Vision Transformer` - https://arxiv.org/abs/2309.01310
Origin: https://github.com/EmPasLab/ExMobileVIT

The outputs of the first two MobileViT stages are projected (1x1 convolution, batch norm, SiLU), pooled and
concatenated with the last stage's before the classifier. The body is timm's MobileViT; `body='paper'` rebuilds the body
of the released repository, which differs from it (attention of width 32, other MLP widths, no final layer norm).

Differences from the released code: its average pooling windows cover 61% and 32% of the two taps and fit one image size
only, here pooling is global and any size works; the classifier has a bias (zero when a released checkpoint is loaded).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, ClassifierHead, ConvNormAct, make_divisible
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    named_apply,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from timm.models.byobnet import ByobNet, ByoModelCfg, _init_weights
from timm.models.mobilevit import MobileVitBlock, model_cfgs
from timm.models.vision_transformer import Block
from torch import nn

__all__ = ["ExMobileVit"]

_BODIES = ("mobilevit_s", "mobilevit_xs", "mobilevit_xxs", "paper")
# ExMobileViT-928: tap widths 96, 128, 160 times about 1.33, 1.25 and 4
_RATIOS = (4 / 3, 5 / 4, 4)


class NarrowAttention(Attention):
    """Attention with heads of width 8, whatever the input's width."""

    def __init__(self, dim: int, **kwargs):
        super().__init__(dim, attn_head_dim=8, **kwargs)


@register_notrace_module
class PaperMobileVitBlock(MobileVitBlock):
    """MobileViT block of the released repository.

    Attention has 4 heads of width 8 and no qkv bias, the convolution into the transformer has batch norm and SiLU, no
    layer norm follows the transformer.
    """

    def __init__(self, in_chs: int, transformer_dim: int, layers, mlp_ratio: float, device=None, dtype=None, **kwargs):
        dd = {"device": device, "dtype": dtype}
        depth = kwargs.pop("transformer_depth")
        super().__init__(in_chs, transformer_dim=transformer_dim, transformer_depth=0, layers=layers, **kwargs, **dd)
        self.conv_1x1 = layers.conv_norm_act(in_chs, transformer_dim, kernel_size=1, **dd)
        self.transformer = nn.Sequential(
            *(
                Block(
                    transformer_dim,
                    num_heads=4,
                    mlp_ratio=mlp_ratio,
                    drop_path=kwargs.get("drop_path_rate", 0.0),
                    act_layer=layers.act,
                    norm_layer=nn.LayerNorm,
                    attn_layer=NarrowAttention,
                    **dd,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.Identity()


def _body_cfg(body: str, se: bool) -> ByoModelCfg:
    """Return the description of a body, changed as asked."""
    if body not in _BODIES:
        raise ValueError(f"ExMobileViT: body={body!r} is not one of {_BODIES}.")
    cfg = model_cfgs["mobilevit_s" if body == "paper" else body]
    if body == "paper":
        blocks = list(cfg.blocks)
        for i, mlp_ratio in zip((2, 3, 4), (2.0, 4.0, 4.0), strict=True):  # MLP widths 288, 768, 960
            reduction, block = blocks[i]
            kwargs = dict(block.block_kwargs, mlp_ratio=mlp_ratio)
            blocks[i] = (reduction, replace(block, type=partial(PaperMobileVitBlock), block_kwargs=kwargs))
        cfg = replace(cfg, blocks=tuple(blocks))
    if se:  # as timm's semobilevit_s
        cfg = replace(cfg, attn_layer="se", attn_kwargs=dict(rd_ratio=1 / 8))
    return cfg


class ExMobileVit(ByobNet):
    """MobileViT whose classifier also sees its two early stages (https://arxiv.org/abs/2309.01310).

    `forward_features` returns one map `[B, num_features, H/32, W/32]`: each tap is projected and average-pooled to the
    last grid. Its global average is the paper's concatenated vector, exactly where the stride divides the image.

    Args:
        body: 'mobilevit_s', 'mobilevit_xs', 'mobilevit_xxs' (timm's) or 'paper' (the released repository's).
        widths: channels of the projections of tap 1, tap 2 and the last stage; 0 leaves a shortcut out, so that
            (0, 0, 640) is MobileViT-S.
        shortcut_ratio: instead of `widths`: projected width over tap width, one number per tap. Default
            (4/3, 5/4, 4), the paper's 928 = 128 + 160 + 640 on the S body.
        se: squeeze-and-excitation in the inverted residual blocks, the paper's alternative to shortcuts.
        stem_stride: 2, or 1 for small images (all reductions halve).
        output_stride: 32, 16 or 8; dilation replaces the missing strides.

    Raises:
        ValueError: unknown body, widths and ratio both given, or not three numbers.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        body: str = "mobilevit_s",
        widths: Sequence[int] | None = None,
        shortcut_ratio: Sequence[float] | None = None,
        se: bool = False,
        stem_stride: int = 2,
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if stem_stride not in (1, 2):
            raise ValueError(f"ExMobileViT: stem_stride={stem_stride}: 1 or 2.")
        cfg = replace(_body_cfg(body, se), num_features=0)
        super().__init__(
            cfg,
            num_classes=0,
            in_chans=in_chans,
            output_stride=output_stride,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )
        self.num_classes = num_classes
        if stem_stride == 1:
            self.stem.conv.stride = (1, 1)
            for info in self.feature_info:
                info["reduction"] //= 2
        self.feature_info[-1]["module"] = f"stages.{len(self.stages) - 1}"  # there is no final convolution

        taps = [stage[-1].conv_fusion.conv.out_channels for stage in self.stages[2:]]
        widths = _projection_widths(taps, widths, shortcut_ratio)
        self.shortcuts = nn.ModuleList(
            ConvNormAct(chs, width, 1, act_layer=nn.SiLU, **dd) if width else nn.Identity()
            for chs, width in zip(taps, widths, strict=True)
        )
        self.widths = widths
        self.num_features = sum(widths)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.global_pool = global_pool
        named_apply(_init_weights, self.shortcuts)
        named_apply(_init_weights, self.head)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise all weights as timm's MobileViT does, also after `to_empty`."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):  # batch norm statistics, layer norm
                module.reset_parameters()
        named_apply(partial(_init_weights, zero_init_last=True), self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^stem",
            blocks=[
                (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None),
                (r"^shortcuts", (99999,)),
            ],
        )

    def _combine(self, taps: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Project the taps, pool them to the grid of the last map `x` and concatenate them."""
        if self.shortcuts is None:
            return x
        size = x.shape[-2:]
        if not torch.jit.is_scripting():
            if torch.jit.is_tracing():
                size = [int(side) for side in size]  # torch's older ONNX exporter pools to sizes known in advance
        maps: list[torch.Tensor] = []
        for i, shortcut in enumerate(self.shortcuts):
            if self.widths[i] > 0:
                y = shortcut(taps[i])
                maps.append(y if i == 2 else F.adaptive_avg_pool2d(y, size))
        return torch.cat(maps, dim=1)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the concatenated map `[B, num_features, H/32, W/32]`."""
        x = self.stem(x)
        taps: list[torch.Tensor] = []
        for i, stage in enumerate(self.stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if i >= 2:
                taps.append(x)
        return self._combine(taps, x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the maps at reductions 2, 4, 8, 16, 32, as timm's `forward_intermediates`.

        Args:
            x: images `[B, in_chans, H, W]`.
            indices: last n maps if int, all if None, the listed ones if a sequence.
            norm: without effect: there is no final norm.
            stop_early: stop after the last wanted map; the final output is then that map.
            output_fmt: 'NCHW'.
            intermediates_only: return only the list.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW'.")
        take_indices, max_index = feature_take_indices(len(self.stage_ends), indices)
        take_stages = [self.stage_ends[i] - 1 for i in take_indices]
        stages = self.stages
        if not torch.jit.is_scripting() and stop_early:
            stages = self.stages[: self.stage_ends[max_index]]
        x = self.stem(x)
        intermediates: list[torch.Tensor] = []
        taps: list[torch.Tensor] = []
        for i, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if i >= 2:
                taps.append(x)
            if i in take_stages:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return self._combine(taps, x) if len(taps) == 3 else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last wanted map, shortcuts and head; return the indices of the kept maps."""
        take_indices, max_index = feature_take_indices(len(self.stage_ends), indices)
        prune_end = max_index < len(self.stage_ends) - 1
        self.stages = self.stages[: self.stage_ends[max_index]]
        if prune_head or prune_end:
            self.shortcuts = None
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
            self.reset_classifier(0, "", reset_other=True)
        return take_indices


def _projection_widths(
    taps: list[int], widths: Sequence[int] | None, shortcut_ratio: Sequence[float] | None
) -> list[int]:
    if widths is not None and shortcut_ratio is not None:
        raise ValueError("ExMobileViT: give widths or shortcut_ratio, not both.")
    numbers = widths if widths is not None else shortcut_ratio if shortcut_ratio is not None else _RATIOS
    if len(numbers) != 3 or any(n < 0 for n in numbers) or numbers[2] == 0:
        raise ValueError(
            f"ExMobileViT: {list(numbers)}: three numbers are wanted (tap 1, tap 2, last stage), the last above 0."
        )
    if widths is not None:
        return [int(w) for w in widths]
    return [make_divisible(chs * ratio, 8) if ratio else 0 for chs, ratio in zip(taps, numbers, strict=True)]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ExMobileVit) -> dict[str, torch.Tensor]:
    """Map a checkpoint of the released repository (or ours) to this model's keys; needs `body='paper'`."""
    for wrapper in ("model", "state_dict"):
        state_dict = state_dict.get(wrapper, state_dict)
    state_dict = {re.sub(r"^(module|model)\.", "", k): v for k, v in state_dict.items()}
    if "conv1.0.weight" not in state_dict:
        return state_dict
    bottlenecks = ("0.0", "1.0", "1.1", "1.2", "2.0", "3.0", "4.0")
    sub = {"0": "conv1_1x1.conv", "1": "conv1_1x1.bn", "3": "conv2_kxk.conv", "4": "conv2_kxk.bn"}
    sub.update({"6": "conv3_1x1.conv", "7": "conv3_1x1.bn"})
    convs = {"conv1": "conv_kxk", "conv2": "conv_1x1", "conv3": "conv_proj", "conv4": "conv_fusion"}
    layers = {
        "0.norm": "norm1",
        "0.fn.to_qkv": "attn.qkv",
        "0.fn.to_out.0": "attn.proj",
        "1.norm": "norm2",
        "1.fn.net.0": "mlp.fc1",
        "1.fn.net.3": "mlp.fc2",
    }
    conv_bn = {"0": "conv", "1": "bn"}
    tops = {"conv1": "stem", "conv2_1": "shortcuts.0", "conv2_2": "shortcuts.1", "conv2": "shortcuts.2"}
    out = {}
    for k, v in state_dict.items():
        if m := re.match(r"mv2\.(\d)\.conv\.(\d)\.(.*)", k):
            k = f"stages.{bottlenecks[int(m[1])]}.{sub[m[2]]}.{m[3]}"
        elif m := re.match(r"mvit\.(\d)\.(conv\d)\.([01])\.(.*)", k):
            if m[2] == "conv4" and m[3] == "0":
                v = torch.cat(
                    v.chunk(2, dim=1)[::-1], dim=1
                )  # released: (transformed, input); timm: (input, transformed)
            k = f"stages.{int(m[1]) + 2}.1.{convs[m[2]]}.{conv_bn[m[3]]}.{m[4]}"
        elif m := re.match(r"mvit\.(\d)\.transformer\.layers\.(\d)\.(.*)\.(weight|bias)", k):
            k = f"stages.{int(m[1]) + 2}.1.transformer.{m[2]}.{layers[m[3]]}.{m[4]}"
        elif m := re.match(r"(conv\d(?:_\d)?)\.([01])\.(.*)", k):
            k = f"{tops[m[1]]}.{conv_bn[m[2]]}.{m[3]}"
        elif k == "fc.weight":
            k = "head.fc.weight"
            out["head.fc.bias"] = v.new_zeros(v.shape[0])
        out[k] = v
    return out


def _create_exmobilevit(variant: str, pretrained: bool = False, **kwargs) -> ExMobileVit:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3, 4))
    return build_model_with_cfg(
        ExMobileVit,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


def _cfg(**kwargs) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 256, 256),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "crop_mode": "squash",  # the released validation resizes straight to 256 x 256
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2309.01310",
        "paper_name": "ExMobileViT: Lightweight Classifier Extension for Mobile Vision Transformer",
        "origin_url": "https://github.com/EmPasLab/ExMobileVIT",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {name: _cfg() for name in ("exmobilevit_928", "exmobilevit_640", "exmobilevit_576")}
)


@register_model
def exmobilevit_928(pretrained=False, **kwargs) -> ExMobileVit:
    """ExMobileViT-928: 128 + 160 + 640 channels to the classifier, 5.9M parameters."""
    return _create_exmobilevit("exmobilevit_928", pretrained, **kwargs)


@register_model
def exmobilevit_640(pretrained=False, **kwargs) -> ExMobileVit:
    """ExMobileViT-640: 32 + 128 + 480 channels to the classifier, 5.6M parameters."""
    return _create_exmobilevit("exmobilevit_640", pretrained, **_with_widths((32, 128, 480), kwargs))


@register_model
def exmobilevit_576(pretrained=False, **kwargs) -> ExMobileVit:
    """ExMobileViT-576: 32 + 64 + 480 channels to the classifier, 5.5M parameters."""
    return _create_exmobilevit("exmobilevit_576", pretrained, **_with_widths((32, 64, 480), kwargs))


def _with_widths(widths: tuple[int, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Add the variant's widths unless the caller gives a ratio."""
    return kwargs if "shortcut_ratio" in kwargs else dict(dict(widths=widths), **kwargs)
