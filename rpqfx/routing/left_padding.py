"""Sequences whose padding comes first, with it behind: windows then count from their first token."""

from __future__ import annotations

import torch
from torch import Tensor


def padding_in_front(mask: Tensor) -> Tensor:
    """Returns how many tokens of padding come first.

    Args:
        mask: ``[B, n]`` bool, False for padding.

    Returns:
        ``[B]`` int64; ``n`` where all is padding.
    """
    return (mask.cumsum(1) == 0).sum(1)


def places(lead: Tensor, n: int) -> Tensor:
    """Returns where each token stands in the sequence as it came, once its padding is behind.

    Args:
        lead: ``[B]``, tokens of padding in front.
        n: Tokens.

    Returns:
        ``[B, n]`` int64.
    """
    return (torch.arange(n, device=lead.device) + lead[:, None]) % max(n, 1)


def moved(x: Tensor, at: Tensor) -> Tensor:
    """Returns tokens in another order.

    Args:
        x: ``[B, n, ...]``.
        at: ``[B, n]``, for each place the token that goes there.
    """
    return x.gather(1, at.view(*at.shape, *[1] * (x.dim() - 2)).expand_as(x))


def moved_back(x: Tensor, at: Tensor) -> Tensor:
    """Returns what ``moved`` was given.

    Args:
        x: ``[B, n, ...]``.
        at: ``[B, n]``, as it was moved by.
    """
    return moved(x, at.argsort(1))
