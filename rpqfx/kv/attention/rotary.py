"""The rotary embedding, there and back (Su et al., "RoFormer", 2104.09864).

It is computed in the half-rotation convention; ``RotaryConvention`` says how the others become that one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rpqfx.codebook.steps import sum_dtype
from rpqfx.kv.attention.vectors import rotate


class Rotary(NamedTuple):
    """Cosines and sines of tokens' angles.

    Args:
        cos: ``[B or 1, T, D']``, whose second half repeats the first; ``D'`` is the number of channels that are
            rotated, the first of a head.
        sin: The same shape.
    """

    cos: Tensor
    sin: Tensor


class RotaryConvention(NamedTuple):
    """The convention of a rotary embedding.

    Args:
        angles: How its angles come: ``"halves"`` repeat each other, each is there twice (``"interleaved"``), or each
            once (``"single"``).
        pairs: Which channels a pair is: one of each half, or two beside each other.
    """

    angles: Literal["halves", "interleaved", "single"]
    pairs: Literal["halves", "interleaved"]

    def read(self, cos: Tensor, sin: Tensor) -> Rotary:
        """Returns the angles that a model hands to its attention, in the form that is used here.

        Args:
            cos: ``[B or 1, T, R]``.
            sin: The same.
        """
        if self.angles == "interleaved":
            cos, sin = cos[..., ::2], sin[..., ::2]
        if self.angles != "halves":
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        return Rotary(cos, sin)

    def in_halves(self, x: Tensor, width: int) -> Tensor:
        """Returns queries or keys with the channels of a pair in one half each, which changes no product of theirs.

        Args:
            x: ``[B, H, T, D]``.
            width: How many channels are rotated, the first of a head.
        """
        if self.pairs == "halves":
            return x
        return torch.cat([x[..., :width:2], x[..., 1:width:2], x[..., width:]], -1)


HALVES = RotaryConvention("halves", "halves")


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Returns ``x`` after the embedding.

    Args:
        x: ``[B, H, T, D]``.
        rotary: Of its tokens.
    """
    return rotate(x, *_halves(rotary))


def undo_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Returns ``x`` before the embedding, in its own dtype; see ``unrotated``.

    Args:
        x: ``[B, H, T, D]``.
        rotary: Of its tokens.
    """
    return unrotated(x, *_halves(rotary)).to(x.dtype)


def unrotated(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns keys before their rotary embedding, whose pairs it may have stretched (YaRN) as well as rotated.

    Args:
        k: ``[B, H, T, D]``, floating; a pair is one channel of each half.
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
