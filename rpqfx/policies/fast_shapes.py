"""Shapes of codebooks that products with few rows read fastest: stages of 16 entries, whose codes lie in tiles.

A product looks sums of dot products up in registers (``rpqfx/ops/cpu/byte_sums.h``), 16 entries at a time, so its cost
is the number of codes, and a code is four bits whatever the length of its sub-vector. Many small stages over a longer
sub-vector are no worse than one large codebook over a shorter one: with beam search, six stages of 16 entries for eight
numbers leave as much of a Gaussian as 4,096 entries for four (additive quantisation: Babenko and Lempitsky, 2014).
"""

from __future__ import annotations

from collections.abc import Iterator

from rpqfx.policies.site import Site

# Mean squared error of unit Gaussian numbers in codes of R stages of 16 entries for d numbers, by (d, R): measured by
# examples/bench/shapes.py, with the search that a conversion uses.
LEFT = {
    (16, 3): 0.4516, (16, 4): 0.3297, (16, 5): 0.2410, (16, 6): 0.1786,
    (8, 3): 0.1815, (8, 4): 0.0967, (8, 5): 0.0522, (8, 6): 0.0278, (8, 7): 0.0150, (8, 8): 0.00816,
    (6, 3): 0.1015, (6, 4): 0.0433, (6, 5): 0.0187, (6, 6): 0.00836,
    (4, 2): 0.1073, (4, 3): 0.0317, (4, 4): 0.00905, (4, 5): 0.00280, (4, 6): 0.00088,
    (2, 2): 0.0106, (2, 3): 0.00109, (2, 4): 0.00014,
}  # fmt: skip
ENTRIES = 16
STAGE_BITS = 4
_FEWEST_VECTORS = 32  # of a site: fewer would leave most of a tile empty
_LONGEST = 10  # shapes of a model at most
_KINDS = ("linear", "attention", "embedding", "embedding_bag", "experts", "recurrent", "bilinear", "parameter")

Shape = tuple[int, int]


def rate(shape: Shape) -> float:
    """Returns the bits that codes of a shape take for each number."""
    d, stages = shape
    return stages * STAGE_BITS / d


def fits(site: Site) -> bool:
    """Returns whether a site may have codes in tiles, by its kind and the sizes of its tensor.

    Args:
        site: The site; its vectors are along its outputs.
    """
    layout = site.layout("row")
    return site.kind in _KINDS and layout.num_vectors >= _FEWEST_VECTORS and layout.unit % 4 == 0


def ranges(bits: float) -> Iterator[tuple[Shape, ...]]:
    """Yields sets of shapes that are worth a try for a rate: neighbours in their own rates, around it.

    Args:
        bits: For each weight.
    """
    ordered = sorted(LEFT, key=lambda shape: (rate(shape), -shape[0]))
    for first in range(len(ordered)):
        if rate(ordered[first]) > bits:
            return
        for last in range(first, min(first + _LONGEST, len(ordered))):
            if rate(ordered[last]) <= bits + 2 and rate(ordered[first]) >= bits - 2:
                yield tuple(ordered[first : last + 1])
