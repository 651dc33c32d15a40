"""Which tokens the router chooses, and with what scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rpqfx.errors import InputError, SpecError
from rpqfx.routing import Choice, Router, exact_scores
from rpqfx.routing.gather import put, take
from rpqfx.routing.router import METHODS
from tests.helpers import generator, randn

DIM = 8


def made(**options: Any) -> Router:
    torch.manual_seed(0)
    return Router(DIM, dtype=torch.float64, **options)


def chosen(choice: Choice, sample: int, route: int = 0) -> set[int]:
    """Which tokens have a slot of their own."""
    assert choice.indices is not None
    kept = (
        choice.indices[sample, route]
        if choice.mask is None
        else choice.indices[sample, route][choice.mask[sample, route]]
    )
    assert len(set(kept.tolist())) == len(kept), "a token was chosen twice"
    return set(kept.tolist())


def test_the_largest_dot_products_are_chosen() -> None:
    router, x = made(num_routing_tokens=3), randn(0, 2, 40, DIM)
    choice = router(x, 5)
    for sample in range(2):
        for route in range(3):
            products = x[sample] @ router.routing_token[route]
            assert chosen(choice, sample, route) == set(products.topk(5).indices.tolist())
    assert choice.mask is None
    torch.testing.assert_close(choice.scores, torch.ones(2, 3, 5).double())


def test_scores_are_those_of_the_method() -> None:
    x = randn(0, 2, 40, DIM)
    router = made(straight_through=False, eps=0.5, fetch_ratio=1.25)
    choice = router(x, 8)
    wanted = exact_scores(x @ router.routing_token[0], 10, eps=0.5)
    torch.testing.assert_close(choice.scores[:, 0], wanted.gather(-1, choice.indices[:, 0]))


@pytest.mark.parametrize("straight_through", [False, True])
def test_straight_through_changes_scores_but_not_their_gradient(straight_through: bool) -> None:
    router, seen = made(straight_through=straight_through, eps=1.0), randn(1, 2, 1, 8)
    (router(randn(0, 2, 40, DIM), 8).scores * seen).sum().backward()
    plain = made(straight_through=False, eps=1.0)
    (plain(randn(0, 2, 40, DIM), 8).scores * seen).sum().backward()
    torch.testing.assert_close(router.routing_token.grad, plain.routing_token.grad)
    assert float(plain.routing_token.grad.abs().sum()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_masked_tokens_are_not_chosen_and_change_nothing(method: str) -> None:
    router, x = made(method=method), randn(0, 2, 40, DIM)
    mask = torch.rand(2, 40, generator=generator(0)) < 0.5
    mask[1] = False
    mask[1, 3] = True
    choice = router(x, 6, mask=mask)
    assert chosen(choice, 0) <= set(mask[0].nonzero()[:, 0].tolist()) and chosen(choice, 1) == {3}
    assert bool((choice.scores[1, 0] == choice.mask[1, 0]).all())
    if method != "random":
        other = router(torch.where(mask[..., None], x, 100 * randn(1, 2, 40, DIM)), 6, mask=mask)
        assert chosen(other, 0) == chosen(choice, 0)
        torch.testing.assert_close(other.scores, choice.scores)


def test_a_number_for_each_sample() -> None:
    choice = made()(randn(0, 3, 40, DIM), torch.tensor([1, 5, 99]), most=6)
    assert [len(chosen(choice, i)) for i in range(3)] == [1, 5, 6]
    assert choice.indices.shape == (3, 1, 6)
    assert torch.equal(choice.scores != 0, choice.mask)
    mask = torch.arange(40) < torch.tensor([40, 3, 40])[:, None]
    choice = made()(randn(0, 3, 40, DIM), torch.tensor([1, 5, 99]), most=6, mask=mask)
    assert [len(chosen(choice, i)) for i in range(3)] == [1, 3, 6]


def test_a_share_is_of_each_samples_own_length() -> None:
    mask = torch.arange(40) < torch.tensor([40, 21, 3])[:, None]
    choice = made()(randn(0, 3, 40, DIM), 0.1, mask=mask)
    assert [len(chosen(choice, i)) for i in range(3)] == [4, 3, 1]
    assert len(chosen(made()(randn(0, 3, 40, DIM), 0.1), 0)) == 4


@pytest.mark.parametrize("number", [40, 41, 1.0])
def test_as_many_slots_as_tokens_are_all_tokens_in_order(number: float) -> None:
    mask = torch.rand(2, 40, generator=generator(0)) < 0.5
    choice = made(num_routing_tokens=2)(randn(0, 2, 40, DIM), number, mask=mask)
    assert choice.indices is None and torch.equal(choice.mask, mask[:, None].expand(2, 2, 40))
    assert torch.equal(choice.scores, choice.mask.double())


def test_blocks_are_chosen_from_alike() -> None:
    """An equal share of each; the last block, of 8 tokens, is no exception."""
    x = randn(0, 2, 40, DIM)
    choice = made(block_size=16)(x, 9)
    for sample in range(2):
        found = chosen(choice, sample)
        assert [sum(i // 16 == block for i in found) for block in range(3)] == [3, 3, 3]
    one = made(block_size=16, per_block=True)(x, 3)
    assert chosen(one, 1) == chosen(choice, 1)
    products = x[1, :16] @ made().routing_token[0]
    assert {i for i in chosen(one, 1) if i < 16} == set(products.topk(3).indices.tolist())


def test_blocks_with_masks_shares_and_numbers_of_samples() -> None:
    x, mask = randn(0, 2, 40, DIM), torch.arange(40) < torch.tensor([40, 10])[:, None]
    choice = made(block_size=16)(x, 12, mask=mask)
    assert [sum(i // 16 == block for i in chosen(choice, 1)) for block in range(3)] == [4, 0, 0]
    choice = made(block_size=16)(x, 0.25, mask=mask)
    assert [sum(i // 16 == block for i in chosen(choice, 0)) for block in range(3)] == [4, 4, 2]
    assert len(chosen(choice, 1)) == 3
    choice = made(block_size=16)(x, torch.tensor([3, 12]), most=12)
    assert [len(chosen(choice, i)) for i in range(2)] == [3, 12]


def test_cosine_routing_ignores_lengths() -> None:
    router, x = made(cosine=True), randn(0, 2, 40, DIM)
    grown = x * torch.rand(2, 40, 1, generator=generator(0)).add(0.1)
    torch.testing.assert_close(router.logits(x), router.logits(grown))
    assert float(router.logits(x).abs().max().detach()) <= 8


def test_routing_tokens_can_be_given() -> None:
    x, tokens = randn(0, 2, 40, DIM), randn(1, 2, 3, DIM)
    router = made(learned=False)
    assert not list(router.parameters())
    choice = router(x, 4, routing_tokens=tokens)
    assert chosen(choice, 1, 2) == set((x[1] @ tokens[1, 2]).topk(4).indices.tolist())
    with pytest.raises(InputError, match="pass routing_tokens"):
        router(x, 4)


def test_random_routes_are_drawn_anew() -> None:
    router, x = made(method="random"), randn(0, 1, 400, DIM)
    assert chosen(router(x, 20), 0) != chosen(router(x, 20), 0)


def test_logits_are_float32_under_autocast() -> None:
    router = Router(DIM)
    x = randn(0, 2, 40, DIM, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(router.logits(x), router.logits(x.double()).float())


def test_take_and_put_are_a_gather_and_a_sum() -> None:
    x, out, values, extra = randn(0, 2, 40, DIM), randn(1, 2, 40, DIM), randn(2, 2, 6, DIM), randn(3, DIM)
    mask = torch.rand(2, 40, generator=generator(0)) < 0.1
    choice = made()(x, 6, mask=mask)
    wanted = out + x + extra
    for sample in range(2):
        for slot, (token, kept) in enumerate(zip(choice.indices[sample, 0], choice.mask[sample, 0], strict=True)):
            assert torch.equal(take(x, choice)[sample, 0, slot], x[sample, token])
            if kept:
                wanted[sample, token] += values[sample, slot] - extra
    before = out.clone()
    torch.testing.assert_close(put(out, choice, values, extra, x), wanted)
    torch.testing.assert_close(put(out, choice, values, extra), wanted - x)
    assert torch.equal(out, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "topk"}, "no method 'topk'; there are exact, coordinate_descent"),
        ({"num_routing_tokens": 0}, "at least 1"),
        ({"block_size": 0}, "at least 1"),
        ({"per_block": True}, "give block_size"),
        ({"fetch_ratio": 0.9}, "at least 1, got 0.9"),
    ],
)
def test_a_router_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        made(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_tokens": 0}, "at least one token must be chosen, got 0"),
        ({"num_tokens": 1.5}, "above 0 and at most 1; got 1.5: an int counts them"),
        ({"num_tokens": torch.tensor(3)}, r"one number for each sample, \[B\]; got \[\]"),
        ({"mask": torch.ones(2, 39, dtype=torch.bool)}, r"bool mask \[2, 40\], got \[2, 39\]"),
        ({"mask": torch.ones(2, 40)}, "got .* of torch.float32"),
        ({"x": torch.zeros(2, 40, 5)}, r"\[B, n, 8\], got \[2, 40, 5\]"),
    ],
)
def test_a_call_that_cannot_be_is_refused(call: dict, message: str) -> None:
    with pytest.raises((InputError, SpecError), match=message):
        made()(**{"x": torch.zeros(2, 40, DIM).double(), "num_tokens": 4, **call})
