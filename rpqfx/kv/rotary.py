"""The rotary embedding, there and back (Su et al., "RoFormer", 2104.09864), in the half-rotation convention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rpqfx.ops.vectors import rotate
from rpqfx.steps import sum_dtype


class Rotary(NamedTuple):
    """Cosines and sines of tokens' angles.

    Args:
        cos: ``[B or 1, T, D']``; ``D'`` is the number of channels that turn, the first of a head.
        sin: The same shape.
    """

    cos: Tensor
    sin: Tensor


def turn(x: Tensor, rotary: Rotary) -> Tensor:
    """``x`` after the embedding.

    Args:
        x: ``[B, H, T, D]``.
        rotary: Of its tokens.
    """
    return rotate(x, *_halves(rotary))


def turn_back(x: Tensor, rotary: Rotary) -> Tensor:
    """``x`` before the embedding, in its own dtype; see ``turned_back``.

    Args:
        x: ``[B, H, T, D]``.
        rotary: Of its tokens.
    """
    return turned_back(x, *_halves(rotary)).to(x.dtype)


def turned_back(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys before their rotary embedding, whose pairs it may have stretched (YaRN) as well as turned.

    Args:
        k: ``[B, H, T, D]``, floating.
        cos: ``[B or 1, T, D' / 2]``, without its repetition.
        sin: The same.

    Returns:
        ``[B, H, T, D]``, in float32 at least.
    """
    dtype = sum_dtype(k.dtype)
    cos, sin = cos.to(dtype), sin.to(dtype)
    size = cos.square() + sin.square()
    return rotate(k.to(dtype), cos / size, -sin / size)


def _halves(rotary: Rotary) -> tuple[Tensor, Tensor]:
    half = rotary.cos.shape[-1] // 2
    return rotary.cos[..., :half], rotary.sin[..., :half]
