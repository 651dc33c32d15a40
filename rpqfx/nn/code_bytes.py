"""Codes in their buffer: those of two bytes each lie as bytes, which every back end of torch.distributed can send.

Neither NCCL nor gloo takes 16-bit integers, and a process group that has to send one buffer of them sends nothing. So a
buffer of wide codes ``[R, M, N]`` is uint8 ``[R, M, 2 * N]``, and reading it is a view of the same memory. It has three
axes, not four, because ``Module.to(memory_format=...)`` lays out tensors of four in its own way.

Codes of a spec that is tiled lie there as tiles (``rpqfx.codebook.tiles``); reading them as ``[R, M, N]`` makes a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.codebook.tiles import from_tiles, to_tiles
from rpqfx.errors import CodeError, InputError


def to_bytes(codes: Tensor, tiled: bool = False) -> Tensor:
    """Returns codes ``[R, M, N]`` as they lie in a buffer: the same memory, where their last axis is dense.

    Args:
        codes: uint8, int16 or uint16.
        tiled: Whether they lie in tiles.

    Returns:
        uint8, ``[R, M, N]`` for codes of one byte and ``[R, M, 2 * N]`` for codes of two; or tiles.
    """
    if tiled:
        return to_tiles(codes)
    if codes.dtype == torch.uint8:
        return codes
    if codes.stride(-1) != 1:
        codes = codes.clone(memory_format=torch.contiguous_format)
    return codes.view(torch.uint8)


def from_bytes(stored: Tensor, dtype: torch.dtype, vectors: int = 0) -> Tensor:
    """Returns the codes ``[R, M, N]`` that lie in a buffer.

    Exported and traced programs put the bytes together by arithmetic, as neither ONNX nor TorchScript knows a view of
    memory as another type, nor vmap of torch before 2.13; the codes are then int32.

    Args:
        stored: Bytes that ``to_bytes`` returned. Codes of the dtype itself are taken as they are, because code that
            moves tensors between devices (accelerate) writes what it read past every setter.
        dtype: Dtype of the codes: uint8, int16 or uint16.
        vectors: ``N``, where they lie in tiles.
    """
    if vectors:
        return from_tiles(stored, vectors)
    if stored.dtype == dtype:
        return stored
    mapped = not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(stored)
    if mapped or torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        low, high = stored.unflatten(-1, (-1, 2)).int().unbind(-1)
        return low + 256 * high
    return stored.view(dtype)


def checked(codes: Tensor, entries: int, dtype: torch.dtype, name: str) -> Tensor:
    """Returns codes in their dtype, which no later reader then has to check.

    Args:
        codes: Integers of any dtype. Those of another dtype are held against the codebook before they are converted.
        entries: ``K``.
        dtype: Dtype of codes of so many entries.
        name: Name of the tensor, for messages.

    Raises:
        InputError: If they are no integers.
        CodeError: If one of another dtype points outside the codebook.
    """
    if codes.dtype == dtype:
        return codes
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise InputError(f"{name} are integers, got {codes.dtype}; codes of {entries} entries are {dtype}")
    check_range(codes, entries, name)
    return codes.to(dtype)


def check_range(codes: Tensor, entries: int, name: str) -> None:
    """Raises where a code points outside its codebook; on the meta device there is nothing to check.

    Args:
        codes: Integers of any dtype.
        entries: ``K``.
        name: Name of the tensor, for messages.

    Raises:
        CodeError: If one does.
    """
    if codes.is_meta or not codes.numel():
        return
    low, high = int(codes.long().min()), int(codes.long().max())
    if low < 0 or high >= entries:
        raise CodeError(
            f"{name} holds {low} to {high}, but the codebook has {entries} entries "
            f"(0 to {entries - 1}); the file is of another model or damaged"
        )
