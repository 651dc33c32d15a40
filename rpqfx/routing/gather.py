"""Chosen tokens out of a sequence, and what became of them back into it."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from rpqfx.routing.router import Choice


def take(x: Tensor, choice: Choice) -> Tensor:
    """The chosen tokens.

    Args:
        x: ``[B, n, d]``.
        choice: Of ``k`` tokens of each sample by each of ``R`` routing tokens.

    Returns:
        ``[B, R, k, d]``.
    """
    if choice.indices is None:
        return repeat(x, "b n d -> b r n d", r=choice.scores.shape[1])
    rows = rearrange(x, "b n d -> (b n) d").index_select(0, _flat(choice.indices, x.shape[1]))
    return rearrange(rows, "(b r k) d -> b r k d", b=x.shape[0], r=choice.scores.shape[1])


def put(
    out: Tensor, choice: Choice, values: Tensor, stand_in: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    """Adds to each token what was made of it.

    Args:
        out: ``[B, n, d]``.
        choice: By one routing token.
        values: ``[B, k, d]``; where the choice's mask is False they are left out.
        stand_in: ``[d]``, added to the tokens that were not chosen.
        plus: ``[B, n, d]``, added to all.

    Returns:
        ``[B, n, d]``.
    """
    if choice.indices is None:
        return out + values if plus is None else out + values + plus
    flat = rearrange(out, "b n d -> (b n) d")
    # The first sum is a tensor of its own, which no backward pass looks at: the others are added in place.
    flat = flat.clone() if plus is None else flat + rearrange(plus, "b n d -> (b n) d")
    if stand_in is not None:
        stand_in = stand_in.to(flat.dtype)
        flat, values = flat.add_(stand_in), values - stand_in
    if choice.mask is not None:
        values = values.masked_fill(~choice.mask[:, 0, :, None], 0.0)
    flat.index_add_(0, _flat(choice.indices, out.shape[1]), rearrange(values, "b k d -> (b k) d").to(flat.dtype))
    return rearrange(flat, "(b n) d -> b n d", b=out.shape[0])


def put_instead(out: Tensor, choice: Choice, values: Tensor) -> Tensor:
    """Gives each chosen token what was made of it, as far as it is chosen, in place of what it has.

    Args:
        out: ``[B, n, d]``.
        choice: By one routing token, with indices.
        values: ``[B, k, d]``; where the choice's mask is False they are left out.

    Returns:
        ``[B, n, d]``: ``(1 - score) * out + score * value`` for the chosen tokens, so those with a score of 1 have
        exactly the value.
    """
    assert choice.indices is not None
    scores = choice.scores[:, 0, :, None].to(values.dtype)
    values = scores * values + (1 - scores) * take(out, choice)[:, 0]
    taken = torch.ones_like(choice.indices[:, 0]) if choice.mask is None else choice.mask[:, 0].long()
    counts = torch.zeros(out.shape[:2], dtype=torch.long, device=out.device)
    chosen = counts.scatter_add(1, choice.indices[:, 0], taken) > 0
    return put(out.masked_fill(chosen[..., None], 0.0), choice, values)


def _flat(indices: Tensor, n: int) -> Tensor:
    """``[B, R, k]`` into ``[B, n]`` as indices into ``[B * n]``."""
    return (indices + n * torch.arange(indices.shape[0], device=indices.device)[:, None, None]).flatten()
