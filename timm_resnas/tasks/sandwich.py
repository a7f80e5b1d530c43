"""Training steps of a supernet in which each sub-network sees the whole batch: the sandwich rule, and NASViT's.

Papers: "Universally Slimmable Networks and Improved Training Techniques" - https://arxiv.org/abs/1903.05134 (sandwich
rule, in-place distillation); "AlphaNet: Improved Training of Supernets with Alpha-Divergence" -
https://arxiv.org/abs/2102.07954; "NASViT: Neural Architecture Search for Efficient Vision Transformers with Gradient
Conflict-Aware Supernet Training" - https://openreview.net/forum?id=Qaw16njk6L. The formulas are those that NASViT's
released program computes; where that doubles the gradient of a parameter that only the largest network uses, and where
processes of it may keep gradients to themselves, this does not.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.task import DistillationTeacher
from timm.utils import unwrap_model
from torch import nn

from ..arch import Arch
from .supernet import SupernetTask

__all__ = ["AlphaDivergence", "NasVitTask", "SandwichTask", "merge_gradients"]

Gradients = Sequence[torch.Tensor | None]


class SandwichTask(SupernetTask):
    """Train the largest network on labels or a teacher, and smaller ones on its probabilities, on the same images.

    The largest network's loss is the cross-entropy to labels, or to the teacher's probabilities. The others' is the sum
    of their cross-entropies to the largest network's probabilities of this very step, through which no gradient flows
    back; drop path and dropout are off for them.

    A training loop takes `losses` one after the other, keeps the two sides' gradients apart, and joins them by `merge`.

    Args:
        model: A supernet.
        smoothing: Label smoothing.
        teacher: A trained classifier of the same classes; labels are not used then.
        temperature: Divides the teacher's logits (NASViT: 0.2).
        device: Device of the task's tensors.
        dtype: Dtype of the task's tensors.
        verbose: Log the settings.

    Raises:
        ValueError: The temperature is not positive.

    Example:
        task = SandwichTask(timm.create_model("vit_resnas_supernet"))
        archs = SandwichSampler(net.space, num_archs=4).archs(epoch, step)  # the largest one first
        task(images, labels, archs=archs)["loss"].backward()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        smoothing: float = 0.1,
        teacher: nn.Module | None = None,
        temperature: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"{type(self).__name__}: temperature must be above 0, got {temperature}")
        super().__init__(model, smoothing=smoothing, device=device, dtype=dtype, verbose=verbose)
        self.temperature = temperature
        self.teacher = None
        if teacher is not None:
            self.teacher = DistillationTeacher(teacher, device=device, dtype=dtype).requires_grad_(False)
            cfg = unwrap_model(model).pretrained_cfg
            for name in ("mean", "std"):
                value = torch.tensor(cfg[name], device=device, dtype=dtype).view(1, -1, 1, 1)
                self.register_buffer(f"student_{name}", value, persistent=False)

    def train(self, mode: bool = True) -> "SandwichTask":
        """The teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(  # type: ignore[override]  # there is no step without archs
        self, input: torch.Tensor, target: torch.Tensor, archs: Sequence[Arch], mode: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute the loss of all, for one backward pass.

        Args:
            input: Images [B, C, H, W].
            target: Labels [B].
            archs: Sub-networks, the largest first; each is computed on the whole batch.
            mode: See `Supernet.forward`.

        Returns:
            'loss' (the sum), 'output' (the largest network's logits), 'largest_loss' and 'others_loss', detached.
        """
        parts = list(self._parts(input, target, archs, mode))
        largest, others = (loss for _, loss in parts)
        return {
            "loss": largest + others,
            "output": parts[0][0],
            "largest_loss": largest.detach(),
            "others_loss": others.detach(),
        }

    def losses(
        self, input: torch.Tensor, target: torch.Tensor, archs: Sequence[Arch], mode: str | None = None
    ) -> Iterator[torch.Tensor]:
        """The largest network's loss, then the sum of the others', see `forward`.

        Each is computed when it is asked for, so that the activations of one side are gone before the other's are made.
        """
        for _, loss in self._parts(input, target, archs, mode):
            yield loss

    def _parts(
        self, input: torch.Tensor, target: torch.Tensor, archs: Sequence[Arch], mode: str | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        largest, *others = archs
        if not others:
            raise ValueError("the sandwich rule needs the largest network and at least one other")
        output = self.trainable_module(input, archs=[largest], mode=mode)
        taught = output.detach()
        yield output, self._largest_loss(input, output, target)
        del output
        with _without_drop(self.trainable_module):
            outputs = self.trainable_module(input, archs=others, mode=mode, whole=True)
        yield outputs, len(others) * self.divergence(outputs, taught.repeat(len(others), 1))

    def _largest_loss(self, input: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.teacher is None:
            return self.criterion(output, target)
        with torch.no_grad():
            logits = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        return F.cross_entropy(output, (logits / self.temperature).softmax(dim=-1))

    def divergence(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Of the others' logits from the largest network's, [n, K] both; mean over n."""
        return F.cross_entropy(student, teacher.softmax(dim=-1))

    def merge(self, largest: Gradients, others: Gradients, epoch: int, scale: float = 1.0) -> list[torch.Tensor | None]:
        """The gradients to step by, from both sides' over all images and processes.

        Args:
            largest: Of the largest network's loss, per parameter.
            others: Of the others'.
            epoch: From 0.
            scale: What a gradient scaler has multiplied both with.
        """
        return merge_gradients(others, largest, project=False)


class NasVitTask(SandwichTask):
    """The sandwich rule of NASViT: AlphaNet's adaptive divergence, and gradients that do not conflict.

    The others' gradients are clipped by their norm over all parameters; from ``project_epoch`` on, the largest
    network's is freed of what conflicts with theirs, see `merge_gradients`.

    Args:
        model: As for `SandwichTask`, like the others.
        clip_others: Largest norm of the others' gradients (the paper's: 1); None: any.
        project_epoch: First epoch, from 0, with projection; before, gradients are added (the paper's: 101 of 400).
        divergence: Of the others' logits from the largest network's; None: `AlphaDivergence`.
        **kwargs: Of `SandwichTask`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        clip_others: float | None = 1.0,
        project_epoch: int = 101,
        divergence: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.clip_others = clip_others
        self.project_epoch = project_epoch
        self.alpha_divergence = divergence or AlphaDivergence()

    def divergence(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """See `SandwichTask.divergence`."""
        return self.alpha_divergence(student, teacher)

    def merge(self, largest: Gradients, others: Gradients, epoch: int, scale: float = 1.0) -> list[torch.Tensor | None]:
        """See `SandwichTask.merge`."""
        if self.clip_others:
            # scaled gradients are clipped where they are: an overflow in them stays one, and the scaler skips the step
            norms = [torch.linalg.vector_norm(g) for g in others if g is not None]
            limit = self.clip_others * scale
            factor = (limit / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6 * scale)).clamp(max=1)
            others = [None if g is None else g * factor for g in others]
        return merge_gradients(others, largest, project=epoch >= self.project_epoch, eps=1e-6 * scale**2)


class AlphaDivergence(nn.Module):
    """AlphaNet's adaptive alpha-divergence of a student's probabilities from a teacher's.

    For each image the divergence that is larger, of those for several alpha: a negative one penalises where the student
    is too sure, a positive one where it is not sure enough. The returned number is a surrogate with the gradient of
    these divergences with respect to the student; it is not their value, see `values`.

    Args:
        alphas: Orders to choose from.
        clip: Largest power of the ratio of probabilities, for orders other than 0 and 1.

    Source: arXiv 2102.07954; the surrogate, with its clipping, is the released code's.
    """

    def __init__(self, alphas: Sequence[float] = (-1.0, 1.0), clip: float = 5.0) -> None:
        super().__init__()
        self.alphas = tuple(alphas)
        self.clip = clip

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The surrogate loss, mean over images.

        Args:
            student: Logits [B, K].
            teacher: Logits [B, K]; no gradient flows to them.
        """
        log_q = F.log_softmax(student.float() if student.dtype.itemsize < 4 else student, dim=-1)
        values, slopes = self._orders(log_q.detach(), teacher)
        chosen = values.argmax(dim=0)[None, :, None].expand(1, *log_q.shape)
        slope = slopes.gather(0, chosen)[0]
        return -(log_q.detach().exp() * slope * log_q).sum(dim=-1).mean()

    @torch.no_grad()
    def values(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The divergences of each image, [len(alphas), B]."""
        return self._orders(F.log_softmax(student, dim=-1), teacher)[0]

    @torch.no_grad()
    def _orders(self, log_q: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each order the divergence of each image, [n, B], and what weights the gradients, [n, B, K]."""
        q, log_r = log_q.exp(), F.log_softmax(teacher.to(log_q.dtype), dim=-1) - log_q
        values, slopes = [], []
        for alpha in self.alphas:
            if alpha == 1:
                slope = log_r.exp()
                value = slope * log_r
            elif alpha == 0:
                value, slope = -log_r, log_r - 1
            else:
                power, least = (alpha * log_r).exp().clamp(max=self.clip), 1 / (alpha * (alpha - 1))
                value, slope = least * power - least, power / alpha + least
            values.append((q * value).sum(dim=-1))
            slopes.append(slope)
        return torch.stack(values), torch.stack(slopes)


def merge_gradients(
    others: Gradients, largest: Gradients, project: bool = True, limit: float = 2.0, eps: float = 1e-6
) -> list[torch.Tensor | None]:
    """NASViT's gradients: the largest network's, where it conflicts with the others', is projected on their normal.

    For each parameter ``(1 + c) * others + largest`` with ``c = -<others, largest> / (eps + |others|^2)``, between 0
    and ``limit``: where the two agree, their sum; in a conflict, the part of the largest network's that undoes the
    others' is taken out of it.

    Args:
        others: Gradients of the smaller networks, one per parameter; None: none of them uses it.
        largest: Of the largest network.
        project: False: the sum.
        limit: Largest ``c``; beyond it a conflict is mended in part.
        eps: Added to the squared norm.

    Returns:
        One per parameter; where one side is None the other as it is.
    """
    merged: list[torch.Tensor | None] = []
    for other, full in zip(others, largest, strict=True):
        if other is None or full is None:
            merged.append(full if other is None else other)
        elif project:
            inner, square = (other * full).sum(), other.square().sum()
            conflict = (-inner / (eps + square)).clamp(0, limit)
            merged.append((1 + conflict) * other + full)
        else:
            merged.append(other + full)
    return merged


@contextlib.contextmanager
def _without_drop(model: nn.Module) -> Iterator[None]:
    """Drop path and dropout off, the model otherwise in its mode."""
    rates = []
    for module in model.modules():
        # the rate, not the mode: attention reads the rate of its dropout
        name = "drop_prob" if isinstance(module, DropPath) else "p" if isinstance(module, nn.Dropout) else None
        if name is not None:
            rates.append((module, name, getattr(module, name)))
    if any(rate for *_, rate in rates) and any(getattr(m, "grad_checkpointing", False) for m in model.modules()):
        # the backward pass would compute these networks again with what is off here
        raise ValueError(
            "with gradient checkpointing the sandwich rule cannot turn drop path and dropout off for the smaller "
            "networks; set their rates to 0, or checkpointing off"
        )
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
