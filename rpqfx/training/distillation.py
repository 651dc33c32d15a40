"""Measures how far a student's output is from its teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten

from rpqfx.errors import InputError


class Distillation:
    """The loss that is taken where none is given.

    Of logits the divergence of the student's distribution from the teacher's, ``KL(teacher || student)`` over the last
    axis, as a mean over positions (Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network",
    1503.02531); of other outputs the mean squared difference relative to the teacher's mean square, as a mean over
    tensors.

    Args:
        logits: Whether outputs are logits. Left out, those that have ``logits`` are, and that alone of them counts.
        temperature: Divisor of the logits; the divergence is multiplied by its square.
    """

    def __init__(self, logits: bool | None = None, temperature: float = 1.0) -> None:
        self._logits, self._temperature = logits, temperature

    def __call__(self, student: Any, teacher: Any, batch: Any = None) -> Tensor:
        """Returns the loss, a scalar in float32 at least.

        Args:
            student: Output of the student.
            teacher: Output of the teacher.
            batch: Is not looked at.

        Raises:
            InputError: If the outputs differ in structure or shape, or hold no floating tensor.
        """
        found, wanted = _logits_of(student), _logits_of(teacher)
        named = found is not None and wanted is not None and self._logits is not False
        ours, theirs = _pairs(found if named else student, wanted if named else teacher)
        if named or self._logits:
            return torch.stack([self._divergence(a, b) for a, b in zip(ours, theirs, strict=True)]).mean()
        return torch.stack([_relative(a, b) for a, b in zip(ours, theirs, strict=True)]).mean()

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        t = self._temperature
        a, b = (F.log_softmax(x.float() / t, -1).flatten(0, -2) for x in (student, teacher))
        return F.kl_div(a, b, reduction="batchmean", log_target=True) * t**2


def _relative(student: Tensor, teacher: Tensor) -> Tensor:
    teacher = teacher.float() if teacher.dtype.itemsize < 4 else teacher
    difference = student.to(teacher.dtype) - teacher
    return difference.square().mean() / teacher.square().mean().clamp_min(torch.finfo(teacher.dtype).tiny)


def _logits_of(output: Any) -> Tensor | None:
    held = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return held if isinstance(held, Tensor) else None


def _pairs(student: Any, teacher: Any) -> tuple[list[Tensor], list[Tensor]]:
    ours, ours_tree = tree_flatten(student)
    theirs, theirs_tree = tree_flatten(teacher)
    if ours_tree != theirs_tree:
        raise InputError(
            f"student and teacher return different things ({ours_tree} and {theirs_tree}); give a loss that compares "
            "them, or the dense model that the student was made from"
        )
    kept = [(a, b) for a, b in zip(ours, theirs, strict=True) if _floating(a) and _floating(b)]
    if not kept:
        raise InputError("the outputs hold no floating tensor to compare; give a loss")
    for a, b in kept:
        if a.shape != b.shape:
            raise InputError(
                f"student and teacher return tensors of different shapes, {list(a.shape)} and {list(b.shape)}; give a "
                "loss that compares them, or the dense model that the student was made from"
            )
    return [a for a, _ in kept], [b for _, b in kept]


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 0
