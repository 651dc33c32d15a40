"""Arguments of a quantizer that others pass on."""

from __future__ import annotations

from typing import TypedDict


class QuantizerOptions(TypedDict, total=False):
    """Further arguments of ``VectorQuantizer``, as a ``HeadCoder`` takes them."""

    shared_stages: int
    shared: bool
    use_cosine_sim: bool
    beam: int
    decay: float | None
    threshold_ema_dead_code: float
    commitment: float
    seed: int
