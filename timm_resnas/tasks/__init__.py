"""Training tasks: subclasses of `timm.task.TrainingTask`."""

from .distillation import HardLabelDistillationTask, SoftLabelDistillationTask
from .mixed_depth import MixedDepthTask
from .sandwich import AlphaDivergence, NasVitTask, SandwichTask, merge_gradients
from .slim_masks import SLIM_PRICES, SlimMaskTask
from .supernet import SupernetTask
from .token_labeling import TokenLabelingTask, TokenLabelLoss
from .token_reduction import DynamicViTTask, dynamicvit_groups

__all__ = [
    "SLIM_PRICES",
    "AlphaDivergence",
    "DynamicViTTask",
    "HardLabelDistillationTask",
    "MixedDepthTask",
    "NasVitTask",
    "SandwichTask",
    "SlimMaskTask",
    "SoftLabelDistillationTask",
    "SupernetTask",
    "TokenLabelLoss",
    "TokenLabelingTask",
    "dynamicvit_groups",
    "merge_gradients",
]
