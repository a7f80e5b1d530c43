"""Mixed-depth training of recursive transformers (SReT).

Paper: `Sliced Recursive Transformer` - https://arxiv.org/abs/2111.05297. The paper names mixed-depth training, branches
of different recursion depth that share weights and are trained together; the released code does not contain it. Our
reading: the branch of depth r applies every shared block only r times (its first r passes, each with its own non-linear
projection), all branches share stem, blocks and head, each has its own classification loss, and one step minimises the
weighted mean of the losses. The trained network then works at every depth (`model.set_recursions(r)`).
"""

from collections.abc import Callable, Sequence

import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn

__all__ = ["MixedDepthTask"]


class MixedDepthTask(ClassificationTask):
    """Train a recursive network at several recursion depths at once.

    All branches run in one forward call and share one pass through the stem, so that batch statistics are taken once
    and one backward gives the sum of the branches' gradients (also under DDP).

    Args:
        model: a model with `set_mixed_depth`, such as SReT.
        recursions: depths of the branches, the last being the model's full depth. Default: 1 to the full depth.
        weights: weight of each branch's loss, by default equal; they are normalised to sum 1.
        criterion: loss of logits and targets. Created from criterion_kwargs when None.
        criterion_kwargs: arguments for timm's `create_classification_loss`.
        device: device for the task's tensors.
        dtype: dtype for the task's tensors.
        verbose: log the settings.

    Raises:
        ValueError: the model has no recursion, or recursions and weights do not fit it or each other.

    Example:
        task = MixedDepthTask(timm.create_model("sret_tiny"), recursions=(1, 2))
        task(images, labels)["loss"].backward()
    """

    def __init__(
        self,
        model: nn.Module,
        recursions: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        criterion: nn.Module | Callable | None = None,
        criterion_kwargs: dict | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        network = unwrap_model(model)
        if not hasattr(network, "set_mixed_depth"):
            raise ValueError(f"MixedDepthTask: {type(network).__name__} has no set_mixed_depth; SReT models have.")
        full = network.max_recursions
        recursions = tuple(range(1, full + 1) if recursions is None else recursions)
        if not recursions or list(recursions) != sorted(set(recursions)) or recursions[-1] != full:
            raise ValueError(
                f"MixedDepthTask: recursions={recursions} must rise and end with the model's full depth, {full}."
            )
        weights = [1.0] * len(recursions) if weights is None else list(weights)
        if len(weights) != len(recursions) or min(weights) < 0 or not sum(weights):
            raise ValueError(
                f"MixedDepthTask: weights={weights}: one for each of recursions={recursions}, none below 0, not all 0."
            )
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        network.set_mixed_depth(recursions)
        self.recursions = recursions
        self.weights = [w / sum(weights) for w in weights]

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss of all branches; call it in training mode.

        Args:
            input: images `[B, C, H, W]`.
            target: labels `[B]`, or what the criterion takes.

        Returns:
            'loss' (weighted mean), 'output' (logits of the full depth), and 'loss_r<n>' of each depth, detached.
        """
        outputs = self.trainable_module(input)
        if not isinstance(outputs, tuple):
            raise RuntimeError("MixedDepthTask: the model is in eval mode; call task.train() first.")
        losses = [self.criterion(output, target) for output in outputs]
        result = {f"loss_r{r}": loss.detach() for r, loss in zip(self.recursions, losses, strict=True)}
        result["loss"] = sum(w * loss for w, loss in zip(self.weights, losses, strict=True))
        result["output"] = outputs[-1]
        return result
