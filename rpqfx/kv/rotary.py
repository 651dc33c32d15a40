"""The rotary embedding, there and back (Su et al., "RoFormer", 2104.09864), in the half-rotation convention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    cos, sin, part, rest = _parts(x, rotary)
    return _whole(part * cos + _half(part) * sin, rest)


def turn_back(x: Tensor, rotary: Rotary) -> Tensor:
    """``x`` before the embedding; embeddings that also stretch (YaRN) are undone as well.

    Args:
        x: ``[B, H, T, D]``.
        rotary: Of its tokens.
    """
    cos, sin, part, rest = _parts(x, rotary)
    return _whole((part * cos - _half(part) * sin) / (cos.square() + sin.square()), rest)


def _parts(x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    cos, sin = (angle[:, None].to(x.dtype) for angle in rotary)
    turned = cos.shape[-1]
    return cos, sin, x[..., :turned], x[..., turned:] if turned < x.shape[-1] else None


def _whole(part: Tensor, rest: Tensor | None) -> Tensor:
    return part if rest is None else torch.cat([part, rest], -1)


def _half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)
