"""Model families; importing a family's module registers its models with timm."""

from .vit_resnas import *  # noqa: F403
