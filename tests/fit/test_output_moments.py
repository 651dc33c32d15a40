"""Second moments of outputs' gradients: believed where halves of the batches agree, and no further."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.fit.error_feedback import feedback_between_rows
from rpqfx.fit.output_moments import OutputMoments
from tests.helpers import randn, seeds


def made(seed: int, count: int, rows: int = 40, batches: int = 4, common: float = 2.0) -> tuple[OutputMoments, Tensor]:
    """Moments of gradients that go together, a few a batch, and the second moment that they are drawn from."""
    mix = torch.eye(rows) + common * randn(seed, rows, 4, dtype=torch.float32) @ randn(
        seed + 1, 4, rows, dtype=torch.float32
    )
    moments = OutputMoments()
    for batch in range(batches):
        moments.add(batch, randn(seed + 2 + batch, count, rows, dtype=torch.float32) @ mix)
    return moments, mix.t() @ mix


@given(seeds, st.integers(2, 4))
def test_the_total_is_that_of_all_batches(seed: int, batches: int) -> None:
    moments, parts = OutputMoments(), [randn(seed + i, 3 + i, 5, dtype=torch.float32) for i in range(batches)]
    for number, part in enumerate(parts):
        moments.add(number, part)
    rows = torch.cat(parts)
    wanted, total = rows.t() @ rows, moments.total
    assert total is not None and moments.rows == len(rows)
    torch.testing.assert_close(total, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


@pytest.mark.few(25)
@given(seeds)
def test_many_gradients_that_go_together_are_believed(seed: int) -> None:
    moments, true = made(seed, 2000)
    found = moments.trusted(torch.ones(40))
    assert found is not None
    order, spread = feedback_between_rows(found)
    left = float(((true[order][:, order] @ spread) * spread).sum())
    assert left < 0.9 * float(true.diagonal().sum())


@pytest.mark.few(25)
@given(seeds, st.integers(1, 60))
def test_outputs_that_do_not_go_together_are_not_believed_to(seed: int, count: int) -> None:
    """However few gradients there are, feedback never makes true errors much larger."""
    moments, true = made(seed, count, common=0.0)
    found = moments.trusted(torch.ones(40))
    if found is not None:
        order, spread = feedback_between_rows(found)
        assert float(((true[order][:, order] @ spread) * spread).sum()) < 1.15 * float(true.diagonal().sum())


def test_the_elements_off_the_diagonal_alone_are_made_smaller() -> None:
    moments, _ = made(0, 50)
    found, total = moments.trusted(torch.ones(40)), moments.total
    assert found is not None and total is not None
    torch.testing.assert_close(found.diagonal(), total.diagonal())
    off = ~torch.eye(40, dtype=torch.bool)
    shares = (found / total)[off]
    assert 0 < float(shares.mean()) < 1 and float(shares.std()) < 1e-4


@pytest.mark.parametrize("batches", [0, 1])
def test_one_half_alone_is_not_believed(batches: int) -> None:
    assert made(0, 100, batches=batches)[0].trusted(torch.ones(40)) is None


def test_silence_is_not_believed() -> None:
    moments = OutputMoments()
    for batch in range(2):
        moments.add(batch, torch.zeros(3, 4))
    assert moments.trusted(torch.ones(4)) is None


def test_gradients_that_are_not_finite_are_refused() -> None:
    moments = OutputMoments()
    for batch in range(2):
        moments.add(batch, torch.full((3, 4), float("inf")))
    with pytest.raises(InputError, match="second moment has infinite or NaN"):
        moments.trusted(torch.ones(4))
