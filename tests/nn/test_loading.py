"""Codes that are Parameters without a gradient compute, copy, save and load as codes that are buffers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import CodeError
from rpqfx.nn import RPQWeight

SPECS = {
    "bytes": CodebookSpec(24, 8, 4, entries=16),
    "signs": CodebookSpec(24, 8, 4, entries=16, stages=2, signs=True, scale=True),
    "two bytes": CodebookSpec(1200, 8, 4, entries=600),
    "sixteen bits": CodebookSpec(40_000, 4, 4, entries=40_000),
    "tiles": CodebookSpec(64, 8, 4, entries=16, stages=2, tiled=True),
}


def frozen(weight: RPQWeight) -> RPQWeight:
    made = copy.deepcopy(weight)
    made.hold_codes_as_parameters()
    return made


@pytest.mark.parametrize("kind", SPECS)
def test_they_compute_the_same(kind: str) -> None:
    weight = RPQWeight(SPECS[kind])
    other, x = frozen(weight), torch.randn(3, weight.spec.dim)
    assert {name for name, p in other.named_parameters() if not p.requires_grad} >= {"codes"}
    assert not dict(other.named_buffers())
    for made in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(made.linear(x), weight.linear(x))
        assert torch.equal(made.codes, weight.codes)
    for one in (weight, other):
        one.linear(x).square().sum().backward()
    assert torch.equal(other.codebooks.grad, weight.codebooks.grad)  # type: ignore[arg-type]
    assert other.half().stored_codes.dtype == torch.uint8
    other.hold_codes_as_buffers()
    assert torch.equal(other.codes, weight.codes) and {name for name, _ in other.named_buffers()} >= {"codes"}


@pytest.mark.parametrize("kind", SPECS)
def test_state_dicts_fit_both_ways(kind: str) -> None:
    weight = RPQWeight(SPECS[kind])
    state, other = weight.state_dict(), frozen(RPQWeight(SPECS[kind]))
    assert other.state_dict().keys() == state.keys()
    other.load_state_dict(state)
    assert torch.equal(other(), weight())
    again = RPQWeight(SPECS[kind])
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(), weight()) and again.codes.dtype == weight.spec.code_dtype
    other.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(other(), weight())


def test_codes_may_be_assigned_and_are_checked() -> None:
    weight = frozen(RPQWeight(SPECS["two bytes"]))
    weight.codes = torch.zeros(weight.spec.codes_shape, dtype=torch.int64)
    assert isinstance(weight._parameters["codes"], torch.nn.Parameter) and not weight.codes.any()
    weight.reset_parameters()
    assert weight.codes.any()
    state = {name: tensor.clone() for name, tensor in weight.state_dict().items()}
    state["codes"] = state["codes"].view(torch.int16) + 600
    for made in (weight, RPQWeight(SPECS["two bytes"])):
        with pytest.raises(CodeError, match="codes holds"):
            made.load_state_dict(state)
        with pytest.raises(CodeError, match="codes holds"):
            made.load_state_dict({**state, "codes": state["codes"].view(torch.uint8)})
