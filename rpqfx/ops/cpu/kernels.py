"""The compiled kernels with the names and the meaning of the plain functions (see ``rpqfx.ops.backend``)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from rpqfx import codebook

# What bins a pass over some rows of the batch fills: few enough that the next pass finds their memory mapped already,
# and enough rows for the matrix products that follow (measured).
BIN_ELEMENTS = 2**22
ROWS_AT_ONCE = 32
FEW = 4  # up to so many rows (tokens being decoded, say) go through bins one sub-vector at a time

_FLOATS = (torch.float32, torch.bfloat16)
_CODES = (torch.uint8, torch.int16, torch.uint16, torch.int32)


def take(dtype: torch.dtype, code_dtype: torch.dtype) -> bool:
    """Whether there are kernels for these dtypes."""
    return dtype in _FLOATS and code_dtype in _CODES


def contract(
    x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """See ``rpqfx.codebook.contract``."""
    return torch.ops.rpqfx_cpu.contract(x, codebooks, codes.contiguous(), _flat(signs), _flat(bias))


def contract_t(y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.contract_t``."""
    rows = y.reshape(-1, y.shape[-1])
    if rows.shape[0] > FEW:
        return codebook.contract_t(y, codebooks, codes, signs=signs, bins=bins)
    x = torch.ops.rpqfx_cpu.contract_t(rows.contiguous(), codebooks.contiguous(), codes.contiguous(), _flat(signs))
    return x.view(*y.shape[:-1], x.shape[-1])


def accumulate(x: Tensor, y: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.accumulate``."""
    return codebook.accumulate(x, y, codes, books, entries, signs, bins=bins)


def contract_grads(
    x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``rpqfx.codebook.contract_grads``."""
    return codebook.contract_grads(x, y, codebooks, codes, signs, bins=bins)


def bins(y: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Iterator[tuple[slice, Tensor]]:
    """See ``rpqfx.steps.bins``."""
    stages, sub_vectors, _ = codes.shape
    codes, signs, y = codes.contiguous(), _flat(signs), y.contiguous()
    rows = max(1, BIN_ELEMENTS // (stages * sub_vectors * entries * ROWS_AT_ONCE)) * ROWS_AT_ONCE
    for first in range(0, y.shape[0], rows):
        part = slice(first, first + rows)
        filled = torch.ops.rpqfx_cpu.bin_rows(y[part], codes, signs, entries)[..., : y[part].shape[0]]
        yield part, rearrange(filled, "r (g s) k b -> r g s k b", g=books)


def expand(codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.expand``."""
    return torch.ops.rpqfx_cpu.expand(codebooks.contiguous(), codes.contiguous(), _flat(scale), _flat(signs), None)


def lookup(
    ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None
) -> Tensor:
    """See ``rpqfx.codebook.lookup``."""
    which = ids.contiguous()
    rows = torch.ops.rpqfx_cpu.expand(codebooks.contiguous(), codes.contiguous(), _flat(scale), _flat(signs), which)
    return rows.view(*ids.shape, rows.shape[-1])


def collect(grad: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.collect``."""
    return torch.ops.rpqfx_cpu.collect(grad.contiguous(), codes.contiguous(), _flat(signs), books, entries)


def gather_sum(table: Tensor, codes: Tensor) -> Tensor:
    """See ``rpqfx.maps.gather_sum``."""
    return torch.ops.rpqfx_cpu.gather_sum(table.contiguous(), codes.contiguous(), None)


def bin_sum(y: Tensor, codes: Tensor, entries: int, runs: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """See ``rpqfx.maps.bin_sum``; the codes need no sorting here."""
    return torch.ops.rpqfx_cpu.bin_sum(y.contiguous(), codes.contiguous(), None, entries)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
