"""Whatever text a policy is read from, it is a policy that is written and read again the same, or a PolicyError."""

from __future__ import annotations

import copy
import json
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rpqfx import KVPolicy, KVRule, Policy, RoutePolicy, RouteRule, Rule
from rpqfx.errors import PolicyError
from tests.figures import record

POLICIES: tuple[Policy | KVPolicy | RoutePolicy, ...] = (
    Policy(
        codebook_bits=4,
        codebook_dim=8,
        kinds=("linear", "conv"),
        rules=(Rule("a", codebook_bits=2, scale=True), Rule(nn.Linear)),
    ),
    Policy.from_scratch(num_subvectors="heads", signs=True, sharing="role", rules=(Rule("*", skip="why"),)),
    Policy.budget(ratio=0.25, min_codebook_bits=3, rules=(Rule("a", min_size=0, plan="dequantize"),)),
    Policy.budget(bytes=10**6, codebook_bits=4),
    Policy.pretrained(3.5, embedding_bits=4, rules=(Rule("a", codebook_dim=4, stages=2, column_scale=True),)),
    KVPolicy(
        bits_per_value=3,
        window=7,
        rules=(KVRule("layers.0.*", skip="it is short"), KVRule("layers.*", bits_per_value=4)),
    ),
    KVPolicy(transform=False, strided=True, normalize=True, use_cosine_sim=True, decay=0.9),
    RoutePolicy(
        feed_forward=8, router={"eps": 0.2, "method_kwargs": {"n_iters": 3}}, rules=(RouteRule("l", tokens=2),)
    ),
    RoutePolicy(light_init="fit", attention=None),
    RoutePolicy(window=16, light=0.25, light_window=8, rules=(RouteRule("l", skip="why"),)),
)
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, 10**400, -(10**30), 2**63, 0.1, "", "x", "fit", "heads", "\x00",
    "a" * 3000, "\ud800", [], [1], [[]], {}, {"match": "*"}, {"match": 3}, [{"match": "x", "codebook_bits": 2}], [None],
    ["linear"],
)  # fmt: skip
BITS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "[" * 3000,
    '{"a":' * 2000,
    "9" * 5000,
    "null",
    "\\",
    '"',
    ",",
    "}",
    "]",
)


def mutated(seed: int) -> tuple[type, str]:
    """A policy's class, and its JSON with something else in it: another value somewhere, or other characters."""
    draw = random.Random(seed)
    policy = draw.choice(POLICIES)
    text = policy.to_json()
    if draw.random() < 0.6:
        values = json.loads(text)
        for _ in range(draw.randint(1, 3)):
            _replace(values, draw)
        text = json.dumps(values)
    for _ in range(draw.choice([0, 0, 1, 1, 4])):
        at = draw.randrange(len(text) + 1)
        piece = draw.choice([draw.choice(BITS), chr(draw.randrange(32, 127)), text[at : at + draw.randrange(40)], ""])
        text = text[:at] + piece + text[at + draw.randrange(6) :]
    return type(policy), text


def _replace(values: dict[str, Any], draw: random.Random) -> None:
    """Puts something odd in the place of one value, under one name, or one name in the place of another."""
    node: Any = values
    while isinstance(node, (dict, list)) and node:
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], (dict, list)) or not node[key] or draw.random() < 0.4:
            break
        node = node[key]
    other = copy.deepcopy(draw.choice(ODD))
    if isinstance(node, dict) and draw.random() < 0.4:
        node[
            draw.choice(
                [
                    "codebook_bits",
                    "rules",
                    "skip",
                    "match",
                    "codebook_dim",
                    "window",
                    "router",
                    "amount",
                    "ratio",
                    "stages",
                    "version",
                ]
            )
        ] = other
    elif node:
        node[key] = other


def check(seed: int) -> bool:
    """Whether the mutated text is a policy; raises where it is neither that nor refused."""
    kind, text = mutated(seed)
    read: Callable[[str], Any] = kind.from_json  # type: ignore[attr-defined]
    try:
        policy = read(text)
    except PolicyError as error:
        assert len(str(error)) < 2000
        return False
    again = read(policy.to_json())
    assert again == policy and again.to_json() == policy.to_json()
    return True


@settings(max_examples=1000)
@given(st.integers(0, 2**40))
def test_any_text_is_a_policy_or_refused(seed: int) -> None:
    check(seed)


@pytest.mark.slow
def test_very_many_texts_are_policies_or_refused() -> None:
    taken = sum(check(seed) for seed in range(100_000))
    assert 1000 < taken < 99_000  # some of each
    record(
        "reliability/mutations-policies",
        "pytest -m slow tests/contracts/test_policy_json.py",
        attack="mutations of the JSON of policies",
        tried=100_000,
        outcome=f"{100_000 - taken:,} refused, {taken:,} policies that are written and read the same",
        seeds="0 and on",
    )


@pytest.mark.parametrize("kind", [Policy, KVPolicy, RoutePolicy])
@pytest.mark.parametrize(
    "text",
    ["NaN", "[" * 100_000, "9" * 100_000, '{"codebook_bits": 1' + "0" * 400 + "}", '"' + "x" * 10**6 + '"', "\ufeff{}",
     "{} {}", '{"HEAD, "codebook_bits": NaN}', '{"HEAD, "codebook_bits": 2, "codebook_bits": 3}',
     '{"policy": "KIND", "version": true}',
     '{"policy": "KIND", "version": 1.0}', '{"policy": ["KIND"], "version": 1}', '{"HEAD, "rules": {"match": "x"}}',
     '{"HEAD, "rules": null}', '{"version": 1}', '{"policy": "KIND"}', "null"],
)  # fmt: skip
def test_what_python_takes_or_chokes_on_is_refused_at_once(kind: Any, text: str) -> None:
    text = text.replace('"HEAD', '"policy": "KIND", "version": 1').replace("KIND", kind.__name__)
    tracemalloc.start()
    try:
        with pytest.raises(PolicyError) as caught:
            kind.from_json(text)
        assert tracemalloc.get_traced_memory()[1] < 50e6 and len(str(caught.value)) < 500
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [Policy, KVPolicy, RoutePolicy])
@pytest.mark.parametrize("text", [None, 3, b"{}", {"codebook_bits": 3}, KVPolicy()])
def test_what_is_no_text_is_refused(kind: Any, text: Any) -> None:
    with pytest.raises(PolicyError, match=r"is read from the text of its JSON, got .*; read the file first"):
        kind.from_json(text)


@pytest.mark.parametrize("kind", [Policy, KVPolicy, RoutePolicy])
def test_only_what_differs_from_the_defaults_is_written(kind: Any) -> None:
    assert json.loads(kind().to_json()) == {"policy": kind.__name__, "version": 1}


@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
def test_each_policy_is_read_as_it_was_written(policy: Any) -> None:
    assert type(policy).from_json(policy.to_json()) == policy
