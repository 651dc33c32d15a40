"""Codebooks are a child of a container, and none of its items."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor, nn

import rpqfx
from rpqfx.nn import RPQWeight
from tests.models import SMALL, assert_equals_dense


class Chain(nn.Sequential):
    """Scales its input by a matrix of its own before it runs its items."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.first = nn.Parameter(torch.randn(16, 16) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.first)


class Branches(nn.ModuleList):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16) for _ in range(3))
        self.mix = nn.Parameter(torch.randn(16, 16) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self) @ self.mix / len(self)


class Named(nn.ModuleDict):
    def __init__(self) -> None:
        super().__init__({"a": nn.Linear(16, 16), "b": nn.Tanh()})
        self.mix = nn.Parameter(torch.randn(16, 16) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        for name in self:
            x = self[name](x)
        return x @ self.mix


def test_a_chain_runs_its_items_only():
    model = Chain().double()
    small = rpqfx.rpqify(model, SMALL)
    assert isinstance(small.first_rpq, RPQWeight) and len(small) == len(model) == 3
    for again in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert_equals_dense(model, again, (torch.randn(2, 16, dtype=torch.float64, requires_grad=True),), {})
    assert small[-1] is list(small)[2]
    small.insert(0, nn.Tanh())
    del small[1]
    assert type(small[0]) is nn.Tanh
    assert list(small._modules) == ["0", "1", "2", "first_rpq"]


def test_a_list_counts_its_items_only():
    model = Branches().double()
    small = rpqfx.rpqify(model, SMALL)
    assert_equals_dense(model, small, (torch.randn(2, 16, dtype=torch.float64, requires_grad=True),), {})
    last = small[2]
    assert small[-1] is last and len(small) == 3 and not any(isinstance(item, RPQWeight) for item in small)
    small.append(nn.Identity())
    assert small[3].__class__ is nn.Identity
    del small[0]
    small.insert(0, nn.Tanh())
    assert [type(item) for item in small] == [nn.Tanh, type(last), type(last), nn.Identity] and small[2] is last
    assert "mix_rpq.codebooks" in small.state_dict() and isinstance(small.mix_rpq, RPQWeight)


def test_a_dictionary_names_its_items_only():
    model = Named().double()
    small = rpqfx.rpqify(model, SMALL)
    assert_equals_dense(model, small, (torch.randn(2, 16, dtype=torch.float64, requires_grad=True),), {})
    assert list(small) == list(small.keys()) == ["a", "b"] == [name for name, _ in small.items()]
    assert len(small) == len(list(small.values())) == 2 and "mix_rpq" not in small and "a" in small
    small.pop("b")
    assert list(small) == ["a"] and isinstance(small.mix_rpq, RPQWeight)
