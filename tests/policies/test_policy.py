"""A policy always answers: a spec that divides, or a skip with its reason; and it is a value."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

import rpqfx
from rpqfx import Budget, CodebookSpec, KeepDense, Policy, Quantize, Rule, Site
from rpqfx.errors import PolicyError
from rpqfx.graph import capture, find_sites
from rpqfx.policies.decide import decide_all
from tests.models import CNN, GPT, MLP, SMALL, Conv1D, Recommender, ScaledLinear


def site(name: str = "fc.weight", shape: tuple[int, ...] = (1024, 128), **values: Any) -> Site:
    defaults = {"names": (name,), "kind": "linear", "module_type": nn.Linear, "dtype": torch.float32, "splits": True}
    return Site(name=name, shape=shape, **{**defaults, **values})


sizes = st.one_of(st.integers(1, 600), st.sampled_from([2, 3, 7, 97, 127, 251, 509, 768, 1021, 4096]))


@st.composite
def sites(draw: st.DrawFn) -> Site:
    shape = tuple(draw(st.lists(sizes, min_size=2, max_size=4)))
    splits = draw(st.booleans())
    kind = "linear" if splits else draw(st.sampled_from(["conv", "embedding", "parameter"]))
    return site(
        shape=shape,
        lead=1 if splits or kind == "conv" else draw(st.integers(1, len(shape) - 1)),
        flipped=kind != "conv" and draw(st.booleans()),
        splits=splits,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
        heads=draw(st.integers(1, 64)),
        kind=kind,
    )


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "codebook_dim": st.integers(1, 300),
    "num_subvectors": st.just("heads"),
    "codebook_bits": st.integers(1, 16),
    "min_codebook_bits": st.integers(1, 16),
    "stages": st.integers(1, 4),
    "sharing": st.sampled_from(["own", "layer", "shape", "role"]),
    "split": st.sampled_from(["row", "auto"]),
    "scale": st.booleans(),
    "column_scale": st.booleans(),
    "signs": st.booleans(),
    "grad_scale": st.sampled_from(["sum", "sqrt", "mean"]),
    "init": st.sampled_from(["fit", "random"]),
    "plan": st.sampled_from(["auto", "dequantize", "lookup"]),
    "min_size": st.integers(0, 10**6),
    "allow_growth": st.booleans(),
}


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    chosen = draw(st.fixed_dictionaries({}, optional=OPTIONS))
    if "codebook_dim" in chosen:
        chosen.pop("num_subvectors", None)
    if "min_codebook_bits" in chosen:  # at most bits, or it is refused
        chosen["min_codebook_bits"] = min(chosen["min_codebook_bits"], chosen.get("codebook_bits", 8))
    return chosen


# -------------------------------------------------------------------------------------------- an answer, always


@given(sites(), options())
def test_any_site_gets_a_spec_that_divides_or_a_skip_with_a_reason(where: Site, chosen: dict[str, Any]):
    answer = Policy(**chosen)(where)
    if isinstance(answer, KeepDense):
        assert "fewer than min_size" in answer.reason or "would not shrink" in answer.reason
        assert where.numel < chosen.get("min_size", 4096) or not chosen.get("allow_growth")
        return
    spec, layout = answer.spec, where.layout(answer.split)
    assert (spec.num_vectors, spec.dim) == (layout.num_vectors, layout.dim)
    assert spec.dim % spec.codebook_dim == 0 and spec.num_subvectors % spec.num_codebooks == 0
    assert spec.entries <= 2 ** chosen.get("codebook_bits", 8)
    assert chosen.get("allow_growth") or spec.stored_bytes(where.dtype) < where.dense_bytes
    if chosen.get("split") == "row":
        assert answer.split == "row"
    assert answer.plan == chosen.get("plan", "auto")


@given(sites(), st.integers(1, 300))
def test_the_divisor_nearest_to_the_length_asked_for_is_taken(where: Site, length: int):
    answer = Policy(codebook_dim=length, split="row", allow_growth=True, min_size=0)(where)
    dim = where.layout().dim
    divisors = [d for d in range(1, dim + 1) if dim % d == 0] if dim < 5000 else []
    for d in divisors:
        taken = answer.spec.codebook_dim
        assert max(taken, length) / min(taken, length) <= max(d, length) / min(d, length)


@given(sites(), st.integers(1, 8), st.integers(1, 8))
def test_fewer_bits_are_tried_down_to_min_bits(where: Site, first: int, second: int):
    low, high = sorted((first, second))
    answer = Policy(codebook_dim=8, codebook_bits=high, min_codebook_bits=low, min_size=0)(where)
    fixed = [Policy(codebook_dim=8, codebook_bits=bits, min_size=0)(where) for bits in range(high, low - 1, -1)]
    wanted = next((found for found in fixed if isinstance(found, Quantize)), fixed[0])
    assert answer == wanted


@given(sites())
def test_split_auto_takes_the_smaller(where: Site):
    if not where.splits:
        assert Policy(allow_growth=True, min_size=0)(where).split == "row"
        return
    auto, row, column = (
        Policy(codebook_dim=16, codebook_bits=4, split=split, allow_growth=True, min_size=0)(where)
        for split in ("auto", "row", "column")
    )
    size = {answer.split: answer.spec.stored_bytes(where.dtype) for answer in (row, column)}
    assert auto.spec.stored_bytes(where.dtype) == min(size.values())


def test_a_layer_is_never_made_larger_without_being_told_to():
    small = site(shape=(200, 64))
    answer = Policy(codebook_bits=8)(small)
    assert isinstance(answer, KeepDense) and answer.reason.startswith("would not shrink: 51,200 bytes dense, ")
    assert isinstance(Policy(codebook_bits=8, allow_growth=True)(small), Quantize)


def test_an_explicit_count_that_divides_is_taken():
    assert Policy(num_subvectors=8, split="row")(site()).spec.num_subvectors == 8


def test_an_explicit_count_that_does_not_divide_names_the_site_and_the_nearest():
    why = r"fc\.weight: num_subvectors 7 does not divide its vector length 128; the nearest that does is 8"
    with pytest.raises(PolicyError, match=why):
        Policy(num_subvectors=7, split="row", codebook_bits=4)(site())


def test_heads_gives_one_codebook_a_head_or_the_nearest_that_divides():
    def count(heads: int, shape: tuple[int, ...] = (512, 128)) -> int:
        return Policy(num_subvectors="heads", split="row", codebook_bits=4)(
            site(heads=heads, shape=shape)
        ).spec.num_subvectors

    assert (count(8), count(16), count(7), count(12, (512, 96)), count(5, (512, 96))) == (8, 16, 8, 12, 6)
    with pytest.raises(
        PolicyError, match=r"fc\.weight: the model names no number of heads; give num_subvectors as a number"
    ):
        Policy(num_subvectors="heads")(site())


def test_columns_where_there_can_be_none_are_refused_by_name():
    with pytest.raises(PolicyError, match=r"conv\.weight: vectors of a conv lie along its outputs"):
        Policy(split="column")(site("conv.weight", (64, 64, 3, 3), kind="conv", splits=False))


@pytest.mark.parametrize("policy", [Policy(codebook_bits=4), Policy.from_scratch(codebook_bits=4)])
@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
def test_sub_vectors_of_filters_are_whole_channels_unless_a_length_is_asked_for(policy, kind):
    """So that a convolution can contract; a linear map of the same numbers is cut at 64."""
    filters = site("conv.weight", (512, 256, 3, 3), kind=kind, splits=False)
    assert policy(filters).spec.codebook_dim == 72
    assert dataclasses.replace(policy, codebook_dim=64)(filters).spec.codebook_dim == 64
    assert dataclasses.replace(policy, num_subvectors=64)(filters).spec.codebook_dim == 36
    assert policy(dataclasses.replace(filters, kind="parameter")).spec.codebook_dim == 64


def test_from_scratch_draws_anew_and_lowers_bits():
    policy = Policy.from_scratch(codebook_bits=8)
    assert (policy.init, policy.min_codebook_bits) == ("random", 4)
    assert policy(site(shape=(4096, 4096))).spec.codebook_dim == 64
    answer = policy(site(shape=(128, 128)))
    assert isinstance(answer, Quantize) and answer.spec.codebook_bits < 8 and answer.init == "random"


def test_sharing_puts_sites_of_one_shape_or_role_into_one_group():
    a, b, c = site("layers.0.fc.weight"), site("layers.11.fc.weight"), site("layers.0.out.weight")
    role, shape, own = (Policy(sharing=kind) for kind in ("role", "shape", "own"))
    assert role(a).group == role(b).group != role(c).group
    assert shape(a).group == shape(b).group == shape(c).group
    assert own(a).group is own(b).group is None
    assert shape(a).group != shape(site(dtype=torch.bfloat16)).group


# --------------------------------------------------------------------------------------------------------- rules


def test_the_first_rule_that_matches_wins():
    policy = Policy(
        codebook_bits=4,
        rules=(Rule("a.*", codebook_bits=2), Rule("a.b.*", codebook_bits=3), Rule("*", skip="the rest")),
        min_size=0,
    )
    assert policy(site("a.b.weight")).spec.codebook_bits == 2
    assert policy(site("x.weight")) == KeepDense("the rest")


def test_a_rule_sets_what_it_sets_and_the_policy_the_rest():
    rule = Rule("fc", codebook_bits=3, scale=False)
    policy = Policy(codebook_dim=16, scale=True, signs=True, rules=(rule,))
    spec, other = policy(site()).spec, policy(site("x.weight")).spec
    assert (spec.codebook_bits, spec.scale, spec.signs, spec.codebook_dim) == (3, False, True, 16)
    assert (other.codebook_bits, other.scale) == (8, True)


def test_a_column_scale_is_one_an_element_or_one_a_channel_of_filters():
    policy = Policy(
        min_size=0, codebook_bits=2, column_scale=True, split="auto", rules=(Rule("x", column_scale=False),)
    )
    filters = site("conv.weight", (512, 16, 3, 3), kind="conv", splits=False)
    experts = site("w", (4, 512, 64), kind="experts", experts=True)
    assert policy(site()).spec.column_scale_group == 1 and policy(site("x.weight")).spec.column_scale_group == 0
    assert (policy(filters).spec.column_scale_group, policy(filters).spec.num_column_scales) == (9, 16)
    for sharing, count in (("shared", 64), ("own", 4 * 64)):
        spec = Policy(min_size=0, codebook_bits=2, column_scale=True, split="row", experts=sharing)(experts).spec
        assert (spec.column_scale_group, spec.num_column_scales) == (1, count)
    assert Policy().column_scale is False
    with pytest.raises(PolicyError, match="column_scale is True or False, got 9"):
        Policy(column_scale=9)


def test_plans_come_from_the_rule_and_then_from_the_policy():
    """A rule's "auto" is an answer too. A budget keeps plans, and a rule about nothing else leaves it the shape."""
    rules = (Rule("fc1", plan="lookup"), Rule("fc2", plan="auto"), Rule("fc3", codebook_bits=4))
    for policy in (Policy(plan="dequantize", rules=rules), Policy.budget(ratio=0.06, plan="dequantize", rules=rules)):
        decisions = policy.decide([site(f"fc{i}.weight") for i in range(5)])
        held = {name[2]: decision.plan for name, decision in decisions.items() if isinstance(decision, Quantize)}
        assert held == {"0": "dequantize", "1": "lookup", "2": "auto", "3": "dequantize", "4": "dequantize"}
    free = Policy.budget(ratio=0.05, rules=(Rule("*", plan="lookup"),)).decide([site()])["fc.weight"]
    assert free.spec != Policy()(site()).spec and free.plan == "lookup"


def test_a_rules_count_stands_for_the_policys_length_and_the_other_way_round():
    assert Policy(codebook_dim=16, rules=(Rule("fc", num_subvectors=2, split="row"),))(site()).spec.num_subvectors == 2
    assert Policy(num_subvectors=4, rules=(Rule("fc", codebook_dim=8, split="row"),))(site()).spec.codebook_dim == 8


@pytest.mark.parametrize(
    ("match", "hits"),
    [
        ("blocks.0.*", {"qkv", "fc1"}),
        ("blocks.0.fc1", {"fc1"}),
        ("blocks.0.fc1.weight", {"fc1"}),
        ("*.fc?", {"fc1"}),
        ("*.FC1", set()),
        ("fc1", set()),
        ("head", {"tok"}),
        ("head.weight", {"tok"}),
        ("*", {"qkv", "fc1", "tok", "conv", "own"}),
    ],
)
def test_globs_match_the_parameter_or_its_module_under_any_name(match: str, hits: set[str]):
    known = {
        "qkv": site("blocks.0.qkv.weight"),
        "fc1": site("blocks.0.fc1.weight"),
        "tok": site("tok.weight", names=("tok.weight", "head.weight")),
        "conv": site("conv.weight"),
        "own": site("table"),
    }
    assert {name for name, where in known.items() if Rule(match, codebook_bits=2).matches(where)} == hits


def test_types_match_subclasses_too_and_compare_by_name():
    rule = Rule(nn.Linear, skip="dense")
    assert rule.matches(site()) and rule.matches(site(module_type=ScaledLinear))
    assert not rule.matches(site(module_type=Conv1D)) and not rule.matches(site(module_type=nn.Conv2d))
    assert Rule(ScaledLinear, skip="x").matches(site(module_type=ScaledLinear))
    assert not Rule(ScaledLinear, skip="x").matches(site())
    assert rule == Rule("type:torch.nn.modules.linear.Linear", skip="dense")


def test_predicates_see_the_site():
    policy = Policy(codebook_bits=4, rules=(Rule(lambda where: where.shape[0] < 1000, codebook_bits=2),))
    assert (policy(site(shape=(512, 128))).spec.codebook_bits, policy(site()).spec.codebook_bits) == (2, 4)


def test_what_a_site_cannot_do_outranks_every_rule():
    blocked = site(blocked="it cannot")
    assert Policy(rules=(Rule("*", codebook_bits=2),))(blocked) == KeepDense("it cannot")
    assert Policy(rules=(Rule("*", skip="no"),))(blocked) == KeepDense("it cannot")
    assert decide_all(lambda where: CodebookSpec(1024, 128, 8), [blocked, site("b.w")])[0]["fc.weight"] == KeepDense(
        "it cannot"
    )


def test_a_rules_skip_outranks_size_and_kind():
    policy = Policy(min_size=10**9, kinds=("conv",), rules=(Rule("fc", skip="mine"),))
    assert policy(site()) == KeepDense("mine")
    assert policy(site("x.weight")) == KeepDense("the policy leaves every linear alone")
    assert Policy(min_size=10**9)(site()) == KeepDense("131072 elements, fewer than min_size 1000000000")


def test_a_rule_may_allow_what_the_policy_does_not():
    policy = Policy(
        min_size=10**6, rules=(Rule("fc", min_size=0, codebook_bits=4), Rule("tiny", min_size=0, allow_growth=True))
    )
    assert isinstance(policy(site()), Quantize) and isinstance(policy(site("other.weight")), KeepDense)
    assert isinstance(policy(site("tiny.weight", (4, 4))), Quantize)


def test_kinds_choose_what_is_rewritten():
    model = nn.ModuleDict({"cnn": CNN(), "bags": Recommender()})
    for kinds in (("conv",), ("linear",), ("embedding", "embedding_bag")):
        decisions = Policy(codebook_dim=8, codebook_bits=1, min_size=64, kinds=kinds).decide(find_sites(capture(model)))
        by_name = {where.name: where.kind for where in find_sites(capture(model))}
        held = {by_name[name] for name, decision in decisions.items() if isinstance(decision, Quantize)}
        assert held == set(kinds)


def test_rules_that_match_nothing_become_notes():
    policy = dataclasses.replace(
        SMALL, rules=(Rule("fc1", codebook_bits=3), Rule("fc3", codebook_bits=3), Rule(nn.Conv2d, skip="x"))
    )
    report = rpqfx.report(rpqfx.rpqify(MLP(), policy))
    notes = ("rule 'fc3' matches no site", "rule 'type:torch.nn.modules.conv.Conv2d' matches no site")
    assert report.notes == notes
    for shown in (str(report), report.to_markdown(), report.to_html().replace("&#x27;", "'")):
        assert all(note in shown for note in notes)


def test_what_of_a_policy_comes_to_nothing_is_noted():
    rules = (Rule("*", codebook_bits=3), Rule("fc", codebook_bits=2))
    assert decide_all(Policy(rules=rules), [site()])[1] == [
        "rule 'fc' is never followed: rules before it match every site that it does"
    ]
    assert decide_all(Policy(rules=rules[::-1]), [site(), site("x.weight")])[1] == []
    tables = Policy.pretrained(4, embedding_bits=3)
    assert decide_all(tables, [site()])[1] == ["embedding_bits: the model has no embedding"]
    embedding = site("e.weight", (1000, 64), kind="embedding", splits=False, module_type=nn.Embedding)
    assert decide_all(tables, [site(), embedding])[1] == []


def test_fewer_bits_are_tried_before_a_layer_may_grow():
    small = site(shape=(200, 64))
    answer = Policy(codebook_bits=8, min_codebook_bits=4, allow_growth=True)(small)
    assert answer == Policy(codebook_bits=8, min_codebook_bits=4)(small) and answer.spec.codebook_bits < 8
    tiny = site(shape=(8, 8))
    assert Policy(codebook_bits=8, min_codebook_bits=4, min_size=0, allow_growth=True)(tiny).spec.codebook_bits == 8
    assert isinstance(Policy(codebook_bits=8, min_codebook_bits=4, min_size=0)(tiny), KeepDense)


# --------------------------------------------------------------------------------------------------------- a value


def test_policies_are_printed_compared_hashed_and_pickled():
    policy = Policy(codebook_dim=16, rules=(Rule("head", codebook_bits=4), Rule(nn.Conv2d, skip="small")))
    same = Policy(codebook_dim=16, rules=[Rule("head", codebook_bits=4), Rule(nn.Conv2d, skip="small")])
    assert policy == same and hash(policy) == hash(same) and policy != Policy(codebook_dim=16)
    assert "codebook_dim=16" in repr(policy) and "match='head'" in repr(policy)
    assert pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.codebook_bits = 3


rules = st.builds(
    lambda match, said: Rule(match, **said),
    st.one_of(st.text(max_size=8), st.sampled_from([nn.Linear, nn.Conv2d, GPT])),
    options() | st.builds(lambda reason: {"skip": reason}, st.text(max_size=8)),
)
kinds = st.lists(st.sampled_from(["linear", "conv", "embedding", "parameter"]), unique=True)
budgets = st.sampled_from([{}, {"amount": Budget(ratio=0.25)}, {"amount": Budget(bytes=12345)}])


@settings(max_examples=50)
@given(options(), st.lists(rules, max_size=3), kinds, budgets)
def test_json_round_trip(chosen: dict[str, Any], some: list[Rule], which: list[str], budget: dict[str, Any]):
    try:
        policy = Policy(**chosen, rules=tuple(some), kinds=tuple(which), **budget)
    except PolicyError as error:  # rules and options that a budget, or each other, leave nothing to do
        assert "would do nothing" in str(error) or "more than the policy's codebook_bits" in str(error)
        reject()
    text = policy.to_json()
    assert Policy.from_json(text) == policy
    said = json.loads(text)
    assert (said["policy"], said["version"]) == ("Policy", 1)


def test_json_says_only_what_differs():
    head = {"policy": "Policy", "version": 1}
    assert json.loads(Policy().to_json()) == head
    assert json.loads(Policy(plan="auto", rules=(Rule("head", plan="auto"),)).to_json()) == {
        **head,
        "rules": [{"match": "head", "plan": "auto"}],
    }
    assert json.loads(Policy(codebook_bits=4, rules=(Rule("head", skip="big"),)).to_json()) == {
        **head,
        "codebook_bits": 4,
        "rules": [{"match": "head", "skip": "big"}],
    }
    assert json.loads(Policy.budget(ratio=0.25).to_json()) == {**head, "amount": {"Budget": {"ratio": 0.25}}}
    rate = {"Rate": {"bits_per_weight": 3, "embedding_bits": None}}
    assert json.loads(Policy.pretrained(3, embedding_bits=None).to_json()) == {**head, "amount": rate, "min_size": 1024}


def test_a_policy_read_from_json_decides_the_same():
    policy = Policy(
        codebook_dim=4,
        codebook_bits=2,
        min_size=64,
        rules=(Rule(nn.Embedding, codebook_bits=3), Rule("*.fc2", skip="no")),
    )
    found = find_sites(capture(GPT()))
    assert Policy.from_json(policy.to_json()).decide(found) == policy.decide(found)


def test_json_that_leaves_options_out_is_read_with_the_defaults():
    short = '{"policy": "Policy", "version": 1, "codebook_bits": 4, "rules": [{"match": "head", "codebook_bits": 2}]}'
    assert Policy.from_json(short) == Policy(codebook_bits=4, rules=(Rule("head", codebook_bits=2),))
    assert Policy.from_json(short).plan == "auto" and Policy.from_json(short).rules[0].plan is None


def test_a_predicate_has_no_json():
    with pytest.raises(PolicyError, match="a rule with a predicate is code and has no JSON"):
        Policy(rules=(Rule(lambda where: True, codebook_bits=2),)).to_json()


GARBAGE = {
    "": "this is not JSON",
    "{": "this is not JSON",
    "[]": r"it is \[\], where an object with fields is expected",
    '{"codebook_bits": 4}': "its field 'policy' is to say 'Policy'",
    '{"policy": "KVPolicy", "version": 1}': "its field 'policy' says 'KVPolicy', where 'Policy' is expected",
    '{"policy": "Policy", "version": 2}': "the Policy is of version 2, this library reads 1",
    '{"policy": "Policy"}': "the Policy is of version None, this library reads 1",
    **{
        f'{{"policy": "Policy", "version": 1, {fields}}}': said
        for fields, said in {
            '"bitz": 4': "a Policy has no option 'bitz'",
            '"codebook_bits": "8"': "codebook_bits is a whole number from 1 to 16, got '8'",
            '"rules": [5]': "not a Policy",
            '"rules": [{"codebook_bits": 4}]': "not a Policy",
            '"rules": [{"match": "x", "bitz": 4}]': "a Rule has no option 'bitz'",
            '"kinds": 5': "not a Policy",
            '"ratio": 0.5': "a Policy has no option 'ratio'",
            '"amount": 0.5': "amount is an object with one field, one of Fixed, Budget, Rate, got 0.5",
            '"amount": {"Half": {}}': "amount is one of Fixed, Budget, Rate, got 'Half'",
            '"amount": {"Budget": {"ratio": "half"}}': "not a Policy: ratio is the size after over",
            '"amount": {"Fixed": {"codebook_bits": 3}}': "a Fixed has no option 'codebook_bits'; it has none",
        }.items()
    },
}


@pytest.mark.parametrize("text", GARBAGE)
def test_what_is_no_policy_is_refused(text: str):
    with pytest.raises(PolicyError, match=GARBAGE[text]):
        Policy.from_json(text)


BAD: list[tuple[str, Any]] = [
    *(("codebook_bits", value) for value in (0, 17, -1, 8.0, "8", True)),
    *(("min_codebook_bits", value) for value in (0, 17, 2.5)),
    *(("stages", value) for value in (0, 65, 1.5)),
    *(("codebook_dim", value) for value in (0, -4, "auto", 2.0)),
    *(("num_subvectors", value) for value in (0, -1, "head", 2.5, True)),
    *(("min_size", value) for value in (-1, "big", 1.5)),
    *((name, "yes") for name in ("scale", "signs", "allow_growth", "sharing", "split", "grad_scale", "init", "plan")),
]


@pytest.mark.parametrize(("name", "value"), BAD)
@pytest.mark.parametrize("of", [Policy, lambda **values: Rule("*", **values)], ids=["policy", "rule"])
def test_every_bad_value_is_refused_with_the_options_name(of: Any, name: str, value: Any):
    with pytest.raises(PolicyError, match=rf"^{name} is"):
        of(**{name: value})


def test_what_contradicts_itself_is_refused():
    with pytest.raises(PolicyError, match=r"give codebook_dim \(8\) or num_subvectors \(4\), not both"):
        Policy(codebook_dim=8, num_subvectors=4)
    with pytest.raises(PolicyError, match="a Rule has no option 'bit'; it has"):
        Rule("*", bit=4)
    with pytest.raises(PolicyError, match="a Rule matches by a glob, a module class or a predicate, got 5"):
        Rule(5, codebook_bits=4)
    with pytest.raises(PolicyError, match="rules are Rule values, got 'head'"):
        Policy(rules=("head",))
    with pytest.raises(PolicyError, match=r"each of kinds is one of linear, .*, got 'conv2d'"):
        Policy(kinds=("conv2d",))
    with pytest.raises(PolicyError, match="a Policy is made of options by name"):
        Policy(64)


def test_stored_bytes_in_the_reason_are_those_of_the_spec():
    where = site(shape=(300, 64))
    answer = Policy(codebook_dim=64, codebook_bits=8, stages=2, split="row")(where)
    size = CodebookSpec(300, 64, 64, 256, 2).stored_bytes()
    assert isinstance(answer, KeepDense) and f"{size:,} with 8 bits" in answer.reason
    assert size == 4 * math.prod((2, 1, 256, 64)) + 2 * 300


@given(
    rows=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    dim=st.sampled_from([1, 4, 16]),
    bits=st.integers(2, 12),
    lower=st.booleans(),
    sharing=st.sampled_from(["shape", "role"]),
    scale=st.booleans(),
)
def test_layers_that_share_codebooks_never_grow_together(rows, dim, bits, lower, sharing, scale) -> None:
    """Whoever takes part in sharing, at whatever bits: codebooks once and all codes are less than the dense tensors."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(16, count, bias=False) for count in rows))
    sites = find_sites(capture(model))
    policy = Policy(
        codebook_dim=dim,
        codebook_bits=bits,
        min_codebook_bits=2 if lower else None,
        sharing=sharing,
        scale=scale,
        min_size=0,
        split="row",
    )
    held = {s: d for s in sites if isinstance(d := policy.decide(sites)[s.name], Quantize)}
    groups: dict[object, int] = {}
    for site, hold in held.items():
        codes = hold.spec.stored_bytes(site.dtype, codebooks=False)
        key = (hold.group, hold.spec.codebooks_shape)
        groups.setdefault(key, hold.spec.stored_bytes(site.dtype) - codes)
        groups[key] += codes - site.dense_bytes
    assert all(total < 0 for total in groups.values())
