"""Training tasks: subclasses of `timm.task.TrainingTask`."""

from .distillation import SoftLabelDistillationTask
from .mixed_depth import MixedDepthTask
from .supernet import SupernetTask
from .token_labeling import TokenLabelingTask, TokenLabelLoss

__all__ = ["MixedDepthTask", "SoftLabelDistillationTask", "SupernetTask", "TokenLabelLoss", "TokenLabelingTask"]
