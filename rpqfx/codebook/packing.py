"""Packs a weight's tensors for a saved file: codes without idle bits, floats as narrow as they lose nothing.

Packed codes are one stream of bits, lowest bit first: with ``b = ceil(log2(K))`` bits a code, code ``i`` takes the bits
``i*b`` to ``(i+1)*b - 1``, and bit ``j`` of the stream is bit ``j % 8`` of byte ``j // 8``. The last byte is filled up
with zeros. Eight codes fill ``b`` whole bytes, so a block of them is a table with a column for each of the eight, and
is packed with as many operations as bytes and codes overlap, whatever its length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx.codebook.spec import MAX_ENTRIES
from rpqfx.errors import CodeError, FormatError, InputError, SpecError

_BLOCK = 1 << 17  # elements at a time, a multiple of 8: what is made meanwhile stays in cache
_NARROWER = {
    torch.float32: (torch.float16, torch.bfloat16),
    torch.float64: (torch.float16, torch.bfloat16, torch.float32),
}
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def code_bits(entries: int) -> int:
    """Returns the width of a code.

    Args:
        entries: ``K``, 2 to 65,536.

    Returns:
        ``ceil(log2(K))``, 1 to 16.

    Raises:
        SpecError: If no codebook has so many entries.
    """
    if not 2 <= entries <= MAX_ENTRIES:
        raise SpecError(f"a codebook has 2 to {MAX_ENTRIES} entries (1 to 16 bits), got {entries}")
    return (entries - 1).bit_length()


def packed_bytes(count: int, entries: int) -> int:
    """Returns the bytes that codes take when they are packed.

    Args:
        count: How many codes.
        entries: ``K``, 2 to 65,536.

    Returns:
        ``ceil(count * ceil(log2(K)) / 8)``.

    Raises:
        SpecError: If no codebook has so many entries.
    """
    return -(-count * code_bits(entries) // 8)


def pack_codes(codes: Tensor, entries: int) -> Tensor:
    """Returns codes in the width that they need.

    Args:
        codes: Integers 0 to ``entries - 1``, of any shape.
        entries: ``K``, 2 to 65,536.

    Returns:
        ``[packed_bytes(codes.numel(), entries)]`` uint8, on the codes' device; may share their memory.

    Raises:
        SpecError: If no codebook has so many entries.
        InputError: If the codes are no integers.
        CodeError: If a code is out of range.
    """
    width, flat = code_bits(entries), codes.reshape(-1)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype is torch.bool:
        raise InputError(f"codes are integers, got {codes.dtype}")
    if width == 8 and codes.dtype is torch.uint8:
        check_codes(flat, entries)
        return flat
    packed = torch.empty(packed_bytes(flat.numel(), entries), dtype=torch.uint8, device=codes.device)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK].to(torch.int64 if codes.element_size() > 2 else torch.int32)
        check_codes(block, entries)
        columns = _columns(block.int(), 8)
        bits = columns.new_zeros(width, columns.shape[1])
        for code, byte, shift in _overlaps(width):
            bits[byte] |= _shifted(columns[code], shift)
        at = start // 8 * width
        some = packed[at : at + bits.numel()]
        some.copy_((bits & 255).to(torch.uint8).T.reshape(-1)[: some.numel()])
    return packed


def unpack_codes(packed: Tensor, entries: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns the inverse of ``pack_codes``.

    Args:
        packed: ``[packed_bytes(prod(shape), entries)]`` uint8.
        entries: ``K``, 2 to 65,536.
        shape: Shape of the codes.
        dtype: Dtype of the codes, an integer one that holds ``entries - 1``.

    Returns:
        Codes of that shape and dtype, every one below ``entries``; may share the memory of ``packed``.

    Raises:
        SpecError: If no codebook has so many entries.
        InputError: If the dtype does not hold the codes.
        FormatError: If there are more or fewer bytes than codes of that shape take.
        CodeError: If a code is out of range.
    """
    width, count = code_bits(entries), math.prod(shape)
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool or torch.iinfo(dtype).max < entries - 1:
        raise InputError(f"{dtype} does not hold codes of {entries} entries")
    check_packed(packed, entries, shape)
    may_be_wrong = entries < 1 << width  # else there is an entry for whatever the bits say
    if width == 8 and dtype is torch.uint8:
        if may_be_wrong:
            check_codes(packed, entries)
        return packed.reshape(tuple(shape))
    codes = torch.empty(count, dtype=dtype, device=packed.device)
    if 8 % width == 0:
        for start in range(0, count, _BLOCK):
            some = packed[start * width // 8 : (start + _BLOCK) * width // 8]
            each = [some >> shift & (2**width - 1) for shift in range(0, 8, width)]
            block = torch.stack(each, -1).flatten()[: count - start]
            if may_be_wrong:
                check_codes(block, entries)
            codes[start : start + _BLOCK] = block
        return codes.reshape(tuple(shape))
    for start in range(0, count, _BLOCK):
        some = codes[start : start + _BLOCK]
        columns = _columns(packed[start // 8 * width : (start + _BLOCK) // 8 * width].int(), width)
        block = columns.new_zeros(8, columns.shape[1])
        for code, byte, shift in _overlaps(width):
            block[code] |= _shifted(columns[byte], -shift)
        values = (block & (2**width - 1)).T.reshape(-1)[: some.numel()]
        if may_be_wrong:
            check_codes(values, entries)
        some.copy_(values)
    return codes.reshape(tuple(shape))


def check_packed(packed: Tensor, entries: int, shape: Sequence[int]) -> None:
    """Raises where a tensor cannot be packed codes of a shape.

    Args:
        packed: Any tensor.
        entries: ``K``, 2 to 65,536.
        shape: Shape of the codes.

    Raises:
        SpecError: If no codebook has so many entries.
        FormatError: If there are more or fewer bytes than codes of that shape take.
    """
    count = math.prod(shape)
    size = packed_bytes(count, entries)
    if packed.dtype is not torch.uint8 or packed.shape != (size,):
        raise FormatError(
            f"{count} codes of {code_bits(entries)} bits take {size} bytes, got {tuple(packed.shape)} of {packed.dtype}"
        )


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the narrowest floating dtype that holds every value of a tensor exactly.

    Args:
        tensor: A tensor of any dtype and shape.

    Returns:
        float16 or bfloat16 (of float64 also float32) where widening it again gives the same bits, else the tensor's
        own dtype; also of tensors that hold NaN, whose bits differ between devices, or are on the meta device.
    """
    if tensor.is_meta or tensor.dtype not in _NARROWER:
        return tensor.dtype
    blocks = tensor.detach().reshape(-1).split(_BLOCK)
    for narrow in _NARROWER[tensor.dtype]:
        if all(_holds(block, narrow) for block in blocks):
            return narrow
    return tensor.dtype


def pack_floats(tensor: Tensor) -> Tensor:
    """Returns a tensor in its ``stored_dtype``; ``.to(tensor.dtype)`` gives it back, the same to the last bit.

    Args:
        tensor: A tensor of any dtype and shape.

    Returns:
        The same values; the tensor itself where nothing narrower holds them.
    """
    return tensor.to(stored_dtype(tensor))


def stored_bits(tensor: Tensor) -> int:
    """Returns the bits that a tensor of a quantized weight takes in a saved file.

    Args:
        tensor: Codebooks, signs or a scale.

    Returns:
        Eight times the bytes of ``pack_floats``. Tensors on the meta device have no values, and count in their own
        dtype.
    """
    return 8 * tensor.numel() * stored_dtype(tensor).itemsize


def _columns(block: Tensor, size: int) -> Tensor:
    """``[size, groups]``: each group of ``size`` elements that follow each other is a column, the last filled up."""
    return F.pad(block, (0, -block.numel() % size)).view(-1, size).T.contiguous()


def _overlaps(width: int) -> list[tuple[int, int, int]]:
    """Returns which of eight codes lies in which of their bytes, and by how many bits it is shifted left there."""
    return [
        (code, byte, code * width - 8 * byte)
        for code in range(8)
        for byte in range(code * width // 8, (code * width + width - 1) // 8 + 1)
    ]


def _shifted(x: Tensor, bits: int) -> Tensor:
    return x << bits if bits >= 0 else x >> -bits


def check_codes(codes: Tensor, entries: int) -> None:
    """Raises where codes point outside their codebook.

    Args:
        codes: Integers of any shape.
        entries: ``K``.

    Raises:
        CodeError: If a code is out of range.
    """
    if not codes.numel():
        return
    known = codes.int() if codes.dtype is torch.uint16 else codes  # which torch has no minimum of
    low, high = (int(extreme) for extreme in torch.aminmax(known))
    if low < 0 or high >= entries:
        raise CodeError(f"codes of {low} to {high}, but the codebook has {entries} entries (0 to {entries - 1})")


def _holds(block: Tensor, narrow: torch.dtype) -> bool:
    """Compares both by value, which NaN never equals, and by bits, since processors may take small numbers for 0."""
    back, bits = block.to(narrow).to(block.dtype), _BITS[block.dtype]
    return torch.equal(back, block) and torch.equal(back.view(bits), block.view(bits))
