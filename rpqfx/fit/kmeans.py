"""Lloyd's k-means in blocks, deterministic by seed."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.ops.search import nearest

# Points an entry that Lloyd steps look at; the codes of all points are found once, at the end.
_SAMPLES_PER_ENTRY = 256
# Up to this many points the distinct ones are counted, which makes few of them exact.
_COUNT_DISTINCT = 2**14


def kmeans(points: Tensor, entries: int, *, steps: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clusters points by squared Euclidean distance (Lloyd, "Least Squares Quantization in PCM", 1982).

    Starts from random points (distinct ones, where they are few enough to count). Lloyd steps see a random sample of
    256 points an entry where there are more. Entries that lose all their points move to the points that are worst
    served, all at once. With as many entries as distinct points (and few points) the result is exact.

    Args:
        points: ``[N, d]``, floating.
        entries: ``K``.
        steps: Lloyd steps at most; stops early where no code changes.
        seed: Of the start.

    Returns:
        ``centres [K, d]`` and ``codes [N]`` int64.
    """
    generator = torch.Generator(points.device).manual_seed(seed)
    if len(points) <= _COUNT_DISTINCT:
        pool, codes = torch.unique(points, dim=0, return_inverse=True)
    else:
        pool, codes = points, torch.arange(len(points), device=points.device)
    if len(pool) <= entries:  # exact; what is left over repeats the first entry
        return torch.cat([pool, pool[:1].expand(entries - len(pool), -1)]), codes
    centres = pool[torch.randperm(len(pool), generator=generator, device=points.device)[:entries]]
    sample = points
    if len(points) > entries * _SAMPLES_PER_ENTRY:
        order = torch.randperm(len(points), generator=generator, device=points.device)
        sample = points[order[: entries * _SAMPLES_PER_ENTRY]]
    codes, distances = nearest(sample, centres)
    for _ in range(steps):
        centres = _means(sample, codes, centres, distances)
        before = codes
        codes, distances = nearest(sample, centres)
        if torch.equal(codes, before):
            break
    return centres, codes if sample is points else nearest(points, centres)[0]


def _means(points: Tensor, codes: Tensor, centres: Tensor, distances: Tensor) -> Tensor:
    counts = torch.bincount(codes, minlength=len(centres))
    sums = torch.zeros_like(centres).index_add_(0, codes, points)
    means = sums / counts.clamp_min(1)[:, None]
    empty = (counts == 0).nonzero()[:, 0]
    means[empty] = points[distances.topk(len(empty)).indices]
    return means
