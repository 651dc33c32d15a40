"""Weighted k-means: a k-means++ start and Lloyd steps in blocks, the same for the same seed."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.ops.search import nearest

# Points an entry that Lloyd steps look at, fewer where that were more distances a step than the second number, but no
# fewer than the start looks at. The codes of all points are found once, at the end.
_SAMPLES_PER_ENTRY = 256
_STEP_DISTANCES = 2**35
# Points an entry that the start looks at.
_START_PER_ENTRY = 16
# Up to this many points the distinct ones are counted, which makes few of them exact.
_COUNT_DISTINCT = 2**14


@torch.no_grad()
def kmeans(
    points: Tensor,
    entries: int,
    *,
    weights: Tensor | None = None,
    steps: int = 10,
    seed: int = 0,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clusters points by weighted squared Euclidean distance (Lloyd, "Least Squares Quantization in PCM", 1982).

    Starts by k-means++ (Arthur and Vassilvitskii, 2007) on a random sample of 16 points an entry. From 16 entries on
    it draws an eighth as many as there are at a time, as in k-means|| (Bahmani et al., 2012), but keeps them all.
    Lloyd steps see a random sample of 256 points an entry where there are more (less than that with more than 11,000
    entries). Entries that lose all their points move to the points that are worst served, all at once. With as
    many entries as distinct points (and few points) the result is exact. The number of threads changes nothing.

    Args:
        points: ``[N, d]``, floating and finite, ``N >= 1``.
        entries: ``K``.
        weights: ``[N]``, not negative: how much a point's squared distance counts. Points of weight zero get
            codes, but move no centre. If all are zero, they count as ones.
        steps: Lloyd steps at most; stops early where no code changes.
        seed: Of the samples and the start.
        start: ``[K, d]``, where to start instead.

    Returns:
        ``centres [K, d]`` and ``codes [N]`` int64.

    Raises:
        InputError: If there are no points, or weights or start do not go with them.
    """
    if not len(points):
        raise InputError("there are no points to cluster")
    if start is not None and start.shape != (entries, points.shape[1]):
        raise InputError(f"start is [K, d], expected {[entries, points.shape[1]]}, got {list(start.shape)}")
    live = None
    if weights is not None:
        weights = checked_weights(weights, points)
        live = weights > 0
        if live.all():
            live = None
    if live is None:
        return _kmeans(points, entries, weights, steps, seed, start)
    assert weights is not None
    codes = torch.empty(len(points), dtype=torch.int64, device=points.device)
    centres, codes[live] = _kmeans(points[live], entries, weights[live], steps, seed, start)
    codes[~live] = nearest(points[~live], centres)[0]
    return centres, codes


def checked_weights(weights: Tensor, points: Tensor) -> Tensor:
    """Returns weights as they are used: the largest is 1, in the dtype of the points; ones where all are zero.

    Raises:
        InputError: If they are not ``[N]``, finite and not negative.
    """
    if weights.shape != points.shape[:1]:
        raise InputError(f"weights are [N], expected {len(points)}, got {list(weights.shape)}")
    low, high = (float(x) for x in weights.aminmax())
    if not (low >= 0 and high < float("inf")):
        raise InputError(f"weights are finite and not negative, these are {low} to {high}")
    return (weights.double() / high).to(points) if high > 0 else torch.ones_like(points[:, 0])


def _kmeans(
    points: Tensor, entries: int, weights: Tensor | None, steps: int, seed: int, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Clusters points with weights above zero."""
    generator = torch.Generator(points.device).manual_seed(seed)
    if len(points) <= _COUNT_DISTINCT:
        pool, codes = torch.unique(points, dim=0, return_inverse=True)
    else:
        pool, codes = points, torch.arange(len(points), device=points.device)
    if len(pool) <= entries:  # exact; what is left over repeats the first entry
        return torch.cat([pool, pool[:1].expand(entries - len(pool), -1)]), codes
    least = entries * _START_PER_ENTRY
    samples = min(entries * _SAMPLES_PER_ENTRY, max(least, _STEP_DISTANCES // entries))
    part, part_weights = _sample(points, weights, samples, generator)
    if start is None:
        start = _start(*_sample(part, part_weights, least, generator), entries, generator)
    centres = start.to(points)
    codes, distances = nearest(part, centres)
    for _ in range(steps):
        centres = _means(part, codes, centres, distances, part_weights)
        before = codes
        codes, distances = nearest(part, centres)
        if torch.equal(codes, before):
            break
    return centres, codes if part is points else nearest(points, centres)[0]


def _sample(
    points: Tensor, weights: Tensor | None, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    if len(points) <= count:
        return points, weights
    chosen = torch.randperm(len(points), generator=generator, device=points.device)[:count]
    return points[chosen], None if weights is None else weights[chosen]


def _start(points: Tensor, weights: Tensor | None, entries: int, generator: torch.Generator) -> Tensor:
    """Returns points drawn in proportion to their weighted squared distances from those drawn before."""
    mass = torch.ones_like(points[:, 0]) if weights is None else weights
    centres = points[_draw(mass, 1, generator)]
    distances = nearest(points, centres)[1]
    while len(centres) < entries:
        count = min(max(1, len(centres) // 8), entries - len(centres))
        new = points[_draw(mass * distances, count, generator)]
        centres = torch.cat([centres, new])
        distances = torch.minimum(distances, nearest(points, new)[1])
    return centres


def _draw(mass: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws indices in proportion to their mass, one from each of ``count`` equal parts; evenly where there is none."""
    total = mass.double().cumsum(0)
    if not total[-1] > 0:
        total = torch.ones_like(total).cumsum(0)
    steps = torch.rand(count, generator=generator, device=mass.device, dtype=torch.float64)
    steps += torch.arange(count, device=mass.device)
    return torch.searchsorted(total, steps * (total[-1] / count), right=True).clamp_max(len(mass) - 1)


def _means(points: Tensor, codes: Tensor, centres: Tensor, distances: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns weighted means of the points of each code, summed in float64; unused entries get the worst served."""
    entries = len(centres)
    share = None if weights is None else weights.double()
    columns = [column.double() if share is None else column.double() * share for column in points.t()]
    sums = torch.stack([torch.bincount(codes, column, minlength=entries) for column in columns], 1)
    mass = torch.bincount(codes, share, minlength=entries).double()
    means = (sums / mass[:, None]).to(points.dtype)
    empty = (mass == 0).nonzero()[:, 0]
    worst = distances if weights is None else distances * weights
    means[empty] = points[worst.topk(len(empty)).indices]
    return means
