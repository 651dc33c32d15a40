"""Attention that is written as two products with a softmax between, found by running the model once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from rpqfx.graph.product_watch import Pair, ProductWatch
from rpqfx.graph.written_products import Products, Written, counts


def find_written(model: nn.Module, run: Callable[[], Any], known: Collection[nn.Module]) -> dict[str, Written]:
    """Finds modules that attend by products of their own, of which a softmax is between two.

    Args:
        model: The model, in eval mode and without gradients.
        run: Runs it once.
        known: Modules whose attention is known already; products in them are none of others.

    Returns:
        By qualified name, in the order of the model's modules.
    """
    watch = ProductWatch(model, known)
    with watch.hooked(), watch:
        run()
    pairs: dict[str, list[Pair]] = defaultdict(list)
    for pair in watch.pairs:
        pairs[pair.call.name].append(pair)
    found = {name: _judged(own, set(known), pairs) for name, own in pairs.items()}
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def _judged(own: list[Pair], known: set[nn.Module], pairs: dict[str, list[Pair]]) -> Written:
    """The observations of all calls of one module together."""
    if not any(pair.causal for pair in own):
        return Written(None, causal=False)
    first = own[0]
    module, name = first.call.module, first.call.name
    below = [pairs[other] for other in pairs if other != name and other.startswith(f"{name}." if name else "")]
    if any(pair.causal for each in below for pair in each) or any(child in known for child in module.modules()):
        return Written(None, "attends by products of its own and holds other modules that attend")
    calls = {id(pair.call) for pair in own}
    if len(calls) < len(own):
        return Written(None, f"computes {len(own) // len(calls)} attentions by products of its own in one call")
    for pair in own:
        if pair.found.obstacle is not None:
            return pair.found
        if not pair.causal:
            return Written(None, "lets tokens attend to later ones in some of its calls")
    products = {_counted(pair) for pair in own}
    if len(products) > 1:
        return Written(None, "multiplies keys and values otherwise from call to call")
    return Written(products.pop())


def _counted(pair: Pair) -> Products:
    """Which products of a call are the two, among those that count."""
    found = pair.found.products
    assert found is not None  # as there is no obstacle
    which = [number for number, shape in enumerate(pair.call.products) if counts(found.keys, found.values, shape)]
    return Products(which.index(found.scores), which.index(found.mix), len(which), found.keys, found.values)
