"""Arguments of a quantizer that others pass on."""

from __future__ import annotations

from typing import TypedDict


class QuantizerOptions(TypedDict, total=False):
    """Further arguments of ``VectorQuantizer``, as a ``HeadCoder`` takes them."""

    repeat: int
    shared: bool
    cosine: bool
    beam: int
    decay: float | None
    revive: float
    commitment: float
    seed: int
