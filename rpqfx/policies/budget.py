"""Chooses one candidate for each site so that the total fits and the expected error is small.

Candidates of a site are points (bytes, distortion). For a price on bytes each site has one best candidate, and all
sites together trace the lower convex hull of what can be had (Everett, 1963; Shoham and Gersho, "Efficient Bit
Allocation for an Arbitrary Set of Quantizers", 1988). A bisection finds the lowest price that fits; each of its steps
looks only at the sites whose best candidate depends on where between its two ends the price is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rpqfx.errors import PolicyError

T = TypeVar("T")

_APART = 1e-6  # of the price: nearer, rounding may decide between candidates


@dataclass(frozen=True)
class Candidate(Generic[T]):
    """One way to quantize a site, or to leave it dense.

    Args:
        choice: The decision.
        size: Bytes that the site then takes.
        distortion: Expected squared error.
    """

    choice: T
    size: int
    distortion: float


def choose(candidates: Mapping[str, Sequence[Candidate[T]]], limit: int, before: int, other: int) -> dict[str, T]:
    """Chooses one candidate for each site, at most ``limit`` bytes in all.

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
    chosen = _at_lowest_price(candidates, limit, other)
    _spend(chosen, candidates, limit - _total(chosen, other))
    return {name: candidate.choice for name, candidate in chosen.items()}


def _at_lowest_price(
    candidates: Mapping[str, Sequence[Candidate[T]]], limit: int, other: int
) -> dict[str, Candidate[T]]:
    groups = {id(group): group for group in candidates.values()}  # sites that are alike share theirs
    key_of = {name: id(group) for name, group in candidates.items()}
    users = Counter(key_of.values())

    def size(best: Mapping[int, Candidate[T]]) -> int:
        return sum(users[key] * candidate.size for key, candidate in best.items())

    low, high = 0.0, 1.0
    at_low, at_high = _best(groups, low), _best(groups, high)
    while other + size(at_high) > limit:
        high *= 4
        at_high = _best(groups, high)
    settled = other
    for _ in range(100):
        for key in list(groups) if high - low > _APART * high else ():
            least, most = at_high[key], at_low[key]
            if least is most:  # and so at each price between
                settled += users[key] * least.size
                del groups[key]
            else:
                groups[key] = [c for c in groups[key] if least.size <= c.size <= most.size]
        middle = (low + high) / 2
        at_middle = _best(groups, middle)
        if settled + size(at_middle) > limit:
            low = middle
            at_low.update(at_middle)
        else:
            high = middle
            at_high.update(at_middle)
    return {name: at_high[key] for name, key in key_of.items()}


def _best(groups: Mapping[int, Sequence[Candidate[T]]], price: float) -> dict[int, Candidate[T]]:
    return {key: min(group, key=lambda c: (c.distortion + price * c.size, c.size)) for key, group in groups.items()}


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
