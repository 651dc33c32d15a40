"""Chooses codebooks for the weights of a trained model that share a number of bits a weight, everything counted.

Weights are scaled to look alike, so one codebook can serve the whole model. What differs from weight to weight is its
rate: a few codebooks make the rungs of a ladder, and each weight gets a rung by what its errors cost the model. Weights
of linear maps and tables get stages of 16 entries (``rpqfx.policies.fast_shapes``), filters of convolutions one large
codebook, on ladders of one sub-vector length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rpqfx.codebook import CodebookSpec, nearest_divisor
from rpqfx.errors import PolicyError
from rpqfx.policies import fast_shapes
from rpqfx.policies.budget import Candidate, choose
from rpqfx.policies.decision import Quantize
from rpqfx.policies.site import Site

# Mean squared error at high rate of the best quantiser of unit Gaussian vectors, times 4 ** rate (Zador, 1982, with
# the lattices' second moments of Conway and Sloane).
_ZADOR = {1: 2.72, 2: 2.02, 3: 1.77, 4: 1.62, 6: 1.47, 8: 1.37, 9: 1.35, 12: 1.30, 16: 1.24}
_MOST_BITS = 16
_LARGE_BITS = 12  # more only where searching all sub-vectors stays a matter of minutes
_MOST_DISTANCES = 2.5e12
_RUNGS = 6
# Importance is known roughly, and a weight that gets next to no bits costs more than its gradient says: this power of
# it counts (measured; with 1, or with ladders of at most 0.75 bits, ResNet-20 at 1.05 bits gets 60 to 72 %, so 81).
_TRUST = 0.6
_FLOAT_BITS = 16  # codebooks and factors are rounded to half precision
_FACTORS_SHARE = 0.05  # of the budget, what factors of columns may take
_OWN_BELOW = 32_768  # weights this small may have a codebook of their own
_FEWEST_USERS = 4  # sub-vectors an entry
# The expected cost and the decisions, or the bits that it takes at least.
Found = tuple[float, dict[str, Quantize]] | float
_NEXT = 1.25  # from one number of bits that is tried to the next, where the ones that are wanted cannot be had


def spread(
    sites: Sequence[Site],
    bits: float,
    importance: Mapping[str, float] | None = None,
    group: str = "model",
    option: str = "bits_per_weight",
) -> dict[str, Quantize]:
    """Decides weights that share a budget.

    Args:
        sites: The weights; vectors are along their outputs.
        bits: Bits for each weight, codes, codebooks and factors together.
        importance: Cost of an error as large as the weight itself, by name; left out, as much as it has
            elements.
        group: Name of their codebooks.
        option: Name of the argument that gives the budget, for the message.

    Returns:
        Decisions by name.

    Raises:
        PolicyError: If so few bits cannot be had; says how few can.
    """
    if not sites:
        return {}
    cost = {site.name: float(site.numel) if importance is None else importance[site.name] ** _TRUST for site in sites}
    tiled = [site for site in sites if fast_shapes.fits(site)]
    rest = [site for site in sites if not fast_shapes.fits(site)]
    parts = [(tiled, _best_tiled), (rest, _best)]
    found = [best(some, bits, cost, group) for some, best in parts if some]
    if any(isinstance(one, float) for one in found):  # apart they cannot have so few bits, together they may
        found = [_best(sites, bits, cost, group)]
    held: dict[str, Quantize] = {}
    for one in found:
        if isinstance(one, float):
            raise PolicyError(_too_few(sites, bits, one, cost, group, option))
        held |= one[1]
    return held


def _best_tiled(sites: Sequence[Site], bits: float, cost: Mapping[str, float], group: str) -> Found:
    """As ``_best``, with stages of 16 entries."""
    total = sum(site.numel for site in sites)
    dtypes = {site.dtype for site in sites}  # which cannot share
    ways = _Ways(sites, bits, cost, group)

    def tried(some: tuple[fast_shapes.Shape, ...]) -> Found:
        books = len(dtypes) * sum(stages * fast_shapes.ENTRIES * d * _FLOAT_BITS for d, stages in some)
        return _choose_within(ways.tiled(some), books, bits, total)

    return _cheapest((tried(some) for some in fast_shapes.ranges(bits)), total)


def _best(sites: Sequence[Site], bits: float, cost: Mapping[str, float], group: str) -> Found:
    """Returns the expected cost and decisions, or about how many bits a weight it would take at least."""
    total = sum(site.numel for site in sites)
    ways = _Ways(sites, bits, cost, group)
    ladders = ((d, rungs) for d in _ZADOR for rungs in _ladders(d, bits, total))
    return _cheapest((_allocate(sites, d, rungs, bits, ways) for d, rungs in ladders), total)


def _cheapest(tries: Iterable[Found], total: int) -> Found:
    """Returns the try with the least expected cost, or the fewest bits a weight that one would take."""
    best: tuple[float, dict[str, Quantize]] | None = None
    least = math.inf
    for found in tries:
        if isinstance(found, float):
            least = min(least, found / total)
        elif best is None or found[0] < best[0]:
            best = found
    return least if best is None else best


def _too_few(
    sites: Sequence[Site], bits: float, least: float, cost: Mapping[str, float], group: str, option: str
) -> str:
    """Says that so few bits cannot be had, how many can, and what makes fewer possible."""
    total = sum(site.numel for site in sites)
    said = f"{bits} bits a weight cannot be had for these {total:,} weights"
    asked = max(bits, min(least, _MOST_BITS))
    while asked < _MOST_BITS:
        asked = math.ceil(asked * 100 + 1) / 100
        if not isinstance(_best(sites, asked, cost, group), float):
            smallest = min(sites, key=lambda site: site.numel)
            return (
                f"{said}; at least {asked:.2f} can: give {option}={asked:.2f} or more. Codebooks and factors weigh "
                f"most with small weights (the smallest here is {smallest.name}, {smallest.numel:,} elements), which a "
                "larger min_size or a Rule with a skip leaves dense"
            )
        asked *= _NEXT
    return (
        f"{said}, nor any other number up to {_MOST_BITS}: there are too few of them to share codebooks; use "
        "Policy(codebook_bits=..., codebook_dim=...), or rewrite more weights (min_size, kinds, rules)"
    )


def _ladders(d: int, bits: float, total: int) -> list[range]:
    """Returns ranges of entries (as ``log2``) that are worth a try around a rate."""
    most = _MOST_BITS if total / d * 2**_MOST_BITS <= _MOST_DISTANCES else _LARGE_BITS
    middle = bits * d
    tops = {min(most, math.floor(middle) + up) for up in range(-1, 4)}
    return [
        range(max(1, top - step * (count - 1)), top + 1, step)
        for top in sorted(tops)
        if top >= 1
        for step in (1, 2)
        for count in range(1, _RUNGS + 1)
    ]


def _allocate(sites: Sequence[Site], d: int, rungs: range, bits: float, ways: _Ways) -> Found:
    """Returns the expected cost and decisions for one ladder, or the bits that it takes at least."""
    total = sum(site.numel for site in sites)
    if max(rungs) > 1 and total // d < _FEWEST_USERS * 2 ** max(rungs):
        return math.inf
    dtypes = {site.dtype for site in sites}  # which cannot share
    books = len(dtypes) * sum(2**k * d * _FLOAT_BITS for k in rungs)
    return _choose_within(ways.of(d, rungs), books, bits, total)


def _choose_within(groups: Mapping[str, Sequence[Candidate[Quantize]]], books: int, bits: float, total: int) -> Found:
    """Returns the expected cost and decisions for candidates and bits of codebooks, or the bits that it takes."""
    if not all(groups.values()):
        return math.inf
    least = books + sum(min(c.size for c in group) for group in groups.values())
    limit = bits * total
    if least > limit:
        return float(least)
    chosen = choose(groups, int(limit - books), int(limit), 0)
    expected = sum(c.distortion for name, decision in chosen.items() for c in groups[name] if c.choice is decision)
    return expected, chosen


class _Ways:
    """The candidates of each weight, made once for all ladders. Weights that are alike share theirs."""

    def __init__(self, sites: Sequence[Site], bits: float, cost: Mapping[str, float], group: str) -> None:
        self._bits, self._group = bits, group
        self._kinds: dict[object, tuple[Site, float]] = {}
        self._kind_of: dict[str, object] = {}
        for site in sites:
            key = (site.shape, site.lead, site.flipped, site.experts, site.kind, site.dtype, cost[site.name])
            self._kinds.setdefault(key, (site, cost[site.name]))
            self._kind_of[site.name] = key
        self._own = {key: self._with_own_codebook(*kind) for key, kind in self._kinds.items()}
        self._shared: dict[tuple[object, int, int], Candidate[Quantize]] = {}
        self._staged: dict[tuple[object, int, int], Candidate[Quantize]] = {}

    def of(self, d: int, rungs: range) -> dict[str, list[Candidate[Quantize]]]:
        """Returns candidates by name: on each rung of a ladder, and with a codebook of their own."""
        found = {key: [*self._on(key, d, rungs), *self._own[key]] for key in self._kinds}
        return {name: found[key] for name, key in self._kind_of.items()}

    def tiled(self, some: Sequence[fast_shapes.Shape]) -> dict[str, list[Candidate[Quantize]]]:
        """Returns candidates by name, of some shapes of stages; none of them for a weight that no shape divides."""
        found = {key: [c for shape in some for c in self._in_stages(key, shape)] for key in self._kinds}
        return {name: found[key] + self._own[key] for name, key in self._kind_of.items()}

    def _in_stages(self, key: object, shape: fast_shapes.Shape) -> list[Candidate[Quantize]]:
        site, cost = self._kinds[key]
        layout, (d, stages) = site.layout("row"), shape
        if layout.unit % d:
            return []
        if (key, *shape) not in self._staged:
            factors = _factors(site, self._bits)
            spec = CodebookSpec(
                layout.num_vectors, layout.dim, d, fast_shapes.ENTRIES, stages, 1, scale=True,
                column_scale_group=factors, tiled=True
            )  # fmt: skip
            size = _whole_bytes(site.numel // d * stages * fast_shapes.STAGE_BITS)
            size += (spec.num_vectors + spec.num_column_scales) * _FLOAT_BITS
            decision = Quantize(spec, "row", group=f"{self._group} {site.dtype}")
            self._staged[key, *shape] = Candidate(decision, size, cost * fast_shapes.LEFT[shape])
        return [self._staged[key, *shape]]

    def _on(self, key: object, d: int, rungs: range) -> list[Candidate[Quantize]]:
        site, cost = self._kinds[key]
        if site.layout("row").unit % d:
            return []
        for k in rungs:
            if (key, d, k) not in self._shared:
                self._shared[key, d, k] = self._candidate(site, cost, d, k, own=False)
        return [self._shared[key, d, k] for k in rungs]

    def _with_own_codebook(self, site: Site, cost: float) -> list[Candidate[Quantize]]:
        if site.numel >= _OWN_BELOW:
            return []
        unit = site.layout("row").unit
        return [
            self._candidate(site, cost, length, k, own=True)
            for length in sorted({nearest_divisor(unit, e) for e in (1, 2, 3, 4, 8)} & set(_ZADOR))
            for k in range(1, 9)
            if site.numel // length >= _FEWEST_USERS * 2**k
        ]

    def _candidate(self, site: Site, cost: float, length: int, k: int, own: bool) -> Candidate[Quantize]:
        layout = site.layout("row")
        spec = CodebookSpec(
            layout.num_vectors, layout.dim, length, 2**k, 1, 1, column_scale_group=_factors(site, self._bits)
        )  # fmt: skip
        size = _whole_bytes(site.numel // length * k) + spec.num_column_scales * _FLOAT_BITS
        size += 2**k * length * _FLOAT_BITS if own else 0
        decision = Quantize(spec, "row", group=None if own else f"{self._group} {site.dtype}")
        return Candidate(decision, size, cost * min(1.0, _ZADOR[length] * 4.0 ** (-k / length)))


def _whole_bytes(bits: int) -> int:
    """Returns the bits of the bytes that codes are packed into."""
    return -(-bits // 8) * 8


def _factors(site: Site, bits: float) -> int:
    """Returns how many columns share a factor: a channel's, where that is cheap, else all."""
    dim = site.layout("row").dim
    return site.taps if _FLOAT_BITS * (dim // site.taps) <= _FACTORS_SHARE * bits * site.numel else dim
