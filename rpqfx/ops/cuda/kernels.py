"""The products of ``rpqfx.codebook`` on a CUDA device: rules of shapes and dtypes. Forward only.

Each function has the signature and the meaning of its namesake there, for float32, float16 and bfloat16. Sums are in
float32 (of float32 products too: no tf32) and without atomics, so that the same call gives the same bits. What
tests the kernels by default is Triton's interpreter.

Rows that are looked up, and sums of maps, run on torch's own operators. CUDA builds of torch bring Triton along;
importing this module does not import it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx import codebook
from rpqfx.codebook.tiles import MOST_ENTRIES, tiles_shape
from rpqfx.errors import InputError
from rpqfx.ops import check
from rpqfx.ops.cuda.arguments import DTYPES, check_codes, check_dtype, check_shape, rows_of
from rpqfx.ops.reference import bin_sum, collect, gather_sum, lookup

__all__ = [
    "accumulate",
    "bin_sum",
    "bins",
    "collect",
    "contract",
    "contract_grads",
    "contract_t",
    "expand",
    "gather_sum",
    "lookup",
    "residual_search",
    "tiled",
    "usable",
]

_LOG = logging.getLogger("rpqfx")
# What Triton itself asks for.
CAPABILITY = (8, 0)
# Dimensions that a search takes at most: what is left of a point is in registers.
MOST_SEARCHED = 128
# Elements of a float32 table (or of bins) that are alive at a time, 32 MB: they stay in the L2 cache of large GPUs.
TABLE_ELEMENTS = 2**23
# Rows of a block of the batch at least: matrix units multiply 16 at a time.
BLOCK_ROWS = 16
# Rows up to which codes in tiles are multiplied through a table, measured on an H200.
TABLE_ROWS = {torch.float32: 32, torch.float16: 8, torch.bfloat16: 8}


def usable(x: Tensor) -> bool:
    """Returns whether the functions here can take a tensor.

    Args:
        x: Any tensor.

    Returns:
        True for float32, float16 and bfloat16 on a GPU that Triton serves, with Triton installed and its kernels found
        right there. Under ``TRITON_INTERPRET=1`` also for tensors on the CPU, which is for tests: it is slow.
    """
    if x.dtype not in DTYPES or not _installed():
        return False
    if x.is_cuda:
        return _capability(x.device) >= CAPABILITY and _right(x.device)
    return x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def expand(codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None) -> Tensor:
    """Returns the matrix itself.

    Args:
        codebooks: ``[R, G, K, d]``, float32, float16 or bfloat16.
        codes: ``[R, M, N]``, an integer.
        scale: ``[N]``, floating, or None.
        signs: ``[R, M, ceil(N/8)]`` uint8, packed by ``pack_signs``, or None.

    Returns:
        ``W [N, D]`` of the codebooks' dtype, summed and scaled in float32.

    Raises:
        InputError: If a shape or a dtype does not fit.
    """
    codes, signs = check_codes(codes, signs, codebooks.shape)
    check_dtype("codebooks", codebooks)
    if scale is not None:
        check_shape("scale", scale, (codes.shape[2],))
        scale = scale.contiguous()
    return _launch().expand(codebooks.contiguous(), codes, scale, signs)


def contract(
    x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Returns ``x @ W.T + bias`` without ``W``: dot each sub-vector of ``x`` with every entry, then gather and sum.

    Args:
        x: ``[..., D]``, float32, float16 or bfloat16.
        codebooks: ``[R, G, K, d]``, of ``x``'s dtype.
        codes: ``[R, M, N]``, an integer.
        signs: Packed signs or None.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]`` of ``x``'s dtype.

    Raises:
        InputError: If a shape or a dtype does not fit.
    """
    codes, signs = check_codes(codes, signs, codebooks.shape)
    if codebooks.dtype != x.dtype:
        raise InputError(f"x is {x.dtype} and the codebooks are {codebooks.dtype}; convert one of them")
    rows, codebooks = rows_of("x", x, codes.shape[1] * codebooks.shape[3]), codebooks.contiguous()
    launch = _launch()
    parts = [
        launch.gather_sum(launch.table(rows[part], codebooks, codes.shape[1]), codes, signs, x.dtype)
        for part in _slices(rows, codes.shape[0] * codes.shape[1] * codebooks.shape[2])
    ]
    y = _join(parts).reshape(*x.shape[:-1], codes.shape[2])
    return y if bias is None else y + bias


def contract_t(y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.contract_t``."""
    return codebook.contract_t(y, codebooks, codes, signs=signs, bins=bins)


def accumulate(x: Tensor, y: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.accumulate``."""
    return codebook.accumulate(x, y, codes, books, entries, signs, bins=bins)


def contract_grads(
    x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``rpqfx.codebook.contract_grads``."""
    return codebook.contract_grads(x, y, codebooks, codes, signs, bins=bins)


def bins(y: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Iterator[tuple[slice, Tensor]]:
    """See ``rpqfx.codebook.steps.bins``.

    Raises:
        InputError: If a shape or a dtype does not fit.
    """
    codes, signs = check_codes(codes, signs, (codes.shape[0], books))
    rows = rows_of("y", y, codes.shape[2])
    sums = _launch().Bins(codes, signs, books, entries)
    for part in _slices(rows, codes.shape[0] * codes.shape[1] * entries):
        yield part, sums(rows[part])


def tiled(
    x: Tensor, codebooks: Tensor, tiles: Tensor, vectors: int, bias: Tensor | None = None, plan: str = "auto",
    dims: Tensor | None = None, scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns ``(x * dims) @ W.T * scale + bias`` of codes in tiles (``rpqfx.codebook.tiles``).

    Args:
        x: ``[..., D]``, float32, float16 or bfloat16.
        codebooks: ``[R, G, K, d]``, of ``x``'s dtype; ``K`` up to 16.
        tiles: ``[T, M, R * 32]`` uint8.
        vectors: ``N``.
        bias: ``[N]`` or None.
        plan: ``"lookup"`` goes through a table of dot products, ``"dequantize"`` makes the matrix for the length of the
            call, and ``"auto"`` chooses by the number of rows.
        dims: ``[D]`` or None.
        scale: ``[N]`` or None.

    Returns:
        ``[..., N]`` of ``x``'s dtype.

    Raises:
        InputError: If a shape or a dtype does not fit.
    """
    if codebooks.dtype != x.dtype:
        raise InputError(f"x is {x.dtype} and the codebooks are {codebooks.dtype}; convert one of them")
    stages, books, entries, d = codebooks.shape
    if tiles.dtype is not torch.uint8 or entries > MOST_ENTRIES or tiles.shape[1] % books:
        raise InputError(
            f"tiles {tuple(tiles.shape)} of {tiles.dtype} do not go with codebooks {tuple(codebooks.shape)}"
        )
    check_shape("tiles", tiles, tiles_shape(stages, tiles.shape[1], vectors))
    width = tiles.shape[1] * d
    for name, factors, count in (("dims", dims, width), ("scale", scale, vectors), ("bias", bias, vectors)):
        if factors is not None:
            check_shape(name, factors, (count,))
    rows, codebooks, tiles = rows_of("x", x, width), codebooks.contiguous(), tiles.contiguous()
    dims, scale, bias = (t if t is None else t.contiguous() for t in (dims, scale, bias))
    from rpqfx.ops.cuda import triton_tiles

    if plan == "lookup" or (plan == "auto" and len(rows) <= TABLE_ROWS[x.dtype]):
        slices = _slices(rows, stages * tiles.shape[1] * MOST_ENTRIES)
        y = _join([triton_tiles.by_table(rows[s], codebooks, tiles, vectors, dims, scale, bias) for s in slices])
    else:
        y = F.linear(rows if dims is None else rows * dims, triton_tiles.expanded(codebooks, tiles, vectors))
        y = y if scale is None else y * scale
        y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], vectors)


def residual_search(points: Tensor, books: Tensor, cosine: bool = False) -> tuple[Tensor, Tensor]:
    """Returns codes of residual stages, each the best for what the stages before leave; distances are never in memory.

    Args:
        points: ``[N, d]``, float32, float16 or bfloat16, ``d`` up to 128.
        books: ``[R, K, d]``, of the same dtype.
        cosine: Whether entries are chosen by direction (``rpqfx.ops.search.cosine_search``).

    Returns:
        ``codes [N, R]`` int64 and squared ``distances [N]``. What the stages leave is float32 in between.

    Raises:
        InputError: If a shape or a dtype does not fit.
    """
    check_dtype("points", points)
    if books.dtype != points.dtype or books.device != points.device:
        raise InputError(
            f"points are {points.dtype} on {points.device} and the codebooks are {books.dtype} on {books.device}; "
            "convert one of them"
        )
    if points.dim() != 2 or books.dim() != 3 or points.shape[1] != books.shape[2] or not books.shape[1]:
        raise InputError(f"points {tuple(points.shape)} do not go with codebooks {tuple(books.shape)}")
    if not 1 <= points.shape[1] <= MOST_SEARCHED:
        raise InputError(f"the kernel searches 1 to {MOST_SEARCHED} dimensions, points have {points.shape[1]}")
    from rpqfx.ops.cuda import triton_search

    return triton_search.launch(points.contiguous(), books.contiguous(), cosine)


# ------------------------------------------------------------------------------------------ what they are made of


def _slices(rows: Tensor, elements: int) -> list[slice]:
    """Returns slices of a batch whose tables (or bins) of so many elements a row stay small; one for no rows."""
    size = TABLE_ELEMENTS // elements
    size = max(BLOCK_ROWS, size // BLOCK_ROWS * BLOCK_ROWS)
    return [slice(first, first + size) for first in range(0, max(1, rows.shape[0]), size)]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _right(device: torch.device) -> bool:
    """Returns whether the kernels do on a device what the plain functions do; asked once a process."""
    try:
        check.against_reference(sys.modules[__name__], device)
    except Exception as reason:  # Triton's compiler and driver have errors of their own kinds
        _LOG.info("CUDA kernels are not used, plain operators run instead: %s", reason)
        return False
    return True


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _launch() -> ModuleType:
    """Returns the module that launches the kernels; importing it imports Triton."""
    from rpqfx.ops.cuda import triton_launch

    return triton_launch
