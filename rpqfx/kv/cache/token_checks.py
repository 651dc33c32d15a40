"""Checks of the tokens, the queries and the masks that come to the cache of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.kv.attention.attend import Rope
from rpqfx.kv.cache.codes import Side
from rpqfx.kv.coder.protocol import Coder


def check_tokens(
    keys: Side, values: Side, name: str, k: Tensor, v: Tensor, rope: Rope | None, batch: int, rotated: bool | None
) -> None:
    """Raises unless tokens go with those that are there.

    Args:
        keys: The codes of keys.
        values: The codes of values.
        name: Of the layer.
        k: ``[B, H, T, D]``, to come.
        v: ``[B, H, T, D_v]``.
        rope: ``cos`` and ``sin`` of these tokens, or None.
        batch: Rows that are there, 0 where there are no tokens.
        rotated: Whether tokens came with a rotary embedding so far, None where there are none.

    Raises:
        InputError: If they do not.
    """
    for x, side in ((k, keys), (v, values)):
        coder = side.coder
        if x.dim() != 4 or x.shape[1] != coder.heads or x.shape[3] != coder.dim:
            raise InputError(f"{side.name} are {tuple(x.shape)}, expected [B, {coder.heads}, T, {coder.dim}]")
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"{side.name} hold NaN or infinity")
    batch = batch or k.shape[0]
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch or not k.shape[2]:
        shapes = f"keys are {tuple(k.shape)} and values {tuple(v.shape)}"
        raise InputError(f"{name}: {shapes}, expected tokens of {batch} samples")
    if rotated is not None and rotated != (rope is not None):
        raise InputError(f"{name}: all tokens come with a rotary embedding or all without one, got some of each")
    if rope is not None and any(part.shape[-2] != k.shape[2] or part.shape[-1] > k.shape[3] for part in rope):
        raise InputError(f"{name}: cos is {tuple(rope[0].shape)}, the keys are {tuple(k.shape)}")


def check_queries(q: Tensor, coder: Coder, name: str, batch: int, total: int) -> None:
    """Raises unless queries go with the tokens that are there.

    Args:
        q: ``[B, H_q, n, D]``.
        coder: Of the keys.
        name: Of the layer.
        batch: Rows that are there.
        total: Tokens that are there.

    Raises:
        InputError: If they do not.
    """
    if not total:
        raise InputError(f"{name}: the cache is empty; append tokens before they are attended to")
    if q.dim() != 4 or q.shape[0] != batch or q.shape[1] % coder.heads or q.shape[3] != coder.dim:
        expected = f"[{batch}, a multiple of {coder.heads}, n, {coder.dim}]"
        raise InputError(f"{name}: queries are {tuple(q.shape)}, expected {expected}")
    if q.shape[2] > total:
        raise InputError(f"{name}: {q.shape[2]} queries are more than the {total} tokens there are")


def full_mask(mask: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Returns a mask of a shape.

    Args:
        mask: Broadcastable to it.
        shape: ``[B, H_q, n, total]``.
        name: Of the layer.

    Raises:
        InputError: If it is not.
    """
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise InputError(f"{name}: a mask {tuple(mask.shape)} does not broadcast to {shape}") from None
