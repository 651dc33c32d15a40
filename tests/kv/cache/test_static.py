"""The cache of fixed capacity: the same attention, in one graph for every token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.kv.cache.static import StaticStore
from tests.helpers import assert_same, generator, randn, seeds
from tests.kv.cache.test_layer import angles, attention, spread, tokens, turn
from tests.kv.coders import decode, plain_coder


def make(seed: int = 0, batch: int = 2, entries: int = 300, capacity: int = 60, **changes: Any) -> StaticStore:
    keys, values = plain_coder(seed, [3, 0], 4, 2, 5), plain_coder(seed + 7, [1, 2], 2, 4, entries, scaled=False)
    numbers = {"sinks": 3, "window": 10, "dtype": torch.float64, "scaled": (True, False), "name": "layer 3", **changes}
    return StaticStore(keys, values, batch, capacity, **numbers)


def held(store: StaticStore, k: Tensor, v: Tensor, before: Tensor, rope: Any) -> list[Tensor]:
    """From the definition: the sinks and the window as they are, codes between them."""
    total, both = k.shape[2], []
    for coder, x, plain in zip(store.coders, (before, v), (k, v), strict=True):
        last = max(store.sinks, total - store.window)
        far = decode(coder, *coder.encode(x[:, :, store.sinks : last]))  # type: ignore[arg-type]
        if rope is not None and plain is k:
            far = turn(far, tokens(rope, slice(store.sinks, last)))
        both.append(torch.cat([plain[:, :, : store.sinks], far, plain[:, :, last:]], 2))
    return both


@given(seeds, st.sampled_from([2, 9, 256, 300, 3000]), st.integers(1, 60), st.booleans(), st.booleans())
@settings(max_examples=50)
def test_attention_is_that_of_what_is_held(seed: int, entries: int, total: int, turned: bool, masked: bool) -> None:
    """However it was filled, and once more after other tokens were there."""
    store = make(seed, entries=entries, rope=6 if turned else 0)
    rope = angles(seed, 2, total, 3) if turned else None
    before, v = randn(seed, 2, 2, total, 8), randn(seed + 1, 2, 2, total, 8)
    k = before if rope is None else turn(before, rope)
    everywhere = torch.arange(60)
    store.update(everywhere, randn(5, 2, 2, 60, 8), randn(6, 2, 2, 60, 8), angles(seed, 60, 3) if turned else None)
    if seed % 2:
        store.reset()
    done = 0
    for length in spread(seed, total):
        part = slice(done, done + length)
        some = None if rope is None else tokens(rope, part)
        store.update(everywhere[part], k[:, :, part], v[:, :, part], some)
        done += length
    queries = min(4, total)
    q = randn(seed + 2, 2, 4, queries, 8)
    mask = torch.rand(2, 1, queries, 60, generator=generator(seed)) < 0.7 if masked else None
    ours = store.attend(q, everywhere[total - queries : total], mask=mask)
    expected = attention(q, *held(store, k, v, before, rope), 8**-0.5, None if mask is None else mask[..., :total])
    assert_same(ours, expected)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.traced
@pytest.mark.parametrize("rope", [pytest.param(0, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_one_graph_serves_every_token(fresh_compiler: None, rope: int) -> None:
    ours, theirs = make(rope=rope), make(rope=rope)

    def step(store: StaticStore, position: Tensor, k: Tensor, v: Tensor, q: Tensor, turns: Any) -> Tensor:
        store.update(position, k, v, turns)
        return store.attend(q, position)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for t in range(20):
        x = [randn(100 * t + i, 2, heads, 1, 8) for i, heads in enumerate((2, 2, 4))]
        turns = angles(t, 1, 4) if rope else None
        position = torch.tensor([t])
        assert_same(compiled(ours, position, *x, turns), step(theirs, position, *x, turns))
    assert counter.frame_count == 1


def test_bad_input_is_refused_and_the_layer_named() -> None:
    store, x = make(), randn(0, 2, 2, 1, 8)
    with pytest.raises(InputError, match="layer 3: token 60 is past the 60"):
        store.update(torch.tensor([60]), x, x)
    with pytest.raises(InputError, match=r"layer 3.*NaN"):
        store.update(torch.tensor([0]), x * torch.nan, x)
    with pytest.raises(InputError, match="layer 3: keys or values are"):
        store.update(torch.tensor([0, 1]), x, x)
    with pytest.raises(InputError, match="layer 3: the store was made for"):
        store.update(torch.tensor([0]), x, x, angles(0, 1, 4))
    with pytest.raises(InputError, match="layer 3: sinks"):
        make(window=0)
    assert int(store.total) == 0
