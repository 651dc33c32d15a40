"""Hooks on a quantized weight fire once for each use of it, with the operand and the product."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy
from rpqfx.nn import RPQWeight


class Uses(nn.Module):
    """Every way that a module uses a weight: layers, products of its own, views, experts, and the tensor itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.fc, self.conv = nn.Embedding(64, 16), nn.Linear(16, 32), nn.Conv1d(32, 64, 1)
        self.rnn, self.mha = nn.GRU(64, 16), nn.MultiheadAttention(16, 2)
        self.w, self.e = nn.Parameter(torch.randn(48, 16)), nn.Parameter(torch.randn(4, 16, 32) / 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fc(self.emb(ids))
        x = self.rnn(self.conv(x.mT).mT)[0]
        x = self.mha(x, x, x)[0]
        x = x + x @ self.w[:16] + x @ self.w[16:32].T + (self.w[32:] * 2).mean(0)
        y = torch.einsum("btd,edf->bef", x, self.e)
        return y.sum() + (x @ self.e[torch.tensor([0, 2])]).sum() + self.e.sin().sum()


def small() -> nn.Module:
    torch.manual_seed(0)
    return rpqfx.rpqify(Uses(), Policy.from_scratch(codebook_dim=8, codebook_bits=3, min_size=64))


def weights(model: nn.Module) -> dict[str, RPQWeight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RPQWeight)}


def hooked(model: nn.Module, kind: str, fired: list[str]) -> None:
    for name, weight in weights(model).items():

        def note(*args: Any, name: str = name) -> None:
            fired.append(name)

        if kind == "forward":
            forward = weight.forward

            def instead(*args: Any, forward: Any = forward, note: Any = note, **kwargs: Any) -> Any:
                note()
                return forward(*args, **kwargs)

            weight.forward = functools.wraps(forward)(instead)  # type: ignore[method-assign]
        else:
            getattr(weight, f"register_{kind}")(note)


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_hook", "forward"])
def test_hooks_of_every_weight_fire_and_change_nothing(kind: str):
    plain, watched, fired = small(), small(), []
    hooked(watched, kind, fired)
    ids = torch.arange(20).view(2, 10)
    wanted, found = plain(ids), watched(ids)
    torch.testing.assert_close(found, wanted)
    wanted.backward()
    found.backward()
    known = dict(plain.named_parameters())
    for name, parameter in watched.named_parameters():
        torch.testing.assert_close(parameter.grad, known[name].grad, msg=name)
    assert set(fired) == set(weights(watched))
    assert fired.count("fc.weight_rpq") == 1


def test_a_hook_gets_the_operand_and_the_product_and_may_exchange_them():
    layer = rpqfx.nn.RPQLinear(16, 32, codebook_dim=4, codebook_bits=3)
    x, seen = torch.randn(5, 16), []
    plain = layer(x)
    layer.weight_rpq.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    layer(x)
    assert seen[0][0] is x and torch.equal(seen[0][1], plain)
    layer.weight_rpq.register_forward_pre_hook(lambda module, args: (args[0] * 0, *args[1:]))
    assert torch.equal(layer(x), layer.bias.expand(5, 32))


def test_hooks_on_a_rewritten_layer_fire_as_on_the_dense_one():
    ids = torch.arange(20).view(2, 10)
    fired: dict[str, list[str]] = {"dense": [], "codebooks": []}
    for who, model in (("dense", Uses()), ("codebooks", small())):
        for name, module in model.named_modules():
            if not isinstance(module, RPQWeight):
                note = functools.partial(lambda where, name, *args: where.append(name), fired[who], name)
                module.register_forward_pre_hook(lambda *args, note=note: note())
                module.register_forward_hook(lambda *args, note=note: note())
        model(ids)
    assert [name for name in fired["codebooks"] if not name.startswith("mha.")] == fired["dense"]


def test_a_copy_of_a_hooked_weight_is_its_own():
    layer = rpqfx.nn.RPQLinear(16, 32, codebook_dim=4, codebook_bits=3)
    fired: list[Any] = []
    layer.weight_rpq.register_forward_hook(lambda module, args, y: fired.append(module))
    other = copy.deepcopy(layer)
    other(torch.randn(2, 16))
    assert fired == [other.weight_rpq]
