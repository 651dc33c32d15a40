"""Least squares for codebooks: the best for the codes, never worse than before, in place where nothing is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.fit import refit
from rpqfx.fit.refitting import left_over
from tests.helpers import generator, randn, seeds

stages = st.integers(1, 3)


def drawn(seed: int, num: int, stages: int, entries: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, codes, codebooks, and weights, some of them zero."""
    codes = torch.randint(entries, (num, stages), generator=generator(seed))
    weights = randn(seed + 2, num).exp() * (randn(seed + 3, num) < 1)
    return randn(seed, num, d), codes, randn(seed + 1, stages, entries, d), weights


def error(points: Tensor, codes: Tensor, books: Tensor, weights: Tensor) -> float:
    return float((weights[:, None] * left_over(points, codes, books).square()).sum())


@given(seeds, st.integers(1, 60), stages, st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_the_error_never_grows_and_entries_without_points_stay(
    seed: int, num: int, stages: int, entries: int, d: int, at_once: bool
) -> None:
    points, codes, books, weights = drawn(seed, num, stages, entries, d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(refit.__globals__, "_SOLVE_AT_ONCE", 10**6 if at_once else 0)
        for given_weights in (None, weights):
            new = refit(points, codes, books, given_weights)
            share = torch.ones(num) if given_weights is None else given_weights
            before, after = error(points, codes, books, share), error(points, codes, new, share)
            assert after <= before * (1 + 1e-9) + 1e-12
            for r in range(stages):
                mass = torch.zeros(entries, dtype=torch.float64).index_add_(0, codes[:, r], share.double())
                torch.testing.assert_close(new[r][mass == 0], books[r][mass == 0], rtol=1e-12, atol=1e-12)


@given(seeds, st.integers(1, 60), stages, st.integers(1, 9), st.integers(1, 3))
def test_the_error_is_the_least_there_is(seed: int, num: int, stages: int, entries: int, d: int) -> None:
    """What is left is at right angles to every entry's points."""
    points, codes, books, weights = drawn(seed, num, stages, entries, d)
    rest = left_over(points, codes, refit(points, codes, books, weights)) * weights[:, None]
    for r in range(stages):
        slope = torch.zeros(entries, d, dtype=torch.float64).index_add_(0, codes[:, r], rest)
        assert slope.abs().max() <= 1e-5 * (1 + float(weights.sum()))


def test_one_stage_gets_weighted_means() -> None:
    points = torch.tensor([[0.0], [3.0], [10.0]])
    new = refit(points, torch.tensor([[1], [1], [0]]), torch.zeros(1, 3, 1), torch.tensor([1.0, 2.0, 1.0]))
    assert new.flatten().tolist() == [10.0, 2.0, 0.0]


def test_stage_by_stage_comes_near_to_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    points, codes, books, weights = drawn(0, 2000, 3, 10, 4)
    best = error(points, codes, refit(points, codes, books, weights), weights)
    monkeypatch.setitem(refit.__globals__, "_SOLVE_AT_ONCE", 0)
    assert error(points, codes, refit(points, codes, books, weights), weights) < 1.001 * best


def test_sums_that_were_made_are_found_again() -> None:
    """In float32 as well, whose sums are in float64."""
    _, codes, books, _ = drawn(0, 5000, 3, 16, 8)
    books = books.float()
    points = -left_over(torch.zeros(5000, 8), codes, books)
    found = refit(points, codes, books + 0.3 * randn(1, 3, 16, 8).float())
    assert left_over(points, codes, found).abs().max() < 1e-5
