"""Modules whose code must be handed tensors are known, and get them."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx.graph.bytecode import needs_tensors
from tests.helpers import assert_same


class Sign(torch.autograd.Function):
    """Straight-through; keeps nothing, so that nobody notices what it was given."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


sign = Sign.apply
elsewhere = types.ModuleType("elsewhere")
elsewhere.sign = sign


def through_a_function(w: Tensor) -> Tensor:
    return sign(w)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 96, dtype=torch.float64))


class Direct(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ Sign.apply(self.w)


class Aliased(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ sign(self.w)


class Helped(Base):
    def binary(self) -> Tensor:
        return through_a_function(self.w)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.binary()


class InAModule(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ elsewhere.sign(self.w)


class Inherited(Direct):
    pass


class Closed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (lambda w: Sign.apply(w))(self.w)


class Checked(Base):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.w, nn.Parameter) and isinstance(self.w, Tensor)
        return x @ self.w if torch.is_floating_point(self.w) else x


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x @ self.w)


NEEDING = [Direct, Aliased, Helped, InAModule, Inherited, Closed, Checked]


@pytest.mark.parametrize("kind", NEEDING)
def test_a_custom_function_or_a_check_is_found(kind: type[nn.Module]) -> None:
    assert needs_tensors(kind)


@pytest.mark.parametrize("kind", [Plain, nn.Linear, nn.LSTM, nn.MultiheadAttention])
def test_others_need_none(kind: type[nn.Module]) -> None:
    assert not needs_tensors(kind)


@pytest.mark.parametrize("kind", [*NEEDING, Plain])
def test_their_gradients_reach_the_codebooks(kind: type[nn.Module]) -> None:
    """Those of the dense module that holds the expanded tensor; without a word they would be none."""
    dense = kind()
    small = rpqfx.rpqify(dense, rpqfx.Policy.from_scratch(min_size=0))
    held = small.w_rpq
    with torch.no_grad():
        dense.w.copy_(held())
    x = torch.randn(3, 64, dtype=torch.float64)
    ours, theirs = small(x), dense(x)
    assert_same(ours, theirs)
    theirs.square().sum().backward()
    ours.square().sum().backward()
    (wanted,) = torch.autograd.grad(held(), held.codebooks, dense.w.grad)
    assert_same(held.codebooks.grad, wanted)


def test_a_name_that_is_not_there_yet_hinders_nothing() -> None:
    class Odd(Base):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w + later  # noqa: F821

    assert not needs_tensors(Odd)
    assert sys.modules[__name__] is not None
