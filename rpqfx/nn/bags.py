"""Bags of rows that have been looked up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bags(
    ids: Tensor,
    rows: Tensor,
    padding: int | None,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mode: str,
    include_last_offset: bool,
) -> Tensor:
    """Sums, means or maxima of rows, as ``F.embedding_bag`` makes them of a table.

    Args:
        ids: ``[B, L]``, or ``[T]`` with ``offsets``.
        rows: The row of each id, ``[ids.numel(), D]``.
        padding: An id that bags leave out, not below zero.
        offsets: ``[B]``, where each bag starts.
        per_sample_weights: Weight of each id, of its shape.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: Whether the last offset is the end of the last bag.

    Returns:
        ``[B, D]``.
    """
    flat = ids.reshape(-1)
    place = torch.arange(flat.shape[0], device=ids.device, dtype=torch.int64)
    last = None
    if padding is not None:  # every padded place points to one more row, which bags leave out
        last = flat.shape[0]
        rows = torch.cat([rows, torch.zeros_like(rows[:1]) if last else rows.new_zeros(1, rows.shape[1])])
        place = place.masked_fill(flat == padding, last)
    return F.embedding_bag(
        place.view(ids.shape),
        rows,
        None if offsets is None else offsets.long(),
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=last,
    )
