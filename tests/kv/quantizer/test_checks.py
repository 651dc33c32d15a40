"""What quantisers refuse says what was seen and what was expected."""

from __future__ import annotations

import pytest
import torch

from rpqfx.errors import InputError
from rpqfx.kv.quantizer.checks import check_points, check_vectors, counted_tokens


def test_vectors_are_floating_and_as_wide_as_expected() -> None:
    check_vectors(torch.zeros(2, 0, 4), 4)
    for x, message in [
        (torch.zeros(2, 5), r"x has the shape \[2, 5\], expected 4 \(dim\) on the last axis"),
        (torch.zeros(()), "expected 4"),
        (torch.zeros(4, dtype=torch.int64), "real floating tensors, got torch.int64"),
        (torch.zeros(4, dtype=torch.complex64), "real floating tensors, got torch.complex64"),
    ]:
        with pytest.raises(InputError, match=message):
            check_vectors(x, 4)


def test_points_are_finite_and_weights_go_with_them() -> None:
    points = torch.zeros(3, 4)
    for weights in (None, torch.ones(3), torch.ones(3, 2)):
        check_points(points, weights, 4, 2)
    for bad in (float("nan"), float("inf")):
        spoilt = points.clone()
        spoilt[1, 2] = bad
        with pytest.raises(InputError, match="1 of 3 points are not finite"):
            check_points(spoilt, None, 4, 2)
    with pytest.raises(InputError, match=r"points are \[N, dim\]"):
        check_points(points[None], None, 4, 2)
    with pytest.raises(InputError, match=r"here \[3\] or \[3, 2\], got \[3, 4\]"):
        check_points(points, torch.ones(3, 4), 4, 2)


def test_a_mask_expands_to_the_tokens() -> None:
    x = torch.zeros(2, 3, 5, 4)
    assert counted_tokens(x, None).tolist() == [True] * 30
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    assert torch.equal(counted_tokens(x, mask[:, None]), mask[:, None].expand(2, 3, 5).reshape(-1))
    assert torch.equal(counted_tokens(x, mask[0]), mask[0].repeat(6))
    with pytest.raises(InputError, match="the mask is bool"):
        counted_tokens(x, mask[0].float())
    for wrong in (mask, mask[None, None, None], mask[:, None, :, None]):
        with pytest.raises(InputError, match=r"expected what expands to \[2, 3, 5\]"):
            counted_tokens(x, wrong)
