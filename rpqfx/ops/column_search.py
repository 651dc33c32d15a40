"""Codes of a matrix, sub-vector after sub-vector: the columns that are still open take over the error of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rpqfx.ops.cpu import kernels
from rpqfx.ops.search import beam_search, compiled

# Columns whose corrections are applied to all later columns at once.
_COLUMNS = 128


@torch.no_grad()
def column_search(
    matrix: Tensor, books: Tensor, groups: Sequence[int], to_metric: Tensor, upper: Tensor, beam: int
) -> tuple[Tensor, Tensor]:
    """Finds codes of one sub-vector after the other, each in a metric of its own.

    With what sub-vector ``c`` then errs by in that metric, ``e``, columns behind it become less by ``e @ upper[c]``.
    A compiled kernel for float32 on a CPU, else torch's own operators.

    Args:
        matrix: ``[N, C * d]``, sub-vectors in the order in which they are coded.
        books: ``[R, G, K, d]`` of the same dtype and device.
        groups: The codebooks' group of each sub-vector, ``C`` of them.
        to_metric: ``[C, d, d]``: a sub-vector and its entries are multiplied with it before they are compared.
        upper: ``[C * d, C * d]``, of which what lies above the diagonal blocks is read.
        beam: Sums of stages that are kept (see ``rpqfx.ops.search.beam_search``).

    Returns:
        Codes ``[N, C, R]`` int64, and the matrix as it was when each sub-vector was coded.
    """
    if compiled(matrix, books):
        return kernels.column_search(matrix, books, groups, to_metric, upper, beam)
    d, open_ = books.shape[3], matrix.clone()
    codes = torch.empty(len(matrix), len(groups), len(books), dtype=torch.long, device=matrix.device)
    step = max(1, _COLUMNS // d) * d
    for start in range(0, matrix.shape[1], step):
        stop = min(start + step, matrix.shape[1])
        errors = torch.empty_like(open_[:, start:stop])
        for at in range(start, stop, d):
            turn = to_metric[at // d]
            seen, own = open_[:, at : at + d] @ turn, books[:, groups[at // d]] @ turn
            found = beam_search(seen.contiguous(), own.contiguous(), beam)[0]
            error = seen - torch.stack([book[code] for book, code in zip(own, found.t(), strict=True)]).sum(0)
            open_[:, at + d : stop] -= error @ upper[at : at + d, at + d : stop]
            errors[:, at - start : at - start + d], codes[:, at // d] = error, found
        open_[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes, open_
