"""Claims on what becomes of chosen tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.routing import Choice
from rpqfx.routing.gather import put_instead
from tests.helpers import generator, seeds


@given(seeds, st.integers(1, 6), st.booleans())
def test_a_score_of_one_gives_exactly_the_value_and_others_keep_what_they_have(seed: int, k: int, empty: bool) -> None:
    numbers = generator(seed)
    indices = torch.stack([torch.randperm(6, generator=numbers)[:k].sort().values for _ in range(2)])
    kept = torch.rand(2, k, generator=numbers) < 0.5 if empty else torch.ones(2, k, dtype=torch.bool)
    indices = torch.where(kept, indices, 0)  # slots without a token may name one that is chosen
    out, values = (torch.randn(2, n, 3, generator=numbers, requires_grad=True) for n in (6, k))
    scores = kept.float()[:, None].requires_grad_()
    found = put_instead(out, Choice(indices[:, None], scores, kept[:, None] if empty else None), values)
    chosen = torch.zeros(2, 6, dtype=torch.bool)
    for b in range(2):
        for i in range(k):
            if kept[b, i]:
                chosen[b, indices[b, i]] = True
                assert torch.equal(found[b, indices[b, i]], values[b, i])
    assert torch.equal(found[~chosen], out[~chosen])
    toward = torch.randn(found.shape, generator=numbers)
    (found * toward).sum().backward()
    taken = indices[..., None].expand(-1, -1, 3)
    wanted = ((values - out.gather(1, taken)) * toward.gather(1, taken)).sum(-1) * kept
    torch.testing.assert_close(scores.grad, wanted.detach()[:, None])  # to where the two differ
