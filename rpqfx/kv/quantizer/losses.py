"""The terms that a quantiser adds to the loss of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.kv.quantizer.encode import Step
from rpqfx.kv.quantizer.groups import Groups


def stage_losses(steps: list[Step], mask: Tensor, slots: Groups, commitment: float, *, by_gradient: bool) -> Tensor:
    """Returns the commitment loss of all stages (van den Oord et al., 2017, arXiv 1711.00937), and the codebooks' part.

    Args:
        steps: All stages.
        mask: ``[T]`` bool, False for tokens that do not count.
        slots: Which groups have which stages.
        commitment: Weight of the part whose gradients go to the inputs.
        by_gradient: Whether to add the part whose gradients go to the entries.

    Returns:
        A scalar, float32 or as wide as the points: for each stage the mean over tokens and groups, added up. Zero
        where no token counts.
    """
    total = torch.zeros((), device=mask.device)
    tokens = mask.sum().clamp_min(1)
    for step in steps:
        share = 1 / (tokens * slots.groups_with(step.stage))
        total = total + commitment * share * _squares(step.rests - step.entries.detach(), mask)
        if by_gradient:
            total = total + share * _squares(step.rests.detach() - step.entries, mask)
    return total


def _squares(gaps: Tensor, mask: Tensor) -> Tensor:
    """Returns the sum of squares. Filling before squaring keeps NaN in padding out of the gradients."""
    return gaps.masked_fill(~mask[:, None, None], 0).square().sum()
