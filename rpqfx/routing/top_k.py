"""``torch.topk`` with a gradient for the choice itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rpqfx.errors import SpecError
from rpqfx.routing.exact import exact_scores


class TopK(NamedTuple):
    """What ``topk`` returns, each ``[..., k]``.

    Attributes:
        values: The largest, times their gates.
        indices: Where they were.
        scores: How much each is chosen, 0 to 1.
        gates: 1, with the gradient of the scores.
    """

    values: Tensor
    indices: Tensor
    scores: Tensor
    gates: Tensor


def topk(x: Tensor, k: int, *, eps: float = 0.1, fetch_ratio: float = 9 / 8, mask: Tensor | None = None) -> TopK:
    """The ``k`` largest of the last axis, in descending order; gradients reach those that just missed, too.

    Args:
        x: ``[..., n]``, floating.
        k: How many, at most ``n``.
        eps: How soft the choice is, in units of ``x``.
        fetch_ratio: Scores sum to ``k`` times this, so that more than are chosen learn; 9/8 in CoLT5.
        mask: ``[..., n]`` bool, False for what comes last; its values are minus infinity and its gates 0.

    Returns:
        Values and gates in the dtype of ``x``, scores as ``exact_scores`` has them.

    Raises:
        SpecError: If ``k`` is not from 1 to ``n``, or ``fetch_ratio`` is below 1.
        InputError: As ``exact_scores``.
    """
    n = x.shape[-1]
    if not 1 <= k <= n:
        raise SpecError(f"k is from 1 to {n}, the length of the last axis; got {k}")
    check_ratio(fetch_ratio)
    scores = exact_scores(x, min(k * fetch_ratio, n), eps=eps, mask=mask)
    masked = x if mask is None else x.masked_fill(~mask, -torch.inf)
    values, indices = masked.topk(k)
    scores = scores.gather(-1, indices)
    gates = straight_through(scores, None if mask is None else mask.gather(-1, indices)).to(x.dtype)
    # minus infinity stays what it is rather than become NaN
    values = values * gates if mask is None else torch.where(values.isinf(), values, values * gates)
    return TopK(values, indices, scores, gates)


def straight_through(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 for each score and 0 where the mask is False, with the scores' gradient."""
    ones = scores + (1 - scores).detach()
    return ones if mask is None else ones.masked_fill(~mask, 0.0)


def check_ratio(fetch_ratio: float) -> None:
    """Raises ``SpecError`` for one below 1."""
    if fetch_ratio < 1:
        raise SpecError(f"fetch_ratio must be at least 1, got {fetch_ratio}; 1 fetches just what is chosen, CoLT5 9/8")
