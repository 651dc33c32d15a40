"""The nearest centre is what a loop over all centres finds, by the kernel and by torch's operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.ops import search
from rpqfx.ops.cpu import build, kernels
from rpqfx.ops.search import nearest
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
