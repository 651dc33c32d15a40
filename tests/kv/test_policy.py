"""Claims on policies of the KV cache."""

from typing import Any

import pytest

from rpqfx.errors import PolicyError
from rpqfx.kv.policy import KVPolicy, KVRule

POLICY = KVPolicy(bits=3, window=7, rules=(KVRule("layers.0.*", skip="it is short"), KVRule("layers.*", bits=4)))


def test_the_first_rule_that_matches_holds() -> None:
    assert POLICY.of("layers.0.attention") == "it is short"
    assert POLICY.of("layers.1.attention") == KVPolicy(bits=4, window=7)
    assert POLICY.of("other") == KVPolicy(bits=3, window=7)


def test_json_there_and_back() -> None:
    assert KVPolicy.from_json(POLICY.to_json()) == POLICY
    assert hash(KVPolicy.from_json(POLICY.to_json())) == hash(POLICY)


@pytest.mark.parametrize("text", ["", "[]", '{"bits": "many"}', '{"colour": 3}', '{"rules": [{"match": "a"}]}', "3"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(PolicyError):
        KVPolicy.from_json(text)


@pytest.mark.parametrize(
    "values",
    [
        {"bits": 0}, {"bits": 9}, {"bits": float("nan")}, {"window": -1}, {"window": 1.5}, {"sinks": True},
        {"sub_vector": 0}, {"entries": 1}, {"entries": 2**17}, {"stages": 0}, {"beam": 0}, {"chunk": 0},
        {"keys": "beside"}, {"decay": 1.0},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=next(iter(values))):
        KVPolicy(**values)


@pytest.mark.parametrize("values", [{}, {"skip": "why", "bits": 2}, {"bits": 0}])
def test_a_rule_says_one_thing(values: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        KVRule("*", **values)


def test_json_of_before_options_were_refused_is_read() -> None:
    """Version 0.1 wrote every option, those that did nothing too."""
    old = '{"bits": 2.0, "window": 9, "stages": 6, "transform": false, "joint": true, "cosine": true, "beam": 8}'
    assert KVPolicy.from_json(old) == KVPolicy(window=9, transform=False, cosine=True)
    with pytest.raises(PolicyError, match="stages=5 would do nothing"):
        KVPolicy.from_json(old.replace("6", "5"))
