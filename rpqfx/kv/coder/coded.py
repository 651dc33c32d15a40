"""Vectors as codes, and the factors that go with them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Coded(NamedTuple):
    """Vectors as codes.

    Args:
        codes: ``[B, S, T]``, integer.
        scale: ``[B, H, T]`` float16, or None.
    """

    codes: Tensor
    scale: Tensor | None
