"""k-means: exact where it can be, never worse from step to step, the same for the same seed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.fit import k_means, kmeans
from rpqfx.fit.k_means import _means, _start
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
    monkeypatch.setattr(k_means, "_COUNT_DISTINCT", 10)
    points = randn(0, 50, 1, dtype=torch.float32) + 1000
    for entries in (50, 60):
        centres, codes = kmeans(points, entries)
        assert len(centres) == entries and torch.equal(centres[codes], points)


@pytest.mark.parametrize("count_distinct", [10, 10**6])
def test_a_sample_stands_for_all_points(monkeypatch: pytest.MonkeyPatch, count_distinct: int) -> None:
    """However points are ordered and repeated, clusters of a sample serve all points nearly as well."""
    monkeypatch.setattr(k_means, "_COUNT_DISTINCT", count_distinct)
    points = (randn(0, 3000, 1) * 20).round().sort(0).values
    errors = []
    for samples in (10**6, 100):
        monkeypatch.setattr(k_means, "_SAMPLES_PER_ENTRY", samples)
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


def weighted_error(points: Tensor, weights: Tensor, centres: Tensor, codes: Tensor) -> float:
    return float((weights[:, None] * (points - centres[codes]).square()).double().sum())


def drawn_weights(seed: int, num: int) -> Tensor:
    """Of very different sizes, some zero."""
    weights = randn(seed + 1, num).mul(3).exp()
    return torch.where(randn(seed + 2, num) > 0.7, 0.0, weights)


@given(seeds, st.integers(2, 60), st.integers(1, 3), st.integers(1, 12), st.booleans(), st.booleans())
def test_no_weighted_step_increases_the_error(
    seed: int, num: int, d: int, entries: int, lattice: bool, given_start: bool
) -> None:
    """So the result is never worse than its start, whether that is drawn or given."""
    points, weights = randn(seed, num, d), drawn_weights(seed, num)
    points = points.round() if lattice else points
    start = randn(seed + 3, entries, d) if given_start else None
    found = [kmeans(points, entries, weights=weights, steps=steps, seed=seed, start=start) for steps in range(6)]
    errors = [weighted_error(points, weights, *each) for each in found]
    if start is not None:
        errors.insert(0, weighted_error(points, weights, start, nearest(points, start)[0]))
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 1e-9) + 1e-12


@given(seeds, st.integers(1, 40), st.integers(1, 20), st.integers(1, 3), st.integers(1, 12))
def test_points_of_weight_zero_get_codes_but_move_nothing(
    seed: int, num: int, others: int, d: int, entries: int
) -> None:
    points, far = randn(seed, num, d), randn(seed + 1, others, d) * 100
    weights = randn(seed + 2, num).exp()
    alone = kmeans(points, entries, weights=weights, seed=seed)
    both = kmeans(torch.cat([far, points]), entries, weights=torch.cat([torch.zeros(others), weights]), seed=seed)
    assert torch.equal(both[0], alone[0]) and torch.equal(both[1][others:], alone[1])
    assert torch.equal(both[1][:others], nearest(far, alone[0])[0])


@given(seeds, st.integers(2, 30), st.integers(1, 3), st.integers(1, 6))
def test_a_weight_is_a_number_of_repetitions(seed: int, num: int, d: int, entries: int) -> None:
    """From the same start, each step gives the same centres, except where a cluster runs empty."""
    points, times = randn(seed, num, d), torch.randint(1, 5, (num,), generator=generator(seed))
    start = points[:entries] + 0.1
    if len(start) < entries or len(points.unique(dim=0)) <= entries:
        return
    repeated = points.repeat_interleave(times, 0)
    for steps in (1, 4):
        ours, ours_codes = kmeans(points, entries, weights=times.double() * 7, steps=steps, start=start)
        theirs, theirs_codes = kmeans(repeated, entries, steps=steps, start=start)
        if (torch.bincount(nearest(points, start)[0], minlength=entries) > 0).all():
            torch.testing.assert_close(ours, theirs)
            assert torch.equal(ours_codes.repeat_interleave(times), theirs_codes)


def test_weights_that_are_all_zero_count_as_ones() -> None:
    points = randn(0, 50, 2)
    ours, ones = (kmeans(points, 5, weights=weights) for weights in (torch.zeros(50), torch.ones(50)))
    assert torch.equal(ours[0], ones[0]) and torch.equal(ours[1], ones[1])


@pytest.mark.parametrize("weights", [torch.ones(4), torch.tensor([1.0, -1, 1]), torch.tensor([1, float("nan"), 1])])
def test_weights_that_make_no_sense_are_refused(weights: Tensor) -> None:
    with pytest.raises(InputError, match="weights are"):
        kmeans(randn(0, 3, 2), 2, weights=weights)


def test_no_points_and_a_start_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match="no points"):
        kmeans(torch.ones(0, 2), 2)
    with pytest.raises(InputError, match=r"start is \[K, d\], expected \[2, 3\]"):
        kmeans(torch.ones(5, 3), 2, start=torch.ones(3, 2))


@given(seeds, st.integers(1, 5), st.integers(1, 200), st.integers(1, 30))
def test_nothing_is_raised_for_few_values(seed: int, values: int, num: int, entries: int) -> None:
    """Counted or not, and however they are weighted."""
    points = randn(seed, values, 2, dtype=torch.float32)[torch.randint(values, (num,), generator=generator(seed))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(k_means, "_COUNT_DISTINCT", seed % 2 * 1000)
        centres, codes = kmeans(points, entries, weights=drawn_weights(seed, num), seed=seed)
    assert centres.shape == (entries, 2) and centres.isfinite().all()
    assert codes.min() >= 0 and codes.max() < entries


def test_the_start_prefers_points_that_are_far_and_heavy() -> None:
    """Three tight clusters get one entry each; a random start leaves one of them out most of the time."""
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]]).double()
    points = centres[torch.arange(300) // 5 % 3 * (torch.arange(300) > 270)] + randn(0, 300, 2) * 0.01
    for seed in range(10):
        found = _start(points, None, 3, generator(seed))
        assert len(set(nearest(found, centres)[0].tolist())) == 3
    weights = torch.ones(300, dtype=torch.float64)
    weights[7] = 1e9
    assert torch.equal(_start(points, weights, 1, generator(0)), points[7:8])


def test_many_entries_are_drawn_several_at_a_time_and_lie_apart() -> None:
    points = randn(0, 4000, 2)
    drawn = _start(points, None, 500, generator(0))
    random = points[torch.randperm(4000, generator=generator(0))[:500]]
    assert drawn.shape == (500, 2)
    assert nearest(points, drawn)[1].mean() < 0.8 * nearest(points, random)[1].mean()


def test_threads_change_nothing() -> None:
    points, before = randn(0, 20_000, 4, dtype=torch.float32), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(kmeans(points, 300, weights=drawn_weights(0, 20_000), steps=3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(found[0], each, strict=True))
