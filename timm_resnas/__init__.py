"""timm_resnas: find, train and publish efficient vision transformers with timm.

Importing this package registers its models with timm.
"""

from typing import Any

from . import families, models  # noqa: F401  (registers the models)
from .arch import Arch, ArchError
from .version import __version__

__all__ = ["Arch", "ArchError", "__version__", "load", "push", "save_pretrained"]


def __getattr__(name: str) -> Any:
    # the Hub's code is not imported before it is used
    if name in ("load", "push", "save_pretrained"):
        from . import hub

        return getattr(hub, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
