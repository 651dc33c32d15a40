"""Routed blocks: with k equal to the number of tokens they are both branches, in full; with fewer, what is not chosen
gets the light branch and its stand-in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from rpqfx.errors import InputError, SpecError
from rpqfx.routing import (
    RoutedAttention,
    RoutedAutoregressiveAttention,
    RoutedCrossAttention,
    RoutedFeedForward,
    RoutedImageAttention,
    RoutedTransformerBlock,
    RoutedViT,
)
from rpqfx.routing.heavy_attention import HeavyAttention, rotate
from rpqfx.routing.vit import positions
from tests.helpers import generator, randn

DIM = 16
LIGHT: dict[str, Any] = {"light_dim_head": 4, "light_heads": 2}
HEAVY: dict[str, Any] = {"heavy_dim_head": 4, "heavy_heads": 4}


class Crossed(RoutedCrossAttention):
    """With a context of its own making, so that it is called as the others are."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x[:, ::2], x, None if mask is None else mask[:, ::2], mask)


class Mapped(RoutedImageAttention):
    """With tokens as an image of 3 rows."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        fold: Callable[[Tensor], Tensor] = lambda t: rearrange(t, "b (h w) ... -> b h w ...", h=3)  # noqa: E731
        return super().forward(fold(x), None if mask is None else fold(mask)).flatten(1, 2)


# Each takes x [2, 48, 16] and a mask; the arguments are for k of all tokens.
KINDS: dict[str, Callable[..., nn.Module]] = {
    "feed forward": lambda k, **o: RoutedFeedForward(DIM, num_heavy_tokens=k, **o),
    "attention": lambda k, **o: RoutedAttention(
        DIM, num_heavy_tokens_q=k, num_heavy_tokens_kv=k, num_routed_kv=2, light_window_size=8, **LIGHT, **HEAVY, **o
    ),
    "rotary": lambda k, **o: RoutedAttention(
        DIM, num_heavy_tokens_q=k, num_heavy_tokens_kv=k, rotary=True, multiply_keys_by_score=True,
        multiply_queries_by_score=True, has_light_attn=False, **HEAVY, **o,
    ),
    "cross": lambda k, **o: Crossed(
        DIM, num_tokens_q=k, num_tokens_kv=k, kv_routing_tokens=2, dim_head=4, heads=4, query_source=True, **o
    ),
    "autoregressive": lambda k, **o: RoutedAutoregressiveAttention(
        DIM, num_heavy_tokens_q=max(1, k // 4), num_heavy_tokens_kv=max(1, k // 4), num_routed_kv=2,
        light_window_size=8, rotary=True, **LIGHT, **HEAVY, **o,
    ),
    "image": lambda k, **o: Mapped(
        DIM, num_heavy_tokens_q=k, num_heavy_tokens_kv=k, channel_first=False, light_window_size=4, **LIGHT, **HEAVY,
        **o,
    ),
    "block": lambda k, **o: RoutedTransformerBlock(
        DIM, num_heavy_attn_tokens_q=k, num_heavy_attn_tokens_kv=k, num_heavy_ff_tokens=k, light_window_size=8,
        **LIGHT, **HEAVY, **o,
    ),
}  # fmt: skip


def made(name: str, k: int, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[name](k, dtype=dtype, **options)


def x_and_mask() -> tuple[Tensor, Tensor]:
    mask = torch.rand(2, 48, generator=generator(1)) < 0.7
    mask[:, 0] = True
    return randn(0, 2, 48, DIM), mask


def plain_attention(heavy: HeavyAttention, x: Tensor, context: Tensor) -> Tensor:
    """Of all to all, written out: head by head."""
    x, context, out = heavy.norm(x), heavy.norm(context), []
    size, group = heavy.null_kv.shape[-1], heavy.heads // heavy.groups
    for head in range(heavy.heads):
        weight = rearrange(heavy.to_kv[head // group].weight, "(two h e) d -> two h e d", two=2, h=group)[
            :, head % group
        ]
        q = x @ heavy.to_q.weight[head * size : (head + 1) * size].mT
        k, v = context @ weight[0].mT, context @ weight[1].mT
        if heavy.rotary:
            q, k = rotate(q, torch.arange(q.shape[1])), rotate(k, torch.arange(k.shape[1]))
        null_k, null_v = (t.expand(len(x), 1, -1) for t in heavy.null_kv[:, head])
        k, v = torch.cat([null_k, k], 1), torch.cat([null_v, v], 1)
        out.append(torch.softmax(q @ k.mT / size**0.5, -1) @ v)
    return heavy.to_out(torch.cat(out, -1))


@pytest.mark.parametrize("name", ["attention", "rotary", "image", "cross"])
def test_attention_with_k_of_all_is_both_branches_in_full(name: str) -> None:
    x, layer = x_and_mask()[0], made(name, 48)
    heavy = plain_attention(layer.heavy.attention, x[:, ::2] if name == "cross" else x, x)
    light = getattr(layer, "light", None)
    if name == "image":
        heavy = heavy + light(rearrange(x, "b (h w) d -> b h w d", h=3)).flatten(1, 2)
    elif light is not None:
        heavy = heavy + light(x)
    torch.testing.assert_close(layer(x), heavy)


def test_each_group_of_heads_has_a_mask_of_its_own() -> None:
    torch.manual_seed(0)
    heavy = HeavyAttention(DIM, dim_head=4, heads=4, groups=2).double()
    x, context, ones = randn(0, 2, 5, DIM), randn(1, 2, 2, 6, DIM), torch.ones(2, 5).double()
    mask = torch.rand(2, 2, 6, generator=generator(0)) < 0.5
    other = torch.where(mask[..., None], context, randn(2, 2, 2, 6, DIM))
    made_of = [heavy(x, c, scores_q=ones, scores_kv=torch.ones(2, 2, 6), mask=mask) for c in (context, other)]
    torch.testing.assert_close(*made_of)


def test_feed_forward_and_block_with_k_of_all_are_both_branches_in_full() -> None:
    x, layer, block = x_and_mask()[0], made("feed forward", 48), made("block", 48)
    assert torch.equal(layer(x), layer.light(x) + layer.heavy(x))
    attended = x + block.attention.light(x) + plain_attention(block.attention.heavy.attention, x, x)
    wanted = attended + block.feed_forward.light(attended) + block.feed_forward.heavy(attended)
    torch.testing.assert_close(block(x), wanted)


def test_tokens_not_chosen_have_the_light_branch_and_the_stand_in() -> None:
    x, layer = x_and_mask()[0], made("attention", 6)
    rest = layer(x) - layer.light(x) - layer.heavy.stand_in
    chosen = layer.heavy.q_router(x, 6).indices[:, 0]
    changed = torch.zeros(2, 48, dtype=torch.bool).scatter(1, chosen, True)
    assert rest[~changed].abs().max() < 1e-12 and rest[changed].abs().amax(-1).min() > 1e-6
    layer = made("attention", 6, stand_in=False)
    assert (layer(x) - layer.light(x))[~changed].abs().max() < 1e-12


@pytest.mark.parametrize("name", KINDS)
def test_masked_tokens_change_nothing(name: str) -> None:
    """The others' results and gradients stay, whatever is in the masked ones."""
    x, mask = x_and_mask()
    y, seen = torch.where(mask[..., None], x, 10 * randn(5, 2, 48, DIM)), randn(6, 2, 48, DIM)
    for k in (6, 48):
        layer, results = made(name, k), []
        for given in (x, y):
            given = given.clone().requires_grad_()
            out = layer(given, mask)
            kept = mask[:, ::2] if name == "cross" else mask
            (grad,) = torch.autograd.grad((out[kept] * seen[:, : out.shape[1]][kept]).sum(), given)
            results.append((out[kept], grad[mask]))
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", KINDS)
def test_a_mask_of_all_is_no_mask(name: str) -> None:
    x, layer = x_and_mask()[0], made(name, 6)
    torch.testing.assert_close(layer(x), layer(x, torch.ones(2, 48, dtype=torch.bool)))


@pytest.mark.parametrize("name", KINDS)
def test_samples_masked_whole_are_finite(name: str) -> None:
    x, layer, mask = x_and_mask()[0], made(name, 6), torch.zeros(2, 48, dtype=torch.bool)
    out = layer(x, mask)
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_learns(name: str) -> None:
    x, layer = x_and_mask()[0], made(name, 6, router={"eps": 1.0})
    (layer(x) * randn(3, *layer(x).shape)).sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", [name for name in KINDS if name != "cross"])
def test_residual_adds_the_input(name: str) -> None:
    if name == "block":
        return
    x, layer = x_and_mask()[0], made(name, 6)
    torch.testing.assert_close(made(name, 6, residual=True)(x), x + layer(x))
    torch.testing.assert_close(made(name, 48, residual=True)(x), x + made(name, 48)(x))


def test_cross_attention_with_a_residual_adds_the_queries() -> None:
    x = x_and_mask()[0]
    torch.testing.assert_close(made("cross", 6, residual=True)(x), x[:, ::2] + made("cross", 6)(x))


@pytest.mark.parametrize("name", KINDS)
def test_state_moves_copies_and_loads(name: str) -> None:
    x, layer = x_and_mask()[0].float(), made(name, 6, dtype=torch.float32)
    again = made(name, 6, dtype=torch.float32, device="meta").to_empty(device="cpu")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", KINDS)
def test_autocast_stays_near(name: str) -> None:
    """Routing is not cast, so that the same tokens are chosen by the first router."""
    x, layer = x_and_mask()[0].float(), made(name, 48, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        out.float().sum().backward()
    assert (out.float() - layer(x)).abs().max() < 0.1


def test_numbers_can_be_given_with_the_call() -> None:
    x, mask = x_and_mask()
    block, six = made("block", 12), torch.tensor([6, 6])
    torch.testing.assert_close(block(x, mask, six, six, six), made("block", 6)(x, mask))
    torch.testing.assert_close(block(x, None, 0.25, 0.25, 0.25), block(x))
    torch.testing.assert_close(made("feed forward", 6)(x, None, 48), made("feed forward", 48)(x))


def test_what_cross_attention_chooses_depends_on_what_asks() -> None:
    x, context = randn(0, 1, 10, DIM), randn(1, 1, 200, DIM)
    torch.manual_seed(0)
    layer = RoutedCrossAttention(DIM, num_tokens_q=5, num_tokens_kv=9, heads=2, query_source=True).double()
    with torch.no_grad():
        layer.source.to_out.weight.mul_(100)
    tokens = [layer.source(layer.heavy.kv_router.routing_token, asking) for asking in (x, -x)]
    first, second = (layer.heavy.kv_router(context, 9, routing_tokens=t).indices for t in tokens)
    assert set(first.flatten().tolist()) != set(second.flatten().tolist())


def test_cross_attention_routes_blocks_of_a_long_context() -> None:
    layer = RoutedCrossAttention(DIM, num_tokens_q=5, num_tokens_kv=8, heads=2, route_block_size=50).double()
    choice = layer.heavy.kv_router(randn(1, 1, 200, DIM), 8)
    assert (choice.indices // 50).flatten().bincount().tolist() == [2, 2, 2, 2]
    assert layer(randn(0, 1, 10, DIM), randn(1, 1, 200, DIM)).shape == (1, 10, DIM)


def test_image_attention_takes_channels_first_and_any_size() -> None:
    kind: dict[str, Any] = {
        "num_heavy_tokens_q": 20,
        "num_heavy_tokens_kv": 20,
        "light_window_size": 4,
        **LIGHT,
        **HEAVY,
    }
    torch.manual_seed(0)
    first = RoutedImageAttention(DIM, **kind)
    last = RoutedImageAttention(DIM, channel_first=False, **kind)
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, DIM, 7, 9)
    torch.testing.assert_close(rearrange(first(x), "b d h w -> b h w d"), last(rearrange(x, "b d h w -> b h w d")))
    with pytest.raises(InputError, match=r"four axes, got \[2, 16, 63\]"):
        first(x.flatten(2))


def test_vit() -> None:
    torch.manual_seed(0)
    vit = RoutedViT(
        image_size=(32, 48), patch_size=8, num_classes=5, dim=DIM, depth=2, attn_num_heavy_tokens_q=6,
        attn_num_heavy_tokens_kv=0.5, ff_num_heavy_tokens=6, light_window_size=2, **LIGHT, **HEAVY,
    )  # fmt: skip
    out = vit(torch.randn(3, 3, 32, 48))
    out.sum().backward()
    assert out.shape == (3, 5) and all(p.grad is not None for p in vit.parameters())
    with pytest.raises(InputError, match=r"images \[B, channels, 32, 48\], got \[3, 3, 32, 32\]"):
        vit(torch.randn(3, 3, 32, 32))
    assert len({tuple(row.tolist()) for row in positions(5, 7, 16).flatten(0, 1)}) == 35  # a position each


def test_rotary_products_depend_on_the_difference_alone() -> None:
    q, k, at = randn(0, 1, 6), randn(1, 1, 6), torch.tensor([5])
    products = [(rotate(q, at + shift) * rotate(k, at + shift + 3)).sum() for shift in (0, 17)]
    torch.testing.assert_close(*products, rtol=1e-5, atol=1e-6)
    assert F.cosine_similarity(rotate(q, at), rotate(q, at + 1)) < 0.999


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HeavyAttention(8, heads=8, groups=3), "8 heads cannot be shared evenly by 3"),
        (lambda: HeavyAttention(8, dim_head=3, rotary=True), "must be even, got 3"),
        (lambda: made("autoregressive", 6, heavy_window_size=9), r"1 to light_window_size \(8\), got 9"),
        (lambda: made("autoregressive", 6, router={"method": "sinkhorn"}), "only the exact router"),
        (lambda: RoutedAutoregressiveAttention(8, num_heavy_tokens_q=0.5, num_heavy_tokens_kv=1), "int of at least 1"),
        (lambda: RoutedImageAttention(8, num_heavy_tokens_q=1, num_heavy_tokens_kv=1, light_window_size=0),
         "at least 1, got 0"),
        (lambda: RoutedViT(image_size=32, patch_size=5, num_classes=1, dim=8, depth=1, attn_num_heavy_tokens_q=1,
                           attn_num_heavy_tokens_kv=1, ff_num_heavy_tokens=1), "do not divide"),
        (lambda: RoutedViT(image_size=32, patch_size=8, num_classes=1, dim=6, depth=1, attn_num_heavy_tokens_q=1,
                           attn_num_heavy_tokens_kv=1, ff_num_heavy_tokens=1), "multiple of 4, got 6"),
    ],
)  # fmt: skip
def test_blocks_that_cannot_be_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build()
