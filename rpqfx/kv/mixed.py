"""Attention to tokens of which some are in codes and the others as they are, in one softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rpqfx.kv.attend import straight_scores, turned_scores, weighted_sum
from rpqfx.ops.vectors import Held

# Scores that are alive at a time.
SCORE_ELEMENTS = 2**24


class Parts(NamedTuple):
    """All tokens of a cache: sinks, then those in codes, then the window.

    Args:
        keys: ``[B, H, plain, D]``, sinks and window.
        values: ``[B, H, plain, D_v]``.
        sinks: How many of these come before those in codes.
        held_keys: Those in codes, or None.
        held_values: The same.
        turns: ``cos, sin``, each ``[1 or B, T, R / 2]``, of keys coded before their rotary embedding, or None.
    """

    keys: Tensor
    values: Tensor
    sinks: int
    held_keys: Held | None
    held_values: Held | None
    turns: tuple[Tensor, Tensor] | None

    @property
    def total(self) -> int:
        """Tokens."""
        return self.keys.shape[2] + (0 if self.held_keys is None else self.held_keys.codes.length)

    def scores(self, q: Tensor) -> Tensor:
        """``[B, H, n, total]`` of queries ``[B, H, n, D]``."""
        near = q @ self.keys.to(q.dtype).transpose(-1, -2)
        if self.held_keys is None:
            return near
        scores, last = q.new_empty(*q.shape[:3], self.total), self.sinks + self.held_keys.codes.length
        scores[..., : self.sinks], scores[..., last:] = near[..., : self.sinks], near[..., self.sinks :]
        if self.turns is None:
            straight_scores(q, self.held_keys, scores[..., self.sinks : last])
        else:
            scores[..., self.sinks : last] = turned_scores(q, self.held_keys, *self.turns)
        return scores

    def sums(self, p: Tensor) -> Tensor:
        """``[B, H, n, D_v]`` of weights ``[B, H, n, total]``."""
        values = self.values.to(p.dtype)
        if self.held_values is None:
            return p @ values
        last = self.sinks + self.held_values.codes.length
        far = weighted_sum(p[..., self.sinks : last], self.held_values)
        return far + torch.cat([p[..., : self.sinks], p[..., last:]], -1) @ values


def attention(q: Tensor, parts: Parts, mask: Tensor | None) -> Tensor:
    """Attention of the newest tokens, each to those before it and to itself.

    Args:
        q: ``[B, H_q, n, D]``, scaled, of the dtype that is computed in.
        parts: The tokens.
        mask: ``[B, H_q, n, total]``, True where one may be seen, or added to the scores; or None.

    Returns:
        ``[B, H_q, n, D_v]``; zeros for a query that sees nothing.
    """
    batch, heads, queries, _ = q.shape
    y = q.new_empty(batch, heads, queries, parts.values.shape[3])
    step = max(1, SCORE_ELEMENTS // max(1, batch * heads * parts.total))
    for start in range(0, queries, step):
        some = slice(start, min(start + step, queries))
        y[:, :, some] = _some(q[:, :, some], parts, None if mask is None else mask[:, :, some], queries - start)
    return y


def _some(q: Tensor, parts: Parts, mask: Tensor | None, newest: int) -> Tensor:
    """Of some queries, the first of which is that many tokens from the end."""
    (batch, heads, queries, dim), kv_heads, total = q.shape, parts.keys.shape[1], parts.total
    scores = parts.scores(q.reshape(batch, kv_heads, -1, dim)).view(batch, kv_heads, -1, queries, total)
    if newest > 1:
        last = total - newest + torch.arange(queries, device=q.device)
        scores.masked_fill_(torch.arange(total, device=q.device) > last[:, None], -torch.inf)
    if mask is not None:
        mask = mask.unflatten(1, (kv_heads, -1))
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype is torch.bool else scores.add_(mask)
    p = torch.softmax(scores, -1)
    if mask is not None:
        p = p.masked_fill_((scores == -torch.inf).all(-1, keepdim=True), 0)
    return parts.sums(p.view(batch, kv_heads, -1, total)).view(batch, heads, queries, -1)
