"""timm_resnas: find, train and publish efficient vision transformers with timm.

Importing this package registers its models with timm.
"""

from .arch import Arch, ArchError
from .models import *  # noqa: F403  (registers the models)
from .nas import supernet  # noqa: F401  (registers the super-networks)
from .version import __version__

__all__ = ["Arch", "ArchError", "__version__"]
