"""Launch grids and block sizes of the CUDA kernels. They are estimates, which no measurement has chosen.

Importing this imports Triton. Arguments have been checked (``rpqfx.ops.cuda.kernels``): contiguous, of shapes that fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.ops.cuda import triton_kernels as kernels

# Programs that keep a large GPU busy. A constant, so that results do not depend on the size of the GPU.
PROGRAMS = 512
# Elements of a tile: 16 for each of a program's 128 threads.
TILE = 2048
# Multiply and add in one step, as ever; said because Triton's default is about to change.
OPTIONS = {"enable_fp_fusion": True}


def expand(codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None) -> Tensor:
    """Returns ``[N, D]``: the matrix itself."""
    stages, books, entries, d = codebooks.shape
    _, sub_vectors, num_vectors = codes.shape
    out = codebooks.new_empty(num_vectors, sub_vectors * d)
    block_d = _power(d, 1, 128)
    block_m = _power(sub_vectors, 1, 64 // block_d)  # short sub-vectors: several, for whole lines of memory
    block_n = _power(num_vectors, 1, TILE // (block_d * block_m))
    grid = (_blocks(num_vectors, block_n) * _blocks(sub_vectors, block_m) * _blocks(d, block_d),)
    with torch.cuda.device_of(out):
        kernels.expand[grid](
            out, codebooks, codes, scale, signs, stages, sub_vectors, books, num_vectors, entries, d,
            BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_D=block_d, **OPTIONS,
        )  # fmt: skip
    return out


def table(x: Tensor, codebooks: Tensor, sub_vectors: int) -> Tensor:
    """Returns ``[p, k, b]`` float32: every sub-vector of ``x [b, D]`` dotted with every entry of its codebook."""
    stages, books, entries, d = codebooks.shape
    rows = x.shape[0]
    dots = x.new_empty(stages * sub_vectors, entries, rows, dtype=torch.float32)
    block_k, block_b = _power(entries, 16, 64), _power(rows, 16, 64)
    block_d = _power(d, 16, 16 if x.dtype is torch.float32 else 64)  # more float32 do not fit the registers
    grid = (dots.shape[0] * _blocks(entries, block_k), _blocks(rows, block_b))
    with torch.cuda.device_of(dots):
        kernels.table[grid](
            dots, x, codebooks, rows, sub_vectors, books, entries, d,
            WIDEN=kernels.INTERPRETED and x.dtype is torch.bfloat16,
            BLOCK_K=block_k, BLOCK_B=block_b, BLOCK_D=block_d, **OPTIONS,
        )  # fmt: skip
    return dots


def gather_sum(dots: Tensor, codes: Tensor, signs: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns ``[b, n]``: the sum of the elements of a table that the codes pick.

    Few rows make few programs, so the uses are split among several and their sums are added up in a second step.
    """
    uses, entries, rows = dots.shape
    num_vectors = codes.shape[2]
    block_b = _power(rows, 1, 32)
    block_n = _power(num_vectors, 1, 128 if block_b <= 2 else 64)
    block_p = _power(uses, 1, TILE // (block_b * block_n))
    programs = _blocks(num_vectors, block_n) * _blocks(rows, block_b)
    splits = max(1, PROGRAMS // max(1, programs))
    share = _blocks(_blocks(uses, splits), block_p) * block_p
    splits = _blocks(uses, share)
    out = dots.new_empty(splits, rows, num_vectors, dtype=dtype if splits == 1 else torch.float32)
    with torch.cuda.device_of(dots):
        kernels.gather_sum[(_blocks(num_vectors, block_n), _blocks(rows, block_b), splits)](
            out, dots, codes, signs, rows, uses, num_vectors, entries, share,
            BLOCK_P=block_p, BLOCK_N=block_n, BLOCK_B=block_b, **OPTIONS,
        )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(dtype)


class Bins:
    """Sums over the vectors that use an entry. The codes are sorted once, for every block of the batch.

    Sorting gives positions as int64: 8 bytes a code, for as long as this is alive.

    Args:
        codes: ``[R, M, N]``.
        signs: Packed signs or None.
        books: ``G``.
        entries: ``K``.
    """

    def __init__(self, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> None:
        stages, sub_vectors, num_vectors = codes.shape
        self.signs = signs
        self.shape = (stages, books, sub_vectors // books, entries)
        keys = codes.view(-1, num_vectors)
        keys = keys.int() if keys.dtype is torch.uint16 else keys  # torch does not sort uint16
        ordered, self.order = keys.sort(dim=-1, stable=True)
        entry = torch.arange(entries, dtype=torch.int32, device=codes.device).repeat(len(keys), 1)
        self.ends = torch.searchsorted(ordered.int(), entry, right=True, out_int32=True)

    def __call__(self, y: Tensor) -> Tensor:
        """Returns ``[r, g, s, k, b]`` float32, from ``y [b, N]``."""
        (uses, num_vectors), entries, rows = self.order.shape, self.shape[3], y.shape[0]
        bins = y.new_empty(*self.shape, rows, dtype=torch.float32)
        block_b = _power(rows, 1, 64)
        block_i = _power(num_vectors // (4 * entries), 1, 16)  # a few steps for a run of mean length
        block_k = _power(entries, 1, min(32, TILE // (block_b * block_i)))
        with torch.cuda.device_of(bins):
            kernels.bin_sum[(uses * _blocks(entries, block_k), _blocks(rows, block_b))](
                bins, y.t().contiguous(), self.order, self.ends, self.signs, rows, num_vectors, entries,
                BLOCK_K=block_k, BLOCK_I=block_i, BLOCK_B=block_b, **OPTIONS,
            )  # fmt: skip
        return bins


def _power(number: int, low: int, high: int) -> int:
    """Returns the least power of two from ``number`` up, between two others (``low`` where they leave nothing)."""
    return max(low, min(high, 1 << max(0, number - 1).bit_length()))


def _blocks(number: int, size: int) -> int:
    return -(-number // size)
