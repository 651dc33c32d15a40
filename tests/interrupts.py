"""Ctrl-C at any line of the library, and all that a call may have left behind."""

from __future__ import annotations

import linecache
import pathlib
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import rpqfx
from rpqfx.nn.tensor.views import TRACING
from rpqfx.nn.tensor.virtual import INITIALISING

_LIBRARY = str(pathlib.Path(rpqfx.__file__).parent)


class Interrupt(KeyboardInterrupt):
    """What is raised here, and by nobody else."""


def traced(call: Callable[[], Any], at: int | None = None) -> list[tuple[str, int]]:
    """Makes a call whose lines, those of the library in this thread, are counted.

    Args:
        call: The call.
        at: Before which line, by its number in the run, ``Interrupt`` is raised; None for nowhere.

    Returns:
        File and line number of each line that was come to.
    """
    lines: list[tuple[str, int]] = []

    def local(frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) - 1 == at:
                raise Interrupt(f"{frame.f_code.co_filename}:{frame.f_lineno}")  # which ends the tracing
        return local

    def entered(frame: Any, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(_LIBRARY) else None

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def chosen(lines: list[tuple[str, int]], number: int | None) -> list[int]:
    """Where to interrupt: every distinct line where it is first and last come to, or a few of them.

    Args:
        lines: What ``traced`` returned.
        number: How many, spread over the distinct lines; None for all.
    """
    first, last = {}, {}
    for at, line in enumerate(lines):
        first.setdefault(line, at)
        last[line] = at
    points = sorted({*first.values(), *last.values()})
    if number is None:
        return points
    return sorted({*random.Random(len(points)).sample(points, min(number, len(points))), points[0], points[-1]})


def ends_of_with(lines: list[tuple[str, int]]) -> list[int]:
    """Where each ``with`` statement ends, which is when its line is come to again: before any ``__exit__``.

    Args:
        lines: What ``traced`` returned.
    """
    last = {line: at for at, line in enumerate(lines)}
    return sorted(at for line, at in last.items() if linecache.getline(*line).lstrip().startswith("with "))


def contents(model: nn.Module) -> list[Any]:
    """All of a model that a call could have changed: objects by identity, tensors by their bits as well."""
    found: list[Any] = []
    for module in model.modules():
        found.append((id(module), type(module), module.training, list(module.__dict__)))
        found += [_seen(value, name) for name, value in module.__dict__.items()]
    for tensor in {id(t): t for t in _tensors(model)}.values():
        grad = tensor.grad if tensor.is_leaf else None
        bits = None if is_lazy(tensor) or tensor.is_meta else tensor.detach().clone().view(-1).tolist()
        named = sorted(getattr(tensor, "__dict__", {}))
        shape = None if is_lazy(tensor) else tensor.shape
        found.append((id(tensor), type(tensor), tensor.requires_grad, id(grad), shape, repr(bits), named))
    return found


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    for module in model.modules():
        for group in (module._parameters, module._buffers, module.__dict__):
            yield from (tensor for tensor in group.values() if isinstance(tensor, Tensor))


def _seen(value: Any, name: str) -> Any:
    """Containers by what is in them, other things by identity or, where they are plain, by value."""
    if isinstance(value, dict):
        return name, id(value), [(key, _seen(inner, name)) for key, inner in value.items()]
    if isinstance(value, (list, tuple, set)):
        return name, id(value), [_seen(inner, name) for inner in value]
    if isinstance(value, (bool, int, float, str, type(None))):
        return name, value
    plain = getattr(value, "__dict__", None) if name in ("config", "generation_config") else None
    return name, id(value), repr(plain)


def around() -> dict[str, Any]:
    """The state of torch and of this library that is no model's."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "generator": torch.get_rng_state().tolist(),
        "filters": (id(warnings.filters), list(warnings.filters)),
        "modes": torch._C._len_torch_function_stack(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "call": (nn.Module.__call__, nn.Module.__getattr__),
        "initialising": INITIALISING.get(),
        "tracing": TRACING.get(),
        "threads": sorted(t.name for t in threading.enumerate() if t.name.startswith("rpqfx")),
    }
