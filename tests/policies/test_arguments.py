"""What calls are given by mistake is refused before any work, with what was seen and what to give instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpqfx
from rpqfx import CodebookSpec, KVPolicy, KVRule, Policy, RoutePolicy, RouteRule, Rule
from rpqfx.errors import InputError, PolicyError, RPQError
from tests.models import MLP, SMALL


def x12(rows: int = 4) -> torch.Tensor:
    return torch.zeros(rows, 12)


MODELS: dict[str, tuple[Any, str]] = {
    "class": (MLP, r"got the class MLP; make one first: \w+\(MLP\(\.\.\.\), \.\.\.\)"),
    "state dict": (MLP().state_dict(), "got OrderedDict; if it is a state dict, build the model, .* load_state_dict"),
    "path": ("model.pt", r"got the path 'model\.pt'; load the model first"),
    "Path": (Path("model.pt"), r"got the path 'model\.pt'; load the model first"),
    "policy": (SMALL, r"got a Policy; the model comes first: \w+\(model, policy\)"),
    "function": (MLP().forward, "got method"),
    "none": (None, "got NoneType"),
}


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.parametrize(
    "call", [rpqfx.rpqify, rpqfx.check_outputs, rpqfx.quantize_kv, rpqfx.route, rpqfx.tune, rpqfx.materialize]
)
def test_what_is_no_model_is_refused(call: Any, what: str) -> None:
    value, said = MODELS[what]
    with pytest.raises(InputError, match=rf"{call.__name__} takes a torch\.nn\.Module, {said}"):
        call(value)
    with pytest.raises(InputError, match=said):
        rpqfx.finetune(value, teacher=MLP(), data=[x12()])
    with pytest.raises(InputError, match=said):
        rpqfx.convert(value, SMALL, [x12()])
    with pytest.raises(InputError, match=said):
        rpqfx.save(value, "nowhere")
    with pytest.raises(RPQError, match=r"report takes a torch\.nn\.Module"):
        rpqfx.report(value)


POLICIES: dict[str, tuple[Any, str]] = {
    "class": (Policy, r"got the class Policy; pass a value: rpqify\(model, Policy\(\)\)"),
    "other class": (KVPolicy, r"got the class KVPolicy; pass a value"),
    "KVPolicy": (KVPolicy(), "got a KVPolicy; that is for quantize_kv"),
    "RoutePolicy": (RoutePolicy(), "got a RoutePolicy; that is for route"),
    "rule": (Rule("fc1", codebook_bits=2), r"got a Rule; put it in a policy: Policy\(rules=\(rule,\)\)"),
    "KV rule": (KVRule("fc1", bits_per_value=2), "got a KVRule; it goes into a KVPolicy"),
    "route rule": (RouteRule("fc1", tokens=2), "got a RouteRule; it goes into a RoutePolicy"),
    "dict": ({"codebook_bits": 4}, r"got a dict; make a policy of it: Policy\(\*\*options\)"),
    "JSON": (SMALL.to_json(), r"got the text .*; if it is JSON, read it with Policy\.from_json\(text\)"),
    "spec": (CodebookSpec(32, 12, 4, 4), "got a CodebookSpec, which fits one shape; pass a function"),
    "number": (4, "got 4"),
    "module": (MLP(), "got MLP"),
    "none": (
        None,
        r"got none; rpqify\(model, Policy\(\)\) fits .* convert\(model, Policy\.pretrained\(bits_per_weight=3\), bat",
    ),
}


@pytest.mark.parametrize("what", POLICIES)
def test_what_is_no_policy_is_refused(what: str) -> None:
    value, said = POLICIES[what]
    with pytest.raises(PolicyError, match=rf"rpqify takes a Policy, {said}"):
        rpqfx.rpqify(MLP(), value)
    with pytest.raises(PolicyError, match=rf"convert takes a Policy, {said.replace('rpqify', '(rpqify|convert)')}"):
        rpqfx.convert(MLP(), value, [x12()])


@pytest.mark.parametrize("policy", [SMALL, Policy, {"codebook_bits": 2}, Rule("x"), 3, lambda site: None])
def test_other_calls_take_policies_of_their_own(policy: Any) -> None:
    with pytest.raises(PolicyError, match="quantize_kv takes a KVPolicy, got"):
        rpqfx.quantize_kv(MLP(), policy, calibration=[x12()])
    with pytest.raises(PolicyError, match="route takes a RoutePolicy, got"):
        rpqfx.route(MLP(), policy)


def test_a_path_is_a_calibration_of_keys_and_values_and_no_policy_of_routing() -> None:
    with pytest.raises(InputError, match="calibration= would do nothing beside a saved calibration"):
        rpqfx.quantize_kv(MLP(), "x", calibration=[x12()])
    with pytest.raises(PolicyError, match="route takes a RoutePolicy, got"):
        rpqfx.route(MLP(), "x")  # type: ignore[arg-type]


NOTHING: dict[str, tuple[Any, str]] = {
    "list": ([], "there are no calibration batches: calibration is an empty list; give some"),
    "spent": (iter(()), "an iterator that was gone through before holds nothing any more; give a list"),
    "one tensor": (x12(), "a sequence of batches, got one Tensor; put it in a list"),
    "one mapping": ({"x": x12()}, "a sequence of batches, got one dict; put it in a list"),
    "path": ("batches.pt", "a sequence of batches, got one str"),
    "number": (8, "a sequence of batches, got 8; give a list of them"),
    "function": (x12, "a sequence of batches, got .*; call it, and pass what it returns"),
    "none in it": ([x12(), None], "calibration batch 1 is a tensor, a tuple or a mapping, got None"),
    "array": ([x12().numpy()], r"got .*; make a tensor of it: torch\.as_tensor"),
    "empty batch": (
        [x12(), x12(0)],
        r"batch 1 is empty: its tensors have the shapes \[0, 12\]; leave it out",
    ),
    "empty mapping": ([{"x": x12(0)}], "calibration batch 0 is empty"),
    "keys": ([{3: x12()}], "keyword inputs, whose keys are names, got the key 3"),
    "NaN": ([x12() / 0], r"calibration batch 0 holds NaN \(48 of 48 numbers of a tensor \[4, 12\]\)"),
}


@pytest.mark.parametrize("what", NOTHING)
def test_what_is_no_calibration_is_refused(what: str) -> None:
    value, said = NOTHING[what]
    for call, policy in ((rpqfx.convert, SMALL), (rpqfx.quantize_kv, None)):
        model = MLP()
        before = {name: parameter for name, parameter in model.named_parameters()}
        with pytest.raises(InputError, match=said):
            call(model, policy, calibration=value, inplace=True)
        assert type(model.fc1) is nn.Linear and all(before[n] is p for n, p in model.named_parameters())


class Aside(nn.Module):
    """A model with a branch that plain inputs do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.aside = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, aside: bool = False, both: bool = True) -> torch.Tensor:
        x = self.main(x) if both else x
        return self.aside(x) if aside else x


def test_what_calibration_does_not_reach_is_said() -> None:
    policy, x = Policy(codebook_dim=4, codebook_bits=2, min_size=0), torch.randn(8, 16)
    made = rpqfx.report(rpqfx.convert(Aside(), policy, [x]))
    assert {record.name: record.init for record in made.sites} == {"main.weight": "calibrated", "aside.weight": "fit"}
    assert made.notes == ("calibration did not reach aside.weight: fitted to the weights alone",)
    assert all(record.error is not None for record in made.sites)
    every = rpqfx.report(rpqfx.convert(Aside(), policy, [{"x": x, "aside": True}]))
    assert {record.init for record in every.sites} == {"calibrated"} and not every.notes
    with pytest.raises(InputError, match="no calibration batch reaches any weight that is to be quantized"):
        rpqfx.convert(Aside(), policy, [{"x": x, "both": False}])


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize(
    "policy", [Policy(codebook_dim=4, codebook_bits=2, min_size=0), Policy.pretrained(4, min_size=0)]
)
def test_calibration_is_the_same_without_gradients(context: Any, policy: Policy) -> None:
    torch.manual_seed(0)
    model, batches = Aside(), [torch.randn(16, 16) for _ in range(2)]
    wanted = rpqfx.convert(model, policy, batches)
    with context():
        found = rpqfx.convert(model, policy, [x.clone() for x in batches])
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor) and not found.state_dict()[name].is_inference()
    found(batches[0]).sum().backward()


def test_example_inputs_are_those_of_one_call() -> None:
    small = rpqfx.rpqify(MLP(), SMALL)
    rpqfx.check_outputs(small, x12())
    for call in (rpqfx.check_outputs, rpqfx.tune):
        for given in ({"example_inputs": ()}, {"example_inputs": (x12(), x12())}, {"example_kwargs": {"y": x12()}}):
            with pytest.raises(InputError, match="example inputs are not those of one call of MLP"):
                call(small, **given)
        with pytest.raises(InputError, match="example_inputs are positional, got a mapping; pass it as example_kwargs"):
            call(small, example_inputs={"x": x12()})
        with pytest.raises(InputError, match="example_kwargs is a mapping from names to inputs, got"):
            call(small, example_kwargs=(x12(),))
        with pytest.raises(InputError, match="example_inputs is a sequence of inputs or one tensor, got int"):
            call(small, example_inputs=3)


@pytest.mark.parametrize("wrong", ["x", -1, 1.0, True, torch.tensor(3), float("nan"), 2**70])
def test_numbers_of_calls_are_refused_by_name(wrong: Any, tmp_path: Path) -> None:
    batches = [torch.zeros(4, 12)]
    small = rpqfx.rpqify(MLP(), SMALL)
    calls = {
        "seed": lambda: rpqfx.rpqify(MLP(), SMALL, seed=wrong),
        "steps": lambda: rpqfx.finetune(small, teacher=MLP(), data=batches, steps=wrong),
        "accumulate": lambda: rpqfx.finetune(small, teacher=MLP(), data=batches, accumulate=wrong),
        "recode_every": lambda: rpqfx.finetune(small, teacher=MLP(), data=batches, recode_every=wrong),
        "repeats": lambda: rpqfx.tune(small, x12(), repeats=wrong),
    }
    for name, call in calls.items():
        with pytest.raises(InputError, match=f"^{name} is a whole number"):
            call()


@pytest.mark.parametrize("wrong", [1, 0, "no", None])
def test_switches_of_calls_are_true_or_false(wrong: Any) -> None:
    calls = {
        "inplace": [
            lambda: rpqfx.rpqify(MLP(), SMALL, inplace=wrong),
            lambda: rpqfx.convert(MLP(), SMALL, [x12()], inplace=wrong),
            lambda: rpqfx.quantize_kv(MLP(), calibration=[x12()], inplace=wrong),
            lambda: rpqfx.route(MLP(), inplace=wrong),
        ],
    }
    for name, some in calls.items():
        for call in some:
            with pytest.raises(InputError, match=f"^{name} is True or False, got"):
                call()


def test_a_model_is_not_its_own_teacher() -> None:
    small = rpqfx.rpqify(MLP(), SMALL)
    with pytest.raises(InputError, match="teacher is the dense model, got the model that is to be trained"):
        rpqfx.finetune(small, teacher=small, data=[x12()])


@pytest.mark.parametrize("wrong", ["x", -1, 0, True, torch.tensor(3.0), float("nan")])
def test_a_norm_to_clip_to_is_a_number(wrong: Any) -> None:
    with pytest.raises(InputError, match="clip is a norm above 0, got"):
        rpqfx.finetune(rpqfx.rpqify(MLP(), SMALL), teacher=MLP(), data=[x12()], clip=wrong)


def test_a_file_is_loaded_with_a_function_that_builds_the_model(tmp_path: Path) -> None:
    path = tmp_path / "model.rpq"
    rpqfx.save(rpqfx.rpqify(MLP(), SMALL), path)
    with pytest.raises(InputError, match=r"load needs a function .*: rpqfx\.load\(path, lambda: Model\(config\)\)"):
        rpqfx.load(path)
    with pytest.raises(InputError, match=r"got a model \(MLP\); give one that makes it anew"):
        rpqfx.load(path, MLP())
    with pytest.raises(InputError, match=r"build is a function that builds the dense model, got \{\}"):
        rpqfx.load(path, {})
    with pytest.raises(InputError, match="build is a function that builds the dense model, got"):
        rpqfx.load(MLP(), path)
    with pytest.raises(InputError, match="load takes a path or a file object open for reading in binary, got MLP"):
        rpqfx.load(MLP(), MLP)


def test_data_that_holds_nothing_is_refused_before_any_work() -> None:
    small = rpqfx.rpqify(MLP(), SMALL)
    for nothing in ([], (), iter([])):
        with pytest.raises(InputError, match="there is no data: it holds no batch"):
            rpqfx.finetune(small, teacher=MLP(), data=nothing)
    with pytest.raises(InputError, match="batch 0 is empty"):
        rpqfx.finetune(small, teacher=MLP(), data=[x12(0)])
    for name, wrong in {"teacher": 3, "loss": 3, "train": 3, "rates": {"codebooks": 1}, "autocast": "half"}.items():
        given = {"teacher": MLP(), "data": [x12()], name: wrong}
        with pytest.raises(InputError, match=f"^{name} (is|are)"):
            rpqfx.finetune(small, **given)


def test_bits_that_cannot_be_had_say_which_can_and_what_to_change() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(PolicyError, match=r"at least .* can: give bits_per_weight=.* or more\. .* min_size") as caught:
        rpqfx.rpqify(model, Policy.pretrained(0.05))
    least = float(str(caught.value).split("at least ")[1].split(" ")[0])
    small = rpqfx.rpqify(model, Policy.pretrained(least))
    assert rpqfx.report(small).bits_per_weight <= least
    with pytest.raises(PolicyError, match=r"nor any other number up to 16: .* use Policy\(codebook_bits="):
        rpqfx.rpqify(nn.Sequential(nn.Linear(2, 3)), Policy.pretrained(1, min_size=0))


def test_data_may_come_from_inference_mode() -> None:
    torch.manual_seed(0)
    teacher = MLP(dropout=0.0)
    small, twin = (rpqfx.rpqify(teacher, SMALL) for _ in range(2))
    x = torch.randn(8, 12)
    with torch.inference_mode():
        rpqfx.finetune(small, teacher=teacher, data=[x.clone()], steps=2)
    rpqfx.finetune(twin, teacher=teacher, data=[x], steps=2)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), twin.parameters(), strict=True))
