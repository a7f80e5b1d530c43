"""Any timm vision transformer with fewer heads and hidden units, block by block: `vit_elastic`.

It is the class of its ``base`` with narrower attention and MLP layers inside; features, image sizes, checkpointing and
export are those of the base. `timm_resnas.elastic` finds the widths.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    register_model,
    split_model_name_tag,
    vision_transformer,
)
from torch import nn

from .narrow import NarrowError, branches, narrow

__all__ = [
    "DEFAULT_BASE",
    "base_cfg",
    "check_base",
    "create_base",
    "default_cfg",
    "filter_of",
    "vit_elastic",
]

DEFAULT_BASE = "deit_tiny_patch16_224"
_NO_BASES = ("vit_elastic", "vit_tokens")
_OF_WEIGHTS = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "tag")


def check_base(base: Any) -> str:
    """The name of a base, if it is one.

    Raises:
        NarrowError: It is not the name of a registered model, or is that of one that has a base itself.
    """
    name = split_model_name_tag(base)[0] if isinstance(base, str) else None
    if name is None or not is_model(name) or name.startswith(_NO_BASES) or name.endswith("_supernet"):
        raise NarrowError(f"base must be the name of a vision transformer that timm knows, got {base!r:.80}")
    return base


def base_cfg(base: str, architecture: str) -> dict[str, Any]:
    """Preprocessing and layer names of the base, without its weights, as the configuration of another architecture."""
    cfg = get_pretrained_cfg(check_base(base))
    kept = {k: v for k, v in (cfg.to_dict() if cfg else {}).items() if k not in _OF_WEIGHTS}
    return {**kept, "architecture": architecture}


def create_base(base: str, widths: Sequence[Sequence[int]] | None, **kwargs: Any) -> nn.Module:
    """The base, untrained, cut down to these widths.

    Args:
        base: A timm name.
        widths: See `vit_elastic`; None leaves it as it is.
        **kwargs: The base's own arguments.

    Raises:
        NarrowError: The base is not known or cannot be narrowed, or the widths do not fit.
    """
    model = timm.create_model(check_base(base), pretrained=False, **kwargs)
    if widths is None:
        branches(model)  # a base that cannot be narrowed is refused here
    else:
        narrow(model, widths)
    return model


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Resamples what depends on the image size, as the base's module does."""
    return filter_of(type(model))(state_dict, model)


def filter_of(kind: type[nn.Module]) -> Callable[..., Mapping[str, Any]]:
    """The checkpoint filter of the module that a class or its parent is from."""
    home = next(c for c in kind.__mro__ if c.__module__.startswith(("timm.", "timm_resnas.models.")))
    return getattr(sys.modules[home.__module__], "checkpoint_filter_fn", vision_transformer.checkpoint_filter_fn)


def default_cfg(architecture: str) -> dict[str, Any]:
    """That of the default base, and where it is from."""
    return {
        **base_cfg(DEFAULT_BASE, architecture),
        "pool_size": (14, 14),
        "license": "apache-2.0",
        "origin_url": "https://github.com/huggingface/pytorch-image-models",
        "paper_ids": "arXiv:2012.12877",
        "paper_name": "Training data-efficient image transformers & distillation through attention",
    }


default_cfgs = generate_default_cfgs({"vit_elastic": default_cfg("vit_elastic")})


@register_model
def vit_elastic(
    pretrained: bool = False,
    base: str = DEFAULT_BASE,
    widths: Sequence[Sequence[int]] | None = None,
    **kwargs,
) -> nn.Module:
    """A vision transformer of timm with its own number of heads and hidden units in each block.

    The scale of the attention logits stays the base's. A norm over heads or hidden units (EVA-02, SwiGLU with norm) is
    taken over those that are kept.

    Args:
        pretrained: Load weights: those of a folder or repository, for there are no others.
        base: The timm model, such as ``"vit_small_patch16_224"``.
        widths: ``[num_heads, mlp_hidden]`` or ``[num_heads, mlp_hidden, head_dim]`` of each block of the base; 0: that
            branch is absent. None: the base's.
        **kwargs: The base's own arguments.

    Raises:
        NarrowError: The base cannot be narrowed, or the widths do not fit.
    """
    if kwargs.get("pretrained_cfg") is None:
        kwargs["pretrained_cfg"] = base_cfg(base, "vit_elastic")
    return build_model_with_cfg(
        lambda **args: create_base(base, widths, **args),
        "vit_elastic",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )
