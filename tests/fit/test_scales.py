"""Factors of rows and columns: within bounds before coding, never worse after."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.fit.scales import balance, refit_columns, refit_rows
from tests.helpers import randn, seeds

shares = st.sampled_from([1, 2, 3, 6, 12])


def moments(seed: int, dim: int) -> Tensor:
    x = randn(seed, 50, 3) @ randn(seed + 1, 3, dim) + 0.3 * randn(seed + 2, 50, dim)
    return x.t() @ x


def loss(matrix: Tensor, made: Tensor, moment: Tensor) -> float:
    rest = matrix - made
    return float(((rest @ moment) * rest).sum())


@given(seeds, shares, st.booleans(), st.floats(-8, 8))
def test_a_balanced_matrix_has_root_mean_square_1(seed: int, share: int, known: bool, size: float) -> None:
    matrix = randn(seed, 7, 12) * 10**size
    energy = randn(seed + 1, 12).mul(2).exp() if known else None
    factors = balance(matrix, energy, share=share)
    assert factors.shape == (12 // share,) and bool((factors > 0).all())
    divided = matrix / factors.repeat_interleave(share)
    torch.testing.assert_close(divided.square().mean().sqrt(), torch.tensor(1.0, dtype=torch.float64))


@given(seeds, st.integers(0, 2), st.booleans())
def test_outliers_come_out_within_the_clip(seed: int, outliers: int, known: bool) -> None:
    matrix, energy = randn(seed, 64, 40), randn(seed + 1, 40).exp() if known else None
    for place in randn(seed + 2, outliers, 2).abs():
        matrix[int(place[0] * 9) % 64, int(place[1] * 9) % 40] = 100  # by value: a product could come out small
    divided = matrix / balance(matrix, energy, clip=4.0)
    assert float(divided.abs().max()) <= 4.0 * 1.001
    assert outliers == 0 or float((matrix / balance(matrix, energy, clip=1e9)).abs().max()) > 4.2


@given(seeds)
def test_columns_with_strong_inputs_come_out_large(seed: int) -> None:
    energy = randn(seed, 12).exp()
    factors = balance(torch.ones(5, 12, dtype=torch.float64), energy, clip=1e9, power=0.5)
    torch.testing.assert_close(factors * energy**0.25, (factors * energy**0.25)[:1].expand(12))


def test_silent_inputs_and_zero_columns_get_positive_factors() -> None:
    matrix = randn(0, 5, 8)
    matrix[:, 2] = 0
    assert bool((balance(matrix, torch.zeros(8)) > 0).all())
    assert bool((balance(matrix, torch.tensor([0.0] * 7 + [1.0])) > 0).all())
    assert torch.equal(balance(torch.zeros(5, 8), torch.ones(8)), torch.ones(8))


@given(seeds, shares)
def test_refitted_columns_are_the_least_squares_solution(seed: int, share: int) -> None:
    matrix, decoded, moment = randn(seed, 5, 12), randn(seed + 1, 5, 12), moments(seed + 2, 12)
    found = refit_columns(matrix, decoded, moment, share, ridge=0.0)
    root = torch.linalg.cholesky(moment + 1e-9 * torch.eye(12, dtype=torch.float64))
    spread = torch.eye(12 // share, dtype=torch.float64).repeat_interleave(share, 0)  # [D, D / share]
    design = torch.einsum("nd,dg,de->neg", decoded, spread, root).reshape(-1, 12 // share)
    wanted = torch.linalg.lstsq(design, (matrix @ root).reshape(-1, 1)).solution[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@given(seeds, shares, st.floats(0, 0.1))
def test_refitted_columns_are_never_worse(seed: int, share: int, ridge: float) -> None:
    matrix, moment = randn(seed, 5, 12), moments(seed + 2, 12)
    decoded = matrix + 0.5 * randn(seed + 1, 5, 12)
    factors = refit_columns(matrix, decoded, moment, share, ridge).repeat_interleave(share)
    assert loss(matrix, decoded * factors, moment) <= loss(matrix, decoded, moment) * (1 + 1e-9)


@given(seeds)
def test_refitted_rows_are_the_least_squares_solution_and_never_worse(seed: int) -> None:
    matrix, decoded, moment = randn(seed, 5, 12), randn(seed + 1, 5, 12), moments(seed + 2, 12)
    found = refit_rows(matrix, decoded, moment)
    for row, entries, factor in zip(matrix, decoded, found, strict=True):
        torch.testing.assert_close(factor, (entries @ moment @ row) / (entries @ moment @ entries))
        best = loss(row[None], factor * entries[None], moment)
        for other in (1.0, float(factor) * 1.01, float(factor) * 0.99):
            assert best <= loss(row[None], other * entries[None], moment) * (1 + 1e-9)


@given(seeds, shares)
def test_refits_with_outputs_are_the_least_of_their_loss(seed: int, share: int) -> None:
    """No small change of any factor brings the products nearer."""
    matrix, decoded = randn(seed, 5, 12), randn(seed + 1, 5, 12)
    moment, outputs = moments(seed + 2, 12), moments(seed + 3, 5)

    def felt(factored: Tensor) -> float:
        rest = matrix - factored
        return float(((rest @ moment) * (outputs @ rest)).sum())

    columns = refit_columns(matrix, decoded, moment, share, 0.0, outputs)
    rows = refit_rows(matrix, decoded, moment, 0.0, outputs)
    moved_columns, moved_rows = randn(seed + 4, 12 // share), randn(seed + 5, 5)
    for size in (0.1, -0.1):
        other = (columns + size * moved_columns).repeat_interleave(share)
        assert felt(decoded * columns.repeat_interleave(share)) <= felt(decoded * other) * (1 + 1e-6)
        assert felt(decoded * rows[:, None]) <= felt(decoded * (rows + size * moved_rows)[:, None]) * (1 + 1e-6)


@given(seeds, shares)
def test_outputs_that_do_not_go_together_change_no_factor(seed: int, share: int) -> None:
    matrix, decoded, moment = randn(seed, 5, 12), randn(seed + 1, 5, 12), moments(seed + 2, 12)
    outputs = 3 * torch.eye(5, dtype=torch.float64)
    found = refit_columns(matrix, decoded, moment, share, outputs=outputs)
    torch.testing.assert_close(found, refit_columns(matrix, decoded, moment, share))
    found = refit_rows(matrix, decoded, moment, 0.0, outputs)
    torch.testing.assert_close(found, refit_rows(matrix, decoded, moment))


def test_rows_that_inputs_do_not_see_keep_their_factor() -> None:
    moment = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    decoded = torch.tensor([[0.0, 0.0, 1.0, 2.0], [1.0, 1.0, 0.0, 0.0]])
    assert torch.equal(refit_rows(2 * decoded, decoded, moment), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("share", [1, 2])
def test_columns_without_entries_or_inputs_have_finite_factors(share: int) -> None:
    decoded, moment = randn(0, 5, 8), moments(1, 8)
    decoded[:, 2:4] = 0
    moment[6:], moment[:, 6:] = 0, 0
    assert bool(torch.isfinite(refit_columns(randn(2, 5, 8), decoded, moment, share)).all())
    zero = torch.zeros(8, 8, dtype=torch.float64)
    torch.testing.assert_close(refit_columns(randn(2, 5, 8), decoded, zero, share), decoded.new_ones(8 // share))
