"""Residual codes: encoding is never worse than before, training never worse from turn to turn."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.fit import residual
from rpqfx.fit.refitting import left_over
from rpqfx.fit.residual import encode, train
from rpqfx.ops.search import beam_search
from tests.helpers import generator, randn, seeds

small = (st.integers(1, 40), st.integers(1, 3), st.integers(1, 9), st.integers(1, 3))


def errors(points: Tensor, books: Tensor, codes: Tensor) -> Tensor:
    return left_over(points, codes, books).square().sum(1)


@given(seeds, *small, st.integers(1, 5), st.integers(0, 2))
def test_no_point_is_encoded_worse_than_greedily_or_than_before(
    seed: int, num: int, stages: int, entries: int, d: int, beam: int, passes: int
) -> None:
    points, books = randn(seed, num, d), randn(seed + 1, stages, entries, d)
    codes = encode(points, books, beam=beam, passes=passes)
    assert codes.shape == (num, stages) and codes.dtype == torch.int64
    found = errors(points, books, codes)
    assert (found <= beam_search(points, books, 1)[1] + 1e-9).all()
    assert (errors(points, books, encode(points, books, beam=beam, passes=passes + 1)) <= found + 1e-9).all()
    drawn = torch.randint(entries, (num, stages), generator=generator(seed))
    kept = encode(points, books, beam=beam, passes=passes, codes=drawn)
    assert (errors(points, books, kept) <= errors(points, books, drawn) + 1e-9).all()


def test_a_wider_beam_and_choosing_anew_help() -> None:
    points = randn(0, 2000, 8)
    books = randn(1, 3, 16, 8) * torch.tensor([1, 0.7, 0.5])[:, None, None]
    greedy, anew, wide = (
        float(errors(points, books, encode(points, books, beam=beam, passes=passes)).mean())
        for beam, passes in ((1, 0), (1, 2), (8, 0))
    )
    assert anew < 0.95 * greedy and wide < 0.9 * greedy


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    points, books = randn(0, 100, 4, dtype=torch.float32), randn(1, 3, 10, 4, dtype=torch.float32)
    whole = encode(points, books)
    kept = encode(points, books, codes=whole.flip(0))
    monkeypatch.setattr(residual, "_BLOCK_POINTS", 7)
    assert torch.equal(encode(points, books), whole)
    assert torch.equal(encode(points, books, codes=whole.flip(0)), kept)


@pytest.mark.few(30)
@given(seeds, *small, st.integers(1, 4))
def test_no_turn_and_no_stage_increases_the_error(
    seed: int, num: int, stages: int, entries: int, d: int, beam: int
) -> None:
    """The same codebooks come out of it again, and weights of zero are no trouble."""
    points = randn(seed, num, d)
    weights = randn(seed + 1, num).exp() * (randn(seed + 2, num) < 1)
    share = weights if (weights > 0).any() else torch.ones(num)

    def error(stages: int, steps: int) -> float:
        books, codes = train(points, stages, entries, weights=weights, steps=steps, beam=beam, seed=seed)
        assert books.shape == (stages, entries, d) and codes.shape == (num, stages) and books.isfinite().all()
        return float((share * errors(points, books, codes)).sum())

    by_stage = [error(more, 2) for more in range(1, stages + 1)]
    for before, after in itertools.pairwise(by_stage):
        assert after <= before * (1 + 1e-9) + 1e-9
    assert error(stages, 2) == by_stage[-1]


def test_turns_improve_on_stages_as_they_start() -> None:
    points = randn(0, 3000, 8, dtype=torch.float32)
    start, trained = (float(errors(points, *train(points, 3, 16, beam=beam)).mean()) for beam in (1, 8))
    assert trained < 0.85 * start


def test_a_sample_stands_for_all_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points, weights = randn(0, 6000, 4, dtype=torch.float32), randn(1, 6000).exp()
    found = []
    for samples in (10**6, 200):
        monkeypatch.setattr(residual, "_SAMPLES_PER_ENTRY", samples)
        books, codes = train(points, 2, 8, weights=weights, seed=1)
        assert codes.shape == (6000, 2)
        found.append(float((weights * errors(points, books, codes)).sum()))
    assert found[0] != found[1] and found[1] < 1.1 * found[0]


@pytest.mark.parametrize("num", [1, 2, 50])
def test_identical_points_are_no_trouble(num: int) -> None:
    points = torch.full((num, 3), 0.1)
    books, codes = train(points, 3, 4)
    assert torch.equal(left_over(points, codes, books), torch.zeros(num, 3))
