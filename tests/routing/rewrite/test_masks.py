"""Claims on masks and positions of chosen tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.routing import Choice
from rpqfx.routing.rewrite.masks import pairs, seen_tokens, singles
from tests.helpers import generator, seeds


@given(seeds, st.integers(1, 6), st.booleans(), st.booleans(), st.booleans())
def test_pairs_and_singles_are_those_of_the_chosen(seed: int, k: int, rows: bool, boolean: bool, empty: bool) -> None:
    numbers = generator(seed)
    indices = torch.stack([torch.randperm(6, generator=numbers)[:k].sort().values for _ in range(2)])
    kept = torch.rand(2, k, generator=numbers) < 0.5 if empty else None
    choice = Choice(indices[:, None], torch.ones(2, 1, k), None if kept is None else kept[:, None])
    mask = torch.randn(2, 3, 6 if rows else 1, 6, generator=numbers)
    mask = mask > 0 if boolean else mask
    found = pairs(mask, choice)
    assert found.shape == (2, 3, k, k)
    x = torch.randn(1, 6, 4, generator=numbers)
    assert singles(x, choice).shape == (2, k, 4)
    for b in range(2):
        assert torch.equal(singles(x, choice)[b], x[0, indices[b]])
        for i in range(k):
            for j in range(k):
                whole = mask[b, :, indices[b, i] if rows else 0, indices[b, j]]
                if kept is None or bool(kept[b, j]) or i == j:
                    assert torch.equal(found[b, :, i, j], whole)
                else:
                    hidden = ~found[b, :, i, j] if boolean else found[b, :, i, j] == torch.finfo(mask.dtype).min
                    assert bool(hidden.all())


def test_a_mask_of_pairs_says_which_tokens_are_seen_at_all() -> None:
    kept = torch.tensor([[True, True, False], [True, False, True]])
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    boolean = kept[:, None, None] & causal
    added = torch.zeros(boolean.shape).masked_fill(~boolean, torch.finfo(torch.float32).min)
    for mask in (boolean, added):
        assert torch.equal(seen_tokens(mask, 2), kept)
    assert torch.equal(seen_tokens(causal, 2), torch.ones(2, 3, dtype=torch.bool))
