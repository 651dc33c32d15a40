"""The compiled kernels with the names and the meaning of the plain functions (see ``rpqfx.ops.backend``)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rpqfx.ops.devices import check_devices
from rpqfx.ops.filters import conv_shape

_FLOATS = (torch.float32, torch.bfloat16)
_CODES = (torch.uint8, torch.int16, torch.uint16, torch.int32)

# Rows up to which tables are used: as many as the kernel finds them faster for, or what a plan says.
_MOST_ROWS = {"auto": -1, "lookup": 2**62, "dequantize": 0}


def take(dtype: torch.dtype, code_dtype: torch.dtype) -> bool:
    """Returns whether there are kernels for these dtypes."""
    return dtype in _FLOATS and code_dtype in _CODES


def contract(
    x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """See ``rpqfx.codebook.contract``."""
    return torch.ops.rpqfx_cpu.contract(x, codebooks, codes, signs, bias)


def matmul(
    x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Returns what ``contract`` does, through the dequantized matrix."""
    return torch.ops.rpqfx_cpu.matmul(x, codebooks, codes, signs, bias)


def conv(
    x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, column_scale: Tensor | None,
    scale: Tensor | None, bias: Tensor | None, *geometry: Any,
) -> Tensor:  # fmt: skip
    """Runs a convolution with dequantized filters, ``column_scale [D / share]``, ``scale [N]`` and bias; contiguous.

    ``geometry`` is ``weight_shape``, ``stride``, ``padding``, ``dilation``, ``transposed``, ``output_padding`` and
    ``groups``, as ``rpqfx.ops.library.conv`` takes them.
    """
    return torch.ops.rpqfx_cpu.conv(x, codebooks, codes, signs, column_scale, scale, bias, *geometry)


def contract_t(y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.contract_t``."""
    return torch.ops.rpqfx_cpu.contract_t(y, codebooks, codes, signs)


def accumulate(x: Tensor, y: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.accumulate``."""
    return _grads(x, y, None, codes, signs, books, entries, x.shape[-1] // codes.shape[1])[1]


def contract_grads(
    x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``rpqfx.codebook.contract_grads``."""
    grad_x, grad_books = _grads(x, y, codebooks, codes, signs, *codebooks.shape[1:])
    return grad_x.view(x.shape), grad_books


def _grads(
    x: Tensor | None, y: Tensor, codebooks: Tensor | None, codes: Tensor, signs: Tensor | None, *shape: int
) -> tuple[Tensor, Tensor]:
    rows = None if x is None else x.reshape(-1, x.shape[-1]).contiguous()
    flat = y.reshape(-1, y.shape[-1]).contiguous()
    return torch.ops.rpqfx_cpu.grads(rows, flat, codebooks, codes, signs, *shape)


def expand(
    codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None,
    dims: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``rpqfx.codebook.expand``; times ``dims [D / share]``, a factor for each ``share`` columns in a row."""
    return torch.ops.rpqfx_cpu.expand(codebooks, codes, scale, signs, None, dims)


def lookup(
    ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None,
    dims: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``rpqfx.codebook.lookup``; times ``dims [D / share]``, as ``expand``."""
    return torch.ops.rpqfx_cpu.expand(codebooks, codes, scale, signs, ids, dims)


def collect(grad: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.collect``."""
    return torch.ops.rpqfx_cpu.collect(grad.contiguous(), codes, signs, books, entries)


def gather_sum(table: Tensor, codes: Tensor) -> Tensor:
    """See ``rpqfx.codebook.feature_maps.gather_sum``."""
    return torch.ops.rpqfx_cpu.gather_sum(table.contiguous(), codes, None)


def bin_sum(y: Tensor, codes: Tensor, entries: int, runs: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """See ``rpqfx.codebook.feature_maps.bin_sum``; the codes need no sorting here."""
    return torch.ops.rpqfx_cpu.bin_sum(y.contiguous(), codes, None, entries)


def tiled(
    x: Tensor, codebooks: Tensor, tiles: Tensor, vectors: int, bias: Tensor | None = None, plan: str = "auto",
    dims: Tensor | None = None, scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns ``x @ W.T + bias``, ``[..., N]``, for codes in tiles, times ``dims [D]`` and ``scale [N]``.

    ``rpqfx.codebook.tiles`` describes the tiles. Up to a number of rows it goes through tables of 16-bit integers, each
    rounded by half a unit of their scale, the largest of 128 tables over 32,767 (see ``rpqfx/ops/cpu/byte_tables.h``).
    """
    return torch.ops.rpqfx_cpu.tiled(x, codebooks, tiles, vectors, dims, scale, bias, _MOST_ROWS[plan])


@functools.cache  # torch up to 2.11 refuses to be told twice
def register() -> None:
    """Tells compilers what the operators return that graphs call themselves, when the library has been loaded.

    Torch runs these as soon as anything is on the meta device, and their results would be memory without values.
    """

    def product(x: Tensor, codebooks: Tensor, codes: Tensor, *rest: Tensor | None) -> Tensor:
        check_devices(x, codebooks, codes, *rest)
        return x.new_empty(*x.shape[:-1], codes.shape[2])

    torch.library.register_fake("rpqfx_cpu::contract", product)
    torch.library.register_fake("rpqfx_cpu::matmul", product)

    @torch.library.register_fake("rpqfx_cpu::conv")
    def _(
        x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, dims: Tensor | None, scale: Tensor | None,
        bias: Tensor | None, *geometry: Any,
    ) -> Tensor:  # fmt: skip
        check_devices(x, codebooks, codes, signs, dims, scale, bias)
        return x.new_empty(conv_shape(x, *geometry))

    @torch.library.register_fake("rpqfx_cpu::tiled")
    def _(
        x: Tensor, codebooks: Tensor, tiles: Tensor, vectors: int, dims: Tensor | None, scale: Tensor | None,
        bias: Tensor | None, most: int,
    ) -> Tensor:  # fmt: skip
        check_devices(x, codebooks, tiles, dims, scale, bias)
        return x.new_empty(*x.shape[:-1], vectors)

    @torch.library.register_fake("rpqfx_cpu::tiled_many")
    def _(
        xs: list[Tensor], codebooks: list[Tensor], tiles: list[Tensor], vectors: list[int], biases: list[Tensor | None],
        most: int,
    ) -> list[Tensor]:  # fmt: skip
        check_devices(*xs, *codebooks, *tiles, *biases)
        return [x.new_empty(*x.shape[:-1], count) for x, count in zip(xs, vectors, strict=True)]

    @torch.library.register_fake("rpqfx_cpu::expand")
    def _(
        codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None, ids: Tensor | None,
        dims: Tensor | None,
    ) -> Tensor:  # fmt: skip
        check_devices(codebooks, codes, scale, signs, ids, dims)
        rows = codes.shape[2:] if ids is None else ids.shape
        return codebooks.new_empty(*rows, codes.shape[1] * codebooks.shape[3])


def nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """See ``rpqfx.ops.search.nearest``; float32 only."""
    return torch.ops.rpqfx_cpu.nearest(points, centres)


def beam_search(points: Tensor, books: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """See ``rpqfx.ops.search.beam_search``; float32 only."""
    return torch.ops.rpqfx_cpu.beam_search(points, books, beam)


def column_search(
    matrix: Tensor, books: Tensor, groups: Sequence[int], to_metric: Tensor, upper: Tensor, beam: int
) -> tuple[Tensor, Tensor]:
    """See ``rpqfx.ops.column_search.column_search``; float32 only."""
    return torch.ops.rpqfx_cpu.column_search(matrix, books, list(groups), to_metric, upper, beam)


def slot_tables(parts: Tensor, books: Tensor, which: list[int]) -> Tensor:
    """See ``rpqfx.kv.attention.slots.tables``; 4, 8 or 16 wide."""
    return torch.ops.rpqfx_cpu.slot_tables(parts, books, which)


def slot_sums(bins: Tensor, rows: int, books: Tensor, which: list[int]) -> Tensor:
    """See ``rpqfx.kv.attention.slots.sums``; the bins are 4, 8 or 16 wide, of which ``rows`` are meant."""
    return torch.ops.rpqfx_cpu.slot_sums(bins, rows, books, which)


def pick_sum(
    table: Tensor, codes: Tensor, width: int, scale: Tensor | None, shift: Tensor | None, heads: list[int], y: Tensor
) -> None:
    """See ``rpqfx.kv.attention.slots.pick``; the table is 4, 8 or 16 wide, and the result is ``y [B, H, n, T]``."""
    shift = None if shift is None else shift.contiguous()
    torch.ops.rpqfx_cpu.pick_sum(table.contiguous(), codes, width, scale, shift, heads, y)


def bin_masses(
    p: Tensor, codes: Tensor, width: int, scale: Tensor | None, heads: list[int], entries: int
) -> Tensor:  # fmt: skip
    """See ``rpqfx.kv.attention.slots.bin_masses``; as wide as a table."""
    return torch.ops.rpqfx_cpu.bin_masses(p, codes, width, scale, heads, entries)


def rotated_scores(
    q: Tensor, books: Tensor, which: list[int], groups: list[int], heads: list[int], codes: Tensor, width: int,
    tokens: int, scale: Tensor | None, basis: Tensor | None, mean: Tensor | None, cos: Tensor, sin: Tensor,
) -> Tensor:  # fmt: skip
    """See ``rpqfx.kv.attention.slots.rotated_scores``."""
    rest = (codes, width, tokens, scale, basis, mean, cos, sin)
    return torch.ops.rpqfx_cpu.rotated_scores(q, books, which, groups, heads, *rest)
