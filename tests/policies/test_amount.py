"""An amount is one frozen value, which fills in what it does not choose and names what it would ignore."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpqfx import Budget, Fixed, Policy, Rate, Rule
from rpqfx.errors import PolicyError
from rpqfx.policies.amount import Amount, amount_from
from rpqfx.policies.options import Options, PartialOptions

AMOUNTS: tuple[Amount, ...] = (Fixed(), Budget(ratio=0.5), Budget(bytes=10**6), Rate(3), Rate(2.5, embedding_bits=None))


@pytest.mark.parametrize("amount", AMOUNTS, ids=repr)
def test_an_amount_is_a_frozen_value(amount: Amount) -> None:
    assert dataclasses.replace(amount) == amount and hash(dataclasses.replace(amount)) == hash(amount)  # type: ignore[type-var]
    assert [other for other in AMOUNTS if other == amount] == [amount]
    with pytest.raises(dataclasses.FrozenInstanceError):
        amount.ratio = 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("amount", AMOUNTS, ids=repr)
def test_what_is_left_out_is_chosen_or_has_the_one_default(amount: Amount) -> None:
    policy, defaults = Policy(amount=amount), Options()
    for field in dataclasses.fields(PartialOptions):
        value = getattr(policy, field.name)
        assert value == (None if field.name in amount.chosen else getattr(defaults, field.name)), field.name


@pytest.mark.parametrize("amount", AMOUNTS, ids=repr)
def test_defaults_alone_are_never_idle(amount: Amount) -> None:
    amount.check(PartialOptions(**amount.defaults()), ())
    amount.check(PartialOptions(), (Rule("a", min_size=0, init="fit", allow_growth=False),))


@pytest.mark.parametrize(
    ("name", "there"),
    [("ratio", r"budget\(ratio="), ("bytes", r"budget\(bytes="), ("bits_per_weight", "pretrained"),
     ("embedding_bits", "pretrained")],
)  # fmt: skip
def test_a_number_of_an_amount_that_is_given_to_the_policy_is_refused_with_the_call_to_write(name, there) -> None:
    with pytest.raises(PolicyError, match=rf"a Policy has no option '{name}'; it has .*; write Policy\.{there}"):
        Policy(**{name: 3})


@given(st.floats(0.01, 1.0), st.integers(1, 10**12))
def test_a_ratio_is_a_share_of_the_bytes_before_and_bytes_are_bytes(ratio: float, before: int) -> None:
    assert Budget(ratio=ratio).limit(before) == int(ratio * before) <= before
    assert Budget(bytes=before).limit(10 * before) == before


def test_a_rule_with_a_shape_may_set_all_but_what_an_amount_never_allows() -> None:
    Policy(amount=Rate(3), rules=(Rule("a", codebook_bits=4, stages=2, allow_growth=True),))
    for rule in (Rule("a", stages=2), Rule("a", allow_growth=True), Rule("a", codebook_bits=4, init="random")):
        with pytest.raises(PolicyError, match=r"of the rule for 'a' would do nothing: .*; leave it out"):
            Policy(amount=Rate(3), rules=(rule,))


@pytest.mark.parametrize("wrong", [None, 3, [], {}, {"Rate": 3}, {"Rate": {}, "Fixed": {}}, {"Amount": {}}])
def test_json_that_is_no_amount_is_refused(wrong: Any) -> None:
    with pytest.raises(PolicyError, match=r"^amount is "):
        amount_from(wrong)


@pytest.mark.parametrize("amount", AMOUNTS, ids=repr)
def test_an_amount_is_json_both_ways(amount: Amount) -> None:
    assert amount_from({type(amount).__name__: dataclasses.asdict(amount)}) == amount  # type: ignore[call-overload]
    assert Policy.from_json(Policy(amount=amount).to_json()).amount == amount
