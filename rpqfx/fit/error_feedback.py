"""Chooses codes column by column and row by row with error feedback: each compensates the errors before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.ops.column_search import column_search
from rpqfx.ops.search import beam_search

_TRIES = 8
# Blocks of rows that are coded one after the other where outputs go together. More of them gain little and take longer.
_ROW_BLOCKS = 8
_FEWEST_ROWS = 16  # of a block
_SMALLEST_HALF = 48  # of a triangular matrix that is inverted by halves

Search = Callable[[Tensor, Tensor, Sequence[int], Tensor, Tensor, int], tuple[Tensor, Tensor]]


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


class _Metric(NamedTuple):
    """The cost of errors of a row: the order of its columns, and how later columns compensate earlier ones.

    Args:
        order: ``[M]``, sub-vectors, those with the strongest inputs first.
        columns: ``[D]``, their columns.
        upper: ``[D, D]``, the upper Cholesky factor of the moment's inverse, in that order.
        to_metric: ``[M, d, d]``, the inverses of its diagonal blocks.
    """

    order: Tensor
    columns: Tensor
    upper: Tensor
    to_metric: Tensor


@torch.no_grad()
def encode(
    matrix: Tensor,
    codebooks: Tensor,
    moment: Tensor | None = None,
    outputs: Tensor | None = None,
    *,
    damping: float = 0.01,
    beam: int = 8,
    search: Search = column_search,
) -> Coded:
    """Finds codes of a matrix for given codebooks.

    With the second moment ``H`` of the inputs that the matrix is multiplied with, sub-vectors are coded one after the
    other, those with the strongest inputs first. Each is rounded in the metric of its block of ``H`` given the columns
    still open, and the columns still open take over what their inputs can make up for: optimal brain surgery by
    columns (Frantar et al., "GPTQ", 2210.17323, equations 2 and 3), with sub-vectors in the place of columns (van
    Baalen et al., "GPTVQ", 2402.15319, section 3). Without it every sub-vector is coded by itself.

    With the second moment ``G`` of the outputs' gradients as well, the error is ``tr G E H E^T``, the Kronecker-
    factored Fisher information (Martens and Grosse, 1503.05671), and rows make up for the errors of other rows, too
    (Tseng et al., "YAQA", 2505.22988): blocks of rows are coded one after the other, those with the strongest gradients
    first, and the rows still open move by ``G_oo^-1 G_oc E_c``, to where ``tr G E H E^T`` is least, whatever ``H`` is.

    Args:
        matrix: ``[N, D]``.
        codebooks: ``[R, G, K, d]``, ``M = D / d`` a multiple of ``G``.
        moment: ``H [D, D]``, the sum of ``x x^T`` over inputs; symmetric, positive semidefinite.
        outputs: ``G [N, N]``, the sum of ``y y^T`` over gradients of outputs; as ``H``. Used with ``moment`` only.
        damping: Share of the mean of ``H``'s diagonal that is added to it, and of ``G``'s five times as much.
        beam: Sums of stages that are kept (see ``rpqfx.ops.search.beam_search``).
        search: Finds the codes of rows with a moment, as ``rpqfx.ops.column_search.column_search`` does.

    Returns:
        Codes, in float32 at least.

    Raises:
        InputError: If a moment is not finite, or not positive semidefinite.
    """
    work = matrix if matrix.dtype == torch.float64 else matrix.float()
    books = codebooks.to(work.dtype)
    d = books.shape[3]
    count = work.shape[1] // d
    if moment is None:
        share = count // books.shape[1]
        found = [_search(work[:, m * d : m * d + d], books[:, m // share], beam) for m in range(count)]
        codes = torch.stack([code for code, _ in found], 1)
        return Coded(codes, work, torch.cat([entry for _, entry in found], 1))
    metric = _metric(moment, d, damping, work.dtype)
    if outputs is None:
        return _by_columns(work, books, metric, beam, search)
    return _by_rows(work, books, metric, outputs, 5 * damping, beam, search)


def _metric(moment: Tensor, d: int, damping: float, dtype: torch.dtype) -> _Metric:
    count = len(moment) // d
    order = moment.diagonal().view(count, d).sum(1).argsort(descending=True, stable=True)
    columns = (order[:, None] * d + torch.arange(d, device=order.device)).reshape(-1)
    upper = _inverse_root(moment[columns][:, columns].double(), damping, "inputs'").to(dtype)
    blocks = upper.view(count, d, count, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return _Metric(order, columns, upper, torch.linalg.inv(blocks))


@torch.no_grad()
def feedback_between_rows(outputs: Tensor, damping: float = 0.05) -> tuple[Tensor, Tensor]:
    """Returns what errors come to when rows that are coded later take over those of rows before.

    Args:
        outputs: ``G [N, N]``, symmetric, positive semidefinite.
        damping: Share of the mean of its diagonal that is added to it.

    Returns:
        The order ``[N]`` in which rows are coded, and ``T [N, N]`` in that order: if a block of rows is rounded with
        the error ``e``, all end with the error ``T e``. Blocks on the diagonal are the identity, those above zero.

    Raises:
        InputError: If the moment is not finite, or not positive semidefinite.
    """
    order = outputs.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_root(outputs[order][:, order], damping, "outputs' gradients'")
    spread = torch.eye(len(order), dtype=outputs.dtype, device=outputs.device)
    for start, stop in _row_blocks(len(order)):
        block = upper[start:stop, start:stop]
        spread[stop:, start:stop] = torch.linalg.solve_triangular(block, upper[start:stop, stop:], upper=True).t()
    return order, spread


def _row_blocks(rows: int) -> list[tuple[int, int]]:
    step = max(_FEWEST_ROWS, -(-rows // _ROW_BLOCKS))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _by_rows(
    work: Tensor, books: Tensor, metric: _Metric, outputs: Tensor, damping: float, beam: int, search: Search
) -> Coded:  # fmt: skip
    """Encodes blocks of rows; later blocks compensate errors of earlier ones as far as their outputs allow."""
    order, spread = feedback_between_rows(outputs, damping)
    open_ = work[order]
    codes = torch.empty(len(books), len(metric.order), len(work), dtype=torch.long, device=work.device)
    corrected, decoded = torch.empty_like(work), torch.empty_like(work)
    for start, stop in _row_blocks(len(work)):
        found = _by_columns(open_[start:stop], books, metric, beam, search)
        codes[..., order[start:stop]], decoded[order[start:stop]] = found.codes, found.decoded
        error = open_[start:stop] - found.decoded
        open_[stop:] -= spread[stop:, start:stop].to(work.dtype) @ error
        corrected[order[start:stop]] = found.corrected
    return Coded(codes, corrected, decoded)


def _by_columns(work: Tensor, books: Tensor, metric: _Metric, beam: int, search: Search) -> Coded:
    """Encodes sub-vectors of all rows; later ones compensate errors of earlier ones as far as their inputs allow."""
    share = len(metric.order) // books.shape[1]
    groups = metric.order // share
    found, seen = search(work[:, metric.columns], books, groups.tolist(), metric.to_metric, metric.upper, beam)
    codes, corrected = found.new_empty(len(books), len(metric.order), len(work)), torch.empty_like(work)
    codes[:, metric.order], corrected[:, metric.columns] = found.permute(2, 1, 0), seen
    return Coded(codes, corrected, _decoded(books, codes, share))


def _decoded(books: Tensor, codes: Tensor, share: int) -> Tensor:
    """Returns sums of entries ``[N, D]`` of codes ``[R, M, N]``."""
    groups = torch.arange(codes.shape[1], device=codes.device)[:, None] // share
    total = torch.stack([book[groups, code] for book, code in zip(books, codes, strict=True)]).sum(0)
    return total.transpose(0, 1).flatten(1)


def _search(points: Tensor, books: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Returns codes ``[R, N]`` and what they stand for, ``[N, d]``."""
    codes = beam_search(points.contiguous(), books.contiguous(), beam)[0].t()
    return codes, _entries(books, codes)


def _entries(books: Tensor, codes: Tensor) -> Tensor:
    return torch.stack([book[code] for book, code in zip(books, codes, strict=True)]).sum(0)


def _inverse_root(moment: Tensor, damping: float, whose: str) -> Tensor:
    """Returns the upper Cholesky factor of the inverse, with as much damping as it takes.

    It is the inverse of the moment's own upper factor, which is the lower factor of the moment read backwards.
    """
    if not bool(torch.isfinite(moment).all()):
        raise InputError(f"the {whose} second moment has infinite or NaN elements; look at the calibration batches")
    mean = moment.diagonal().mean()
    if mean <= 0:  # no input ever: any code is as good
        return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    work = moment / mean
    ridge = work.diagonal() + 0.1
    for _ in range(_TRIES):
        lower, wrong = torch.linalg.cholesky_ex((work + torch.diag(damping * ridge)).flip(0, 1))
        if not wrong:
            return _inverse_upper(lower.flip(0, 1))
        damping *= 10
    raise InputError(f"the {whose} second moment is not positive semidefinite")


def _inverse_upper(matrix: Tensor) -> Tensor:
    """Returns the inverse of an upper triangular matrix, by halves, as a solver would compute with the zeros, too."""
    half = len(matrix) // 2
    if half < _SMALLEST_HALF:
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(matrix, identity, upper=True)
    first, last = _inverse_upper(matrix[:half, :half]), _inverse_upper(matrix[half:, half:])
    inverse = torch.zeros_like(matrix)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -(first @ matrix[:half, half:] @ last)
    return inverse
