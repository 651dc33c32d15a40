"""Codes chosen column by column, each column making up for the errors of those before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.ops.search import beam_search

# Columns whose corrections are applied to all later columns at once.
_COLUMNS = 128
_TRIES = 8


class Coded(NamedTuple):
    """A matrix in codes.

    Args:
        codes: ``[R, M, N]`` int64.
        corrected: ``[N, D]``, what was rounded to the codes: the matrix and what it had to make up for.
        decoded: ``[N, D]``, the entries that the codes stand for.
    """

    codes: Tensor
    corrected: Tensor
    decoded: Tensor


@torch.no_grad()
def encode(
    matrix: Tensor, codebooks: Tensor, moment: Tensor | None = None, *, damping: float = 0.01, beam: int = 8
) -> Coded:
    """Codes of a matrix for given codebooks.

    With the second moment ``H`` of the inputs that the matrix is multiplied with, sub-vectors are coded one after the
    other, those with the strongest inputs first. Each is rounded in the metric of its block of ``H`` given the columns
    still open, and the columns still open take over what their inputs can make up for: optimal brain surgery by
    columns (Frantar et al., "GPTQ", 2210.17323, equations 2 and 3), with sub-vectors in the place of columns (van
    Baalen et al., "GPTVQ", 2402.15319, section 3). Without it every sub-vector is coded by itself.

    Args:
        matrix: ``[N, D]``.
        codebooks: ``[R, G, K, d]``, ``M = D / d`` a multiple of ``G``.
        moment: ``H [D, D]``, the sum of ``x x^T`` over inputs; symmetric, positive semidefinite.
        damping: Share of the mean of ``H``'s diagonal that is added to it.
        beam: Sums of stages that are kept (see ``rpqfx.ops.search.beam_search``).

    Returns:
        Codes, in float32 at least.

    Raises:
        InputError: If the moment is not finite.
    """
    work = matrix if matrix.dtype == torch.float64 else matrix.float()
    books = codebooks.to(work.dtype)
    d = books.shape[3]
    count = work.shape[1] // d
    share = count // books.shape[1]
    if moment is None:
        found = [_search(work[:, m * d : m * d + d], books[:, m // share], beam) for m in range(count)]
        codes = torch.stack([code for code, _ in found], 1)
        return Coded(codes, work, torch.cat([entry for _, entry in found], 1))
    order = moment.diagonal().view(count, d).sum(1).argsort(descending=True, stable=True)
    columns = (order[:, None] * d + torch.arange(d, device=order.device)).reshape(-1)
    upper = _inverse_root(moment[columns][:, columns], damping).to(work.dtype)
    open_ = work[:, columns]
    codes = torch.empty(len(books), count, len(work), dtype=torch.long, device=work.device)
    decoded = torch.empty_like(work)
    step = max(1, _COLUMNS // d) * d
    for start in range(0, work.shape[1], step):
        stop = min(start + step, work.shape[1])
        errors = torch.empty_like(open_[:, start:stop])
        for at in range(start, stop, d):
            m = int(order[at // d])
            to_metric = torch.linalg.inv(upper[at : at + d, at : at + d])
            seen = open_[:, at : at + d] @ to_metric
            codes[:, m], near = _search(seen, books[:, m // share] @ to_metric, beam)
            error = seen - near
            open_[:, at + d : stop] -= error @ upper[at : at + d, at + d : stop]
            errors[:, at - start : at - start + d] = error
            decoded[:, m * d : m * d + d] = _entries(books[:, m // share], codes[:, m])
        open_[:, stop:] -= errors @ upper[start:stop, stop:]
    corrected = torch.empty_like(work)
    corrected[:, columns] = open_
    return Coded(codes, corrected, decoded)


def _search(points: Tensor, books: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Codes ``[R, N]`` and what they stand for, ``[N, d]``."""
    codes = beam_search(points.contiguous(), books.contiguous(), beam)[0].t()
    return codes, _entries(books, codes)


def _entries(books: Tensor, codes: Tensor) -> Tensor:
    return torch.stack([book[code] for book, code in zip(books, codes, strict=True)]).sum(0)


def _inverse_root(moment: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse, with as much damping as it takes."""
    if not bool(torch.isfinite(moment).all()):
        raise InputError("the inputs' second moment has infinite or NaN elements; look at the calibration batches")
    work = moment.double()
    mean = work.diagonal().mean()
    if mean <= 0:  # no input ever: any code is as good
        return torch.eye(len(work), dtype=work.dtype, device=work.device)
    work = work / mean
    ridge = work.diagonal() + 0.1
    for _ in range(_TRIES):
        lower, wrong = torch.linalg.cholesky_ex(work + torch.diag(damping * ridge))
        if not wrong:
            inverse, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not wrong:
                return inverse
        damping *= 10
    raise InputError("the inputs' second moment is not positive semidefinite")
