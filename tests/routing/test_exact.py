"""The exact router is where coordinate descent ends, and its gradient is that of the equation it solves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.errors import InputError, SpecError
from rpqfx.routing import coordinate_descent, exact_offset, exact_scores
from tests.helpers import generator, randn, seeds


def drawn_mask(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator(seed)) < 0.7


@given(seeds, st.integers(1, 40), st.floats(0.5, 45), st.sampled_from([0.01, 0.1, 1.0]), st.booleans())
def test_scores_are_the_equation(seed: int, n: int, k: float, eps: float, masked: bool) -> None:
    """They are min(1, exp((s + a) / eps)) for one a a row and sum to k, or are 1 where there are no more than k."""
    s, mask = randn(seed, 3, n), drawn_mask(seed, 3, n) if masked else torch.ones(3, n, dtype=torch.bool)
    given_mask = mask if masked else None
    scores = exact_scores(s, k, eps=eps, mask=given_mask)
    offset = exact_offset(s, k, eps=eps, mask=given_mask)
    assert bool((scores[~mask] == 0).all())
    for row in range(3):
        found, count = scores[row][mask[row]], int(mask[row].sum())
        if count <= k:
            assert bool((found == 1).all()) and offset[row] == torch.inf
        else:
            assert float(found.sum()) == pytest.approx(k, rel=1e-9)
            expected = ((s[row][mask[row]] + offset[row]) / eps).exp().clamp(max=1)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eps", [0.001, 0.03, 0.1, 1.0])
@pytest.mark.parametrize("k", [1, 512, 1152.5, 8191])
def test_float32_sums_to_k(eps: float, k: float) -> None:
    """Also when eps is so small that exp(s / eps) would be far out of range."""
    scores = exact_scores(30 * randn(0, 2, 8192, dtype=torch.float32), k, eps=eps)
    assert scores.isfinite().all() and bool((scores <= 1).all())
    assert ((scores.sum(-1) - k).abs() < 1e-3 * k).all()


@pytest.mark.parametrize(("k", "eps"), [(5, 0.1), (64, 0.1), (64.5, 1.0), (200, 0.5)])
def test_coordinate_descent_ends_there(k: float, eps: float) -> None:
    s, mask = randn(0, 2, 512), drawn_mask(0, 2, 512)
    torch.testing.assert_close(exact_scores(s, k, eps=eps), coordinate_descent(s, k, eps=eps, n_iters=3000))
    many = coordinate_descent(s, k, eps=eps, n_iters=3000, mask=mask)
    torch.testing.assert_close(exact_scores(s, k, eps=eps, mask=mask), many)


@pytest.mark.parametrize("k", [1.0, 3.5, 8, 20, torch.tensor([1, 2.5, 7])], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(k: float | Tensor, masked: bool) -> None:
    s, mask = randn(4, 3, 12).requires_grad_(), drawn_mask(4, 3, 12) if masked else None
    assert torch.autograd.gradcheck(lambda s: exact_scores(s, k, eps=0.3, mask=mask), s)
    assert torch.autograd.gradgradcheck(lambda s: exact_scores(s, k, eps=0.3, mask=mask), s)
    if isinstance(k, float):
        assert torch.autograd.gradcheck(lambda s: exact_offset(s, k, eps=0.3, mask=mask), s)


def test_gradients_are_those_of_converged_descent() -> None:
    s, seen = randn(1, 2, 100).requires_grad_(), randn(2, 2, 100)
    ours, theirs = (
        torch.autograd.grad((scores * seen).sum(), s)[0]
        for scores in (exact_scores(s, 10, eps=0.2), coordinate_descent(s, 10, eps=0.2, n_iters=2000))
    )
    torch.testing.assert_close(ours, theirs)


def test_each_row_may_have_a_k_of_its_own() -> None:
    s, k = randn(0, 2, 3, 50), torch.tensor([[1, 2.5, 50], [60, 49.5, 0]])
    scores = exact_scores(s, k)
    torch.testing.assert_close(scores.sum(-1), k.clamp(max=50).double())
    torch.testing.assert_close(scores[0, 1], exact_scores(s[0, 1], 2.5))
    some = torch.tensor([3.0, 7.0])
    assert torch.equal(exact_scores(s[0, :2], some, most=7), exact_scores(s[0, :2], some))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes_and_autocast_get_float32(dtype: torch.dtype) -> None:
    s = randn(0, 2, 500).to(dtype)
    assert exact_scores(s, 9).dtype == torch.float32
    assert torch.equal(exact_scores(s, 9), exact_scores(s.float(), 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exact_scores(s, 9), exact_scores(s.float(), 9))


def test_only_the_scores_are_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    s = randn(0, 2, 1000, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scores = exact_scores(s, 50)
    assert len(kept) == 1 and torch.equal(kept[0], scores)


def test_ties_share_alike() -> None:
    scores = exact_scores(torch.tensor([0.0, 0.0, 0.0, -100.0]), 2)
    torch.testing.assert_close(scores, torch.tensor([2 / 3, 2 / 3, 2 / 3, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"s": torch.arange(4)}, "floating logits, got torch.int64"),
        ({"mask": torch.ones(4)}, r"got torch.float32: try mask.bool\(\)"),
        ({"eps": 0}, "eps must be above zero, got 0"),
        ({"k": 0}, "above zero, got 0"),
        ({"k": -2}, "above zero, got -2"),
    ],
)
def test_what_cannot_be_routed_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises((InputError, SpecError), match=message):
        exact_scores(**{"s": torch.zeros(4), "k": 2, **arguments})
