"""Training tasks: subclasses of `timm.task.TrainingTask`."""

from .distillation import HardLabelDistillationTask, SoftLabelDistillationTask
from .mixed_depth import MixedDepthTask
from .supernet import SupernetTask
from .token_labeling import TokenLabelingTask, TokenLabelLoss

__all__ = [
    "HardLabelDistillationTask",
    "MixedDepthTask",
    "SoftLabelDistillationTask",
    "SupernetTask",
    "TokenLabelLoss",
    "TokenLabelingTask",
]
