"""Codes of four bits in the order in which a product with few rows reads them, two to a byte.

A tile has the codes of 64 vectors: for each use of a codebook, a sub-vector's stage, 32 bytes, of which byte ``j`` has
the code of vector ``j`` in its low four bits and that of vector ``32 + j`` in its high ones. Tiles ``[T, M, R * 32]``
are uint8, ``T = ceil(N / 64)``; codes of vectors that are not there are zero. A product goes through memory once, in
order, and looks up 32 codes at a time (``rpqfx/ops/cpu/byte_sums.h``). There are three axes, not four, because
``Module.to(memory_format=...)`` lays out tensors of four in its own way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64
MOST_ENTRIES = 16
_HALF = TILE // 2
_AT_ONCE = 64  # tiles that are made at a time
_BLOCK = 1 << 18  # bytes of tiles that are made of packed codes at a time: what is made meanwhile stays in cache
_SECOND = 0x00F0_00F0_00F0_00F0  # the second nibble of each pair of bytes


def to_tiles(codes: Tensor) -> Tensor:
    """Returns codes as tiles.

    Args:
        codes: ``[R, M, N]`` uint8, each below 16.

    Returns:
        ``[T, M, R * 32]`` uint8.
    """
    stages, sub_vectors, vectors = codes.shape
    made = codes.new_empty(tiles_shape(stages, sub_vectors, vectors))
    if codes.is_meta:
        return made
    for first in range(0, len(made), _AT_ONCE):  # a table's codes are tens of megabytes, and so would all in between be
        part = codes[..., first * TILE : (first + _AT_ONCE) * TILE]
        halves = F.pad(part, (0, -part.shape[2] % TILE)).unflatten(2, (-1, 2, _HALF))
        both = halves[..., 0, :] | (halves[..., 1, :] << 4)
        made[first : first + _AT_ONCE] = both.permute(2, 1, 0, 3).flatten(2)
    return made


def tiles_of_packed(packed: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Returns the tiles of packed codes, which are never all there as bytes: for tables, that would be the most.

    Args:
        packed: ``[R * M * N / 2]`` uint8, two codes a byte, as ``rpqfx.codebook.packing`` packs codes of 16 entries.
        shape: ``(R, M, N)``; ``N`` is even.

    Returns:
        ``[T, M, R * 32]`` uint8.
    """
    stages, sub_vectors, _ = shape
    made = packed.new_empty(tiles_shape(*shape))
    if packed.is_meta:
        return made
    rows = packed.view(stages, sub_vectors, -1)
    most = min(len(made), max(1, _BLOCK // (stages * sub_vectors * _HALF)))
    # Room that is used again and again: malloc would give fresh pages for each block, which take longer than the work.
    halves = packed.new_empty(stages, sub_vectors, most, 2, _HALF // 2, dtype=torch.int16)
    pairs = packed.new_empty(2, stages, sub_vectors, most, _HALF // 2, dtype=torch.int16)
    for first in range(0, len(made), most):
        some = rows[..., first * _HALF : (first + most) * _HALF]
        count = -(-some.shape[2] // _HALF)
        if count < most or some.shape[2] % _HALF:  # the last block, or the only one
            some = F.pad(some, (0, most * _HALF - some.shape[2]))
        # A tile's bytes: codes 0, 1 to 30, 31 in the first half of them, and 32, 33 to 62, 63 in the second.
        halves.copy_(some.unflatten(2, (-1, 2, _HALF // 2)))
        torch.add(halves[..., 0, :], halves[..., 1, :], alpha=256, out=pairs[0])
        # Of nibbles (0, 1, 32, 33) of each pair of bytes, the two in the middle change places.
        words, swap = pairs.view(torch.int64)
        torch.bitwise_right_shift(words, 4, out=swap).bitwise_xor_(words).bitwise_and_(_SECOND)
        words.bitwise_xor_(swap).bitwise_xor_(swap.bitwise_left_shift_(4))
        place = made[first : first + most].view(torch.int64).unflatten(2, (stages, -1))
        place.copy_(words[:, :, :count].permute(2, 1, 0, 3))
    return made


def from_tiles(tiles: Tensor, vectors: int) -> Tensor:
    """Returns the codes that lie in tiles.

    Args:
        tiles: ``[T, M, R * 32]`` uint8.
        vectors: ``N``, more than ``64 * (T - 1)`` and at most ``64 * T``.

    Returns:
        ``[R, M, N]`` uint8.
    """
    count, sub_vectors, width = tiles.shape
    if tiles.is_meta:
        return tiles.new_empty(width // _HALF, sub_vectors, vectors)
    each = tiles.view(count, sub_vectors, width // _HALF, 1, _HALF)
    halves = torch.cat([each & 15, each >> 4], 3).permute(2, 1, 0, 3, 4)
    return halves.reshape(width // _HALF, sub_vectors, count * TILE)[..., :vectors]


def pick(tiles: Tensor, index: Tensor) -> Tensor:
    """Returns the codes of some vectors, at the cost of their tiles alone.

    Args:
        tiles: ``[T, M, R * 32]`` uint8.
        index: ``[n]`` int64, none below zero.

    Returns:
        ``[R, M, n]`` uint8.
    """
    some = tiles.index_select(0, index // TILE).unflatten(2, (-1, _HALF))  # [n, M, R, 32]
    place = index % TILE
    at = (place % _HALF)[:, None, None, None].expand(-1, *some.shape[1:3], 1)
    both = some.gather(3, at)[..., 0]
    codes = torch.where((place < _HALF)[:, None, None], both & 15, both >> 4)
    return codes.permute(2, 1, 0)


def tiles_shape(stages: int, sub_vectors: int, vectors: int) -> tuple[int, int, int]:
    """Returns ``(T, M, R * 32)`` of codes ``[R, M, N]``."""
    return (-(-vectors // TILE), sub_vectors, stages * _HALF)
