"""Tensors that accelerate has offloaded: they are on the meta device, and a hook brings them in for each forward.

accelerate is never imported; its hooks are known by the attribute that it gives a module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from rpqfx.errors import RewriteError


def offloaded(model: nn.Module) -> list[str]:
    """Returns the names of the Parameters and buffers whose values a hook has, rather than the model.

    Args:
        model: Any module.
    """
    return [name for name, away in _tensors(model) if away]


def check_not_offloaded(names: Iterable[str], doing: str) -> None:
    """Raises where there are such tensors.

    Args:
        names: Those that ``offloaded`` returned, or some of them.
        doing: Name of the operation, for the message.

    Raises:
        RewriteError: If there are any.
    """
    some = sorted(names)
    if some:
        raise RewriteError(
            f"{', '.join(some[:5])}{' ...' if len(some) > 5 else ''} cannot be {doing}: accelerate has offloaded "
            "their values, which come in for the length of a forward only; take its hooks off first "
            "(accelerate.hooks.remove_hook_from_submodules), or load the model without an offloading device_map, and "
            "offload the result"
        )


def _tensors(module: nn.Module, prefix: str = "", brought: bool = False) -> Iterator[tuple[str, bool]]:
    """Names of all tensors, and whether each is on the meta device and brought in by a hook of a module around it."""
    own = _offloads(module)
    for group in (module._parameters, module._buffers):
        for name, tensor in group.items():
            if tensor is not None:
                yield prefix + name, tensor.is_meta and (own or brought)
    for name, child in module._modules.items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", brought or _places_children(module))


def _hooks(module: nn.Module) -> Iterable[object]:
    hook = module.__dict__.get("_hf_hook")
    return getattr(hook, "hooks", (hook,))


def _offloads(module: nn.Module) -> bool:
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def _places_children(module: nn.Module) -> bool:
    return any(getattr(hook, "offload", False) and getattr(hook, "place_submodules", False) for hook in _hooks(module))
