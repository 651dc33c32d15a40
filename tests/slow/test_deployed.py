"""The models of ``tests.deployed`` through Inductor: compiled, and as packages of AOTInductor."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import export

from tests.contracts.test_deployed import BATCHES, NAMES, arguments, assert_same_gradients
from tests.deployed import DEPLOYED, assert_close, run_as
from tests.fresh import run_without_rpqfx

pytestmark = pytest.mark.slow
PLANS = [*((name, "auto") for name in NAMES), ("vit", "dequantize"), ("vit", "lookup"), ("lm", "lookup")]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graphs_to_train(name: str, model: nn.Module, compare: bool = True) -> int:
    """How many graphs Inductor needs for all batches; each result and gradient is held against eager mode, if asked."""
    torch.compiler.reset()
    twin = copy.deepcopy(model)
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in BATCHES:
        args = arguments(name, batch)
        outputs, wanted = compiled(*args), twin(*args)
        if compare:
            assert_close(outputs, wanted)
            assert_same_gradients(model, outputs, twin, wanted)
        else:
            outputs.sum().backward()
    return backend.frame_count


@pytest.mark.parametrize(("name", "plan"), [case for case in PLANS if case[0] != "resnet20"])
def test_inductor_trains_every_batch_with_one_graph(name: str, plan: str, monkeypatch: pytest.MonkeyPatch):
    run_as(plan, monkeypatch)
    assert graphs_to_train(name, DEPLOYED[name].model().train()) == 1


def test_inductor_trains_a_resnet_with_as_many_graphs_as_the_dense_one():
    """Its code for batch norm on a CPU depends on how many numbers are summed, so that some batches need their own.

    The dense model's gradients are only counted for: torch's own, compiled, differ from eager ones by up to 2e-3 here.
    """
    case = DEPLOYED["resnet20"]
    dense = graphs_to_train("resnet20", case.dense().train(), compare=False)
    assert graphs_to_train("resnet20", case.model().train()) <= dense


@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_inductor_infers_every_batch_with_one_graph(name: str, plan: str, monkeypatch: pytest.MonkeyPatch):
    run_as(plan, monkeypatch)
    model = DEPLOYED[name].model()
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for batch in BATCHES:
            args = arguments(name, batch)
            assert_close(compiled(*args), model(*args))
    assert backend.frame_count == 1


@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_packages_run_where_this_library_is_not(name: str, plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """For every size; they hold the tensors of the rewritten model and no others."""
    run_as(plan, monkeypatch)
    case = DEPLOYED[name]
    model = case.model()
    with torch.no_grad():
        program = export(model, case.inputs(**case.sizes), dynamic_shapes=case.dynamic())
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / f"{name}.pt2"))
    calls = [case.inputs(**sizes) for sizes in (case.sizes, *case.others)]
    [(names, outputs)] = run_without_rpqfx("aoti", {package: calls}, tmp_path)
    assert set(names) <= set(model.state_dict())
    with torch.no_grad():
        assert_close(outputs, [model(*call) for call in calls])
