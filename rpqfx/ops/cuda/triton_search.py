"""Greedy residual search on a GPU, in Triton: all stages in one kernel.

Block sizes are estimates. A program holds what is left of a block of points in registers, from
the first stage to the last, and meets the entries of a stage tile by tile: neither the distances nor what is left is
ever in memory. Which entry is best is found by ``|k|^2 - 2 (x - s).k``, where keys ``k`` are the entries less their
mean ``s`` (distances far from the origin would cancel), or for the cosine the entries' directions with norms and ``s``
zero. All in float32.

Triton is imported here; ``rpqfx.ops.cuda.kernels`` imports this file when it first launches the kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rpqfx.ops.cuda.triton_launch import OPTIONS, _blocks, _power

# Elements of a block of points, and of a tile of entries: both are in registers, of 128 threads.
POINTS = 4096
ENTRIES = 64


@triton.jit
def residual_search(
    codes: tl.tensor, distances: tl.tensor, points: tl.tensor, books: tl.tensor, keys: tl.tensor, norms: tl.tensor,
    shifts: tl.tensor, rows: tl.tensor, stages: tl.tensor, entries: tl.tensor, d: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``codes[n, r]`` and the squared ``distances[n]`` that are left. Codes are in range whatever comes in."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    j = tl.arange(0, BLOCK_D)
    inside = (n < rows)[:, None] & (j < d)[None, :]
    rest = tl.load(points + n[:, None] * d + j[None, :], mask=inside, other=0.0).to(tl.float32)
    for r in range(stages):
        book = (tl.zeros((), tl.int64) + r) * entries
        turned = rest - tl.load(shifts + r * d + j, mask=j < d, other=0.0)[None, :]
        best = tl.full((BLOCK_N,), float("inf"), tl.float32)
        code = tl.zeros((BLOCK_N,), tl.int32)
        for first in range(0, entries, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            at = (book + k)[None, :] * d + j[:, None]
            key = tl.load(keys + at, mask=(k < entries)[None, :] & (j < d)[:, None], other=0.0)
            norm = tl.load(norms + book + k, mask=k < entries, other=float("inf"))
            # "ieee": by default float32 would be rounded to the ten bits of tf32 on its way in.
            scores = norm[None, :] - 2.0 * tl.dot(turned, key, input_precision="ieee")
            scores = tl.where(scores == scores, scores, float("inf"))  # NaN is nearest to nothing
            low, where = tl.min(scores, 1, return_indices=True, return_indices_tie_break_left=True)
            code = tl.where(low < best, first + where, code)
            best = tl.where(low < best, low, best)
        entry = tl.load(books + (book + code)[:, None] * d + j[None, :], mask=inside, other=0.0)
        rest -= entry.to(tl.float32)
        tl.store(codes + n * stages + r, code.to(tl.int64), mask=n < rows)
    tl.store(distances + n, tl.sum(rest * rest, 1), mask=n < rows)


def launch(points: Tensor, books: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """Returns codes ``[N, R]`` int64 and squared distances ``[N]``, of arguments that have been checked: contiguous."""
    rows, d = points.shape
    stages, entries, _ = books.shape
    wide = books.float()
    shifts = torch.zeros_like(wide[:, 0]) if cosine else wide.mean(1)
    keys = F.normalize(wide, dim=2) if cosine else wide - shifts[:, None]
    norms = torch.zeros_like(keys[..., 0]) if cosine else keys.square().sum(2)
    codes = torch.empty(rows, stages, dtype=torch.int64, device=points.device)
    distances = torch.empty(rows, dtype=torch.float32, device=points.device)
    block_d = _power(d, 16, 128)
    block_n, block_k = _power(rows, 16, min(128, POINTS // block_d)), _power(entries, 16, ENTRIES)
    with torch.cuda.device_of(points):
        residual_search[(max(1, _blocks(rows, block_n)),)](
            codes, distances, points, books, keys.contiguous(), norms, shifts, rows, stages, entries, d,
            BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=block_d, **OPTIONS,
        )  # fmt: skip
    return codes, distances.to(points.dtype)
