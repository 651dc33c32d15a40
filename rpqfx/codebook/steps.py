"""The steps that the products of a quantized matrix are made of: tables, sums of gathers, bins, blocks.

Axes as in ``rpqfx.codebook``; ``b`` is a row of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from rpqfx.codebook.signs import fold_codes

# What ``bins`` is, for those who bring another.
Bins = Callable[[Tensor, Tensor, Tensor | None, int, int], Iterator[tuple[slice, Tensor]]]

# Elements of a table (or of bins) that are alive at a time: few enough to stay in the
# cache of a core (measured; up to 2**20 is within a fifth of it).
TABLE_ELEMENTS = 2**18
# Rows of a block at least: gathered rows are then long enough to add up fast.
BLOCK_ROWS = 128
# Up to this many rows, gathering all terms and then adding them up beats turning the codes into an index of a bag.
GATHER_ROWS = 2
# Up to this many rows a scatter into bins beats sorting the codes first (measured, CPU).
SCATTER_ROWS = 48


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which terms of a dtype are summed."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def blocks(rows: int, codes: Tensor, entries: int) -> list[slice]:
    """Slices of a batch whose tables stay small; one slice where a compiler plans the memory."""
    per_row = codes.shape[0] * codes.shape[1] * entries
    if torch.compiler.is_compiling() or rows * per_row <= TABLE_ELEMENTS:
        return [slice(None)]
    size = max(BLOCK_ROWS, TABLE_ELEMENTS // per_row)
    return [slice(first, first + size) for first in range(0, rows, size)]


def entry_index(codes: Tensor, codebooks_shape: tuple[int, ...]) -> Tensor:
    """``[R, M, N]`` int64: where each code's entry lies in ``codebooks.reshape(R*G*K, d)``."""
    stages, books, entries, _ = codebooks_shape
    sub_vectors = codes.shape[1]
    book = torch.arange(sub_vectors, device=codes.device) // (sub_vectors // books)
    book = book + books * torch.arange(stages, device=codes.device)[:, None]
    return codes.long() + (book * entries)[..., None]


def table(x: Tensor, codebooks: Tensor) -> Tensor:
    """``[(g r k s), b]``: every sub-vector of ``x [b, D]`` dotted with every entry of its codebook."""
    stages, books, entries, d = codebooks.shape
    left = rearrange(codebooks, "r g k d -> g (r k) d")
    right = rearrange(x, "b (g s d) -> g d (s b)", g=books, d=d)
    dots = torch.bmm(left, right).view(-1)  # flat first: torch 2.11 cannot prove the merge for a batch of any size
    dots = dots.view(books * stages * entries * (x.shape[1] // (books * d)), x.shape[0])
    return dots.to(sum_dtype(x.dtype))


def table_index(codes: Tensor, codebooks: Tensor) -> Tensor:
    """``[n, (r m)]`` int32: the row of ``table`` that each code picks."""
    stages, books, entries, _ = codebooks.shape
    sub_vectors = codes.shape[1]
    share = sub_vectors // books
    m = torch.arange(sub_vectors, device=codes.device, dtype=torch.int32)
    r = torch.arange(stages, device=codes.device, dtype=torch.int32)[:, None]
    first = ((m // share) * stages + r) * entries * share + m % share
    return rearrange(codes.int() * share + first[..., None], "r m n -> n (r m)").contiguous()


def for_onnx() -> bool:
    """Returns whether ``torch.onnx.export`` is tracing, whose operators have no bags."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def gather_sum(dots: Tensor, index: Tensor) -> Tensor:
    """``[b, n]``: sums the rows of a table that ``index [n, p]`` names."""
    if for_onnx():
        return sum((dots.index_select(0, one) for one in index[:, 1:].unbind(1)), dots.index_select(0, index[:, 0])).t()
    return F.embedding_bag(index, dots, mode="sum").t()


def gather_few(dots: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """``[b, n]``: what ``gather_sum`` gives, by a way that holds ``b * r * m * n`` terms: for a row or two."""
    stages, books, entries, _ = codebooks.shape
    by_row = rearrange(dots, "(g r k s) b -> b (r g s) k", r=stages, g=books, k=entries)
    index = rearrange(codes.long(), "r m n -> (r m) n").expand(by_row.shape[0], -1, -1)
    return by_row.gather(2, index).sum(1)


def runs(codes: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Returns the vectors in the order of their codes, and where each entry's run of them begins.

    Returns:
        ``order [(r m n)]`` and ``first [(r m k)]``, int64: the index and the offsets of an embedding bag.
    """
    stages, sub_vectors, _ = codes.shape
    ones = torch.ones((), dtype=torch.int64, device=codes.device).expand(codes.shape)
    counts = ones.new_zeros(stages, sub_vectors, entries).scatter_add(2, codes.long(), ones).reshape(-1)
    return codes.int().argsort(-1).reshape(-1), counts.cumsum(0) - counts


def bins(y: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Iterator[tuple[slice, Tensor]]:
    """``y [B, n]``, with its signs, summed over the vectors that use an entry, block by block of the batch.

    Yields:
        A slice of the batch, and its bins ``[r, g, s, k, b]``, float32 where ``y`` is float16 or bfloat16. No name is
        kept for them here, so a caller that drops its own has one block's alive at a time.
    """
    folded, of_all = fold_codes(codes, entries, signs), entries if signs is None else 2 * entries
    every = _plain_bins(y.to(sum_dtype(y.dtype)), folded, books, of_all)

    def unfold(block: tuple[slice, Tensor]) -> tuple[slice, Tensor]:
        part, filled = block
        return part, filled[..., :entries, :] - filled[..., entries:, :]

    yield from every if signs is None else map(unfold, every)


def _plain_bins(y: Tensor, codes: Tensor, books: int, entries: int) -> Iterator[tuple[slice, Tensor]]:
    stages, sub_vectors, num_vectors = codes.shape
    if not torch.compiler.is_compiling() and y.shape[0] <= SCATTER_ROWS:  # in this order: the second binds a graph
        shape = (y.shape[0], stages * sub_vectors, num_vectors)
        index = rearrange(codes.long(), "r m n -> (r m) n").expand(shape)
        filled = y.new_zeros(*shape[:2], entries).scatter_add(2, index, y[:, None].expand(shape))
        yield slice(None), rearrange(filled, "b (r g s) k -> r g s k b", r=stages, g=books)
        return
    if for_onnx():
        columns = y.t()
        empty = columns.new_zeros(entries, y.shape[0])
        each = [empty.index_put((one,), columns, accumulate=True) for one in codes.long().flatten(0, 1).unbind(0)]
        yield slice(None), rearrange(torch.stack(each), "(r g s) k b -> r g s k b", r=stages, g=books)
        return
    order, first = runs(codes, entries)  # serves every block; compiled graphs always sort, since they serve every batch
    for part in blocks(y.shape[0], codes, entries):
        yield part, rearrange(
            F.embedding_bag(order, y[part].t().contiguous(), first, mode="sum"),
            "(r g s k) b -> r g s k b", r=stages, g=books, k=entries,
        )  # fmt: skip


def bins_to_rows(bins: Tensor, codebooks: Tensor) -> Tensor:
    """``[b, D]``: the entries, weighted by their bins ``[r, g, s, k, b]``."""
    return rearrange(torch.einsum("rgskb,rgkd->bgsd", bins, codebooks), "b g s d -> b (g s d)")


def bins_to_codebooks(bins: Tensor, x: Tensor) -> Tensor:
    """``[R, G, K, d]``: the sub-vectors of ``x [b, D]``, weighted by the bins."""
    parts = rearrange(x.to(bins.dtype), "b (g s d) -> b g s d", g=bins.shape[1], s=bins.shape[2])
    return torch.einsum("rgskb,bgsd->rgkd", bins, parts)
