"""Training of DynamicViT: decisions that drop tokens, on labels and on the same network with all of its tokens.

Paper: "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" - https://arxiv.org/abs/2106.02034;
weights of the losses and parameter groups are the released code's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn

from ..models.token_reduction import DynamicViT, unreduced

__all__ = ["DynamicViTTask", "dynamicvit_groups"]


class DynamicViTTask(ClassificationTask):
    """Train a DynamicViT; the teacher is a copy of the network as it is now, with all of its tokens.

    The loss is the criterion's of the labels + ``ratio_weight`` x the mean over locations and images of the squared
    distance of the share that is kept from its keep ratio + ``distill_weight`` x (the KL divergence from the teacher's
    classes + the mean squared distance from the teacher's final patch tokens, over those that are kept to the end).

    Position embeddings and prefix tokens (class, registers) are frozen. `dynamicvit_groups` has the learning rates.

    Args:
        model: A vit_tokens of method dynamicvit, with the weights of a trained base.
        criterion: Loss of logits and targets. Created from criterion_kwargs when None.
        criterion_kwargs: Arguments for timm's `create_classification_loss`.
        ratio_weight: Of the keep ratios (DeiT-S 2; 5 is recommended for DeiT-B).
        distill_weight: Of each of the teacher's two terms.
        device: Device of the teacher and the task's tensors.
        dtype: Dtype of the teacher and the task's tensors.
        verbose: Log the settings.

    Raises:
        ValueError: The model is no DynamicViT.

    Example:
        task = DynamicViTTask(timm_resnas.reduce_tokens(model, "dynamicvit"))
        task(images, labels)["loss"].backward()
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any = None,
        criterion_kwargs: dict[str, Any] | None = None,
        *,
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        network = unwrap_model(model)
        if not isinstance(network, DynamicViT):
            raise ValueError(
                f"DynamicViTTask: {type(network).__name__} has no predictors; make one by "
                f"timm_resnas.reduce_tokens(model, 'dynamicvit')"
            )
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        network.set_masked_training()
        for name in network.no_weight_decay():  # type: ignore[attr-defined]  # of the base's class
            if getattr(network, name, None) is not None:
                getattr(network, name).requires_grad_(False)
        self.keep_ratios = list(network.keep_ratios)
        self.num_prefix_tokens = network.num_prefix_tokens  # type: ignore[attr-defined]
        self.ratio_weight, self.distill_weight = ratio_weight, distill_weight
        self.teacher = unreduced(network).to(device, dtype).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "DynamicViTTask":
        """The teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss; call it in training mode.

        Args:
            input: Images [B, C, H, W].
            target: What the criterion takes: labels [B], or mixed ones [B, K].

        Returns:
            'loss', 'output' (logits), and detached: 'task_loss', 'ratio_loss', 'kd_loss', 'token_loss', and 'kept_0',
            'kept_1', ..., the share of tokens after each location.
        """
        out = self.trainable_module(input)
        if isinstance(out, torch.Tensor):
            raise RuntimeError("DynamicViTTask: the model is in eval mode; call task.train() first.")
        with torch.no_grad():
            tokens = self.teacher.forward_features(input)
            teacher_logits = self.teacher.forward_head(tokens)
        task_loss = self.criterion(out.logits, target)
        shares = torch.stack([decision.mean(dim=1) for decision in out.decisions])  # [locations, B]
        ratio_loss = (shares - shares.new_tensor(self.keep_ratios)[:, None]).square().mean()
        kd_loss = F.kl_div(
            out.logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1), reduction="batchmean", log_target=True
        )
        kept = out.decisions[-1].detach() > 0.5
        # a sum, so that a batch without any kept token has a loss of zero
        distance = (out.features - tokens[:, self.num_prefix_tokens :]).square()[kept].sum()
        token_loss = distance / max(int(kept.sum()) * out.features.shape[-1], 1)
        loss = task_loss + self.ratio_weight * ratio_loss + self.distill_weight * (kd_loss + token_loss)
        parts = dict(task_loss=task_loss, ratio_loss=ratio_loss, kd_loss=kd_loss, token_loss=token_loss)
        parts |= {f"kept_{s}": share.mean() for s, share in enumerate(shares)}
        return {"loss": loss, "output": out.logits, **{k: v.detach() for k, v in parts.items()}}


def dynamicvit_groups(model: nn.Module, weight_decay: float, backbone_scale: float) -> list[dict[str, Any]]:
    """Parameter groups of a DynamicViT for an optimizer of torch or timm.

    Args:
        model: A vit_tokens of method dynamicvit.
        weight_decay: Not for biases and norms, nor for what the model spares.
        backbone_scale: What the learning rate of all but the predictors is multiplied by (``lr_scale``, which timm's
            schedules read).

    Returns:
        Groups with ``backbone``, whether they are of the base; of parameters that are trained.
    """
    spared = set(model.no_weight_decay())
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            key = (not name.startswith("score_predictor."), param.ndim <= 1 or name in spared)
            groups.setdefault(key, []).append(param)
    return [
        {
            "params": params,
            "weight_decay": 0.0 if plain else weight_decay,
            "lr_scale": backbone_scale if backbone else 1.0,
            "backbone": backbone,
        }
        for (backbone, plain), params in groups.items()
    ]
