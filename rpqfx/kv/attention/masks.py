"""Masks of attention to keys that are there twice: as they are, and as their codes."""

from __future__ import annotations

import torch
from torch import Tensor


def masks(near: Tensor, mask: Tensor | None, is_causal: bool, query: Tensor) -> tuple[Tensor, Tensor]:
    """Returns masks of the keys as they are, and of the coded ones.

    Args:
        near: ``[T_q, T]``, which keys a query finds as they are.
        mask: Boolean, or added to scores, or None.
        is_causal: Whether a query sees no later keys, the first query only the first of them.
        query: The queries.
    """
    queries, tokens = near.shape
    far = ~near
    if is_causal:  # torch aligns it to the upper left
        seen = torch.ones(queries, tokens, dtype=torch.bool, device=near.device).tril()
        near, far = near & seen, far & seen
    if mask is None:
        return near, far
    if mask.dtype == torch.bool:
        return near & mask, far & mask
    low = torch.full((), float("-inf"), dtype=mask.dtype, device=mask.device)
    return torch.where(near, mask, low), torch.where(far, mask, low)
