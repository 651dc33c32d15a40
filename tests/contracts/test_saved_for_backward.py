"""No layer keeps a tensor of its weight's size for the backward pass.

autograd keeps the input, the codebooks and the codes. What counts is elements, in any dtype: indices of weight shape
would be as large as the weight. Every kind here has weights larger than each of its inputs and activations, so all
that is as large as a weight and is not what the layer stores anyhow is one too many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec
from rpqfx.nn import Layout, RPQWeight, VirtualWeight
from rpqfx.ops import PLANS, Plan
from tests.helpers import randn
from tests.kinds import KINDS, NAMES


def elements(tensor: Tensor) -> int:
    """Of the memory that a tensor keeps alive: a small view of a large tensor counts as large."""
    if tensor.is_sparse:
        return tensor._values().numel()
    return max(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())


def kept(run: Callable[[], Any]) -> list[Tensor]:
    """Every tensor that lives on with the graph of a forward, its results apart.

    Those that autograd packs, and those that a Function's context holds as an attribute.
    """
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        results = run()
    results = [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]
    nodes = [x.grad_fn for x in results if x.grad_fn is not None]
    assert nodes
    seen = set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [after for after, _ in node.next_functions if after is not None]
            found += [x for x in vars(node).values() if isinstance(x, Tensor)] if hasattr(node, "__dict__") else []
    mine = {id(x) for x in results}
    return [x for x in found if id(x) not in mine]


def weight_sizes(module: nn.Module) -> list[int]:
    return [math.prod(m.layout.shape) for m in module.modules() if isinstance(m, RPQWeight)]


def assert_keeps_no_weight(module: nn.Module, run: Callable[[], Any]) -> None:
    limit = min(weight_sizes(module))
    stored = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers())}
    found = [x for x in kept(run) if x.is_sparse or x.untyped_storage().data_ptr() not in stored]
    assert found
    large = [(tuple(x.shape), x.dtype) for x in found if elements(x) >= limit]
    assert not large, f"kept for backward, with a weight of {limit} elements: {large}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_layer_keeps_its_weight(name: str, plan: Plan, training: bool) -> None:
    """Whichever way products run, with signs, factors, stages and scaled gradients too."""
    more = {"codebook_bits": 2, "stages": 2, "signs": True, "scale": True, "column_scale": True, "grad_scale": "mean"}
    for options in ({}, {"column_scale": True}, more):
        kind = KINDS[name]
        layer = kind.make(**options, plan=plan).train(training)
        inputs = [x.requires_grad_() if x.is_floating_point() else x for x in kind.make_inputs()]
        assert sum(x.numel() for x in inputs) < min(weight_sizes(layer))
        assert_keeps_no_weight(layer, lambda: layer(*inputs, **dict(kind.call)))  # noqa: B023


@pytest.mark.parametrize(
    "options",
    [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}, {"padding_idx": 0}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("name", ["embedding", "embedding bag"])
def test_no_table_keeps_its_weight_whatever_it_does_to_rows(name: str, options: dict) -> None:
    layer = KINDS[name].layer(64, 32, codebook_dim=4, codebook_bits=3, **options)
    assert_keeps_no_weight(layer, lambda: layer(torch.tensor([[1, 5], [0, 5]])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear row", "linear column", "conv2d", "attention"])
def test_no_layer_keeps_its_weight_under_autocast(name: str, dtype: torch.dtype) -> None:
    kind = KINDS[name]
    layer = kind.make(dtype=torch.float32)
    inputs = kind.make_inputs(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_keeps_no_weight(layer, lambda: layer(*inputs))


@pytest.mark.parametrize("name", ["linear row", "conv2d", "bilinear row", "embedding"])
def test_no_layer_keeps_its_weight_for_a_second_backward(name: str) -> None:
    kind = KINDS[name]
    layer = kind.make()
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in kind.make_inputs()]
    # A weight's gradient is asked for by its codebooks alone.
    wanted = [p for p in layer.parameters() if p.requires_grad]

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(*inputs).square().sum(), wanted, create_graph=True)

    assert_keeps_no_weight(layer, run)


def ways() -> list[Any]:
    """Every kind with both plans; by default each with one of them, in turn."""
    pairs = [
        (name, plan, (i + j) % 2) for i, name in enumerate(NAMES) for j, plan in enumerate(("dequantize", "lookup"))
    ]
    return [pytest.param(name, plan, marks=[pytest.mark.slow] * other) for name, plan, other in pairs]


@pytest.mark.parametrize(("name", "plan"), ways())
def test_no_compiled_layer_keeps_its_weight(name: str, plan: Plan) -> None:
    """A compiler that sees a weight in the forward and again in the backward must not merge the two."""
    torch.compiler.reset()
    kind = KINDS[name]
    layer = kind.make(plan=plan)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in kind.make_inputs()]
    compiled(*inputs, **dict(kind.call))  # what is saved while compiling is not what is saved by the result
    assert_keeps_no_weight(layer, lambda: compiled(*inputs, **dict(kind.call)))
    torch.compiler.reset()


class Reading(nn.Module):
    """Uses the tensor itself, in a way that has no need of it for backward."""

    def __init__(self, **flags: Any) -> None:
        super().__init__()
        self.held = RPQWeight(CodebookSpec(40, 48, 4, 8, **flags))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.held().sum(0)


@pytest.mark.parametrize(
    "flags", [{}, {"scale": True}, {"column_scale_group": 1}, {"scale": True, "column_scale_group": 1}], ids=str
)
def test_no_compiled_read_keeps_the_weight(flags: dict[str, Any]) -> None:
    """The gradients of factors need the rows again: a compiler must not merge that with the first time."""
    torch.compiler.reset()
    module = Reading(**flags)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = randn(0, 3, 48, dtype=torch.float32).requires_grad_()
    compiled(x)
    assert_keeps_no_weight(module, lambda: compiled(x))
    torch.compiler.reset()


@pytest.mark.parametrize("transposed", [False, True], ids=["row", "column"])
@pytest.mark.parametrize(
    "use",
    [
        lambda w, x, y: F.linear(x, w), lambda w, x, y: x @ w.T, lambda w, x, y: y @ w, lambda w, x, y: w @ x.T,
        lambda w, x, y: torch.addmm(y, x, w.t()), lambda w, x, y: torch.einsum("bi,oi->bo", x, w),
        lambda w, x, y: F.embedding(torch.tensor([1, 2]), w),
    ],
    ids=["F.linear", "x @ w.T", "y @ w", "w @ x.T", "addmm", "einsum", "embedding"],
)  # fmt: skip
def test_no_use_of_a_virtual_weight_keeps_it(use: Callable[..., Tensor], transposed: bool) -> None:
    layout = Layout((40, 48), transposed=transposed)
    weight = RPQWeight(CodebookSpec(layout.num_vectors, layout.dim, 4, 8), layout)
    x, y = (randn(0, 3, n, dtype=torch.float32).requires_grad_() for n in (48, 40))
    assert_keeps_no_weight(weight, lambda: use(VirtualWeight(weight), x, y))


@pytest.mark.parametrize("padding", [1, "same"])
def test_no_convolution_with_a_virtual_weight_keeps_it(padding: int | str) -> None:
    weight = RPQWeight(CodebookSpec(16, 108, 4, 8), Layout((16, 12, 3, 3)))
    x = randn(0, 1, 12, 5, 4, dtype=torch.float32).requires_grad_()
    assert_keeps_no_weight(weight, lambda: F.conv2d(x, VirtualWeight(weight), padding=padding))


# ------------------------------------------------------------------------------------- the check can fail


class Expanding(nn.Module):
    """What the check is for: gathers the weight, then multiplies."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.held = RPQWeight(CodebookSpec(40, 48, 4, 8))
        self.how = how

    def forward(self, x: Tensor) -> Any:
        if self.how == "expand, then F.linear":
            return F.linear(x, self.held())
        if self.how == "gather by an index of weight shape":
            index = torch.arange(40 * 48).view(40, 48) % self.held.codebooks.numel()
            return x.sum() + self.held.codebooks.flatten().gather(0, index.flatten()).sum()
        if self.how == "a view of the weight":
            return x[:, 0] * self.held()[0, :1] + Kept.apply(x[:, 0], self.held().detach()[:1, 0])
        return Kept.apply(x, self.held().detach())


class Kept(torch.autograd.Function):
    """Keeps a tensor out of autograd's sight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden: Tensor) -> Tensor:
        ctx.hidden = hidden
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@pytest.mark.parametrize(
    "how",
    [
        "expand, then F.linear",
        "gather by an index of weight shape",
        "a view of the weight",
        "an attribute of a context",
    ],
)
def test_a_layer_that_keeps_its_weight_is_caught(how: str) -> None:
    layer = Expanding(how)
    x = randn(0, 3, 48, dtype=torch.float32).requires_grad_()
    with pytest.raises(AssertionError, match="kept for backward, with a weight of 1920 elements"):
        assert_keeps_no_weight(layer, lambda: layer(x))
