"""AutoFormer: plain vision transformers with their own heads and MLP ratio in each layer.

Paper: "AutoFormer: Searching Transformers for Visual Recognition" - https://arxiv.org/abs/2107.00651
Origin of the architectures: https://github.com/microsoft/Cream (facts only, no code)

Attention has relative positions in two dimensions, contextual, on keys and on values: for a query at row r and column
c and a key at row r' and column c', R = vertical[r' - r] + horizontal[c' - c], distances clamped to a maximum, one
entry for pairs with the class token, shared by all heads; logits are (q k + q R_K) / sqrt(head_dim), the output is
attn v + attn R_V. What differs from the released code, none of it in what a network computes: queries, keys and values
are stacked as timm does (released weights interleave their rows; `checkpoint_filter_fn` sorts them), grids need not be
square, relative positions are left out of weight decay, and fused attention is used (see `RelPosAttention`).

The paper distils without a token, by hard labels of a teacher, which any of `timm.task`'s losses does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    is_meta_device,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    named_apply,
    register_model,
    register_notrace_function,
)
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.vision_transformer import init_weights_vit_moco
from torch import nn

from ..arch import ArchError
from .grid import checkpoint_grid

__all__ = [
    "AutoFormer",
    "RelPosAttention",
    "check_grid",
    "check_layers",
    "checkpoint_filter_fn",
    "default_layers",
    "mlp_hidden",
    "relative_positions",
]

QKV_BIAS_LAYOUTS = ("prefix", "interleaved")
WEIGHT_INITS = ("", "moco")

# leaves of fx graphs also where another module's forward calls them
torch.fx.wrap("resample_abs_pos_embed")
torch.fx.wrap("relative_positions")


@register_notrace_function
def relative_positions(
    x: torch.Tensor, height: int, width: int, reach: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Relative positions of a class token and a grid of patches.

    Args:
        x: For its device and dtype.
        height: Rows of the grid, H.
        width: Its columns, W; patches are numbered row by row, the class token is before them: N = 1 + H * W.
        reach: Largest distance m; greater ones are clamped to it.

    Returns:
        Index of the vertical table for each query and row of keys [N, H], index of the horizontal one for each query
        and column of keys [N, W], both 0 for the class token; and for each key its row, its column, and whether it is
        the class token, as 0 and 1 [N, H + W + 1].
    """
    row, col = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    rows = (row[None, :] - row[:, None]).clamp(-reach, reach) + reach + 1
    cols = (col[None, :] - col[:, None]).clamp(-reach, reach) + reach + 1
    rows = F.pad(rows.repeat_interleave(width, dim=0), (0, 0, 1, 0))
    cols = F.pad(cols.repeat(height, 1), (0, 0, 1, 0))
    place = torch.arange(height + width + 1, device=x.device)[None, :]
    patch = torch.arange(height * width, device=x.device)[:, None]
    on_row_or_col = (place == patch // width) | (place == height + patch % width)
    places = torch.cat([place == height + width, on_row_or_col]).to(x.dtype)
    return rows, cols, places


class RelativePosition(nn.Module):
    """Tables of relative positions up to ``reach`` rows and columns away, [2 * reach + 2, dim] each.

    Entry 0 is for pairs with the class token, entry reach + 1 + d for a distance d.
    """

    def __init__(self, reach: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.vertical = nn.Parameter(torch.empty(2 * reach + 2, dim, device=device, dtype=dtype))
        self.horizontal = nn.Parameter(torch.empty(2 * reach + 2, dim, device=device, dtype=dtype))

    def forward(self, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
        """What each query has for each row of keys, each column, and the class token, [N, H + W + 1, dim]."""
        both = (self.vertical[:1] + self.horizontal[:1]).expand(rows.shape[0], 1, -1)
        return torch.cat([F.embedding(rows, self.vertical), F.embedding(cols, self.horizontal), both], dim=1)

    def pairs(self, rows: torch.Tensor, cols: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """What each query has for each key, [N, N, dim]."""
        height = rows.shape[1]
        row, col = places[1:, :height].argmax(dim=1), places[1:, height:-1].argmax(dim=1)  # of each patch
        rows, cols = F.pad(rows[:, row], (1, 0)), F.pad(cols[:, col], (1, 0))
        return F.embedding(rows, self.vertical) + F.embedding(cols, self.horizontal)


class RelPosAttention(nn.Module):
    """Self-attention with 2-D relative positions on keys and values; its width is independent of ``dim``.

    The paper's form makes [N, N, head_dim] tables and two products with them. A relative position is a sum over the
    key's row and column, so the same is ordinary attention with H + W + 1 more channels: of a query, its products with
    what it has for each row, each column and the class token; of a key, and of a value, which of these it is. That
    runs as fused attention; MACs are counted for the paper's form.

    Args:
        dim: Input and output channels.
        num_heads: Number of heads.
        head_dim: Channels of a head.
        reach: Largest relative distance; None for attention without relative positions.
        attn_drop: Dropout rate of attention weights.
        proj_drop: Dropout rate of the output.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        reach: int | None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, **dd)
        self.rel_pos_k = None if reach is None else RelativePosition(reach, head_dim, **dd)
        self.rel_pos_v = None if reach is None else RelativePosition(reach, head_dim, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(num_heads * head_dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, qkv: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """[B, N, 3 * heads * head_dim] -> [B, N, heads * head_dim], for any number of heads."""
        B, N, _ = qkv.shape  # torch's older ONNX exporter takes sizes inside unflatten for constants
        q, k, v = qkv.reshape(B, N, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            if self.rel_pos_k is not None and self.rel_pos_v is not None:
                where = places.to(q.dtype).expand(qkv.shape[0], q.shape[1], -1, -1)
                q = torch.cat([q, torch.einsum("bhnd,nsd->bhns", q, self.rel_pos_k(rows, cols))], dim=-1)
                k, v = torch.cat([k, where], dim=-1), torch.cat([v, where], dim=-1)
            drop = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
            if self.rel_pos_k is not None and self.rel_pos_v is not None:
                x, where = x[..., : self.head_dim], x[..., self.head_dim :]
                x = x + torch.einsum("bhns,nsd->bhnd", where, self.rel_pos_v(rows, cols))
        else:
            attn = q @ k.transpose(-2, -1)
            if self.rel_pos_k is not None:
                attn = attn + torch.einsum("bhqd,qkd->bhqk", q, self.rel_pos_k.pairs(rows, cols, places))
            attn = self.attn_drop((attn * self.scale).softmax(dim=-1))
            x = attn @ v
            if self.rel_pos_v is not None:
                x = x + torch.einsum("bhqk,qkd->bhqd", attn, self.rel_pos_v.pairs(rows, cols, places))
        return x.transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """[B, N, dim] -> [B, N, dim]; the others as `relative_positions` returns them."""
        return self.proj_drop(self.proj(self.attend(self.qkv(x), rows, cols, places)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        mlp_hidden: int,
        reach: int | None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = RelPosAttention(dim, num_heads, head_dim, reach, attn_drop, proj_drop, **dd)
        self.ls1 = nn.Identity()  # a supernet may scale its branches
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, mlp_hidden, drop=proj_drop, **dd)
        self.ls2 = nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), rows, cols, places)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


def mlp_hidden(embed_dim: int, mlp_ratio: float) -> int:
    """Hidden units of an MLP, truncated as the paper's."""
    return int(embed_dim * mlp_ratio)


def check_layers(
    embed_dim: Any, mlp_ratio: Any, num_heads: Any, depth: Any = None
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """MLP ratio and heads of each layer, from one value each or a list.

    Raises:
        ArchError: A value is not a positive number of its kind, or the lists and ``depth`` are not equally long.
    """

    def integer(value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 16:
            raise ArchError(f"{name} must be a positive integer, got {value!r:.40}")
        return value

    lists = {"mlp_ratio": mlp_ratio, "num_heads": num_heads}
    given = {name: tuple(value) for name, value in lists.items() if isinstance(value, list | tuple)}
    lengths = {**({} if depth is None else {"depth": integer(depth, "depth")}), **{n: len(v) for n, v in given.items()}}
    if len(set(lengths.values())) != 1 or not 1 <= min(lengths.values()) <= 1000:
        got = ", ".join(f"{name} {n}" for name, n in lengths.items()) or "none of them"
        raise ArchError(
            f"depth (from 1 to 1000), or a list of mlp_ratio or num_heads, says how many layers there are, and they "
            f"must agree; got {got}"
        )
    count = next(iter(lengths.values()))
    ratios, heads = (given.get(name, (value,) * count) for name, value in lists.items())
    integer(embed_dim, "embed_dim")
    for ratio in ratios:
        good = isinstance(ratio, int | float) and not isinstance(ratio, bool) and 0 < ratio <= 64
        if not good or not mlp_hidden(embed_dim, ratio):
            raise ArchError(
                f"mlp_ratio must be a number up to 64 that gives at least one hidden unit, got {ratio!r:.40}"
            )
    return tuple(float(r) for r in ratios), tuple(integer(h, "num_heads") for h in heads)


def default_layers(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `autoformer`, completed by those of a network of 12 layers of width 192."""
    args = {k: v for k, v in args.items() if v is not None}
    lists = [name for name in ("mlp_ratio", "num_heads") if isinstance(args.get(name), list | tuple)]
    return {**dict(embed_dim=192, mlp_ratio=4.0, num_heads=3), **({} if lists else dict(depth=12)), **args}


class AutoFormer(nn.Module):
    """A network of the AutoFormer family.

    Args:
        embed_dim: Channels of all layers.
        mlp_ratio: Hidden units of each layer's MLP per channel: a list, or one number for all layers.
        num_heads: Heads of each layer: a list, or one number for all layers.
        depth: Number of layers, where neither is a list.
        img_size: Image size, one number or (height, width); a multiple of the patch size.
        patch_size: Pixels per patch.
        in_chans: Number of image channels.
        num_classes: Number of classes, 0 for no classifier.
        global_pool: 'avg' (mean of the patch tokens, the paper's), 'token' (class token), '' (none).
        head_dim: Channels of a head, the same whatever the width.
        rel_pos: Relative positions in attention, beside the position embedding.
        max_relative_position: Their largest distance, in rows and in columns; greater ones are clamped to it.
        qkv_bias_layout: Which bias a layer with fewer heads takes of a released checkpoint's, or of a supernet's, for
            queries, keys and values: 'prefix' the first entries of all, cut in thirds, as the released supernets were
            trained; 'interleaved' those of the heads that stay. It matters to sub-networks only.
        weight_init: '' (normal with std .02, the paper's) or 'moco' (timm's Xavier uniform), with which networks of
            some tens of channels learn sooner.
        dynamic_img_size: Take images of any size that the patch size divides; the position embedding is resampled in
            each forward pass, with the output that `set_input_size` would give.
        drop_rate: Dropout rate before the classifier.
        pos_drop_rate: Dropout rate after the position embedding.
        proj_drop_rate: Dropout rate after attention and MLP layers.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Stochastic depth rate of the last layer, growing linearly from 0.

    Raises:
        ArchError: The architecture is malformed or the image size is not a multiple of the patch size.
        ValueError: An argument has none of its values.
    """

    dynamic_img_size: torch.jit.Final[bool]

    def __init__(
        self,
        embed_dim: int,
        mlp_ratio: float | Sequence[float],
        num_heads: int | Sequence[int],
        depth: int | None = None,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        head_dim: int = 64,
        rel_pos: bool = True,
        max_relative_position: int = 14,
        qkv_bias_layout: str = "prefix",
        weight_init: str = "",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        ratios, heads = check_layers(embed_dim, mlp_ratio, num_heads, depth)
        if qkv_bias_layout not in QKV_BIAS_LAYOUTS:
            raise ValueError(f"qkv_bias_layout must be 'prefix' or 'interleaved', got {qkv_bias_layout!r:.40}")
        self.mlp_ratios, self.depth = ratios, len(ratios)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_prefix_tokens = 1
        self.head_dim = head_dim
        self.rel_pos = rel_pos
        self.max_relative_position = max_relative_position
        if rel_pos and max_relative_position < 1:
            raise ValueError(f"max_relative_position must be at least 1, got {max_relative_position!r:.40}")
        if weight_init not in WEIGHT_INITS:
            raise ValueError(f"weight_init must be '' or 'moco', got {weight_init!r:.40}")
        self.qkv_bias_layout = qkv_bias_layout
        self.weight_init = weight_init
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.global_pool = ""
        self._set_global_pool(global_pool)

        self.patch_embed = PatchEmbed(
            check_grid(img_size, patch_size),
            patch_size,
            in_chans,
            embed_dim,
            strict_img_size=not dynamic_img_size,
            **dd,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches + 1, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = calculate_drop_path_rates(drop_path_rate, self.depth)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num,
                head_dim,
                mlp_hidden(embed_dim, ratio),
                max_relative_position if rel_pos else None,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rate,
                **dd,
            )
            for num, ratio, rate in zip(heads, ratios, rates, strict=True)
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=reduction, module=f"blocks.{i}") for i in range(self.depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        if not is_meta_device(device):
            self.init_weights(needs_reset=False)

    def _set_global_pool(self, global_pool: str) -> None:
        if global_pool not in ("", "token", "avg"):
            raise ValueError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r:.40}")
        self.global_pool = global_pool

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Linear layers as ``weight_init`` says, tokens and tables normal with std .02, the rest as torch's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, RelativePosition):
                trunc_normal_(module.vertical, std=0.02)
                trunc_normal_(module.horizontal, std=0.02)
            elif needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if self.weight_init == "moco":
            named_apply(init_weights_vit_moco, self)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {n for n, _ in self.named_parameters() if n in ("cls_token", "pos_embed") or ".rel_pos_" in n}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^cls_token|pos_embed|patch_embed",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifier for ``num_classes`` (0: none), on the model's device, dtype and training mode."""
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.num_classes = num_classes
        head = nn.Identity()
        if num_classes > 0:
            head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self))
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.train(self.training)

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Resample the position embedding for another image size, the patch embedding for another patch size.

        Relative positions stay: distances in patches are what they were, those beyond the tables are clamped.

        Args:
            img_size: One number or (height, width); None keeps the size.
            patch_size: One number or (height, width); None keeps the size.

        Raises:
            ArchError: The image size is not a multiple of the patch size.
        """
        old_size = list(self.patch_embed.grid_size)
        img_size = check_grid(
            self.patch_embed.img_size if img_size is None else img_size, patch_size or self.patch_embed.patch_size
        )
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        new_size = list(self.patch_embed.grid_size)
        if new_size != old_size:
            with torch.no_grad():
                pos_embed = resample_abs_pos_embed(self.pos_embed, new_size, old_size=old_size)
            self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        update_model_input_size(self, img_size, patch_size=patch_size)

    def _grid(self, x: torch.Tensor) -> tuple[int, int]:
        """Height and width of the grid for images [B, C, H, W]."""
        if self.dynamic_img_size:
            return self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        return self.patch_embed.grid_size

    def _embed(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, C, H, W] -> class and patch tokens with their position embedding, [B, N, C]."""
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = resample_abs_pos_embed(pos_embed, [grid[0], grid[1]], self.patch_embed.grid_size)
        x = self.patch_embed(x)
        return self.pos_drop(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + pos_embed)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> normalised tokens, the class token first, [B, N, C]."""
        grid = self._grid(x)
        x = self._embed(x, grid)
        rows, cols, places = relative_positions(x, grid[0], grid[1], self.max_relative_position)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, rows, cols, places)
            else:
                x = block(x, rows, cols, places)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Class logits from the tokens of `forward_features`."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Patch tokens after layers.

        Args:
            x: Images [B, C, H, W].
            indices: Take the last n layers if int, all if None, the given layers if a sequence.
            norm: Apply the final norm to them.
            stop_early: Stop at the last wanted layer.
            output_fmt: 'NCHW' or 'NLC'.
            intermediates_only: Return the intermediates only.

        Returns:
            The intermediates, or (tokens as `forward_features` returns them, intermediates).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, max_index = feature_take_indices(len(self.blocks), indices)
        grid = self._grid(x)
        x = self._embed(x, grid)
        positions = relative_positions(x, grid[0], grid[1], self.max_relative_position)
        intermediates = []
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, *positions) if self.grad_checkpointing else block(x, *positions)
            if i in take:
                y = (self.norm(x) if norm else x)[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    y = y.transpose(1, 2).reshape(y.shape[0], -1, *grid)
                intermediates.append(y)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the wanted layers do not need; returns the taken indices."""
        take, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


def check_grid(img_size: int | Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of an image.

    Raises:
        ArchError: It is not a multiple of the patch size.
    """
    sides = tuple(to_2tuple(img_size))
    if any(side % patch or side < patch for side, patch in zip(sides, to_2tuple(patch_size), strict=True)):
        raise ArchError(f"image size {'x'.join(map(str, sides))} is not a multiple of the patch size {patch_size}")
    return sides


_RELEASED_NAMES = {
    "patch_embed_super.": "patch_embed.",
    ".attn_layer_norm.": ".norm1.",
    ".ffn_layer_norm.": ".norm2.",
    ".fc1.": ".mlp.fc1.",
    ".fc2.": ".mlp.fc2.",
    ".rel_pos_embed_k.embeddings_table_v": ".rel_pos_k.vertical",
    ".rel_pos_embed_k.embeddings_table_h": ".rel_pos_k.horizontal",
    ".rel_pos_embed_v.embeddings_table_v": ".rel_pos_v.vertical",
    ".rel_pos_embed_v.embeddings_table_h": ".rel_pos_v.horizontal",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: AutoFormer) -> dict[str, torch.Tensor]:
    """Fit a checkpoint to a model: the released layout or ours, wrapped or not, at another image size.

    A released supernet's checkpoint fits each of its sub-networks: the model takes the first channels, heads and
    hidden units of each layer, and the first layers. Tables of relative positions of another length are continued by
    their last entries, which is what clamping to the old length computes, or cut.

    Raises:
        ValueError: Nothing says for what grid the position embedding was made, see `checkpoint_grid`.
    """
    for wrapper in ("model_ema", "model", "state_dict"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    released = any(key.startswith("patch_embed_super.") for key in state_dict)
    own = model.state_dict()
    out = {}
    for key, value in state_dict.items():
        if released:
            for old, new in _RELEASED_NAMES.items():
                key = key.replace(old, new)
            if key.startswith("blocks.") and int(key.split(".")[1]) >= len(model.blocks):
                continue
        if ".rel_pos_" in key and key in own:
            value = _fit_reach(value, own[key].shape[0])
        if key == "pos_embed":
            grid = model.patch_embed.grid_size
            old_size = checkpoint_grid(model, value.shape[1] - 1, model.patch_embed.patch_size, grid)
            value = resample_abs_pos_embed(value, list(grid), list(old_size))
        if released and key in own:
            value = _first(key, value, own[key], model.qkv_bias_layout)
        out[key] = value
    return out


def _first(key: str, value: torch.Tensor, own: torch.Tensor, qkv_bias_layout: str) -> torch.Tensor:
    """The part of a released supernet's parameter that a network's own takes."""
    if key.startswith("head.") or key == "patch_embed.proj.weight":
        dim = 1 if key.startswith("head.") else 0  # neither classes nor image channels and pixels
        return value if dim >= value.ndim else value.narrow(dim, 0, min(own.shape[dim], value.shape[dim]))
    if key.endswith("attn.qkv.weight"):
        value = value.unflatten(0, (-1, 3)).transpose(0, 1)  # rows of q, k and v take turns
        return value[:, : own.shape[0] // 3, : own.shape[1]].flatten(0, 1)
    if key.endswith("attn.qkv.bias") and qkv_bias_layout == "interleaved":
        return value.unflatten(0, (3, -1))[:, : own.shape[0] // 3].flatten()
    return value[tuple(slice(n) for n in own.shape)]


def _fit_reach(table: torch.Tensor, length: int) -> torch.Tensor:
    """A table of relative positions for another largest distance, [length, dim]."""
    old, new = table.shape[0] // 2 - 1, length // 2 - 1
    if old == new:
        return table
    distance = torch.arange(-new, new + 1, device=table.device).clamp(-old, old)
    return table[torch.cat([distance.new_zeros(1), distance + old + 1])]


def _create_autoformer(variant: str, pretrained: bool = False, **kwargs) -> AutoFormer:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        AutoFormer,
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
        "pool_size": (14, 14),
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2107.00651",
        "paper_name": "AutoFormer: Searching Transformers for Visual Recognition",
        "origin_url": "https://github.com/microsoft/Cream",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "autoformer_tiny": _cfg(),
        "autoformer_small": _cfg(),
        "autoformer_base": _cfg(),
        "autoformer": _cfg(),
    }
)


@register_model
def autoformer_tiny(pretrained: bool = False, **kwargs) -> AutoFormer:
    """AutoFormer-T as searched by the paper: 5.9 M parameters, 1.48 GMACs."""
    model_args = dict(
        embed_dim=192,
        mlp_ratio=[3.5, 3.5, 3, 3.5, 3, 3, 4, 4, 3.5, 4, 3.5, 4, 3.5],
        num_heads=[3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3],
    )
    return _create_autoformer("autoformer_tiny", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def autoformer_small(pretrained: bool = False, **kwargs) -> AutoFormer:
    """AutoFormer-S as searched by the paper: 22.9 M parameters, 5.16 GMACs."""
    model_args = dict(
        embed_dim=384,
        mlp_ratio=[3, 3.5, 3, 3.5, 4, 4, 4, 4, 4, 4, 4, 3.5, 4],
        num_heads=[6, 6, 5, 7, 5, 5, 5, 6, 6, 7, 7, 6, 7],
    )
    return _create_autoformer("autoformer_small", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def autoformer_base(pretrained: bool = False, **kwargs) -> AutoFormer:
    """AutoFormer-B as searched by the paper: 53.7 M parameters, 11.69 GMACs."""
    model_args = dict(
        embed_dim=576,
        mlp_ratio=[3.5, 3.5, 4, 3.5, 4, 3.5, 3.5, 3, 4, 4, 3, 4, 3, 3.5],
        num_heads=[9, 9, 9, 9, 9, 10, 9, 9, 10, 9, 10, 9, 9, 10],
    )
    return _create_autoformer("autoformer_base", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def autoformer(pretrained: bool = False, **kwargs) -> AutoFormer:
    """Any architecture of the family: ``embed_dim``, ``mlp_ratio`` and ``num_heads`` of each layer, ``depth``.

    What is not given is that of a network of 12 layers of width 192, 3 heads and MLP ratio 4 (5.6 M parameters).
    """
    return _create_autoformer("autoformer", pretrained=pretrained, **default_layers(kwargs))
