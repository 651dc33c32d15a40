"""Quantized weights, attention on codes and routed blocks in one model: in every order, and none of them twice."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpqfx
from rpqfx.errors import RewriteError
from rpqfx.kv.module import attentions
from rpqfx.nn.hosting.backed import backed_weights
from rpqfx.routing.rewrite.attention import AttentionRoute, TorchAttentionRoute
from rpqfx.routing.rewrite.feedforward import FeedForwardRoute

KV = rpqfx.KVPolicy(bits_per_value=2, window=8, sinks=2, chunk=8, codebook_size=8)
WEIGHTS = rpqfx.Policy.from_scratch(codebook_dim=4, codebook_bits=3, min_size=1, allow_growth=True, sharing="layer")


class Block(nn.Module):
    """Attention of its own, with a Parameter of its own, and a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.in_proj_weight = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x @ self.in_proj_weight).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(x)))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(50, 32), nn.Sequential(Block(), Block())

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks(self.tokens(ids))


class Torchs(nn.Module):
    """Attention of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.attention = nn.Embedding(50, 32), nn.MultiheadAttention(32, 2, batch_first=True)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def called(model: Any, ids: Tensor) -> Tensor:
    if isinstance(model, (Own, Torchs)):
        return model(ids)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def weights(model: Any, ids: Tensor) -> nn.Module:
    return rpqfx.rpqify(model, WEIGHTS)


def kv(model: Any, ids: Tensor) -> nn.Module:
    return rpqfx.quantize_kv(model, KV, calibration=[{"input_ids": ids}] if hasattr(model, "config") else [ids])


def route(model: Any, ids: Tensor) -> nn.Module:
    window = 8 if hasattr(model, "config") else None
    return rpqfx.route(model, rpqfx.RoutePolicy(feed_forward=0.5, attention=0.5, window=window, light_window=4))


STEPS: dict[str, Callable[[Any, Tensor], nn.Module]] = {"weights": weights, "kv": kv, "route": route}


@pytest.mark.parametrize("order", list(itertools.permutations(STEPS)), ids="-".join)
@pytest.mark.parametrize(
    "make", [Own, pytest.param(Torchs, marks=pytest.mark.slow), pytest.param(llama, marks=pytest.mark.slow)]
)
def test_every_order_works_and_none_twice(make: Callable[[], Any], order: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, ids = make().eval(), torch.randint(50, (2, 32))
    for step in order:
        before, model = model, STEPS[step](model, ids)
    assert not any(module.training for module in model.modules())
    y = called(model, ids)
    assert y.isfinite().all()

    held = {record.name for record in rpqfx.report(model).rewritten}
    there = {f"{path}.{name}".lstrip(".") for path, module in model.named_modules() for name in backed_weights(module)}
    assert held == there and held
    assert not any("kv_codes" in name or "chooser" in name for name in held), "the library's own are no weights"
    kinds = Counter(type(module) for module in model.modules())
    routes = kinds[AttentionRoute] + kinds[TorchAttentionRoute]
    assert len(attentions(model)) == routes == kinds[FeedForwardRoute] > 0
    light = any(".light." in name for name in held)
    assert light == (order.index("route") < order.index("weights")), "light branches are weights as any"

    assert torch.equal(called(copy.deepcopy(model), ids), y)
    if make is not llama:
        assert torch.equal(called(pickle.loads(pickle.dumps(model)), ids), y)
    again = STEPS[order[-1]](copy.deepcopy(before), ids)
    again.load_state_dict(model.state_dict())
    assert torch.equal(called(again, ids), y)

    model.train()
    (called(model, ids).square().mean() + rpqfx.kv.commitment(model)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad]
    assert not without
    for step in STEPS.values():
        with pytest.raises(RewriteError, match="already"):
            step(model, ids)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_new_modules_are_in_the_models_mode(step: Callable[[Any, Tensor], nn.Module], training: bool) -> None:
    model = step(Own().train(training), torch.randint(50, (2, 32)))
    assert all(module.training is training for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("order", [("weights", "kv"), ("kv", "weights")], ids="-".join)
def test_both_orders_of_weights_and_cache_generate(order: tuple[str, str]) -> None:
    torch.manual_seed(0)
    model, ids = llama().eval(), torch.randint(50, (2, 32))
    for step in order:
        model = STEPS[step](model, ids)
    found = model.generate(
        ids, max_new_tokens=6, do_sample=False, past_key_values=rpqfx.kv.CodebookCache.for_model(model)
    )
    assert found.shape[1] > 32 and torch.equal(found[:, :32], ids)
