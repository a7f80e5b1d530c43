"""Model families; importing a family's module registers its models with timm."""

from . import (
    autoformer,
    cait_study,
    efficientformer_nas,
    efficientformerv2_nas,
    exmobilevit,
    reformer,
    sepvit,
    sret,
    uninet,
    vit_elastic,
    vit_resnas,
    vit_tokens,
)

__all__ = [
    "autoformer",
    "cait_study",
    "efficientformer_nas",
    "efficientformerv2_nas",
    "exmobilevit",
    "reformer",
    "sepvit",
    "sret",
    "uninet",
    "vit_elastic",
    "vit_resnas",
    "vit_tokens",
]
