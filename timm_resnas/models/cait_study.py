"""CaiT: the paper's models that timm lacks, and its design study as arguments of one model.

Paper: `Going deeper with Image Transformers` - https://arxiv.org/abs/2103.17239
Origin: https://github.com/facebookresearch/deit

timm has ten CaiTs with pretrained weights. Here are the other nine of the paper, on timm's class, and `cait_study`, in
which the paper's choices are switches: how residual branches are scaled, where the class token enters, talking heads,
the drop-path rule, average pooling instead of a class token. With the default switches it is timm's CaiT.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, DropPath, PatchEmbed, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, cait, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import nn

from .grid import checkpoint_grid

__all__ = ["CaitStudy", "layer_scale_init"]

torch.fx.wrap("resample_abs_pos_embed")  # a leaf of fx graphs also where another module's forward calls it

_RESIDUALS = ("layer_scale", "rezero", "skip_init", "fixup", "none")


def layer_scale_init(depth: int) -> float:
    """Initial LayerScale by depth: 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond (the paper's rule)."""
    return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6


class StudyBlock(cait.LayerScaleBlock):
    """timm's block; the scale is a vector, one scalar or absent, the norms can be left out."""

    def __init__(self, *args, residual: str = "layer_scale", pre_norm: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        _set_residual(self, residual, pre_norm)


class StudyBlockClassAttn(cait.LayerScaleBlockClassAttn):
    """timm's class-attention block with the same choices."""

    def __init__(self, *args, residual: str = "layer_scale", pre_norm: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        _set_residual(self, residual, pre_norm)


def _set_residual(block: nn.Module, residual: str, pre_norm: bool) -> None:
    for name in ("gamma_1", "gamma_2"):
        if residual == "none":
            delattr(block, name)
            setattr(block, name, 1.0)  # timm's forward multiplies by it
        elif residual != "layer_scale":
            setattr(block, name, nn.Parameter(getattr(block, name).detach()[:1].clone()))
    if not pre_norm:
        block.norm1 = nn.Identity()
        block.norm2 = nn.Identity()


class Cait(cait.Cait):
    """timm's CaiT, plus `init_weights` (for models built on the meta device), `set_input_size` and `dynamic_img_size`.

    Args (others as timm's Cait):
        dynamic_img_size: Take images of any size that `patch_size` divides; the position embedding is resampled in each
            forward pass, with the output that `set_input_size` would give.
    """

    dynamic_img_size: torch.jit.Final[bool]

    def __init__(self, *args, init_values: float = 1e-4, dynamic_img_size: bool = False, **kwargs):
        if dynamic_img_size:
            kwargs["patch_layer"] = partial(kwargs.get("patch_layer", PatchEmbed), strict_img_size=False)
        super().__init__(*args, init_values=init_values, **kwargs)
        self.init_values = init_values
        self.dynamic_img_size = dynamic_img_size
        self.class_token_layer = -1

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise every weight as the constructor does."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith(("gamma_1", "gamma_2")):
                nn.init.constant_(parameter, self.init_values)

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Resample the position embedding for another image size, the patch embedding for another patch size.

        Args:
            img_size: int or (height, width); None keeps the size.
            patch_size: int or (height, width); None keeps the size.
        """
        old_size = list(self.patch_embed.grid_size)
        img_size = self.patch_embed.img_size if img_size is None else tuple(to_2tuple(img_size))
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        new_size = list(self.patch_embed.grid_size)
        if new_size != old_size:
            with torch.no_grad():
                pos_embed = resample_abs_pos_embed(self.pos_embed, new_size, old_size=old_size, num_prefix_tokens=0)
            self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        update_model_input_size(self, img_size, patch_size=patch_size)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """Patches `[B, N, C]` with their position embedding."""
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            height, width = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
            pos_embed = resample_abs_pos_embed(
                pos_embed, [height, width], old_size=self.patch_embed.grid_size, num_prefix_tokens=0
            )
        return self.pos_drop(self.patch_embed(x) + pos_embed)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normed tokens `[B, N, C]`, the class token first if there is one."""
        x = self._embed(x)
        for i, block in enumerate(self.blocks):
            if i == self.class_token_layer and self.cls_token is not None:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        if self.blocks_token_only is not None:
            x = self.forward_cls(x)
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
        """Return patch tokens of the self-attention blocks, as timm's Cait; a class token is left out of them.

        Args:
            x: images `[B, in_chans, H, W]`.
            indices: last n blocks if int, all if None, the listed ones if a sequence.
            norm: apply the final norm to them.
            stop_early: stop after the last wanted block.
            output_fmt: 'NCHW' or 'NLC'.
            intermediates_only: return only the list.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: 'NCHW' or 'NLC'.")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        B, _, height, width = x.shape
        x = self._embed(x)
        intermediates: list[torch.Tensor] = []
        blocks = self.blocks
        if not torch.jit.is_scripting() and stop_early:
            blocks = self.blocks[: max_index + 1]
        prefix = 0
        for i, block in enumerate(blocks):
            if i == self.class_token_layer and self.cls_token is not None:
                x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)
                prefix = 1
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i in take_indices:
                intermediates.append((self.norm(x) if norm else x)[:, prefix:])
        if output_fmt == "NCHW":
            H, W = self.patch_embed.dynamic_feat_size((height, width))
            intermediates = [y.reshape(B, H, W, -1).permute(0, 3, 1, 2).contiguous() for y in intermediates]
        if intermediates_only:
            return intermediates
        if self.blocks_token_only is not None:
            x = self.forward_cls(x)
        return self.norm(x), intermediates


class CaitStudy(Cait):
    """CaiT with the design choices of https://arxiv.org/abs/2103.17239 as arguments.

    Args (others as timm's Cait):
        residual: scale of the residual branches. 'layer_scale': one learnable factor per channel; 'rezero',
            'skip_init', 'fixup': one learnable scalar per branch; 'none': no scale.
        init_values: initial scale. Default: `layer_scale_init(depth)`; 0 for 'rezero'; 1/sqrt(number of branches) for
            'skip_init'; 1 for 'fixup', which also divides the first layer of each branch by sqrt(number of branches)
            and starts its last layer and the classifier at zero (its scalar biases are covered by those of the layers).
            The number of branches is 2 x (depth + depth_token_only).
        pre_norm: layer norm in front of the branches. The original ReZero, SkipInit and Fixup have none; the paper put
            it back to make them train.
        class_token: False for average pooling instead of a class token, and so no class attention.
        class_token_layer: self-attention block in front of which the class token joins the patches, 0 being ViT.
            Default None: it enters after all of them, in class-attention blocks.
        depth_token_only: class-attention blocks; default 2, and 0 with `class_token_layer` or without a class token.
        talking_heads: linear mixing of the heads before and after the softmax; without it attention is timm's, fused.
        drop_path_mode: 'constant' (the paper's) or 'linear' (0 up to the rate) over the blocks.
        global_pool: 'token', 'avg' (mean of the patches) or ''; default by `class_token`.

    Raises:
        ValueError: a choice is unknown, or two choices contradict each other.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        global_pool: str | None = None,
        residual: str = "layer_scale",
        init_values: float | None = None,
        pre_norm: bool = True,
        class_token: bool = True,
        class_token_layer: int | None = None,
        depth_token_only: int | None = None,
        talking_heads: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_mode: str = "constant",
        **kwargs,
    ):
        if residual not in _RESIDUALS:
            raise ValueError(f"cait_study: residual={residual!r} is not one of {_RESIDUALS}.")
        if drop_path_mode not in ("constant", "linear"):
            raise ValueError(f"cait_study: drop_path_mode={drop_path_mode!r} is neither 'constant' nor 'linear'.")
        if global_pool is None:
            global_pool = "token" if class_token else "avg"
        if global_pool == "token" and not class_token:
            raise ValueError("cait_study: global_pool='token' needs class_token=True.")
        if class_token_layer is not None and not (class_token and 0 <= class_token_layer < depth):
            raise ValueError(
                f"cait_study: class_token_layer={class_token_layer} must be 0 to depth - 1 = {depth - 1}, "
                f"with class_token=True."
            )
        late = class_token and class_token_layer is None
        if depth_token_only is None:
            depth_token_only = 2 if late else 0
        if (depth_token_only > 0) != late:
            raise ValueError(
                f"cait_study: depth_token_only={depth_token_only} must be at least 1 where the class token enters late "
                f"(class_token=True, class_token_layer=None), and 0 elsewhere."
            )
        num_branches = 2 * (depth + depth_token_only)
        if init_values is None:
            defaults = dict(layer_scale=layer_scale_init(depth), rezero=0.0, skip_init=num_branches**-0.5)
            init_values = defaults.get(residual, 1.0)
        choices = dict(residual=residual, pre_norm=pre_norm)
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            global_pool=global_pool,
            drop_path_rate=drop_path_rate,
            depth_token_only=depth_token_only,
            init_values=init_values,
            block_layers=partial(StudyBlock, **choices),
            block_layers_token=partial(StudyBlockClassAttn, **choices),
            attn_block=cait.TalkingHeadAttn if talking_heads else Attention,
            **kwargs,
        )
        self.residual = residual
        self.num_branches = num_branches
        self.class_token_layer = -1 if class_token_layer is None else class_token_layer
        if not late:
            self.blocks_token_only = None
        if not class_token:
            self.cls_token = None
            self.num_prefix_tokens = 0
        if drop_path_mode == "linear":
            for i, block in enumerate(self.blocks):
                rate = drop_path_rate * i / max(1, depth - 1)
                block.drop_path = DropPath(rate) if rate > 0.0 else nn.Identity()
        if residual == "fixup":
            self._init_fixup()

    def _init_fixup(self) -> None:
        first = ("attn.qkv.weight", "attn.q.weight", "attn.k.weight", "attn.v.weight", "mlp.fc1.weight")
        last = ("attn.proj.weight", "mlp.fc2.weight")
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(first):
                    parameter.mul_(self.num_branches**-0.5)
                elif name.endswith(last) or name == "head.weight":
                    parameter.zero_()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise every weight as the constructor does."""
        super().init_weights()
        if self.residual == "fixup":
            self._init_fixup()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last wanted one, and the head; return the indices of the kept blocks.

        A class token that the kept blocks attend to stays.
        """
        cls_token = self.cls_token
        take_indices = super().prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        if 0 <= self.class_token_layer < len(self.blocks):
            self.cls_token, self.num_prefix_tokens = cls_token, 1
        return take_indices


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Cait) -> dict[str, torch.Tensor]:
    """Unwrap a released checkpoint, resample its position embedding, leave out a class token that the model lacks.

    Raises:
        ValueError: Nothing says for what grid the position embedding was made, see `checkpoint_grid`.
    """
    state_dict = state_dict.get("model", state_dict)
    out = {}
    for k, v in state_dict.items():
        k = k.removeprefix("module.")
        if k == "cls_token" and model.cls_token is None:
            continue
        if k.startswith("blocks_token_only.") and model.blocks_token_only is None:
            continue
        if k == "pos_embed":
            new_size = model.patch_embed.grid_size
            old_size = checkpoint_grid(model, v.shape[1], model.patch_embed.patch_size, new_size)
            v = resample_abs_pos_embed(v, list(new_size), old_size=list(old_size), num_prefix_tokens=0)
        out[k] = v
    return out


def _create_cait(variant: str, pretrained: bool = False, model_cls: type[Cait] = Cait, **kwargs) -> Cait:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        model_cls,
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
        "pool_size": (img_size // 16, img_size // 16),
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2103.17239",
        "paper_name": "Going deeper with Image Transformers",
        "origin_url": "https://github.com/facebookresearch/deit",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "cait_xs24_224": _cfg(),
        "cait_xs36_224": _cfg(),
        "cait_xs36_384": _cfg(384),
        "cait_s36_224": _cfg(),
        "cait_s48_224": _cfg(),
        "cait_s48_384": _cfg(384),
        "cait_m24_224": _cfg(),
        "cait_m24_384": _cfg(384),
        "cait_m36_224": _cfg(),
        "cait_study": _cfg(),
    }
)

_XS24 = dict(patch_size=16, embed_dim=288, depth=24, num_heads=6, init_values=1e-5)
_XS36 = dict(_XS24, depth=36, init_values=1e-6)
_S36 = dict(patch_size=16, embed_dim=384, depth=36, num_heads=8, init_values=1e-6)
_S48 = dict(_S36, depth=48)
_M24 = dict(patch_size=16, embed_dim=768, depth=24, num_heads=16, init_values=1e-5)
_M36 = dict(_M24, depth=36, init_values=1e-6)


@register_model
def cait_xs24_224(pretrained=False, **kwargs) -> Cait:
    """CaiT-XS24: 26.6M parameters, 5.4 GMACs."""
    return _create_cait("cait_xs24_224", pretrained, **dict(_XS24, **kwargs))


@register_model
def cait_xs36_224(pretrained=False, **kwargs) -> Cait:
    """CaiT-XS36: 38.6M parameters, 8.0 GMACs."""
    return _create_cait("cait_xs36_224", pretrained, **dict(_XS36, **kwargs))


@register_model
def cait_xs36_384(pretrained=False, **kwargs) -> Cait:
    """CaiT-XS36 at 384 px: 38.7M parameters, 28.7 GMACs."""
    return _create_cait("cait_xs36_384", pretrained, **dict(_XS36, **kwargs))


@register_model
def cait_s36_224(pretrained=False, **kwargs) -> Cait:
    """CaiT-S36: 68.2M parameters, 13.9 GMACs."""
    return _create_cait("cait_s36_224", pretrained, **dict(_S36, **kwargs))


@register_model
def cait_s48_224(pretrained=False, **kwargs) -> Cait:
    """CaiT-S48: 89.5M parameters, 18.5 GMACs."""
    return _create_cait("cait_s48_224", pretrained, **dict(_S48, **kwargs))


@register_model
def cait_s48_384(pretrained=False, **kwargs) -> Cait:
    """CaiT-S48 at 384 px: 89.7M parameters, 63.7 GMACs."""
    return _create_cait("cait_s48_384", pretrained, **dict(_S48, **kwargs))


@register_model
def cait_m24_224(pretrained=False, **kwargs) -> Cait:
    """CaiT-M24: 185.9M parameters, 35.8 GMACs."""
    return _create_cait("cait_m24_224", pretrained, **dict(_M24, **kwargs))


@register_model
def cait_m24_384(pretrained=False, **kwargs) -> Cait:
    """CaiT-M24 at 384 px: 186.1M parameters, 115.9 GMACs."""
    return _create_cait("cait_m24_384", pretrained, **dict(_M24, **kwargs))


@register_model
def cait_m36_224(pretrained=False, **kwargs) -> Cait:
    """CaiT-M36: 270.9M parameters, 53.4 GMACs."""
    return _create_cait("cait_m36_224", pretrained, **dict(_M36, **kwargs))


@register_model
def cait_study(pretrained=False, **kwargs) -> CaitStudy:
    """The paper's design study by the arguments of `CaitStudy`; without any, 12 + 2 layers of width 192."""
    return _create_cait("cait_study", pretrained, model_cls=CaitStudy, **kwargs)
