"""Rewriting is linear in the number of modules and needs no data."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import rpqfx
from rpqfx import Policy, Rule
from rpqfx.graph import capture, find_sites
from rpqfx.nn import backed

RANDOM = Policy(bits=4, codebook_dim=16, init="random")


class Block(nn.Module):
    """Four layers and a forward of its own, with a default argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "blocks": lambda n: nn.Sequential(*(Block() for _ in range(n // 4))),
    "flat": lambda n: nn.Sequential(*(nn.Linear(64, 64) for _ in range(n))),
    "own parameters": lambda n: nn.Sequential(*(Product() for _ in range(n))),
    "recurrent": lambda n: nn.ModuleList(nn.GRU(64, 64) for _ in range(n // 2)),
    "parametrised": lambda n: nn.Sequential(*(parametrizations.weight_norm(nn.Linear(64, 64)) for _ in range(n))),
}
POLICIES = {
    "own": RANDOM,
    "by role": Policy(bits=4, codebook_dim=16, init="random", sharing="role"),
    "rules": Policy(bits=4, codebook_dim=16, init="random", rules=tuple(Rule(f"{i}.*", bits=3) for i in range(50))),
    "budget": Policy.budget(ratio=0.3, init="random"),
}


def seconds(model: nn.Module, policy: Policy) -> float:
    start = time.process_time()
    small = rpqfx.rpqify(model, policy)
    taken = time.process_time() - start
    assert rpqfx.report(small).rewritten
    return taken


def calls(model: nn.Module, policy: Policy) -> int:
    """Calls of functions during a rewrite, which no other process has a say in."""
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        rpqfx.rpqify(model, policy)
    finally:
        sys.setprofile(before)
    return count


def test_a_thousand_layers_take_seconds() -> None:
    """1,000 layers on the meta device, where nothing is drawn or fitted, are rewritten in under five seconds."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(500)))
    assert seconds(model, Policy(bits=4, codebook_dim=16)) < 5


@pytest.mark.parametrize("name", POLICIES)
def test_a_thousand_layers_in_blocks_of_their_own_take_seconds(name: str) -> None:
    """Each block is traced; the codebooks are drawn, which takes little for layers of this size."""
    assert seconds(MODELS["blocks"](1000), POLICIES[name]) < 5


@pytest.mark.parametrize(("name", "policy"), [*((n, "own") for n in MODELS), *(("blocks", p) for p in POLICIES)])
def test_calls_are_linear_in_the_number_of_modules(name: str, policy: str) -> None:
    """Twice the modules more take twice the calls more."""
    calls(MODELS[name](20), POLICIES[policy])  # what is done once is done
    counts = [calls(MODELS[name](n), POLICIES[policy]) for n in (48, 96, 192)]
    assert 1.7 < (counts[2] - counts[1]) / (counts[1] - counts[0]) < 2.3


def test_time_is_linear_in_the_number_of_modules() -> None:
    """Four times the modules take about four times as long, and not sixteen."""
    small, middle, large = (seconds(MODELS["blocks"](n), RANDOM) for n in (500, 1000, 2000))
    assert middle < 4 * small and large < 8 * small, (small, middle, large)


def test_a_module_of_many_parameters_takes_on_one_class() -> None:
    """A class of its own for each would make every later trace slower: tracing patches nn.Module and so all heirs."""
    model = nn.ParameterList([torch.randn(64, 64) for _ in range(50)])
    known = len(backed._FOREIGN)
    rpqfx.rpqify(nn.Sequential(model), RANDOM)
    assert len(backed._FOREIGN) <= known + 1


class Watched(nn.Module):
    """Remembers what it was called with, in its class, where nothing is undone."""

    seen: ClassVar[list[type]] = []

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.w = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        Watched.seen.append(type(x))
        return self.fc(x) @ self.w * scale


@pytest.mark.parametrize("init", ["fit", "random"])
def test_no_forward_runs_on_data_unless_example_inputs_are_given(init: str) -> None:
    Watched.seen.clear()
    model, policy = nn.Sequential(Watched(), Watched()), Policy(bits=4, codebook_dim=16, init=init)
    fired: list[str] = []
    model[0].fc.register_forward_hook(lambda *_: fired.append("fc"))
    rpqfx.rpqify(model, policy)
    find_sites(capture(model))
    assert Watched.seen and set(Watched.seen) == {fx.Proxy} and fired == []
    rpqfx.rpqify(model, policy, example_inputs=(torch.randn(2, 64),))
    assert Tensor in Watched.seen and fired
