"""Reading a model: one graph per module, nothing left behind, one module's trouble is its own."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rpqfx.errors import CaptureError
from rpqfx.graph import capture
from rpqfx.graph.module_graphs import evaluating
from tests.models import BY_NAME, CASES, CNN, GPT, MLP, Block, Opaque


def targets(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def test_each_module_has_a_graph_of_its_own_with_children_as_leaves():
    captured = capture(GPT())
    assert targets(captured.graphs[""].graphs[0]) == {"tok", "blocks.0", "blocks.1", "norm", "head"}
    assert targets(captured.graphs["blocks.1"].graphs[0]) == {"norm1", "norm2", "qkv", "proj", "fc1", "fc2", "drop"}
    assert captured.opaque == {}
    assert captured.graphs["tok"].graphs == ()  # torch.nn's own layers are known, not read


def test_the_graphs_are_of_the_model_itself():
    model = GPT()
    captured = capture(model)
    assert captured.model is model
    assert set(captured.graphs) == {name for name, _ in model.named_modules()}


class TrainOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        x = self.always(x)
        return self.sometimes(x) if self.training and extra is None else x


def test_graphs_are_read_in_both_modes_and_with_defaults():
    found = [targets(graph) for graph in capture(TrainOnly().eval()).graphs[""].graphs]
    assert {"always"} in found and {"always", "sometimes"} in found


def test_an_opaque_module_carries_its_reason_and_stops_no_other():
    model = nn.Sequential(nn.Linear(12, 12), Opaque(), Block(16, 4))
    captured = capture(model)
    assert set(captured.opaque) == {"1"}
    assert captured.opaque["1"].startswith("TraceError: Proxy object cannot be iterated")
    assert "qkv" in targets(captured.graphs["2"].graphs[0])


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("only at run time")


class NoForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)


def test_whatever_a_forward_raises_makes_it_opaque():
    captured = capture(nn.ModuleDict({"raises": Raises(), "none": NoForward()}))
    assert captured.opaque == {"raises": "KeyError: 'only at run time'", "none": "it has no forward"}


def test_named_classes_are_not_read():
    captured = capture(GPT(), leaves=(Block,))
    assert captured.graphs["blocks.0"].graphs == () and captured.graphs["blocks.0"].opaque is None
    assert captured.graphs[""].graphs


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_module_is_opaque_and_its_parent_is_not():
    captured = capture(Scripted())
    assert captured.opaque == {"inner": "it is a ScriptModule"}
    assert captured.graphs[""].graphs


# ------------------------------------------------------------------------------------------ nothing is left behind


class Traces(nn.Module):
    """Leaves a trace of every call, in every place where one can be left."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(()))
        self.calls: list[Any] = []
        self.cache: dict[str, Any] = {}
        self.seen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x)
        self.cache["x"] = x
        self.seen.add(len(self.seen))
        self.last = x
        self.new_buffer = torch.randn(3)
        random.random()
        self.count += 1
        return self.norm(self.fc(x)) + torch.rand(4)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {name: {key: copy.copy(value) for key, value in m.__dict__.items()} for name, m in model.named_modules()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("runs", [False, True])
def test_capture_leaves_the_state_of_the_model_as_it_was(training: bool, runs: bool):
    model = nn.Sequential(Traces().train(training), CNN(), nn.Dropout())
    model[1].bn.eval()
    if runs:
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout())
        model[0].train(training)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    before, random_state = snapshot(model), torch.get_rng_state()
    capture(model, (torch.ones(3, 4),) if runs else None)
    after = snapshot(model)
    for name, values in before.items():
        assert values.keys() == after[name].keys()
        for key, value in values.items():
            assert type(value) is type(after[name][key]), key
            if not isinstance(value, Tensor):
                assert value == after[name][key], (name, key)
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_capture_keeps_the_identity_of_containers():
    model = Traces()
    calls = model.calls
    capture(model)
    assert model.calls is calls and calls == []
    model.calls.append(1)
    assert calls == [1]


def test_capture_leaves_no_hook_and_runs_nothing_without_inputs():
    model, fired = MLP(), []
    model.fc1.register_forward_hook(lambda *_: fired.append("fc1"))
    model.register_forward_hook(lambda *_: fired.append("model"))
    before = {name: list(m._forward_hooks) for name, m in model.named_modules()}
    capture(model)
    assert fired == []
    capture(model, (torch.randn(2, 12),))
    assert set(fired) == {"fc1", "model"}
    assert {name: list(m._forward_hooks) for name, m in model.named_modules()} == before


def test_evaluating_restores_each_modules_own_mode():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)))
    model[1][1].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == modes


# ------------------------------------------------------------------------------------------------ lazy modules


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.ReLU(), nn.LazyLinear(5)))


def test_a_lazy_module_that_never_ran_is_named():
    with pytest.raises(CaptureError, match=r"1\.1 is a LazyLinear that has never run.*run the model once on inputs"):
        capture(lazy())


def test_example_inputs_give_lazy_modules_their_shapes():
    captured = capture(lazy(), (torch.randn(2, 4),))
    assert captured.model[1][1].weight.shape == (5, 6)


def test_a_lazy_module_that_ran_is_an_ordinary_one():
    model = lazy()
    model(torch.randn(2, 4))
    assert capture(model).opaque == {}


# ---------------------------------------------------------------------------- graphs held against what really runs


class FrozenBranch(nn.Module):
    """Symbolic tracing takes one branch for ever: the flag is a plain value at tracing, another at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if not isinstance(x, fx.Proxy) else x @ self.weight


def test_a_graph_that_does_not_reproduce_its_module_is_dropped():
    model = nn.Sequential(nn.Linear(4, 4), FrozenBranch())
    assert capture(model).opaque == {}  # without data nobody can tell
    captured = capture(model, (torch.randn(2, 4),))
    assert captured.opaque == {"1": "no graph of it reproduces its forward on the example inputs"}
    assert captured.graphs["1"].graphs == ()
    assert captured.graphs[""].opaque is None


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("opaque", "attention")], ids=lambda c: c.name)
def test_the_graphs_of_ordinary_models_reproduce_them(case):
    args, kwargs = case.arguments(torch.float32)
    plain = capture(case.model(torch.float32)).opaque
    checked = capture(case.model(torch.float32), args, kwargs).opaque
    assert checked == plain
    assert case.name.startswith(("structured", "recurrent")) or plain == {}


def test_example_kwargs_alone_run_the_model():
    model, seen = MLP(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    capture(model, example_kwargs={"x": torch.randn(2, 12)})
    assert seen


def test_an_opaque_model_is_read_with_inputs_too():
    case = BY_NAME["opaque"]
    args, _ = case.arguments(torch.float32)
    assert set(capture(case.model(torch.float32), args).opaque) == {""}
