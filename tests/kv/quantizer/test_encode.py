"""Codes are what a loop over slots finds, and stand for what a loop over slots adds up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.kv.quantizer.encode import assign, decode, exact, walk
from rpqfx.ops import search
from tests.helpers import generator, randn, seeds
from tests.kv.helpers import arguments, book, channels, made, naive_decode, naive_rests


@given(arguments(normalize=False), seeds, st.integers(0, 4))
def test_codes_are_those_of_a_search_for_each_group(given: dict[str, Any], seed: int, tokens: int) -> None:
    quantizer = made(seed, **given)
    x = randn(seed + 1, tokens, given["dim"])
    slots, books = quantizer.layout, quantizer.books.detach()
    codes = assign(slots.split(x), books, slots, given["beam"], given["use_cosine_sim"])
    assert codes.shape == (tokens, slots.count) and codes.dtype == torch.int64
    at = 0
    for group, stages in enumerate(slots.stages):
        if not stages:
            continue
        own = torch.stack([book(quantizer, stage, group) for stage in range(stages)])
        points = x[:, channels(quantizer, group)]
        if given["use_cosine_sim"]:
            found = search.cosine_search(points, own)[0]
        else:
            found = search.beam_search(points, own, given["beam"])[0]
        assert torch.equal(codes[:, at : at + stages], found)
        at += stages


@given(arguments(), seeds, st.integers(0, 4))
def test_decoding_adds_up_entries(given: dict[str, Any], seed: int, tokens: int) -> None:
    quantizer = made(seed, **given)
    codes = torch.randint(given["codebook_size"], (tokens, quantizer.layout.count), generator=generator(seed))
    parts = decode(codes, quantizer.books, quantizer.layout)
    assert parts.shape == (tokens, quantizer.layout.groups, given["codebook_dim"])
    for row, code in zip(quantizer.layout.join(parts), codes, strict=True):
        torch.testing.assert_close(row, naive_decode(quantizer, code))


@given(arguments(), seeds)
def test_stages_see_what_those_before_left(given: dict[str, Any], seed: int) -> None:
    quantizer = made(seed, **given)
    slots = quantizer.layout
    x = randn(seed + 1, 3, given["dim"])
    codes = torch.randint(given["codebook_size"], (3, slots.count), generator=generator(seed))
    steps = list(walk(slots.split(x), codes, quantizer.books, slots))
    seen = {(group, step.stage): (step, i) for step in steps for i, group in enumerate(step.run.groups)}
    assert sorted(seen) == list(zip(*quantizer.slots, strict=True))
    for token in range(3):
        for slot, rest in enumerate(naive_rests(quantizer, x[token], codes[token])):
            group, stage = (slots.slot_groups[slot], slots.slot_stages[slot])
            step, i = seen[group, stage]
            assert step.codes[token, i] == codes[token, slot]
            torch.testing.assert_close(step.rests[token, i], rest)
            assert torch.equal(step.entries[token, i], book(quantizer, stage, group)[codes[token, slot]])


def test_distances_are_not_rounded_under_autocast() -> None:
    assert torch.is_autocast_enabled("cpu") is False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact(torch.zeros(1)):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_no_matrix_of_all_tokens_by_all_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """By plain operators the largest tensor that a search makes is a block's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from rpqfx.ops.cpu import build

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    monkeypatch.setattr(build, "ready", lambda: False)
    monkeypatch.setattr(search, "_BLOCK_ELEMENTS", 2**14)
    tokens, entries = 4096, 256
    for way in ({"beam": 1}, {"beam": 4}, {"use_cosine_sim": True}):
        quantizer = made(0, 16, codebook_size=entries, dtype=torch.float32, **way)
        with Largest() as largest:
            quantizer.encode(randn(1, tokens, 16, dtype=torch.float32))
        assert largest.elements < tokens * entries / 8
