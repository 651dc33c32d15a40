"""Codes as a file holds them: packed, or where they were drawn and never changed, the seed that draws them again.

A tensor of codes of which some stages were drawn begins with a head: the version of the generator (one byte), the seed
(eight, lowest first), a sum over the drawn codes (four), and a bit for each stage, set where it was drawn. The packed
codes of all other stages follow. The sum finds out a platform that draws other codes. This form is only used where it
is shorter than all codes packed, so its length tells it from those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rpqfx.codebook.counter_random import SEEDS, mix, streams
from rpqfx.codebook.drawn_codes import VERSION, balanced_codes
from rpqfx.codebook.packing import pack_codes, packed_bytes, unpack_codes
from rpqfx.codebook.spec import code_dtype
from rpqfx.errors import FormatError

_SEED, _SUM = 8, 4  # bytes
_PIECE = 2**18  # codes that are summed up at a time


def stored_bytes(shape: Sequence[int], entries: int, drawn: int) -> int:
    """Returns the bytes that codes take in a file.

    Args:
        shape: ``(R, M, N)``.
        entries: ``K``.
        drawn: How many of the stages are held as a seed, all of them as the same.
    """
    stages, sub_vectors, vectors = shape
    return (_head_bytes(stages) if drawn else 0) + packed_bytes((stages - drawn) * sub_vectors * vectors, entries)


def is_shorter(shape: Sequence[int], entries: int, drawn: int) -> bool:
    """Returns whether codes take fewer bytes with so many stages held as a seed than with none.

    Args:
        shape: ``(R, M, N)``.
        entries: ``K``.
        drawn: How many stages.
    """
    return stored_bytes(shape, entries, drawn) < stored_bytes(shape, entries, 0)


def pack(codes: Tensor, entries: int, seed: int | None, drawn: Sequence[int]) -> Tensor:
    """Returns codes as a file holds them.

    Args:
        codes: ``[R, M, N]``, with values.
        entries: ``K``.
        seed: Their seed, where stages are drawn.
        drawn: The stages whose codes the seed draws; without any, all codes are packed.

    Returns:
        ``[stored_bytes(codes.shape, entries, len(drawn))]`` uint8, on the codes' device; may share their memory.

    Raises:
        CodeError: If a code that is packed is out of range.
    """
    if not drawn or seed is None:
        return pack_codes(codes, entries)
    mask = sum(1 << stage for stage in drawn)
    numbers = ((VERSION, 1), (seed, _SEED), (_sum(codes, drawn), _SUM), (mask, _mask_bytes(len(codes))))
    head = [byte for number, size in numbers for byte in number.to_bytes(size, "little")]
    held = torch.tensor(head, dtype=torch.uint8, device=codes.device)
    others = _others(len(codes), drawn)
    return torch.cat([held, pack_codes(codes[others], entries)]) if others else held


def unpack(stored: Tensor, shape: Sequence[int], entries: int) -> tuple[Tensor, int]:
    """Returns codes of which some stages are held as a seed, and the seed.

    Call it once the size of the weight is known to be right: the codes may be much larger than what holds them.

    Args:
        stored: What ``pack`` returned, on the device where the codes go.
        shape: ``(R, M, N)``.
        entries: ``K``.

    Returns:
        Codes ``[R, M, N]`` in the narrowest integer, every one below ``entries``, and the seed.

    Raises:
        FormatError: If these are not the codes that were packed, or none that this version of the library draws.
    """
    drawn, rest = stored_stages(stored, shape, entries)
    seed, wanted = _number(stored, 1, _SEED), _number(stored, 1 + _SEED, _SUM)
    if seed >= SEEDS:
        raise FormatError(f"the seed of its codes is none: {seed}")
    codes = balanced_codes(shape, entries, seed, stored.device)
    if _sum(codes, drawn) != wanted:
        raise FormatError(
            "from the seed of its codes others are drawn than were saved: the seed was altered, or this platform draws "
            "wrongly"
        )
    for stage, held in zip(_others(shape[0], drawn), rest, strict=True):
        codes[stage] = held
    return codes, seed


def stored_stages(stored: Tensor, shape: Sequence[int], entries: int) -> tuple[tuple[int, ...], Tensor]:
    """Returns which stages are held as a seed, and the codes of the others; nothing is drawn.

    Args:
        stored: As ``unpack`` takes it.
        shape: ``(R, M, N)``.
        entries: ``K``.

    Returns:
        The stages that are drawn, and codes ``[R', M, N]``.

    Raises:
        FormatError: If a newer version of the library draws them, or what is stored is not of that form.
        CodeError: If a code is out of range.
    """
    stages, *one = shape
    head = _head_bytes(stages)
    if stored.dtype is not torch.uint8 or stored.dim() != 1 or len(stored) < head:
        raise FormatError(f"{tuple(stored.shape)} of {stored.dtype} do not begin with a seed of codes")
    if (version := int(stored[0])) != VERSION:
        raise FormatError(
            f"its codes are a seed of version {version} of their generator, and this library draws version {VERSION}; "
            "update rpqfx"
        )
    mask = _number(stored, 1 + _SEED + _SUM, _mask_bytes(stages))
    drawn = tuple(stage for stage in range(stages) if mask >> stage & 1)
    if not drawn or mask >> stages or len(stored) != stored_bytes(shape, entries, len(drawn)):
        raise FormatError(f"{len(stored)} bytes are no codes {tuple(shape)} of which stages {drawn} are a seed")
    return drawn, unpack_codes(stored[head:], entries, (stages - len(drawn), *one), code_dtype(entries))


def _head_bytes(stages: int) -> int:
    return 1 + _SEED + _SUM + _mask_bytes(stages)


def _mask_bytes(stages: int) -> int:
    return -(-stages // 8)


def _number(stored: Tensor, start: int, size: int) -> int:
    return int.from_bytes(bytes(stored[start : start + size].tolist()), "little")


def _others(stages: int, drawn: Iterable[int]) -> list[int]:
    return sorted(set(range(stages)).difference(drawn))


def _sum(codes: Tensor, stages: Iterable[int]) -> int:
    """Returns a sum over the codes of some stages, of 32 bits, in which each place counts by a factor of its own."""
    found, factors = 0, streams(0, 0, 0, 1, min(_PIECE, codes[0].numel()), codes.device)[0] >> 8
    for stage in stages:
        for some in codes[stage].flatten().split(_PIECE):  # 18 + 24 + 16 bits are fewer than an int64 has
            total = int((some.long() * factors[: len(some)]).sum())
            found = mix((found + total) % 2**32)
    return found
