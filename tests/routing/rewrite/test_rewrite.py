"""Claims on models whose blocks were made routed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, export

from rpqfx import Policy, RoutePolicy, RouteRule, materialize, route, rpqify
from rpqfx.errors import InputError, PolicyError, RewriteError
from rpqfx.routing.rewrite import routed
from rpqfx.routing.rewrite.attention import AttentionRoute
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

ALL = RoutePolicy(feed_forward=1.0, attention=1.0)
SOME = RoutePolicy(feed_forward=5, attention=6)
PAST = RoutePolicy(feed_forward=2, attention=3, window=6)
CODES = Policy(codebook_dim=4, codebook_bits=4, min_size=0)
MODELS: dict[str, Callable[[], nn.Module]] = {
    **FEED_FORWARD,
    "layer": Layer,
    "gated layer": lambda: Layer(block=Gated),
    "torch": encoder,
    "torch, time first": lambda: encoder(batch_first=False),
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("number", [1.0, LENGTH, 10 * LENGTH])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_with_all_tokens_it_is_the_model(name: str, train: bool, number: float) -> None:
    model, x = MODELS[name]().train(train), x_of(1)
    x = x.transpose(0, 1) if name == "torch, time first" else x
    small = route(model, RoutePolicy(feed_forward=number, attention=number))
    with torch.enable_grad():  # so that torch's fused layers, which round otherwise, are not taken on either side
        assert torch.equal(small(x), model(x))
    assert routed(small) and not routed(model)


@given(seeds, st.integers(1, LENGTH - 1), st.sampled_from(list(FEED_FORWARD)))
@settings(max_examples=20)
def test_feed_forward_is_light_for_all_and_heavy_for_the_chosen(seed: int, number: int, name: str) -> None:
    torch.manual_seed(seed)
    dense, x = FEED_FORWARD[name](), x_of(seed)
    small = jolted(route(dense, RoutePolicy(feed_forward=number, router={"straight_through": False})), seed)
    (found,) = routed(small).values()
    assert isinstance(found, FeedForwardRoute) and found.light is not None
    heavy = {n: p for n, p in small.state_dict().items() if ".routed." not in n}
    dense.load_state_dict(heavy)
    base, norm = x, (lambda out: out)
    if name == "sequence":
        base = dense[0](x)
    if name == "spread":
        norm = lambda out: dense.outer.norm(out + x)  # noqa: E731
        made = dense.outer.dense(dense.inner(x))
    else:
        made = dense(x)
    choice = found.chooser(base)
    scores = torch.zeros(x.shape[:2]).scatter(1, choice.indices[:, 0], choice.scores[:, 0])
    assert int((scores > 0).sum()) == 2 * number
    torch.testing.assert_close(small(x), norm(found.light(base) + scores[..., None] * made), rtol=1e-4, atol=1e-5)


@given(seeds, st.integers(1, LENGTH - 1), st.booleans())
@settings(max_examples=20)
def test_attention_is_that_of_the_chosen_to_each_other(seed: int, number: int, masked: bool) -> None:
    torch.manual_seed(seed)
    small, x = jolted(route(Attention(), RoutePolicy(attention=number)), seed), x_of(seed)
    (found,) = routed(small).values()
    assert isinstance(found, AttentionRoute) and found.light is not None
    kept = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 6 if masked else LENGTH]])
    mask = kept[:, None, None] if masked else None
    out = small(x, mask)
    plain = Attention()
    plain.load_state_dict({n: p for n, p in small.state_dict().items() if "routed." not in n})
    choice = found.chooser(x, kept if masked else None)
    wanted = found.light(x, kept if masked else None)
    for i in range(2):
        chosen = choice.indices[i, 0]
        chosen = chosen if choice.mask is None else chosen[choice.mask[i, 0]]
        wanted[i, chosen] += plain(x[i : i + 1, chosen])[0]
    torch.testing.assert_close(out[kept], wanted[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "torch"])
@given(seed=seeds, at=st.integers(1, LENGTH - 1))
@settings(max_examples=10)
def test_with_a_window_nothing_depends_on_the_future(name: str, seed: int, at: int) -> None:
    torch.manual_seed(seed)
    model = Layer(causal=True) if name == "causal" else encoder().train()
    small = jolted(route(model, PAST), seed)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    run = small if name == "causal" else lambda x: small(x, mask=mask)
    x = x_of(seed)
    other = torch.cat([x[:, :at], x_of(seed + 1)[:, at:]], 1)
    ours, theirs = run(x), run(other)
    torch.testing.assert_close(ours[:, :at], theirs[:, :at], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[:, at:], theirs[:, at:], atol=1e-4)


def test_a_causal_model_needs_a_window() -> None:
    with pytest.raises(PolicyError, match=r"attention is causal.*window=64"):
        route(Layer(causal=True))
    ahead = RoutePolicy(feed_forward=4, attention=4, look_ahead=True)
    assert route(Layer(causal=True), ahead)(x_of(0)).shape == (2, LENGTH, WIDTH)
    with pytest.raises(PolicyError, match="causal"):
        route(Layer(causal=True), RoutePolicy(attention=None))
    small = route(encoder().train(), SOME)
    with pytest.raises(InputError, match=r"is causal.*window"):
        small(x_of(0), mask=nn.Transformer.generate_square_subsequent_mask(LENGTH), is_causal=True)


@pytest.mark.parametrize("policy", [SOME, PAST, RoutePolicy(0.3, 0.3)], ids=["number", "window", "share"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_changes_nothing_elsewhere(policy: RoutePolicy, batch_first: bool) -> None:
    small = jolted(route(encoder(batch_first).train(), policy))
    x, hidden = x_of(0), torch.arange(LENGTH) >= torch.tensor([[LENGTH], [15]])
    other = torch.where(hidden[..., None], x_of(9), x)

    def run(x: Tensor) -> Tensor:
        out = small(x if batch_first else x.transpose(0, 1), src_key_padding_mask=hidden)
        return out if batch_first else out.transpose(0, 1)

    ours, theirs = run(x), run(other)
    torch.testing.assert_close(ours[~hidden], theirs[~hidden], rtol=1e-4, atol=1e-5)
    assert not bool(ours.isnan().any())
    ours.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in small.parameters())


def test_all_parameters_learn_and_the_model_is_left_alone() -> None:
    model = Layer(block=Gated)
    before = copy.deepcopy(model.state_dict())
    small = route(model, SOME)
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        (small(x_of(step)) ** 2).mean().backward()
        optimizer.step()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in small.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(before) < set(small.state_dict())


def test_both_ways_with_codebooks() -> None:
    x = x_of(0)
    for small in (rpqify(route(Layer(block=Gated), SOME), CODES), route(rpqify(Layer(block=Gated), CODES), SOME)):
        assert len(routed(small)) == 2 and type(small.block.up).__name__ == "RPQLinear"
        (small(x) ** 2).sum().backward()
        assert all(p.grad is not None for p in small.parameters())
        torch.testing.assert_close(materialize(small)(x), small(x), rtol=1e-4, atol=1e-4)
    held = rpqify(Layer(block=Gated), CODES)
    assert torch.equal(route(held, ALL)(x), held(x))
    again = rpqify(route(Layer(block=Gated), ALL), CODES)  # the light branches' zeros stay zeros
    assert torch.equal(again.block.down.routed.light(x), torch.zeros_like(x))


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("sequence", PAST),
        ("spread", SOME),
        # The same two policies on larger graphs, which take long to compile.
        pytest.param("gated layer", PAST, marks=pytest.mark.slow),
        pytest.param("torch", SOME, marks=pytest.mark.slow),
    ],
)
def test_compiled_and_exported(name: str, policy: RoutePolicy) -> None:
    small, x = jolted(route(MODELS[name]().train(), policy)), x_of(0)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), small(x))
    exported = export(small, (x,), dynamic_shapes=({0: Dim("batch")},), strict=False).module()
    torch.testing.assert_close(exported(x_of(1, 3)), small(x_of(1, 3)), rtol=1e-4, atol=1e-5)


def test_autocast() -> None:
    small, x = route(Layer(block=Gated), SOME), x_of(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = small(x)
    torch.testing.assert_close(out.float(), small(x), rtol=0.1, atol=0.1)


def test_copies_pickles_and_states() -> None:
    small, x = jolted(route(Layer(), SOME)), x_of(0)
    wanted = small(x)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(x), wanted)
        next(iter(routed(twin).values())).chooser.number = LENGTH
        assert not torch.equal(twin(x), wanted) and torch.equal(small(x), wanted)
    fresh = route(Layer(), SOME, seed=7)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), wanted)


def test_seeds_and_random_state() -> None:
    model = Layer()
    torch.manual_seed(5)
    first = route(model, SOME)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(6)
    assert torch.equal(route(model, SOME)(x_of(0)), first(x_of(0)))


def test_rules_and_kinds() -> None:
    policy = RoutePolicy(rules=(RouteRule("*.0*", skip="first"), RouteRule("layers.1", tokens=3)))
    found = routed(route(encoder(), policy))
    assert set(found) == {"layers.1", "layers.1.self_attn"} and found["layers.1"].chooser.number == 3
    assert set(routed(route(encoder(), RoutePolicy(attention=None)))) == {"layers.0", "layers.1"}
    bare = routed(route(Layer(), RoutePolicy(light=0)))
    assert all(each.light is None for each in bare.values())
    assert route(Layer(), RoutePolicy(light=0))(x_of(0)).shape == (2, LENGTH, WIDTH)


def test_inputs_of_other_shapes() -> None:
    small = jolted(route(Plain(), RoutePolicy(feed_forward=4)))
    image = x_of(0, 2, 12).reshape(2, 3, 4, WIDTH)
    assert torch.equal(small(image).flatten(1, 2), small(image.flatten(1, 2)))
    every = routed(small)["down"] if "down" in routed(small) else next(iter(routed(small).values()))
    rows = x_of(0)[0]
    plain = Plain()
    plain.load_state_dict({n: p for n, p in small.state_dict().items() if ".routed." not in n})
    torch.testing.assert_close(small(rows), plain(rows) + every.light(rows))  # samples of one token: all are chosen


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (InputError, "torch.nn.Module", lambda: route(3)),  # type: ignore[arg-type]
        (RewriteError, "nothing to route", lambda: route(nn.Linear(3, 3))),
        (RewriteError, "already", lambda: route(route(Plain()))),
        (PolicyError, "matches no block", lambda: route(Plain(), RoutePolicy(rules=(RouteRule("x", skip="y"),)))),
        (RewriteError, "no block is routed", lambda: route(Plain(), RoutePolicy(feed_forward=None))),
        (InputError, "axis of 'positions'", lambda: route(Placed(), SOME)(x_of(0), torch.zeros(3, LENGTH))),
        (InputError, r"\[B, n, d\]", lambda: route(Attention(), SOME)(x_of(0)[None])),
        (InputError, "need_weights", lambda: route(nn.MultiheadAttention(WIDTH, 2, batch_first=True))(*[x_of(0)] * 3)),
    ],
)
def test_bad_input_is_named(error: type[Exception], match: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=match):
        call()


class Placed(nn.Module):
    """Attention that is told something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.out(x), x, x)


def test_a_refused_policy_leaves_the_model_alone() -> None:
    model = Layer(causal=True)
    with pytest.raises(PolicyError):
        route(model, inplace=True)
    assert not routed(model) and not model.block.down._forward_hooks


def test_attention_to_others_is_not_routed() -> None:
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    small, x, y = route(attention, SOME), x_of(0), x_of(1)
    assert torch.equal(small(x, y, y)[0], attention(x, y, y)[0])


class Told(Plain):
    """Is told which tokens are padding, and makes nothing of it."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


@pytest.mark.parametrize("by_name", [False, True])
def test_the_models_own_mask_reaches_the_router(by_name: bool) -> None:
    small, mask = jolted(route(Told(), RoutePolicy(feed_forward=4))), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 10:] = 0
    x, loud = x_of(0), x_of(0)
    (found,) = routed(small).values()
    loud[1, 10:] = 100 * found.chooser.router.routing_token.detach()[0]  # would be chosen
    run = (lambda x: small(x, attention_mask=mask)) if by_name else (lambda x: small(x, mask))
    torch.testing.assert_close(run(loud)[1, :10], run(x)[1, :10])
    assert not torch.allclose(small(loud)[1, :10], small(x)[1, :10])


def test_a_name_that_is_taken_is_refused_before_anything_is_done() -> None:
    model = Layer()
    model.block.down.routed = nn.Identity()
    with pytest.raises(RewriteError, match="already has an attribute 'routed'"):
        route(model, inplace=True)
    assert not model.block.up._forward_pre_hooks and not routed(model)
