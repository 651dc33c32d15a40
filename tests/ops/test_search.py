"""Searches find what a loop over all centres finds, by the kernels and by torch's operators."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.ops import search
from rpqfx.ops.cpu import build, kernels
from rpqfx.ops.search import beam_search, cosine_search, firsts, nearest, residual_search
from tests.helpers import randn, seeds

dtypes = st.sampled_from([torch.float32, torch.float64])
needs_kernels = pytest.mark.skipif(not build.ready(), reason="no compiled kernels on this machine")


def assert_nearest(points: Tensor, centres: Tensor) -> None:
    """Codes of the least distances, but for what rounding makes equal, and the distances of these codes."""
    codes, distances = nearest(points, centres)
    assert codes.dtype == torch.int64 and distances.dtype == points.dtype
    assert codes.shape == distances.shape == (len(points),)
    if not len(points):
        return
    exact = (points.double()[:, None] - centres.double()).square().sum(-1)
    found = exact.gather(1, codes[:, None])[:, 0]
    spread = (points.double() - centres.double().mean(0)).square().sum(1) + exact.max()
    eps = torch.finfo(points.dtype).eps
    assert (found - exact.min(1).values <= 8 * eps * spread).all()
    torch.testing.assert_close(distances.double(), found, rtol=16 * eps, atol=0)


@given(st.sampled_from([0, 1, 3, 8, 63, 64, 65, 200]), st.integers(1, 70), st.integers(1, 40), seeds, dtypes)
def test_codes_are_those_of_the_least_distances(n: int, entries: int, d: int, seed: int, dtype: torch.dtype) -> None:
    assert_nearest(randn(seed, n, d, dtype=dtype), randn(seed + 1, entries, d, dtype=dtype))


@pytest.mark.parametrize("entries", [255, 4096, 5000])
@pytest.mark.parametrize("d", [1, 4, 16, 17])
def test_more_centres_than_fit_in_a_cache(entries: int, d: int) -> None:
    assert_nearest(randn(0, 100, d, dtype=torch.float32), randn(1, entries, d, dtype=torch.float32))


@given(st.integers(1, 100), st.integers(1, 5), seeds, dtypes)
def test_the_first_of_equal_centres_is_taken(entries: int, d: int, seed: int, dtype: torch.dtype) -> None:
    centres = randn(seed, entries, d, dtype=dtype).round()
    first = [min(j for j in range(entries) if torch.equal(centres[j], centres[k])) for k in range(entries)]
    assert nearest(centres, centres)[0].tolist() == first
    assert firsts(centres).tolist() == first


@given(
    st.integers(1, 90), st.sampled_from([1, 2, 3, 8, 17, 40, 130]), seeds,
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([("nearest", 1), ("beam", 1), ("beam", 2), ("beam", 5), ("cosine", 1)]),
)  # fmt: skip
def test_every_search_takes_the_first_of_equal_entries(
    entries: int, d: int, seed: int, dtype: torch.dtype, way: tuple[str, int]
) -> None:
    """Entries with all their bits in use, each there several times, wherever a register or a block ends."""
    kind, beam = way
    g = torch.Generator().manual_seed(seed)
    books = randn(seed, 2, max(1, entries // 3), d, dtype=dtype) * 1.7 + 0.3
    books = books[:, torch.randint(books.shape[1], (entries,), generator=g)]
    points = randn(seed + 1, 30, d, dtype=dtype)
    if kind == "nearest":
        codes = nearest(points, books[0])[0][:, None]
    else:
        codes = residual_search(points, books, beam=beam, cosine=kind == "cosine")[0]
    for code, book in zip(codes.t(), books, strict=False):
        assert all(int(k) == min((book == book[k]).all(1).nonzero()[:, 0].tolist()) for k in code)


def test_both_zeros_are_one_number_and_nan_equals_nothing() -> None:
    centres = torch.tensor([[0.0, 1], [-0.0, 1], [math.nan, 1], [math.nan, 1], [math.inf, 0], [math.inf, -0.0]])
    assert firsts(centres).tolist() == [0, 0, 2, 3, 4, 4]
    assert firsts(torch.zeros(3, 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["points", "books"])
def test_searches_of_what_is_not_finite_give_codes_in_range(where: str, bad: float, dtype: torch.dtype) -> None:
    points, books = randn(0, 30, 3, dtype=dtype), randn(1, 2, 9, 3, dtype=dtype)
    (points if where == "points" else books[1])[4, 1] = bad
    for way in ({}, {"beam": 3}, {"cosine": True}):
        codes, _ = residual_search(points, books, **way)
        assert codes.min() >= 0 and codes.max() < 9
        if where == "points":
            rest = [n for n in range(30) if n != 4]
            assert torch.equal(codes[rest], residual_search(points[rest], books, **way)[0])


@given(seeds, dtypes, st.sampled_from([1e3, 1e6]))
def test_far_from_the_origin(seed: int, dtype: torch.dtype, offset: float) -> None:
    points, centres = ((randn(seed + i, 40, 3) * 8).round().to(dtype) + offset for i in range(2))
    exact = (points[:, None] - centres).square().sum(-1)
    assert torch.equal(nearest(points, centres)[1], exact.min(1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_views_are_read_right(dtype: torch.dtype) -> None:
    assert_nearest(randn(0, 6, 50, dtype=dtype).t(), randn(1, 80, 12, dtype=dtype)[::2, ::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_codes_are_in_range_whatever_comes_in(dtype: torch.dtype, bad: float) -> None:
    points, centres = randn(0, 70, 3, dtype=dtype), randn(1, 5, 3, dtype=dtype)
    points[::2, 1] = bad
    assert nearest(points, centres)[0].max() < 5
    centres[2] = bad
    codes, _ = nearest(points, centres)
    assert codes.min() >= 0 and codes.max() < 5


@needs_kernels
def test_the_kernel_runs_for_float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    run = kernels.nearest
    monkeypatch.setattr(kernels, "nearest", lambda *args: called.append(args[0].dtype) or run(*args))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        nearest(torch.ones(3, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype))
    assert called == [torch.float32]
    with torch._subclasses.FakeTensorMode():
        assert nearest(torch.ones(3, 2), torch.ones(2, 2))[0].shape == (3,)
    assert called == [torch.float32]


@needs_kernels
def test_threads_and_neighbours_change_nothing() -> None:
    points, centres = randn(0, 10_000, 8, dtype=torch.float32), randn(1, 300, 8, dtype=torch.float32)
    whole = nearest(points, centres)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threaded = nearest(points, centres)
    finally:
        torch.set_num_threads(before)
    parts = [nearest(part, centres) for part in points.split(37)]
    for i in range(2):
        assert torch.equal(whole[i], threaded[i])
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


@needs_kernels
@pytest.mark.parametrize("bad", [((3, 2), (4, 3)), ((3, 2), (0, 2)), ((3,), (4, 3))])
def test_shapes_that_do_not_go_together_are_refused(bad: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="do not go with"):
        kernels.nearest(torch.ones(bad[0]), torch.ones(bad[1]))


def test_without_kernels_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centres = randn(0, 500, 4, dtype=torch.float32), randn(1, 50, 4, dtype=torch.float32)
    ours = nearest(points, centres)
    monkeypatch.setattr(build, "ready", lambda: False)
    monkeypatch.setattr(search, "_BLOCK_ELEMENTS", 1000)
    blocks = nearest(points, centres)
    assert torch.equal(ours[0], blocks[0])
    torch.testing.assert_close(ours[1], blocks[1])


def naive_beam(point: Tensor, books: Tensor, beam: int) -> tuple[float, list[int]]:
    sums: list[tuple[float, list[int]]] = [(math.inf, [])]
    for book in books:
        longer = [[*codes, k] for _, codes in sums for k in range(len(book))]
        found = [torch.stack([books[r, k] for r, k in enumerate(codes)]).sum(0) for codes in longer]
        sums = sorted((float((point - x).square().sum()), codes) for x, codes in zip(found, longer, strict=True))[:beam]
    return sums[0]


@given(
    st.integers(0, 5), st.integers(1, 3), st.integers(1, 20), st.sampled_from([1, 3, 8, 17]), st.integers(1, 5), seeds,
    dtypes,
)  # fmt: skip
def test_a_beam_goes_on_with_the_best_sums(
    n: int, stages: int, entries: int, d: int, beam: int, seed: int, dtype: torch.dtype
) -> None:
    points, books = randn(seed, n, d, dtype=dtype) + 3, randn(seed + 1, stages, entries, d, dtype=dtype) + 1
    codes, distances = beam_search(points, books, beam)
    assert codes.shape == (n, stages) and codes.dtype == torch.int64 and distances.dtype == dtype
    for point, code, distance in zip(points.double(), codes.tolist(), distances.tolist(), strict=True):
        found = sum(books[r, k].double() for r, k in enumerate(code))
        assert distance == pytest.approx(float((point - found).square().sum()), rel=1e-4, abs=1e-5)
        assert distance == pytest.approx(naive_beam(point, books.double(), beam)[0], rel=1e-4, abs=1e-4)


@given(st.integers(1, 3), st.integers(1, 6), seeds, dtypes)
def test_a_beam_as_wide_as_all_sums_finds_the_best(stages: int, entries: int, seed: int, dtype: torch.dtype) -> None:
    points, books = randn(seed, 20, 3, dtype=dtype), randn(seed + 1, stages, entries, 3, dtype=dtype)
    sums = torch.zeros(1, 3, dtype=dtype)
    for book in books:
        sums = (sums[:, None] + book).view(-1, 3)
    exact = (points[:, None] - sums).square().sum(-1).min(1).values
    torch.testing.assert_close(beam_search(points, books, entries**stages)[1], exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_beam_reads_views_and_gives_codes_in_range(dtype: torch.dtype) -> None:
    points, books = randn(0, 6, 50, dtype=dtype).t(), randn(1, 4, 80, 12, dtype=dtype)[::2, ::4, ::2]
    ours, plain = (
        beam_search(points, books, 3),
        beam_search(points.contiguous(), books.contiguous(), 3),
    )
    assert torch.equal(ours[0], plain[0])
    points[::3] = float("nan")
    codes, _ = beam_search(points, books, 3)
    assert codes.min() >= 0 and codes.max() < 20
    assert torch.equal(codes[1::3], ours[0][1::3])


@needs_kernels
def test_without_kernels_a_beam_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    points, books = randn(0, 300, 8, dtype=torch.float32), randn(1, 3, 100, 8, dtype=torch.float32)
    ours = beam_search(points, books, 8)
    monkeypatch.setattr(build, "ready", lambda: False)
    monkeypatch.setattr(search, "_BLOCK_ELEMENTS", 10_000)
    blocks = beam_search(points, books, 8)
    assert torch.equal(ours[0], blocks[0])
    torch.testing.assert_close(ours[1], blocks[1], rtol=1e-4, atol=1e-5)


@given(
    st.integers(0, 5), st.integers(1, 3), st.integers(1, 20), st.sampled_from([2, 3, 8, 17]), seeds, dtypes
)  # fmt: skip
def test_by_cosine_each_stage_takes_the_entry_that_points_the_same_way(
    n: int, stages: int, entries: int, d: int, seed: int, dtype: torch.dtype
) -> None:
    """Its length does not count when it is chosen, and counts when it is taken off."""
    points, books = randn(seed, n, d, dtype=dtype), randn(seed + 1, stages, entries, d, dtype=dtype)
    books *= randn(seed + 2, stages, entries, 1, dtype=dtype).exp()
    codes, distances = cosine_search(points, books)
    assert codes.shape == (n, stages) and codes.dtype == torch.int64 and distances.dtype == dtype
    for point, code, distance in zip(points.double(), codes.tolist(), distances.tolist(), strict=True):
        rest = point
        for k, book in zip(code, books.double(), strict=True):
            cosines = [float(rest @ entry / (rest.norm() * entry.norm())) for entry in book]
            assert cosines[k] == pytest.approx(max(cosines), abs=1e-5)
            rest = rest - book[k]
        assert distance == pytest.approx(float(rest.square().sum()), rel=1e-4, abs=1e-5)


def test_by_cosine_the_first_of_equal_directions_is_taken_and_zero_has_none() -> None:
    books = torch.tensor([[[2.0, 0], [1, 0], [0, 0], [0, 3]]])
    points = torch.tensor([[5.0, 0.1], [0.1, 5], [0, 0], [-1, -2]])
    assert cosine_search(points, books)[0][:, 0].tolist() == [0, 3, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beam", [1, 3])
def test_stage_by_stage_is_a_beam_of_one(dtype: torch.dtype, beam: int) -> None:
    """By whatever way it runs."""
    points, books = randn(0, 40, 4, dtype=dtype), randn(1, 3, 30, 4, dtype=dtype)
    codes, distances = residual_search(points, books, beam=beam)
    found = search._beam(points, books, beam)
    assert torch.equal(codes, found[0])
    torch.testing.assert_close(distances, found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.traced
@pytest.mark.parametrize(
    ("dtype", "beam"),
    [
        (torch.float32, 3),
        (torch.float64, 1),
        pytest.param(torch.float32, 1, marks=pytest.mark.slow),
        pytest.param(torch.float64, 3, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_graph_has_it_as_one_operator(dtype: torch.dtype, beam: int) -> None:
    """For any number of points."""
    points, books = randn(0, 40, 4, dtype=dtype), randn(1, 3, 30, 4, dtype=dtype)
    torch.compiler.reset()
    run = torch.compile(residual_search, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (40, 7):
        for way in ({"beam": beam}, {"cosine": True}):
            ours, eager = run(points[:count], books, **way), residual_search(points[:count], books, **way)
            assert torch.equal(ours[0], eager[0]) and torch.equal(ours[1], eager[1])
    torch.library.opcheck(torch.ops.rpqfx.residual_search.default, (points, books, beam, False))
