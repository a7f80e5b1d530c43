"""Training tasks: subclasses of `timm.task.TrainingTask`."""

from .distillation import HardLabelDistillationTask, SoftLabelDistillationTask
from .mixed_depth import MixedDepthTask
from .sandwich import AlphaDivergence, NasVitTask, SandwichTask, merge_gradients
from .supernet import SupernetTask
from .token_labeling import TokenLabelingTask, TokenLabelLoss

__all__ = [
    "AlphaDivergence",
    "HardLabelDistillationTask",
    "MixedDepthTask",
    "NasVitTask",
    "SandwichTask",
    "SoftLabelDistillationTask",
    "SupernetTask",
    "TokenLabelLoss",
    "TokenLabelingTask",
    "merge_gradients",
]
