"""What rows of inputs weigh: one in the mean, and none of them much more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rpqfx
from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.observe import Observer
from rpqfx.conversion.row_weights import RowWeights, limited
from rpqfx.nn.layout import Layout
from tests.helpers import randn, seeds


@given(seeds, st.integers(1, 50))
def test_no_row_weighs_more_than_four_means(seed: int, count: int) -> None:
    energies = randn(seed, count).square() ** 3
    found = limited(energies)
    assert bool((found <= 4 * energies.mean() * (1 + 1e-9)).all()) and bool((found <= energies).all())


def test_weights_are_about_one_in_the_mean_over_batches_and_can_be_dropped() -> None:
    spec = rpqfx.CodebookSpec(6, 8, 2, 4)
    weight, rows = StandIn(spec, Layout((6, 8)), randn(0, 6, 8), Observer(())), RowWeights()
    energies = [1e-6 * randn(seed, 50).square() for seed in range(3)]
    for batch, energy in enumerate(energies):
        rows.put(weight, batch, 0, energy)
        rows.count(weight, float(energy.sum()), 50)
    rows.put(weight, 3, 0, torch.zeros(50, dtype=torch.float64))
    rows.count(weight, 0.0, 50)
    found = [rows.of(weight, batch, 0) for batch in range(4)]
    known = [one for one in found if one is not None]
    assert len(known) == 4 and float(torch.cat(known).mean()) == pytest.approx(1, rel=0.01)
    assert rows.of(weight, 4, 0) is None
    rows.forget(weight)
    assert rows.of(weight, 0, 0) is None
