"""Nothing that comes later changes what came before, neither what is computed nor what is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.errors import InputError, SpecError
from rpqfx.routing import RoutedAutoregressiveAttention, RoutedFeedForward, Router
from rpqfx.routing.causal import choose_by_the_past
from tests.helpers import generator, randn, seeds

DIM = 8


def made(seed: int = 0, **options: Any) -> RoutedAutoregressiveAttention:
    torch.manual_seed(seed)
    sizes = {"light_dim_head": 4, "light_heads": 2, "light_window_size": 8, "heavy_dim_head": 4, "heavy_heads": 4}
    numbers = {"num_heavy_tokens_q": 3, "num_heavy_tokens_kv": 2}
    layer = RoutedAutoregressiveAttention(DIM, **{**sizes, **numbers, "num_routed_kv": 2, "rotary": True, **options})
    return layer.double()


@given(seeds, st.integers(2, 45), st.floats(0, 1), st.booleans(), st.sampled_from([8, 4]))
def test_the_future_does_not_reach_the_past(seed: int, n: int, part: float, masked: bool, window: int) -> None:
    """Bit for bit: tokens from one on are replaced, with large ones that would be chosen first; so are masks."""
    layer, start = made(seed % 7, heavy_window_size=window, residual=True), 1 + int(part * (n - 2))
    x = randn(seed, 2, n, DIM)
    other = x.clone()
    other[:, start:] = 20 * randn(seed + 1, 2, n - start, DIM)
    mask = torch.rand(2, n, generator=generator(seed)) < 0.7 if masked else None
    later = None if mask is None else mask.clone()
    if later is not None:
        later[:, start:] = ~later[:, start:]
    with torch.no_grad():
        assert torch.equal(layer(x, mask)[:, :start], layer(other, later)[:, :start])


@given(seeds, st.integers(2, 45), st.floats(0, 1))
def test_nor_through_a_feed_forward_block_with_windows(seed: int, n: int, part: float) -> None:
    torch.manual_seed(seed % 7)
    layer, start = RoutedFeedForward(DIM, num_heavy_tokens=3, window=8).double(), 1 + int(part * (n - 2))
    x = randn(seed, 2, n, DIM)
    other = x.clone()
    other[:, start:] = 20 * randn(seed + 1, 2, n - start, DIM)
    with torch.no_grad():
        assert torch.equal(layer(x)[:, :start], layer(other)[:, :start])
        changed = (layer(x) - layer.light(x)).abs().amax(-1) > 1e-9
    assert not changed[:, :8].any() and (n < 24 or changed[:, 8:].any())


def test_feed_forward_windows_that_cannot_be_are_refused() -> None:
    for number, window in ((3, 0), (0.5, 8)):
        with pytest.raises(SpecError, match="heavy tokens are an int"):
            RoutedFeedForward(DIM, num_heavy_tokens=number, window=window)
    with pytest.raises(InputError, match="leave it out"):
        RoutedFeedForward(DIM, num_heavy_tokens=3, window=8)(torch.zeros(1, 20, DIM), None, 4)


@given(seeds, st.integers(10, 45))
def test_no_gradient_of_the_past_reaches_the_future(seed: int, n: int) -> None:
    """That of the routers included."""
    layer, x, at = made(router={"eps": 1.0}), randn(seed, 1, n, DIM).requires_grad_(), seed % (n - 1)
    (grad,) = torch.autograd.grad(layer(x)[:, : at + 1].square().sum(), x)
    assert not grad[:, at + 1 :].any() and grad[:, : at + 1].any()


def test_a_sequence_that_grows_keeps_what_it_has() -> None:
    layer, x = made(), randn(0, 1, 40, DIM)
    whole = layer(x)
    for n in (3, 8, 9, 17, 39):
        torch.testing.assert_close(layer(x[:, :n]), whole[:, :n])


def test_tokens_see_chosen_tokens_of_windows_long_past() -> None:
    layer, x = made(), randn(0, 1, 64, DIM).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[:, -8:].square().sum(), x)
    reached = grad[0].abs().sum(-1) > 1e-12
    assert reached[:32].any() and not reached[:32].all()


def test_queries_are_chosen_by_the_threshold_of_the_window_before() -> None:
    torch.manual_seed(0)
    router, x = Router(DIM, straight_through=False, eps=0.5).double(), randn(0, 2, 37, DIM)
    s, choice = router.logits(x)[:, 0], choose_by_the_past(router, x, 3, 8)
    assert choice.indices.shape == (2, 1, 12)
    for sample in range(2):
        wanted = []
        for start in range(8, 37, 8):
            least = s[sample, start - 8 : start].topk(3).values[-1]
            wanted += [i for i in range(start, min(start + 8, 37)) if s[sample, i] >= least][:3]
        assert choice.indices[sample, 0][choice.mask[sample, 0]].tolist() == wanted
    assert bool((choice.scores[~choice.mask] == 0).all()) and bool((choice.scores[choice.mask] > 0).all())


@pytest.mark.parametrize("n", [1, 7, 8])
def test_the_first_window_has_the_light_branch_alone(n: int) -> None:
    layer, x = made(), randn(0, 2, n, DIM)
    torch.testing.assert_close(layer(x), layer.light(x) + layer.heavy.stand_in)


def test_windows_chosen_whole_see_all_of_the_past() -> None:
    """With as many places as a window has tokens, every query sees every key of the windows before."""
    layer, x = made(num_heavy_tokens_q=8, num_heavy_tokens_kv=8), randn(0, 1, 24, DIM)
    assert layer.heavy.kv_router(x[:, :16], 8).indices is None
    (grad,) = torch.autograd.grad(layer(x.requires_grad_())[:, -1].square().sum(), x)
    assert bool((grad[0, :16].abs().sum(-1) > 0).all())
