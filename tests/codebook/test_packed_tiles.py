"""Packed codes in the order of their tiles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rpqfx.codebook.packed_tiles import pack_tiles, unpack_tiles
from rpqfx.codebook.packing import pack_codes, packed_bytes
from rpqfx.codebook.tiles import tiles_shape, to_tiles
from rpqfx.errors import CodeError, FormatError

shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 200))
some_entries = st.sampled_from([2, 3, 4, 7, 8, 9, 15, 16])


def tiles_of(shape: tuple[int, int, int], entries: int, seed: int = 0) -> Tensor:
    return to_tiles(torch.randint(entries, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8))


@given(shape=shapes, entries=some_entries, block=st.sampled_from([8, 1000, 1 << 17]), seed=st.integers(0, 2**16))
def test_tiles_come_back(shape: tuple[int, int, int], entries: int, block: int, seed: int) -> None:
    tiles = tiles_of(shape, entries, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rpqfx.codebook.packed_tiles._BLOCK", block)
        packed = pack_tiles(tiles, shape[2], entries)
        assert packed.dtype == torch.uint8 and packed.shape == (packed_bytes(math.prod(shape), entries),)
        again = unpack_tiles(packed, entries, shape)
    assert again.shape == tiles_shape(*shape) and torch.equal(again, tiles)


@given(shape=shapes, entries=some_entries, seed=st.integers(0, 2**16))
def test_the_order_is_the_one_that_is_written_down(shape: tuple[int, int, int], entries: int, seed: int) -> None:
    codes = torch.randint(entries, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    whole = shape[2] // 64
    tiles = codes[..., : 64 * whole].unflatten(2, (whole, 2, 32)).permute(2, 1, 0, 4, 3)  # [T, M, R, 32, 2]
    stream = torch.cat([tiles.flatten(), codes[..., 64 * whole :].flatten()])
    assert torch.equal(pack_tiles(to_tiles(codes), shape[2], entries), pack_codes(stream, entries))


@pytest.mark.parametrize("entries", [9, 16])
def test_four_bit_codes_of_whole_tiles_are_not_copied(entries: int) -> None:
    tiles = tiles_of((3, 2, 192), entries)
    packed = pack_tiles(tiles, 192, entries)
    assert packed.data_ptr() == tiles.data_ptr() == unpack_tiles(packed, entries, (3, 2, 192)).data_ptr()


class _Storages(TorchDispatchMode):
    """Keeps the bytes of what operators return, by where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, Tensor):
                place = one.untyped_storage()
                self.nbytes[place.data_ptr()] = max(place.nbytes(), self.nbytes.get(place.data_ptr(), 0))
        return made


@pytest.mark.parametrize("entries", [8, 16])
def test_beside_the_tiles_nothing_is_as_large_as_they(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpqfx.codebook.packed_tiles._BLOCK", 1 << 12)
    shape = (4, 100, 64 * 60 + 7)
    packed = pack_tiles(tiles_of(shape, entries), shape[2], entries)
    with _Storages() as seen:
        made = unpack_tiles(packed, entries, shape)
    known = {made.data_ptr(), packed.data_ptr()}
    assert max(nbytes for place, nbytes in seen.nbytes.items() if place not in known) <= made.nbytes // 10


@pytest.mark.parametrize("entries", [3, 9])
@pytest.mark.parametrize("at", [0, 66])
def test_codes_out_of_range_come_neither_in_nor_out(entries: int, at: int) -> None:
    codes = torch.zeros(2, 2, 70, dtype=torch.uint8)
    codes[1, 1, at] = entries
    with pytest.raises(CodeError, match=rf"but the codebook has {entries} entries"):
        pack_tiles(to_tiles(codes), 70, entries)
    packed = pack_tiles(to_tiles(codes), 70, 4 if entries == 3 else 16)
    with pytest.raises(CodeError, match=rf"but the codebook has {entries} entries"):
        unpack_tiles(packed, entries, (2, 2, 70))


def test_another_number_of_bytes_is_refused() -> None:
    packed = pack_tiles(tiles_of((2, 2, 70), 16), 70, 16)
    for wrong in (packed[1:], packed[None], packed.short()):
        with pytest.raises(FormatError, match=r"280 codes of 4 bits take 140 bytes"):
            unpack_tiles(wrong, 16, (2, 2, 70))
