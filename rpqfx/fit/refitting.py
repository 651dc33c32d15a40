"""Codebooks by least squares, given the codes."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this many entries of all stages together the normal equations are solved at once, in float64.
_SOLVE_AT_ONCE = 4096
# Times that all stages are fitted one after another where there are more.
_SWEEPS = 4
# Of the largest entry of the normal equations' diagonal: keeps those that no point uses where they are.
_RIDGE = 1e-8


@torch.no_grad()
def refit(points: Tensor, codes: Tensor, books: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the codebooks of least weighted squared error for codes that stay.

    All stages jointly, by normal equations with a slight pull toward the old entries (Babenko and Lempitsky,
    "Additive Quantization for Extreme Vector Compression", 2014); with more than 4,096 entries in all, stage by stage,
    each given the others. Entries without points stay. The error never grows.

    Args:
        points: ``[N, d]``, floating.
        codes: ``[N, R]`` int64.
        books: ``[R, K, d]``, the old codebooks.
        weights: ``[N]``, not negative, or None for ones.

    Returns:
        ``[R, K, d]``.
    """
    stages, entries, _ = books.shape
    if stages * entries > _SOLVE_AT_ONCE or stages == 1:
        for _ in range(_SWEEPS if stages > 1 else 1):
            for stage in range(stages):
                books = _refit_stage(points, codes, books, stage, weights)
        return books
    share = None if weights is None else weights.double()
    normal = _normal(codes, entries, share)
    rest = left_over(points, codes, books)
    right = torch.cat([_sums(rest, code, share, entries) for code in codes.t()])
    diagonal = normal.diagonal()
    diagonal += _RIDGE * diagonal.max().clamp_min(1e-30)
    change = torch.cholesky_solve(right, torch.linalg.cholesky(normal))
    return (books.double() + change.view(books.shape)).to(books.dtype)


def left_over(points: Tensor, codes: Tensor, books: Tensor) -> Tensor:
    """Returns what the sums of entries leave of the points, ``[N, d]``."""
    for stage, book in enumerate(books):
        points = points - book[codes[:, stage]]
    return points


def _normal(codes: Tensor, entries: int, weights: Tensor | None) -> Tensor:
    """Returns how often (by weight) two entries are used by the same point, ``[R * K, R * K]``."""
    stages = codes.shape[1]
    normal = torch.empty(stages, entries, stages, entries, dtype=torch.float64, device=codes.device)
    for r in range(stages):
        for s in range(r, stages):
            pairs = torch.bincount(codes[:, r] * entries + codes[:, s], weights, minlength=entries * entries)
            normal[r, :, s] = pairs.view(entries, entries)
            normal[s, :, r] = pairs.view(entries, entries).t()
    return normal.view(stages * entries, -1)


def _sums(points: Tensor, codes: Tensor, weights: Tensor | None, size: int) -> Tensor:
    columns = [column.double() if weights is None else column.double() * weights for column in points.t()]
    return torch.stack([torch.bincount(codes, column, minlength=size) for column in columns], 1)


def _refit_stage(points: Tensor, codes: Tensor, books: Tensor, stage: int, weights: Tensor | None) -> Tensor:
    """Moves each entry of a stage by the mean of what is left of its points."""
    share = None if weights is None else weights.double()
    entries = books.shape[1]
    mass = torch.bincount(codes[:, stage], share, minlength=entries).double()
    sums = _sums(left_over(points, codes, books), codes[:, stage], share, entries)
    change = torch.where(mass[:, None] > 0, sums / mass[:, None], 0)
    books = books.clone()
    books[stage] = (books[stage].double() + change).to(books.dtype)
    return books
