"""Bounds the share of a weight's variance that a shape of codebooks can carry, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from rpqfx.codebook import CodebookSpec

_STEPS = 60  # of a bisection: as fine as a float is


class Shares(NamedTuple):
    """Shares of the variance of a matrix of independent Gaussian numbers.

    Args:
        random: What the best codebooks explain under random codes.
        learned: What codebooks and codes together explain at most.
    """

    random: float
    learned: float


def shares_of(specs: Iterable[CodebookSpec]) -> Shares:
    """Returns the shares that shapes can carry, over all elements of their matrices.

    Under given codes, codebooks span a space of as many dimensions as they have numbers, the share ``p`` of those of
    the matrix, and explain ``p`` of its variance on average. That the share of one such space is ``x`` or more has a
    probability of ``exp(-n / 2 * (p * ln(p / x) + (1 - p) * ln((1 - p) / (1 - x))))`` for ``n`` elements, and there are
    ``exp(n * rate * ln(2))`` ways to choose codes of ``rate`` bits a weight. Where the product falls below one, no
    codes explain so much. For small ``p`` this is Shannon's bound, ``1 - 4**-rate``.

    Args:
        specs: At least one.
    """
    elements = random = learned = 0.0
    for spec in specs:
        count = spec.num_vectors * spec.dim
        explained = min(1.0, math.prod(spec.codebooks_shape) / count)
        rate = spec.stages * math.log2(spec.entries) / spec.codebook_dim
        elements += count
        random += count * explained
        learned += count * _most(explained, rate)
    return Shares(random / elements, learned / elements)


def _most(given: float, rate: float) -> float:
    """Returns the share that codes of ``rate`` bits a weight raise ``given`` to at most."""
    low, high = given, 1.0
    for _ in range(_STEPS if given < 1 else 0):
        middle = (low + high) / 2
        if middle >= 1 or _cost(given, middle) > rate:
            high = middle
        else:
            low = middle
    return high


def _cost(given: float, share: float) -> float:
    """Returns the bits a weight that choosing takes to get a share that is larger than the given one."""
    nats = given * math.log(given / share) + (1 - given) * math.log((1 - given) / (1 - share))
    return nats / (2 * math.log(2))
