"""The products of ``rpqfx.codebook`` on a CUDA device: rules of shapes and dtypes. Forward only.

Each function has the signature and the meaning of its namesake there, for float32, float16 and bfloat16. Sums are in
float32 (of float32 products too: no tf32) and without atomics, so that the same call gives the same bits. Not measured
on a GPU: block sizes are estimates, and what tests the kernels by default is Triton's interpreter.

CUDA builds of torch bring Triton along; importing this module does not import it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from rpqfx.codebook import _bins_to_codebooks, _bins_to_rows
from rpqfx.errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What Triton itself asks for.
CAPABILITY = (8, 0)
# Elements of a float32 table (or of bins) that are alive at a time, 32 MB: they stay in the L2 cache of large GPUs.
TABLE_ELEMENTS = 2**23
# Rows of a block of the batch at least: matrix units multiply 16 at a time.
BLOCK_ROWS = 16


def usable(x: Tensor) -> bool:
    """Whether the functions here can take a tensor.

    Args:
        x: Any tensor.

    Returns:
        True for float32, float16 and bfloat16 on a GPU that Triton serves, with Triton installed. Under
        ``TRITON_INTERPRET=1`` also for tensors on the CPU, which is for tests: it is slow.
    """
    if x.dtype not in DTYPES or not _installed():
        return False
    if x.is_cuda:
        return _capability(x.device) >= CAPABILITY
    return x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def expand(codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None) -> Tensor:
    """The matrix itself.

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
    codes, signs = _check_codes(codes, signs, codebooks.shape)
    _check_dtype("codebooks", codebooks)
    if scale is not None:
        _check_shape("scale", scale, (codes.shape[2],))
        scale = scale.contiguous()
    return _launch().expand(codebooks.contiguous(), codes, scale, signs)


def contract(x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None) -> Tensor:
    """``x @ W.T`` without ``W``: dot each sub-vector of ``x`` with every entry, then gather and sum.

    Args:
        x: ``[..., D]``, float32, float16 or bfloat16.
        codebooks: ``[R, G, K, d]``, of ``x``'s dtype.
        codes: ``[R, M, N]``, an integer.
        signs: Packed signs or None.

    Returns:
        ``[..., N]`` of ``x``'s dtype.

    Raises:
        InputError: If a shape or a dtype does not fit.
    """
    codes, signs = _check_codes(codes, signs, codebooks.shape)
    if codebooks.dtype != x.dtype:
        raise InputError(f"x is {x.dtype} and the codebooks are {codebooks.dtype}; convert one of them")
    rows, codebooks = _rows("x", x, codes.shape[1] * codebooks.shape[3]), codebooks.contiguous()
    launch = _launch()
    parts = [
        launch.gather_sum(launch.table(rows[part], codebooks, codes.shape[1]), codes, signs, x.dtype)
        for part in _slices(rows, codes, codebooks.shape[2])
    ]
    return _join(parts).reshape(*x.shape[:-1], codes.shape[2])


def contract_t(y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None) -> Tensor:
    """``y @ W`` without ``W``: sum ``y`` into one bin per entry, then one small product.

    Args:
        y: ``[..., N]``, float32, float16 or bfloat16.
        codebooks: ``[R, G, K, d]``, floating.
        codes: ``[R, M, N]``, an integer.
        signs: Packed signs or None.

    Returns:
        ``[..., D]`` of ``y``'s dtype.

    Raises:
        InputError: If a shape or a dtype does not fit.
    """
    codes, signs = _check_codes(codes, signs, codebooks.shape)
    rows, wide = _rows("y", y, codes.shape[2]), codebooks.float()
    bins = _launch().Bins(codes, signs, *codebooks.shape[1:3])
    slices = _slices(rows, codes, codebooks.shape[2])
    parts = [_bins_to_rows(bins(rows[part]), wide).to(y.dtype) for part in slices]
    return _join(parts).reshape(*y.shape[:-1], codes.shape[1] * codebooks.shape[3])


def accumulate(x: Tensor, y: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """The gradient of the codebooks in ``contract(x)`` when ``y`` is the gradient of its result.

    Args:
        x: ``[..., D]``, float32, float16 or bfloat16.
        y: ``[..., N]``, likewise.
        codes: ``[R, M, N]``, an integer.
        books: ``G``.
        entries: ``K``.
        signs: Packed signs or None.

    Returns:
        ``[R, G, K, d]`` of ``x``'s dtype.

    Raises:
        InputError: If a shape or a dtype does not fit.
    """
    shape = (codes.shape[0], books, entries, x.shape[-1] // codes.shape[1])
    codes, signs = _check_codes(codes, signs, shape)
    rows, rows_y = _rows("x", x, codes.shape[1] * shape[3]), _rows("y", y, codes.shape[2])
    bins = _launch().Bins(codes, signs, *shape[1:3])
    total = x.new_zeros(shape, dtype=torch.float32)
    for part in _slices(rows, codes, entries):
        total += _bins_to_codebooks(bins(rows_y[part]), rows[part])
    return total.to(x.dtype)


def contract_grads(
    x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both gradients of ``contract(x)`` from one pass over the bins of ``y``, the gradient of its result.

    Args:
        x: ``[..., D]``, float32, float16 or bfloat16.
        y: ``[..., N]``, likewise.
        codebooks: ``[R, G, K, d]``, floating.
        codes: ``[R, M, N]``, an integer.
        signs: Packed signs or None.

    Returns:
        The gradient of ``x`` (``contract_t(y)``) and that of the codebooks (``accumulate(x, y)``), of ``x``'s dtype.

    Raises:
        InputError: If a shape or a dtype does not fit.
    """
    shape = codebooks.shape
    codes, signs = _check_codes(codes, signs, shape)
    rows, rows_y = _rows("x", x, codes.shape[1] * shape[3]), _rows("y", y, codes.shape[2])
    bins = _launch().Bins(codes, signs, *shape[1:3])
    total, wide, parts = x.new_zeros(shape, dtype=torch.float32), codebooks.float(), []
    for part in _slices(rows, codes, shape[2]):
        filled = bins(rows_y[part])
        parts.append(_bins_to_rows(filled, wide).to(x.dtype))
        total += _bins_to_codebooks(filled, rows[part])
    return _join(parts).reshape(x.shape), total.to(x.dtype)


# ------------------------------------------------------------------------------------------ what they are made of


def _slices(rows: Tensor, codes: Tensor, entries: int) -> list[slice]:
    """Slices of a batch whose tables (or bins) stay small; one, if empty, where there are no rows."""
    size = TABLE_ELEMENTS // (codes.shape[0] * codes.shape[1] * entries)
    size = max(BLOCK_ROWS, size // BLOCK_ROWS * BLOCK_ROWS)
    return [slice(first, first + size) for first in range(0, max(1, rows.shape[0]), size)]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# ------------------------------------------------------------------------------- what a kernel could not tell


def _rows(name: str, x: Tensor, width: int) -> Tensor:
    """``x [..., width]`` as contiguous rows."""
    _check_dtype(name, x)
    if x.shape[-1] != width:
        raise InputError(f"{name} is {x.shape[-1]} wide, the codes and codebooks say {width}")
    return x.reshape(-1, width).contiguous()


def _check_codes(codes: Tensor, signs: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Codes and signs, contiguous, once they fit codebooks of a shape: kernels read where they are told to."""
    if codes.dtype not in (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64):
        raise InputError(f"codes are integers, got {codes.dtype}")
    stages, sub_vectors, num_vectors = codes.shape
    if stages != shape[0] or sub_vectors % shape[1]:
        raise InputError(f"codes {tuple(codes.shape)} do not go with codebooks {tuple(shape)}")
    if signs is None:
        return codes.contiguous(), None
    _check_shape("signs", signs, (stages, sub_vectors, -(-num_vectors // 8)))
    if signs.dtype is not torch.uint8:
        raise InputError(f"signs are uint8 (see pack_signs), got {signs.dtype}")
    return codes.contiguous(), signs.contiguous()


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise InputError(f"{name} has the shape {tuple(x.shape)}, expected {shape}")


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise InputError(f"{name} is {x.dtype}; the kernels take float32, float16 and bfloat16")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _launch() -> ModuleType:
    """What launches the kernels; importing it imports Triton."""
    from rpqfx.ops import triton_launch

    return triton_launch
