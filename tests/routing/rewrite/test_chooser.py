"""Claims on which tokens take the heavy branch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.routing.rewrite.chooser import Chooser, Padding
from tests.helpers import seeds
from tests.routing.rewrite.models import WIDTH, x_of


def chooser(number: int | float, window: int | None = None, padding: Padding | None = None) -> Chooser:
    torch.manual_seed(0)
    return Chooser(WIDTH, number, window, padding or Padding(), {})


@given(seeds, st.integers(1, 40), st.integers(1, 12), st.one_of(st.integers(1, 14), st.floats(0.05, 1.0)))
def test_windows_are_full_and_the_future_changes_nothing(seed: int, n: int, window: int, number: int | float) -> None:
    x = x_of(seed, 1, n)
    choice = chooser(number, window)(x)
    slots = chooser(number, window)._slots(window)
    if n <= window or slots >= window:
        assert choice.indices is None and choice.mask is None and bool((choice.scores == 1).all())
        return
    assert choice.indices is not None and choice.mask is not None
    taken = choice.indices[0, 0][choice.mask[0, 0]]
    assert taken.tolist() == sorted(set(taken.tolist())) and bool((choice.indices.diff() >= 0).all())
    assert taken[:window].tolist() == list(range(window))
    for start in range(window, n - window + 1, window):
        assert int(((taken >= start) & (taken < start + window)).sum()) == slots
    assert choice.mask[0, 0].long().diff().max() <= 0  # slots without a token come last
    for cut in range(1, n):
        before = chooser(number, window)(x[:, :cut])
        held = torch.arange(cut) if before.indices is None else before.indices[0, 0][before.mask[0, 0]]  # type: ignore[index]
        if cut > window:
            assert held.tolist() == taken[taken < cut].tolist()


@given(seeds, st.integers(1, 30), st.one_of(st.integers(1, 30), st.floats(0.05, 1.0)))
def test_without_windows_the_highest_are_chosen_in_order(seed: int, n: int, number: int | float) -> None:
    x, choose = x_of(seed, 2, n), chooser(number)
    choice = choose(x)
    k = choose._slots(n)
    if k >= n:
        assert choice.indices is None
        return
    assert choice.indices is not None
    best = choose.router.logits(x)[:, 0].topk(k).indices.sort().values
    assert torch.equal(choice.indices[:, 0], best)


@pytest.mark.parametrize("window", [None, 6])
def test_padding_is_not_chosen(window: int | None) -> None:
    padding = Padding()
    x, choose = x_of(0), chooser(3, window, padding)
    padding.mask = torch.arange(x.shape[1]) >= torch.tensor([[0], [10]])
    choice = choose(x)
    assert choice.indices is not None and choice.mask is not None
    kept = padding.mask.gather(1, choice.indices[:, 0])
    assert bool((kept | ~choice.mask[:, 0]).all()) and bool((choice.scores[~choice.mask] == 0).all())
    padding.mask = padding.mask[:, :5]  # of other tokens
    assert choose(x).indices is not None


def test_all_tokens_are_all_whatever_the_mask() -> None:
    padding = Padding()
    padding.mask = torch.zeros(2, 24, dtype=torch.bool)
    assert chooser(1.0, None, padding)(x_of(0)).mask is None
