"""Drawn codes are those of their definition on every platform, balanced, and told from all others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.codebook import CodebookSpec, drawn_codes
from rpqfx.codebook.counter_random import SEEDS, streams
from rpqfx.codebook.drawn_codes import balanced_codes, drawn_stages, may_be_seed, new_seed
from rpqfx.codebook.spec import code_dtype
from rpqfx.nn import RPQLinear, RPQWeight
from tests.fuzz_files import Largest
from tests.helpers import generator

every_seed = st.integers(0, SEEDS - 1)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 90))
entry_counts = st.sampled_from([2, 3, 16, 256, 257, 40_000])


def by_definition(shape: tuple[int, int, int], entries: int, seed: int) -> list[list[list[int]]]:
    """The codes, from numbers of ``streams`` and Python's own sorting."""
    stages, sub_vectors, vectors = shape
    bits = min(31, 15 + math.ceil(math.log2(vectors)))
    numbers = [streams(seed, stage, 0, sub_vectors, vectors).tolist() for stage in range(stages)]
    return [
        [[at % entries for at in sorted(range(vectors), key=lambda at: (row[at] >> (32 - bits), at))] for row in stage]
        for stage in numbers
    ]


@given(shapes, entry_counts, every_seed)
def test_codes_are_those_of_the_definition(shape: tuple[int, int, int], entries: int, seed: int) -> None:
    codes = balanced_codes(shape, entries, seed)
    assert codes.dtype == code_dtype(entries) and codes.shape == shape
    assert codes.tolist() == by_definition(shape, entries, seed)


@pytest.mark.parametrize("vectors", [9216, 65_536, 65_537, 70_001])
def test_long_sub_vectors_are_those_of_the_definition(vectors: int) -> None:
    assert balanced_codes((1, 2, vectors), 256, 3).tolist() == by_definition((1, 2, vectors), 256, 3)


def test_the_first_codes_of_known_seeds_are_these() -> None:
    """Files have seeds in the place of codes: whoever draws others reads them wrongly."""
    assert balanced_codes((2, 2, 8), 4, 0).tolist() == SMALL
    assert balanced_codes((1, 1, 9216), 256, 2**62 + 12345)[0, 0, :8].tolist() == LONG
    assert balanced_codes((1, 3, 50_000), 40_000, 7)[0, 2, :6].tolist() == WIDE


SMALL = [[[1, 0, 3, 0, 2, 3, 1, 2], [1, 3, 0, 0, 2, 1, 3, 2]], [[1, 3, 2, 0, 1, 3, 0, 2], [2, 2, 3, 1, 1, 3, 0, 0]]]
LONG = [120, 183, 90, 91, 226, 201, 255, 7]
WIDE = [34621, 23724, 36956, 2865, 32611, 2732]


@given(shapes, entry_counts, every_seed)
def test_every_entry_is_used_as_often(shape: tuple[int, int, int], entries: int, seed: int) -> None:
    vectors = shape[2]
    for row in balanced_codes(shape, entries, seed).flatten(0, 1).long():
        uses = torch.bincount(row, minlength=entries)
        assert uses.tolist() == [vectors // entries + (entry < vectors % entries) for entry in range(entries)]


@given(shapes, every_seed)
def test_codes_do_not_depend_on_what_else_is_drawn(shape: tuple[int, int, int], seed: int) -> None:
    stages, sub_vectors, vectors = shape
    more = balanced_codes((stages + 1, sub_vectors + 5, vectors), 16, seed)
    assert torch.equal(more[:stages, :sub_vectors], balanced_codes(shape, 16, seed))


def test_sub_vectors_have_nothing_to_do_with_each_other() -> None:
    """Two vectors that share an entry at one position share one at another as often as any two: chi squared."""
    entries, vectors = 16, 16_384
    first, *others = balanced_codes((2, 4, vectors), entries, 1).flatten(0, 1).long()
    for other in (*others, first.roll(1), balanced_codes((1, 1, vectors), entries, 2)[0, 0].long()):
        pairs = torch.bincount(first * entries + other, minlength=entries**2).double()
        expected = vectors / entries**2
        chi = float(((pairs - expected) ** 2 / expected).sum())
        freedom = (entries - 1) ** 2
        assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5


def test_all_shuffles_are_as_likely() -> None:
    """The 24 orders of four codes, over many seeds."""
    rows = balanced_codes((1, 24_000, 4), 4, 9)[0].long()
    counts = torch.bincount((rows * torch.tensor([64, 16, 4, 1])).sum(1), minlength=256)
    found = counts[counts > 0]
    assert len(found) == 24 and float(((found - 1000.0) ** 2 / 1000).sum()) < 23 + 5 * 46**0.5


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        codes = balanced_codes((1, 9, 40_000), 256, 5)
    finally:
        torch.set_num_threads(before)
    assert codes.tolist() == by_definition((1, 9, 40_000), 256, 5)


@pytest.mark.gpu
def test_a_gpu_draws_the_same() -> None:
    for shape, entries in (((2, 5, 9216), 256), ((1, 2, 70_001), 4096), ((1, 40, 64), 16)):
        assert torch.equal(balanced_codes(shape, entries, 5, "cuda").cpu(), balanced_codes(shape, entries, 5))


@given(shapes, entry_counts, every_seed, st.data())
def test_one_code_that_changed_is_noticed(
    shape: tuple[int, int, int], entries: int, seed: int, data: st.DataObject
) -> None:
    codes = balanced_codes(shape, entries, seed)
    assert drawn_stages(codes, entries, seed) == tuple(range(shape[0]))
    at = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    codes[at] = int(codes[at]) ^ 1
    assert drawn_stages(codes, entries, seed) == tuple(stage for stage in range(shape[0]) if stage != at[0])


def test_another_seed_or_size_is_noticed() -> None:
    codes = balanced_codes((1, 3, 64), 16, 1)
    assert not drawn_stages(codes, 16, 2)
    assert not drawn_stages(codes[..., :63], 16, 1)


def test_of_a_stage_that_was_learned_only_the_beginning_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = balanced_codes((2, 400, 2048), 16, 1)
    codes[0, 0] = 3
    starts = []
    monkeypatch.setattr(drawn_codes, "streams", lambda *args: starts.append(args[1:3]) or streams(*args))
    assert drawn_stages(codes, 16, 1) == (1,)
    assert starts == [(0, 0), *((1, first) for first in range(0, 400, 32))]


def test_drawing_takes_no_more_memory_than_a_few_sub_vectors() -> None:
    shape = (2, 400, 2048)
    with Largest() as largest:
        balanced_codes(shape, 16, 1)
    assert largest.nbytes == math.prod(shape) > 8 * 2**16


def test_seeds_come_from_torch() -> None:
    torch.manual_seed(3)
    first, second = new_seed(), new_seed()
    torch.manual_seed(3)
    assert (new_seed(), new_seed()) == (first, second) and first != second
    assert new_seed(generator(3)) == first
    assert min(new_seed(generator(seed)) for seed in range(100)) >= 0
    assert max(new_seed(generator(seed)) for seed in range(100)) > SEEDS // 2


def test_torchs_seed_decides_about_codes() -> None:
    def drawn(seed: int) -> RPQWeight:
        torch.manual_seed(seed)
        return RPQLinear(32, 64, codebook_dim=4, codebook_bits=4).weight_rpq

    assert torch.equal(drawn(1).codes, drawn(1).codes)
    assert not torch.equal(drawn(1).codes, drawn(2).codes)
    weight = drawn(1)
    assert weight.drawn_stages() == (0,)
    before = weight.codes
    weight.reset_parameters()
    assert not torch.equal(weight.codes, before) and weight.drawn_stages() == (0,)


def test_a_layer_without_values_has_no_seed() -> None:
    with torch.device("meta"):
        weight = RPQLinear(32, 64, codebook_dim=4, codebook_bits=4).weight_rpq
    assert weight.code_seed is None and weight.drawn_stages() == ()
    with torch._subclasses.FakeTensorMode():
        RPQWeight(CodebookSpec(64, 32, 4, 16))


def test_fitted_codes_have_no_seed() -> None:
    weight = RPQWeight.from_dense(torch.randn(64, 32), CodebookSpec(64, 32, 4, 16))
    assert weight.code_seed is None and weight.drawn_stages() == ()


def test_codes_larger_than_a_dense_tensor_are_no_seed() -> None:
    assert may_be_seed(CodebookSpec(4096, 8, 1, 16, stages=8)) and not may_be_seed(
        CodebookSpec(4096, 8, 1, 16, stages=9)
    )
    assert may_be_seed(CodebookSpec(4096, 8, 2, 512, stages=8)) and not may_be_seed(
        CodebookSpec(4096, 8, 2, 512, stages=9)
    )
    weight = RPQWeight(CodebookSpec(64, 8, 1, 4, stages=9))
    assert weight.code_seed is not None and weight.drawn_stages() == ()
