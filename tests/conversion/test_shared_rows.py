"""Rows that several processes search for together are those that one finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.conversion import shared_rows
from rpqfx.conversion.ranks import Ranks
from rpqfx.conversion.shared_rows import shared_search
from rpqfx.ops.column_search import column_search
from rpqfx.ops.cpu import build
from tests.helpers import randn, seeds


class Some(Ranks):
    """One of several, which notes what it sends and gets what it is given."""

    def __init__(self, rank: int, size: int, others: Sequence[Any] = ()) -> None:
        self.rank, self.size, self._others = rank, size, others
        self.sent: Any = None

    def exchange(self, what: str, parcels: Sequence[Any]) -> list[Any]:
        self.sent = parcels[self.rank]
        return list(self._others) or [self.sent]


def problem(seed: int, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    d, count, stages, entries = 4, 6, 2, 16
    matrix, books = randn(seed, rows, count * d, dtype=dtype), randn(seed + 1, stages, 2, entries, d, dtype=dtype)
    upper = randn(seed + 2, count * d, count * d, dtype=dtype).triu() * 0.1
    return matrix, books, [0, 1, 0, 1, 1, 0], randn(seed + 3, count, d, d, dtype=dtype), upper, 4


def together(given_: tuple[Any, ...], size: int) -> tuple[tuple[Tensor, Tensor], list[int]]:
    """What processes find together, and how many rows each has searched for."""
    sent = []
    for rank in range(size):
        one = Some(rank, size)
        shared_search(one)(*given_)
        sent.append(one.sent)
    return shared_search(Some(0, size, sent))(*given_), [len(codes) for codes, _ in sent]


@pytest.mark.skipif(not build.ready(), reason="there is no compiled kernel")
@given(seeds, st.integers(1, 70), st.integers(1, 5))
def test_the_kernel_finds_the_same_to_the_last_bit_in_parts(seed: int, rows: int, size: int) -> None:
    given_ = problem(seed, rows)
    codes, seen = column_search(*given_)
    if size == 1:
        found = shared_search(Ranks())(*given_)
    else:
        found, counts = together(given_, size)
        assert sum(counts) == rows and max(counts) - min(counts) <= 1
    assert torch.equal(found[0], codes) and torch.equal(found[1], seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_the_kernel_each_searches_for_all(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "compiled", lambda *_: False)
    given_, one = problem(0, 12, dtype), Some(1, 2)
    found = shared_search(one)(*given_)
    assert one.sent is None and all(map(torch.equal, found, column_search(*given_)))
