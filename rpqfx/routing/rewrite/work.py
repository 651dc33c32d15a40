"""Multiply-adds of the blocks of a model that was routed, with every token heavy and as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from rpqfx.nn.weight import RPQWeight
from rpqfx.routing.rewrite.attention import AttentionRoute
from rpqfx.routing.rewrite.feedforward import FeedForwardRoute
from rpqfx.routing.windows import LocalAttention


@dataclass(frozen=True)
class Work:
    """What a routed block multiplies.

    Args:
        route: Its route.
        weights: Elements of the block's own matrices, each of which a token is multiplied with once.
        width: Width of queries and values, all heads together, of attention; 0 for feed-forward blocks.
    """

    route: FeedForwardRoute | AttentionRoute
    weights: int
    width: int

    @property
    def kind(self) -> str:
        """``"feed_forward"`` or ``"attention"``."""
        return "attention" if isinstance(self.route, AttentionRoute) else "feed_forward"

    def dense(self, batch: int, n: int) -> int:
        """Returns those of the block alone, with all ``n`` tokens of ``batch`` samples."""
        return batch * (n * self.weights + 2 * n * n * self.width)

    def routed(self, batch: int, n: int, slots: int) -> int:
        """Returns those of both branches and the router.

        Args:
            batch: Samples.
            n: Tokens of each.
            slots: Places for chosen tokens of each; as many as tokens where all are heavy, and no router runs.
        """
        everyone = slots >= n
        light = self.route.light
        if everyone and isinstance(self.route, FeedForwardRoute) and self.route.stands_in:
            light = None
        around = 0 if light is None else n * matrix_elements(light)
        if isinstance(light, LocalAttention):
            whole = -(-n // light.block) * light.block  # the last block is filled up
            around += 2 * whole * light.block * (2 if light.causal else 3) * light.to_out.in_features
        router = 0 if everyone else n * self.route.chooser.router.dim
        return self.dense(batch, min(slots, n)) + batch * (around + router)


def works_of(model: nn.Module) -> list[Work]:
    """Returns what each routed block multiplies, in the model's order.

    Args:
        model: A routed model, or any.
    """
    layers: dict[nn.Module, set[nn.Module]] = {}
    found: list[tuple[FeedForwardRoute | AttentionRoute, nn.Module]] = []
    for module in model.modules():
        route = module._modules.get("routed")
        if isinstance(route, (FeedForwardRoute, AttentionRoute)):
            found.append((route, module))
            layers.setdefault(route, set()).add(module)
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, FeedForwardRoute):
                layers.setdefault(owner, set()).add(module)
    works = []
    for route, module in found:
        own = sum(matrix_elements(layer) for layer in layers[route]) - matrix_elements(route)
        works.append(Work(route, own, _width(module) if isinstance(route, AttentionRoute) else 0))
    return works


def matrix_elements(module: nn.Module) -> int:
    """Returns the elements of all matrices of a module, quantized or not.

    Args:
        module: The module.
    """
    total = 0
    for each in module.modules():
        if isinstance(each, RPQWeight):
            total += math.prod(each.layout.shape)
        elif not isinstance(each, nn.Embedding):
            parameters = each.parameters(recurse=False)
            total += sum(p.numel() for p in parameters if p.dim() == 2)
    return total


def _width(attention: nn.Module) -> int:
    """Of queries, all heads together: what the last of its layers takes."""
    if isinstance(attention, nn.MultiheadAttention):
        return attention.embed_dim
    route = attention.get_submodule("routed")
    inside = set(route.modules())
    layers = [m for m in attention.modules() if m not in inside and (isinstance(m, nn.Linear) or hasattr(m, "nf"))]
    if not layers:
        return 0
    last = layers[-1]
    return last.in_features if isinstance(last, nn.Linear) else last.get_parameter("weight").shape[0]
