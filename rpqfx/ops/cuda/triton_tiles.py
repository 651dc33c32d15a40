"""Products on a GPU with a matrix whose codes lie in tiles, in Triton: kernels and their launches.

``rpqfx.codebook.tiles`` describes the tiles. There are two ways. With few rows, dot products of all sub-vectors with
all entries are a small table, and a sum of its elements reads each code once. With more, the matrix is made for the
length of the call and torch multiplies. Both sum in float32, without atomics. A third way, a tile's part of the matrix
made in registers and multiplied there, was slower on an H200 at every number of rows (docs/design/execution.md).

Triton is imported here; ``rpqfx.ops.cuda.kernels`` imports this file when it first launches the kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rpqfx.codebook.tiles import MOST_ENTRIES, TILE
from rpqfx.ops.cuda import triton_launch
from rpqfx.ops.cuda.triton_launch import OPTIONS, _blocks, _power

HALF = TILE // 2
# Rows of a table's block.
TABLE_ROWS = 4
# Columns of the matrix that a program makes.
COLUMNS = 32
# Uses whose codes a program has under way at a time.
UNDER_WAY = 16
# Programs of one warp that keep a large GPU busy; a constant, so that results do not depend on the size of the GPU.
WARPS = 2048


@triton.jit
def table(
    dots: tl.tensor, x: tl.tensor, codebooks: tl.tensor, dims: tl.tensor, rows: tl.tensor, sub_vectors: tl.tensor,
    books: tl.tensor, entries: tl.tensor, padded: tl.tensor, stages: tl.constexpr, d: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_B: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``dots[block, p, k, b]``, ``p = m * R + r``: sub-vector ``m`` of ``x[b] * dims`` times entry ``k``.

    Entries that are not there are NaN, so that a code that points to one is. Uses that are not there are zero.
    """
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    i = tl.arange(0, BLOCK_B)
    b = tl.program_id(1) * BLOCK_B + i
    k = tl.arange(0, ENTRIES)
    m = p // stages
    here, met = p < sub_vectors * stages, b < rows
    book = (p % stages) * books + m // (sub_vectors // books)
    total = tl.zeros((BLOCK_P, ENTRIES, BLOCK_B), tl.float32)
    for first in range(0, d, BLOCK_J):
        for more in tl.static_range(BLOCK_J):  # whose reads are under way at once
            j = first + more
            known = here & (p * 0 + j < d)
            at = (book * entries)[:, None] + k[None, :]
            entry = tl.load(codebooks + at * d + j, mask=known[:, None] & (k < entries)[None, :], other=0.0)
            column = m * d + j
            at = b.to(tl.int64)[None, :] * (sub_vectors * d) + column[:, None]
            part = tl.load(x + at, mask=known[:, None] & met[None, :], other=0.0).to(tl.float32)
            if dims is not None:
                part *= tl.load(dims + column, mask=known, other=0.0).to(tl.float32)[:, None]
            total += entry.to(tl.float32)[:, :, None] * part[:, None, :]
    total = tl.where((here[:, None] & (k >= entries)[None, :])[:, :, None], float("nan"), total)
    use = (tl.program_id(1) * padded + p).to(tl.int64)
    at = (use[:, None] * ENTRIES + k[None, :])[:, :, None] * BLOCK_B + i[None, None, :]
    tl.store(dots + at, total, mask=(p < padded)[:, None, None])


@triton.jit
def pick_sum(
    parts: tl.tensor, dots: tl.tensor, tiles: tl.tensor, rows: tl.tensor, uses: tl.tensor, num_vectors: tl.tensor,
    padded: tl.tensor, share: tl.tensor, ENTRIES: tl.constexpr, HALF: tl.constexpr, UNDER_WAY: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``parts[s, b, n]``: the sum of a table's elements that a tile's codes pick, over uses of split ``s``.

    A program is one warp, and its lanes look one use up at a time: all they read is then in one line of the cache.
    """
    tile, start = tl.program_id(0), tl.program_id(2) * share
    i, k = tl.arange(0, HALF), tl.arange(0, BLOCK_B)
    low = tl.zeros((HALF, BLOCK_B), tl.float32)
    high = tl.zeros((HALF, BLOCK_B), tl.float32)
    codes = tiles + tile.to(tl.int64) * uses * HALF + i
    picked = dots + (tl.program_id(1) * padded).to(tl.int64) * (ENTRIES * BLOCK_B) + k[None, :]
    for first in range(start, start + share, UNDER_WAY):
        for more in tl.static_range(UNDER_WAY):
            p = first + more
            both = tl.load(codes + p * HALF, mask=i < (uses - p) * HALF, other=0).to(tl.int32)
            low += tl.load(picked + (p * ENTRIES + (both & 15))[:, None] * BLOCK_B)
            high += tl.load(picked + (p * ENTRIES + (both >> 4))[:, None] * BLOCK_B)
    b, n = tl.program_id(1) * BLOCK_B + k, tile * (2 * HALF) + i
    to = parts + (tl.program_id(2) * rows + b).to(tl.int64)[None, :] * num_vectors + n[:, None]
    tl.store(to, low, mask=(n < num_vectors)[:, None] & (b < rows)[None, :])
    tl.store(to + HALF, high, mask=(n + HALF < num_vectors)[:, None] & (b < rows)[None, :])


@triton.jit
def made(
    codes: tl.tensor, padded: tl.tensor, m: tl.tensor, here: tl.tensor, i: tl.tensor, share: tl.tensor,
    books: tl.tensor, stages: tl.constexpr, ENTRIES: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Returns sub-vectors ``m`` of a tile's first and second half: ``[m, i, j]`` each, float32.

    The codebooks are ``padded [R, G, 16, BLOCK_D]``: whole entries are read at once.
    """
    j = tl.arange(0, BLOCK_D)[None, None, :]
    left = tl.zeros((BLOCK_M, HALF, BLOCK_D), tl.float32)
    right = tl.zeros((BLOCK_M, HALF, BLOCK_D), tl.float32)
    mask = here[:, None, None]
    for r in tl.static_range(stages):
        both = tl.load(codes + (m * stages + r)[:, None] * HALF + i[None, :], mask=here[:, None], other=0).to(tl.int32)
        book = ((r * books + m // share) * ENTRIES)[:, None]
        left += tl.load(padded + (book + (both & 15))[:, :, None] * BLOCK_D + j, mask=mask, other=0.0).to(tl.float32)
        right += tl.load(padded + (book + (both >> 4))[:, :, None] * BLOCK_D + j, mask=mask, other=0.0).to(tl.float32)
    return left, right


@triton.jit
def add_up(
    y: tl.tensor, parts: tl.tensor, scale: tl.tensor, bias: tl.tensor, splits: tl.tensor, rows: tl.tensor,
    num_vectors: tl.tensor, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``y[b, n]``: the sum over splits, times ``scale[n]``, plus ``bias[n]``."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    b, mask = tl.program_id(1), n < num_vectors
    at = (s * rows + b).to(tl.int64)[:, None] * num_vectors + n[None, :]
    total = tl.sum(tl.load(parts + at, mask=(s < splits)[:, None] & mask[None, :], other=0.0), 0)
    if scale is not None:
        total *= tl.load(scale + n, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + b.to(tl.int64) * num_vectors + n, total, mask=mask)


@triton.jit
def expand(
    out: tl.tensor, padded: tl.tensor, tiles: tl.tensor, sub_vectors: tl.tensor, books: tl.tensor,
    num_vectors: tl.tensor, stages: tl.constexpr, d: tl.constexpr, ENTRIES: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``out[n, m * d + j]``: the matrix, rounded once, at the end."""
    tile = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i, j = tl.arange(0, HALF), tl.arange(0, BLOCK_D)
    codes = tiles + tile.to(tl.int64) * sub_vectors * (stages * HALF)
    here = m < sub_vectors
    left, right = made(codes, padded, m, here, i, sub_vectors // books, books, stages, ENTRIES, HALF, BLOCK_M, BLOCK_D)
    n = tile * (2 * HALF) + i
    inside = here[None, :, None] & (j < d)[None, None, :]
    to = out + (n.to(tl.int64)[:, None] * sub_vectors + m[None, :])[:, :, None] * d + j[None, None, :]
    tl.store(to, tl.permute(left, (1, 0, 2)), mask=inside & (n < num_vectors)[:, None, None])
    after = tl.full((), HALF * d, tl.int64) * sub_vectors
    tl.store(to + after, tl.permute(right, (1, 0, 2)), mask=inside & (n + HALF < num_vectors)[:, None, None])


# ------------------------------------------------------------------------------------------------------- launches


def by_table(
    x: Tensor, codebooks: Tensor, tiles: Tensor, num_vectors: int, dims: Tensor | None, scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Returns ``(x * dims) @ W.T * scale + bias`` through a table: ``[b, N]``, of checked and contiguous tensors."""
    stages, books, entries, d = codebooks.shape
    (count, sub_vectors, _), rows = tiles.shape, x.shape[0]
    uses, block_b = sub_vectors * stages, _power(rows, 1, TABLE_ROWS)
    blocks = _blocks(rows, block_b)
    splits, share = _splits(count * blocks, uses)
    padded = splits * share
    dots = x.new_empty(blocks, padded, MOST_ENTRIES, block_b, dtype=torch.float32)
    parts = x.new_empty(splits, rows, num_vectors, dtype=torch.float32)
    block_p = _power(padded, 1, max(1, triton_launch.TILE // (8 * MOST_ENTRIES * block_b)))
    with torch.cuda.device_of(x):
        table[(_blocks(padded, block_p), blocks)](
            dots, x, codebooks, dims, rows, sub_vectors, books, entries, padded, stages, d,
            ENTRIES=MOST_ENTRIES, BLOCK_P=block_p, BLOCK_J=_power(d, 1, 8), BLOCK_B=block_b, **OPTIONS,
        )  # fmt: skip
        pick_sum[(count, blocks, splits)](
            parts, dots, tiles, rows, uses, num_vectors, padded, share,
            ENTRIES=MOST_ENTRIES, HALF=HALF, UNDER_WAY=UNDER_WAY, BLOCK_B=block_b, num_warps=1, **OPTIONS,
        )  # fmt: skip
    return _added_up(parts, x.dtype, scale, bias)


def expanded(codebooks: Tensor, tiles: Tensor, num_vectors: int) -> Tensor:
    """Returns the matrix ``[N, D]``."""
    stages, books, _, d = codebooks.shape
    count, sub_vectors, _ = tiles.shape
    padded = _padded(codebooks)
    out = codebooks.new_empty(num_vectors, sub_vectors * d)
    block_m = max(1, COLUMNS // padded.shape[3])
    with torch.cuda.device_of(out):
        expand[(count, _blocks(sub_vectors, block_m))](
            out, padded, tiles, sub_vectors, books, num_vectors, stages, d,
            ENTRIES=MOST_ENTRIES, HALF=HALF, BLOCK_M=block_m, BLOCK_D=padded.shape[3], num_warps=8, **OPTIONS,
        )  # fmt: skip
    return out


def _padded(codebooks: Tensor) -> Tensor:
    """Returns ``[R, G, 16, a power of two]``: NaN where there is no entry, and zeros at the end of each."""
    _, _, entries, d = codebooks.shape
    whole = F.pad(codebooks, (0, 0, 0, MOST_ENTRIES - entries), value=float("nan"))
    return F.pad(whole, (0, _power(d, 1, d * 2) - d)).contiguous()


def _splits(programs: int, uses: int) -> tuple[int, int]:
    """Returns how many programs share the sum for one result, and the uses that each of them adds up."""
    splits = max(1, WARPS // max(1, programs))
    share = _blocks(_blocks(uses, splits), UNDER_WAY) * UNDER_WAY
    return _blocks(uses, share), share


def _added_up(parts: Tensor, dtype: torch.dtype, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    splits, rows, num_vectors = parts.shape
    y = parts.new_empty(rows, num_vectors, dtype=dtype)
    block_s = _power(splits, 1, 2 * splits)
    block_n = _power(num_vectors, 1, max(16, triton_launch.TILE // block_s))
    with torch.cuda.device_of(parts):
        add_up[(_blocks(num_vectors, block_n), rows)](
            y, parts, scale, bias, splits, rows, num_vectors, BLOCK_S=block_s, BLOCK_N=block_n, **OPTIONS
        )
    return y
