"""The CUDA kernels of a codebook-held matrix, in Triton. Block sizes are estimates.

Axes as in ``rpqfx.codebook``; ``p = r * M + m`` is a use of a codebook (uses: ``R * M``), ``b`` a row of the batch.
Tensors are contiguous, terms are summed in float32, and every element of a result is written by one program in one
order: no atomics, so the same call gives the same bits. Codes are read as the integers that they are stored as.
Sub-vectors' length ``d`` is a constant of a kernel: the compiler then reads and writes whole short sub-vectors.
A code that points outside its codebook stands for NaN: to look for one beforehand would make the CPU wait for the GPU,
and to follow it would read some other memory.

Triton is imported here and in ``rpqfx.ops.cuda.triton_search``, nowhere else; ``rpqfx.ops.cuda.kernels`` launches these
kernels and imports this file when it first does. With the environment variable ``TRITON_INTERPRET=1`` (from before
triton is first imported) they run on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def sign_of(signs: tl.tensor, p: tl.tensor, n: tl.tensor, num_vectors: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Returns plus or minus one for each (p, n), from one bit each."""
    byte = tl.load(signs + p * tl.cdiv(num_vectors, 8) + n // 8, mask=mask, other=0).to(tl.int32)
    return 1.0 - 2.0 * ((byte >> (n % 8).to(tl.int32)) & 1)


@triton.jit
def table(
    dots: tl.tensor, x: tl.tensor, codebooks: tl.tensor, rows: tl.tensor, sub_vectors: tl.tensor, books: tl.tensor,
    entries: tl.tensor, d: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``dots[p, k, b]``: sub-vector ``m`` of ``x[b]`` dotted with entry ``k`` of its codebook.

    Rows lie innermost, so that one gathered code serves a run of them. Few rows still take a whole tile of 16: the
    step then waits for the codebooks to arrive, not for the arithmetic.
    """
    k_blocks = tl.cdiv(entries, BLOCK_K)
    p = tl.program_id(0) // k_blocks
    k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    m = p % sub_vectors
    book = p // sub_vectors * books + m // (sub_vectors // books)
    left = codebooks + (book.to(tl.int64) * entries + k)[:, None] * d
    right = x + b.to(tl.int64)[None, :] * (sub_vectors * d) + m * d
    total = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
    for first in range(0, d, BLOCK_D):
        j = first + tl.arange(0, BLOCK_D)
        entry = tl.load(left + j[None, :], mask=(k < entries)[:, None] & (j < d)[None, :], other=0.0)
        part = tl.load(right + j[:, None], mask=(j < d)[:, None] & (b < rows)[None, :], other=0.0)
        if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16
            entry, part = entry.to(tl.float32), part.to(tl.float32)
        # "ieee": by default float32 would be rounded to the ten bits of tf32 on its way in.
        total = tl.dot(entry, part, total, input_precision="ieee")
    at = (p.to(tl.int64) * entries + k)[:, None] * rows + b[None, :]
    tl.store(dots + at, total, mask=(k < entries)[:, None] & (b < rows)[None, :])


@triton.jit
def gather_sum(
    out: tl.tensor, dots: tl.tensor, codes: tl.tensor, signs: tl.tensor, rows: tl.tensor, uses: tl.tensor,
    num_vectors: tl.tensor, entries: tl.tensor, share: tl.tensor,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``out[s, b, n]``: the sum of ``dots[p, codes[p, n], b]`` over the ``share`` uses of split ``s``.

    The table stays in global memory. It does not fit a program's registers (M * K floats a row, 74 KB at 72 x 256),
    Triton has no shared memory to put it in by hand, and ``tl.gather`` would pass each row of it through registers
    once more in every program. The row in use, K floats a row of the batch, is one that the L1 cache holds.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    start = tl.program_id(2) * share
    total = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for first in range(start, tl.minimum(start + share, uses), BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        mask = (p < uses) & (n < num_vectors)[None, :]
        code = tl.load(codes + p * num_vectors + n[None, :], mask=mask, other=0).to(tl.int32)
        known = (code >= 0) & (code < entries)
        at = (p * entries + tl.where(known, code, 0))[:, :, None] * rows + b[None, None, :]
        terms = tl.load(dots + at, mask=mask[:, :, None] & (b < rows)[None, None, :], other=0.0)
        terms = tl.where(known[:, :, None], terms, float("nan"))
        if signs is not None:
            terms *= sign_of(signs, p, n[None, :], num_vectors, mask)[:, :, None]
        total += tl.sum(terms, 0)
    at = (tl.program_id(2) * rows + b).to(tl.int64)[None, :] * num_vectors + n[:, None]
    tl.store(out + at, total, mask=(n < num_vectors)[:, None] & (b < rows)[None, :])


@triton.jit
def expand(
    out: tl.tensor, codebooks: tl.tensor, codes: tl.tensor, scale: tl.tensor, signs: tl.tensor, stages: tl.tensor,
    sub_vectors: tl.tensor, books: tl.tensor, num_vectors: tl.tensor, entries: tl.tensor, d: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``out[n, m * d + j]``: the matrix itself, rounded once, at the end."""
    d_blocks, m_blocks = tl.cdiv(d, BLOCK_D), tl.cdiv(sub_vectors, BLOCK_M)
    block = tl.program_id(0)
    j = block % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    m = block // d_blocks % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (block // d_blocks // m_blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask = (n < num_vectors)[:, None] & (m < sub_vectors)[None, :]
    inside = mask[:, :, None] & (j < d)[None, None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M, BLOCK_D), tl.float32)
    for r in range(stages):
        p = (r * sub_vectors + m).to(tl.int64)[None, :]
        code = tl.load(codes + p * num_vectors + n[:, None], mask=mask, other=0).to(tl.int32)
        book = (r * books + m // (sub_vectors // books)).to(tl.int64)[None, :]
        known = (code >= 0) & (code < entries)
        at = (book * entries + tl.where(known, code, 0))[:, :, None] * d + j[None, None, :]
        terms = tl.load(codebooks + at, mask=inside, other=0.0).to(tl.float32)
        terms = tl.where(known[:, :, None], terms, float("nan"))
        if signs is not None:
            terms *= sign_of(signs, p, n[:, None], num_vectors, mask)[:, :, None]
        total += terms
    if scale is not None:
        total *= tl.load(scale + n, mask=n < num_vectors, other=0.0).to(tl.float32)[:, None, None]
    at = (n[:, None] * sub_vectors + m[None, :])[:, :, None] * d + j[None, None, :]
    tl.store(out + at, total, mask=inside)


@triton.jit
def bin_sum(
    bins: tl.tensor, y: tl.tensor, order: tl.tensor, ends: tl.tensor, signs: tl.tensor, rows: tl.tensor,
    num_vectors: tl.tensor, entries: tl.tensor,
    BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_B: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``bins[p, k, b]``: the sum of ``y[n, b]`` over the vectors ``n`` whose code is ``k``.

    The vectors come sorted by their code: ``order[p]`` lists them and those of entry ``k`` end before ``ends[p, k]``.
    Adding up runs costs ``B * R * M * N`` additions whatever ``K``. The other deterministic way, a product with
    one-hot codes, costs ``K`` times that: at 256 entries tensor cores can pay for it, though not for float32 without
    rounding, and at 65,536 nothing can.
    """
    k_blocks = tl.cdiv(entries, BLOCK_K)
    p = (tl.program_id(0) // k_blocks).to(tl.int64)
    k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    end = tl.load(ends + p * entries + k, mask=k < entries, other=0)
    start = tl.load(ends + p * entries + k - 1, mask=(k > 0) & (k < entries), other=0)
    total = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
    for first in range(0, tl.max(end - start, 0), BLOCK_I):
        i = start[:, None] + first + tl.arange(0, BLOCK_I)[None, :]
        mask = i < end[:, None]
        n = tl.load(order + p * num_vectors + i, mask=mask, other=0).to(tl.int64)
        at = n[:, :, None] * rows + b[None, None, :]
        terms = tl.load(y + at, mask=mask[:, :, None] & (b < rows)[None, None, :], other=0.0).to(tl.float32)
        if signs is not None:
            terms *= sign_of(signs, p, n, num_vectors, mask)[:, :, None]
        total += tl.sum(terms, 1)
    at = (p * entries + k)[:, None] * rows + b[None, :]
    tl.store(bins + at, total, mask=(k < entries)[:, None] & (b < rows)[None, :])
