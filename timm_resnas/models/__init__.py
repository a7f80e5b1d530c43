"""Model families; importing a family's module registers its models with timm."""

from . import cait_study, exmobilevit, reformer, sepvit, sret, uninet, vit_elastic, vit_resnas

__all__ = ["cait_study", "exmobilevit", "reformer", "sepvit", "sret", "uninet", "vit_elastic", "vit_resnas"]
