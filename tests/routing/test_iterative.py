"""The routers that iterate come to what they promise."""

from __future__ import annotations

import pytest
import torch

from rpqfx.errors import SpecError
from rpqfx.routing import coordinate_descent, cumulative_softmax, exact_scores, sinkhorn
from tests.helpers import generator, randn

METHODS = {"coordinate_descent": coordinate_descent, "sinkhorn": sinkhorn, "cumulative_softmax": cumulative_softmax}


def test_a_shrinking_eps_comes_further_in_as_many_steps() -> None:
    """20 steps from eps 4 by 0.7 are nearer to the end than 20 at the last eps."""
    s = randn(0, 2, 4096)
    wanted = exact_scores(s, 256, eps=0.03)
    plain = coordinate_descent(s, 256, eps=0.03, n_iters=20)
    scaled = coordinate_descent(s, 256, eps=0.03, n_iters=20, eps_init=4.0)
    assert (scaled - wanted).abs().sum() < 0.5 * (plain - wanted).abs().sum()


def test_sinkhorn_fills_both_places() -> None:
    """k to one, the rest to the other, and sigmoid((s + a) / eps) for one a a row."""
    s = randn(0, 3, 60)
    scores = sinkhorn(s, 7.5, eps=0.5, n_iters=500)
    torch.testing.assert_close(scores.sum(-1), torch.full((3,), 7.5).double())
    offset = scores.logit() * 0.5 - s
    torch.testing.assert_close(offset, offset[:, :1].expand_as(offset))


def test_cumulative_softmax_is_the_share_among_those_below() -> None:
    s = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    e = s.exp()
    wanted = torch.stack([torch.ones(()).double(), e[1] / e.sum(), e[2] / (e[0] + e[2])])
    torch.testing.assert_close(cumulative_softmax(s, 2), wanted)


@pytest.mark.parametrize("name", METHODS)
def test_masked_tokens_change_nothing(name: str) -> None:
    """Their scores are 0, others' are as if they were not there; so are gradients."""
    method, s = METHODS[name], randn(1, 20)
    mask = torch.rand(20, generator=generator(3)) < 0.6
    few = s[mask].clone().requires_grad_()
    all_of = s.masked_fill(~mask, 50.0).requires_grad_()
    scores, alone = method(all_of, 4, mask=mask), method(few, 4)
    assert bool((scores[~mask] == 0).all())
    torch.testing.assert_close(scores[mask], alone, rtol=1e-6, atol=1e-9)
    seen = randn(2, 20)
    ours, theirs = (
        torch.autograd.grad((a * b).sum(), c)[0] for a, b, c in ((scores, seen, all_of), (alone, seen[mask], few))
    )
    torch.testing.assert_close(ours[mask], theirs, rtol=1e-6, atol=1e-9)
    assert bool((ours[~mask] == 0).all())


@pytest.mark.parametrize("name", METHODS)
def test_rows_with_no_more_than_k_tokens_are_chosen_whole(name: str) -> None:
    mask = torch.tensor([[True, False, True, False], [True, True, True, True]])
    scores = METHODS[name](randn(0, 2, 4), 2, mask=mask)
    assert torch.equal(scores[0], torch.tensor([1.0, 0, 1, 0]).double()) and scores[1].max() <= 1
    assert torch.equal(METHODS[name](randn(0, 2, 4), 4), torch.ones(2, 4).double())


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    steps = {} if name == "cumulative_softmax" else {"n_iters": 12}
    s = randn(7, 2, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: METHODS[name](s, 3, eps=0.5, **steps), s)


@pytest.mark.parametrize("name", ["coordinate_descent", "sinkhorn"])
def test_no_steps_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="n_iters must be at least 1, got 0"):
        METHODS[name](torch.zeros(4), 2, n_iters=0)
