"""Claims on caches of whole models: they give what the rewritten model gives on whole sequences."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rpqfx.errors import FormatError, InputError
from rpqfx.kv import CodebookCache, KVPolicy, quantize_kv
from tests.kv.kv_models import LM, tokens

POLICIES: dict[str, dict[str, Any]] = {
    "heads together": {},
    "heads apart": {"joint": False},
    "channels as they are": {"transform": False},
    "strided": {"transform": False, "strided": True},
    "normalize": {"joint": False, "normalize": True, "bits_per_value": 4},
    "narrow codes": {"codebook_size": 5},
}


def small_of(seed: int = 0, **values: Any) -> nn.Module:
    policy = KVPolicy(
        **{"bits_per_value": 2, "window": 6, "sinks": 2, "chunk": 8, "codebook_dim": 4, "codebook_size": 16, **values}
    )
    return quantize_kv(LM(seed), policy, calibration=[tokens(seed, 4, 64)], progress=False)


def stream(model: nn.Module, cache: CodebookCache, ids: Tensor, pieces: list[int]) -> Tensor:
    found, start = [], 0
    with torch.no_grad(), cache.attended():
        for piece in pieces:
            found.append(model(ids[:, start : start + piece]))
            start += piece
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", POLICIES)
def test_token_by_token_is_the_whole_sequence(name: str) -> None:
    small, ids = small_of(**POLICIES[name]), tokens(1)
    cache = CodebookCache(small)
    with torch.no_grad():
        whole = small(ids)
    torch.testing.assert_close(stream(small, cache, ids, [1] * 40), whole, rtol=1e-3, atol=1e-3)
    assert cache.total == 40
    assert min(store.encoded for store in cache.stores.values()) == 32


@given(st.integers(0, 2**31), st.lists(st.integers(1, 12), min_size=2, max_size=6))
@settings(max_examples=4)
def test_pieces_see_each_other_as_they_are(seed: int, pieces: list[int]) -> None:
    small = small_of()
    ids = tokens(seed, 2, sum(pieces) + 1)
    cache, twin = CodebookCache(small), CodebookCache(small)
    stream(small, cache, ids, pieces)
    stream(small, twin, ids, [1] * sum(pieces))
    assert cache.total == twin.total
    assert [s.encoded for s in cache.stores.values()] == [s.encoded for s in twin.stores.values()]


def test_rows_of_the_batch_go_with_their_tokens() -> None:
    small, ids = small_of(), tokens(2, 3, 31)
    cache, other = CodebookCache(small), CodebookCache(small)
    stream(small, cache, ids[:, :30], [30])
    cache.select(torch.tensor([2, 0]))
    cache.repeat(2)
    order = torch.tensor([2, 2, 0, 0])
    stream(small, other, ids[order][:, :30], [30])
    found, wanted = (stream(small, c, ids[order][:, 30:], [1]) for c in (cache, other))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_saved_and_restored_it_goes_on() -> None:
    small, ids = small_of(), tokens(3, 2, 36)
    cache = CodebookCache(small)
    stream(small, cache, ids[:, :30], [20, 10])
    other = CodebookCache(small)
    other.restore(copy.deepcopy(cache.state()))
    found, wanted = (stream(small, c, ids[:, 30:], [1] * 6) for c in (other, cache))
    assert torch.equal(found, wanted)


def test_a_cache_of_other_codebooks_is_refused_and_leaves_it_empty() -> None:
    small, ids = small_of(), tokens(3, 2, 30)
    cache, other = CodebookCache(small), CodebookCache(small_of(seed=7))
    stream(small, cache, ids, [30])
    with pytest.raises(FormatError, match="codebooks"):
        other.restore(cache.state())
    assert other.total == 0


@given(st.integers(0, 2**31), st.integers(20, 40), st.integers(1, 30), st.data())
@settings(max_examples=10)
def test_what_the_last_step_brought_is_taken_back_as_though_it_had_not_come(
    seed: int, before: int, draft: int, data: st.DataObject
) -> None:
    small, ids = small_of(), tokens(seed, 2, before + draft + 4)
    cache, other = CodebookCache(small), CodebookCache(small)
    stream(small, cache, ids[:, : before + draft], [before, draft])
    kept = before + data.draw(st.integers(0, draft - 1), label="kept of the draft")
    cache.crop(kept)
    stream(small, other, ids[:, :kept], [1] * kept)
    assert [s.encoded for s in cache.stores.values()] == [s.encoded for s in other.stores.values()]
    found, wanted = (stream(small, c, ids[:, kept : kept + 4], [3, 1]) for c in (cache, other))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_what_is_in_codes_for_longer_is_not_taken_back() -> None:
    small, ids = small_of(), tokens(4, 2, 70)
    cache = CodebookCache(small)
    stream(small, cache, ids, [66, 4])
    cache.crop(-3)
    with pytest.raises(InputError, match="window"):
        cache.crop(60)
    assert cache.total == 67
    cache.reset()
    assert cache.total == 0


def test_bytes_are_those_of_codes_and_window() -> None:
    small, ids = small_of(), tokens(5, 2, 41)
    cache = CodebookCache(small, torch.float16)
    stream(small, cache, ids, [40])
    assert (
        cache.nbytes()["window"] == 2 * 2 * 2 * 2 * (8 + 32) * 8 * 2
    )  # those of a draft are as they are until the next
    stream(small, cache, ids[:, 40:], [1])
    codes = sum(core.keys.code_count + core.values.code_count for core in cache.cores.values())
    found = cache.nbytes()
    assert found["codes"] == 2 * 32 * codes * 4 // 8
    assert found["window"] == 2 * 2 * 2 * 2 * 9 * 8 * 2  # layers, sides, rows, heads, tokens, channels, bytes
    assert found["scales"] == found["positions"] == 0
    assert found["codebooks"] > 0


def test_a_model_without_codes() -> None:
    with pytest.raises(InputError, match="quantize_kv"):
        CodebookCache(LM())


def test_a_cache_is_not_met_outside() -> None:
    small, ids = small_of(), tokens(6)
    cache = CodebookCache(small)
    with torch.no_grad():
        before = small(ids)
        stream(small, cache, ids, [10])
        assert torch.equal(small(ids), before)
    assert cache.total == 10


def test_a_copied_cache_goes_on_alone_with_the_codebooks_of_the_model() -> None:
    small, ids = small_of(), tokens(7, 2, 40)
    cache = CodebookCache(small)
    stream(small, cache, ids[:, :30], [30])
    twin = copy.deepcopy(cache)
    found = stream(small, twin, ids[:, 30:], [10])
    assert (cache.total, twin.total) == (30, 40)
    assert torch.equal(found, stream(small, cache, ids[:, 30:], [10]))
    assert all(twin.cores[name] is core for name, core in cache.cores.items())


def test_a_copy_of_the_model_does_not_run_beside_a_cache_unseen() -> None:
    small, ids = small_of(), tokens(7)
    cache = CodebookCache(small)
    with pytest.raises(InputError, match="a copy of it"):
        stream(copy.deepcopy(small), cache, ids, [10])
    assert cache.total == 0
