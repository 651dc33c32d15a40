"""Copies plain functions among a module's attributes, whose closures and defaults refer to its modules and tensors.

``copy.deepcopy`` copies bound methods and partials with what they are bound to, but hands on functions as they are. A
forward such as ``lambda x: old(x) * 2`` of a copy would therefore go on calling the original's module.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from rpqfx.errors import RewriteError

_OWN = ("_parameters", "_modules", "_buffers")


def functions_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Functions, and partials of functions, among a module's plain attributes and hooks.

    Args:
        module: Any module; its children are not looked at.

    Yields:
        The attribute's name, and the function.
    """
    for name, value in list(module.__dict__.items()):
        if name in _OWN:
            continue
        for item in _items(value):
            if isinstance(item, (types.FunctionType, functools.partial)):
                yield name, item


def referred(function: Any) -> Iterator[Any]:
    """Modules and tensors that a function refers to: in closures, defaults, arguments of partials and globals it reads.

    Args:
        function: A function, method or partial; anything else refers to nothing.
    """
    waiting, seen = [function], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (nn.Module, Tensor)):
            yield value
        elif isinstance(value, types.FunctionType):
            waiting += [*_cells(value).values(), *_defaults(value), *_globals(value).values()]
        elif isinstance(value, types.MethodType):
            waiting += [value.__func__, value.__self__]
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        else:
            waiting += _items(value)[:_MOST] if isinstance(value, (list, tuple, dict, set)) else []


_MOST = 1000  # items of a container that are looked at: longer ones are data


def rebind(model: nn.Module, made: nn.Module, memo: Mapping[int, Any]) -> None:
    """Has the functions that a copy of a model took over refer to the copy's modules and tensors.

    Functions that refer to neither stay the same objects, so that what hooks collect is collected where it was.

    Args:
        model: The model.
        made: Its copy, by ``copy.deepcopy``; changed in place.
        memo: Copies by the ids of what they are copies of.

    Raises:
        RewriteError: If a function finds a module of the model in a global, or behind an object of another kind, where
            no copy can take its place.
    """
    originals = {id(module) for module in model.modules()} - {id(module) for module in made.modules()}
    copies = {key: memo[key] for key in originals if key in memo}
    copies |= {id(t): memo[id(t)] for t in (*model.parameters(), *model.buffers()) if id(t) in memo}
    rebound = _Rebound(copies)
    for path, module in made.named_modules():
        for name, value in list(module.__dict__.items()):
            if name not in _OWN:
                where = f"{path or 'the model'}.{name}" if "hooks" not in name else f"a hook of {path or 'the model'}"
                module.__dict__[name] = rebound.put(value, where)


class _Rebound:
    """Functions as they are for a copy.

    Args:
        copies: Of modules and tensors, by the ids of the originals.
    """

    def __init__(self, copies: Mapping[int, Any]) -> None:
        self._copies = copies
        self._done: dict[int, Any] = {}

    def put(self, value: Any, where: str) -> Any:
        """An attribute of the copy; functions in its own lists and dicts are replaced in their places."""
        if isinstance(value, dict):
            for key, item in list(value.items()):
                if _is_function(item) and (new := self.of(item, where)) is not item:
                    value[key] = new
        elif isinstance(value, list):
            for at, item in enumerate(value):
                if _is_function(item) and (new := self.of(item, where)) is not item:
                    value[at] = new
        elif _is_function(value):
            return self.of(value, where)
        return value

    def of(self, value: Any, where: str) -> Any:
        """Returns the copy of a value; the value itself where it refers to nothing of the original."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        if id(value) in self._done:
            return self._done[id(value)]
        if isinstance(value, types.FunctionType):
            return self._function(value, where)
        if isinstance(value, types.MethodType):
            owner = self.of(value.__self__, where)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            func, args = self.of(value.func, where), [self.of(arg, where) for arg in value.args]
            named = {key: self.of(arg, where) for key, arg in value.keywords.items()}
            pairs = zip(
                (func, *args, *named.values()), (value.func, *value.args, *value.keywords.values()), strict=True
            )
            return value if all(a is b for a, b in pairs) else functools.partial(func, *args, **named)
        if type(value) in (list, tuple, set) and len(value) <= _MOST:
            items = [self.of(item, where) for item in value]
            return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
        if type(value) is dict and len(value) <= _MOST:
            items = [(self.of(key, where), self.of(item, where)) for key, item in value.items()]
            same = all(a is c and b is d for (a, b), (c, d) in zip(items, value.items(), strict=True))
            return value if same else dict(items)
        return value

    def _function(self, function: types.FunctionType, where: str) -> types.FunctionType:
        self._check(function, where)
        cells = function.__closure__ or ()
        filled = _cells(function)
        made = [types.CellType() for _ in cells]
        new = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(made) or None
        )
        self._done[id(function)] = new  # it may refer to itself
        changed = False
        for name, cell, own in zip(function.__code__.co_freevars, made, cells, strict=True):
            if name in filled:
                value = self.of(own.cell_contents, where)
                cell.cell_contents = value
                changed |= value is not own.cell_contents and value is not new
        new.__defaults__ = self.of(function.__defaults__, where)
        new.__kwdefaults__ = self.of(function.__kwdefaults__, where)
        changed |= new.__defaults__ is not function.__defaults__ or new.__kwdefaults__ is not function.__kwdefaults__
        if not changed:
            self._done[id(function)] = function
            return function
        new.__dict__.update({key: self.of(value, where) for key, value in function.__dict__.items()})
        new.__qualname__, new.__module__, new.__doc__ = function.__qualname__, function.__module__, function.__doc__
        return new

    def _check(self, function: types.FunctionType, where: str) -> None:
        for name, value in _globals(function).items():
            if any(id(each) in self._copies for each in referred(value)):
                raise RewriteError(
                    f"{where} is a function that reads the global {name!r}, which belongs to this model: in a copy it "
                    "would go on using the dense original. Write it as a method (types.MethodType) or a closure, or "
                    "rewrite the model itself with inplace=True and no example inputs"
                )
        for name, value in _cells(function).items():
            hidden = vars(value).values() if _is_foreign(value) else ()
            if where.endswith(".forward") and any(id(r) in self._copies for v in hidden for r in referred(v)):
                raise RewriteError(
                    f"{where} is a function whose {name!r}, a {type(value).__name__}, belongs to this model: in a copy "
                    "it would go on using the dense original. Write it as a method (types.MethodType), or rewrite the "
                    "model itself with inplace=True and no example inputs"
                )


def _is_function(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, functools.partial))


def _is_foreign(value: Any) -> bool:
    """Returns whether it is an object of some class, whose attributes nobody else looks at."""
    known = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType)
    return hasattr(value, "__dict__") and not isinstance(value, known)


def _items(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value
    return list(inside) if isinstance(value, (list, tuple, dict, set)) else [value]


def _cells(function: types.FunctionType) -> dict[str, Any]:
    """Values of a function's closure, by name."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return found


def _defaults(function: types.FunctionType) -> list[Any]:
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """Globals that a function reads, but for functions and classes, by name."""
    waiting, names = [function.__code__], set()
    while waiting:
        code = waiting.pop()
        names |= {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    found = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    plain = (types.FunctionType, types.ModuleType, type)
    return {name: value for name, value in found.items() if not isinstance(value, plain)}
