"""A model, and what a call changes of torch's state, as they were before; to be put back if anything is raised.

Whoever rewrites a model takes a ``Snapshot`` first, does all of the work, down to the ``return``, in a ``try``, and
restores it in ``except BaseException``. So an exception from anywhere, Ctrl-C among them, undoes the call. What is
restored here is restored by nobody else as a rule; where a context manager does so too, an interrupt within its own
last lines is mended by the snapshot.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from rpqfx.graph.generators import generator_states, set_generator_states
from rpqfx.nn.tensor.views import TRACING
from rpqfx.nn.tensor.virtual import INITIALISING

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


class Flags:
    """Which Parameters ask for gradients, their gradients, and which modules are in training mode.

    Args:
        models: Any number of them; None counts as none.
    """

    def __init__(self, *models: nn.Module | None) -> None:
        modules = {id(m): m for model in models if model is not None for m in model.modules()}
        tensors = {id(p): p for m in modules.values() for p in m._parameters.values() if p is not None}
        self._modes = [(module, module.training) for module in modules.values()]
        self._tensors = [(p, p.requires_grad, p.grad) for p in tensors.values() if p.is_leaf]

    def restore(self) -> None:
        """Makes them what they were; may be called again."""
        for module, training in self._modes:
            if module.training != training:
                module.training = training
        for tensor, flag, grad in self._tensors:
            if tensor.requires_grad != flag:
                tensor.requires_grad_(flag)
            if tensor.grad is not grad:
                tensor.grad = grad


class Ambient:
    """The state of torch and of this library that is no model's: gradient mode, function modes, generators, filters.

    Function modes are what ``with torch.device(...)`` and the like put on torch's stack. One whose ``__exit__`` an
    interrupt forestalls would stay there, in every later call of this thread.

    Args:
        devices: Whose random generators count besides the CPU's. None leaves all of them alone.
    """

    def __init__(self, devices: Iterable[torch.device] | None = ()) -> None:
        self._grad, self._depth = torch.is_grad_enabled(), torch._C._len_torch_function_stack()
        self._generators = {} if devices is None else generator_states(devices)
        self._filters, self._listed = warnings.filters, list(warnings.filters)
        self._modes = [(mode, mode.get()) for mode in (TRACING, INITIALISING)]

    def restore(self) -> None:
        """Makes it what it was; may be called again."""
        while torch._C._len_torch_function_stack() > self._depth:
            TorchFunctionMode().__exit__(None, None, None)  # takes off the one on top, whichever it is
        torch.set_grad_enabled(self._grad)
        set_generator_states(self._generators)
        if warnings.filters is not self._filters or list(self._filters) != self._listed:
            warnings.filters = self._filters
            warnings.filters[:] = self._listed  # type: ignore[index]
        for mode, value in self._modes:
            mode.set(value)


class Snapshot:
    """The state of a model before a rewrite, to be restored where the rewrite fails or its result is wrong.

    Tensors are not copied, but for those whose values the rewrite sets: their objects come back.

    Args:
        model: The model, before.
        values: Tensors whose values the rewrite sets, such as ``small_tensors(model)``. They are copied.
        also: Objects that the rewrite sets attributes of, such as configurations.
    """

    def __init__(self, model: nn.Module, *, values: Iterable[Tensor] = (), also: Iterable[Any] = ()) -> None:
        modules = list(model.modules())
        self._objects = [(thing, type(thing), dict(thing.__dict__)) for thing in (*modules, *also)]
        self._containers: dict[int, tuple[Any, Any]] = {}
        for module in modules:
            for value in module.__dict__.values():
                self._look_into(value)
        self._values = [(tensor, tensor.detach().clone()) for tensor in values]
        self._flags = Flags(model)
        self._ambient = Ambient({p.device for p in model.parameters()})

    def _look_into(self, value: Any) -> None:
        if type(value) not in _CONTAINERS or id(value) in self._containers:
            return
        self._containers[id(value)] = value, value.copy()
        for inner in value.values() if isinstance(value, dict) else value:
            self._look_into(inner)

    def restore(self) -> None:
        """Makes the model, and what is around it, what they were; may be called again."""
        self.restore_model()
        self._ambient.restore()

    def restore_model(self) -> None:
        """Makes the model what it was; what is still so is not written to, as other threads may be using it."""
        for thing, kind, attributes in self._objects:
            if type(thing) is not kind:
                thing.__class__ = kind
            if not _is_same(thing.__dict__, attributes):  # one by one: at no time does another thread miss an attribute
                for name in [name for name in thing.__dict__ if name not in attributes]:
                    del thing.__dict__[name]
                thing.__dict__.update(attributes)
        for container, held in self._containers.values():
            if not _is_same(container, held):
                container.clear()
                container.extend(held) if isinstance(container, list) else container.update(held)
        self._flags.restore()
        with torch.no_grad():
            for tensor, value in self._values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _is_same(now: Any, before: Any) -> bool:
    """Returns whether two dicts, lists or sets hold the same objects in the same order."""
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        pairs = zip(list(now.items()), before.items(), strict=True)
        return all(a == b and one is other for (a, one), (b, other) in pairs)
    return all(one is other for one, other in zip(list(now), before, strict=True))


def small_tensors(model: nn.Module) -> list[Tensor]:
    """Returns the tensors of a model whose values a conversion sets, or a run of the model may, each once.

    These are Parameters of one axis or none, buffers, and tensors in plain attributes.

    Args:
        model: The model.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        small = [p for p in module._parameters.values() if p is not None and not is_lazy(p) and p.dim() <= 1]
        plain = [value for value in module.__dict__.values() if isinstance(value, Tensor) and value.grad_fn is None]
        buffers = [buffer for buffer in module._buffers.values() if buffer is not None and not is_lazy(buffer)]
        found |= {id(t): t for t in (*small, *buffers, *plain) if not t.is_meta and not t.is_inference()}
    return list(found.values())
