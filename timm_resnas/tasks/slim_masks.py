"""Training of ViT-Slim's masks: a network and the masks in it at once, under a price on masks.

Paper: "Vision Transformer Slimming: Multi-Dimension Searching in Continuous Optimization Space" -
https://arxiv.org/abs/2201.00814; prices are the released script's for DeiT-S.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn

from ..families.slim_masks import KINDS, MaskedViT

__all__ = ["SLIM_PRICES", "SlimMaskTask"]

SLIM_PRICES: Mapping[str, float] = {"attention": 2e-4, "mlp": 5e-5, "tokens": 1e-4}


class SlimMaskTask(ClassificationTask):
    """The criterion's loss + for each kind of masks its price x the sum of their absolute values.

    A kind of price 0 is not trained. The released program divides prices by the number of its processes (4 in its
    example); here they are the same on any number.

    Args:
        model: A `MaskedViT`.
        criterion: Loss of logits and targets. Created from criterion_kwargs when None.
        criterion_kwargs: Arguments for timm's `create_classification_loss`.
        prices: Of kinds of masks; those of `SLIM_PRICES` where None.
        device: Device of the task's tensors.
        dtype: Dtype of the task's tensors.
        verbose: Log the settings.

    Raises:
        ValueError: The model has no masks, or a price is negative or of a kind that is not known.

    Example:
        task = SlimMaskTask(MaskedViT(model))
        task(images, labels)["loss"].backward()
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any = None,
        criterion_kwargs: dict[str, Any] | None = None,
        *,
        prices: Mapping[str, float] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        masked = unwrap_model(model)
        if not isinstance(masked, MaskedViT):
            raise ValueError(
                f"SlimMaskTask: {type(masked).__name__} has no masks; make them by "
                f"timm_resnas.families.slim_masks.MaskedViT(model)"
            )
        given = dict(SLIM_PRICES if prices is None else prices)
        if set(given) - set(KINDS) or not all(price >= 0 for price in given.values()):
            raise ValueError(f"SlimMaskTask: prices are numbers of at least 0 for {', '.join(KINDS)}; got {given}")
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        self.slim_prices = {kind: given.get(kind, 0.0) for kind in KINDS if len(getattr(masked, kind))}
        for kind, price in self.slim_prices.items():
            getattr(masked, kind).requires_grad_(price > 0)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            input: Images [B, C, H, W].
            target: What the criterion takes: labels [B], or mixed ones [B, K].

        Returns:
            'loss', 'output' (logits), and detached: 'task_loss', and by kind 'price_attention', ..., the masks' sums.
        """
        found = super().forward(input, target)
        sums = unwrap_model(self.trainable_module).prices()
        loss = found["loss"]
        for kind, price in self.slim_prices.items():
            loss = loss + price * sums[kind]
        parts = {f"price_{kind}": sums[kind].detach() for kind in self.slim_prices}
        return {**found, "loss": loss, "task_loss": found["loss"].detach(), **parts}
