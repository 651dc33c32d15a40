"""Bits a weight: never more than asked, spent where errors cost most, and refused where too few."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rpqfx import KeepDense, Policy, Quantize, Rate, Rule, Site
from rpqfx.codebook.packing import packed_bytes
from rpqfx.errors import PolicyError
from rpqfx.fit.refitting import left_over
from rpqfx.fit.residual import improve, train
from rpqfx.graph.validate import groups_of
from rpqfx.ops.search import beam_search
from rpqfx.policies import fast_shapes
from rpqfx.policies.bit_allocation import spread


def linear(name: str, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Site:
    return Site(name, (name,), "linear", nn.Linear, (rows, cols), dtype, splits=True)


def conv(name: str, rows: int, channels: int, taps: int) -> Site:
    return Site(name, (name,), "conv", nn.Conv2d, (rows, channels, taps, taps), torch.float32)


def table(name: str, rows: int, cols: int) -> Site:
    return Site(name, (name,), "embedding", nn.Embedding, (rows, cols), torch.float32, splits=True)


@st.composite
def models(draw: st.DrawFn) -> list[Site]:
    sizes = st.sampled_from([24, 32, 64, 96, 100, 256, 576, 1536])
    sites = []
    for number in range(draw(st.integers(1, 6))):
        rows, cols = draw(sizes), draw(sizes)
        if draw(st.booleans()):
            sites.append(linear(f"w{number}", rows, cols, draw(st.sampled_from([torch.float32, torch.bfloat16]))))
        else:
            sites.append(conv(f"w{number}", rows, draw(st.sampled_from([3, 16, 64])), draw(st.sampled_from([1, 3]))))
    return sites


def stored(holds: Mapping[str, Quantize]) -> float:
    """Bits of codes in whole bytes, of factors, and of codebooks, shared ones once."""
    bits = 0.0
    for names in groups_of(holds).values():
        spec = holds[names[0]].spec
        bits += spec.stages * spec.codebooks_shape[1] * spec.entries * spec.codebook_dim * 16
        for name in names:
            spec = holds[name].spec
            factors = spec.num_column_scales + (spec.num_vectors if spec.scale else 0)
            bits += 8 * packed_bytes(spec.num_vectors * spec.num_subvectors * spec.stages, spec.entries) + 16 * factors
    return bits


def weights(sites: Sequence[Site]) -> int:
    return sum(site.numel for site in sites)


@pytest.mark.few(15)
@given(models(), st.floats(1, 8), st.booleans(), st.integers(0, 99))
def test_no_more_bits_are_spent_than_asked(sites: list[Site], bits: float, weighed: bool, seed: int) -> None:
    numbers = torch.randn(len(sites), generator=torch.Generator().manual_seed(seed)).mul(3).exp().tolist()
    importance = dict(zip([site.name for site in sites], numbers, strict=True)) if weighed else None
    try:
        holds = spread(sites, bits, importance)
    except PolicyError as error:
        assert "cannot be had" in str(error)
        return
    assert set(holds) == {site.name for site in sites}
    assert stored(holds) <= bits * weights(sites)
    for site in sites:
        spec = holds[site.name].spec
        assert (spec.num_vectors, spec.dim) == (site.layout("row").num_vectors, site.layout("row").dim)
        assert spec.column_scale_group % site.taps == 0
    for names in groups_of(holds).values():
        assert len({site.dtype for site in sites if site.name in names}) == 1


@pytest.mark.parametrize("bits", [1.05, 2.1, 3.0, 4.0])
def test_most_of_the_bits_are_spent(bits: float) -> None:
    sites = [linear(f"w{i}", 576, 576) for i in range(12)]
    assert stored(spread(sites, bits)) > 0.93 * bits * weights(sites)


def rate(hold: Quantize) -> float:
    """Bits of codes for each number."""
    return hold.spec.stages * hold.spec.codebook_bits / hold.spec.codebook_dim


def expected(sites: Sequence[Site], holds: Mapping[str, Quantize]) -> float:
    return sum(site.numel * 4.0 ** -rate(holds[site.name]) for site in sites)


def test_more_bits_are_never_much_worse() -> None:
    sites = [linear(f"w{i}", 256, 64 * (i + 1)) for i in range(6)]
    costs = [expected(sites, spread(sites, bits)) for bits in (1, 1.5, 2, 2.5, 3, 4, 5, 6)]
    assert all(after < before for before, after in itertools.pairwise(costs))


@settings(max_examples=30)  # each decides six weights
@given(st.integers(0, 99))
def test_of_like_weights_the_important_ones_get_at_least_as_many_bits(seed: int) -> None:
    sites = [linear(f"w{i}", 256, 256) for i in range(6)]
    numbers = torch.randn(6, generator=torch.Generator().manual_seed(seed)).mul(2).exp().tolist()
    holds = spread(sites, 2.5, {site.name: number for site, number in zip(sites, numbers, strict=True)})
    order = sorted(range(6), key=numbers.__getitem__)
    rates = [rate(holds[f"w{i}"]) for i in order]
    # What the last bits are spent on may be one that the others do not fit into any more.
    assert rates[0] <= rates[-1] and sum(a > b for a, b in itertools.pairwise(rates)) <= 1


def test_too_few_bits_are_refused_with_the_least_that_can_be_had() -> None:
    sites = [linear("a", 256, 256), linear("b", 256, 64)]
    with pytest.raises(PolicyError, match=r"0\.01 bits a weight cannot be had for these 81,920 weights") as caught:
        spread(sites, 0.01)
    least = float(re.search(r"at least ([\d.]+) can", str(caught.value))[1])  # type: ignore[index]
    assert stored(spread(sites, least + 0.01)) <= (least + 0.01) * weights(sites)


def test_nothing_to_decide_is_no_obstacle() -> None:
    assert spread([], 3.0) == {}


def test_policies_count_weights_and_tables_apart() -> None:
    sites = [table("emb", 4096, 64), linear("head", 4096, 64), linear("fc", 256, 64), linear("tiny", 8, 8)]
    plain = Policy.pretrained(bits_per_weight=3, embedding_bits=None).decide(sites)
    assert "budget of their own, embedding_bits" in plain["emb"].reason == plain["head"].reason  # type: ignore[union-attr]
    assert plain["tiny"] == KeepDense("64 elements, fewer than min_size 1024")
    both = Policy.pretrained(bits_per_weight=3, embedding_bits=5).decide(sites)
    assert stored({"fc": both["fc"]}) <= 3 * sites[2].numel  # type: ignore[dict-item]
    assert stored({name: both[name] for name in ("emb", "head")}) <= 5 * 2 * sites[0].numel  # type: ignore[misc]
    groups = {hold.group for hold in both.values() if isinstance(hold, Quantize) and hold.group}
    assert len(groups) <= 2


def test_a_rule_with_a_shape_is_followed_and_other_rules_are_too() -> None:
    sites = [table("emb", 4096, 64), linear("a", 256, 64), linear("b", 256, 64), linear("c", 256, 64)]
    rules = (
        Rule("emb", codebook_bits=4, codebook_dim=8),
        Rule("a", codebook_bits=5, codebook_dim=4),
        Rule("b", skip="mine"),
    )
    found = Policy.pretrained(bits_per_weight=2, rules=rules).decide(sites)
    assert [found[name].spec.entries for name in ("emb", "a")] == [16, 32]  # type: ignore[union-attr]
    assert found["b"] == KeepDense("mine")
    assert stored({"c": found["c"]}) <= 2 * sites[3].numel  # type: ignore[dict-item]


@given(st.floats(0.5, 16), st.none() | st.floats(0.5, 16))
def test_the_policy_is_json_both_ways(bits: float, tables: float | None) -> None:
    policy = Policy.pretrained(bits_per_weight=bits, embedding_bits=tables, rules=(Rule("a.*", skip="mine"),))
    assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits_per_weight": 0}, "bits_per_weight is a number of bits, above 0 and at most 16, got 0"),
        ({"bits_per_weight": 17}, "bits_per_weight is a number of bits"),
        ({"bits_per_weight": 3, "embedding_bits": -1}, "embedding_bits is a number of bits"),
        ({"bits_per_weight": float("nan")}, "bits_per_weight is a number of bits"),
        ({"bits_per_weight": None}, "bits_per_weight is a number of bits"),
        ({"embedding_bits": 4}, r"a Rate is made of .* missing a required argument: 'bits_per_weight'"),
        ({"bits_per_weight": 3, "ratio": 0.5}, "a Rate has no option 'ratio'; it has bits_per_weight, embedding_bits"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Rate(**options)


def test_linear_maps_and_tables_get_stages_in_tiles_and_filters_one_codebook() -> None:
    sites = [linear("a", 512, 256), table("emb", 4096, 64), conv("c", 256, 64, 3), linear("odd", 512, 101)]
    holds = spread(sites, 3.5)
    assert holds["a"].spec.tiled and holds["emb"].spec.tiled and holds["a"].spec.scale
    assert not holds["c"].spec.tiled and not holds["odd"].spec.tiled  # no sub-vector of four numbers or more divides it


def test_the_errors_of_shapes_are_what_a_gaussian_gives() -> None:
    """The table that rates are chosen by, at two of its places (the rest: examples/bench/shapes.py)."""
    g = torch.Generator().manual_seed(0)
    for shape in ((8, 4), (4, 2)):
        books = improve(torch.randn(2**13, shape[0], generator=g), train_books(shape, g), steps=5)
        points = torch.randn(4000, shape[0], generator=g)
        left = left_over(points, beam_search(points, books, 32)[0], books).square().mean()
        assert left == pytest.approx(fast_shapes.LEFT[shape], rel=0.05)


def train_books(shape: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    return train(torch.randn(2**13, shape[0], generator=g), shape[1], fast_shapes.ENTRIES, steps=5)[0]
