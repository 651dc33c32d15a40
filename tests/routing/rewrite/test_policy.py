"""Claims on policies of routing."""

from __future__ import annotations

from typing import Any

import pytest

from rpqfx.errors import PolicyError
from rpqfx.routing.rewrite import RoutePolicy, RouteRule

POLICY = RoutePolicy(
    feed_forward=8,
    router={"eps": 0.2},
    rules=(RouteRule("layers.0", skip="it is first"), RouteRule("layers.*", tokens=0.5)),
)


def test_the_first_rule_that_matches_holds() -> None:
    assert POLICY.of("layers.0", "feed_forward") == "it is first"
    assert POLICY.of("layers.1", "feed_forward") == POLICY.of("layers.1", "attention") == 0.5
    assert POLICY.of("other", "feed_forward") == 8 and POLICY.of("other", "attention") == 0.25
    assert POLICY.of("layers.9", "attention") == 0.5
    assert "None" in str(RoutePolicy(attention=None).of("other", "attention"))


def test_json_there_and_back() -> None:
    assert RoutePolicy.from_json(POLICY.to_json()) == POLICY
    assert hash(RoutePolicy.from_json(POLICY.to_json())) == hash(POLICY)


@pytest.mark.parametrize("text", ["", "[]", '{"light": "wide"}', '{"colour": 3}', '{"rules": [{"match": "a"}]}', "3"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(PolicyError):
        RoutePolicy.from_json(text)


@pytest.mark.parametrize(
    "options",
    [
        {"feed_forward": 0}, {"feed_forward": 1.5}, {"attention": -0.1}, {"attention": True}, {"light": -1},
        {"feed_forward": None, "attention": None}, {"light_window": 3}, {"light_window": 0}, {"window": 0},
        {"window": 8, "router": {"method": "sinkhorn"}},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        RoutePolicy(**options)


@pytest.mark.parametrize("options", [{}, {"skip": "why", "tokens": 3}, {"tokens": 0}])
def test_rules_say_one_thing(options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        RouteRule("a", **options)
