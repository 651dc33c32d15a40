"""Reads a module's code without running it, to see whether it must be handed real tensors.

A custom ``autograd.Function`` finds tensors only for its gradients: anything else goes through it unseen, and so
without a gradient. A check such as ``isinstance(w, Tensor)`` says no to anything else. Tracing shows neither.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.autograd import Function

_CHECKS = {"isinstance", "is_tensor", "is_floating_point", "is_complex"}
_MOST = 500  # functions that are looked at for one class


_KNOWN: weakref.WeakKeyDictionary[type[nn.Module], bool] = weakref.WeakKeyDictionary()


def needs_tensors(kind: type[nn.Module]) -> bool:
    """Whether a class's code checks for tensors, or it or a function that it names uses a custom autograd Function.

    Args:
        kind: A class of modules, of which only the part outside of torch is looked at.
    """
    if kind not in _KNOWN:
        _KNOWN[kind] = _needs_tensors(kind)
    return _KNOWN[kind]


def _needs_tensors(kind: type[nn.Module]) -> bool:
    methods = [value for base in kind.__mro__ if not is_torchs(base.__module__) for value in vars(base).values()]
    queue = [function for method in methods if (function := _function(method)) is not None]
    if any(_CHECKS & set(code.co_names) for function in queue for code in _codes(function.__code__)):
        return True
    seen = {id(function) for function in queue}
    while queue and len(seen) < _MOST:
        for value in _named(queue.pop()):
            if _is_custom(value):
                return True
            function = _function(value)
            if function is not None and id(function) not in seen and not is_torchs(function.__module__):
                seen.add(id(function))
                queue.append(function)
    return False


def names_of(function: Any) -> set[str]:
    """Names of attributes and globals in the code of a function or method, functions within it included.

    Args:
        function: Anything; what has no Python code has none.
    """
    plain = _function(function)
    return set() if plain is None else {name for code in _codes(plain.__code__) for name in code.co_names}


def is_torchs(module: str | None) -> bool:
    """Returns whether a module of this name belongs to torch or to Python itself.

    Args:
        module: As in ``__module__``.
    """
    return module is None or module == "builtins" or module.split(".")[0] == "torch"


def _is_custom(value: Any) -> bool:
    """Returns whether it is an autograd Function, or the ``apply`` of one."""
    kind = getattr(value, "__self__", value)
    return isinstance(kind, type) and issubclass(kind, Function) and not is_torchs(kind.__module__)


def _function(value: Any) -> types.FunctionType | None:
    """The plain function in a method, a property or something that wraps one."""
    value = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
    value = getattr(value, "__wrapped__", value)
    return value if isinstance(value, types.FunctionType) else None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _named(function: types.FunctionType) -> Iterator[Any]:
    """Yields the values of the names in a function's code: globals, and attributes of modules that are globals."""
    names = [name for code in _codes(function.__code__) for name in code.co_names]
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType):
            yield from (vars(value)[other] for other in names if other in vars(value))
        elif value is not None:
            yield value
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
