"""What help() and an editor show of the public names: every argument, with its type and its default."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import rpqfx
import rpqfx.fit
import rpqfx.routing.rewrite
import rpqfx.training
from rpqfx import codebook, graph, kv, nn, routing

MODULES = (rpqfx, codebook, rpqfx.fit, graph, kv, nn, routing, routing.rewrite, rpqfx.training)
_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# Protocols of torch, whose callers pass what the protocol says.
_OF_TORCH = {"RPQWeight.forward", "VirtualWeight.to", "VirtualWeight.change"}


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
            for key, value in vars(item).items() if inspect.isclass(item) else ():
                if not key.startswith("_") and callable(getattr(item, key)) and not inspect.isclass(value):
                    yield f"{name}.{key}", getattr(item, key)


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
    with pytest.raises(TypeError, match="RPQLinear got an unexpected keyword argument 'bit'; did you mean 'bits'"):
        nn.RPQLinear(16, 32, bit=2)
