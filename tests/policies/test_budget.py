"""A budget is met, counted in real tensors, and spent where it helps most."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rpqfx
from rpqfx import Budget, KeepDense, Policy, Quantize, Rule
from rpqfx.errors import PolicyError
from rpqfx.graph import capture, find_sites
from rpqfx.policies.budget import Candidate, choose
from rpqfx.reporting.report import dense_bytes
from tests.models import GPT, MLP


def candidates(dense: int, *others: tuple[int, int]) -> list[Candidate[int]]:
    return [Candidate(0, dense, 0.0), *(Candidate(i, size, float(d)) for i, (size, d) in enumerate(others, 1))]


groups = st.dictionaries(
    st.sampled_from("abcd"),
    st.builds(
        candidates,
        st.integers(50, 100),
        st.tuples(st.integers(1, 49), st.integers(1, 50)),
        st.tuples(st.integers(1, 49), st.integers(1, 50)),
        st.tuples(st.integers(1, 49), st.integers(1, 50)),
    ),
    min_size=1,
)


def totals(group: dict[str, list[Candidate[int]]], chosen: dict[str, int]) -> tuple[int, float]:
    picked = [group[name][index] for name, index in chosen.items()]
    return sum(c.size for c in picked), sum(c.distortion for c in picked)


@given(groups, st.integers(0, 500), st.integers(0, 30))
def test_any_limit_is_met_or_refused_with_the_least_that_can_be_had(group, limit, other):
    least = other + sum(min(c.size for c in candidates) for candidates in group.values())
    if limit < least:
        with pytest.raises(PolicyError, match=rf"cannot be reached; closest: {least:,} bytes"):
            choose(group, limit, 400, other)
        limit = least
    chosen = choose(group, limit, 400, other)
    assert chosen.keys() == group.keys()
    assert other + totals(group, chosen)[0] <= limit


@given(groups, st.integers(0, 400))
def test_nothing_that_still_fits_would_have_been_better(group, extra):
    """No single site can be changed for the better within the limit."""
    limit = sum(min(c.size for c in candidates) for candidates in group.values()) + extra
    chosen = choose(group, limit, 400, 0)
    size, _ = totals(group, chosen)
    for name, options in group.items():
        now = options[chosen[name]]
        assert not any(c.distortion < now.distortion and size - now.size + c.size <= limit for c in options)


@given(groups, st.integers(0, 400))
def test_the_choice_is_near_the_best_there_is(group, extra):
    """Within the largest step of one site of the exhaustive optimum, as the convex hull promises."""
    limit = sum(min(c.size for c in candidates) for candidates in group.values()) + extra
    _, found = totals(group, choose(group, limit, 400, 0))
    every = itertools.product(*(range(len(options)) for options in group.values()))
    fitting = [totals(group, dict(zip(group, picks, strict=True))) for picks in every]
    best = min(distortion for size, distortion in fitting if size <= limit)
    step = max(c.distortion for options in group.values() for c in options)
    assert best <= found <= best + step


# ---------------------------------------------------------------------------------------------- through a policy


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(vocab=200, width=32, depth=2)


@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.3, 0.25])
def test_a_ratio_is_met_by_the_bytes_of_real_tensors(ratio: float):
    model = gpt()
    small = rpqfx.rpqify(model, Policy.budget(ratio=ratio, min_size=256))
    made = rpqfx.report(small)
    assert made.before == dense_bytes(model)
    assert made.after == dense_bytes(small) <= ratio * made.before
    assert made.after > 0.85 * ratio * made.before  # and spent


def test_bytes_are_met_too():
    small = rpqfx.rpqify(gpt(), Policy.budget(bytes=40_000, min_size=256))
    assert 34_000 < rpqfx.report(small).after <= 40_000


def test_an_unreachable_total_names_the_closest_which_can_be_had():
    model = gpt()
    with pytest.raises(PolicyError, match=r"a total of 1,000 bytes .* cannot be reached; closest: ") as caught:
        rpqfx.rpqify(model, Policy.budget(bytes=1000, min_size=256))
    closest = int(re.search(r"closest: ([\d,]+) bytes", str(caught.value)).group(1).replace(",", ""))
    assert rpqfx.report(rpqfx.rpqify(model, Policy.budget(bytes=closest, min_size=256))).after == closest
    with pytest.raises(PolicyError, match="cannot be reached"):
        rpqfx.rpqify(model, Policy.budget(bytes=closest - 1, min_size=256))


def test_ties_and_what_is_left_dense_are_counted():
    model = gpt()
    policy = Policy.budget(ratio=0.5, min_size=256, rules=(Rule("blocks.0.*", skip="kept"),))
    made = rpqfx.report(rpqfx.rpqify(model, policy))
    assert made.after <= 0.5 * dense_bytes(model)
    assert sum(record.reason == "kept" for record in made.skipped) == 4


def test_rules_that_fix_a_shape_are_kept():
    rules = (
        Rule("tok", codebook_bits=4, codebook_dim=8),
        Rule("blocks.1.fc1", num_subvectors=4),
        Rule("blocks.1.fc2", scale=True),
    )
    small = rpqfx.rpqify(gpt(), Policy.budget(ratio=0.5, min_size=256, codebook_bits=3, rules=rules))
    made = {record.name: record for record in rpqfx.report(small).sites}
    assert (made["tok.weight"].spec.entries, made["tok.weight"].spec.codebook_dim) == (16, 8)
    assert made["blocks.1.fc1.weight"].spec.num_subvectors == 4
    assert made["blocks.1.fc2.weight"].spec is None or made["blocks.1.fc2.weight"].spec.scale
    assert rpqfx.report(small).after <= 0.5 * rpqfx.report(small).before


def test_a_larger_ratio_never_fits_worse():
    sites = find_sites(capture(gpt()))
    policies = [Policy.budget(ratio=r, min_size=256) for r in (0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
    rates = []
    for policy in policies:
        held = [d for d in policy.decide(sites).values() if isinstance(d, Quantize)]
        rates.append(
            sum(d.spec.num_vectors * d.spec.dim * 4.0 ** -(d.spec.codebook_bits / d.spec.codebook_dim) for d in held)
        )
    assert rates == sorted(rates, reverse=True) and rates[-1] < rates[0]


def test_a_budget_that_affords_everything_dense_rewrites_nothing():
    with pytest.raises(PolicyError, match="the budget affords it dense"):
        rpqfx.rpqify(gpt(), Policy.budget(ratio=1.0, min_size=256))


def test_a_budget_is_one_of_two_numbers():
    for wrong in ({}, {"ratio": 0.5, "bytes": 10}):
        with pytest.raises(PolicyError, match="a budget needs either ratio or bytes"):
            Policy.budget(**wrong)
    for ratio in (0, -1, 1.5):
        with pytest.raises(PolicyError, match="ratio is the size after over the size before"):
            Policy.budget(ratio=ratio)
    with pytest.raises(PolicyError, match="bytes is a whole number of bytes from 1"):
        Policy.budget(bytes=0)
    assert Policy.budget(ratio=0.5) == Policy(amount=Budget(ratio=0.5))
    for wrong in (0.5, {"ratio": 0.5}, None, Budget):
        with pytest.raises(PolicyError, match=r"amount is Fixed\(\), Budget\(ratio=\.\.\.\) or Rate\(.*, got"):
            Policy(amount=wrong)


def test_a_budget_for_a_model_of_another_dtype_counts_that_dtype():
    model = gpt().bfloat16()
    made = rpqfx.report(rpqfx.rpqify(model, Policy.budget(ratio=0.5, min_size=256)))
    assert made.before == dense_bytes(model) and made.after <= 0.5 * made.before


def test_what_the_policy_leaves_alone_stays_whatever_the_budget():
    decisions = Policy.budget(bytes=10**9).decide(find_sites(capture(MLP())))
    assert all(isinstance(d, KeepDense) and "fewer than min_size" in d.reason for d in decisions.values())
