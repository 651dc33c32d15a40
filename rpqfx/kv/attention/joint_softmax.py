"""Attention to tokens of which some are in codes and the others as they are, in one softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rpqfx.kv.attention.attend import scores_of_rotated, straight_scores, weighted_sum
from rpqfx.kv.attention.score_options import Changes
from rpqfx.kv.attention.vectors import Held

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
        angles: ``cos, sin``, each ``[1 or B, T, R / 2]``, of keys coded before their rotary embedding, or None.
        twice: How many of the last in codes are in front of the window as well, as they are.
    """

    keys: Tensor
    values: Tensor
    sinks: int
    held_keys: Held | None
    held_values: Held | None
    angles: tuple[Tensor, Tensor] | None
    twice: int = 0

    @property
    def columns(self) -> int:
        """The number of columns of the scores; a token that is kept both exactly and as codes has two."""
        return self.keys.shape[2] + (0 if self.held_keys is None else self.held_keys.codes.length)

    @property
    def total(self) -> int:
        """Tokens."""
        return self.columns - self.twice

    def across(self, x: Tensor) -> Tensor:
        """Returns what there is for each token, ``[..., total]``, for each column."""
        if not self.twice or self.held_keys is None:
            return x
        last = self.sinks + self.held_keys.codes.length
        return torch.cat([x[..., :last], x[..., last - self.twice :]], -1)

    def scores(self, q: Tensor) -> Tensor:
        """Returns ``[B, H, n, columns]`` of queries ``[B, H, n, D]``."""
        near = q @ self.keys.to(q.dtype).transpose(-1, -2)
        if self.held_keys is None:
            return near
        scores, last = q.new_empty(*q.shape[:3], self.columns), self.sinks + self.held_keys.codes.length
        scores[..., : self.sinks], scores[..., last:] = near[..., : self.sinks], near[..., self.sinks :]
        if self.angles is None:
            straight_scores(q, self.held_keys, scores[..., self.sinks : last])
        else:
            scores[..., self.sinks : last] = scores_of_rotated(q, self.held_keys, *self.angles)
        return scores

    def sums(self, p: Tensor) -> Tensor:
        """Returns ``[B, H, n, D_v]`` of weights ``[B, H, n, columns]``."""
        values = self.values.to(p.dtype)
        if self.held_values is None:
            return p @ values
        last = self.sinks + self.held_values.codes.length
        far = weighted_sum(p[..., self.sinks : last], self.held_values)
        return far + torch.cat([p[..., : self.sinks], p[..., last:]], -1) @ values


def attention(
    q: Tensor, parts: Parts, mask: Tensor | None, changes: Changes | None = None, coded: Tensor | None = None
) -> Tensor:
    """Returns attention of the newest tokens, each to those before it and to itself.

    Args:
        q: ``[B, H_q, n, D]``, scaled, of the dtype that is computed in.
        parts: The tokens.
        mask: ``[B, H_q, n, total]``, True where one may be seen, or added to the scores; or None.
        changes: Of the scores.
        coded: ``[n]``, how many of those in codes each query finds as codes, and the others as they are; with tokens
            that are there twice.

    Returns:
        ``[B, H_q, n, D_v]``; zeros for a query that sees nothing.
    """
    batch, heads, queries, _ = q.shape
    y = q.new_empty(batch, heads, queries, parts.values.shape[3])
    step = max(1, SCORE_ELEMENTS // max(1, batch * heads * parts.columns))
    for start in range(0, queries, step):
        some = slice(start, min(start + step, queries))
        hidden = _hidden(parts, some, queries, None if coded is None else coded[some], q.device)
        own = None if changes is None else changes.of(some)
        y[:, :, some] = _some(q[:, :, some], parts, None if mask is None else mask[:, :, some], hidden, own)
    return y


def _hidden(parts: Parts, some: slice, queries: int, coded: Tensor | None, device: torch.device) -> Tensor | None:
    """Returns ``[n, columns]`` bool, the tokens that some queries do not see: later ones, and second forms; or None."""
    if queries - some.start <= 1 and coded is None:
        return None
    last = parts.total - queries + torch.arange(some.start, some.stop, device=device)
    token = parts.across(torch.arange(parts.total, device=device))
    hidden = token > last[:, None]
    if coded is None or parts.held_keys is None:
        return hidden
    column, near = torch.arange(parts.columns, device=device), parts.sinks + parts.held_keys.codes.length
    as_codes = (column >= parts.sinks) & (column < near)
    until = parts.sinks + coded[:, None]
    return hidden | (as_codes & (token >= until)) | (~as_codes & (token >= parts.sinks) & (token < until))


def _some(q: Tensor, parts: Parts, mask: Tensor | None, hidden: Tensor | None, changes: Changes | None) -> Tensor:
    """Returns attention of some queries."""
    (batch, heads, queries, dim), kv_heads, columns = q.shape, parts.keys.shape[1], parts.columns
    scores = parts.scores(q.reshape(batch, kv_heads, -1, dim)).view(batch, kv_heads, -1, queries, columns)
    scores = scores if changes is None else changes.capped(scores)
    if hidden is not None:
        scores = scores.masked_fill_(hidden, -torch.inf)
    if mask is not None:
        mask = parts.across(mask).unflatten(1, (kv_heads, -1))
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype is torch.bool else scores.add_(mask)
    if changes is None:
        p = torch.softmax(scores, -1)
    else:
        p = changes.softmax(scores.flatten(1, 2)).view_as(scores)
    if mask is not None:
        p = p.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
    return parts.sums(p.view(batch, kv_heads, -1, columns)).view(batch, heads, queries, -1)
