"""Masks of ViT-Slim: trained with the network, turned into a smaller one within the budget."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from torch import nn

from ..families.slim_masks import MaskedViT
from ..models.vit_tokens import reduce_tokens
from ..nas.cost import Budget
from ..tasks import SLIM_PRICES, SlimMaskTask
from .run import Run, RunError
from .settings import SearchOptions, TrainOptions
from .train import ModelTraining, TrainData

__all__ = ["check_masks", "train_masks"]

WEIGHT_DECAY = 1e-3  # the paper's while masks are trained, of weights and masks
WAY = 30.0  # how far its learning rate lets a mask go in all: 5e-4 in each of 50 epochs' 62,500 steps
MOST = 0.05  # learning rate of masks


class MaskTraining(ModelTraining):
    """Trains a network and its masks; the last weights are those that count, and they stay in its checkpoint."""

    def __init__(self, chosen: TrainOptions, options: SearchOptions, *args: Any) -> None:
        self.search_options = options
        super().__init__(chosen, *args)

    def make_task(self, options: TrainOptions, model: nn.Module, device: torch.device) -> TrainingTask:
        """See `ModelTraining.make_task`."""
        smoothing = dict(smoothing=options.smoothing)
        prices = prices_of(self.search_options)
        return SlimMaskTask(model, criterion_kwargs=smoothing, prices=prices, device=device, verbose=False)

    def make_optimizer(self, options: TrainOptions, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW; masks have their own learning rate, and the same weight decay as weights."""
        spared = model.no_weight_decay()
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, param in model.named_parameters():
            if param.requires_grad:
                mask = not name.startswith("model.")
                groups.setdefault((mask, param.ndim <= 1 or name in spared), []).append(param)
        steps = options.epochs * (len(self.data.train) // options.batch_size)
        scale = (self.search_options.mask_lr or max(options.lr, min(MOST, WAY / max(1, steps)))) / options.lr
        return create_optimizer_v2(
            [
                {
                    "params": params,
                    "weight_decay": 0.0 if plain else options.weight_decay,
                    "lr_scale": scale if mask else 1.0,
                }
                for (mask, plain), params in groups.items()
            ],
            opt="adamw",
            lr=options.lr,
        )

    def keep(self, record: dict[str, Any]) -> None:
        """Nothing: masks on the way are no network."""

    def saved(self) -> None:
        """See `keep`."""


def prices_of(options: SearchOptions) -> dict[str, float]:
    """Of each kind of masks."""
    return dict(SLIM_PRICES) | dict(zip(("attention", "mlp"), options.mask_prices or (), strict=False))


def check_masks(options: SearchOptions, model: nn.Module, budget: Budget | None) -> None:
    """Whether masks can be trained in a model for a budget.

    Raises:
        ValueError: They cannot; the message says why.
    """
    if options.mask_prices is not None and (len(options.mask_prices) != 2 or not any(options.mask_prices)):
        raise RunError("--mask-prices are two numbers, of attention and of MLP masks, at least one of them above 0")
    if options.mask_tokens is not None:
        reduce_tokens(model, "positions")  # whether it can be without some
    masked(options, copy.deepcopy(model)).check_budget(budget)


def masked(options: SearchOptions, model: nn.Module) -> MaskedViT:
    """The model with the masks that the options ask for; those without a price are not trained."""
    net = MaskedViT(model, options.mask_attention, tokens=options.mask_tokens is not None)
    for kind, price in prices_of(options).items():
        getattr(net, kind).requires_grad_(price > 0)
    return net


def train_masks(
    options: SearchOptions, chosen: TrainOptions, accelerator: Accelerator, run: Run, model: nn.Module, data: TrainData
) -> MaskedViT:
    """A network with trained masks; a run that had them continues, or takes them as they are.

    Args:
        options: Of the search.
        chosen: Of a training, see `ModelTraining`.
        accelerator: See `Training`.
        run: The stage's part of the run.
        model: With weights; it is trained on.
        data: What it is trained on.
    """
    chosen = dataclasses.replace(
        chosen,
        epochs=options.mask_epochs,
        lr=options.lr,
        sched="constant",  # the paper's
        warmup_epochs=0,
        weight_decay=WEIGHT_DECAY,
        eval_every=options.mask_epochs,
    )
    net = masked(options, model.train())
    training = MaskTraining(chosen, options, accelerator, run, net, data, None)
    run.print(
        f"\n{run.folder.name}: {chosen.epochs} epochs of {training.steps} steps, the network and its masks"
        + (f"; continues at step {training.state.step}" if training.state.step else "")
    )
    training.run_epochs()
    return net.eval()
