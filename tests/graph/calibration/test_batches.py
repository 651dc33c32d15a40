"""Batches: how they are given to a model, and what is none."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.graph.calibration.batches import Batches


class Echo(nn.Module):
    def forward(self, x: Any, *rest: Any, flag: bool = False) -> Any:
        return (x, *rest, flag)


def test_each_form_is_the_call_it_stands_for() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    form = collections.namedtuple("form", "x y")
    batches = [x, (x, y), [x, y], {"x": x, "flag": True}, collections.UserDict(x=y), form(x, y), ()]
    model = nn.Module()
    model.forward = lambda *args, **kwargs: (args, kwargs)  # type: ignore[method-assign]
    found = [run() for run in Batches(model, batches).runs]
    empty: dict[str, Tensor] = {}
    assert found == [
        ((x,), empty), ((x, y), empty), ((x, y), empty), ((), {"x": x, "flag": True}), ((), {"x": y}),
        ((x, y), empty), ((), empty),
    ]  # fmt: skip


def test_a_generator_is_read_once() -> None:
    batches = Batches(Echo(), (torch.full((1,), float(i)) for i in range(3)))
    for _ in range(2):
        assert [float(run()[0]) for run in batches.runs] == [0, 1, 2]


@pytest.mark.parametrize("one", [torch.zeros(2, 3), {"x": torch.zeros(2)}, "x"])
def test_one_batch_is_no_sequence_of_them(one: Any) -> None:
    with pytest.raises(InputError, match=f"sequence of batches, got one {type(one).__name__}; put it in a list"):
        Batches(Echo(), one)


@pytest.mark.parametrize("wrong", [None, 3, "x", {1, 2}])
def test_what_is_no_batch_is_refused_by_its_number(wrong: Any) -> None:
    with pytest.raises(InputError, match="calibration batch 1 is a tensor, a tuple or a mapping"):
        Batches(Echo(), [torch.zeros(2), wrong])


def test_what_the_model_rejects_is_refused_by_its_number() -> None:
    batches = Batches(nn.Linear(3, 2), [torch.zeros(1, 3), torch.zeros(1, 4), {"y": torch.zeros(1, 3)}])
    batches.runs[0]()
    with pytest.raises(InputError, match=r"rejects calibration batch 1 \(RuntimeError: .*mat1") as caught:
        batches.runs[1]()
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(InputError, match=r"rejects calibration batch 2 \(TypeError"):
        batches.runs[2]()
