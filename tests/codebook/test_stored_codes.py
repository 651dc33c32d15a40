"""Codes come out of what a file holds of them, and nothing else does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.codebook.counter_random import SEEDS
from rpqfx.codebook.drawn_codes import VERSION, balanced_codes
from rpqfx.codebook.packing import pack_codes
from rpqfx.codebook.stored_codes import is_shorter, pack, stored_bytes, stored_stages, unpack
from rpqfx.errors import CodeError, FormatError, RPQError
from tests.helpers import generator, seeds

SHAPE, ENTRIES = (3, 4, 50), 16
HEAD = 14

every_seed = st.integers(0, SEEDS - 1)
shapes = st.tuples(st.integers(1, 10), st.integers(1, 4), st.integers(1, 60))
entry_counts = st.sampled_from([2, 3, 16, 256, 257, 40_000])


def held(shape: tuple[int, ...], entries: int, seed: int, drawn: tuple[int, ...]) -> Tensor:
    """Codes of which some stages are as a seed draws them, and the others are not."""
    codes = balanced_codes(shape, entries, seed)
    for stage in set(range(shape[0])).difference(drawn):
        codes[stage] = torch.randint(entries, shape[1:], generator=generator(seed % 1000))
    return codes


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, tuple[int, ...]]:
    shape, entries, seed = draw(shapes), draw(entry_counts), draw(every_seed)
    drawn = draw(st.sets(st.integers(0, shape[0] - 1), min_size=1))
    return shape, entries, seed, tuple(sorted(drawn))


@given(cases())
def test_codes_come_back(case: tuple[tuple[int, ...], int, int, tuple[int, ...]]) -> None:
    shape, entries, seed, drawn = case
    codes = held(*case)
    stored = pack(codes, entries, seed, drawn)
    assert stored.dtype is torch.uint8 and stored.shape == (stored_bytes(shape, entries, len(drawn)),)
    found, again = unpack(stored, shape, entries)
    assert found.dtype == codes.dtype and found.tolist() == codes.tolist() and again == seed
    stages, rest = stored_stages(stored, shape, entries)
    others = [stage for stage in range(shape[0]) if stage not in drawn]
    assert stages == drawn and rest.tolist() == [codes[stage].tolist() for stage in others]


@given(cases())
def test_bytes_are_those_of_a_head_and_of_packed_codes(case: tuple[tuple[int, ...], int, int, tuple[int, ...]]) -> None:
    shape, entries, _, drawn = case
    bits = (shape[0] - len(drawn)) * shape[1] * shape[2] * (entries - 1).bit_length()
    assert stored_bytes(shape, entries, len(drawn)) == 13 + math.ceil(shape[0] / 8) + math.ceil(bits / 8)
    whole = stored_bytes(shape, entries, 0)
    assert whole == math.ceil(math.prod(shape) * (entries - 1).bit_length() / 8)
    assert is_shorter(shape, entries, len(drawn)) == (stored_bytes(shape, entries, len(drawn)) < whole)


@given(seeds)
def test_without_a_drawn_stage_codes_are_packed(seed: int) -> None:
    codes = torch.randint(ENTRIES, SHAPE, generator=generator(seed)).byte()
    assert torch.equal(pack(codes, ENTRIES, seed, ()), pack_codes(codes, ENTRIES))


def test_the_form_is_this() -> None:
    """Bytes of a known seed; files are read by them."""
    stored = pack(held((2, 1, 8), 4, 2**40 + 3, (1,)).fill_(2), 4, 2**40 + 3, (1,)).tolist()
    assert stored[:9] == [VERSION, 3, 0, 0, 0, 0, 1, 0, 0] and stored[13:] == [2, 0xAA, 0xAA]
    assert int.from_bytes(pack(balanced_codes((1, 2, 300), 256, 7), 256, 7, (0,))[9:13].tolist(), "little") == SUM


SUM = 3875389059


@given(st.integers(0, 8 * HEAD - 1))
def test_no_bit_of_a_head_can_be_another(bit: int) -> None:
    stored = pack(held(SHAPE, ENTRIES, 5, (0, 2)), ENTRIES, 5, (0, 2))
    stored[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FormatError):
        unpack(stored, SHAPE, ENTRIES)


@given(st.integers(0, 200), st.integers(0, 255))
def test_other_bytes_are_refused_or_other_codes(size: int, filled: int) -> None:
    stored = torch.full((size,), filled, dtype=torch.uint8)
    with pytest.raises(FormatError):
        unpack(stored, SHAPE, ENTRIES)


def test_what_another_version_draws_is_refused() -> None:
    stored = pack(balanced_codes(SHAPE, ENTRIES, 5), ENTRIES, 5, (0, 1, 2))
    stored[0] = VERSION + 1
    with pytest.raises(FormatError, match=r"version 2 of their generator.*version 1; update rpqfx"):
        unpack(stored, SHAPE, ENTRIES)


@pytest.mark.parametrize("wrong", [torch.zeros(20), torch.zeros(4, 20).byte(), torch.zeros(5).byte()])
def test_what_has_no_head_is_refused(wrong: Tensor) -> None:
    with pytest.raises(FormatError, match="do not begin with a seed"):
        unpack(wrong, SHAPE, ENTRIES)


def test_codes_out_of_range_are_refused() -> None:
    stored = pack(held(SHAPE, 16, 5, (0,)), 16, 5, (0,))
    with pytest.raises(CodeError):
        unpack(stored, SHAPE, 9)
    codes = held(SHAPE, 16, 5, (0,))
    codes[1, 0, 0] = 16
    with pytest.raises(CodeError):
        pack(codes, 16, 5, (0,))


@given(cases(), st.data())
def test_a_platform_that_draws_another_code_is_found_out(
    case: tuple[tuple[int, ...], int, int, tuple[int, ...]], data: st.DataObject
) -> None:
    shape, entries, seed, drawn = case
    codes = held(*case)
    at = (data.draw(st.sampled_from(drawn)), *(data.draw(st.integers(0, size - 1)) for size in shape[1:]))
    other = data.draw(st.integers(0, entries - 1))
    assume(other != int(codes[at]))
    codes[at] = other
    with pytest.raises(RPQError, match="others are drawn than were saved"):
        unpack(pack(codes, entries, seed, drawn), shape, entries)
