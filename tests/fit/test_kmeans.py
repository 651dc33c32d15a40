"""k-means: exact where it can be, never worse from step to step, the same for the same seed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.fit import kmeans
from rpqfx.fit import kmeans as kmeans_function
from rpqfx.fit.kmeans import _means
from rpqfx.ops import search
from rpqfx.ops.search import nearest
from tests.helpers import generator, randn, seeds


def error(points: Tensor, centres: Tensor, codes: Tensor) -> float:
    return float((points - centres[codes]).double().square().sum())


def brute_distances(points: Tensor, centres: Tensor) -> Tensor:
    return (points[:, None] - centres[None]).square().sum(-1)


@given(seeds, st.integers(1, 30), st.integers(1, 4), st.integers(0, 10), st.sampled_from([0.0, 1000.0]))
@example(seed=0, distinct=30, d=2, spare=0, offset=1000.0)
def test_exact_with_as_many_entries_as_distinct_points(
    seed: int, distinct: int, d: int, spare: int, offset: float
) -> None:
    """Also with repeated points, with entries to spare, and far from the origin, where distances cancel."""
    points = randn(seed, distinct, d, dtype=torch.float32) + offset
    points = points[torch.randint(distinct, (2 * distinct,), generator=generator(seed))]
    entries = max(1, len(points.unique(dim=0)) + spare)
    centres, codes = kmeans(points, entries, seed=seed)
    assert centres.shape == (entries, d) and codes.dtype == torch.int64
    assert torch.equal(centres[codes], points)


def test_exact_with_as_many_entries_as_points_that_are_too_many_to_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(kmeans_function.__globals__, "_COUNT_DISTINCT", 10)
    points = randn(0, 50, 1, dtype=torch.float32) + 1000
    for entries in (50, 60):
        centres, codes = kmeans(points, entries)
        assert len(centres) == entries and torch.equal(centres[codes], points)


@pytest.mark.parametrize("count_distinct", [10, 10**6])
def test_a_sample_stands_for_all_points(monkeypatch: pytest.MonkeyPatch, count_distinct: int) -> None:
    """However points are ordered and repeated, clusters of a sample serve all points nearly as well."""
    monkeypatch.setitem(kmeans_function.__globals__, "_COUNT_DISTINCT", count_distinct)
    points = (randn(0, 3000, 1) * 20).round().sort(0).values
    errors = []
    for samples in (10**6, 100):
        monkeypatch.setitem(kmeans_function.__globals__, "_SAMPLES_PER_ENTRY", samples)
        found = [kmeans(points, 4, steps=30, seed=seed) for seed in range(3)]
        errors.append(min(error(points, *one) for one in found))
        assert all(one[1].shape == (3000,) for one in found)
    assert errors[1] < 1.2 * errors[0]


@given(seeds, st.integers(2, 60), st.integers(1, 3), st.integers(1, 12), st.booleans())
def test_no_step_increases_the_error(seed: int, num: int, d: int, entries: int, lattice: bool) -> None:
    """On a coarse lattice points coincide and tie, and clusters run empty; the error still never grows."""
    points = randn(seed, num, d)
    points = points.round() if lattice else points
    errors = [error(points, *kmeans(points, entries, steps=steps, seed=seed)) for steps in range(8)]
    for before, after in itertools.pairwise(errors):
        assert after <= before + 1e-9


@given(seeds, st.integers(2, 60), st.integers(1, 3), st.integers(1, 12), st.sampled_from([0.0, 1e6]))
def test_each_point_is_with_its_nearest_centre(seed: int, num: int, d: int, entries: int, offset: float) -> None:
    """Also far from the origin."""
    points = randn(seed, num, d) + offset
    centres, codes = kmeans(points, entries, steps=3, seed=seed)
    distances = brute_distances(points, centres)
    torch.testing.assert_close(distances.gather(1, codes[:, None])[:, 0], distances.min(1).values)


def test_the_same_seed_gives_the_same_codes_and_another_seed_another_start() -> None:
    points = randn(0, 200, 3)
    state = torch.get_rng_state()
    first, again, other = (kmeans(points, 8, steps=2, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    points = randn(0, 50, 3)
    whole = kmeans(points, 6, seed=1)
    monkeypatch.setattr(search, "_BLOCK_ELEMENTS", 20)
    blocks = kmeans(points, 6, seed=1)
    assert torch.equal(whole[1], blocks[1])
    torch.testing.assert_close(whole[0], blocks[0])


@pytest.mark.parametrize("entries", [1, 2, 5, 64])
def test_identical_points_are_no_trouble(entries: int) -> None:
    centres, codes = kmeans(torch.full((20, 3), 0.1), entries)
    assert centres.shape == (entries, 3)
    assert torch.equal(centres[codes], torch.full((20, 3), 0.1))


def test_empty_clusters_move_to_the_worst_served_points() -> None:
    """Two entries without points go to the two points that are farthest from theirs."""
    points = torch.tensor([[0.0], [1.0], [2.0], [50.0], [90.0]])
    centres = torch.tensor([[1.0], [-500.0], [-600.0]])
    codes, distances = nearest(points, centres)
    assert codes.tolist() == [0] * 5
    moved = _means(points, codes, centres, distances)
    assert moved[0].item() == pytest.approx(float(points.mean()))
    assert sorted(moved[1:].flatten().tolist()) == [50.0, 90.0]


def test_well_separated_clusters_are_found() -> None:
    corners = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    points = corners.repeat_interleave(25, 0) + randn(0, 100, 2, dtype=torch.float32) * 0.1
    best = min((kmeans(points, 4, seed=seed) for seed in range(8)), key=lambda found: error(points, *found))
    assert error(points, *best) / len(points) < 0.1
    assert torch.equal(best[1].view(4, 25), best[1].view(4, 25)[:, :1].expand(4, 25))
