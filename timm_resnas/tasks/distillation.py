"""Distillation into one classifier: from soft labels alone, as SReT is trained, and from hard ones, as CaiT is.

Papers: "Sliced Recursive Transformer" - https://arxiv.org/abs/2111.05297; the loss is the released code's.
"Going deeper with Image Transformers" - https://arxiv.org/abs/2103.17239, which takes hard distillation from DeiT
(https://arxiv.org/abs/2012.12877) without its token.
"""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.task import DistillationTeacher, LogitDistillationTask
from timm.utils import unwrap_model
from torch import nn

__all__ = ["HardLabelDistillationTask", "SoftLabelDistillationTask"]


class SoftLabelDistillationTask(LogitDistillationTask):
    """Train on a teacher's probabilities; the data's labels are not used.

    The loss is the cross-entropy of the student's to the teacher's softmax, both at the same temperature, mean over the
    batch. It has no label term and no factor of the squared temperature, which is what sets it apart from timm's
    `LogitDistillationTask`. (timm's KL divergence at temperature 1 has the same gradient.)

    Args:
        student_model: The model to train, from `timm.create_model`.
        teacher_model: A model, or a name for `timm.create_model` (``local-dir:`` and ``hf-hub:`` included) with
            pretrained weights.
        temperature: Divides both logits.
        teacher_pretrained_path: File of the teacher's weights where ``teacher_model`` is a name; it must have the
            student's number of classes.
        teacher_pretrained_cfg_overlay: Changes to the named teacher's pretrained_cfg.
        device: Device of the teacher and the task's tensors.
        dtype: Dtype of the teacher and the task's tensors.
        verbose: Log the settings.

    Raises:
        ValueError: The teacher has another number of classes or channels than the student, or the temperature is not
            positive.
        RuntimeError: A named teacher has no pretrained weights.

    Example:
        task = SoftLabelDistillationTask(timm.create_model("sret_tiny"), "regnety_160")
        task(images, labels)["loss"].backward()
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module | DistillationTeacher,
        *,
        temperature: float = 1.0,
        teacher_pretrained_path: str | None = None,
        teacher_pretrained_cfg_overlay: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"SoftLabelDistillationTask: temperature must be above 0, got {temperature}")
        student = unwrap_model(student_model)
        name = teacher_model if isinstance(teacher_model, str) else None
        if name is not None and teacher_pretrained_path is None:
            # timm would give a teacher of other classes a new, untrained classifier; its own one is compared instead
            teacher_model = timm.create_model(
                name,
                pretrained=True,
                in_chans=student.in_chans,
                pretrained_cfg_overlay=teacher_pretrained_cfg_overlay,
                device=device,
                dtype=dtype,
            )
        super().__init__(
            student_model,
            teacher_model,
            teacher_pretrained_path=teacher_pretrained_path,
            teacher_pretrained_cfg_overlay=teacher_pretrained_cfg_overlay,
            task_loss_weight=0.0,
            distill_loss_weight=1.0,
            temperature=temperature,
            device=device,
            dtype=dtype,
            verbose=verbose,
        )
        _check_teacher(self, name)
        self.teacher.requires_grad_(False)

    def forward(self, input: torch.Tensor, target: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            input: Images [B, C, H, W], normalised for the student; the teacher gets them in its own normalisation.
            target: Not used.

        Returns:
            'loss', 'output' (the student's logits), and 'kd_loss', the loss detached.
        """
        output = self.trainable_module(input)
        with torch.no_grad():
            teacher_logits = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        soft_labels = (teacher_logits / self.temperature).softmax(dim=-1)
        loss = -(soft_labels * F.log_softmax(output / self.temperature, dim=-1)).sum(dim=-1).mean()
        return {"loss": loss, "output": output, "kd_loss": loss.detach()}


class HardLabelDistillationTask(LogitDistillationTask):
    """Train one classifier on labels and on a teacher's decisions.

    The loss is ``task_loss_weight`` x the criterion's of the labels + ``distill_loss_weight`` x the cross-entropy to
    the teacher's most probable class (DeiT: a half each). Arguments are timm's `LogitDistillationTask`'s;
    ``temperature`` has no effect.

    Raises:
        ValueError: The teacher has another number of classes or channels than the student.
    """

    def __init__(
        self, student_model: nn.Module, teacher_model: str | nn.Module | DistillationTeacher, **kwargs: Any
    ) -> None:
        super().__init__(student_model, teacher_model, **kwargs)
        _check_teacher(self, teacher_model if isinstance(teacher_model, str) else None)
        self.teacher.requires_grad_(False)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            input: Images [B, C, H, W], normalised for the student; the teacher gets them in its own normalisation.
            target: What the criterion takes: labels [B], or mixed ones [B, K].

        Returns:
            'loss', 'output' (the student's logits), and 'task_loss' and 'kd_loss', the two parts, detached.
        """
        output = self.trainable_module(input)
        with torch.no_grad():
            teacher_logits = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        task_loss = self.criterion(output, target)
        kd_loss = F.cross_entropy(output, teacher_logits.argmax(dim=-1))
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss.detach(), "kd_loss": kd_loss.detach()}


def _check_teacher(task: LogitDistillationTask, name: str | None) -> None:
    teacher, student = unwrap_model(task.teacher.model), unwrap_model(task.trainable_module)
    for what, unit in (("num_classes", "classes"), ("in_chans", "input channels")):
        theirs, ours = getattr(teacher, what, None), getattr(student, what)
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"{type(task).__name__}: the teacher {name or type(teacher).__name__} has {theirs} {unit}, the "
                f"student {ours}; the teacher must be trained on the student's data set (fine-tune one first)"
            )
