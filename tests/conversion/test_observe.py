"""What is seen of a model's inputs before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec
from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.observe import Observer, Seen
from rpqfx.nn.layout import Layout
from tests.helpers import randn


def stand_in(seed: int, rows: int = 6, cols: int = 8, transposed: bool = False) -> StandIn:
    layout = Layout((rows, cols), transposed=transposed)
    spec = CodebookSpec(layout.num_vectors, layout.dim, 2, 4)
    return StandIn(spec, layout, randn(seed, rows, cols), Observer(()))


def watched(runs: list[Callable[[], Any]], *weights: StandIn, **options: Any) -> list[Seen]:
    observer = Observer(weights, **options)
    done: list[int] = []
    observer.watch(runs, done.append)
    assert done == list(range(len(runs)))
    return [observer.seen[weight] for weight in weights]


@pytest.mark.parametrize("energy_only", [True, False])
def test_moments_are_those_of_the_inputs_of_all_batches(energy_only: bool) -> None:
    weight, xs = stand_in(0), [randn(i, 2, 3, 8) for i in range(3)]
    (seen,) = watched([lambda x=x: weight.linear(x) for x in xs], weight, energy_only=energy_only)
    rows = torch.cat(xs).reshape(-1, 8)
    full = rows.t() @ rows / len(rows)
    torch.testing.assert_close(seen.moments.mean, full.diagonal() if energy_only else full)
    assert seen.moments.rows == 18 and seen.uses == 1 and seen.once


def test_ranks_are_the_order_of_first_use() -> None:
    a, b, c, d = (stand_in(i, 8, 8) for i in range(4))
    seen = watched([lambda: c.linear(a.linear(randn(0, 2, 8))), lambda: a.linear(b.linear(randn(1, 2, 8)))], a, b, c, d)
    assert [one.rank for one in seen] == [0, 2, 1, -1]
    assert [one.once for one in seen] == [True, True, True, False]


def test_uses_are_counted_by_batch() -> None:
    often, once = stand_in(0, 8, 8), stand_in(1, 8, 8)
    x = randn(0, 2, 8)
    runs = [lambda: once.linear(x), lambda: often.linear(often.linear(once.linear(x)))]
    seen = watched(runs, often, once)
    assert [one.uses for one in seen] == [2, 1] and [one.once for one in seen] == [False, True]


def test_tables_are_known_as_such() -> None:
    weight = stand_in(0, 8, 8)
    (seen,) = watched([lambda: weight.linear(F.relu(weight.lookup(torch.tensor([1, 2]))))], weight)
    assert seen.looked_up and seen.uses == 1 and not seen.once and seen.rank == 0


def test_inputs_across_the_vectors_leave_no_moment() -> None:
    weight = stand_in(0, transposed=True)
    (seen,) = watched([lambda: weight.linear(randn(0, 2, 8))], weight)
    assert seen.uses == 1 and seen.moments.mean is None and not seen.once


def test_others_are_not_heard() -> None:
    heard, other = stand_in(0), stand_in(1)
    observer = Observer([heard])
    other.listener = observer
    other.linear(randn(0, 2, 8))
    assert list(observer.seen) == [heard] and observer.seen[heard].rank == -1


def test_results_pass_unchanged() -> None:
    weight = stand_in(0)
    y: Tensor = randn(0, 2, 6)
    assert Observer([weight]).made(weight, y) is y
    assert isinstance(weight, nn.Module)
