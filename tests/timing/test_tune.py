"""Tuning pins what is faster, weight by weight, and changes nothing else."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy
from rpqfx.errors import InputError, RewriteError
from rpqfx.nn import RPQConv2d, RPQEmbedding, RPQLinear, RPQWeight
from rpqfx.timing import clock
from rpqfx.timing.record import Trial
from tests.helpers import forms_run
from tests.models import CASES, CNN, GPT, MLP, SMALL, Case, assert_outputs, quantized_weights

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))


class Timer:
    """Stands in for the clock: a rule gives the milliseconds of each trial; keeps what it was asked."""

    def __init__(self, rule: Callable[[Trial], float]) -> None:
        self.rule = rule
        self.asked: list[tuple[Trial, ...]] = []

    def __call__(self, trials: list[Trial], device: torch.device, repeats: int) -> list[float]:
        assert [trial.plan for trial in trials] in (["dequantize", "lookup"], ["dequantize"])
        self.asked.append(tuple(trials))
        for trial in trials:
            trial()
        return [self.rule(trial) for trial in trials]


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Trial], float]], Timer]:
    def install(rule: Callable[[Trial], float]) -> Timer:
        made = Timer(rule)
        monkeypatch.setattr(clock, "in_turns", made)
        return made

    return install


def contract_if(condition: Callable[[Trial], bool]) -> Callable[[Trial], float]:
    """Contracting takes 1 ms where the condition holds and 4 ms elsewhere; expanding takes 2 ms."""
    return lambda trial: 2.0 if trial.plan == "dequantize" else 1.0 if condition(trial) else 4.0


def mlp(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return rpqfx.rpqify(MLP(), dataclasses.replace(SMALL, **options))


def plans(model: nn.Module) -> dict[str, str]:
    return {name: weight.plan for name, weight in quantized_weights(model).items()}


# ------------------------------------------------------------------------------------------------------ pinning


def test_each_weight_gets_what_is_faster_for_it(timer: Any) -> None:
    small = mlp()
    timer(contract_if(lambda trial: trial.use.shape == (5, 12)))
    made = rpqfx.tune(small, torch.randn(5, 12))
    assert plans(small) == {"fc1.weight": "lookup", "fc2.weight": "dequantize"}
    assert [(w.name, w.before, w.plan, w.dequantize, w.lookup) for w in made.weights] == [
        ("fc1.weight", "auto", "lookup", 2.0, 1.0),
        ("fc2.weight", "auto", "dequantize", 2.0, 4.0),
    ]
    timer(contract_if(lambda trial: trial.use.shape != (5, 12)))
    again = rpqfx.tune(small, (torch.randn(5, 12),))
    assert plans(small) == {"fc1.weight": "dequantize", "fc2.weight": "lookup"}
    assert [w.before for w in again.weights] == ["lookup", "dequantize"]


def test_what_is_pinned_is_what_runs_afterwards_and_gives_the_same(timer: Any) -> None:
    small = mlp().eval()
    x = torch.randn(5, 12)
    before = small(x)
    for plan, form in (("lookup", "Contract"), ("dequantize", "Matmul")):
        timer(contract_if(lambda trial, plan=plan: plan == "lookup"))
        rpqfx.tune(small, x)
        with forms_run() as ran:
            torch.testing.assert_close(small(x), before)
        assert ran == {form}


def test_a_tie_expands(timer: Any) -> None:
    small = mlp(plan="lookup")
    timer(lambda trial: 1.0)
    rpqfx.tune(small, torch.randn(5, 12))
    assert set(plans(small).values()) == {"dequantize"}


class Twice(nn.Module):
    """One weight, used with a few rows several times and with many rows once."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.fc = RPQLinear(16, 16, codebook_dim=4, codebook_bits=2)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            self.fc(x[:1])
        return self.fc(x)


@pytest.mark.parametrize(("times", "plan"), [(1, "dequantize"), (2, "dequantize"), (3, "lookup")])
def test_all_uses_of_a_weight_count_as_often_as_they_occur(timer: Any, times: int, plan: str) -> None:
    """Contracting saves 1 ms at each use with one row and loses 2 ms with many."""
    model = Twice(times)
    seen = timer(contract_if(lambda trial: trial.use.rows == 1))
    (found,) = rpqfx.tune(model, torch.randn(8, 16)).weights
    assert model.fc.weight_rpq.plan == found.plan == plan
    assert (found.dequantize, found.lookup) == (2.0 * times + 2, 1.0 * times + 4)
    assert [(timed.use.rows, timed.count) for timed in found.uses] == [(1, times), (8, 1)]
    assert len(seen.asked) == 2


def test_tied_layers_are_one_weight(timer: Any) -> None:
    """The table is only looked up, the head is a product: what is pinned for it holds for both."""
    torch.manual_seed(0)
    small = rpqfx.rpqify(GPT(), SMALL)
    timer(contract_if(lambda trial: True))
    made = rpqfx.tune(small, torch.zeros(1, 6, dtype=torch.long))
    assert made.weights[0].names == ("tok.weight", "head.weight") and made.weights[0].plan == "lookup"
    assert small.tok.weight_rpq.plan == small.head.weight_rpq.plan == "lookup"
    assert len(made.weights) == 9


def test_weights_of_equal_shape_and_use_are_timed_once(timer: Any) -> None:
    def layer(**options: Any) -> RPQLinear:
        return RPQLinear(16, 16, codebook_dim=4, codebook_bits=2, **options)

    frozen = layer().requires_grad_(False)
    model = nn.Sequential(layer(), layer(), layer(split="column"), layer(signs=True), layer(), frozen)
    seen = timer(contract_if(lambda trial: True))
    rpqfx.tune(model, torch.randn(3, 16, requires_grad=True), backward=True)
    assert len(seen.asked) == 4
    rpqfx.tune(model, torch.randn(3, 16), backward=True)  # the first one's input has no gradient now
    assert len(seen.asked) == 4 + 5
    seen.asked.clear()
    rpqfx.tune(model, torch.randn(3, 16))
    assert len(seen.asked) == 4
    assert set(plans(model).values()) == {"lookup"}


@every_case
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_any_model_is_tuned_and_computes_what_it_did(case: Case, backward: bool, timer: Any) -> None:
    small = rpqfx.rpqify(case.model(torch.float64), case.policy).eval()
    args, kwargs = case.arguments(torch.float64)
    before = small(*args, **kwargs)
    seen = timer(contract_if(lambda trial: True))
    made = rpqfx.tune(small, args, kwargs, backward=backward)
    assert_outputs(small(*args, **kwargs), before)
    assert {w.name: w.names for w in made.weights} == {r.name: r.names for r in rpqfx.report(small).rewritten}
    assert {w.name for w in made.weights} == set(case.rewritten)
    assert {*made.reached, *made.unreached} == set(made.weights)
    for weight in made.weights:
        faster = "lookup" if weight.lookup < weight.dequantize else "dequantize"
        assert {plans(small)[name] for name in weight.names} == {faster if weight.uses else "auto"}
    assert any(weight.plan == "lookup" for weight in made.weights) == any(len(pair) == 2 for pair in seen.asked)
    assert all(trial.use.gradients == backward for pair in seen.asked for trial in pair)


def test_a_convolution_that_cannot_contract_is_timed_one_way(timer: Any) -> None:
    """Sub-vectors of whole channels and one group can; half a filter, or groups, cannot."""
    options: dict[str, Any] = {"padding": 1, "codebook_bits": 2}
    model = nn.Sequential(
        RPQConv2d(8, 8, 3, codebook_dim=9, **options),
        RPQConv2d(8, 8, 3, codebook_dim=3, **options),
        RPQConv2d(8, 8, 3, codebook_dim=9, groups=2, **options),
    )
    seen = timer(contract_if(lambda trial: True))
    made = rpqfx.tune(model, torch.randn(1, 8, 5, 5))
    assert [len(pair) for pair in seen.asked] == [2, 1, 1]
    assert [(w.plan, w.dequantize, w.lookup) for w in made.weights] == [
        ("lookup", 2.0, 1.0),
        ("dequantize", 2.0, 2.0),
        ("dequantize", 2.0, 2.0),
    ]


class Idle(nn.Module):
    """Looks up, multiplies once, and leaves a layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.used = RPQEmbedding(16, 8), RPQLinear(8, 16)
        self.idle = RPQLinear(8, 16, plan="lookup")

    def forward(self, ids: Tensor) -> Tensor:
        return self.used(self.table(ids))


def test_what_is_not_reached_keeps_its_plan_and_is_listed(timer: Any) -> None:
    model = Idle()
    timer(contract_if(lambda trial: False))
    made = rpqfx.tune(model, torch.arange(3))
    assert plans(model) == {"table.weight": "auto", "used.weight": "dequantize", "idle.weight": "lookup"}
    assert [(w.name, w.before, w.plan) for w in made.reached] == [("used.weight", "auto", "dequantize")]
    assert [(w.name, w.before, w.plan) for w in made.unreached] == [
        ("table.weight", "auto", "auto"),
        ("idle.weight", "lookup", "lookup"),
    ]


def test_a_pinned_plan_is_saved_and_reported(timer: Any, tmp_path: Path) -> None:
    small = mlp()
    timer(contract_if(lambda trial: trial.use.shape == (5, 12)))
    rpqfx.tune(small, torch.randn(5, 12))
    rpqfx.save(small, tmp_path / "m.rpq")
    assert plans(rpqfx.load(tmp_path / "m.rpq", MLP)) == {"fc1.weight": "lookup", "fc2.weight": "dequantize"}
    assert [record.plan for record in rpqfx.report(small).sites] == ["lookup", "dequantize"]


def test_on_a_real_clock_a_large_layer_contracts_and_short_sub_vectors_expand() -> None:
    """A tenth of the work against ten times of it: far enough apart for any machine."""
    torch.manual_seed(0)
    model = nn.Sequential(
        RPQLinear(1024, 8192, codebook_dim=128, codebook_bits=4),
        nn.Flatten(),
        RPQLinear(8192, 64, codebook_dim=1, codebook_bits=4),
    )
    made = rpqfx.tune(model, torch.randn(256, 1024), repeats=3)
    assert [weight.plan for weight in made.weights] == ["lookup", "dequantize"], made


# --------------------------------------------------------------------------------------------- nothing else changes


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {f"grad {name}": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return {**tensors, **grads, **{f"mode {name}": m.training for name, m in model.named_modules()}}


@pytest.mark.parametrize("backward", [False, True])
def test_statistics_gradients_modes_and_random_states_stay(backward: bool) -> None:
    """With the real clock, in train mode; the claim about runs and trials themselves is in test_uses."""
    torch.manual_seed(0)
    small = rpqfx.rpqify(CNN(), Policy(codebook_dim=9, codebook_bits=1, min_size=64)).train()
    small.norm.eval()
    small(torch.randn(2, 3, 10, 10)).sum().backward()
    before, states, x = state(small), (torch.get_rng_state(), random.getstate()), torch.ones(2, 3, 10, 10)
    made = rpqfx.tune(small, x, backward=backward, repeats=1)
    assert len(made.reached) == len(made.weights) == 5
    after = state(small)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) if isinstance(value, Tensor) else after[name] == value, name
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert x.grad is None and torch.is_grad_enabled()


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = RPQLinear(8, 16, plan="lookup"), RPQLinear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        if float(x.sum()) < 0:
            raise OverflowError("mine")
        return y


def test_no_plan_changes_where_the_model_fails(timer: Any) -> None:
    model = Fails()
    seen = timer(contract_if(lambda trial: False))
    with pytest.raises(OverflowError, match="mine"):
        rpqfx.tune(model, -torch.ones(2, 8))
    assert seen.asked == []
    assert plans(model) == {"first.weight": "lookup", "second.weight": "auto"}


@pytest.mark.parametrize("last", [1, 2])
def test_no_plan_changes_where_a_measurement_fails(timer: Any, last: int) -> None:
    model = Fails()

    def rule(trial: Trial) -> float:
        if len(seen.asked) == last:
            raise KeyboardInterrupt
        return 1.0

    seen = timer(rule)
    with pytest.raises(KeyboardInterrupt):
        rpqfx.tune(model, torch.ones(2, 8))
    assert plans(model) == {"first.weight": "lookup", "second.weight": "auto"}
    timer(contract_if(lambda trial: False))
    rpqfx.tune(model, torch.ones(2, 8))
    assert plans(model) == {"first.weight": "dequantize", "second.weight": "dequantize"}


# ------------------------------------------------------------------------------------------------ how it is called


def test_inputs_are_passed_on(timer: Any) -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = RPQLinear(8, 16)

        def forward(self, x: Tensor, scale: Tensor | None = None, *, times: int = 1) -> Tensor:
            for _ in range(times):
                self.fc(x)
            return x

    timer(contract_if(lambda trial: True))
    x = torch.randn(3, 8)
    calls = [((x,), 1), (((x,),), 1), (([x, x],), 1), ((x, {"times": 3}), 3), (((), {"x": x, "times": 2}), 2)]
    for given, count in calls:
        (found,) = rpqfx.tune(Takes(), *given).weights
        assert [timed.count for timed in found.uses] == [count]
    assert len(rpqfx.tune(Takes(), example_inputs=x, example_kwargs={"times": 2}).weights) == 1


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_gradients_are_timed_wherever_it_is_called(around: Any, timer: Any) -> None:
    small = rpqfx.rpqify(CNN(), Policy(codebook_dim=9, codebook_bits=1, min_size=64)).train()
    seen = timer(contract_if(lambda trial: True))
    x = torch.randn(2, 3, 10, 10)
    for backward in (True, False):
        seen.asked.clear()
        with around():
            made = rpqfx.tune(small, x, backward=backward)
        assert len(made.reached) == 5 and {pair[0].use.gradients for pair in seen.asked} == {backward}


def test_autocast_around_the_call_is_that_of_the_measurement(timer: Any) -> None:
    seen = timer(contract_if(lambda trial: True))
    with torch.autocast("cpu", torch.bfloat16):
        rpqfx.tune(mlp(), torch.randn(5, 12))
    assert {pair[0].use.autocast for pair in seen.asked} == {torch.bfloat16}


def test_repeats_reach_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(clock, "in_turns", lambda trials, *rest: told.append(rest) or [1.0, 2.0])
    rpqfx.tune(RPQLinear(8, 16), torch.randn(3, 8), repeats=4)
    assert told == [(torch.device("cpu"), 4)]


WRONG: dict[str, tuple[Callable[[], Any], type, str]] = {
    "dense": (
        lambda: rpqfx.tune(MLP(), torch.zeros(1, 12)), InputError,
        "no weight of this model is quantized, so there is nothing to tune; pass what rpqify returned",
    ),
    "no module": (
        lambda: rpqfx.tune(torch.zeros(3), torch.zeros(1)), InputError, "tune takes a torch.nn.Module, got Tensor",
    ),
    "meta": (
        lambda: rpqfx.tune(RPQLinear(8, 16, device="meta"), torch.zeros(1, 8)), InputError,
        "weight is on the meta device, where nothing runs; call rpqfx.materialize first",
    ),
    "mapping": (
        lambda: rpqfx.tune(RPQLinear(8, 16), {"input": torch.zeros(1, 8)}), InputError,
        "example_inputs are positional, got a mapping; pass it as example_kwargs",
    ),
    "number": (
        lambda: rpqfx.tune(RPQLinear(8, 16), 3), InputError,
        "example_inputs is a sequence of inputs or one tensor, got int",
    ),
    "repeats": (
        lambda: rpqfx.tune(RPQLinear(8, 16), torch.zeros(1, 8), repeats=0), InputError,
        "repeats is a whole number from 1, got 0",
    ),
    "half": (
        lambda: rpqfx.tune(RPQLinear(8, 16), torch.zeros(1, 8), repeats=2.5), InputError,
        "repeats is a whole number from 1, got 2.5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_refused(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def test_a_model_that_cannot_be_copied_is_refused_with_its_plans_unchanged() -> None:
    model = RPQLinear(8, 16, plan="lookup")
    model.stream = (x for x in "ab")
    with pytest.raises(RewriteError, match="tune runs a copy of the model"):
        rpqfx.tune(model, torch.zeros(1, 8))
    assert model.weight_rpq.plan == "lookup"


# ------------------------------------------------------------------------------------------------------ compiled


def test_a_compiled_model_is_compiled_once_more_where_plans_changed(timer: Any) -> None:
    torch.compiler.reset()
    small, graphs = mlp().eval(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def run() -> int:
        """Outputs are as before; the number of graphs up to now."""
        for _ in range(2):
            torch.testing.assert_close(compiled(x), wanted)
        return len(graphs)

    x = torch.randn(5, 12)
    wanted = small(x)
    compiled = torch.compile(small, backend=backend, fullgraph=True)
    assert run() == 1
    timer(contract_if(lambda trial: trial.use.shape == (5, 12)))
    made = rpqfx.tune(compiled, x)
    assert [weight.name for weight in made.reached] == ["fc1.weight", "fc2.weight"]
    assert plans(small) == {"fc1.weight": "lookup", "fc2.weight": "dequantize"}
    assert run() == 2
    rpqfx.tune(compiled, x)  # the same plans
    assert run() == 2
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------------- the table


def test_the_table_has_a_line_for_each_weight(timer: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = RPQEmbedding(16, 8)
            self.conv = RPQConv2d(1, 16, 3)
            self.many = RPQLinear(8, 16)
            self.again = self.many
            self.bare = RPQWeight(rpqfx.CodebookSpec(8, 16, 4, 2))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            for rows in (1, 1, 2, 3, 4):
                self.again(x[:rows])
            self.conv(x[None, None])
            return self.bare.linear(self.many(x[:1]))

    timer(contract_if(lambda trial: trial.use.product == "conv"))
    made = rpqfx.tune(Net(), torch.arange(5), backward=True)
    *lines, pinned, total = str(made).splitlines()
    assert lines == [
        "weight                        shape           rows              dequantize ms  lookup ms  plan",
        "-" * len(lines[2]),
        "table.weight                  16 x 8          -                 -              -          auto (not reached)",
        "conv.weight                   16 x 1 x 3 x 3  40                2.000          1.000      lookup",
        "many.weight (= again.weight)  16 x 8          3 x 1, 2, 3, ...  12.000         24.000     dequantize",
        "bare                          8 x 16          1                 2.000          4.000      dequantize",
        "-" * len(lines[2]),
    ]
    assert pinned == "3 of 4 weights pinned"
    assert total == (
        "all products of one call, forward and backward: 16.000 ms dequantized, 29.000 ms by lookup, 15.000 ms as "
        "pinned"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.backward = False
    assert "call, forward: 16.000 ms" in str(rpqfx.tune(Net(), torch.arange(5)))


class Projection(RPQWeight):
    """A weight with a forward of its own."""

    def forward(self, ids: Tensor | None = None) -> Tensor:
        return self.linear_t(ids)


def test_a_weight_can_be_the_model(timer: Any) -> None:
    weight = Projection(rpqfx.CodebookSpec(8, 16, 4, 2))
    timer(contract_if(lambda trial: True))
    (found,) = rpqfx.tune(weight, torch.randn(3, 8)).weights
    assert (found.name, found.plan, weight.plan) == ("Projection", "lookup", "lookup")
    assert [timed.use.product for timed in found.uses] == ["linear_t"] and type(weight) is Projection
