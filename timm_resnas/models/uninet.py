"""UniNet: convolution, attention and MLP in one architecture.

Paper: `UniNet: Unified Architecture Search with Convolution, Transformer, and MLP` - https://arxiv.org/abs/2207.05420
    (ECCV 2022)
Origin: https://github.com/Sense-X/UniNet

Six stages, each of one operator ('conv', 'attn' or 'mlp'), with modules between them that change width and resolution:
local ('l', a convolution), local-global ('lg', attention from the reduced map to the full one) and global ('g', learned
mixing of tokens). The paper's search found conv x 4, attn x 2 with l, l, l, lg, lg; `uninet_b0` to `uninet_b6` are that
network at growing size, `uninet` is any other.

The released code has neither the operator 'mlp' nor the module 'g', and the paper describes them in few words; here
they are token mixing as in MLP-Mixer in the place of attention, and a linear layer over tokens followed by one over
channels. Both are made for one image size. All else works at any size.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    Attention,
    ClassifierHead,
    ConvNormAct,
    DropPath,
    LayerScale,
    Mlp,
    SEModule,
    calculate_drop_path_rates,
    get_device_dtype,
    is_meta_device,
    make_divisible,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from timm.layers.trace_utils import _assert
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import nn

__all__ = ["UniNet"]

_OPS = ("conv", "attn", "mlp")
_DOWNSAMPLES = ("l", "lg", "g")


def _shortcut(in_dim: int, dim: int, stride: int, pool: bool, **dd) -> nn.Sequential:
    layers = [nn.MaxPool2d(3, stride, 1)] if pool else []
    return nn.Sequential(*layers, nn.Conv2d(in_dim, dim, 1, **dd))


class ConvBlock(nn.Module):
    """Inverted residual with squeeze-and-excitation over a map `[B, C, H, W]`; norms come before their convolutions."""

    def __init__(self, in_dim: int, dim: int, expansion: float, stride: int, act_layer, drop_path: float, **dd):
        super().__init__()
        hidden = int(in_dim * expansion)
        self.expand = nn.Identity()
        if hidden != in_dim or stride > 1:
            self.expand = nn.Sequential(
                nn.BatchNorm2d(in_dim, **dd),
                nn.Conv2d(in_dim, hidden, 1, bias=False, **dd),
                nn.BatchNorm2d(hidden, **dd),
                act_layer(),
            )
        self.conv = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False, **dd),
            nn.BatchNorm2d(hidden, **dd),
            act_layer(),
            SEModule(hidden, rd_channels=make_divisible(hidden / 4), gate_layer="hard_sigmoid", **dd),
            nn.Conv2d(hidden, dim, 1, **dd),
            nn.BatchNorm2d(dim, **dd),
        )
        change = in_dim != dim or stride > 1
        self.shortcut = _shortcut(in_dim, dim, stride, pool=True, **dd) if change else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.drop_path(self.conv(self.expand(x)))


class TokenMlp(nn.Module):
    """MLP over the tokens, alike for all channels."""

    def __init__(self, num_tokens: int, expansion: float, act_layer, drop: float, **dd):
        super().__init__()
        self.mlp = Mlp(num_tokens, int(num_tokens * expansion), act_layer=act_layer, drop=drop, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


class TokenBlock(nn.Module):
    """Convolutional position encoding, a mixer of tokens and an MLP, over a map `[B, C, H, W]`.

    Args:
        mixer: attention or token MLP, from and to `[B, N, C]`.
        init_values: initial layer scale; 0 or less for none.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        expansion: float,
        init_values: float,
        act_layer,
        norm_layer,
        proj_drop: float,
        drop_path: float,
        **dd,
    ):
        super().__init__()
        self.pos_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.mixer = mixer
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * expansion), act_layer=act_layer, drop=proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values > 0 else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        x = (x + self.pos_conv(x)).flatten(2).transpose(1, 2)
        x = x + self.drop_path(self.ls1(self.mixer(self.norm1(x))))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x.transpose(1, 2).reshape(B, C, H, W)


class LocalPath(nn.Sequential):
    """Depth-wise convolution with the stride, batch norm, 1x1 convolution to the new width."""

    def __init__(self, in_dim: int, dim: int, stride: int, **dd):
        super().__init__(
            nn.Conv2d(in_dim, in_dim, 3, stride, 1, groups=in_dim, **dd),
            nn.BatchNorm2d(in_dim, **dd),
            nn.Conv2d(in_dim, dim, 1, **dd),
        )


class LocalDownsample(nn.Module):
    """Downsampling by a convolution (paper: L-DSM)."""

    def __init__(self, in_dim: int, dim: int, stride: int, **dd):
        super().__init__()
        self.local = LocalPath(in_dim, dim, stride, **dd)
        self.shortcut = _shortcut(in_dim, dim, stride, pool=stride > 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.local(x)


class LocalGlobalDownsample(nn.Module):
    """Attention with queries from the downsampled map, keys and values from the full one (paper: LG-DSM)."""

    fused_attn: torch.jit.Final[bool]

    def __init__(self, in_dim: int, dim: int, stride: int, head_dim: int, norm_layer, **dd):
        super().__init__()
        self.num_heads = dim // head_dim
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.fused_attn = use_fused_attn()
        self.q = LocalPath(in_dim, dim, stride, **dd)
        self.q_norm = norm_layer(dim, **dd)
        self.kv_norm = norm_layer(in_dim, **dd)
        self.kv = nn.Linear(in_dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.shortcut = _shortcut(in_dim, dim, stride, pool=stride > 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut, q = self.shortcut(x), self.q(x)
        B, C, H, W = q.shape
        q = self.q_norm(q.flatten(2).transpose(1, 2))
        q = q.reshape(B, H * W, self.num_heads, self.head_dim).transpose(1, 2)
        kv = self.kv(self.kv_norm(x.flatten(2).transpose(1, 2)))
        k, v = kv.reshape(B, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        x = self.proj(x.transpose(1, 2).reshape(B, H * W, C))
        return shortcut + x.transpose(1, 2).reshape(B, C, H, W)


class GlobalDownsample(nn.Module):
    """Learned mixing of all tokens of the full map into those of the smaller one (paper: G-DSM)."""

    def __init__(self, in_dim: int, dim: int, stride: int, grid: tuple[int, int], norm_layer, **dd):
        super().__init__()
        self.norm = norm_layer(in_dim, **dd)
        self.tokens = nn.Linear(math.prod(grid), math.prod(_after(grid, stride)), **dd)
        self.proj = nn.Linear(in_dim, dim, **dd)
        self.shortcut = _shortcut(in_dim, dim, stride, pool=stride > 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(x)
        x = self.norm(x.flatten(2).transpose(1, 2))
        x = self.proj(self.tokens(x.transpose(1, 2)).transpose(1, 2))
        return shortcut + x.transpose(1, 2).reshape(shortcut.shape)


class Stage(nn.Module):
    """A downsampling module, then blocks of one operator."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x


class UniNet(nn.Module):
    """UniNet (https://arxiv.org/abs/2207.05420).

    Lists have an entry per stage.

    Args:
        img_size: image size (int or height, width) that 'mlp' and 'g' are made for; without them any size works.
        global_pool: 'avg', 'max', 'avgmax' or ''.
        repeats: blocks.
        channels: widths.
        expansions: hidden width of the blocks over their input's.
        block_ops: 'conv', 'attn' or 'mlp'.
        downsamples: 'l', 'lg' or 'g' before each stage but the first, also where the stride is 1. A first stage of
            'conv' changes width and resolution in its first block, one of another operator has the stem's width.
        strides: of the stages, after the stem's 2.
        stem_width: channels of the stem.
        head_width: channels of the last convolution, `num_features`.
        head_dim: width of an attention head.
        init_values: initial layer scale of 'attn' and 'mlp' blocks; 0 or less for none.

    Raises:
        ValueError: lists of different lengths, an unknown choice, a width that the head width does not divide.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        repeats: Sequence[int] = (1, 2, 4, 4, 4, 8),
        channels: Sequence[int] = (24, 48, 80, 128, 128, 256),
        expansions: Sequence[float] = (1, 4, 6, 3, 2, 5),
        block_ops: Sequence[str] = ("conv", "conv", "conv", "conv", "attn", "attn"),
        downsamples: Sequence[str] = ("l", "l", "l", "lg", "lg"),
        strides: Sequence[int] = (1, 2, 2, 2, 1, 2),
        stem_width: int = 32,
        head_width: int = 1280,
        head_dim: int = 32,
        init_values: float = 1e-6,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer=nn.LayerNorm,
        act_layer=nn.GELU,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        numbers = dict(repeats=repeats, channels=channels, expansions=expansions, strides=strides)
        _check_args(numbers, block_ops, downsamples, stem_width, head_dim)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_prefix_tokens = 0
        self.output_fmt = "NCHW"
        self.num_features = head_width
        # the only image size that works, where there is but one
        self.fixed_size = to_2tuple(img_size) if "mlp" in block_ops or "g" in downsamples else None
        if self.fixed_size is not None:
            self._traits = dict(fixed_input_size=True)  # for timm

        self.stem = ConvNormAct(in_chans, stem_width, 3, stride=2, padding=1, act_layer=act_layer, **dd)
        grids = _grids(img_size, strides)
        rates = calculate_drop_path_rates(drop_path_rate, list(repeats), stagewise=True)
        stages, self.feature_info, in_dim, reduction = [], [], stem_width, 2
        for s, (dim, stride) in enumerate(zip(channels, strides, strict=True)):
            downsample = nn.Identity()
            if s:
                kind = downsamples[s - 1]
                if kind == "l":
                    downsample = LocalDownsample(in_dim, dim, stride, **dd)
                elif kind == "lg":
                    downsample = LocalGlobalDownsample(in_dim, dim, stride, head_dim, norm_layer, **dd)
                else:
                    downsample = GlobalDownsample(in_dim, dim, stride, grids[s - 1], norm_layer, **dd)
                in_dim, stride = dim, 1
            blocks = []
            for rate in rates[s]:
                if block_ops[s] == "conv":
                    blocks.append(ConvBlock(in_dim, dim, expansions[s], stride, act_layer, drop_path=rate, **dd))
                    in_dim, stride = dim, 1
                    continue
                if block_ops[s] == "attn":
                    drops = dict(attn_drop=attn_drop_rate, proj_drop=proj_drop_rate)
                    mixer = Attention(dim, dim // head_dim, qkv_bias=True, **drops, **dd)
                else:
                    mixer = TokenMlp(math.prod(grids[s]), expansions[s], act_layer, drop=proj_drop_rate, **dd)
                layers = dict(act_layer=act_layer, norm_layer=norm_layer, proj_drop=proj_drop_rate, drop_path=rate)
                blocks.append(TokenBlock(dim, mixer, expansions[s], init_values, **layers, **dd))
            stages.append(Stage(downsample, blocks))
            reduction *= strides[s]
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{s}"))
        self.stages = nn.ModuleList(stages)
        self.final_conv = ConvNormAct(channels[-1], head_width, 1, act_layer=act_layer, **dd)
        self.head = ClassifierHead(head_width, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        if not is_meta_device(device):
            self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise: linear layers truncated normal (.02), convolutions by fan-out, conv blocks as the identity.

        Args:
            needs_reset: also reset norms and layer scales, as is needed after `to_empty`.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            elif needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ConvBlock):
                nn.init.zeros_(module.conv[-1].weight)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^stem",
            blocks=[
                (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^final_conv", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None) -> None:
        """Record another image size.

        Args:
            img_size: int or (height, width); None keeps the size.
            patch_size: None, or the stem's stride, 2, which cannot be changed.

        Raises:
            ValueError: the network has operators that are made for one size, or `patch_size` is another one.
        """
        if patch_size is not None and to_2tuple(patch_size) != (2, 2):
            raise ValueError(f"patch_size={patch_size}: the stride of the stem is built in, 2.")
        if img_size is None:
            return
        if self.fixed_size is not None and to_2tuple(img_size) != self.fixed_size:
            raise ValueError(f"UniNet: the operators of this network are made for images of {self.fixed_size}.")
        update_model_input_size(self, to_2tuple(img_size))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, keeping the pooling unless another is named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Return the map `[B, stem_width, H/2, W/2]`."""
        if self.fixed_size is not None:
            for i in range(2):
                _assert(x.shape[i + 2] == self.fixed_size[i], f"this network is made for images of {self.fixed_size}")
        return self.stem(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the map `[B, num_features, H/32, W/32]` of the last convolution."""
        x = self.forward_stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.final_conv(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the feature maps of the stages, as timm's `forward_intermediates`.

        Args:
            x: images `[B, in_chans, H, W]`.
            indices: last n stages if int, all if None, the listed ones if a sequence.
            norm: without effect: there is no final norm.
            stop_early: stop after the last wanted stage; the final output is then its map.
            output_fmt: 'NCHW'.
            intermediates_only: return only the list.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW'.")
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.forward_stem(x)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
            if stop_early and i == max_index:
                break
        if intermediates_only:
            return intermediates
        return self.final_conv(x) if i == len(self.stages) - 1 else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last wanted one, last convolution and head; return the indices of the kept taps."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or prune_end:
            self.final_conv = nn.Identity()
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_norm or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))


def _after(grid: Sequence[int], stride: int) -> tuple[int, int]:
    return math.ceil(grid[0] / stride), math.ceil(grid[1] / stride)


def _grids(img_size: int | Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Height and width of the map after each stage."""
    grid, grids = _after(to_2tuple(img_size), 2), []
    for stride in strides:
        grid = _after(grid, stride)
        grids.append(grid)
    return grids


def _check_args(
    numbers: dict[str, Sequence[float]],
    block_ops: Sequence[str],
    downsamples: Sequence[str],
    stem_width: int,
    head_dim: int,
) -> None:
    lengths = {name: len(values) for name, values in numbers.items()} | dict(block_ops=len(block_ops))
    if len({*lengths.values(), len(downsamples) + 1}) > 1:
        raise ValueError(
            "UniNet: one entry per stage is wanted in each list, and one less in downsamples, but lengths are "
            f"{lengths | dict(downsamples=len(downsamples))}."
        )
    for name, values in numbers.items():
        if any(v <= 0 for v in values):
            raise ValueError(f"UniNet: {name}={tuple(values)} must be positive.")
    channels, strides = numbers["channels"], numbers["strides"]
    for name, values, known in (("block_ops", block_ops, _OPS), ("downsamples", downsamples, _DOWNSAMPLES)):
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"UniNet: {name} has {unknown}; known are {known}.")
    for s, (op, dim) in enumerate(zip(block_ops, channels, strict=True)):
        with_heads = op == "attn" or (s > 0 and downsamples[s - 1] == "lg")
        if with_heads and dim % head_dim:
            raise ValueError(f"UniNet: stage {s} has attention, so its width {dim} must be a multiple of {head_dim}.")
    if block_ops[0] != "conv" and (channels[0] != stem_width or strides[0] != 1):
        raise ValueError(
            f"UniNet: a first stage of {block_ops[0]!r} cannot change width or resolution; it needs channels[0]="
            f"{stem_width} and strides[0]=1."
        )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: UniNet) -> dict[str, torch.Tensor]:
    """Map a released checkpoint (or ours) to this model's keys.

    The released layout is one list of downsampling modules and blocks in their order.
    """
    for wrapper in ("model", "state_dict"):
        state_dict = state_dict.get(wrapper, state_dict)
    state_dict = {k.removeprefix("module."): v for k, v in state_dict.items()}
    if "stem.0.weight" not in state_dict:
        return state_dict
    places = []
    for s, stage in enumerate(model.stages):
        places += [f"stages.{s}.downsample"] if s else []
        places += [f"stages.{s}.blocks.{i}" for i in range(len(stage.blocks))]
    names = {"b1": "expand", "b2": "conv", "residual": "shortcut", "downsample": "local", "pos_embed": "pos_conv"}
    names |= {"attn": "mixer", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    tops = {"stem.0": "stem.conv", "stem.1": "stem.bn", "head.0": "final_conv.conv", "head.1": "final_conv.bn"}
    tops["classifier"] = "head.fc"
    out = {}
    for k, v in state_dict.items():
        if m := re.match(r"blocks\.(\d+)\.(\w+)(.*)", k):
            place = places[int(m[1])] if int(m[1]) < len(places) else f"blocks.{m[1]}"
            k = f"{place}.{names.get(m[2], m[2])}{m[3]}"
        elif m := re.match(r"(stem\.\d|head\.\d|classifier)\.(.*)", k):
            k = f"{tops[m[1]]}.{m[2]}"
        out[k] = v
    return out


def _create_uninet(variant: str, pretrained: bool = False, **kwargs) -> UniNet:
    strides = kwargs.get("strides", (1, 2, 2, 2, 1, 2))
    # the last map of each resolution
    last = tuple(s for s in range(len(strides)) if s + 1 == len(strides) or strides[s + 1] > 1)
    out_indices = kwargs.pop("out_indices", last)
    return build_model_with_cfg(
        UniNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


def _cfg(img_size: int = 224, **kwargs) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, img_size, img_size),
        "pool_size": (img_size // 32, img_size // 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2207.05420",
        "paper_name": "UniNet: Unified Architecture Search with Convolution, Transformer, and MLP",
        "origin_url": "https://github.com/Sense-X/UniNet",
        **kwargs,
    }


_SIZES = (160, 224, 256, 288, 320, 384, 448)
default_cfgs = generate_default_cfgs(
    {**{f"uninet_b{i}": _cfg(size) for i, size in enumerate(_SIZES)}, "uninet": _cfg()},
)

_B0 = dict(repeats=(1, 2, 4, 4, 4, 8), channels=(24, 48, 80, 128, 128, 256))
_B2 = dict(_B0, repeats=(2, 3, 6, 6, 6, 12))
_B3 = dict(repeats=(2, 3, 7, 7, 7, 14), channels=(24, 56, 96, 160, 160, 288))
_B4 = dict(repeats=(2, 4, 9, 9, 9, 18), channels=(32, 64, 112, 192, 192, 352))
_B5 = dict(repeats=(3, 5, 10, 10, 10, 20), channels=(32, 64, 112, 224, 224, 448))
_B6 = dict(repeats=(4, 6, 12, 12, 12, 24), channels=(48, 96, 160, 256, 256, 512))


@register_model
def uninet_b0(pretrained=False, **kwargs) -> UniNet:
    """UniNet-B0 for 160 px: 11.5M parameters, 0.54 GMACs."""
    return _create_uninet("uninet_b0", pretrained, **dict(_B0, **kwargs))


@register_model
def uninet_b1(pretrained=False, **kwargs) -> UniNet:
    """UniNet-B1 for 224 px: 11.5M parameters, 1.1 GMACs."""
    return _create_uninet("uninet_b1", pretrained, **dict(_B0, **kwargs))


@register_model
def uninet_b2(pretrained=False, **kwargs) -> UniNet:
    """UniNet-B2 for 256 px: 16.2M parameters, 2.1 GMACs."""
    return _create_uninet("uninet_b2", pretrained, **dict(_B2, **kwargs))


@register_model
def uninet_b3(pretrained=False, **kwargs) -> UniNet:
    """UniNet-B3 for 288 px: 24.0M parameters, 4.2 GMACs."""
    return _create_uninet("uninet_b3", pretrained, **dict(_B3, **kwargs))


@register_model
def uninet_b4(pretrained=False, **kwargs) -> UniNet:
    """UniNet-B4 for 320 px: 43.8M parameters, 9.3 GMACs."""
    return _create_uninet("uninet_b4", pretrained, **dict(_B4, **kwargs))


@register_model
def uninet_b5(pretrained=False, **kwargs) -> UniNet:
    """UniNet-B5 for 384 px: 72.9M parameters, 20.2 GMACs."""
    return _create_uninet("uninet_b5", pretrained, **dict(_B5, **kwargs))


@register_model
def uninet_b6(pretrained=False, **kwargs) -> UniNet:
    """UniNet-B6 for 448 px: 116.7M parameters, 50.5 GMACs."""
    return _create_uninet("uninet_b6", pretrained, **dict(_B6, **kwargs))


@register_model
def uninet(pretrained=False, **kwargs) -> UniNet:
    """Any configuration, by the arguments of `UniNet`; without any, the network of B0 with fewer blocks."""
    model_args = dict(_B0, repeats=(1, 1, 2, 2, 2, 2))
    return _create_uninet("uninet", pretrained, **dict(model_args, **kwargs))
