"""Packing loses nothing, takes the bytes it says, and lets no code out of range through."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.codebook import code_dtype, packing
from rpqfx.codebook.packing import (
    code_bits,
    pack_codes,
    pack_floats,
    packed_bytes,
    stored_bits,
    stored_dtype,
    unpack_codes,
)
from rpqfx.errors import CodeError, FormatError, InputError, SpecError
from tests.helpers import generator, seeds

entry_counts = st.one_of(st.integers(1, 16).map(lambda bits: 2**bits), st.integers(2, 65_536))
counts = st.one_of(st.integers(0, 40), st.integers(0, 5000))
FLOATS = [torch.float32, torch.float64]
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def draw(seed: int, entries: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(entries, shape, generator=generator(seed)).to(dtype)


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    return torch.equal(found.view(BITS[found.dtype]), wanted.view(BITS[found.dtype]))


# --------------------------------------------------------------------------------------------------------- codes


@given(entry_counts, counts, seeds, st.sampled_from([None, torch.int32, torch.int64]))
def test_codes_return(entries: int, count: int, seed: int, dtype: torch.dtype | None) -> None:
    dtype = dtype or code_dtype(entries)
    codes = draw(seed, entries, count, dtype=dtype)
    packed = pack_codes(codes, entries)
    assert packed.dtype == torch.uint8 and packed.shape == (math.ceil(count * math.ceil(math.log2(entries)) / 8),)
    again = unpack_codes(packed, entries, codes.shape, dtype)
    assert again.dtype == dtype and again.tolist() == codes.tolist()


@given(entry_counts, st.integers(0, 40), seeds)
def test_packed_codes_are_one_stream_of_bits(entries: int, count: int, seed: int) -> None:
    """Lowest bit first, as the module says; whoever reads a file without this library can rely on it."""
    codes = draw(seed, entries, count)
    stream = "".join(f"{code:0{code_bits(entries)}b}"[::-1] for code in codes.tolist())
    wanted = [int(stream[at : at + 8][::-1], 2) for at in range(0, len(stream), 8)]
    assert pack_codes(codes, entries).tolist() == wanted


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("extra", [-1, 0, 1, 7, 8, 9])
def test_codes_return_across_blocks(bits: int, extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_BLOCK", 64)
    whole = draw(bits, 2**bits, 3 * 64 + extra, dtype=code_dtype(2**bits))
    packed = pack_codes(whole, 2**bits)
    assert unpack_codes(packed, 2**bits, whole.shape, whole.dtype).tolist() == whole.tolist()
    monkeypatch.undo()
    assert torch.equal(pack_codes(whole, 2**bits), packed)


@given(seeds, entry_counts)
def test_codes_of_any_shape_and_stride_return(seed: int, entries: int) -> None:
    codes = draw(seed, entries, 3, 5, 7, dtype=code_dtype(entries)).transpose(0, 2)
    again = unpack_codes(pack_codes(codes, entries), entries, codes.shape, codes.dtype)
    assert again.shape == codes.shape and again.tolist() == codes.tolist()


@pytest.mark.parametrize(("entries", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (257, 9), (3000, 12), (65_536, 16)])
def test_widths(entries: int, bits: int) -> None:
    assert code_bits(entries) == bits
    assert packed_bytes(8, entries) == bits and packed_bytes(9, entries) == bits + math.ceil(bits / 8)
    assert packed_bytes(0, entries) == 0


@given(st.integers(2, 65_536), seeds, st.integers(1, 40))
def test_codes_out_of_range_are_not_packed(entries: int, seed: int, count: int) -> None:
    for wrong in (entries, -1, 2**32):
        codes = draw(seed, entries, count)
        codes[seed % count] = wrong
        with pytest.raises(CodeError, match=f"the codebook has {entries} entries"):
            pack_codes(codes, entries)


@given(st.integers(3, 65_535).filter(lambda entries: entries & (entries - 1)), seeds, st.integers(1, 40))
def test_codes_out_of_range_are_not_unpacked(entries: int, seed: int, count: int) -> None:
    """A stream of ``b`` bits a code has room for codes that the codebook has not."""
    room = 2 ** code_bits(entries)
    codes = draw(seed, room, count)
    codes[seed % count] = entries
    with pytest.raises(CodeError, match=f"the codebook has {entries} entries"):
        unpack_codes(pack_codes(codes, room), entries, codes.shape, code_dtype(entries))


def test_what_cannot_be_packed_codes_is_refused() -> None:
    codes = torch.zeros(9, dtype=torch.uint8)
    for entries in (0, 1, 65_537):
        with pytest.raises(SpecError, match="2 to 65536 entries"):
            pack_codes(codes, entries)
    for wrong in (codes.float(), codes.bool()):
        with pytest.raises(InputError, match="codes are integers"):
            pack_codes(wrong, 16)
    packed = pack_codes(codes, 16)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(InputError, match="does not hold codes of 16 entries"):
            unpack_codes(packed, 16, (9,), dtype)
    with pytest.raises(InputError, match="does not hold codes of 300 entries"):
        unpack_codes(packed, 300, (4,), torch.uint8)
    for wrong, shape in ((packed, (11,)), (packed, (8,)), (packed[None], (9,)), (packed.char(), (9,))):
        with pytest.raises(FormatError, match=r"codes of 4 bits take \d bytes"):
            unpack_codes(wrong, 16, shape, torch.uint8)


def test_packing_takes_little_memory_besides_its_result() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    Largest.nbytes = max(Largest.nbytes, tensor.untyped_storage().nbytes())
            return result

    codes = draw(0, 4096, 3_000_000, dtype=torch.int16)
    with Largest():
        packed = pack_codes(codes, 4096)
    assert Largest.nbytes == codes.nbytes  # views of what was given
    Largest.nbytes = 0
    with Largest():
        unpack_codes(packed, 4096, codes.shape, codes.dtype)
    assert Largest.nbytes == codes.nbytes  # the result


def test_packing_takes_as_many_operations_as_blocks_whatever_they_hold() -> None:
    """Hundreds for each 131,072 codes, and none that depends on what they are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    def operations(blocks: int) -> tuple[int, int]:
        codes = draw(blocks, 4096, blocks * 131_072, dtype=torch.int16)
        Count.calls = 0
        with Count():
            packed = pack_codes(codes, 4096)
        packing, Count.calls = Count.calls, 0
        with Count():
            again = unpack_codes(packed, 4096, codes.shape, codes.dtype)
        assert torch.equal(again, codes) and packed.nbytes == codes.numel() * 12 // 8
        return packing, Count.calls

    for one, two, three in zip(*(operations(blocks) for blocks in (1, 2, 3)), strict=True):
        assert three - two == two - one < 400


# -------------------------------------------------------------------------------------------------------- floats


def any_bits(seed: int, count: int, dtype: torch.dtype) -> Tensor:
    """Any pattern of bits: NaN of every kind, infinities, both zeros and numbers near them."""
    low, high = torch.iinfo(BITS[dtype]).min, torch.iinfo(BITS[dtype]).max
    bits = torch.randint(low, high, (count,), generator=generator(seed), dtype=torch.int64)
    floats = bits.to(BITS[dtype]).view(dtype)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf], dtype=dtype)
    return torch.cat([floats, special])[torch.randperm(count + 4, generator=generator(seed))]


@given(seeds, counts, st.sampled_from(list(BITS)), st.sampled_from(FLOATS))
def test_floats_return_to_the_last_bit(seed: int, count: int, narrow: torch.dtype, dtype: torch.dtype) -> None:
    """Whatever they were before: drawn from any dtype, so that all ways of storing them occur."""
    held = any_bits(seed, count, narrow).to(dtype)
    for tensor in (held, held[~held.isnan()]):
        packed = pack_floats(tensor)
        assert packed.dtype == stored_dtype(tensor)
        assert same_bits(packed.to(dtype), tensor)


@given(seeds, st.integers(0, 300), st.sampled_from(FLOATS))
def test_floats_are_stored_as_narrow_as_they_are(seed: int, count: int, dtype: torch.dtype) -> None:
    only = {torch.float16: 1 + 2.0**-10, torch.bfloat16: 2.0**100, torch.float32: 1 + 2.0**-23}  # each in one of them
    for narrow, value in only.items():
        values = any_bits(seed, count, narrow).to(dtype)
        values = torch.cat([values[~values.isnan()], values.new_tensor([value])])
        assert stored_dtype(values) is narrow
    values = torch.tensor([0.5, -0.0, only[torch.float16], only[torch.bfloat16]], dtype=dtype)
    assert stored_dtype(values) is torch.float32
    assert stored_dtype(torch.tensor([0.1], dtype=torch.float64)) is torch.float64


def test_nan_stays_as_it_is() -> None:
    """Processors differ in what they make of its bits."""
    for dtype in FLOATS:
        assert stored_dtype(torch.tensor([1.0, math.nan], dtype=dtype)) is dtype


def test_other_tensors_stay_as_they_are() -> None:
    for tensor in (torch.ones(3, dtype=torch.float16), torch.ones(3, dtype=torch.bfloat16), torch.arange(3)):
        assert pack_floats(tensor) is tensor
    assert stored_dtype(torch.zeros(3, device="meta")) is torch.float32


def test_numbers_that_the_processor_takes_for_zero_are_kept() -> None:
    tiny = torch.tensor([1.0, torch.finfo(torch.float32).tiny / 4 * (1 + 2.0**-20), 0.5])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such setting")
    try:
        packed = pack_floats(tiny)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(packed.float(), tiny) and packed.dtype is torch.float32


def test_one_value_in_a_late_block_is_noticed() -> None:
    tensor = torch.ones(3 * packing._BLOCK)
    assert stored_dtype(tensor) is torch.float16
    tensor[-1] = 1 + 2.0**-20
    assert stored_dtype(tensor) is torch.float32


# ---------------------------------------------------------------------------------------------------------- sizes


@given(entry_counts, counts, seeds)
def test_bits_are_those_of_the_packed_tensors(entries: int, count: int, seed: int) -> None:
    codes = draw(seed, entries, count, dtype=code_dtype(entries))
    assert packed_bytes(count, entries) == pack_codes(codes, entries).nbytes
    for dtype in FLOATS:
        floats = torch.randn(count + 1, generator=generator(seed), dtype=dtype)
        assert stored_bits(floats) == 8 * floats.nbytes > stored_bits(floats.half().to(dtype)) == 16 * (count + 1)
    assert stored_bits(torch.zeros(count, device="meta")) == 32 * count
    assert stored_bits(torch.zeros(count, dtype=torch.uint8)) == 8 * count
