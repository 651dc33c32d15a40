"""Scores that a model caps, or that take a share of the softmax for nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rpqfx.kv.attention import joint_softmax
from rpqfx.kv.attention.score_options import Changes, biased_attention
from rpqfx.kv.cache.layer import LayerStore
from tests.kv.coders import plain_coder


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(4,), (2, 4, 5, 1)])
def test_a_sink_is_one_more_score_without_a_value(shape: tuple[int, ...]) -> None:
    q, k, v, sinks = randn(0, 2, 4, 5, 8), randn(1, 2, 4, 9, 8), randn(2, 2, 4, 9, 8), randn(3, *shape)
    wide = sinks.view(1, 4, 1, 1) if len(shape) == 1 else sinks
    scores = torch.cat([q @ k.mT * 8**-0.5, wide.expand(2, 4, 5, 1)], -1)
    wanted = scores.softmax(-1) @ torch.cat([v, torch.zeros(2, 4, 1, 8)], 2)
    torch.testing.assert_close(biased_attention(q, k, v, Changes(sinks=sinks)), wanted)


def test_each_query_of_a_cache_meets_its_own_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    store = LayerStore(*(plain_coder(seed, [3, 2], 4, 2, 16) for seed in (0, 1)), sinks=2, window=4, chunk=8)
    arrival = store.append(randn(0, 2, 2, 30, 8), randn(1, 2, 2, 30, 8))
    arrival = store.append(randn(2, 2, 2, 5, 8), randn(3, 2, 2, 5, 8))
    q, sinks = randn(4, 2, 4, 5, 8), randn(5, 2, 4, 5, 1)
    whole = store.attend(q, arrival=arrival, changes=Changes(sinks=sinks))
    monkeypatch.setattr(joint_softmax, "SCORE_ELEMENTS", 1)  # one query at a time
    torch.testing.assert_close(store.attend(q, arrival=arrival, changes=Changes(sinks=sinks)), whole)
    last = store.attend(q[:, :, -1:], changes=Changes(sinks=sinks[:, :, -1:]))
    torch.testing.assert_close(last, whole[:, :, -1:])
