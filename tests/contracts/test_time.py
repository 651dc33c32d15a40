"""Rewriting is linear in the number of modules and needs no data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rpqfx
from rpqfx import Policy, Rule
from rpqfx.graph import capture, find_sites
from rpqfx.nn.hosting import host

RANDOM = Policy(codebook_bits=4, codebook_dim=16, init="random")


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
    "by role": Policy(codebook_bits=4, codebook_dim=16, init="random", sharing="role"),
    "rules": Policy(
        codebook_bits=4, codebook_dim=16, init="random", rules=tuple(Rule(f"{i}.*", codebook_bits=3) for i in range(50))
    ),
    "budget": Policy.budget(ratio=0.3, init="random"),
}

CASES = [
    *(pytest.param(name, RANDOM, id=name) for name in MODELS),
    *(pytest.param("blocks", policy, id=f"blocks, {name}") for name, policy in POLICIES.items()),
]


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


class Work(TorchDispatchMode):
    """Counts the elements that operators return, views and tensors without data (on the meta device) apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta and leaf._base is None:
                self.elements += leaf.numel()
        return result


def elements(model: nn.Module, policy: Policy) -> int:
    """Elements that a rewrite computes."""
    with Work() as work:
        small = rpqfx.rpqify(model, policy)
    assert rpqfx.report(small).rewritten
    return work.elements


def on_meta(layers: int) -> nn.Module:
    with torch.device("meta"):
        pairs = (nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(layers // 2))
        return nn.Sequential(*pairs)


def test_on_the_meta_device_a_layer_takes_few_calls_and_computes_nothing() -> None:
    """Nothing is drawn or fitted there, so that calls of functions are all that a rewrite costs."""
    policy = Policy(codebook_bits=4, codebook_dim=16)
    calls(on_meta(20), policy)  # what is done once is done
    small, large = (calls(on_meta(n), policy) for n in (20, 40))
    assert (large - small) / 20 < 5_000  # some 2,600 of them
    assert elements(on_meta(40), policy) == 0


@pytest.mark.parametrize("name", MODELS)
def test_codebooks_are_drawn_from_what_is_there_in_a_few_passes(name: str) -> None:
    """The elements computed are a few times those of the weights, however many layers there are."""
    counts = [elements(MODELS[name](n), RANDOM) for n in (8, 16, 32)]
    weights = sum(p.numel() for p in MODELS[name](8).parameters())
    assert weights < counts[0] < 3 * weights  # a copy, and the codebooks that are drawn
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_calls_are_linear_in_the_number_of_modules(name: str, policy: Policy) -> None:
    """Twice the modules more take twice the calls more, and none takes many: some 8,000, traced with its block."""
    calls(MODELS[name](8), policy)  # what is done once is done
    counts = [calls(MODELS[name](n), policy) for n in (8, 16, 32)]
    assert 1.8 < (counts[2] - counts[1]) / (counts[1] - counts[0]) < 2.2
    assert (counts[2] - counts[1]) / 16 < 15_000


def test_a_module_of_many_parameters_takes_on_one_class() -> None:
    """A class of its own for each would make every later trace slower: tracing patches nn.Module and so all heirs."""
    model = nn.ParameterList([torch.randn(64, 64) for _ in range(50)])
    known = len(host._FOREIGN)
    rpqfx.rpqify(nn.Sequential(model), RANDOM)
    assert len(host._FOREIGN) <= known + 1


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
def test_no_forward_runs_on_data_unless_outputs_are_checked(init: str) -> None:
    Watched.seen.clear()
    model, policy = nn.Sequential(Watched(), Watched()), Policy(codebook_bits=4, codebook_dim=16, init=init)
    fired: list[str] = []
    model[0].fc.register_forward_hook(lambda *_: fired.append("fc"))
    small = rpqfx.rpqify(model, policy)
    find_sites(capture(model))
    assert Watched.seen and set(Watched.seen) == {fx.Proxy} and fired == []
    rpqfx.check_outputs(small, torch.randn(2, 64))
    assert Tensor in Watched.seen and fired
