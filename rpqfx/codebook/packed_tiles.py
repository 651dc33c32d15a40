"""Packs codes in the order of their tiles, so that four-bit codes come out of a file as the tiles that they are.

The stream of bits (``rpqfx.codebook.packing``) has the codes of whole tiles first, ``[N // 64, M, R, 32, 2]``: its last
axis are the vectors ``j`` and ``32 + j`` of a tile, whose codes share a byte there. After them come the codes of the
vectors that fill no tile, ``[R, M, N % 64]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.codebook.packing import check_codes, check_packed, code_bits, pack_codes, packed_bytes, unpack_codes
from rpqfx.codebook.tiles import TILE, from_tiles, tiles_shape, to_tiles

IN_TILES = "tiles"  # what the manifest of a file calls this order
_BLOCK = 1 << 17  # bytes of tiles at a time: what is made meanwhile stays in cache
_NIBBLE = 4  # bits that a code has in a tile


def pack_tiles(tiles: Tensor, vectors: int, entries: int) -> Tensor:
    """Returns the codes of tiles in the width that they need, in the order of the tiles.

    Args:
        tiles: ``[ceil(N / 64), M, R * 32]`` uint8.
        vectors: ``N``.
        entries: ``K``, 2 to 16.

    Returns:
        ``[packed_bytes(R * M * N, entries)]`` uint8, on the tiles' device; may share their memory.

    Raises:
        CodeError: If a code is out of range.
    """
    whole = tiles[: vectors // TILE].reshape(-1)
    if code_bits(entries) == _NIBBLE:
        _check_nibbles(whole, entries)
        parts = [whole]
    else:
        parts = [pack_codes(torch.stack(_nibbles(block), -1), entries) for block in whole.split(_BLOCK)]
    if vectors % TILE:
        parts.append(pack_codes(from_tiles(tiles[vectors // TILE :], vectors % TILE), entries))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack_tiles(packed: Tensor, entries: int, shape: tuple[int, int, int]) -> Tensor:
    """Returns the inverse of ``pack_tiles``. Beside the tiles there is never more than a block of other codes.

    Args:
        packed: ``[packed_bytes(R * M * N, entries)]`` uint8.
        entries: ``K``, 2 to 16.
        shape: ``(R, M, N)``.

    Returns:
        ``[ceil(N / 64), M, R * 32]`` uint8; it is the memory of ``packed`` where codes take four bits and ``N`` is a
        multiple of 64.

    Raises:
        FormatError: If there are more or fewer bytes than codes of that shape take.
        CodeError: If a code is out of range.
    """
    stages, sub_vectors, vectors = shape
    check_packed(packed, entries, shape)
    size, rest = tiles_shape(*shape), vectors % TILE
    end = packed_bytes(stages * sub_vectors * (vectors - rest), entries)
    if code_bits(entries) == _NIBBLE:
        _check_nibbles(packed[:end], entries)
        if not rest:
            return packed.view(size)
    made = torch.empty(size, dtype=torch.uint8, device=packed.device)
    _fill(made[: vectors // TILE].view(-1), packed[:end], entries)
    if rest:
        made[-1:] = to_tiles(unpack_codes(packed[end:], entries, (stages, sub_vectors, rest), torch.uint8))
    return made


def _fill(tiles: Tensor, packed: Tensor, entries: int) -> None:
    width = code_bits(entries)
    if width == _NIBBLE:
        tiles.copy_(packed)
        return
    for start in range(0, tiles.numel(), _BLOCK):
        block = tiles[start : start + _BLOCK]
        some = packed[start * width // 4 : (start + block.numel()) * width // 4]
        low, high = unpack_codes(some, entries, (block.numel(), 2), torch.uint8).unbind(-1)
        torch.bitwise_or(low, high << _NIBBLE, out=block)


def _check_nibbles(tiles: Tensor, entries: int) -> None:
    """Raises where codes of whole tiles point outside their codebook; 16 entries have one for each."""
    if entries < 1 << _NIBBLE:
        for block in tiles.split(_BLOCK):
            for codes in _nibbles(block):
                check_codes(codes, entries)


def _nibbles(tiles: Tensor) -> tuple[Tensor, Tensor]:
    return tiles & 15, tiles >> _NIBBLE
