"""SReT: Sliced Recursive Transformer.

Paper: `Sliced Recursive Transformer` - https://arxiv.org/abs/2111.05297 (ECCV 2022)
Origin: https://github.com/szq0214/SReT

A three-stage pyramid in which every transformer block is applied several times in a row with the same weights
(recursion). A small MLP with separate weights (non-linear projection layer, NLL) follows every application, every
residual sum is weighted by learnable scalars, and attention runs inside groups of tokens (slices): contiguous runs in
the first pass, randomly permuted tokens in the second.

Differences from the released code, none of which changes what its checkpoints compute:

* A shared block is stored once; `checkpoint_filter_fn` maps the released layout with its duplicates.
* In evaluation the permutation is a fixed function of the number of tokens (`eval_permutation='fixed'`), so that the
  model is a function. `'random'` is the released behaviour (logits change from call to call), `'identity'` permutes
  nothing.
* Any image size works. The position embedding is resampled. A group has ceil(tokens / groups) tokens; where the groups
  do not divide the tokens, the last group is shorter.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d, NormMlpClassifierHead, get_device_dtype, is_meta_device, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from torch import nn

from .sret_layers import (
    EVAL_PERMUTATIONS,
    NORM,
    RESIDUALS,
    GroupAttention,
    PatchEmbed,
    RecursiveBlock,
    Stage,
    TokenHead,
    resample_pos_embed,
)

__all__ = ["SReT"]


class SReT(nn.Module):
    """Sliced Recursive Transformer (https://arxiv.org/abs/2111.05297).

    Stage s has `recursive_num[s]` different blocks of width `base_dims[s] * num_heads[s]`, each applied
    `depths[s] / recursive_num[s]` times in a row. The released code calls every second application of a stage the
    recursive pass, whatever the sharing: it uses `groups2` and permuted tokens, the others `groups1` and contiguous
    runs. With two applications per block this is each block's second pass.

    Args:
        img_size: image size (int or height, width) that position embedding and permutations are made for. Other sizes
            work too: the embedding is resampled, permutations are computed.
        patch_size: stride of the convolutional stem: 8, 4, 2 or 1 (small values for small images).
        global_pool: 'avg', 'max', 'avgmax' or ''; with a class token 'token' or ''. Pooling comes before the last norm.
        base_dims: head dimension of each stage.
        depths: block applications of each stage.
        recursive_num: different blocks of each stage.
        num_heads: attention heads of each stage.
        groups1: groups of tokens in the first pass, per stage.
        groups2: groups of permuted tokens in the recursive pass, per stage; 1 is full attention.
        mlp_ratio: hidden width of the blocks' MLPs over the stage's width (rounded down).
        np_mlp_ratio: the same for the non-linear projections (NLL) after each application; 0 leaves them out.
        residual: which residual terms have a learnable scalar: 'both', 'identity', 'branch' or 'none'.
        class_token: classify from a class token instead of pooling (the token attends to all tokens and is a key in
            every group; our reading, the released code has none).
        recursions: applications of each shared block, see `set_recursions`; default: all.
        eval_permutation: permutation of the recursive pass in evaluation: 'fixed', 'identity' or 'random'.
        permutation_seed: seeds the fixed permutations.
        drop_path_rate: block r of stage s drops at `drop_path_rate * (sum(depths[:s]) + r) / sum(depths)`, in all its
            passes, as in the released code.

    Raises:
        ValueError: a list is not as long as the others, recursions are not whole, or a choice is unknown.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 8,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        base_dims: Sequence[int] = (32, 32, 32),
        depths: Sequence[int] = (4, 10, 6),
        recursive_num: Sequence[int] = (2, 5, 3),
        num_heads: Sequence[int] = (2, 4, 8),
        groups1: Sequence[int] = (8, 4, 1),
        groups2: Sequence[int] = (2, 1, 1),
        mlp_ratio: float = 3.6,
        np_mlp_ratio: float = 1.0,
        residual: str = "both",
        class_token: bool = False,
        recursions: int | None = None,
        eval_permutation: str = "fixed",
        permutation_seed: int = 0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer=NORM,
        act_layer=nn.GELU,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        per_stage = dict(
            base_dims=base_dims,
            depths=depths,
            recursive_num=recursive_num,
            num_heads=num_heads,
            groups1=groups1,
            groups2=groups2,
        )
        _check_args(
            per_stage,
            patch_size=(patch_size, (1, 2, 4, 8)),
            residual=(residual, RESIDUALS),
            eval_permutation=(eval_permutation, EVAL_PERMUTATIONS),
        )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_prefix_tokens = int(class_token)
        self.patch_size = patch_size
        self.output_fmt = "NLC" if class_token else "NCHW"
        self.global_pool = global_pool if global_pool is not None else ("token" if class_token else "avg")
        self._check_pool(self.global_pool)
        dims = [b * h for b, h in zip(base_dims, num_heads, strict=True)]
        self.embed_dim = dims[0]
        self.num_features = self.head_hidden_size = dims[-1]

        self.patch_embed = PatchEmbed(in_chans, dims[0], patch_size, **dd)
        grid = self._grid(img_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, dims[0], *grid, **dd))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[0], **dd)) if class_token else None
        self.pos_drop = nn.Dropout(pos_drop_rate)

        stages, self.feature_info, seed = [], [], permutation_seed
        for s, dim in enumerate(dims):
            passes = depths[s] // recursive_num[s]
            blocks = []
            for r in range(recursive_num[s]):
                second = [(r * passes + i) % 2 == 1 for i in range(passes)]
                blocks.append(
                    RecursiveBlock(
                        dim,
                        num_heads[s],
                        self._num_tokens(grid, s),
                        groups=[groups2[s] if x else groups1[s] for x in second],
                        permute=second,
                        mlp_hidden=int(dim * mlp_ratio),
                        nll_hidden=int(dim * np_mlp_ratio),
                        num_prefix_tokens=self.num_prefix_tokens,
                        residual=residual,
                        proj_drop=proj_drop_rate,
                        attn_drop=attn_drop_rate,
                        drop_path=drop_path_rate * (sum(depths[:s]) + r) / sum(depths),
                        norm_layer=norm_layer,
                        act_layer=act_layer,
                        eval_permutation=eval_permutation,
                        seed=seed,
                        **dd,
                    )
                )
                seed += passes
            stages.append(Stage(dims[s - 1] if s else 0, dim, blocks, class_token, **dd))
            self.feature_info.append(dict(num_chs=dim, reduction=patch_size * 2**s, module=f"stages.{s}"))
        self.stages = nn.ModuleList(stages)
        self.max_recursions = max(d // r for d, r in zip(depths, recursive_num, strict=True))
        self.recursions = self._check_recursions(self.max_recursions if recursions is None else recursions)
        self.mixed_recursions = ()

        if class_token:
            self.head = TokenHead(
                dims[-1], num_classes, pool_type=self.global_pool, drop_rate=drop_rate, norm_layer=norm_layer, **dd
            )
        else:
            self.head = NormMlpClassifierHead(
                dims[-1],
                num_classes,
                pool_type=self.global_pool,
                drop_rate=drop_rate,
                norm_layer=partial(LayerNorm2d, eps=1e-6),
                **dd,
            )
        if not is_meta_device(device):
            self.init_weights(needs_reset=False)

    def _check_pool(self, global_pool: str) -> None:
        known = ("token", "") if self.num_prefix_tokens else ("avg", "max", "avgmax", "")
        if global_pool not in known:
            with_token = "with" if self.num_prefix_tokens else "without"
            raise ValueError(f"global_pool={global_pool!r}: {with_token} a class token it is one of {known}.")

    def _grid(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        height, width = to_2tuple(img_size)
        return math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)

    @staticmethod
    def _num_tokens(grid: tuple[int, int], stage: int) -> int:
        return math.ceil(grid[0] / 2**stage) * math.ceil(grid[1] / 2**stage)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the paper's code: truncated normal (.02) position embedding, scalars 1, else torch's defaults.

        Args:
            needs_reset: also reset the layers, as is needed after `to_empty`.
        """
        if needs_reset:
            for module in self.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                if isinstance(module, GroupAttention):
                    module.init_permutations()
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^patch_embed|^pos_embed|^cls_token",
            blocks=[
                (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.(?:downsample|token_proj)", (0,)),
                (r"^head\.norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def set_recursions(self, recursions: int | None = None) -> None:
        """Apply every shared block only `recursions` times (its first passes); None restores the full depth.

        Meant for models trained with mixed depth (`timm_resnas.tasks.mixed_depth`).
        """
        self.recursions = self._check_recursions(self.max_recursions if recursions is None else recursions)
        update_model_args(self, recursions=recursions)  # a saved model keeps its depth

    @torch.jit.ignore
    def set_mixed_depth(self, recursions: Sequence[int] | None = None) -> None:
        """In training, let `forward` return a tuple of logits, one per number of recursions; None for plain logits."""
        self.mixed_recursions = tuple(self._check_recursions(r) for r in recursions or ())

    def _check_recursions(self, recursions: int) -> int:
        if not 1 <= recursions <= self.max_recursions:
            raise ValueError(f"recursions={recursions}: this model has 1 to {self.max_recursions}.")
        return recursions

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None) -> None:
        """Resample the position embedding and make the fixed permutations for another image size.

        Args:
            img_size: int or (height, width); None keeps the size.
            patch_size: None, or the stem's stride, which cannot be changed.

        Raises:
            ValueError: `patch_size` is another one.
        """
        if patch_size is not None and to_2tuple(patch_size) != to_2tuple(self.patch_size):
            raise ValueError(f"patch_size={patch_size}: the stride of the stem is built in, {self.patch_size}.")
        if img_size is None:
            return
        grid = self._grid(img_size)
        if grid != tuple(self.pos_embed.shape[2:]):
            with torch.no_grad():
                resampled = resample_pos_embed(self.pos_embed, *grid)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        for s, stage in enumerate(self.stages):
            for block in stage.blocks:
                block.attn.init_permutations(self._num_tokens(grid, s))
        update_model_input_size(self, to_2tuple(img_size))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the classifier, keeping the pooling unless another is named."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool
        dd = get_device_dtype(self)
        self.head.reset(num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features

    def forward_stem(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the embedded feature map `[B, C, H/8, W/8]` and the class token `[B, 1, C]`, if there is one."""
        x = self.patch_embed(x)
        x = self.pos_drop(x + resample_pos_embed(self.pos_embed, x.shape[2], x.shape[3]))
        token = self.cls_token
        return x, token.expand(x.shape[0], -1, -1) if token is not None else None

    def _merge(self, x: torch.Tensor, token: torch.Tensor | None) -> torch.Tensor:
        return x if token is None else torch.cat([token, x.flatten(2).transpose(1, 2)], dim=1)

    def forward_stages(self, x: torch.Tensor, token: torch.Tensor | None, recursions: int) -> torch.Tensor:
        for stage in self.stages:
            x, token = stage(x, token, recursions)
        return self._merge(x, token)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last feature map `[B, C, H/32, W/32]`; with a class token `[B, 1 + tokens, C]`."""
        x, token = self.forward_stem(x)
        return self.forward_stages(x, token, self.recursions)

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
            norm: without effect: the only norm follows the pooling.
            stop_early: stop after the last wanted stage.
            output_fmt: 'NCHW'.
            intermediates_only: return only the list.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW'.")
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x, token = self.forward_stem(x)
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: max_index + 1]
        for i, stage in enumerate(stages):
            x, token = stage(x, token, self.recursions)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return self._merge(x, token), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last wanted one, and the head; return the indices of the kept taps."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "", reset_other=True)
        return take_indices

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits `[B, num_classes]`; in training after `set_mixed_depth` a tuple of them."""
        if not torch.jit.is_scripting():
            if self.training and self.mixed_recursions:
                # one pass through the stem for all branches: its batch norm sees the batch once
                x, token = self.forward_stem(x)
                return tuple(self.forward_head(self.forward_stages(x, token, r)) for r in self.mixed_recursions)
        return self.forward_head(self.forward_features(x))


def _check_args(per_stage: dict[str, Sequence[int]], **choices: tuple[Any, tuple]) -> None:
    lengths = {name: len(values) for name, values in per_stage.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"SReT: one number per stage is wanted in each of these, but their lengths are {lengths}.")
    for name, values in per_stage.items():
        if min(values) < 1:
            raise ValueError(f"SReT: {name}={tuple(values)} must be positive.")
    for depth, num in zip(per_stage["depths"], per_stage["recursive_num"], strict=True):
        if depth % num:
            raise ValueError(f"SReT: {depth} applications of {num} blocks: depths must be multiples of recursive_num.")
    dims = [b * h for b, h in zip(per_stage["base_dims"], per_stage["num_heads"], strict=True)]
    if any(b % a for a, b in zip(dims, dims[1:], strict=False)):
        raise ValueError(f"SReT: stage widths (base_dims * num_heads) {dims} must be multiples of the one before.")
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"SReT: {name}={value!r} is not one of {known}.")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: SReT) -> dict[str, torch.Tensor]:
    """Map a released checkpoint (or ours) to this model's keys and resample the position embedding.

    The released layout is one interleaved list per stage: shared block and NLL in turn, each shared block repeated at
    every position where it is applied.

    Raises:
        ValueError: the copies of a shared block differ, so it was not trained with this model's recursions.
    """
    for wrapper in ("model", "state_dict"):
        state_dict = state_dict.get(wrapper, state_dict)
    if not any(k.startswith(("transformers.", "module.")) for k in state_dict):
        out = dict(state_dict)
    else:
        out = {}
        scalars = {"coefficient1.bias": "identity", "coefficient2.bias": "branch"}
        for k, v in state_dict.items():
            k = k.removeprefix("module.")
            if m := re.match(r"transformers\.(\d+)\.blocks\.(\d+)\.(.*)", k):
                s, position, name = int(m[1]), int(m[2]), m[3]
                block, index = divmod(position // 2, len(model.stages[s].blocks[0].nll))
                if position % 2:
                    name = "res." + scalars[name] if name in scalars else name.replace("norm1.", "norm.")
                    name = f"nll.{index}.{name}"
                elif name.startswith("coefficient"):
                    n = int(name[len("coefficient")]) - 1
                    name = f"res{n // 2 + 1}.{('identity', 'branch')[n % 2]}"
                k = f"stages.{s}.blocks.{block}.{name}"
                if k in out and not torch.equal(out[k], v):
                    raise ValueError(
                        f"SReT checkpoint: the copies of {k} differ; it was made with other depths or recursive_num."
                    )
            elif m := re.match(r"pools\.(\d+)\.conv\.(.*)", k):
                k = f"stages.{int(m[1]) + 1}.downsample.{m[2]}"
            elif k.startswith("norm."):
                k = "head." + k
            elif k in ("head.weight", "head.bias"):
                k = k.replace("head.", "head.fc.")
            out[k] = v
    if "pos_embed" in out:
        out["pos_embed"] = resample_pos_embed(out["pos_embed"], *model.pos_embed.shape[2:])
    return out


def _create_sret(variant: str, pretrained: bool = False, **kwargs) -> SReT:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["depths"]))))
    return build_model_with_cfg(
        SReT,
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
        "first_conv": "patch_embed.conv1",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2111.05297",
        "paper_name": "Sliced Recursive Transformer",
        "origin_url": "https://github.com/szq0214/SReT",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        name: _cfg()
        for name in (
            "sret_tiny",
            "sret_ltiny",
            "sret_small",
            "sret_tiny_unsliced",
            "sret_ltiny_unsliced",
            "sret_small_unsliced",
            "sret",
        )
    }
)

_TINY = dict(
    base_dims=(32, 32, 32),
    depths=(4, 10, 6),
    recursive_num=(2, 5, 3),
    num_heads=(2, 4, 8),
    groups1=(8, 4, 1),
    groups2=(2, 1, 1),
    mlp_ratio=3.6,
    np_mlp_ratio=1.0,
)
_LTINY = dict(_TINY, mlp_ratio=4.0)
_SMALL = dict(_TINY, base_dims=(42, 42, 42), num_heads=(3, 6, 12), mlp_ratio=3.0, np_mlp_ratio=2.0)
_UNSLICED = dict(groups1=(1, 1, 1), groups2=(1, 1, 1))


@register_model
def sret_tiny(pretrained=False, **kwargs) -> SReT:
    """SReT-T: 4.8M parameters, 1.1 GMACs."""
    return _create_sret("sret_tiny", pretrained, **dict(_TINY, **kwargs))


@register_model
def sret_ltiny(pretrained=False, **kwargs) -> SReT:
    """SReT-TL (LT in the released code): 5.0M parameters, 1.2 GMACs."""
    return _create_sret("sret_ltiny", pretrained, **dict(_LTINY, **kwargs))


@register_model
def sret_small(pretrained=False, **kwargs) -> SReT:
    """SReT-S: 20.9M parameters, 4.2 GMACs."""
    return _create_sret("sret_small", pretrained, **dict(_SMALL, **kwargs))


@register_model
def sret_tiny_unsliced(pretrained=False, **kwargs) -> SReT:
    """SReT-T with full attention everywhere: 1.4 GMACs."""
    return _create_sret("sret_tiny_unsliced", pretrained, **dict(_TINY, **dict(_UNSLICED, **kwargs)))


@register_model
def sret_ltiny_unsliced(pretrained=False, **kwargs) -> SReT:
    """SReT-TL with full attention everywhere: 1.4 GMACs."""
    return _create_sret("sret_ltiny_unsliced", pretrained, **dict(_LTINY, **dict(_UNSLICED, **kwargs)))


@register_model
def sret_small_unsliced(pretrained=False, **kwargs) -> SReT:
    """SReT-S with full attention everywhere: 4.7 GMACs."""
    return _create_sret("sret_small_unsliced", pretrained, **dict(_SMALL, **dict(_UNSLICED, **kwargs)))


@register_model
def sret(pretrained=False, **kwargs) -> SReT:
    """Any configuration, by the arguments of `SReT`; without any, a small one of 8 layers (head dimension 16).

    The paper's abstract names more than 100 shared layers in 13M to 15M parameters, without the configuration. With the
    widths of SReT-T and its shares of the stages, `depths=(20, 56, 32), recursive_num=(5, 14, 8)` makes 108 layers of
    15.3M parameters.
    """
    model_args = dict(_TINY, base_dims=(16, 16, 16), depths=(2, 4, 2), recursive_num=(1, 2, 1))
    return _create_sret("sret", pretrained, **dict(model_args, **kwargs))
