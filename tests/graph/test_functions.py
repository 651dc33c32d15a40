"""Functions among a module's attributes: in a copy they use the copy's modules, or the copy is refused."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpqfx
from rpqfx.errors import RewriteError
from rpqfx.graph.copying import copy_model
from rpqfx.nn.hosting.backed import backed_weights

POLICY = rpqfx.Policy.from_scratch(codebook_dim=8, codebook_bits=4)


def layers() -> Any:
    return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))


def closure() -> nn.Module:
    model = layers()
    old = model[0].forward
    model[0].forward = lambda x: old(x) * 2
    return model


def nested_closure() -> nn.Module:
    model = layers()

    def doubled(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(x: Tensor) -> Tensor:
            return forward(x) * 2

        return run

    model[0].forward = doubled(doubled(model[0].forward))
    return model


def default_argument() -> nn.Module:
    model = layers()
    model[0].forward = lambda x, old=model[0].forward, *, other=model[1]: old(x) + other.bias.mean()
    return model


def partial() -> nn.Module:
    model = layers()
    model[0].forward = functools.partial(lambda old, x: old(x) * 2, model[0].forward)
    return model


def partial_of_closure() -> nn.Module:
    model = layers()
    old = model[0].forward
    model[0].forward = functools.partial(lambda factor, x: old(x) * factor, 3.0)
    return model


def method() -> nn.Module:
    model = layers()
    model[0].forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias) * 2, model[0])
    return model


def list_in_closure() -> nn.Module:
    model = layers()
    both = [model[0], {"old": model[1].forward}]
    model.forward = lambda x: both[1]["old"](nn.Linear.forward(both[0], x))
    return model


def recursion() -> nn.Module:
    model = layers()
    old = model[0].forward

    def run(x: Tensor, again: bool = True) -> Tensor:
        return run(x, False) * 2 if again else old(x)

    model[0].forward = run
    return model


def hook() -> nn.Module:
    model = layers()
    side = model[1]
    model[0].register_forward_hook(lambda module, args, out: out + side.weight.mean())
    return model


class Wrapper:
    def __init__(self, forward: Callable[..., Any]) -> None:
        self.old = forward

    def __call__(self, x: Tensor) -> Tensor:
        return self.old(x) * 2


def callable_object() -> nn.Module:
    model = layers()
    model[0].forward = Wrapper(model[0].forward)
    return model


class Kept(nn.Module):
    """Keeps a child's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 96)
        self.fn, self.also = self.fc.forward, [self.fc]

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + self.also[0](x)


MODELS = (
    closure, nested_closure, default_argument, partial, partial_of_closure, method, list_in_closure, recursion, hook,
    callable_object, Kept,
)  # fmt: skip


def dense(small: nn.Module, model: nn.Module) -> nn.Module:
    """The model itself, with the expanded weights."""
    with torch.no_grad():
        for path, module in small.named_modules():
            for name, weight in backed_weights(module).items():
                model.get_submodule(path)._parameters[name].copy_(weight())  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", MODELS)
def test_the_functions_of_a_rewritten_model_use_its_codebooks(make: Callable[[], nn.Module], inplace: bool) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(make())
    model, twin = made
    small, x = rpqfx.rpqify(model, POLICY, inplace=inplace), torch.randn(3, 64)
    assert rpqfx.report(small).rewritten
    twin = dense(small, twin)
    y = small(x)
    torch.testing.assert_close(y, twin(x))
    y.square().mean().backward()
    assert all(p.grad is not None for n, p in small.named_parameters() if "codebooks" in n)


def test_a_copy_refers_to_nothing_of_the_original() -> None:
    model = closure()
    made, x = copy_model(model), torch.randn(2, 64)
    want = model(x)
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[operator]
    assert torch.equal(made(x), want)
    assert not torch.equal(copy.deepcopy(model)(x), want)


def test_what_hooks_collect_is_collected_where_it_was() -> None:
    model, seen = layers(), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    copy_model(model)(torch.randn(2, 64))
    assert seen == [(2, 96)]


def test_attributes_of_parameters_come_along() -> None:
    model = layers()
    model[0].bias.no_decay = model[0].weight.no_decay = True
    assert copy_model(model)[0].bias.no_decay  # type: ignore[index]
    small: Any = rpqfx.rpqify(model, POLICY)
    assert small[0].bias.no_decay and small[0].weight_rpq.codebooks.no_decay


shared: Any = None


def reads_a_global() -> nn.Module:
    global shared
    model = layers()
    shared = model[0].forward
    model[0].forward = lambda x: shared(x) * 2
    return model


def hook_reads_a_global() -> nn.Module:
    global shared
    model = layers()
    shared = model
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + shared[1].bias.mean(),))
    return model


def behind_an_object() -> nn.Module:
    model = layers()
    wrapper = Wrapper(model[0].forward)
    model[0].forward = lambda x: wrapper(x) + 1
    return model


@pytest.mark.parametrize("make", [reads_a_global, hook_reads_a_global, behind_an_object])
def test_what_no_copy_can_follow_is_refused_and_works_in_place(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(2, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}, model(x)
    with pytest.raises(RewriteError, match="inplace=True"):
        rpqfx.rpqify(model, POLICY)
    assert torch.equal(model(x), before[1]) and model.state_dict().keys() == before[0].keys()
    small: Any = rpqfx.rpqify(model, POLICY, inplace=True)
    small(x).sum().backward()
    assert small[0].weight_rpq.codebooks.grad is not None


def test_a_parameter_in_a_closure_stays_dense() -> None:
    model = layers()
    weight = model[0].weight
    model[0].forward = lambda x: F.linear(x, weight)
    small: Any = rpqfx.rpqify(model, POLICY)
    record = next(r for r in rpqfx.report(small).sites if r.name == "0.weight")
    assert record.reason == "is also kept by a function in the attribute 'forward' of 0"
    with torch.no_grad():
        weight.zero_()
    assert bool(small(torch.randn(2, 64)).std() > 0.1)
