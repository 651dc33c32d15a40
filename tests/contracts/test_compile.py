"""torch.compile takes every layer in one graph, and the results are those of eager mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from rpqfx.nn import RPQConv2d
from rpqfx.ops import PLANS, Plan, products
from tests.helpers import assert_same, gradients
from tests.kinds import CHANNELS, KINDS, NAMES


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiles(name: str, backend: str, tolerance: float, **options: object) -> None:
    """Forward and backward; a second batch size is served too."""
    kind = KINDS[name]
    layer = kind.make(**options)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for seed in (0, 1):
        inputs = [x.requires_grad_() if x.is_floating_point() else x for x in kind.make_inputs(seed)]
        wanted = {
            **dict(layer.named_parameters()),
            **{str(i): x for i, x in enumerate(inputs) if x.requires_grad},
        }
        ours, theirs = compiled(*inputs, **dict(kind.call)), layer(*inputs, **dict(kind.call))
        pairs = zip(*[out if isinstance(out, tuple) else (out,) for out in (ours, theirs)], strict=True)
        for mine, other in pairs:
            assert (mine is None) == (other is None)
            if mine is not None:
                assert_same(mine, other, tolerance=tolerance)
        expected = gradients(theirs, wanted)
        for key, grad in gradients(ours, wanted).items():
            assert_same(grad, expected[key], key, tolerance=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager(name: str) -> None:
    assert_compiles(name, "aot_eager", 1e-9)


def planned() -> list[Any]:
    """Some kinds with every plan, of which the first has all by default and the others one each, in turn."""
    names = ("linear row", "linear column", "conv2d", "embedding")
    pairs = [(name, plan, i and (i + j) % 3) for i, name in enumerate(names) for j, plan in enumerate(PLANS)]
    return [pytest.param(name, plan, marks=[pytest.mark.slow] * bool(other)) for name, plan, other in pairs]


@pytest.mark.parametrize(("name", "plan"), planned())
def test_compiled_with_all_options_equals_eager(name: str, plan: Plan) -> None:
    options = {
        "signs": True,
        "scale": True,
        "column_scale": True,
        "stages": 2,
        "sharing": "layer",
        "grad_scale": "sqrt",
    }
    assert_compiles(name, "aot_eager", 1e-9, **options, plan=plan)


def by_default(name: str) -> list[Any]:
    """All convolutions that contract, of which all but one are slow: they differ in the dense convolution alone."""
    return [n if n == name else pytest.param(n, marks=pytest.mark.slow) for n in CHANNELS]


@pytest.mark.parametrize("name", by_default("conv2d column_scale channels"))
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="none", marks=pytest.mark.slow),  # the next test has these
        pytest.param({"signs": True, "scale": True, "stages": 2, "sharing": "layer"}, id="all"),
    ],
)
def test_compiled_convolutions_that_contract_equal_eager(
    name: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "cheaper_conv", lambda *args: "lookup")
    monkeypatch.setattr(products, "Conv", None)
    assert_compiles(name, "aot_eager", 1e-9, **options)


@pytest.mark.parametrize("name", by_default("conv transpose 2d channels"))
def test_a_dynamic_batch_needs_one_graph_of_a_convolution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of one that contracts."""
    monkeypatch.setattr(products, "cheaper_conv", lambda *args: "lookup")
    layer = KINDS[name].make()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for samples in (3, 2, 40):
        x = torch.randn(samples, *KINDS[name].inputs[0][1:], dtype=torch.float64, requires_grad=True)
        wanted = {"x": x, **dict(layer.named_parameters())}
        expected = gradients(layer(x), wanted)
        for key, grad in gradients(compiled(x), wanted).items():
            assert_same(grad, expected[key], key)
    assert counter.frame_count == 1


def test_a_dynamic_batch_needs_one_graph() -> None:
    layer = KINDS["linear row"].make()
    frames = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 60, 7, 200):
        x = torch.randn(rows, 48, dtype=torch.float64)
        assert_same(compiled(x), layer(x))
    assert len(frames) == 1


def test_inductor_equals_eager() -> None:
    assert_compiles("linear row", "inductor", 1e-8)


@pytest.mark.parametrize("size", [1, 5])
def test_what_follows_a_compiled_convolution_may_change_its_result_in_place(size: int) -> None:
    torch.compiler.reset()
    layer = RPQConv2d(16, 24, 1, codebook_bits=2, codebook_dim=8, plan="lookup")
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    x = torch.randn(2, 16, size, size)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    torch.testing.assert_close(compiled(x), model(x))
    assert layer.weight_rpq.codebooks.grad is not None
    torch.compiler.reset()


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("conv")])
def test_a_compiler_sees_convolutions_where_no_gradient_is_asked_for(name: str) -> None:
    """So that it chooses their layout; with a gradient it would keep the filters, so there it sees one step."""
    layer = KINDS[name].make(plan="dequantize")
    inputs = KINDS[name].make_inputs(0)
    seen: list[bool] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(any(node.target is torch.convolution for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert_same(compiled(*inputs), layer(*inputs))
    compiled(*inputs)
    assert seen == [True, False]
