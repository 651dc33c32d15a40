"""Residual codes: a point is the sum of one entry of each stage's codebook."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rpqfx.fit.k_means import checked_weights, kmeans
from rpqfx.fit.refitting import left_over, refit
from rpqfx.ops.search import beam_search, nearest

# Points an entry that training looks at; the codes of all points are found once, at the end.
_SAMPLES_PER_ENTRY = 512
# Points that are encoded at a time.
_BLOCK_POINTS = 2**18


@torch.no_grad()
def encode(points: Tensor, books: Tensor, *, beam: int = 8, passes: int = 1, codes: Tensor | None = None) -> Tensor:
    """Returns codes by beam search, each stage then chosen anew given the others.

    Choosing anew (iterated conditional modes, as in Martinez et al., "LSQ++", 2018) never makes a point worse. No point
    gets worse codes than it had; where it had none, none that are worse than greedy ones.

    Args:
        points: ``[N, d]``, floating.
        books: ``[R, K, d]`` of the same dtype and device.
        beam: Sums that go on from stage to stage (``rpqfx.ops.search.beam_search``).
        passes: Times that all stages are chosen anew.
        codes: ``[N, R]`` int64 of before.

    Returns:
        ``[N, R]`` int64.
    """
    if len(points) > _BLOCK_POINTS:
        olds = itertools.repeat(None) if codes is None else codes.split(_BLOCK_POINTS)
        blocks = zip(points.split(_BLOCK_POINTS), olds, strict=False)
        return torch.cat([encode(block, books, beam=beam, passes=passes, codes=old) for block, old in blocks])
    found, distances = beam_search(points, books, beam)
    if len(books) == 1:
        return found
    if codes is None and beam > 1:
        codes = beam_search(points, books, 1)[0]
    if codes is not None:
        found, distances = _better(points, books, found, distances, codes)
    for _ in range(passes):
        changed = found.clone()
        rest = left_over(points, changed, books)
        for stage, book in enumerate(books):
            rest += book[changed[:, stage]]
            changed[:, stage] = nearest(rest, book)[0]
            rest -= book[changed[:, stage]]
        found, distances = _better(points, books, found, distances, changed)  # nearest rounds
    return found


@torch.no_grad()
def train(
    points: Tensor,
    stages: int,
    entries: int,
    *,
    weights: Tensor | None = None,
    steps: int = 10,
    beam: int = 8,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns codebooks of residual stages, and codes.

    Each stage starts as k-means of what the stages before leave (Chen, Guan, Wang, "Approximate Nearest Neighbor
    Search by Residual Vector Quantization", 2010). With a beam wider than 1, codes by ``encode`` and codebooks by
    ``refit`` then alternate over all stages so far. On the points seen no alternation makes the error larger, and
    more stages never make it larger. Alternations use a random sample of 512 points an entry where there are more.

    Args:
        points: ``[N, d]``, floating and finite.
        stages: ``R``.
        entries: ``K``.
        weights: ``[N]``, not negative, or None for ones; all zero counts as ones.
        steps: Lloyd steps of each stage at most, and alternations after each stage but the first at most.
        beam: Sums that go on from stage to stage; 1 leaves the stages as k-means made them.
        seed: Of the sample and the starts of k-means.

    Returns:
        ``books [R, K, d]`` and ``codes [N, R]`` int64.

    Raises:
        InputError: As ``kmeans``.
    """
    weights = None if weights is None else checked_weights(weights, points)
    part, part_weights = points, weights
    if stages > 1 and len(points) > entries * _SAMPLES_PER_ENTRY:
        generator = torch.Generator(points.device).manual_seed(seed)
        order = torch.randperm(len(points), generator=generator, device=points.device)
        chosen = order[: entries * _SAMPLES_PER_ENTRY]
        part, part_weights = points[chosen], None if weights is None else weights[chosen]
    books = part.new_empty(0, entries, part.shape[1])
    codes = torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
    for stage in range(stages):
        rest = left_over(part, codes, books)
        book, code = kmeans(rest, entries, weights=part_weights, steps=steps, seed=seed + stage)
        books, codes = torch.cat([books, book[None]]), torch.cat([codes, code[:, None]], 1)
        if stage and beam > 1:
            books, codes = _take_turns(part, codes, books, part_weights, steps, beam)
    return books, codes if part is points else encode(points, books, beam=beam, passes=int(beam > 1))


@torch.no_grad()
def improve(points: Tensor, books: Tensor, *, steps: int = 10, beam: int = 16) -> Tensor:
    """Returns codebooks of ``train``, fitted further with a wider beam, and maybe to more points.

    Args:
        points: ``[N, d]``, floating and finite.
        books: ``[R, K, d]``.
        steps: Alternations of ``encode`` and ``refit`` at most.
        beam: Sums that go on from stage to stage.

    Returns:
        ``[R, K, d]``.
    """
    codes = encode(points, books, beam=beam)
    return _take_turns(points, codes, books, None, steps, beam)[0]


def _take_turns(
    points: Tensor, codes: Tensor, books: Tensor, weights: Tensor | None, steps: int, beam: int
) -> tuple[Tensor, Tensor]:
    for _ in range(steps):
        books = refit(points, codes, books, weights)
        before = codes
        codes = encode(points, books, beam=beam, codes=codes)
        if torch.equal(codes, before):
            break
    return books, codes


def _better(points: Tensor, books: Tensor, codes: Tensor, distances: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each point the codes that are nearer, the first where both are as near."""
    others = left_over(points, other, books).square().sum(1)
    nearer = others < distances
    return torch.where(nearer[:, None], other, codes), torch.where(nearer, others, distances)
