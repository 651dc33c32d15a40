"""Claims on affine maps of low rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.fit.reduced_rank import PairSums, reduced_rank
from tests.helpers import generator, seeds


def pairs(seed: int, count: int, wide: int, out: int) -> tuple[Tensor, Tensor]:
    numbers = generator(seed)
    x = torch.randn(count, wide, generator=numbers, dtype=torch.float64) * 3 + 5
    mixed = x @ torch.randn(wide, out, generator=numbers, dtype=torch.float64)
    return x, mixed + torch.randn(count, out, generator=numbers, dtype=torch.float64) - 40


def summed(x: Tensor, y: Tensor, parts: int = 2) -> PairSums:
    sums = PairSums()
    for some, others in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        sums.add(some, others)
    return sums


@given(seeds, st.integers(2, 40), st.integers(1, 8), st.integers(1, 6), st.integers(0, 7), st.integers(1, 3))
def test_no_map_of_the_rank_has_less_error(seed: int, count: int, wide: int, out: int, rank: int, parts: int) -> None:
    """Eckart and Young, on the problem with the penalty as further rows."""
    x, y = pairs(seed, count, wide, out)
    fit, ridge = reduced_rank(summed(x, y, parts), rank, 0.1), 0.1
    assert fit.down.shape[1] == fit.up.shape[0] == min(rank, out)
    a, b = x - x.mean(0), y - y.mean(0)
    size = (a.square().sum() / wide * ridge).sqrt()
    a = torch.cat([a, size * torch.eye(wide, dtype=a.dtype)])
    b = torch.cat([b, b.new_zeros(wide, out)])
    basis = torch.linalg.qr(a).Q
    inside = basis.T @ b
    tail = torch.linalg.svdvals(inside)[rank:].square().sum()
    least = (b - basis @ inside).square().sum() + tail
    found = (b - a @ fit.down @ fit.up).square().sum()
    torch.testing.assert_close(found, least, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fit(x).mean(0), y.mean(0))
    torch.testing.assert_close(fit.sizes, (a @ fit.down).square().sum(0).div(count).sqrt(), rtol=1e-4, atol=1e-4)


@given(seeds, st.integers(1, 5))
def test_a_map_of_the_rank_is_found(seed: int, rank: int) -> None:
    x, _ = pairs(seed, 64, 8, 6)
    numbers = generator(seed + 1)
    made = [torch.randn(*shape, generator=numbers, dtype=torch.float64) for shape in ((8, rank), (rank, 6), (6,))]
    y = x @ made[0] @ made[1] + made[2]
    torch.testing.assert_close(reduced_rank(summed(x, y), rank, 1e-12)(x), y, rtol=1e-6, atol=1e-6)


def test_a_large_mean_costs_no_digits() -> None:
    x, y = pairs(0, 200, 4, 3)
    fits = [reduced_rank(summed(a.float(), b.float()), 2) for a, b in ((x, y), (x + 1000, y - 1000))]
    torch.testing.assert_close(fits[0].down @ fits[0].up, fits[1].down @ fits[1].up, rtol=1e-3, atol=1e-3)


def test_silent_inputs_and_none() -> None:
    fit = reduced_rank(summed(torch.zeros(4, 3), torch.ones(4, 2)), 1)
    assert torch.equal(fit(torch.zeros(1, 3, dtype=torch.float64)), torch.ones(1, 2, dtype=torch.float64))
    with pytest.raises(InputError, match="no pairs"):
        reduced_rank(PairSums(), 1)
    with pytest.raises(InputError, match="not finite"):
        reduced_rank(summed(torch.full((4, 3), torch.inf), torch.ones(4, 2)), 1)
