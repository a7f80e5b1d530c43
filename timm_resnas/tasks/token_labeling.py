"""Token labelling: a class loss, and a loss of the patch classifier on every token of the last stage.

Paper: "Searching for Efficient Multi-Stage Vision Transformers" - https://arxiv.org/abs/2109.00642 (weights 1 : 1)
"""

from collections.abc import Sequence

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn

__all__ = ["TokenLabelLoss", "TokenLabelingTask"]


class TokenLabelLoss(nn.Module):
    """Soft cross-entropy of class logits (mean over images) and patch logits (mean over images and tokens).

    Args:
        cls_weight: Weight of the class loss.
        patch_weight: Weight of the patch loss.

    Raises:
        ValueError: Weights are negative or both 0.
    """

    def __init__(self, cls_weight: float = 1.0, patch_weight: float = 1.0) -> None:
        super().__init__()
        if min(cls_weight, patch_weight) < 0 or not cls_weight + patch_weight > 0:
            raise ValueError(
                f"token labelling: cls_weight={cls_weight} and patch_weight={patch_weight}: neither may be below 0, "
                f"nor both 0"
            )
        self.cls_weight = cls_weight
        self.patch_weight = patch_weight
        self.cross_entropy = SoftTargetCrossEntropy()

    def forward(
        self, outputs: tuple[torch.Tensor, torch.Tensor], target: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The losses as a task returns them.

        Args:
            outputs: Class logits [B, K] and patch logits [B, N, K].
            target: Class targets and patch targets of the same shapes, each row a distribution.

        Returns:
            'loss', 'output' (class logits), 'cls_loss' and 'patch_loss' (before weighting, detached).

        Raises:
            ValueError: The target is not such a pair, or does not fit the outputs.
            RuntimeError: The outputs are no pair, as those of a model in eval mode.
        """
        if isinstance(target, torch.Tensor) or len(target) != 2:
            raise ValueError("token labelling: the target must be the pair (targets, patch_targets) from TokenMix")
        if not isinstance(outputs, tuple):
            raise RuntimeError("token labelling: the model is in eval mode; call task.train() first")
        for what, logits, wanted in zip(("class", "patch"), outputs, target, strict=True):
            if logits.shape != wanted.shape:
                raise ValueError(
                    f"token labelling: {what} targets of shape {list(wanted.shape)} do not fit the model's logits of "
                    f"{list(logits.shape)}; TokenMix takes model.num_classes and model.grids[-1]"
                )
        cls_loss, patch_loss = (self.cross_entropy(x, y) for x, y in zip(outputs, target, strict=True))
        return {
            "loss": self.cls_weight * cls_loss + self.patch_weight * patch_loss,
            "output": outputs[0],
            "cls_loss": cls_loss.detach(),
            "patch_loss": patch_loss.detach(),
        }


def enable_token_labeling(model: nn.Module) -> None:
    """Make the model return patch logits in training.

    Raises:
        ValueError: It has no patch classifier.
    """
    network = unwrap_model(model)
    if not hasattr(network, "set_token_labeling"):
        raise ValueError(f"token labelling: {type(network).__name__} has no patch classifier; ViT-ResNAS models have")
    network.set_token_labeling(True)


class TokenLabelingTask(ClassificationTask):
    """Train on class and patch targets, such as `timm_resnas.data.TokenMix` makes them.

    Args:
        model: A model built with ``patch_head=True``.
        cls_weight: Weight of the class loss.
        patch_weight: Weight of the patch loss.
        device: Device of the task's tensors.
        dtype: Dtype of the task's tensors.
        verbose: Log the settings.

    Raises:
        ValueError: The model has no patch classifier, or weights are negative or both 0.

    Example:
        model = timm.create_model("vit_resnas_tiny", patch_head=True)
        task, mix = TokenLabelingTask(model), TokenMix(model.num_classes, model.grids[-1])
        images, *target = mix(images, labels, seed=step)
        task(images, target)["loss"].backward()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(model, TokenLabelLoss(cls_weight, patch_weight), device=device, dtype=dtype, verbose=verbose)
        enable_token_labeling(model)

    def forward(self, input: torch.Tensor, target: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute the loss; call it in training mode.

        Args:
            input: Images [B, C, H, W].
            target: Class targets [B, K] and patch targets [B, N, K].

        Returns:
            See `TokenLabelLoss.forward`, errors included.
        """
        return self.criterion(self.trainable_module(input), target)
