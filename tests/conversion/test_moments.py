"""Rows of inputs: their products with a weight's vectors are what the layer computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.conversion import moments
from rpqfx.conversion.moments import Moments, input_rows
from rpqfx.nn.layout import Layout
from tests.helpers import randn, seeds

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@given(
    seeds, st.integers(1, 3), st.sampled_from([1, 2]), st.integers(1, 2), st.integers(1, 2), st.data()
)  # fmt: skip
def test_rows_of_a_convolution_give_its_output(
    seed: int, axes: int, groups: int, channels: int, batch: int, data: st.DataObject
) -> None:
    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(axes))

    kernel, stride, padding, dilation = per_axis(1, 3), per_axis(1, 2), per_axis(0, 2), per_axis(1, 2)
    sizes = tuple((k - 1) * g + 1 + extra for k, g, extra in zip(kernel, dilation, per_axis(0, 3), strict=True))
    x = randn(seed, batch, groups * channels, *sizes)
    weight = randn(seed + 1, groups * 2, channels, *kernel)
    layout = Layout(tuple(weight.shape))
    geometry = (stride, padding, dilation, groups, False, None)
    rows = torch.cat(list(input_rows("conv", x, layout, geometry)))
    wanted = CONVS[axes](x, weight, None, stride, padding, dilation, groups)
    places = wanted[0, 0].numel()
    each = rows.view(batch, groups, places, -1)
    vectors = layout.to_vectors(weight).view(groups, 2, -1)
    found = torch.einsum("bgpd,gnd->bgnp", each, vectors).reshape(wanted.shape)
    torch.testing.assert_close(found, wanted)


def test_a_single_sample_is_a_batch_of_one() -> None:
    layout, geometry = Layout((4, 2, 3)), ((1,), (1,), (1,), 1, False, None)
    x = randn(0, 2, 7)
    alone, batch = (torch.cat(list(input_rows("conv", x, layout, geometry))) for x in (x, x[None]))
    assert torch.equal(alone, batch) and alone.shape == (7, 6)


def test_large_inputs_are_unfolded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, geometry = Layout((4, 2, 3)), ((1,), (1,), (1,), 1, False, None)
    x = randn(0, 5, 2, 7)
    (whole,) = input_rows("conv", x, layout, geometry)
    monkeypatch.setattr(moments, "_BLOCK_ELEMENTS", 2 * 7 * 6)
    blocks = list(input_rows("conv", x, layout, geometry))
    assert [len(block) for block in blocks] == [14, 14, 7]
    assert torch.equal(torch.cat(blocks), whole)


@pytest.mark.parametrize("product", ["linear", "linear_t"])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_product_lie_along_the_vectors_or_there_are_none(product: str, transposed: bool) -> None:
    tensor = randn(0, 5, 8)
    layout = Layout((5, 8), transposed=transposed)
    x = randn(1, 2, 3, 8 if product == "linear" else 5)
    rows = list(input_rows(product, x, layout))
    if transposed != (product == "linear_t"):
        assert not rows
        return
    wanted = F.linear(x, tensor) if product == "linear" else x @ tensor
    torch.testing.assert_close(rows[0] @ layout.to_vectors(tensor).t(), wanted.reshape(6, -1))


def test_across_the_vectors_there_is_nothing() -> None:
    geometry = ((1,), (0,), (1,), 1, True, (0,))
    assert not list(input_rows("conv", randn(0, 1, 4, 5), Layout((4, 2, 3)), geometry))  # transposed
    assert not list(input_rows("lookup", torch.arange(3), Layout((4, 2))))
    assert not list(input_rows("linear", randn(0, 3, 4), Layout((5, 8))))  # a part of the columns only


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    (rows,) = input_rows("linear", randn(0, 3, 8, dtype=dtype), Layout((5, 8)))
    assert rows.dtype == torch.float32


@given(seeds, st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_moments_are_means_over_all_rows(seed: int, sizes: list[int]) -> None:
    full, energy = Moments(), Moments(energy_only=True)
    assert full.mean is None and energy.mean is None
    parts = [randn(seed + i, size, 6) for i, size in enumerate(sizes)]
    for part in parts:
        before: Tensor = part.clone()
        full.add(part)
        energy.add(part)
        assert torch.equal(part, before)
    rows: Any = torch.cat(parts)
    assert full.rows == energy.rows == len(rows)
    wanted = rows.t() @ rows / max(1, len(rows))
    torch.testing.assert_close(full.mean, wanted)
    torch.testing.assert_close(energy.mean, wanted.diagonal())


@given(seeds, st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 4), st.booleans())
def test_parts_that_are_merged_in_order_are_the_whole_to_the_last_bit(
    seed: int, sizes: list[int], count: int, energy: bool
) -> None:
    whole, parts = Moments(energy), [Moments(energy) for _ in range(count)]
    for number, size in enumerate(sizes):
        batch = Moments(energy)
        batch.add(randn(seed + number, size, 6, dtype=torch.float32), randn(seed, size, dtype=torch.float32).abs())
        for part, some in zip(parts, batch.parts(count), strict=True):
            part.merge(some)
        copied = Moments(energy)
        copied.merge(batch.joined(batch.parts(count)))
        whole.merge(copied)
    joined = parts[-1].joined(parts)
    assert joined.rows == whole.rows == sum(sizes)
    assert joined.mean is not None and whole.mean is not None and torch.equal(joined.mean, whole.mean)


def test_nothing_merges_and_joins_to_nothing() -> None:
    empty = Moments()
    empty.merge(Moments())
    assert empty.mean is None and empty.joined(empty.parts(3)).mean is None
