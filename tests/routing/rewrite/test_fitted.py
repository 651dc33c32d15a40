"""Claims on light branches and routers that are fitted to calibration inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy, RoutePolicy, RouteRule, route, rpqify
from rpqfx.errors import InputError, PolicyError, RewriteError
from rpqfx.fit.reduced_rank import PairSums, reduced_rank
from rpqfx.routing.rewrite import routed
from rpqfx.routing.rewrite.feedforward import FeedForwardRoute
from tests.helpers import seeds
from tests.routing.rewrite.models import (
    FEED_FORWARD,
    LENGTH,
    WIDTH,
    Attention,
    Gated,
    Layer,
    Plain,
    encoder,
    jolted,
    x_of,
)

FIT = RoutePolicy(feed_forward=5, attention=6, light=1.0, light_init="fit")
ALL = RoutePolicy(feed_forward=1.0, attention=1.0, light_init="fit")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batches(count: int = 4) -> list[Tensor]:
    return [x_of(seed) for seed in range(count)]


def only(model: nn.Module) -> FeedForwardRoute:
    found = [each for each in routed(model).values() if isinstance(each, FeedForwardRoute)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("name", [*FEED_FORWARD, "torch", "torch, time first"])
def test_with_all_tokens_it_is_the_model_however_light_branches_are(name: str) -> None:
    made: Any = {**FEED_FORWARD, "torch": encoder, "torch, time first": lambda: encoder(batch_first=False)}[name]
    model, x = made(), x_of(9)
    x = x.transpose(0, 1) if "time" in name else x
    small = route(model, ALL, calibration=batches())
    for each in routed(small).values():
        if isinstance(each, FeedForwardRoute):
            jolted(each)
    with torch.enable_grad():
        assert torch.equal(small(x), model(x))


@given(seeds, st.integers(1, LENGTH - 1), st.booleans(), st.sampled_from([None, 6]))
@settings(max_examples=20)
def test_chosen_tokens_have_the_blocks_own_output_and_others_the_light_branchs(
    seed: int, number: int, padded: bool, window: int | None
) -> None:
    torch.manual_seed(seed)
    block, x = Plain(), x_of(seed)
    policy = RoutePolicy(feed_forward=number, light_init="fit", window=window)
    small = route(block, policy, calibration=batches(2))
    found = only(small)
    kept = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 6 if padded else LENGTH]])
    found.chooser.padding.mask = kept if padded else None
    choice = found.chooser(x)
    out, own, light = small(x), block(x), found.light(x)  # type: ignore[misc]
    chosen = torch.ones(2, LENGTH, dtype=torch.bool)
    if choice.indices is not None:
        chosen.zero_()
        taken = torch.ones_like(choice.indices, dtype=torch.bool) if choice.mask is None else choice.mask
        for i in range(2):
            chosen[i, choice.indices[i, 0][taken[i, 0]]] = True
    torch.testing.assert_close(out[chosen], own[chosen])
    assert torch.equal(out[~chosen], light[~chosen])


def test_scores_mix_the_two() -> None:
    policy = RoutePolicy(feed_forward=9, light_init="fit", router={"straight_through": False})
    block, x = Plain(), x_of(7)
    small = route(block, policy, calibration=batches())
    found = only(small)
    choice = found.chooser(x)
    scores = torch.zeros(2, LENGTH).scatter(1, choice.indices[:, 0], choice.scores[:, 0])[..., None]
    assert bool(((scores > 0) & (scores < 1)).any())
    torch.testing.assert_close(small(x), (1 - scores) * found.light(x) + scores * block(x))  # type: ignore[misc]


@given(seeds, st.sampled_from(list(FEED_FORWARD)), st.sampled_from([0.0625, 0.5, 1.0, 3.0]))
@settings(max_examples=20)
def test_the_light_branch_is_the_nearest_affine_map_of_half_its_width(seed: int, name: str, light: float) -> None:
    torch.manual_seed(seed)
    model, seen = FEED_FORWARD[name](), PairSums()
    inputs = [x_of(seed + i, 2, 40) for i in range(2)]
    small = route(model, RoutePolicy(feed_forward=3, light=light, light_init="fit"), calibration=inputs)
    found = only(small)
    for x in inputs:
        base = model[0](x) if name == "sequence" else x
        made = model.outer.dense(model.inner(x)) if name == "spread" else model(x)
        seen.add(base.flatten(0, 1), made.flatten(0, 1))
    nearest = reduced_rank(seen, int(WIDTH * light) // 2)
    probe = x_of(seed + 5)
    torch.testing.assert_close(found.light(probe), nearest(probe.double()).float(), rtol=1e-3, atol=1e-4)  # type: ignore[misc]


class Uneven(nn.Module):
    """Next to nothing but where the first feature is large."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        with torch.no_grad():
            self.up.weight[:, 0] = 3.0
            self.up.bias.fill_(-3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.relu(self.up(x)))


def test_routers_choose_the_tokens_on_which_the_light_branch_errs() -> None:
    model, x = Uneven(), x_of(20, 8, 60)
    small = route(model, RoutePolicy(feed_forward=30, light=2.0, light_init="fit"), calibration=[x_of(1, 8, 60)])
    found = only(small)
    error = (model(x) - found.light(x)).norm(dim=-1)  # type: ignore[misc]
    choice = found.chooser(x)
    chosen = error.gather(1, choice.indices[:, 0]).square().sum() / error.square().sum()
    assert chosen > 0.75  # half of the tokens
    spread = found.chooser.router.logits(x_of(1, 8, 60)).var()
    torch.testing.assert_close(spread, torch.tensor(1.0), rtol=0.01, atol=0.01)


class Told(Plain):
    """Is told which tokens are padding, and makes nothing of it."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def test_padding_is_not_fitted_to() -> None:
    model, x, mask = Told(), x_of(0), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 10:] = 0
    loud = torch.where(mask[..., None] > 0, x, 100.0)
    policy = RoutePolicy(feed_forward=4, light_init="fit")
    one, other = (
        route(model, policy, calibration=[{"x": each, "attention_mask": mask}]).state_dict() for each in (x, loud)
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    third = route(model, policy, calibration=[loud]).state_dict()
    assert any(not torch.equal(value, third[name]) for name, value in one.items())


def test_nothing_else_changes() -> None:
    model = Layer(block=Gated).train()
    before, numbers = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    small = route(model, FIT, calibration=batches())
    assert torch.equal(torch.random.get_rng_state(), numbers) and small.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(small.state_dict()[name], value) for name, value in before.items())
    assert not any(each.chooser.easing for each in routed(small).values())
    plain = route(model, RoutePolicy(feed_forward=5, attention=6, light=1.0))
    counts = [sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in each.modules()) for each in (small, plain)]
    assert counts[0] == counts[1]
    again = route(model, FIT, calibration=batches()).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in small.state_dict().items())


def test_both_ways_with_codebooks_and_files(tmp_path: Any) -> None:
    codes, x = Policy(codebook_dim=4, codebook_bits=4, min_size=0), x_of(0)
    for small in (
        rpqify(route(Layer(block=Gated), FIT, calibration=batches()), codes),
        route(rpqify(Layer(block=Gated), codes), FIT, calibration=batches()),
    ):
        rpqfx.save(small, tmp_path / "file.rpq")
        back = rpqfx.load(tmp_path / "file.rpq", build=lambda: route(Layer(block=Gated), FIT))
        assert torch.equal(back(x), small(x))
        (small(x) ** 2).sum().backward()
        assert all(p.grad is not None for p in small.parameters())


def test_a_folder_of_transformers_opens_without_calibration(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    policy, ids = RoutePolicy(2, None, window=6, light_init="fit"), torch.arange(40).view(2, 20)
    small = route(transformers.LlamaForCausalLM(config).eval(), policy, calibration=[ids])
    small.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(back(ids).logits, small(ids).logits)


def test_compiled() -> None:
    small, x = route(Plain(), FIT, calibration=batches()), x_of(0)
    torch.testing.assert_close(torch.compile(small, fullgraph=True, backend="aot_eager")(x), small(x))


def test_half_precision() -> None:
    small = route(Plain().bfloat16(), RoutePolicy(feed_forward=5, light_init="fit"), calibration=[x_of(0).bfloat16()])
    assert small(x_of(1).bfloat16()).dtype == torch.bfloat16


class Two(nn.Module):
    """Of two blocks only one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Plain(), Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x is not None else self.two(x)


NAN = torch.full((2, LENGTH, WIDTH), torch.inf)
ONE = RoutePolicy(feed_forward=3, light_init="fit")
ATTENTION = RoutePolicy(feed_forward=3, attention=4, light_init="fit")


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (InputError, "light_init='fit' fits", lambda: route(Plain(), ONE)),
        (InputError, "calibration would do nothing with light_init='zero'", lambda: route(Plain(), calibration=[NAN])),
        (InputError, "on the meta device", lambda: route(Plain().to("meta"), ONE, calibration=batches())),
        (InputError, "no calibration batch reaches two", lambda: route(Two(), ONE, calibration=batches())),
        (InputError, "rejects calibration batch 0", lambda: route(Plain(), ONE, calibration=[torch.zeros(1, 3)])),
        (InputError, "empty list", lambda: route(Plain(), ONE, calibration=[])),
        (InputError, "not finite", lambda: route(Plain(), ONE, calibration=[NAN])),
        (PolicyError, "light=0", lambda: RoutePolicy(light=0, light_init="fit")),
        (PolicyError, "feed_forward=None", lambda: RoutePolicy(feed_forward=None, light_init="fit")),
        (PolicyError, "no feed-forward block is routed", lambda: route(Attention(), ATTENTION, calibration=batches())),
        (PolicyError, "light_init is one of", lambda: RoutePolicy(light_init="fits")),  # type: ignore[arg-type]
        (
            RewriteError,
            "no block is routed",
            lambda: route(
                Plain(), RoutePolicy(light_init="fit", rules=(RouteRule("*", skip="no"),)), calibration=[NAN]
            ),
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()


def test_a_refused_calibration_leaves_the_model_alone() -> None:
    model = Two()
    with pytest.raises(InputError):
        route(model, ONE, calibration=batches(), inplace=True)
    assert not routed(model) and not model.one.down._forward_hooks and not model.one.up._forward_pre_hooks
