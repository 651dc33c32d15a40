"""What is packed is unpacked to the last bit, whatever it is."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rpqfx.conversion.moments import Moments
from rpqfx.distributed.parcels import packed, unpacked
from tests.helpers import randn, seeds

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int16, torch.uint8, torch.bool, torch.complex64)


def again(value: Any) -> Any:
    return unpacked(packed(value))


@given(seeds, st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_tensors_of_all_kinds_arrive(seed: int, kinds: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = [(randn(seed + n, *shape) * 100).to(dtype) for n, (dtype, shape) in enumerate(kinds)]
    found = again({"all": tensors, "other": ("text", 1.5, None, {1, 2})})
    assert found["other"] == ("text", 1.5, None, {1, 2})
    for sent, received in zip(tensors, found["all"], strict=True):
        assert received.dtype is sent.dtype and received.shape == sent.shape and torch.equal(received, sent)


def test_what_is_not_a_number_arrives_too() -> None:
    x = torch.tensor([float("nan"), float("inf"), -0.0])
    assert torch.equal(again(x).view(torch.int32), x.view(torch.int32))


def test_views_and_parameters_arrive_by_themselves() -> None:
    x: Tensor = randn(0, 8, 6)
    assert packed(x[:, :1]).numel() < packed(x).numel() / 2
    assert torch.equal(again(x.t()), x.t()) and torch.equal(again(nn.Parameter(x)), x)
    assert not again(nn.Parameter(x)).requires_grad


def test_moments_arrive() -> None:
    moments = Moments()
    moments.add(randn(0, 5, 3), randn(1, 5).abs())
    found = again({3: moments})[3]
    assert torch.equal(found.mean, moments.mean) and found.rows == 5
