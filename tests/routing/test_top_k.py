"""A topk whose choice has a gradient."""

from __future__ import annotations

import pytest
import torch

from rpqfx.errors import SpecError
from rpqfx.routing import exact_scores, topk
from tests.helpers import randn


def test_values_and_indices_are_those_of_torch() -> None:
    x = randn(0, 3, 50)
    found, plain = topk(x, 7), x.topk(7)
    torch.testing.assert_close(found.values, plain.values)
    assert torch.equal(found.indices, plain.indices)
    assert torch.equal(found.scores, exact_scores(x, 7 * 9 / 8).gather(-1, plain.indices))
    torch.testing.assert_close(found.gates, torch.ones(3, 7).double())


def test_gates_have_the_gradient_of_the_scores() -> None:
    x, seen = randn(0, 3, 50).requires_grad_(), randn(1, 3, 7)
    found = topk(x, 7, eps=1.0)
    (gates,) = torch.autograd.grad((found.gates * seen).sum(), x, retain_graph=True)
    (scores,) = torch.autograd.grad((found.scores * seen).sum(), x)
    torch.testing.assert_close(gates, scores)
    assert int((gates != 0).sum(-1).min()) > 7  # those that just missed, too


def test_masked_come_last_and_short_dtypes_stay() -> None:
    x = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float16)
    found = topk(x, 2, mask=torch.tensor([False, True, False]))
    assert found.indices[0] == 1 and found.values.tolist() == [2.0, -torch.inf] and found.gates.tolist() == [1.0, 0.0]
    assert found.values.dtype == found.gates.dtype == torch.float16


@pytest.mark.parametrize(("k", "ratio", "message"), [(0, 1.0, "1 to 3"), (4, 1.0, "1 to 3"), (2, 0.5, "at least 1")])
def test_what_cannot_be_is_refused(k: int, ratio: float, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        topk(torch.zeros(3), k, fetch_ratio=ratio)
