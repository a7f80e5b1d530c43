"""ViT-ResNAS: multi-stage vision transformers with residual spatial reduction.

Paper: "Searching for Efficient Multi-Stage Vision Transformers" - https://arxiv.org/abs/2109.00642
Origin of the architectures: https://github.com/yilunliao/vit-search (facts only, no code)

A network is described by the paper's ``network_def`` (see `NetworkDef`). What differs from the released code, none of
it in what a network computes: position embeddings are excluded from weight decay, `reset_classifier`
builds heads of the last width, the residual padding follows device and dtype, dropout rates reach the layers that
they name, any image size that the total stride divides works (after `set_input_size`, or at once with
`dynamic_img_size`), and a distilled net returns the mean of its two heads in eval (as timm's deit does).
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    Attention,
    DropPath,
    Mlp,
    calculate_drop_path_rates,
    get_device_dtype,
    is_meta_device,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.layers.trace_utils import _assert
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import nn

from ..arch import Arch, ArchError
from .grid import checkpoint_grid
from .network_def import Block, NetworkDef, PatchEmbed, Reduction

__all__ = ["VitResNas", "checkpoint_filter_fn"]

torch.fx.wrap("resample_abs_pos_embed")  # a leaf of fx graphs also where another module's forward calls it


class ConvUnit(nn.Module):
    """3x3 convolution without bias, batch norm, ReLU."""

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chans, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class LinearPatchEmbed(nn.Module):
    """Patch embedding of type 0: one convolution as large as its stride. [B, C, H, W] -> [B, N, embed_dim]."""

    __jit_unused_properties__ = ["projection"]
    first_conv = "proj"

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, device=device, dtype=dtype)

    @property
    def projection(self) -> nn.Conv2d:
        """The convolution that produces the embedding; kernel equals stride."""
        return self.proj

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Input of :attr:`projection`."""
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ConvPatchEmbed(nn.Module):
    """Patch embedding of types 4 and 5: a residual convolutional stem at half resolution, then one convolution."""

    __jit_unused_properties__ = ["projection"]
    first_conv = "conv1.conv"

    def __init__(self, patch_size: int, in_chans: int, mid_dim: int, embed_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = ConvUnit(in_chans, mid_dim, stride=2, **dd)
        self.conv2 = ConvUnit(mid_dim, mid_dim, **dd)
        self.conv3 = ConvUnit(mid_dim, mid_dim, **dd)
        self.conv_proj = nn.Conv2d(mid_dim, embed_dim, patch_size // 2, stride=patch_size // 2, **dd)

    @property
    def projection(self) -> nn.Conv2d:
        """The convolution that produces the embedding; kernel equals stride."""
        return self.conv_proj

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Input of :attr:`projection`, [B, mid, H/2, W/2]; channels last, so that the projection yields tokens."""
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))
        return x + self.conv3(self.conv2(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_proj(self.stem(x)).flatten(2).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block whose attention and MLP widths are independent of ``dim``."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        mlp_hidden: int,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = Attention(
            dim, num_heads, attn_head_dim=head_dim, qkv_bias=True, attn_drop=attn_drop, proj_drop=proj_drop, **dd
        )
        self.ls1 = nn.Identity()  # a supernet may scale its branches
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, mlp_hidden, drop=proj_drop, **dd)
        self.ls2 = nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class SpatialReduction(nn.Module):
    """Residual spatial reduction (paper, section 3.2): half the side, more channels.

    One layer norm over all tokens; patches through a strided 3x3 convolution, plus a position embedding, prefix tokens
    through a linear layer. The residual is the input itself, patches average-pooled, channels zero-padded at the end.
    [B, T + H*W, in_dim] -> [B, T + H*W/4, out_dim]; H and W are the grid given to `forward`, by default `grid_size`.
    With ``dynamic_img_size`` the position embedding is resampled for other grids.
    """

    dynamic_img_size: torch.jit.Final[bool]

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid_size: tuple[int, int],
        num_prefix_tokens: int = 1,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dynamic_img_size = dynamic_img_size
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.height, self.width = grid_size  # of the input
        self.num_prefix_tokens = num_prefix_tokens
        self.norm = nn.LayerNorm(in_dim, eps=1e-6, **dd)
        self.patch_reduce = nn.Conv2d(in_dim, out_dim, 3, stride=2, padding=1, **dd)
        self.token_transform = nn.Linear(in_dim, out_dim, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size[0] * grid_size[1] // 4, out_dim, **dd))

    def to_map(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Patch tokens [B, H*W, C] as a map [B, C, H, W]."""
        if grid is None:
            grid = (self.height, self.width)
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], grid[0], grid[1])

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        pos_embed = self.pos_embed
        if self.dynamic_img_size and grid is not None:
            new_size, old_size = [grid[0] // 2, grid[1] // 2], [self.height // 2, self.width // 2]
            pos_embed = resample_abs_pos_embed(pos_embed, new_size, old_size, num_prefix_tokens=0, antialias=False)
        shortcut, x = x, self.norm(x)
        tokens = self.token_transform(x[:, : self.num_prefix_tokens])
        # maps contiguous, as the weight lies in memory, and none held longer than the convolution
        patches = self.patch_reduce(self.to_map(x[:, self.num_prefix_tokens :], grid).contiguous())
        patches = patches.flatten(2).transpose(1, 2)
        x = torch.cat([tokens, patches + pos_embed], dim=1)

        pooled = F.avg_pool2d(self.to_map(shortcut[:, self.num_prefix_tokens :], grid), 2).flatten(2).transpose(1, 2)
        shortcut = torch.cat([shortcut[:, : self.num_prefix_tokens], pooled], dim=1)
        return x + F.pad(shortcut, (0, self.out_dim - self.in_dim))


class VitResNas(nn.Module):
    """A network of the ViT-ResNAS family, built from its ``network_def``.

    Args:
        network_def: The architecture, see `NetworkDef`. Absent blocks keep their index in ``blocks``.
        img_size: Image size, one number or (height, width); a multiple of the total stride.
        patch_size: Pixels per position of the first stage; even where the patch embedding has a convolutional stem.
        in_chans: Number of image channels.
        num_classes: Number of classes, 0 for no classifier; the network_def's own number when None.
        global_pool: 'token' (class token), 'avg' (mean of the patch tokens), '' (none).
        distill_token: Add a distillation token and its head.
        patch_head: Add a second classifier on patch tokens, for token labelling.
        dynamic_img_size: Take images of any size that the total stride divides; the position embeddings are resampled
            in each forward pass, with the output that `set_input_size` would give.
        drop_rate: Dropout rate before the classifiers.
        pos_drop_rate: Dropout rate after the position embedding.
        proj_drop_rate: Dropout rate after attention and MLP layers.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0 over the blocks.
        drop_path_slots: 'present' lets the rates grow over the present blocks; 'all' counts absent ones as well,
            as the released code does.

    Raises:
        ArchError: The architecture is malformed or the image size is not a multiple of the total stride.
        ValueError: Arguments that exclude each other.
    """

    dynamic_img_size: torch.jit.Final[bool]

    def __init__(
        self,
        network_def: Any,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 14,
        in_chans: int = 3,
        num_classes: int | None = None,
        global_pool: str = "token",
        distill_token: bool = False,
        patch_head: bool = False,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_slots: str = "present",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        arch = NetworkDef.from_network_def(network_def)
        if distill_token and patch_head:
            raise ValueError("distill_token and patch_head exclude each other; choose one of the two")
        if drop_path_slots not in ("present", "all"):
            raise ValueError(f"drop_path_slots must be 'present' or 'all', got {drop_path_slots!r}")
        grids = arch.grids(img_size, patch_size)
        self.arch = arch
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size = patch_size
        self.total_stride = arch.total_stride(patch_size)
        self.dynamic_img_size = dynamic_img_size
        self.in_chans = in_chans
        self.num_classes = arch.num_classes if num_classes is None else num_classes
        self.num_prefix_tokens = 2 if distill_token else 1
        self.embed_dim = self.num_features = self.head_hidden_size = arch.head.dim
        self.grad_checkpointing = False
        self.token_labeling = False  # set_token_labeling
        self.distilled_training = False  # set_distilled_training
        self.grids = list(grids)
        self.global_pool = ""
        self.has_dist = distill_token
        self._set_global_pool(global_pool)

        dim = arch.patch_embed.dim
        self.patch_embed = create_patch_embed(arch.patch_embed, patch_size, in_chans, **dd)
        self._traits = dict(first_conv=f"patch_embed.{self.patch_embed.first_conv}")
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim, **dd)) if distill_token else None
        num_tokens = math.prod(grids[0]) + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        counted = [b for b in arch.blocks if isinstance(b, Block) and (b.exists or drop_path_slots == "all")]
        rates = iter(calculate_drop_path_rates(drop_path_rate, len(counted)))
        stage = 0
        blocks: list[nn.Module] = []
        self.feature_info = []
        self.stage_ends = []  # number of entries of `blocks` up to the end of each stage
        for block in arch.blocks:
            if isinstance(block, Reduction):
                self._end_stage(len(blocks), dim)
                blocks.append(
                    SpatialReduction(
                        block.in_dim, block.out_dim, grids[stage], self.num_prefix_tokens, dynamic_img_size, **dd
                    )
                )
                dim = block.out_dim
                stage += 1
                continue
            rate = next(rates) if block.exists or drop_path_slots == "all" else 0.0
            if not block.exists:
                blocks.append(nn.Identity())  # keeps the index of what follows
                continue
            blocks.append(
                TransformerBlock(
                    dim,
                    block.num_heads,
                    block.head_dim,
                    block.mlp_hidden,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rate,
                    **dd,
                )
            )
        self._end_stage(len(blocks), dim)
        self.blocks = nn.ModuleList(blocks)

        self.norm = nn.LayerNorm(self.num_features, eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(self.num_classes, **dd)
        self.head_dist = self._make_head(self.num_classes, **dd) if distill_token else None
        self.patch_head = self._make_head(self.num_classes, **dd) if patch_head else None

        if not is_meta_device(device):
            self.init_weights(needs_reset=False)

    def _end_stage(self, num_blocks: int, dim: int) -> None:
        module = f"blocks.{num_blocks - 1}" if num_blocks else "patch_embed"
        reduction = self.patch_size * 2 ** len(self.stage_ends)
        self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=module))
        self.stage_ends.append(num_blocks)

    def _make_head(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        if num_classes <= 0:
            return nn.Identity()
        return nn.Linear(self.num_features, num_classes, device=device, dtype=dtype)

    def _set_global_pool(self, global_pool: str) -> None:
        if global_pool not in ("", "token", "avg"):
            raise ValueError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r}")
        if self.has_dist and global_pool != "token":
            raise ValueError("a distilled network reads its two tokens: global_pool must be 'token'")
        self.global_pool = global_pool

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Linear layers, tokens and position embeddings normal with std .02; convolutions and norms as torch's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, SpatialReduction):
                trunc_normal_(module.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        if self.dist_token is not None:
            trunc_normal_(self.dist_token, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {n for n, _ in self.named_parameters() if n.endswith(("cls_token", "dist_token", "pos_embed"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^cls_token|dist_token|pos_embed|patch_embed",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def set_token_labeling(self, enable: bool = True) -> None:
        """In training, return (class logits, patch logits [B, N, num_classes]) instead of class logits.

        Raises:
            ValueError: The model was built without ``patch_head``.
        """
        if enable and self.patch_head is None:
            raise ValueError("token labelling needs the patch classifier; build the model with patch_head=True")
        self.token_labeling = enable

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, return (class logits, distillation logits) instead of their mean.

        Raises:
            ValueError: The model was built without ``distill_token``.
        """
        if enable and not self.has_dist:
            raise ValueError("distilled training needs two heads; build the model with distill_token=True")
        self.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers for ``num_classes`` (0: none), on the model's device, dtype and training mode."""
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        for name in ("head", "head_dist", "patch_head"):
            if getattr(self, name) is not None:
                head = self._make_head(num_classes, **dd)
                if num_classes > 0:
                    trunc_normal_(head.weight, std=0.02)
                    nn.init.zeros_(head.bias)
                setattr(self, name, head.train(self.training))

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Change the image size; both kinds of position embedding are resampled.

        Args:
            img_size: One number or (height, width); None keeps the size.
            patch_size: None, or the present patch size: the stem is built for it.

        Raises:
            ArchError: The size is not a multiple of the total stride.
            ValueError: ``patch_size`` is another one.
        """
        if patch_size is not None and to_2tuple(patch_size) != to_2tuple(self.patch_size):
            raise ValueError(f"patch_size {patch_size}: the network is built for {self.patch_size}; build another one")
        if img_size is None:
            return
        new = self.arch.grids(img_size, self.patch_size)
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        update_model_input_size(self, self.img_size)
        if list(new) == self.grids:
            return
        state = resample_pos_embeds(self.state_dict(), self.grids, list(new), self.num_prefix_tokens)
        self.grids = list(new)
        for name, param in list(self.named_parameters()):
            if name.endswith("pos_embed"):
                owner = self.get_submodule(name.rpartition(".")[0])
                owner.pos_embed = nn.Parameter(state[name], requires_grad=param.requires_grad)
        stage = 0
        for block in self.blocks:
            if isinstance(block, SpatialReduction):
                block.height, block.width = new[stage]
                stage += 1

    def _grid(self, x: torch.Tensor) -> tuple[int, int]:
        """Height and width of the first stage's grid for images [B, C, H, W]."""
        if self.dynamic_img_size:
            return x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        return self.grids[0]

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> prefix and patch tokens with their position embedding, [B, T + N, C]."""
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            _assert(x.shape[2] % self.total_stride == 0, f"image height must be a multiple of {self.total_stride}")
            _assert(x.shape[3] % self.total_stride == 0, f"image width must be a multiple of {self.total_stride}")
            height, width = self._grid(x)
            pos_embed = resample_abs_pos_embed(
                pos_embed, [height, width], self.grids[0], num_prefix_tokens=self.num_prefix_tokens, antialias=False
            )
        else:
            _assert(
                x.shape[2] == self.img_size[0],
                f"image height does not match the model's {self.img_size[0]}; see set_input_size",
            )
            _assert(
                x.shape[3] == self.img_size[1],
                f"image width does not match the model's {self.img_size[1]}; see set_input_size",
            )
        x = self.patch_embed(x)
        tokens = [self.cls_token.expand(x.shape[0], -1, -1)]
        if self.dist_token is not None:
            tokens.append(self.dist_token.expand(x.shape[0], -1, -1))
        return self.pos_drop(torch.cat(tokens + [x], dim=1) + pos_embed)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> normalised tokens of the last stage, prefix tokens first, [B, T + N, num_features]."""
        grid = self._grid(x)
        x = self._embed(x)
        for block in self.blocks:
            if hasattr(block, "patch_reduce"):
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, grid)
                else:
                    x = block(x, grid)
                grid = (grid[0] // 2, grid[1] // 2)
            elif self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False):
        """Class logits from ``forward_features``'s tokens; pairs in the two training modes, see the setters."""
        if self.head_dist is not None:
            cls, dist = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
            if not pre_logits:
                cls, dist = self.head(cls), self.head_dist(dist)
                if self.distilled_training and self.training and not torch.jit.is_scripting():
                    return cls, dist
            return (cls + dist) / 2
        pooled = x
        if self.global_pool == "token":
            pooled = x[:, 0]
        elif self.global_pool == "avg":
            pooled = x[:, self.num_prefix_tokens :].mean(dim=1)
        pooled = self.head_drop(pooled)
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if self.patch_head is not None and not torch.jit.is_scripting():
            if self.token_labeling and self.training:
                return logits, self.patch_head(self.head_drop(x[:, self.num_prefix_tokens :]))
        return logits

    def forward(self, x: torch.Tensor):
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
        """Patch tokens at the end of stages.

        Args:
            x: Images [B, C, H, W].
            indices: Take the last n stages if int, all if None, the given stages if a sequence.
            norm: Apply the final norm to the last stage's tokens (its width fits no other).
            stop_early: Stop at the last wanted stage.
            output_fmt: 'NCHW' or 'NLC'.
            intermediates_only: Return the intermediates only.

        Returns:
            The intermediates, or (tokens as `forward_features` returns them, intermediates).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, max_index = feature_take_indices(len(self.stage_ends), indices)
        last = len(self.stage_ends) - 1
        grid = self._grid(x)
        x = self._embed(x)
        intermediates = []
        start = 0
        for stage, end in enumerate(self.stage_ends[: max_index + 1] if stop_early else self.stage_ends):
            for block in self.blocks[start:end]:
                args = (x,)
                if isinstance(block, SpatialReduction):
                    args, grid = (x, grid), (grid[0] // 2, grid[1] // 2)
                x = checkpoint(block, *args) if self.grad_checkpointing else block(*args)
            start = end
            if stage in take:
                y = self.norm(x) if norm and stage == len(self.grids) - 1 else x
                y = y[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    y = y.transpose(1, 2).reshape(x.shape[0], -1, *grid)
                intermediates.append(y)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if stage == last else x), intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the wanted stages do not need; returns the taken stage indices."""
        take, max_index = feature_take_indices(len(self.stage_ends), indices)
        shortened = max_index < len(self.stage_ends) - 1
        self.blocks = self.blocks[: self.stage_ends[max_index]]
        self.stage_ends = self.stage_ends[: max_index + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()  # its width is the last stage's
        if shortened:
            self.embed_dim = self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or shortened:
            self.head_dist = self.patch_head = None
            self.has_dist = False
            self.reset_classifier(0, "")
        return take


def create_patch_embed(
    entry: PatchEmbed, patch_size: int, in_chans: int, device=None, dtype=None
) -> LinearPatchEmbed | ConvPatchEmbed:
    """The patch embedding that an architecture's first entry names."""
    dd = {"device": device, "dtype": dtype}
    if entry.kind == 0:
        return LinearPatchEmbed(patch_size, in_chans, entry.dim, **dd)
    return ConvPatchEmbed(patch_size, in_chans, entry.mid_dim, entry.dim, **dd)


def resample_pos_embeds(
    state_dict: dict[str, torch.Tensor],
    old_grids: list[tuple[int, int]],
    new_grids: list[tuple[int, int]],
    num_prefix_tokens: int,
) -> dict[str, torch.Tensor]:
    """Both kinds of position embedding on other grids: bicubic, not antialiased, as the released fine-tuning does."""
    out = dict(state_dict)
    reductions = sorted((k for k in out if re.fullmatch(r"blocks\.\d+\.pos_embed", k)), key=lambda k: _block_index(k))
    for stage, key in enumerate(["pos_embed", *reductions]):
        if key in out and old_grids[stage] != new_grids[stage]:
            out[key] = resample_abs_pos_embed(
                out[key],
                new_size=list(new_grids[stage]),
                old_size=list(old_grids[stage]),
                num_prefix_tokens=0 if stage else num_prefix_tokens,
                antialias=False,
            )
    return out


def _block_index(key: str) -> int:
    return int(key.split(".")[1])


_RELEASED_NAMES = {"cls_head.": "head.", "dst_head.": "head_dist."}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VitResNas) -> dict[str, torch.Tensor]:
    """Fit a checkpoint to a model: the released layout or ours, wrapped or not, at another image size.

    The released layout names the heads `cls_head`, `dst_head`, keeps all prefix tokens in one `tokens`, and leaves a
    gap in the indices of `blocks` for each absent block, whether or not the model's architecture still lists it.

    Raises:
        ValueError: The checkpoint's blocks or position embeddings cannot belong to this architecture, or nothing says
            for what grid these were made, see `checkpoint_grid`.
    """
    for wrapper in ("model_ema", "model", "state_dict"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    out = {}
    for key, value in state_dict.items():
        key = key.removeprefix("module.")
        for old, new in _RELEASED_NAMES.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
        out[key] = value
    tokens = out.pop("tokens", None)
    if tokens is not None:
        out["cls_token"] = tokens[:, :1]
        if tokens.shape[1] > 1:
            out["dist_token"] = tokens[:, 1:2]
    if model.patch_head is None:
        out = {k: v for k, v in out.items() if not k.startswith("patch_head.")}
    elif "patch_head.weight" not in out and not isinstance(model.patch_head, nn.Identity):
        # released networks may lack it; the model's own initial weights stay then
        out.update({f"patch_head.{k}": v.detach().clone() for k, v in model.patch_head.state_dict().items()})
    return _fit_grids(_fit_indices(out, model.state_dict()), model)


def _fit_indices(state_dict: dict[str, torch.Tensor], own: Iterable[str]) -> dict[str, torch.Tensor]:
    """Close or open the gaps that absent blocks leave in `blocks.<i>`."""
    # a narrowed network may lack both branches of a block that its network_def has
    found, wanted = (sorted({_block_index(k) for k in s if k.startswith("blocks.")}) for s in (state_dict, own))
    if found == wanted:
        return state_dict
    if len(found) != len(wanted):
        raise ValueError(
            f"the checkpoint has {len(found)} blocks and reductions, the model {len(wanted)}: they are different "
            f"architectures"
        )
    index = dict(zip(found, wanted, strict=True))

    def rename(key: str) -> str:
        if not key.startswith("blocks."):
            return key
        _, i, rest = key.split(".", 2)
        return f"blocks.{index[int(i)]}.{rest}"

    return {rename(k): v for k, v in state_dict.items()}


def _fit_grids(state_dict: dict[str, torch.Tensor], model: VitResNas) -> dict[str, torch.Tensor]:
    """Resample position embeddings when the checkpoint was made for another image size."""
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is None:
        return state_dict
    num_prefix_tokens = 1 + ("dist_token" in state_dict)
    num_patches = pos_embed.shape[1] - num_prefix_tokens
    height, width = checkpoint_grid(model, num_patches, model.patch_size, model.grids[0])
    if (height | width) % 2**model.arch.num_reductions:
        raise ValueError(
            f"pos_embed of the checkpoint is for a grid of {height}x{width}, which {model.arch.num_reductions} "
            f"reductions cannot halve each time: it belongs to another architecture"
        )
    source = [(height >> i, width >> i) for i in range(model.arch.num_reductions + 1)]
    return resample_pos_embeds(state_dict, source, model.grids, num_prefix_tokens)


def _create_vit_resnas(variant: str, pretrained: bool = False, **kwargs) -> VitResNas:
    network_def = kwargs["network_def"]
    if isinstance(network_def, Arch):
        raise ArchError("network_def must be JSON-plain so that the model can be saved; pass arch.to_network_def()")
    arch = NetworkDef.from_network_def(network_def)
    # the builder would set these from the default cfg
    kwargs.setdefault("num_classes", arch.num_classes)
    kwargs.setdefault("img_size", 224)
    kwargs.setdefault("patch_size", 14)
    classifiers = ["head"]
    if kwargs.get("distill_token"):
        classifiers.append("head_dist")
    if kwargs.get("patch_head"):
        classifiers.append("patch_head")
    overlay = dict(
        classifier=classifiers[0] if len(classifiers) == 1 else tuple(classifiers),
        first_conv="patch_embed.proj" if arch.patch_embed.kind == 0 else "patch_embed.conv1.conv",
    )
    overlay.update(kwargs.pop("pretrained_cfg_overlay", None) or {})
    out_indices = kwargs.pop("out_indices", tuple(range(arch.num_reductions + 1)))
    return build_model_with_cfg(
        VitResNas,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        pretrained_cfg_overlay=overlay,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


def _cfg(**kwargs) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (4, 4),
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1.conv",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2109.00642",
        "paper_name": "Searching for Efficient Multi-Stage Vision Transformers",
        "origin_url": "https://github.com/yilunliao/vit-search",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vit_res_tiny": _cfg(),
        "vit_resnas_tiny": _cfg(),
        "vit_resnas_small": _cfg(),
        "vit_resnas_medium": _cfg(),
        "vit_resnas": _cfg(),
    }
)


# Width, head dimension and "heads:mlp_hidden" of each block, by stage, as the released training scripts state them
_VARIANTS = {
    "vit_res_tiny": (
        (192, 64, "3:768 3:768 3:768 3:768"),
        (384, 64, "6:1536 6:1536 6:1536 6:1536"),
        (768, 64, "12:3072 12:3072 12:3072 12:3072"),
    ),
    "vit_resnas_tiny": (
        (176, 32, "3:704 3:576 3:640 4:576 4:704"),
        (352, 48, "10:1408 8:1408 8:1280 8:1408 10:1280 10:1024"),
        (704, 64, "10:2560 10:1792 10:2816 8:2816 8:2560"),
    ),
    "vit_resnas_small": (
        (220, 32, "5:880 5:880 7:800 5:720 5:720 5:720"),
        (440, 48, "10:1760 10:1440 10:1920 10:1600 12:1600 12:1440"),
        (880, 64, "16:3200 12:3200 16:2880 12:2240 14:2560"),
    ),
    "vit_resnas_medium": (
        (240, 32, "7:960 6:960 7:800 8:960 7:880 8:880 6:800"),
        (640, 48, "10:1120 14:1760 14:1920 16:1760 14:1440 16:1760 16:1920"),
        (880, 64, "16:3200 10:3840 16:3840 12:3200 16:3520 14:3520"),
    ),
    "vit_resnas": ((64, 32, "2:256 2:256"), (128, 32, "4:512 4:512"), (256, 32, "8:1024 8:1024")),  # ours, small
}


def _network_def(variant: str) -> str:
    stages = _VARIANTS[variant]
    entries = [f"(4,{stages[0][0]})"]
    for i, (dim, head_dim, blocks) in enumerate(stages):
        if i:
            entries.append(f"(3,{stages[i - 1][0]},{dim})")
        pairs = (block.split(":") for block in blocks.split())
        entries += [f"(1,({dim},{heads},{head_dim}),({dim},{hidden}),1)" for heads, hidden in pairs]
    return f"({','.join(entries)},(2,{stages[-1][0]},1000))"


@register_model
def vit_res_tiny(pretrained: bool = False, **kwargs) -> VitResNas:
    """ViT-Res-Tiny, the hand-designed reference of the paper's search: 42.0 M parameters, 1.79 GMACs."""
    model_args = dict(network_def=_network_def("vit_res_tiny"))
    return _create_vit_resnas("vit_res_tiny", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vit_resnas_tiny(pretrained: bool = False, **kwargs) -> VitResNas:
    """ViT-ResNAS-Tiny as searched by the paper under 1.8 GMACs: 40.8 M parameters, 1.78 GMACs."""
    model_args = dict(network_def=_network_def("vit_resnas_tiny"))
    return _create_vit_resnas("vit_resnas_tiny", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vit_resnas_small(pretrained: bool = False, **kwargs) -> VitResNas:
    """ViT-ResNAS-Small as searched by the paper under 2.9 GMACs: 63.7 M parameters, 2.85 GMACs."""
    model_args = dict(network_def=_network_def("vit_resnas_small"))
    return _create_vit_resnas("vit_resnas_small", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vit_resnas_medium(pretrained: bool = False, **kwargs) -> VitResNas:
    """ViT-ResNAS-Medium as searched by the paper under 4.6 GMACs: 96.4 M parameters, 4.51 GMACs."""
    model_args = dict(network_def=_network_def("vit_resnas_medium"))
    return _create_vit_resnas("vit_resnas_medium", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vit_resnas(pretrained: bool = False, **kwargs) -> VitResNas:
    """Any architecture of the family, given as ``network_def``.

    The default is a network of three stages with two blocks each (2.9 M parameters).
    """
    model_args = dict(network_def=_network_def("vit_resnas"))
    return _create_vit_resnas("vit_resnas", pretrained=pretrained, **dict(model_args, **kwargs))
