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
