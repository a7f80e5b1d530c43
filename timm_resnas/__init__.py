"""timm_resnas: find, train and publish efficient vision transformers with timm.

Importing this package registers its models with timm, before or after ``import timm``. It imports timm only when
something needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._register import register
from .version import __version__

if TYPE_CHECKING:
    from . import families, models  # noqa: F401
    from .arch import Arch, ArchError
    from .families.elastic import elastic
    from .hub import load, push, save_pretrained
    from .models.vit_tokens import reduce_tokens

__all__ = ["Arch", "ArchError", "__version__", "elastic", "load", "push", "reduce_tokens", "save_pretrained"]

_HOMES = {
    **dict.fromkeys(("Arch", "ArchError"), "arch"),
    "elastic": "families.elastic",
    **dict.fromkeys(("load", "push", "save_pretrained"), "hub"),
    "reduce_tokens": "models.vit_tokens",
}


def __getattr__(name: str) -> Any:
    if name in ("families", "models"):
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
