"""Claims on policies of the KV cache."""

from typing import Any

import pytest

from rpqfx.errors import PolicyError
from rpqfx.kv import attentions, quantize_kv
from rpqfx.kv.policy import KVPolicy, KVRule
from tests.kv.kv_models import LM, tokens

POLICY = KVPolicy(
    bits_per_value=3, window=7, rules=(KVRule("layers.0.*", skip="it is short"), KVRule("layers.*", bits_per_value=4))
)


def test_the_first_rule_that_matches_holds() -> None:
    assert POLICY.of("layers.0.attention") == "it is short"
    assert POLICY.of("layers.1.attention") == KVPolicy(bits_per_value=4, window=7)
    assert POLICY.of("other") == KVPolicy(bits_per_value=3, window=7)


def test_json_there_and_back() -> None:
    assert KVPolicy.from_json(POLICY.to_json()) == POLICY
    assert hash(KVPolicy.from_json(POLICY.to_json())) == hash(POLICY)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"bits_per_value": "many"}', '{"colour": 3}', '{"rules": [{"match": "a"}]}', "3"]
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(PolicyError):
        KVPolicy.from_json(text)


@pytest.mark.parametrize(
    "values",
    [
        {"bits_per_value": 0}, {"bits_per_value": 9}, {"bits_per_value": float("nan")}, {"window": -1}, {"window": 1.5},
        {"sinks": True}, {"codebook_dim": 0}, {"codebook_size": 1}, {"codebook_size": 2**17}, {"stages": 0},
        {"beam": 0}, {"chunk": 0}, {"keys": "beside"}, {"decay": 1.0},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=next(iter(values))):
        KVPolicy(**values)


@pytest.mark.parametrize("values", [{}, {"skip": "why", "bits_per_value": 2}, {"bits_per_value": 0}])
def test_a_rule_says_one_thing(values: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        KVRule("*", **values)


@pytest.mark.parametrize(("name", "bits"), [("2bit", 2.0), ("3bit", 3.0), ("4bit", 4.0)])
def test_presets_have_the_bits_of_their_names(name: str, bits: float) -> None:
    assert KVPolicy.preset(name) == KVPolicy(bits_per_value=bits)


def test_a_preset_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(PolicyError, match="preset is one of 2bit, 3bit, 4bit, got 'q4_0'"):
        KVPolicy.preset("q4_0")


@pytest.mark.parametrize("values", [0, "0", [0, 1.0], [True], (1, 1)])
def test_layers_to_skip_are_whole_numbers_each_once(values: Any) -> None:
    with pytest.raises(PolicyError, match="skip_layers"):
        KVPolicy(skip_layers=values)


def test_layers_to_skip_are_counted_from_either_end() -> None:
    ids = tokens(0, 2, 40)

    def held(*layers: int) -> list[str]:
        policy = KVPolicy(codebook_dim=4, codebook_size=8, skip_layers=layers)
        return list(attentions(quantize_kv(LM(layers=2), policy, calibration=[ids], progress=False)))

    both = held()
    assert len(both) == 2 and held(0) == held(-2) == both[1:] and held(1) == held(-1) == both[:1]
    with pytest.raises(PolicyError, match="skip_layers has 2, and the model has 2 attention modules, from 0"):
        held(2)
    with pytest.raises(PolicyError, match="rules and skip_layers skip every attention module"):
        held(0, 1)
