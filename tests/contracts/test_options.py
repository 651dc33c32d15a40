"""Every option of every policy and of every public call changes something, or is refused when it is given.

Options are listed from the dataclasses and signatures themselves, so that a new one without a witness fails here. Of
policies a witness is two values for which decisions, or what a rewritten model computes, differ; in each mode where an
option is refused instead, the refusal has to name it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Budget, Fixed, KVPolicy, KVRule, Policy, Rate, RoutePolicy, RouteRule, Rule, Site
from rpqfx.conversion.checkpoint import Checkpoint
from rpqfx.errors import InputError, PolicyError, RPQError
from rpqfx.kv.module import attentions
from rpqfx.policies.amount import Amount
from rpqfx.policies.options import Options
from rpqfx.timing import clock
from rpqfx.training.parameters import Rates
from tests.kv.kv_models import LM, tokens
from tests.models import MLP, Experts, quantized_weights
from tests.routing.rewrite.models import Layer, Plain, encoder, jolted, x_of

SAME, OTHER, REFUSED = "the same", "another", "refused"


# ------------------------------------------------------------------------------------------------- options of Policy


def _site(name: str, shape: tuple[int, ...], **values: Any) -> Site:
    defaults = {"names": (name,), "kind": "linear", "module_type": nn.Linear, "dtype": torch.float32, "splits": True}
    return Site(name=name, shape=shape, **{**defaults, **values})


SITES = (
    _site("a.0.fc.weight", (1024, 128), heads=4),
    _site("a.1.fc.weight", (1024, 128), heads=4),
    _site("b.out.weight", (256, 512), heads=4),
    _site("table.weight", (2000, 64), kind="embedding", module_type=nn.Embedding, splits=False, heads=4),
    _site("conv.weight", (128, 64, 3, 3), kind="conv", module_type=nn.Conv2d, splits=False, heads=4),
    _site("moe.w", (4, 256, 128), kind="experts", module_type=nn.Module, splits=True, experts=True, heads=4),
    _site("tiny.weight", (40, 8), heads=4),
    _site("atom.weight", (8, 8), heads=4),
)

# Of each option, two values beside what it takes for them to matter.
VALUES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "codebook_dim": (4, 8, {}),
    "num_subvectors": (4, 8, {}),
    "codebook_bits": (3, 5, {}),
    "min_codebook_bits": (7, 2, {"min_size": 0, "codebook_dim": 4, "sharing": "own"}),
    "stages": (1, 2, {}),
    "sharing": ("own", "layer", {}),
    "experts": ("shared", "own", {}),
    "split": ("row", "column", {"kinds": ("linear",)}),
    "scale": (False, True, {}),
    "column_scale": (False, True, {}),
    "signs": (False, True, {}),
    "grad_scale": ("sum", "mean", {}),
    "init": ("fit", "random", {}),
    "plan": ("dequantize", "lookup", {}),
    "min_size": (0, 10**5, {}),
    "allow_growth": (False, True, {"min_size": 0}),
}
POLICY_ONLY: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rules": ((), (Rule("a.*", skip="mine"),), {}),
    "kinds": (("linear",), ("conv",), {}),
    "amount": (Fixed(), Budget(ratio=0.25), {}),
}
AMOUNTS: dict[str, tuple[Amount, Amount]] = {
    "ratio": (Budget(ratio=0.5), Budget(ratio=0.25)),
    "bytes": (Budget(bytes=10**6), Budget(bytes=2 * 10**6)),
    "bits_per_weight": (Rate(2), Rate(3)),
    "embedding_bits": (Rate(3, embedding_bits=2), Rate(3, embedding_bits=4)),
}
MODES: dict[str, Callable[..., Policy]] = {
    "plain": lambda **options: Policy(**options),
    "scratch": lambda **options: Policy.from_scratch(**options),
    "budget": lambda ratio=0.22, **options: Policy.budget(ratio=ratio, **options),
    "rate": lambda **options: Policy.pretrained(4, **options),
}
SHAPING = set(VALUES) - {"grad_scale", "plan", "min_size"}
IDLE = {"plain": set[str](), "scratch": {"init"}, "budget": {"allow_growth"}, "rate": SHAPING}


def outcome(make: Callable[[Any], Policy], values: tuple[Any, Any], name: str) -> str:
    """Whether two values of an option give the same decisions, others, or one of them is refused by name."""
    found: list[Mapping[str, Any]] = []
    for value in values:
        try:
            policy = make(value)
        except PolicyError as error:
            assert name in str(error), error
            return REFUSED
        assert Policy.from_json(policy.to_json()) == policy
        try:
            found.append(policy.decide(SITES))
        except PolicyError as error:  # a budget that cannot be met
            found.append({"": str(error)})
    return SAME if found[0] == found[1] else OTHER


def test_each_option_of_a_policy_has_values_to_tell_apart() -> None:
    assert {field.name for field in dataclasses.fields(Options)} == set(VALUES)
    assert {f.name for kind in (Fixed, Budget, Rate) for f in dataclasses.fields(kind)} == set(AMOUNTS)
    assert {field.name for field in dataclasses.fields(Policy)} == {*VALUES, *POLICY_ONLY}
    assert {field.name for field in dataclasses.fields(Rule)} == {*VALUES, "match", "skip"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VALUES)
def test_an_option_of_a_policy_changes_decisions_or_is_refused(name: str, mode: str) -> None:
    first, second, extra = VALUES[name]
    extra = {key: value for key, value in extra.items() if key not in IDLE[mode]}
    if mode == "budget":  # under split what is left dense takes its share; few bits are taken where there are few
        extra["ratio"] = {"split": 0.6, "min_codebook_bits": 0.15}.get(name, 0.22)

    def make(value: Any) -> Policy:
        return MODES[mode](**{**extra, name: value})

    assert outcome(make, (first, second), name) == (REFUSED if name in IDLE[mode] else OTHER)


@pytest.mark.parametrize("name", POLICY_ONLY)
def test_what_only_a_policy_says_changes_decisions(name: str) -> None:
    first, second, extra = POLICY_ONLY[name]
    assert outcome(lambda value: Policy(**{**extra, name: value}), (first, second), name) == OTHER


@pytest.mark.parametrize("name", AMOUNTS)
def test_each_number_of_an_amount_changes_decisions(name: str) -> None:
    assert outcome(lambda amount: Policy(amount=amount), AMOUNTS[name], name) == OTHER


@pytest.mark.parametrize("name", sorted(SHAPING))
def test_what_an_amount_chooses_is_refused_beside_it_in_words(name: str) -> None:
    """Also where the class is called, and not a constructor that has no such argument."""
    more = "$" if name == "init" else ", or give it in a Rule that"  # not even a rule draws what is fitted
    with pytest.raises(PolicyError, match=f"{name}=.* would do nothing: .*; leave it out{more}"):
        Policy(amount=Rate(4), **{name: VALUES[name][1]})
    for constructor, idle in ((Policy.pretrained, SHAPING), (Policy.budget, {"allow_growth"})):
        if name in idle:
            with pytest.raises(PolicyError, match=f"{constructor.__qualname__} has no option '{name}'; it has "):
                constructor(**{name: VALUES[name][1]})


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VALUES)
def test_an_option_of_a_rule_changes_decisions_or_is_refused(name: str, mode: str, shaped: bool) -> None:
    """With a shape of its own a rule says all, in every mode; but nothing can be drawn where all is fitted."""
    first, second, extra = VALUES[name]
    shape = {"codebook_dim": 4, "codebook_bits": 8 if name == "min_codebook_bits" else 4} if shaped else {}
    if name in ("num_subvectors", "codebook_dim"):
        shape.pop("codebook_dim", None)
    own = {**{key: value for key, value in extra.items() if key not in ("kinds", *IDLE[mode])}, **shape}
    own.pop(name, None)
    match = "[ab]*" if name == "split" else "*" if mode != "budget" else "[!m]*"
    of_policy = {"ratio": 0.5} if mode == "budget" else {}

    def make(value: Any) -> Policy:
        return MODES[mode](**of_policy, rules=(Rule(match, **{**own, name: value}),))

    sets_shape = bool({"codebook_dim", "num_subvectors", "codebook_bits"} & {*own, name})
    idle = IDLE[mode] if mode != "scratch" else set()  # a rule may fit what the policy draws
    refused = (name in idle and not sets_shape) or (mode == "rate" and name == "init")
    assert outcome(make, (first, second), name) == (REFUSED if refused else OTHER)


def test_sharing_across_layers_is_no_matter_for_a_budget() -> None:
    for sharing in ("shape", "role"):
        assert outcome(lambda v: Policy.budget(ratio=0.3, sharing=v), (sharing, "own"), "sharing") == REFUSED
        assert Policy(sharing=sharing).decide(SITES) != Policy().decide(SITES)
        with pytest.raises(PolicyError, match=f"sharing='{sharing}' of the rule for 'a"):
            Policy.budget(ratio=0.3, rules=(Rule("a.*", sharing=sharing),))


def test_a_rule_of_two_answers_is_refused() -> None:
    for name, (value, _, _) in VALUES.items():
        with pytest.raises(PolicyError, match=f"skips, so its {name} does nothing"):
            Rule("*", skip="dense", **{name: value})


def test_match_and_skip_change_decisions() -> None:
    def decide(rule: Rule) -> Mapping[str, Any]:
        return Policy(rules=(rule,)).decide(SITES)

    assert (
        decide(Rule("a.*", codebook_bits=3))
        != decide(Rule("b.*", codebook_bits=3))
        != decide(Rule("b.*", skip="dense"))
    )
    reasons = [decide(Rule("b.*", skip=why))["b.out.weight"].reason for why in ("one", "two")]
    assert reasons == ["one", "two"]


def test_a_budget_keeps_what_is_given_and_chooses_the_rest() -> None:
    held = [
        d for d in Policy.budget(ratio=0.3, codebook_bits=5).decide(SITES).values() if isinstance(d, rpqfx.Quantize)
    ]
    assert {hold.spec.codebook_bits for hold in held} == {5}
    held = [d for d in Policy.budget(ratio=0.3, codebook_dim=8).decide(SITES).values() if isinstance(d, rpqfx.Quantize)]
    assert {hold.spec.codebook_dim for hold in held} <= {8, 9} and len({hold.spec.codebook_bits for hold in held}) > 1
    for sharing in ("own", "layer"):
        held = [d for d in Policy.budget(ratio=0.3, sharing=sharing).decide(SITES).values() if hasattr(d, "spec")]
        assert all((hold.spec.num_codebooks == 1) == (sharing == "layer") for hold in held)
    held = [
        d for d in Policy.budget(ratio=0.3, min_codebook_bits=7).decide(SITES).values() if isinstance(d, rpqfx.Quantize)
    ]
    assert all(hold.spec.codebook_bits >= 7 for hold in held)


# ------------------------------------------------------------------------------- the same, where models are calibrated


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))


def inputs(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(24, 32, generator=generator) for _ in range(count)]


def written(model: nn.Module) -> list[Any]:
    """All that a rewrite chose: shapes, plans and tensors."""
    weights = quantized_weights(model)
    said = [
        (name, weight.spec, weight.layout, weight.plan, weight.shares_codebooks) for name, weight in weights.items()
    ]
    return [said, {name: tensor.tolist() for name, tensor in model.state_dict().items()}]


CALIBRATED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    **{name: values for name, values in VALUES.items() if name not in ("experts", "init")},
    "num_subvectors": (4, 8, {"codebook_dim": None}),
    "min_codebook_bits": (7, 2, {"codebook_bits": 8}),
    "min_size": (0, 2049, {}),
    "allow_growth": (False, True, {"codebook_bits": 8}),
}


@pytest.mark.parametrize("name", CALIBRATED)
def test_an_option_changes_what_calibration_makes(name: str) -> None:
    first, second, extra = CALIBRATED[name]
    base = {"codebook_dim": 4, "codebook_bits": 3, "min_size": 0, **extra}
    found = []
    for value in (first, second):
        try:
            found.append(written(rpqfx.convert(stack(), Policy(**{**base, name: value}), inputs(1))))
        except PolicyError as error:  # that nothing would shrink, or all is too small, is another outcome
            found.append([str(error)])
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["grad_scale", "plan", "min_size", "kinds", "rules"])
def test_what_a_rate_leaves_open_changes_what_calibration_makes(name: str) -> None:
    values = {"kinds": (("linear",), ("conv",)), "rules": ((), (Rule("0", skip="dense"),)), "min_size": (0, 2049)}
    first, second = values.get(name) or VALUES[name][:2]
    found = []
    for value in (first, second):
        policy = Policy.pretrained(4, **{"min_size": 0, name: value})
        try:
            found.append(written(rpqfx.convert(stack(), policy, inputs(1))))
        except PolicyError as error:
            found.append([str(error)])
    assert found[0] != found[1]


@pytest.mark.parametrize("policy", [Policy(init="random", codebook_bits=3, codebook_dim=4, min_size=0),
                                    Policy.from_scratch(codebook_bits=3, codebook_dim=4, min_size=0),
                                    Policy(codebook_bits=3, codebook_dim=4, min_size=0,
                                           rules=(Rule("2", init="random"),)),
                                    Policy.budget(ratio=0.4, min_size=0, init="random")])  # fmt: skip
def test_random_codebooks_are_not_calibrated(policy: Policy) -> None:
    model = stack()
    with pytest.raises(PolicyError, match=r"init='random' draws codebooks anew, and calibration fits them"):
        rpqfx.convert(model, policy, inputs(), inplace=True)
    assert type(model[0]) is nn.Linear
    with pytest.raises(PolicyError, match="init"):
        Policy.pretrained(4, rules=(Rule("2", init="random", codebook_bits=3),))


@pytest.mark.parametrize("sharing", ["own", "layer", "shape", "role"])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("calibrated", [False, True])
def test_signs_are_fitted(sharing: str, stages: int, calibrated: bool) -> None:
    """About half of them are minus, and the weights come nearer than with the same codebooks without signs."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32)) for _ in range(3)))
    errors = {}
    for signs in (False, True):
        policy = Policy(codebook_bits=2, codebook_dim=2, min_size=0, sharing=sharing, stages=stages, signs=signs)
        small = rpqfx.convert(model, policy, inputs(1)) if calibrated else rpqfx.rpqify(model, policy)
        errors[signs] = sum(record.error or 0.0 for record in rpqfx.report(small).rewritten)
        for weight in quantized_weights(small).values():
            if weight.signs is not None:
                share = torch.stack([weight.signs >> bit & 1 for bit in range(8)]).float().mean()
                assert 0.3 < share < 0.7
    assert errors[True] < 0.8 * errors[False]


# --------------------------------------------------------------------------------------------- KVPolicy and RoutePolicy


KV_BASE = {"bits_per_value": 2.0, "window": 4, "sinks": 1, "codebook_dim": 4, "codebook_size": 8, "chunk": 8}
KV_VALUES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bits_per_value": (1.0, 3.0, {}),
    "window": (0, 9, {}),
    "sinks": (0, 3, {}),
    "keys": ("after", "before", {}),
    "codebook_dim": (2, 4, {}),
    "codebook_size": (4, 16, {}),
    "stages": (1, 4, {"bits_per_value": 3.0}),
    "transform": (True, False, {}),
    "joint": (True, False, {}),
    "strided": (True, False, {"transform": False}),
    "normalize": (True, False, {"transform": False}),
    "use_cosine_sim": (True, False, {"transform": False}),
    "beam": (1, 8, {"bits_per_value": 3.0}),
    "decay": (None, 0.9, {"transform": False}),
    "chunk": (8, 16, {}),
    "rules": ((), (KVRule("layers.0", skip="dense"),), {}),
    "skip_layers": ((), (0,), {}),
}
KV_REFUSED = {
    "chunk": {"chunk": 12},
    "joint": {"joint": True, "transform": False},
    "strided": {"strided": True},
    "stages": {"stages": 4, "transform": False},
    "beam": {"beam": 4, "use_cosine_sim": True},
}


def kv_made(**values: Any) -> Any:
    """What a small model with attention on codes computes and holds."""
    try:
        small = rpqfx.quantize_kv(
            LM(0), KVPolicy(**{**KV_BASE, **values}), calibration=[tokens(0, 2, 40)], progress=False
        )
    except InputError as error:
        return str(error)
    trained = [(name, parameter.requires_grad) for name, parameter in small.named_parameters()]
    return small(tokens(1, 1, 40)).tolist(), trained


def test_each_option_of_a_kv_policy_has_values_to_tell_apart() -> None:
    assert {field.name for field in dataclasses.fields(KVPolicy)} == set(KV_VALUES)
    assert {field.name for field in dataclasses.fields(KVRule)} == {"match", "skip", "bits_per_value"}


@pytest.mark.parametrize("name", KV_VALUES)
def test_an_option_of_a_kv_policy_changes_what_is_computed(name: str) -> None:
    first, second, extra = KV_VALUES[name]
    assert kv_made(**{**extra, name: first}) != kv_made(**{**extra, name: second})


@pytest.mark.parametrize("name", KV_REFUSED)
def test_an_option_of_a_kv_policy_that_would_do_nothing_is_refused(name: str) -> None:
    with pytest.raises(PolicyError, match=name):
        KVPolicy(**KV_REFUSED[name])


def test_an_option_of_a_kv_rule_changes_what_is_computed() -> None:
    rules = [
        KVRule("layers.0", bits_per_value=1),
        KVRule("layers.1", bits_per_value=1),
        KVRule("layers.0", bits_per_value=4),
        KVRule("*.0", skip=""),
    ]
    found = [kv_made(rules=(rule,)) for rule in rules]
    assert all(a != b for at, a in enumerate(found) for b in found[:at])


ROUTE_VALUES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "feed_forward": (4, 8, {}),
    "attention": (4, 8, {}),
    "light": (0.5, 1.0, {}),
    "light_init": ("zero", "fit", {}),
    "light_window": (2, 8, {}),
    "window": (None, 8, {"look_ahead": True}),
    "look_ahead": (True, False, {}),
    "router": ({}, {"straight_through": False}, {}),
    "rules": ((), (RouteRule("*block*", skip="dense"),), {}),
}
ROUTE_REFUSED = {
    "light_window": [{"light_window": 8, "light": 0}, {"light_window": 8, "attention": None}],
    "light_init": [{"light_init": "fit", "light": 0}, {"light_init": "fit", "feed_forward": None}],
    "look_ahead": [{"look_ahead": True, "window": 8}],
    "cosine_scale": [{"router": {"cosine_scale": 4.0}}],
    "router": [{"router": {"metod": "exact"}}, {"router": {"eps": "soft"}}, {"router": {"dim": 3}}],
}


def routed_made(**values: Any) -> Any:
    torch.manual_seed(0)
    try:
        seen = [x_of(1)] if values.get("light_init") == "fit" else None
        small = jolted(rpqfx.route(Layer(causal=True), RoutePolicy(**values), calibration=seen))
    except PolicyError as error:
        return str(error)
    return small(x_of(0)).tolist()


def test_each_option_of_a_route_policy_has_values_to_tell_apart() -> None:
    assert {field.name for field in dataclasses.fields(RoutePolicy)} == set(ROUTE_VALUES)
    assert {field.name for field in dataclasses.fields(RouteRule)} == {"match", "skip", "tokens"}


@pytest.mark.parametrize("name", ROUTE_VALUES)
def test_an_option_of_a_route_policy_changes_what_is_computed(name: str) -> None:
    first, second, extra = ROUTE_VALUES[name]
    base = {"look_ahead": True, **extra}
    wide = {**base, name: second}
    if name == "window":
        wide["look_ahead"] = False
    assert routed_made(**{**base, name: first}) != routed_made(**wide)


@pytest.mark.parametrize("name", ROUTE_REFUSED)
def test_an_option_of_a_route_policy_that_would_do_nothing_is_refused(name: str) -> None:
    for values in ROUTE_REFUSED[name]:
        with pytest.raises(PolicyError, match=name):
            RoutePolicy(**values)


def test_an_option_of_a_route_rule_changes_what_is_computed() -> None:
    rules = [RouteRule("block*", tokens=4), RouteRule("block*", tokens=9), RouteRule("attention*", tokens=4)]
    rules.append(RouteRule("block*", skip="dense"))
    found = [routed_made(look_ahead=True, rules=(rule,)) for rule in rules]
    assert all(a != b for at, a in enumerate(found) for b in found[:at])


# ---------------------------------------------------------------------------------------------------------- the calls

CALLS = {
    call.__qualname__: call
    for call in (
        rpqfx.rpqify, rpqfx.convert, rpqfx.check_outputs, rpqfx.quantize_kv, rpqfx.route, rpqfx.finetune, rpqfx.tune,
        rpqfx.finetune_routes, rpqfx.report_routes,
        rpqfx.save, rpqfx.load, rpqfx.materialize, rpqfx.Recoding, rpqfx.dequantize, rpqfx.report,
        Policy.from_scratch, Policy.budget, Policy.pretrained,
    )
}  # fmt: skip
TRIED: dict[tuple[str, str], Callable[[Path], None]] = {}
FITTED = Policy(codebook_dim=4, codebook_bits=3, min_size=0)


def tried(call: str, *names: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Marks what shows that an argument of a call does something."""

    def keep(function: Callable[[Path], None]) -> Callable[[Path], None]:
        TRIED.update({(call, name): function for name in names})
        return function

    return keep


def small(**options: Any) -> nn.Module:
    return rpqfx.rpqify(stack(), FITTED, **options)


@tried("rpqify", "model", "policy")
def _model_and_policy(folder: Path) -> None:
    assert written(small()) != written(rpqfx.rpqify(stack(), dataclasses.replace(FITTED, codebook_bits=2)))
    assert set(quantized_weights(rpqfx.rpqify(MLP(), FITTED))) == {"fc1.weight", "fc2.weight"}


@tried("check_outputs", "model", "example_inputs", "example_kwargs")
def _checked(folder: Path) -> None:
    ran: list[tuple[int, ...]] = []
    model = small()
    model[0].register_forward_hook(lambda module, args, output: ran.append(tuple(output.shape)))
    rpqfx.check_outputs(model, torch.zeros(1, 32))
    rpqfx.check_outputs(model, example_kwargs={"input": torch.zeros(3, 32)})
    assert ran == [(1, 64), (1, 64), (3, 64), (3, 64)]  # each of the two models
    with pytest.raises(RPQError, match="no weight of this model is quantized"):
        rpqfx.check_outputs(stack(), torch.zeros(1, 32))


@tried("rpqify", "inplace")
@tried("convert", "inplace")
def _kinds_of_result(folder: Path) -> None:
    for call in (lambda *given, **more: rpqfx.convert(*given, inputs(1), **more), rpqfx.rpqify):
        model = stack()
        assert call(model, FITTED) is not model and call(model, FITTED, inplace=True) is model


@tried("Recoding", "model", "optimizer", "steps", "recipe", "every", "schedule", "seed")
def _recoded(folder: Path) -> None:
    def trained(stages: int, steps: int = 6, **options: Any) -> str:
        torch.manual_seed(0)
        policy = Policy.from_scratch(codebook_dim=4, codebook_bits=3, sharing="layer", stages=stages, min_size=0)
        model = rpqfx.rpqify(stack(), policy)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        recode = rpqfx.Recoding(model, optimizer, steps=steps, **options)
        for batch in (inputs() * 6)[:6]:
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            recode.step()
        recode.finish()
        return repr(written(model))

    latent = [trained(1), trained(1, every=4), trained(1, seed=5), trained(2), trained(1)]
    assert len(set(latent)) == 4 and latent[0] == latent[4]
    sketch = [{}, {"schedule": (0.5,)}, {"seed": 5}, {"schedule": (0.5,), "steps": 10}]
    assert len({trained(2, recipe="sketch", **options) for options in sketch} | set(latent)) == 8


@tried("dequantize", "model", "inplace")
def _dequantized(folder: Path) -> None:
    model = small()
    assert not quantized_weights(rpqfx.dequantize(model)) and quantized_weights(model)
    assert rpqfx.dequantize(model, inplace=True) is model and not quantized_weights(model)


@tried("rpqify", "seed")
def _seeds(folder: Path) -> None:
    for policy in (dataclasses.replace(FITTED, init="random"), FITTED):
        one, same, other = (written(rpqfx.rpqify(stack(), policy, seed=seed)) for seed in (1, 1, 2))
        assert one == same != other
    before = torch.get_rng_state()
    rpqfx.rpqify(stack(), Policy(codebook_dim=4, codebook_bits=3, min_size=0, init="random"), seed=3)
    with pytest.raises(InputError, match="seed=3 would do nothing: the model is on the meta device"):
        rpqfx.rpqify(stack().to("meta"), FITTED, seed=3)
    torch.manual_seed(0)  # the models were drawn in between
    assert torch.get_rng_state().shape == before.shape


@tried("rpqify", "progress")
def _progress(folder: Path) -> None:
    told: list[str] = []
    small(progress=lambda done, total, name: told.append(name))
    assert told == ["0.weight", "2.weight"]


@tried("convert", "model", "policy", "calibration", "checkpoint", "seed", "progress")
def _conversion(folder: Path) -> None:
    def converted(policy: Policy = FITTED, batches: Any = None, **options: Any) -> Any:
        return written(rpqfx.convert(stack(), policy, inputs() if batches is None else batches, **options))

    told: list[str] = []
    plain = converted(progress=lambda done, total, name: told.append(name))
    assert told and plain != written(small()) and plain != converted(dataclasses.replace(FITTED, codebook_bits=2))
    assert plain != converted(batches=inputs(1)) and plain == converted(seed=0) != converted(seed=1)
    assert converted(checkpoint=folder / "kept") == plain and any((folder / "kept").iterdir())
    alone = Policy.pretrained(4, min_size=0)
    assert written(rpqfx.convert(stack(), alone, None)) == written(rpqfx.rpqify(stack(), alone))
    with pytest.raises(InputError, match=r"give calibration batches"):
        rpqfx.convert(stack(), FITTED, None, checkpoint=folder / "kept")


@tried("quantize_kv", "model", "policy", "calibration", "inplace", "seed", "progress", "fit")
def _quantize_kv(folder: Path) -> None:
    told: list[str] = []

    def made(policy: KVPolicy | None = None, count: int = 1, **options: Any) -> nn.Module:
        batches = [tokens(at, 2, 40) for at in range(count)]
        policy = KVPolicy(**KV_BASE) if policy is None else policy
        return rpqfx.quantize_kv(LM(0), policy, calibration=batches, **{"progress": False, **options})

    def of(model: nn.Module) -> Any:
        return model(tokens(5, 1, 40)).tolist()

    plain = of(made())
    assert plain == of(made(seed=0)) != of(made(seed=1)) and plain != of(made(count=2))
    assert plain != of(made(KVPolicy(**{**KV_BASE, "window": 20}))) and plain != of(LM(0))
    model = LM(0)
    assert rpqfx.quantize_kv(model, calibration=[tokens(0)], inplace=True, progress=False) is model
    drawn = [of(made(fit=False, seed=seed)) for seed in (1, 1, 2)]
    assert plain != drawn[0] == drawn[1] != drawn[2]
    made(progress=lambda done, total, what: told.append(what))
    made(fit=False, progress=lambda done, total, what: told.append(what))
    assert len(told) == 2
    with pytest.raises(InputError, match="quantize_kv needs calibration"):
        rpqfx.quantize_kv(LM(0))
    assert attentions(rpqfx.quantize_kv(LM(0), calibration=[tokens(0)], progress=False))


@tried("route", "model", "policy", "calibration", "inplace", "seed")
def _route(folder: Path) -> None:
    def light(**options: Any) -> Any:
        return {n: p.tolist() for n, p in rpqfx.route(plain, **options).named_parameters() if "routed" in n}

    plain, model = Plain(), Plain()
    assert light() == light(seed=0) != light(seed=1) and light() != light(policy=RoutePolicy(light=1.0))
    assert rpqfx.route(model, inplace=True) is model and len(light()) < len(
        [n for n, _ in rpqfx.route(encoder()).named_parameters() if "routed" in n]
    )
    fit = RoutePolicy(light_init="fit")
    assert light(policy=fit, calibration=[x_of(0)]) != light(policy=fit, calibration=[x_of(1)])
    with pytest.raises(InputError, match="calibration would do nothing"):
        light(calibration=[x_of(0)])


@tried("report_routes", "model", "inputs", "words")
def _report_routes(folder: Path) -> None:
    def told(tokens: int = 4, length: int = 12, **options: Any) -> str:
        return str(rpqfx.report_routes(rpqfx.route(Plain(), RoutePolicy(tokens)), x_of(0, 1, length), **options))

    assert told() != told(5) and told() != told(length=13) and "'w'" in told(words=[["w"] * 12])


def routes_tuned(**options: Any) -> Any:
    """What a routed student is after some steps."""
    torch.manual_seed(0)
    dense = Plain()
    student = rpqfx.route(dense, RoutePolicy(4, light_init="fit"), calibration=[x_of(9)])
    given: dict[str, Any] = {"teacher": dense, "data": [x_of(0), x_of(1), x_of(2)], "steps": 4, **options}
    rpqfx.finetune_routes(student, **given)
    return {name: value.tolist() for name, value in student.state_dict().items()}


@tried("finetune_routes", "model", "teacher", "data", "steps", "seed", "anneal", "rates", "train", "loss", "logits")
@tried("finetune_routes", "autocast", "accumulate", "clip", "progress", "checkpoint", "checkpoint_every")
def _finetune_routes(folder: Path) -> None:
    plain, told = routes_tuned(), list[int]()
    assert plain == routes_tuned(seed=0) != routes_tuned(seed=1)
    for other in ({"data": [x_of(0)]}, {"steps": 3}, {"anneal": 0.0}, {"rates": Rates(dense=0.1)}, {"teacher": Plain()},
                  {"train": lambda name: "up" in name}, {"loss": lambda found, wanted, batch: found.square().mean()},
                  {"logits": True}, {"autocast": torch.bfloat16}, {"accumulate": 2}, {"clip": 1e-6}):  # fmt: skip
        assert plain != routes_tuned(**other), other
    assert plain == routes_tuned(progress=lambda done, total, said: told.append(done)) and told == [1, 2, 3, 4]
    for every, states in ((1, 3), (2, 1)):
        with patch.object(Checkpoint, "save", autospec=True, side_effect=Checkpoint.save) as saved:
            assert plain == routes_tuned(checkpoint=folder / f"routes {every}", checkpoint_every=every)
        assert saved.call_count == states + 1
    for why, refused in {
        "logits=True would do nothing": {"logits": True, "loss": torch.add},
        "seed=1": {"data": iter([x_of(0)]), "seed": 1},
        "checkpoint_every is for a checkpoint": {"checkpoint_every": 2},
    }.items():
        with pytest.raises(InputError, match=why):
            routes_tuned(**refused)


def tuned(teacher: nn.Module | None = None, model: nn.Module | None = None, **options: Any) -> Any:
    """What a student is after some steps."""
    dense = stack() if teacher is None and "loss" not in options else teacher
    student = small() if model is None else model
    given: dict[str, Any] = {"data": inputs(3), "steps": 4, "rates": Rates(codebooks=0.1, codes=0.3), **options}
    rpqfx.finetune(student, teacher=dense, **given)
    return [student.training, written(student)]


def _normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 32))


@tried("finetune", "small", "teacher", "data", "steps", "seed", "recode", "recode_every", "rates", "train")
def _finetune(folder: Path) -> None:
    plain = tuned()
    assert plain == tuned(seed=0) != tuned(seed=1)
    torch.manual_seed(7)
    assert plain != tuned(teacher=nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32)))
    for other in ({"data": inputs(2)}, {"steps": 3}, {"recode": False},
                  {"recode_every": 4}, {"rates": Rates(codebooks=0.2, codes=0.3)},
                  {"train": lambda name: name.endswith("bias")}):  # fmt: skip
        assert plain != tuned(**other), other
    for why, refused in {
        "recode_every=2": {"recode": False, "recode_every": 2, "rates": None},
        "seed=1": {"data": iter(inputs()), "seed": 1},
    }.items():
        with pytest.raises(InputError, match=rf"{why}.* would do nothing"):
            tuned(**refused)


@tried("finetune", "checkpoint", "checkpoint_every")
def _finetune_checkpointed(folder: Path) -> None:
    for every, states in ((1, 3), (2, 1)):
        with patch.object(Checkpoint, "save", autospec=True, side_effect=Checkpoint.save) as saved:
            tuned(checkpoint=folder / str(every), checkpoint_every=every)
        assert saved.call_count == states + 1 and any((folder / str(every)).iterdir())  # and the result
    with pytest.raises(InputError, match="checkpoint_every is for a checkpoint"):
        tuned(checkpoint_every=2)


@tried("finetune", "loss", "logits", "norms", "autocast", "accumulate", "clip", "progress")
def _finetune_further(folder: Path) -> None:
    plain, told = tuned(), list[int]()
    for other in ({"loss": lambda found, wanted, batch: found.square().mean()}, {"logits": True}, {"clip": 1e-6},
                  {"autocast": torch.bfloat16}, {"accumulate": 2}):  # fmt: skip
        assert plain != tuned(**other), other
    tuned(progress=lambda done, total, said: told.append(done))
    assert told == [1, 2, 3, 4]
    normed = [rpqfx.rpqify(_normed(), FITTED) for _ in range(2)]
    for model, norms in zip(normed, ("keep", "update"), strict=True):
        rpqfx.finetune(model, teacher=_normed(), data=inputs(), steps=2, norms=norms)
    assert not torch.equal(normed[0][1].running_mean, normed[1][1].running_mean)
    for why, refused in {
        "norms='update'": {"norms": "update"},
        "logits=True": {"logits": True, "loss": torch.add},
    }.items():
        with pytest.raises(InputError, match=f"{why} would do nothing"):
            tuned(**refused)


@tried("tune", "model", "example_inputs", "example_kwargs", "backward", "repeats")
def _tune(folder: Path) -> None:
    model, x = small(), torch.randn(3, 32)
    done = rpqfx.tune(model, x, repeats=1)
    assert [timed.use.rows for weight in done.reached for timed in weight.uses] == [3, 3] and not done.backward
    assert rpqfx.tune(model, example_kwargs={"input": x}, repeats=1).reached
    assert rpqfx.tune(model, (x,), backward=True, repeats=1).reached[0].uses[0].use.gradients
    counted: list[int] = []

    def count(trials: Any, device: torch.device, repeats: int) -> list[float]:
        counted.append(repeats)
        return [1.0, 2.0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "in_turns", count)
        rpqfx.tune(model, x, repeats=5)
    assert set(counted) == {5}


@tried("save", "model", "path")
@tried("load", "path", "build", "device", "build_device")
def _files(folder: Path) -> None:
    model = small()
    for name in ("one", "two"):
        rpqfx.save(model, folder / name)
        assert written(rpqfx.load(folder / name, stack)) == written(model)
    devices = []

    def build() -> nn.Module:
        devices.append(torch.empty(0).device.type)
        return stack()

    for place in ("meta", "cpu"):
        rpqfx.load(folder / "one", build, build_device=place)
    assert devices == ["meta", "cpu"]
    assert next(rpqfx.load(folder / "one", stack, device="meta").parameters()).is_meta


@tried("save", "build", "arguments")
def _named_classes(folder: Path) -> None:
    rpqfx.save(rpqfx.rpqify(MLP(width=48), FITTED), folder / "named", build=MLP, arguments={"width": 48})
    assert rpqfx.load(folder / "named").fc1.out_features == 48
    with pytest.raises(InputError, match="arguments are those of build"):
        rpqfx.save(small(), folder / "other", arguments={"width": 48})


@tried("materialize", "model", "device", "init")
def _materialize(folder: Path) -> None:
    with torch.device("meta"):
        made = [rpqfx.rpqify(stack(), FITTED) for _ in range(2)]
    inits: list[type] = []
    assert not next(rpqfx.materialize(made[0], "cpu").parameters()).is_meta
    rpqfx.materialize(made[1], init=lambda module: inits.append(type(module)))
    assert inits
    with pytest.raises(InputError, match="init would do nothing"):
        rpqfx.materialize(made[1], init=lambda module: None)
    with pytest.raises(InputError, match="meta"):
        rpqfx.materialize(made[1], "meta")


@tried("report", "model")
def _report(folder: Path) -> None:
    assert str(rpqfx.report(small())) != str(rpqfx.report(rpqfx.rpqify(MLP(), FITTED)))


@tried("Policy.from_scratch", *VALUES.keys() - {"init"}, "rules", "kinds")
@tried("Policy.budget", *VALUES.keys() - {"allow_growth"}, "rules", "kinds", "ratio", "bytes")
@tried("Policy.pretrained", "grad_scale", "plan", "min_size", "rules", "kinds", "bits_per_weight", "embedding_bits")
def _constructors(folder: Path) -> None:
    """Their options are those of the class, each tried in each mode above; what they show is what they take."""
    assert Policy.from_scratch().init == "random" and Policy.from_scratch(codebook_bits=2).min_codebook_bits == 2
    assert Policy.budget(ratio=0.5) != Policy.budget(bytes=10**6)
    assert Policy.pretrained(3) == Policy.pretrained(bits_per_weight=3) != Policy.pretrained(3, embedding_bits=4)


@pytest.mark.parametrize("call", CALLS)
def test_each_argument_of_a_call_is_tried(call: str) -> None:
    names = [p.name for p in inspect.signature(CALLS[call]).parameters.values()]
    assert not {"options", "kwargs", "args"} & set(names)
    assert {(call, name) for name in names} == {key for key in TRIED if key[0] == call}


@pytest.mark.parametrize("function", dict.fromkeys(TRIED.values()), ids=lambda function: function.__name__.strip("_"))
def test_each_argument_of_a_call_does_something(function: Callable[[Path], None], tmp_path: Path) -> None:
    function(tmp_path)


def test_experts_share_codebooks_or_have_their_own() -> None:
    torch.manual_seed(0)
    model = Experts()
    shapes = [
        [weight.spec.codebooks_shape for weight in quantized_weights(rpqfx.rpqify(model, policy)).values()]
        for policy in (Policy(codebook_bits=2, codebook_dim=4, min_size=0, experts=kind) for kind in ("shared", "own"))
    ]
    assert shapes[0] != shapes[1]


def test_what_is_refused_is_always_an_error_of_this_library() -> None:
    assert issubclass(PolicyError, RPQError) and issubclass(InputError, RPQError)
