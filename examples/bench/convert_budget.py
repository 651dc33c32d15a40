"""Which setting each matrix of a model gets, so that the whole stays within a number of stored bits."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One way to store one matrix.

    Args:
        setting: What the quantiser is told.
        bits: Stored, all included.
        error: Expected squared error, in units that may be added over matrices.
    """

    setting: tuple[int, ...]
    bits: int
    error: float


def share(options: Mapping[str, Sequence[Option]], total: float) -> dict[str, Option]:
    """One option for each matrix, for the least sum of errors within ``total`` bits.

    Every matrix starts at its cheapest option; then the step that saves the most error a bit is taken, again and
    again, while it fits (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988).
    The cheapest options are the answer where even they do not fit.
    """
    hulls = {name: _hull(choices) for name, choices in options.items()}
    at = dict.fromkeys(hulls, 0)
    left = total - sum(hull[0].bits for hull in hulls.values())
    order = itertools.count()  # ties go to the earlier matrix
    waiting = [(-_slope(hull[0], hull[1]), next(order), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, rank, name = heapq.heappop(waiting)
        hull, here = hulls[name], at[name]
        cost = hull[here + 1].bits - hull[here].bits
        if cost > left:
            continue
        left -= cost
        at[name] = here = here + 1
        if here + 1 < len(hull):
            heapq.heappush(waiting, (-_slope(hull[here], hull[here + 1]), rank, name))
    return {name: hull[at[name]] for name, hull in hulls.items()}


def vector_error(dim: float, bits: float) -> float:
    """Mean squared error of a good quantiser of ``dim`` values together, ``bits`` a value, for a unit Gaussian.

    Zador's high-rate formula ("Asymptotic quantization error of continuous signals", 1982) with the cells of a sphere
    (Gersho, "Asymptotically optimal block quantization", 1979): 0.0994 for four values at two bits, where k-means
    reaches 0.099.
    """
    cells = math.gamma(dim / 2 + 1) ** (2 / dim) / ((dim + 2) * math.pi)
    return min(1.0, cells * 2 * math.pi * (1 + 2 / dim) ** (dim / 2 + 1) * 4.0**-bits)


def _slope(low: Option, high: Option) -> float:
    return (low.error - high.error) / (high.bits - low.bits)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of error over bits, cheapest first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bits, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull
