"""Any timm vision transformer with fewer tokens after some of its blocks: `vit_tokens`, `reduce_tokens`.

It is the class of its ``base`` with a method of `token_reduction` in front; layers, their names and all else are those
of the base.
"""

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, get_model_args, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from . import token_positions  # noqa: F401 - its method
from .narrow import narrow
from .token_reduction import METHODS, TokenError, TokenReduction, reduce_in_place
from .vit_elastic import DEFAULT_BASE, base_cfg, check_base, default_cfg, filter_of

__all__ = ["reduce_tokens", "vit_tokens"]

_NEW = ("score_predictor.", "patch_merger.")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """As the base's; a checkpoint of the base keeps the new layers as they are initialised."""
    parents = type(model).__mro__
    plain = next(c for c in parents if issubclass(c, VisionTransformer) and not issubclass(c, TokenReduction))
    found = filter_of(plain)(state_dict, model)
    if any(key.startswith(_NEW) for key in found):  # of a single merger without a number, as in the paper's code
        return {re.sub(r"^patch_merger\.(?=norm|queries)", "patch_merger.0.", k): v for k, v in found.items()}
    return {**found, **{k: v for k, v in model.state_dict().items() if k.startswith(_NEW)}}


def reduce_tokens(model: nn.Module, method: str = "dynamicvit", **options: Any) -> nn.Module:
    """A copy of a timm vision transformer with fewer tokens after some of its blocks, a `vit_tokens`.

    >>> model = timm.create_model("deit_small_patch16_224", pretrained=True)
    >>> fewer = timm_resnas.reduce_tokens(model, "ats", max_tokens=0.7)  # no training needed

    Its weights, classifier, image size and modes are the model's.

    Args:
        model: A timm VisionTransformer or a `vit_elastic` of one, made by `timm.create_model`.
        method: ``"dynamicvit"``: drops tokens that a trained predictor scores low; ``"ats"``: keeps tokens that matter
            to the class token, without parameters; ``"patchmerger"``: merges all into a few averages, to be trained.
        **options: See `set_up` of `DynamicViT` (``locations, keep_ratios``), `AdaptiveTokenSampling` (``blocks,
            max_tokens`` or ``keep_ratios``) and `PatchMerging` (``after_block, num_tokens, scaled``).

    Raises:
        TokenError: The method or its options do not fit the model; the message names the module.
        TypeError: The method has no such option.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg:
        raise TokenError(
            f"a {type(model).__name__} was not made by timm.create_model, which is needed to build it again"
        )
    own, base = get_model_args(model), cfg["architecture"]
    if base == "vit_elastic":
        base = own.pop("base", DEFAULT_BASE)
    model = reduce_in_place(copy.deepcopy(model), method, **options)
    model._model_args = {**model._model_args, **own, "base": base, "method": method, **model.options()}
    model.pretrained_cfg = model.default_cfg = {**cfg, "architecture": "vit_tokens"}
    return model


default_cfgs = generate_default_cfgs(
    {
        "vit_tokens": {
            **default_cfg("vit_tokens"),
            "origin_url": "https://github.com/raoyongming/DynamicViT",
            "paper_ids": "arXiv:2106.02034",
            "paper_name": "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
        }
    }
)


@register_model
def vit_tokens(
    pretrained: bool = False,
    base: str = DEFAULT_BASE,
    widths: Sequence[Sequence[int]] | None = None,
    method: str = "dynamicvit",
    **kwargs,
) -> nn.Module:
    """A timm vision transformer with fewer tokens after some of its blocks.

    Args:
        pretrained: Load weights: those of a folder or repository, for there are no others.
        base: The timm model, such as ``"vit_small_patch16_224"``.
        widths: Of a base that was shrunk, see `vit_elastic`.
        method: See `reduce_tokens`.
        **kwargs: Options of the method, and the base's own arguments.

    Raises:
        TokenError: The method or its options do not fit the base.
        NarrowError: The base is not known, or the widths do not fit.
    """
    if method not in METHODS:
        raise TokenError(f"method must be {', '.join(METHODS)}, got {method!r:.40}")
    names = list(inspect.signature(METHODS[method].set_up).parameters)[1:]
    options = {name: kwargs.pop(name) for name in names if name in kwargs}

    def build(**args: Any) -> nn.Module:
        model = timm.create_model(check_base(base), pretrained=False, **args)
        if widths is not None:
            narrow(model, widths)
        return reduce_in_place(model, method, **options)

    if kwargs.get("pretrained_cfg") is None:
        kwargs["pretrained_cfg"] = base_cfg(base, "vit_tokens")
    return build_model_with_cfg(
        build,
        "vit_tokens",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )
