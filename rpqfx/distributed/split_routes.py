"""Layers of routed blocks that are split over processes: tokens are chosen outside of what the processes share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import Placement, Shard

from rpqfx.errors import DistributedError
from rpqfx.routing.rewrite.feedforward import FeedForwardRoute
from rpqfx.routing.rewrite.rewrite import ROUTE


@contextmanager
def within_routes(module: nn.Module, style: Any) -> Iterator[None]:
    """While it lasts, hooks that are put on a layer go between the layer and the hooks that route its tokens.

    The router then sees, and adds to, whole results; what it holds itself, a child of the layer, stays whole too.

    Args:
        module: Any layer.
        style: How inputs come and outputs go.

    Raises:
        DistributedError: If the layer is routed, and processes would have some samples or tokens each.
    """
    route = next((found for hook in _hooks(module) if isinstance(found := _owner(hook), FeedForwardRoute)), None)
    if route is None:
        yield
        return
    for name in ("input_layouts", "output_layouts"):
        layouts: tuple[Placement, ...] = getattr(style, name)
        if any(isinstance(layout, Shard) and layout.dim in (0, 1) for layout in layouts):
            raise DistributedError(
                f"{route.name} is routed, and its router chooses among all tokens, of which each process would have "
                f"some ({name}={layouts[0]}); give {name}=Replicate() to {type(style).__name__} of its layers"
            )
    if not style.use_local_output:
        raise DistributedError(
            f"{route.name} is routed, and its light branch is added to plain tensors; leave use_local_output out"
        )
    hooks: Any = module._forward_hooks  # an OrderedDict
    before, held = set(hooks), module._modules.pop(ROUTE, None)
    try:
        yield
    finally:
        if held is not None:
            module._modules[ROUTE] = held
        for key in [key for key in hooks if key not in before]:
            hooks.move_to_end(key, last=False)


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)
