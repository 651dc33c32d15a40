"""Claims on graphs with those of children in the places of their calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rpqfx.graph.inline import inlined
from rpqfx.graph.module_graphs import capture


class Pair(nn.Module):
    """Returns two things, one of them by a keyword and a default."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, shift: float = 2.0, **kwargs: Any) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y + shift, y


class Handing(nn.Module):
    """Hands on what it does not know, as layers of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.rest = Pair(), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 3), nn.Tanh()))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        a, b = self.pair(x, **kwargs)
        return self.rest(a) + self.rest(b)


def test_the_whole_is_what_the_module_is() -> None:
    model = Handing()
    captured = capture(model)
    assert not captured.opaque
    for graph in inlined(captured, ""):
        targets = [node.target for node in graph.nodes if node.op == "call_module"]
        assert targets == ["pair.linear"] + ["rest.0", "rest.1.0", "rest.1.1"] * 2
        x = torch.randn(2, 4)
        run = fx.Interpreter(fx.GraphModule(model, graph))
        empty = [{}] * (sum(node.op == "placeholder" for node in graph.nodes) - 1)
        torch.testing.assert_close(run.run(x, *empty), model(x))


def test_names_are_the_models_own() -> None:
    model = nn.ModuleDict({"a": nn.ModuleList([Handing()])})
    (graph, *_) = inlined(capture(model), "a.0")
    assert "a.0.rest.1.0" in [node.target for node in graph.nodes]


@pytest.mark.parametrize("name", ["pair.linear", "rest.0"])
def test_of_torchs_own_layers_there_is_none(name: str) -> None:
    assert not list(inlined(capture(Handing()), name))
