"""What a model asks of its weights is noted without a trace, and can be asked again."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import CodebookSpec
from rpqfx.errors import RewriteError
from rpqfx.nn import RPQConv2d, RPQLinear, RPQMultiheadAttention, RPQWeight
from rpqfx.nn.weight_slice import Part
from rpqfx.timing.record import Trial, Use, observe
from tests.helpers import forms_run, randn
from tests.kinds import KINDS, NAMES
from tests.models import CASES, MLP, SMALL, Case

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
PRODUCTS = ("linear", "linear_t", "conv")


def asked(patch: pytest.MonkeyPatch) -> list[tuple[Part, str, Tensor, Tensor]]:
    """Every product that is asked of any weight from now on: the part of it, the method, input and output."""
    seen = []

    def spy(name: str) -> Any:
        run = getattr(Part, name)

        def method(self: Part, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = run(self, x, *args, **kwargs)
            seen.append((self, name, x, y))
            return y

        return method

    for name in PRODUCTS:
        patch.setattr(Part, name, spy(name))
    patch.setattr(RPQWeight, "_alone", False)  # or kernels are asked at once, past any part
    return seen


def memory(tensor: Tensor) -> int:
    """Where a tensor, or what it is a view of, lies."""
    return tensor.untyped_storage().data_ptr()


# -------------------------------------------------------------------------------------------------------- noting


@every_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_product_of_a_model_is_noted(case: Case, training: bool) -> None:
    """Of layers and of modules that use a Parameter of their own: as many as the model itself asks for."""
    small = rpqfx.rpqify(case.model(torch.float32), case.policy).train(training)
    args, kwargs = case.arguments(torch.float32)
    found = observe(small, args, kwargs, gradients=training)
    paths = {memory(module.codes): path for path, module in small.named_modules() if isinstance(module, RPQWeight)}
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(training):
        calls = asked(patch)
        small(*args, **kwargs)
    wanted: dict[str, Counter[Any]] = {path: Counter() for path in paths.values()}
    for part, product, x, _ in calls:
        wanted[paths[memory(part.tensors.codes)]][product, tuple(x.shape), x.dtype, training and x.requires_grad] += 1
    told = {
        path: Counter([(use.product, use.shape, use.dtype, use.input_gradient) for use in uses.elements()])
        for path, uses in found.items()
    }
    assert told == wanted
    assert calls or case.name in ("experts", "subclassed", "recurrent")  # which compute with the tensor
    assert {use.gradients for uses in found.values() for use in uses} <= {training}


@pytest.mark.parametrize("gradients", [False, True])
def test_products_of_codes_in_tiles_are_noted(gradients: bool) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = RPQWeight(CodebookSpec(64, 32, 8, 16, 3, 1, tiled=True))

        def forward(self, x: Tensor) -> Tensor:
            return self.held.linear(x)

    [(_, uses)] = observe(Held(), (randn(0, 5, 32, dtype=torch.float32),), {}, gradients=gradients).items()
    assert [use.product for use in uses.elements()] == ["linear"]


def test_products_are_noted_with_what_their_time_depends_on() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = RPQLinear(8, 16, codebook_dim=4, codebook_bits=2)

        def forward(self, x: Tensor) -> Tensor:
            self.fc(x)
            self.fc(x)
            with torch.no_grad():
                self.fc(x)
            with torch.autocast("cpu", torch.bfloat16):
                self.fc(x)
            return self.fc(x.t().contiguous().t())

    x = torch.randn(6, 8, requires_grad=True)
    (uses,) = observe(Both(), (x,), {}, gradients=True).values()
    cpu = torch.device("cpu")
    plain = Use("linear", (6, 8), (8, 1), torch.float32, cpu, None, True, True)
    assert uses == {
        plain: 2,
        Use("linear", (6, 8), (8, 1), torch.float32, cpu, None, False, False): 1,
        Use("linear", (6, 8), (8, 1), torch.float32, cpu, torch.bfloat16, True, True): 1,
        Use("linear", (6, 8), (1, 6), torch.float32, cpu, None, True, True): 1,
    }
    assert plain.rows == 6


def test_rows_are_counted_per_place_of_a_convolution() -> None:
    (uses,) = observe(RPQConv2d(3, 8, 3), (torch.randn(2, 3, 5, 7),), {}, gradients=False).values()
    assert [use.rows for use in uses] == [2 * 5 * 7]
    (uses,) = observe(RPQConv2d(3, 8, 3), (torch.randn(3, 5, 7),), {}, gradients=False).values()
    assert [use.rows for use in uses] == [5 * 7]
    (uses,) = observe(RPQLinear(8, 16), (torch.randn(2, 0, 8),), {}, gradients=False).values()
    assert [use.rows for use in uses] == [0]


class Touchy(nn.Module):
    """Leaves traces wherever a model can."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 32)
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.5)
        self.table = nn.Embedding(4, 32, max_norm=0.1)
        self.register_buffer("calls", torch.zeros(()))
        self.cache: list[Tensor] = []
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls += 1
        self.cache.append(x)
        if random.random() < 2:
            x = self.drop(self.norm(self.fc(x)))
        return x + self.table(torch.zeros(len(x), dtype=torch.long))


def snapshot(model: nn.Module) -> dict[str, Any]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    modes = {f"mode {name}": m.training for name, m in model.named_modules()}
    kinds = {f"class {name}": type(m) for name, m in model.named_modules()}
    return {**state, **{n: None if g is None else g.clone() for n, g in grads.items()}, **modes, **kinds}


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


@pytest.mark.parametrize("gradients", [False, True])
def test_noting_and_trials_leave_no_trace(gradients: bool) -> None:
    """Not in buffers, Parameters, gradients, modes, caches, hooks' counts or random states; the grad mode stays too."""
    torch.manual_seed(0)
    small = rpqfx.rpqify(Touchy(), SMALL).train()
    small.norm.eval()
    weight = small.fc.weight_rpq
    small(torch.randn(5, 12)).sum().backward()
    fired = []
    weight.codebooks.register_hook(lambda grad: fired.append(1))
    weight.register_forward_hook(lambda *args: fired.append(1))
    before, attributes = snapshot(small), (small.count, len(small.cache), dict(weight.__dict__))
    states = torch.get_rng_state(), random.getstate()
    found = observe(small, (torch.randn(7, 12, generator=torch.Generator().manual_seed(0)),), {}, gradients)
    (use,) = found["fc.weight_rpq"]
    for plan in ("dequantize", "lookup"):
        Trial(weight, use, plan)()
    after = snapshot(small)
    assert before.keys() == after.keys() and all(same(before[name], after[name]) for name in before)
    assert (small.count, len(small.cache), dict(weight.__dict__)) == attributes
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert fired == [] and torch.is_grad_enabled() and weight.plan == "auto"


def test_that_claim_can_fail() -> None:
    torch.manual_seed(0)
    small = rpqfx.rpqify(Touchy(), SMALL).train()
    before, states = snapshot(small), (torch.get_rng_state(), random.getstate())
    small(torch.randn(7, 12)).sum().backward()
    after = snapshot(small)
    changed = {name for name in before if not same(before[name], after[name])}
    assert changed >= {"norm.running_mean", "calls", "grad fc.bias", "grad fc.weight_rpq.codebooks"}
    assert not torch.equal(torch.get_rng_state(), states[0]) and random.getstate() != states[1]


def test_random_states_return_where_a_model_fails() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = RPQLinear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3), random.random()
            raise OverflowError("mine")

    model, states = Fails(), (torch.get_rng_state(), random.getstate())
    with pytest.raises(OverflowError, match="mine"):
        observe(model, (torch.zeros(1, 8),), {}, gradients=True)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_a_model_that_cannot_be_copied_says_what_to_do_instead() -> None:
    model = RPQLinear(8, 16)
    model.stream = (x for x in "ab")
    with pytest.raises(RewriteError, match=r"tune runs a copy .* cannot be copied \(cannot pickle .*; set the plan"):
        observe(model, (torch.zeros(1, 8),), {}, gradients=False)


# ------------------------------------------------------------------------------------------------------- asking


@pytest.mark.parametrize("name", NAMES)
def test_a_use_asks_for_what_the_layer_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same input gives what the layer was given, but for the bias; a random one has its shape and strides."""
    layer = KINDS[name].make()
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if "bias" in key:
                parameter.zero_()
    inputs, kwargs = KINDS[name].make_inputs(), dict(KINDS[name].call)
    found = observe(layer, inputs, kwargs, gradients=False)
    weights = {memory(m.codes): (path, m) for path, m in layer.named_modules() if isinstance(m, RPQWeight)}
    calls = asked(monkeypatch)
    layer(*inputs, **kwargs)
    uses = {path: iter(list(counted.elements())) for path, counted in found.items()}
    assert len(calls) == sum(counted.total() for counted in found.values())
    for part, _, x, y in list(calls):
        path, weight = weights[memory(part.tensors.codes)]
        use = next(uses[path])
        torch.testing.assert_close(use.ask(weight, x), y, rtol=0, atol=0)
        assert use.input().shape == x.shape and use.input().stride() == x.stride() and use.input().dtype == x.dtype
    assert calls or "embedding" in name


def test_an_input_that_repeats_itself_is_asked_for_in_full() -> None:
    x = torch.zeros(1, 8).expand(6, 8)
    use = Use.of("linear", x)
    assert use.stride == (0, 1) and use.input().shape == (6, 8)
    assert float(use.input().std()) > 0.5 and torch.equal(use.input(), use.input())


@pytest.mark.parametrize("plan", ["dequantize", "lookup"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_trial_runs_its_plan_with_gradients_where_there_were_some(plan: str, gradients: bool) -> None:
    layer = RPQLinear(12, 40, codebook_dim=4, codebook_bits=2, plan="lookup" if plan == "dequantize" else "dequantize")
    (use,) = observe(layer, (torch.randn(3, 12),), {}, gradients)["weight_rpq"]
    backward = []
    with forms_run() as ran, pytest.MonkeyPatch.context() as patch:
        run = torch.autograd.grad
        patch.setattr(torch.autograd, "grad", lambda *args: backward.append(args[1]) or run(*args))
        Trial(layer.weight_rpq, use, plan)()
    assert ran == {"lookup": {"Contract"}, "dequantize": {"Matmul"}}[plan]
    assert [len(wanted) for wanted in backward] == ([1] if gradients else [])
    assert layer.weight_rpq.codebooks.grad is None and layer.weight_rpq.plan != plan


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("input_gradient", [False, True])
def test_a_trial_takes_the_gradients_that_training_takes(frozen: bool, input_gradient: bool) -> None:
    layer = RPQLinear(12, 40, codebook_dim=4, codebook_bits=2, scale=True).requires_grad_(not frozen)
    (use,) = observe(layer, (torch.randn(3, 12, requires_grad=input_gradient),), {}, gradients=True)["weight_rpq"]
    shapes = [tuple(t.shape) for t in Trial(layer.weight_rpq, use, "dequantize")._wanted]
    assert shapes == [(3, 12)] * input_gradient + [(1, 3, 4, 4), (40,)] * (not frozen)


def test_a_trial_runs_under_the_autocast_of_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """And under none where there was none."""
    layer = RPQLinear(12, 40, codebook_dim=4, codebook_bits=2)
    with torch.autocast("cpu", torch.bfloat16):
        (halved,) = observe(layer, (torch.randn(3, 12),), {}, gradients=True)["weight_rpq"]
    (full,) = observe(layer, (torch.randn(3, 12),), {}, gradients=True)["weight_rpq"]
    calls = asked(monkeypatch)
    Trial(layer.weight_rpq, halved, "lookup")()
    with torch.autocast("cpu", torch.bfloat16):
        Trial(layer.weight_rpq, full, "lookup")()
    assert [y.dtype for *_, y in calls] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_a_stand_in_shares_its_numbers_with_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second copy of codebooks and codes is made to time them."""
    layer = RPQLinear(12, 40, codebook_dim=4, codebook_bits=2, scale=True, signs=True)
    (use,) = observe(layer, (torch.randn(3, 12),), {}, gradients=True)["weight_rpq"]
    calls = asked(monkeypatch)
    Trial(layer.weight_rpq, use, "lookup")
    twin = calls[0][0].tensors._asdict()
    for name, tensor in layer.weight_rpq.state_dict().items():
        assert twin[name].data_ptr() == tensor.data_ptr()


# ----------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("how", ["whole", "child", "in place"])
def test_compiled_parts_are_noted_as_they_were_written(how: str) -> None:
    torch.compiler.reset()
    small = rpqfx.rpqify(MLP(dropout=0.0), SMALL)
    wanted = observe(small, (torch.zeros(3, 12),), {}, gradients=True)
    assert [uses.total() for uses in wanted.values()] == [1, 1]
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = copy.deepcopy(small)
    if how == "child":
        compiled.fc1 = torch.compile(compiled.fc1, backend=backend)
    elif how == "in place":
        compiled.fc2.compile(backend=backend)
    else:
        compiled = torch.compile(compiled, backend=backend)
    for expected in (0, 1):  # before it ever ran, and after
        found = observe(compiled, (torch.zeros(3, 12),), {}, gradients=True)
        assert list(found.values()) == list(wanted.values()) and len(graphs) == expected
        compiled(torch.zeros(3, 12))
        assert len(graphs) == 1


def test_attention_with_three_inputs_asks_for_rows() -> None:
    layer = RPQMultiheadAttention(16, 2, codebook_dim=4, codebook_bits=2)
    x = [torch.randn(5, 2, 16) for _ in range(3)]
    uses = observe(layer, tuple(x), {}, gradients=False)["in_proj_weight_rpq"]
    assert [use.path[-1] for use in uses] == [("narrow", 0, 16 * i, 16) for i in range(3)]
