"""SepViT: Separable Vision Transformer.

Paper: `SepViT: Separable Vision Transformer` - https://arxiv.org/abs/2203.15380
Origin: https://github.com/liwei109/SepViT (version 4 of the paper)

A four-stage pyramid. Attention is separable as a convolution can be: inside each window of the map ("depth-wise", with
one learned token per window among the keys), then between windows ("point-wise", queries and keys from the window
tokens, values the whole windows). Some blocks join 2x2 windows (grouped attention), which is the same module with a
larger window.

Beyond the released code, which is for 224 pixels only:

* Any image size works. The map is padded to whole windows; padding is never a key, and is zero where windows are mixed.
  The table of window tokens is stored as a map `[1, C, rows, columns]` of windows and resampled.
* `checkpoint_filter_fn` maps the released layout. A block whose window covers the map has neither window tokens nor
  attention between windows, as in the released code.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm,
    LayerNorm2d,
    Mlp,
    calculate_drop_path_rates,
    get_device_dtype,
    is_meta_device,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import nn

from .sret import resample_pos_embed

__all__ = ["SepVit"]

_NORM = partial(LayerNorm, eps=1e-6)


@register_notrace_module
class SeparableAttention(nn.Module):
    """Attention inside windows, then between them (paper: depth-wise separable self-attention).

    Both parts add their own input to their output; there is one projection, at the end.

    Args:
        window: side of a window; 0 for one window over the whole map.
        between: whether there is attention between windows. Without it, attention is over the whole map.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        between: bool,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.window = window
        self.fused_attn = use_fused_attn()

        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        if between:
            self.win_norm = LayerNorm(dim, eps=1e-5, **dd)  # the blocks' norms have 1e-6
            self.win_act = nn.GELU()
            self.win_qk = nn.Linear(dim, dim * 2, bias=qkv_bias, **dd)
        else:
            self.win_norm = self.win_act = self.win_qk = None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention over `[B, heads, N, d]`; `mask` is True at keys that count."""
        if self.fused_attn:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=self.attn_drop.p if self.training else 0.0
            )
        attn = (q * self.scale) @ k.transpose(-2, -1)
        if mask is not None:
            attn = attn.masked_fill(~mask, -math.inf)
        return self.attn_drop(attn.softmax(dim=-1)) @ v

    def attend_within(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Self-attention plus shortcut over the tokens `[B, N, C]` of windows."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.attend(q, k, v, mask).transpose(1, 2).reshape(B, N, C)

    def attend_between(self, tokens: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Mix the windows `maps` `[B, windows, N, C]` by their `tokens` `[B, windows, C]`, plus shortcut."""
        if self.win_norm is None or self.win_act is None or self.win_qk is None:
            return maps
        B, n, N, C = maps.shape
        qk = self.win_qk(self.win_act(self.win_norm(tokens)))
        q, k = qk.reshape(B, n, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        v = maps.reshape(B, n, N, self.num_heads, self.head_dim).permute(0, 3, 1, 2, 4).flatten(3)
        mixed = self.attend(q, k, v, None).reshape(B, self.num_heads, n, N, self.head_dim)
        return maps + mixed.permute(0, 2, 3, 1, 4).reshape(B, n, N, C)

    def attend_windows(self, x: torch.Tensor, win_tokens: torch.Tensor) -> torch.Tensor:
        """Both parts over a map `[B, H, W, C]`, with a token per window `[1, rows, columns, C]`."""
        B, H, W, C = x.shape
        w = self.window
        rows, cols = win_tokens.shape[1], win_tokens.shape[2]
        n, pad_h, pad_w = rows * cols, rows * w - H, cols * w - W

        inside: torch.Tensor | None = None
        mask: torch.Tensor | None = None
        if pad_h > 0 or pad_w > 0:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
            inside = F.pad(torch.ones(H, W, dtype=torch.bool, device=x.device), (0, pad_w, 0, pad_h))
            inside = inside.reshape(rows, w, cols, w).transpose(1, 2).reshape(n, w * w)
            mask = F.pad(inside, (1, 0), value=1.0).repeat(B, 1)[:, None, None]

        x = x.reshape(B, rows, w, cols, w, C).transpose(2, 3).reshape(B * n, w * w, C)
        tokens = win_tokens.reshape(1, n, C).expand(B, -1, -1).reshape(B * n, 1, C)
        x = self.attend_within(torch.cat([tokens, x], dim=1), mask).reshape(B, n, 1 + w * w, C)
        tokens, maps = x[:, :, 0], x[:, :, 1:]
        if inside is not None:
            maps = maps * inside[:, :, None]
        x = self.attend_between(tokens, maps)
        x = x.reshape(B, rows, cols, w, w, C).transpose(2, 3).reshape(B, rows * w, cols * w, C)
        return x[:, :H, :W]

    def forward(self, x: torch.Tensor, win_tokens: torch.Tensor | None = None) -> torch.Tensor:
        B, H, W, C = x.shape
        if win_tokens is not None and win_tokens.shape[1] * win_tokens.shape[2] > 1:
            x = self.attend_windows(x, win_tokens)
        else:
            x = self.attend_within(x.reshape(B, H * W, C), None).reshape(B, H, W, C)
            if self.training and win_tokens is not None:
                # a single window mixes with no other: zero gradients, as training on several devices wants some
                x = x + 0.0 * self.attend_between(win_tokens.flatten(1, 2), win_tokens.flatten(1, 2)[:, :, None]).sum()
        return self.proj_drop(self.proj(x))


class SepVitBlock(nn.Module):
    """Separable attention and an MLP over a map `[B, H, W, C]`.

    Args:
        win_grid: rows and columns of windows of the model's own image size, or None for attention over the whole map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        win_grid: tuple[int, int] | None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer=_NORM,
        act_layer=nn.GELU,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.window = window
        self.win_tokens = nn.Parameter(torch.zeros(1, dim, *win_grid, **dd)) if win_grid is not None else None
        self.norm1 = norm_layer(dim, **dd)
        self.attn = SeparableAttention(
            dim,
            num_heads,
            window,
            between=win_grid is not None,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **dd,
        )
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.win_tokens
        if tokens is not None:
            rows, cols = (x.shape[1] - 1) // self.window + 1, (x.shape[2] - 1) // self.window + 1
            tokens = self.norm1(resample_pos_embed(tokens, rows, cols).permute(0, 2, 3, 1))
        x = x + self.drop_path(self.attn(self.norm1(x), tokens))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Overlapping patch embedding, then blocks with a convolutional position encoding after the first."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int, blocks: list[SepVitBlock], **dd):
        super().__init__()
        self.downsample = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2, **dd)
        self.norm = LayerNorm(dim, eps=1e-5, **dd)  # the blocks' norms have 1e-6
        self.blocks = nn.ModuleList(blocks)
        self.pos_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.downsample(x).permute(0, 2, 3, 1))
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i == 0:
                x = x + self.pos_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x.permute(0, 3, 1, 2).contiguous()


class SepVit(nn.Module):
    """Separable Vision Transformer (https://arxiv.org/abs/2203.15380).

    Args:
        img_size: image size (int or height, width) that the tables of window tokens are made for. Other sizes work
            too: the tables are resampled.
        global_pool: 'avg', 'max', 'avgmax' or ''; after the last norm.
        embed_dims: width of each stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window_sizes: sides of the windows, a list per stage that its blocks go through in turn. 0 is one window over
            the whole map, at any image size; so is a window that covers the map at `img_size`.
        mlp_ratio: hidden width of the MLPs over the stage's width.

    Raises:
        ValueError: lists of different lengths, a width that heads do not divide, a negative window.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (1, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        window_sizes: Sequence[Sequence[int]] = ((7,), (7, 14), (7, 0), (0,)),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer=_NORM,
        act_layer=nn.GELU,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        _check_args(embed_dims, depths, num_heads, window_sizes)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_prefix_tokens = 0
        self.output_fmt = "NCHW"
        self.embed_dim = embed_dims[0]
        self.num_features = embed_dims[-1]

        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages, self.feature_info = [], []
        for s, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            reduction = 4 * 2**s
            windows = [window_sizes[s][i % len(window_sizes[s])] for i in range(depth)]
            blocks = [
                SepVitBlock(
                    dim,
                    num_heads[s],
                    window,
                    _win_grid(img_size, reduction, window),
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rate,
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    **dd,
                )
                for window, rate in zip(windows, rates[s], strict=True)
            ]
            in_dim, kernel, stride = (embed_dims[s - 1], 3, 2) if s else (in_chans, 7, 4)
            stages.append(Stage(in_dim, dim, kernel, stride, blocks, **dd))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{s}"))
        self.stages = nn.ModuleList(stages)
        self.norm = LayerNorm2d(self.num_features, eps=1e-6, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        if not is_meta_device(device):
            self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the paper's code: linear layers by a truncated normal (.02), convolutions by their fan-out.

        Args:
            needs_reset: also reset the norms, as is needed after `to_empty`.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(module, SepVitBlock) and module.win_tokens is not None:
                nn.init.zeros_(module.win_tokens)
            elif needs_reset and isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".win_tokens")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^stages\.0\.(?:downsample|norm)",
            blocks=[
                (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.(?:downsample|norm|pos_conv)", (0,)),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None) -> None:
        """Resample the tables of window tokens for another image size.

        Blocks that attend to the whole map keep doing so.

        Args:
            img_size: int or (height, width); None keeps the size.
            patch_size: None, or the first stage's stride, 4, which cannot be changed.

        Raises:
            ValueError: `patch_size` is another one.
        """
        if patch_size is not None and to_2tuple(patch_size) != (4, 4):
            raise ValueError(f"patch_size={patch_size}: the stride of the patch embedding is built in, 4.")
        if img_size is None:
            return
        windows = []
        for stage, info in zip(self.stages, self.feature_info, strict=False):
            windows.append([])
            for block in stage.blocks:
                table = block.win_tokens
                if table is not None:
                    grid = _grid(img_size, info["reduction"] * block.window)
                    with torch.no_grad():
                        resampled = resample_pos_embed(table, *grid)
                    block.win_tokens = nn.Parameter(resampled, requires_grad=table.requires_grad)
                # a model made for the new size would have a table where the window no longer covers the map
                windows[-1].append(block.window if table is not None else 0)
        update_model_input_size(self, to_2tuple(img_size), window_sizes=windows)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, keeping the pooling unless another is named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last feature map `[B, C, H/32, W/32]`, normed."""
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

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
            norm: norm the last stage's map.
            stop_early: stop after the last wanted stage; the final output is then its map.
            output_fmt: 'NCHW'.
            intermediates_only: return only the list.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW'.")
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == last else x)
            if stop_early and i == max_index:
                break
        if intermediates_only:
            return intermediates
        return self.norm(x) if i == last else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last wanted one, norm and head; return the indices of the kept taps."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))


def _check_args(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_sizes: Sequence[Sequence[int]],
) -> None:
    if not len(embed_dims) == len(depths) == len(num_heads) == len(window_sizes):
        raise ValueError(
            "SepViT: embed_dims, depths, num_heads and window_sizes need one entry per stage, but have "
            f"{len(embed_dims)}, {len(depths)}, {len(num_heads)} and {len(window_sizes)}."
        )
    for values in (embed_dims, depths, num_heads):
        if any(v < 1 for v in values):
            raise ValueError(f"SepViT: embed_dims, depths and num_heads must be positive, got {tuple(values)}.")
    for dim, heads in zip(embed_dims, num_heads, strict=True):
        if dim % heads:
            raise ValueError(f"SepViT: {heads} heads do not divide a width of {dim}.")
    for windows in window_sizes:
        if len(windows) == 0 or any(w < 0 for w in windows):
            raise ValueError(
                f"SepViT: window_sizes={tuple(windows)} of a stage: one side or more, 0 for the whole map."
            )


def _grid(img_size: int | Sequence[int], side: int) -> tuple[int, int]:
    """Rows and columns of squares of `side` pixels that cover an image."""
    height, width = to_2tuple(img_size)
    return math.ceil(height / side), math.ceil(width / side)


def _win_grid(img_size: int | Sequence[int], reduction: int, window: int) -> tuple[int, int] | None:
    if window == 0:
        return None
    rows, cols = _grid(img_size, reduction * window)
    return (rows, cols) if rows * cols > 1 else None


def checkpoint_filter_fn(state_dict: dict[str, Any], model: SepVit) -> dict[str, torch.Tensor]:
    """Map a released checkpoint (or ours) to this model's keys and resample its window tokens.

    Window tokens and the layers that use them are left out where the model attends to the whole map.
    """
    for wrapper in ("model", "state_dict"):
        state_dict = state_dict.get(wrapper, state_dict)
    state_dict = {k.removeprefix("module."): v for k, v in state_dict.items()}
    layers = {"DSA_qkv": "qkv", "win_tokens_norm": "win_norm", "PSA_qk": "win_qk"}
    released = any(k.startswith("patch_embeds.") for k in state_dict)
    parameters, out = dict(model.named_parameters()), {}
    for k, v in state_dict.items():
        if released:
            if m := re.match(r"patch_embeds\.(\d+)\.(proj|norm)\.(.*)", k):
                k = f"stages.{m[1]}.{'downsample' if m[2] == 'proj' else 'norm'}.{m[3]}"
            elif m := re.match(r"pos_block\.(\d+)\.proj\.0\.(.*)", k):
                k = f"stages.{m[1]}.pos_conv.{m[2]}"
            elif m := re.match(r"blocks\.(\d+)\.(\d+)\.(.*)", k):
                name = re.sub(r"^attn\.(\w+)", lambda m: f"attn.{layers.get(m[1], m[1])}", m[3])
                k = f"stages.{m[1]}.blocks.{m[2]}.{name}"
            elif k.startswith("head."):
                k = k.replace("head.", "head.fc.")
        if k not in parameters and re.search(r"\.(win_tokens|attn\.win_norm\.\w+|attn\.win_qk\.\w+)$", k):
            continue
        if k.endswith(".win_tokens"):
            if released:
                side = math.isqrt(v.shape[1])  # the released code is for square images
                v = v.reshape(1, side, side, -1).permute(0, 3, 1, 2).contiguous()
            v = resample_pos_embed(v, *parameters[k].shape[2:])
        out[k] = v
    return out


def _create_sepvit(variant: str, pretrained: bool = False, **kwargs) -> SepVit:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["depths"]))))
    return build_model_with_cfg(
        SepVit,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


def _cfg(**kwargs) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stages.0.downsample",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2203.15380",
        "paper_name": "SepViT: Separable Vision Transformer",
        "origin_url": "https://github.com/liwei109/SepViT",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {name: _cfg() for name in ("sepvit_lite", "sepvit_tiny", "sepvit_small", "sepvit_base")}
)

# at 224 pixels the paper's windows of 14 in stage 3 and 7 in stage 4 cover the map, hence 0
_LITE = dict(
    embed_dims=(32, 64, 128, 256),
    depths=(1, 2, 6, 2),
    num_heads=(1, 2, 4, 8),
    window_sizes=((7,), (7, 14), (7, 0), (0,)),
)
_TINY = dict(_LITE, embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24))
_SMALL = dict(_TINY, depths=(1, 2, 14, 2))
_BASE = dict(_SMALL, embed_dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32))


@register_model
def sepvit_lite(pretrained=False, **kwargs) -> SepVit:
    """SepViT-Lite: 3.7M parameters, 0.6 GMACs."""
    return _create_sepvit("sepvit_lite", pretrained, **dict(_LITE, **kwargs))


@register_model
def sepvit_tiny(pretrained=False, **kwargs) -> SepVit:
    """SepViT-T: 31.2M parameters, 4.5 GMACs."""
    return _create_sepvit("sepvit_tiny", pretrained, **dict(_TINY, **kwargs))


@register_model
def sepvit_small(pretrained=False, **kwargs) -> SepVit:
    """SepViT-S: 46.6M parameters, 7.5 GMACs."""
    return _create_sepvit("sepvit_small", pretrained, **dict(_SMALL, **kwargs))


@register_model
def sepvit_base(pretrained=False, **kwargs) -> SepVit:
    """SepViT-B: 82.3M parameters, 13.1 GMACs."""
    return _create_sepvit("sepvit_base", pretrained, **dict(_BASE, **kwargs))
