"""timm_resnas: find, train and publish efficient vision transformers with timm.

Importing this package registers its models with timm.
"""

from . import models  # noqa: F401  (registers the models)
from .arch import Arch, ArchError
from .nas import supernet  # noqa: F401  (registers the super-networks)
from .version import __version__

__all__ = ["Arch", "ArchError", "__version__"]
