"""Sums of gathered maps, and their adjoint."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, export

from rpqfx.codebook import feature_maps, steps
from tests.helpers import assert_same, generator, randn, seeds

# Either side of the length from which maps are added up sample by sample.
positions = st.sampled_from([0, 1, 3, feature_maps.MAP_POSITIONS - 1, feature_maps.MAP_POSITIONS, 40])


def draw_codes(seed: int, stages: int, sub_vectors: int, num_vectors: int, entries: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(entries, (stages, sub_vectors, num_vectors), generator=generator(seed)).to(dtype)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """A table, a result's maps, and codes."""
    seed, entries = draw(seeds), draw(st.integers(2, 5))
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.uint16, torch.int64]))
    stages, sub_vectors, num_vectors = (draw(st.integers(1, high)) for high in (2, 3, 7))
    batch, length = draw(st.integers(0, 3)), draw(positions)
    codes = draw_codes(seed, stages, sub_vectors, num_vectors, entries, dtype)
    table = randn(seed + 1, batch, stages, sub_vectors, entries, length)
    return table, randn(seed + 2, batch, num_vectors, length), codes


def naive_gather_sum(table: Tensor, codes: Tensor) -> Tensor:
    """The definition, term by term."""
    batch, stages, sub_vectors, _, length = table.shape
    y = table.new_zeros(batch, codes.shape[2], length)
    for r in range(stages):
        for m in range(sub_vectors):
            for n in range(codes.shape[2]):
                y[:, n] += table[:, r, m, int(codes[r, m, n])]
    return y


def naive_bin_sum(y: Tensor, codes: Tensor, entries: int) -> Tensor:
    stages, sub_vectors, num_vectors = codes.shape
    bins = y.new_zeros(y.shape[0], stages, sub_vectors, entries, y.shape[2])
    for r in range(stages):
        for m in range(sub_vectors):
            for n in range(num_vectors):
                bins[:, r, m, int(codes[r, m, n])] += y[:, n]
    return bins


@given(cases())
def test_both_are_their_definitions(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """For maps of any length, samples of any number, none of either included; with the codes sorted before or not."""
    table, y, codes = case
    entries = table.shape[3]
    assert_same(feature_maps.gather_sum(table, codes), naive_gather_sum(table, codes))
    assert_same(feature_maps.bin_sum(y, codes, entries), naive_bin_sum(y, codes, entries))
    assert_same(feature_maps.bin_sum(y, codes, entries, steps.runs(codes, entries)), naive_bin_sum(y, codes, entries))


@given(cases())
def test_they_are_adjoint(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """<gather_sum(table), y> = <table, bin_sum(y)>."""
    table, y, codes = case
    left = (feature_maps.gather_sum(table, codes) * y).sum()
    assert_same(left, (table * feature_maps.bin_sum(y, codes, table.shape[3])).sum())


@given(cases())
def test_the_layout_of_a_table_does_not_matter(case: tuple[Tensor, Tensor, Tensor]) -> None:
    table, _, codes = case
    other = rearrange(rearrange(table, "b r m k l -> b m r k l").contiguous(), "b m r k l -> b r m k l")
    assert torch.equal(feature_maps.gather_sum(other, codes), feature_maps.gather_sum(table, codes))


@pytest.mark.parametrize("length", [1, feature_maps.MAP_POSITIONS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_types_are_summed_in_float32(dtype: torch.dtype, length: int) -> None:
    """2,048 ones and a thousandth each: a sum in the half type would stop growing, or lose the rest."""
    ones = torch.full((1, 1, 2048, 2, length), 1.25, dtype=dtype)
    y = feature_maps.gather_sum(ones, torch.zeros(1, 2048, 1, dtype=torch.uint8))
    assert y.dtype == dtype and bool((y == 2560).all())
    bins = feature_maps.bin_sum(
        torch.full((1, 2049, length), 1.0, dtype=dtype), torch.zeros(1, 1, 2049, dtype=torch.int16), 2
    )
    assert bins.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
    assert bool((bins[0, 0, 0, 0] == 2049).all()) and bool((bins[0, 0, 0, 1] == 0).all())


class Both(nn.Module):
    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)

    def forward(self, table: Tensor) -> tuple[Tensor, Tensor]:
        y = feature_maps.gather_sum(table, self.codes)
        return y, feature_maps.bin_sum(y, self.codes, table.shape[3])


def test_both_are_exported_for_every_number_of_samples_and_positions() -> None:
    module = Both(draw_codes(0, 2, 3, 7, 4, torch.uint8))
    sizes = {0: Dim("samples", min=2, max=64), 4: Dim("positions", min=2, max=4096)}
    exported = export(module, (randn(0, 3, 2, 3, 4, 5),), dynamic_shapes=(sizes,), strict=False).module()
    for samples, length in ((3, 5), (2, 60), (7, 2)):
        table = randn(1, samples, 2, 3, 4, length)
        for ours, theirs in zip(exported(table), module(table), strict=True):
            assert_same(ours, theirs)
