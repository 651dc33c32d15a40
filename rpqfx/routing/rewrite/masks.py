"""Masks and positions of the tokens that were chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.routing.router import Choice


def pairs(mask: Tensor, choice: Choice) -> Tensor:
    """A mask of pairs of tokens, for the chosen ones.

    Args:
        mask: ``[..., n or 1, n]`` with up to two axes before, the first of which counts samples or is 1. Bool, True
            where a query may look, or added to scores.
        choice: Of ``k`` tokens.

    Returns:
        ``[B, h or 1, k, k]``. Slots without a token are seen by none but themselves.
    """
    at = _indices(choice)
    mask = mask[(None,) * (4 - mask.dim())]
    batch, k = at.shape
    mask = mask.expand(batch, -1, -1, -1)
    if mask.shape[-2] > 1:
        mask = mask.gather(-2, at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
    mask = mask.gather(-1, at[:, None, None, :].expand(-1, *mask.shape[1:3], -1)).expand(-1, -1, k, -1)
    if choice.mask is None:
        return mask
    seen = choice.mask[:, :, None] | torch.eye(k, dtype=torch.bool, device=mask.device)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def singles(x: Tensor, choice: Choice, axis: int = 1) -> Tensor:
    """What there is for each token, for the chosen ones.

    Args:
        x: ``[B or 1, ..., n, ...]``.
        choice: Of ``k`` tokens.
        axis: That of ``n``.

    Returns:
        ``[B, ..., k, ...]``.
    """
    at = _indices(choice)
    x = x.expand(at.shape[0], *x.shape[1:])
    shape = [at.shape[0]] + [1] * (x.dim() - 1)
    shape[axis] = at.shape[1]
    wanted = list(x.shape)
    wanted[axis] = at.shape[1]
    return x.gather(axis, at.view(shape).expand(wanted))


def seen_tokens(mask: Tensor, batch: int) -> Tensor:
    """``[B, n]`` bool: tokens that any query may look at, by a mask of pairs as above."""
    mask = mask[(None,) * (4 - mask.dim())]
    open_ = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return open_.any(-2).any(1).expand(batch, -1)


def _indices(choice: Choice) -> Tensor:
    assert choice.indices is not None
    return choice.indices[:, 0]
