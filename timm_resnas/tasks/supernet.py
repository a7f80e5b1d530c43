"""Training steps of a supernet: several sub-networks, each on its part of the batch, in one forward-backward pass.

Paper: "Searching for Efficient Multi-Stage Vision Transformers" - https://arxiv.org/abs/2109.00642, section 3.3
"""

from collections.abc import Iterable, Sequence

import torch
from timm.task import ClassificationTask
from torch import nn

from ..arch import Arch
from .token_labeling import TokenLabelLoss, enable_token_labeling

__all__ = ["SupernetTask"]


class SupernetTask(ClassificationTask):
    """Train several sub-networks of a supernet on labels, or on class and patch targets.

    The loss is the mean over the whole batch, so that each sub-network's part of it has the same weight.

    With Accelerate, prepare the model, not the task: ``task.trainable_module = accelerator.prepare(model)``.

    Args:
        model: A supernet; built with ``patch_head=True`` for ``token_labeling``.
        smoothing: Label smoothing. Without effect with ``token_labeling``, whose targets come smoothed.
        token_labeling: Targets are pairs as `timm_resnas.data.TokenMix` makes them (with ``groups=len(archs)``).
        cls_weight: Weight of the class loss in token labelling.
        patch_weight: Weight of the patch loss.
        device: Device of the task's tensors.
        dtype: Dtype of the task's tensors.
        verbose: Log the settings.

    Raises:
        ValueError: ``token_labeling`` without a patch classifier, or weights are negative or both 0.

    Example:
        task = SupernetTask(timm.create_model("vit_resnas_supernet"))
        task(images, labels, archs=sampler.archs(epoch, step))["loss"].backward()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        smoothing: float = 0.1,
        token_labeling: bool = False,
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if token_labeling:
            criterion = TokenLabelLoss(cls_weight, patch_weight)
        else:
            criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
        super().__init__(model, criterion, device=device, dtype=dtype, verbose=verbose)
        self.token_labeling = token_labeling
        if token_labeling:
            enable_token_labeling(model)

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor | Sequence[torch.Tensor],
        archs: Iterable[Arch] | None = None,
        mode: str | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            input: Images [B, C, H, W].
            target: Labels [B]; with ``token_labeling`` class targets [B, K] and patch targets [B, N, K].
            archs: A sub-network for each of ``len(archs)`` equal contiguous groups of the batch; None: the active one
                for all.
            mode: See `Supernet.forward`.

        Returns:
            'loss' and 'output' (class logits in batch order); with ``token_labeling`` also 'cls_loss' and 'patch_loss',
            see `TokenLabelLoss.forward`.
        """
        outputs = self.trainable_module(input, archs=archs, mode=mode)
        if self.token_labeling:
            return self.criterion(outputs, target)
        return {"loss": self.criterion(outputs, target), "output": outputs}
