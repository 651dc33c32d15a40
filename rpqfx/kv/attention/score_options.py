"""Attention whose scores are more than products and a mask: soft caps and learned sinks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Changes(NamedTuple):
    """The changes that a model makes to its scores besides scaling and masking them.

    Args:
        softcap: Scores become ``softcap * tanh(score / softcap)`` before they are masked (Gemma 2, 2408.00118).
        sinks: ``[H_q]``, a score for each head that takes a share of the softmax and has no value (gpt-oss,
            2508.10925); or ``[B, H_q, n, 1]``, one for each query besides.
    """

    softcap: float | None = None
    sinks: Tensor | None = None

    def __bool__(self) -> bool:
        """Returns whether there is any."""
        return self.softcap is not None or self.sinks is not None

    def capped(self, scores: Tensor) -> Tensor:
        """Returns scores after the soft cap.

        Args:
            scores: Of any shape, before they are masked.
        """
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def of(self, some: slice) -> Changes:
        """Returns those of some of the queries.

        Args:
            some: Of the queries.
        """
        if self.sinks is None or self.sinks.dim() == 1:
            return self
        return Changes(self.softcap, self.sinks[:, :, some])

    def softmax(self, scores: Tensor) -> Tensor:
        """Returns weights of masked scores.

        Args:
            scores: ``[B, H_q, n, T]``.
        """
        if self.sinks is None:
            return torch.softmax(scores, -1)
        sinks = self.sinks.to(scores.dtype)
        sinks = (sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else sinks).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    changes: Changes,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Returns scaled dot-product attention with changed scores, weights in float32 as models with such make them.

    Args:
        query: ``[B, H_q, T_q, D]``.
        key: ``[B, H, T, D]``.
        value: ``[B, H, T, D_v]``.
        changes: Of the scores.
        attn_mask: Boolean, or added to scores.
        dropout_p: Of attention weights.
        is_causal: Whether a query sees no later keys, the first query only the first of them.
        scale: Of scores; ``1 / sqrt(D)`` if left out.
        enable_gqa: Whether several query heads share one of keys.
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = changes.capped(scores).to(torch.promote_types(scores.dtype, torch.float32))
    low = torch.finfo(scores.dtype).min
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, low)
    if attn_mask is not None:
        bool_mask = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, low) if bool_mask else scores + attn_mask
    return F.dropout(changes.softmax(scores).to(query.dtype), dropout_p) @ value
