r"""Tables whose numbers are rows: how a convolution gathers the maps of its entries, and bins the maps of its result.

Axes as in ``rpqfx.codebook``; ``b`` is a sample and ``l`` one of the ``L`` positions of its map. The two functions are
linear, and adjoint to each other:

    gather_sum:  y[b, n, l] = sum_rm table[b, r, m, codes[r, m, n], l]
    bin_sum:     bins[b, r, m, k, l] = sum of y[b, n, l] over the vectors n with codes[r, m, n] = k
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from rpqfx.codebook import steps

# Maps of so many positions are long enough rows to add up; shorter ones of all samples are laid side by side first
# (measured, CPU). Compiled and exported graphs always do that, since it takes every number of samples at once.
MAP_POSITIONS = 32


def gather_sum(table: Tensor, codes: Tensor) -> Tensor:
    """Picks a map for every vector and sub-vector, and sums over sub-vectors and stages.

    Args:
        table: ``[B, R, M, K, L]``, floating. Its ``R``, ``M`` and ``K`` may be laid out in the order ``M, R, K``.
        codes: ``[R, M, N]``, integer, 0 to ``K - 1``.

    Returns:
        ``[B, N, L]`` of the table's dtype. float16 and bfloat16 are summed in float32.
    """
    batch, stages, sub_vectors, entries, positions = table.shape
    terms = torch.arange(sub_vectors * stages, device=codes.device, dtype=torch.int32) * entries
    index = (rearrange(codes.int(), "r m n -> n (m r)") + terms).contiguous()
    if torch.compiler.is_compiling() or positions < MAP_POSITIONS:  # in this order: no guard on a length
        flat = (
            rearrange(table, "b r m k l -> m r k b l").contiguous().view(-1)
        )  # flat first: as in rpqfx.codebook.steps.table
        flat = flat.view(sub_vectors * stages * entries, batch * positions).to(steps.sum_dtype(table.dtype))
        y = F.embedding_bag(index, flat, mode="sum").to(table.dtype)
        return y.view(codes.shape[2], batch, positions).transpose(0, 1).contiguous()
    rows = rearrange(table, "b r m k l -> b (m r k) l")
    y = table.new_empty(batch, codes.shape[2], positions)
    for one, maps in zip(y, rows, strict=True):
        one.copy_(F.embedding_bag(index, maps.to(steps.sum_dtype(table.dtype)), mode="sum"))
    return y


def bin_sum(y: Tensor, codes: Tensor, entries: int, runs: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Sums the maps of the vectors that use an entry: the adjoint of ``gather_sum``.

    Args:
        y: ``[B, N, L]``, floating.
        codes: ``[R, M, N]``, integer, 0 to ``entries - 1``.
        entries: ``K``.
        runs: The result of ``rpqfx.codebook.steps.runs(codes, entries)``, for callers that need it more than once.

    Returns:
        ``[B, R, M, K, L]``, zeros where an entry has no use; float32 where ``y`` is float16 or bfloat16, else of
        ``y``'s dtype.
    """
    (batch, _, positions), (stages, sub_vectors, _) = y.shape, codes.shape
    order, first = steps.runs(codes, entries) if runs is None else runs
    dtype = steps.sum_dtype(y.dtype)
    if torch.compiler.is_compiling() or positions < MAP_POSITIONS:  # in this order: no guard on a length
        bins = F.embedding_bag(order, rearrange(y, "b n l -> n (b l)").to(dtype), first, mode="sum")
        return bins.view(stages, sub_vectors, entries, batch, positions).movedim(3, 0).contiguous()
    bins = y.new_empty(batch, stages * sub_vectors * entries, positions, dtype=dtype)
    for one, maps in zip(bins, y, strict=True):
        one.copy_(F.embedding_bag(order, maps.to(dtype).contiguous(), first, mode="sum"))
    return bins.view(batch, stages, sub_vectors, entries, positions)
