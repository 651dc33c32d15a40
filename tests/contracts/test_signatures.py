"""What help() and an editor show of the public names: every argument, with its type and its default."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import rpqfx
import rpqfx.distributed
import rpqfx.fit
import rpqfx.routing.rewrite
import rpqfx.training
from rpqfx import codebook, graph, kv, nn, routing
from rpqfx.policies.options import Options

MODULES = (rpqfx, codebook, rpqfx.fit, graph, kv, nn, routing, routing.rewrite, rpqfx.training, rpqfx.distributed)
_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# Protocols of torch, whose callers pass what the protocol says.
_OF_TORCH = {"RPQWeight.forward"} | {f"VirtualWeight.{name}" for name in ("to", "change", "permute", "reshape", "view")}


def public() -> Iterator[tuple[str, Any]]:
    """Public callables, and the public methods of public classes, each once."""
    seen: set[int] = set()
    for module in MODULES:
        for name in module.__all__:
            item = getattr(module, name)
            if not callable(item) or id(item) in seen or getattr(item, "__module__", "").startswith("typing"):
                continue
            seen.add(id(item))
            if not (inspect.isclass(item) and issubclass(item, Exception)):
                yield name, item
            for key, value in methods(item).items() if inspect.isclass(item) else ():
                if not key.startswith("_") and callable(getattr(item, key)) and not inspect.isclass(value):
                    yield f"{name}.{key}", getattr(item, key)


def methods(kind: type) -> dict[str, Any]:
    """What a class has of its own, or from a class of this library."""
    ours = [each for each in reversed(kind.__mro__) if each.__module__.startswith("rpqfx")]
    found = {key: value for each in ours for key, value in vars(each).items()}
    return {key: value for key, value in found.items() if any(key in vars(each) for each in ours)}


@pytest.mark.parametrize(("name", "item"), list(public()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_argument_is_shown(name: str, item: Any) -> None:
    parameters = inspect.signature(item).parameters.values()
    if name not in _OF_TORCH:
        assert [p.name for p in parameters if p.kind in _COLLECTING] == []
    untyped = [p.name for p in parameters if p.annotation is p.empty and p.name not in ("self", "cls")]
    assert untyped == []


@pytest.mark.parametrize("layer", [name for name in nn.__all__ if hasattr(getattr(nn, name), "_dense")])
def test_layers_take_the_arguments_of_their_namesakes_in_their_order(layer: str) -> None:
    ours, theirs = (inspect.signature(kind).parameters for kind in (getattr(nn, layer), getattr(nn, layer)._dense))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {name: p.default for name, p in theirs.items()} == {name: ours[name].default for name in theirs}
    made = inspect.signature(rpqfx.CodebookSpec.make).parameters
    shared = [name for name in list(ours)[len(theirs) :] if name in made]
    assert len(shared) == 9 and all(ours[name].default == made[name].default for name in shared)


def test_an_argument_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        TypeError, match="RPQLinear got an unexpected keyword argument 'codebook_bit'; did you mean 'codebook_bits'"
    ):
        nn.RPQLinear(16, 32, codebook_bit=2)


COPYING = (rpqfx.rpqify, rpqfx.convert, rpqfx.quantize_kv, rpqfx.route, rpqfx.dequantize)
IN_PLACE = (
    rpqfx.finetune, rpqfx.finetune_routes, rpqfx.tune, rpqfx.materialize, rpqfx.distributed.materialize,
    rpqfx.distributed.fully_shard,
)  # fmt: skip


@pytest.mark.parametrize("call", [*COPYING, *IN_PLACE], ids=lambda call: call.__module__)
def test_the_first_line_of_a_call_says_whether_it_copies(call: Any) -> None:
    """A call that rewrites a model copies it unless ``inplace`` is set; one without that argument works in place."""
    first = inspect.getdoc(call).splitlines()[0]
    inplace = inspect.signature(call).parameters.get("inplace")
    assert (inplace is not None) == (call in COPYING)
    if inplace is not None:
        assert inplace.default is False
        assert first.startswith("Returns a copy of a ") and " model, or with ``inplace`` the model itself, " in first
    else:
        assert " in place" in first and "copy" not in first


def test_calls_copy_unless_they_are_told_not_to() -> None:
    torch.manual_seed(0)
    x, policy = torch.randn(4, 6, 16), rpqfx.Policy(codebook_dim=4, codebook_bits=2, min_size=0)
    calls: dict[str, Any] = {
        "rpqify": lambda model, **more: rpqfx.rpqify(model, policy, **more),
        "convert": lambda model, **more: rpqfx.convert(model, policy, [x], **more),
        "quantize_kv": lambda model, **more: rpqfx.quantize_kv(
            model, rpqfx.KVPolicy(window=2, codebook_dim=4, codebook_size=4), calibration=[x], progress=False, **more
        ),
        "route": lambda model, **more: rpqfx.route(model, rpqfx.RoutePolicy(0.5), **more),
    }
    for name, call in calls.items():
        model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        made = call(model)
        assert made is not model, name
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name
        assert {p.data_ptr() for p in made.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters()), name
        assert model.state_dict().keys() == before.keys() != made.state_dict().keys(), name
        assert call(model, inplace=True) is model and model.state_dict().keys() == made.state_dict().keys(), name
    dense = torch.nn.Sequential(torch.nn.Linear(16, 16))
    small = rpqfx.rpqify(dense, policy)
    codebooks = small[0].weight_rpq.codebooks.detach().clone()
    rpqfx.finetune(small, teacher=dense, data=[x], steps=2)
    assert not torch.equal(small[0].weight_rpq.codebooks, codebooks)


@pytest.mark.parametrize("call", [rpqfx.Policy.from_scratch, rpqfx.Policy.budget, rpqfx.Policy.pretrained])
def test_options_have_one_default_wherever_they_are_shown(call: Any) -> None:
    parameters = inspect.signature(call).parameters
    shown = {name: p.default for name, p in parameters.items() if name in Options.__dataclass_fields__}
    own = (
        {"min_codebook_bits": None, "min_size": 1024}
        if call == rpqfx.Policy.pretrained
        else {"min_codebook_bits": None}
    )
    own |= {"codebook_bits": None, "sharing": None} if call == rpqfx.Policy.budget else {}
    assert shown == {name: own.get(name, getattr(Options(), name)) for name in shown}
