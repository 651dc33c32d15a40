"""Choosing one candidate a site so that the total fits and the expected error is small.

Candidates of a site are points (bytes, distortion). For a price on bytes each site has one best candidate, and all
sites together trace the lower convex hull of what can be had (Everett, 1963; Shoham and Gersho, "Efficient Bit
Allocation for an Arbitrary Set of Quantizers", 1988). A bisection finds the lowest price that fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rpqfx.errors import PolicyError

T = TypeVar("T")


@dataclass(frozen=True)
class Candidate(Generic[T]):
    """One way to hold a site.

    Args:
        choice: What is chosen.
        size: Its bytes.
        distortion: Its expected squared error.
    """

    choice: T
    size: int
    distortion: float


def choose(candidates: Mapping[str, Sequence[Candidate[T]]], limit: int, before: int, other: int) -> dict[str, T]:
    """One candidate a site, at most ``limit`` bytes in all.

    Args:
        candidates: By site name; none empty.
        limit: Bytes of the whole model after.
        before: Bytes of the whole model before, for the message.
        other: Bytes of what has no candidates.

    Returns:
        The choice by site name.

    Raises:
        PolicyError: If even the smallest candidates exceed the limit; says the closest total that can be had.
    """
    least = other + sum(min(c.size for c in group) for group in candidates.values())
    if least > limit:
        raise PolicyError(
            f"a total of {limit:,} bytes ({limit / max(before, 1):.3f} of {before:,}) cannot be reached; closest: "
            f"{least:,} bytes ({least / max(before, 1):.3f})"
        )
    low, high = 0.0, 1.0
    while _total(_best(candidates, high), other) > limit:
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2
        if _total(_best(candidates, middle), other) > limit:
            low = middle
        else:
            high = middle
    chosen = _best(candidates, high)
    _spend(chosen, candidates, limit - _total(chosen, other))
    return {name: candidate.choice for name, candidate in chosen.items()}


def _best(candidates: Mapping[str, Sequence[Candidate[T]]], price: float) -> dict[str, Candidate[T]]:
    groups = {id(group): group for group in candidates.values()}  # sites that are alike share theirs
    best = {key: min(group, key=lambda c: (c.distortion + price * c.size, c.size)) for key, group in groups.items()}
    return {name: best[id(group)] for name, group in candidates.items()}


def _total(chosen: Mapping[str, Candidate[T]], other: int) -> int:
    return other + sum(candidate.size for candidate in chosen.values())


def _spend(chosen: dict[str, Candidate[T]], candidates: Mapping[str, Sequence[Candidate[T]]], left: int) -> None:
    """Uses up what the hull's corner leaves over, best gain a byte first."""
    for name in sorted(chosen, key=lambda n: -chosen[n].distortion):
        now = chosen[name]
        better = [c for c in candidates[name] if c.size - now.size <= left and c.distortion < now.distortion]
        if better:
            chosen[name] = min(better, key=lambda c: c.distortion)
            left -= chosen[name].size - now.size
