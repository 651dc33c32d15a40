"""A symbolic tracer that leaves other threads, and the model it reads, alone.

While ``torch.fx`` traces, it replaces ``torch.nn.Module.__call__`` and ``__getattr__`` for the whole process, and takes
them back when it is done. So one trace runs at a time, and calls that other threads make meanwhile go to the modules
themselves.
"""

from __future__ import annotations

import copy
import copyreg
import threading
import types
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from rpqfx.nn.hosting.host import READ_AS
from rpqfx.nn.tensor.views import tracing
from rpqfx.nn.tensor.virtual import VirtualWeight

ONE_AT_A_TIME = threading.RLock()
"""Held by whoever traces, scripts or exports with torch's tracers, which keep their state in globals."""

# Names of functions and methods that draw random numbers.
_DRAWING = {
    "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "bernoulli", "bernoulli_",
    "binomial", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal", "normal_", "poisson",
    "random_", "uniform_", "trunc_normal_", "orthogonal_", "sparse_", "kaiming_normal_", "kaiming_uniform_",
    "xavier_normal_", "xavier_uniform_", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_alpha_dropout", "feature_dropout", "gumbel_softmax", "rrelu", "rrelu_", "fractional_max_pool2d",
    "fractional_max_pool3d", "scaled_dot_product_attention", "multi_head_attention_forward",
}  # fmt: skip


class ThreadTracer(fx.Tracer):
    """An ``fx.Tracer`` that takes note of its own thread's calls only."""

    _thread = 0

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As the base class; waits for other traces to be done."""
        with ONE_AT_A_TIME, tracing():
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """As the base class; a call of another thread runs as it would have."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As the base class; another thread reads what is there."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """As the base class; a quantized Parameter of a traced module becomes a call of its codebooks."""
        return super().create_arg(a.expand_dense() if isinstance(a, VirtualWeight) else a)


class NumbersKept(TorchFunctionMode):
    """Puts torch's random numbers back after each function that draws some, in this thread, on the CPU.

    Forking the generator for as long as a trace takes would also undo what other threads draw from it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) not in _DRAWING:
            return func(*args, **(kwargs or {}))
        with torch.random.fork_rng(devices=[]):
            return func(*args, **(kwargs or {}))


def outline(module: nn.Module, training: bool) -> nn.Module:
    """A module of the same class, with the same tensors, children and attributes, that may be set and changed freely.

    Lists, dicts and sets among its attributes are its own; what is in them is shared.

    Args:
        module: Any module; it is only read.
        training: The mode of the new one; children keep theirs.
    """
    kind = getattr(type(module), READ_AS, type(module))
    made: nn.Module = object.__new__(kind)
    for name in copyreg._slotnames(kind):  # type: ignore[attr-defined]
        if hasattr(module, name):
            object.__setattr__(made, name, getattr(module, name))
    for name, value in list(module.__dict__.items()):
        if isinstance(value, (dict, list, set)):
            value = copy.copy(value)
        elif isinstance(value, types.MethodType) and value.__self__ is module:
            value = types.MethodType(value.__func__, made)
        made.__dict__[name] = value
    made.__dict__["training"] = training
    return made
