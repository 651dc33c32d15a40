"""Options that are given by name: names that do not exist are refused with the nearest that do."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from rpqfx.errors import PolicyError
from rpqfx.validation.values import closest, shown

T = TypeVar("T", bound=type)


def spelled(cls: T) -> T:
    """Has the constructor of a dataclass refuse wrong names with a PolicyError that says which there are.

    Args:
        cls: The class; its signature stays.
    """
    init = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)
    known = [name for name in signature.parameters if name != "self"]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        wrong = next((name for name in options if name not in known), None)
        if wrong is not None:
            raise PolicyError(
                f"a {cls.__name__} has no option {shown(wrong)}; it has {', '.join(sorted(known))}"
                f"{closest(wrong, known)}"
            )
        try:
            signature.bind(self, *args, **options)
        except TypeError as error:
            raise PolicyError(
                f"a {cls.__name__} is made of options by name, {cls.__name__}({known[0]}=..., ...): {error}"
            ) from None
        init(self, *args, **options)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def shows(function: Any, options: type, names: Collection[str]) -> None:
    """Makes ``help`` and ``inspect.signature`` show options that a class method passes on as ``**options``.

    Args:
        function: The method, bound to its class.
        options: The dataclass whose fields they are.
        names: Of the fields that this method takes.
    """
    signature = inspect.signature(function.__func__)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    taken = {p.name for p in own}
    more = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(options)
        if f.name in names and f.name not in taken
    ]
    function.__func__.__signature__ = signature.replace(parameters=[*own, *more])


def show_options(function: Any, options: Any, defaults: Mapping[str, Any]) -> None:
    """Makes ``help`` and ``inspect.signature`` show the options that a function takes as ``**options: Unpack[...]``.

    Args:
        function: Its last parameter collects them.
        options: The TypedDict of their names and types, of a file with ``from __future__ import annotations``.
        defaults: What each is where it is left out.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=kind.__forward_arg__)
        for name, kind in options.__annotations__.items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *more])


def defaults_of(function: Any) -> dict[str, Any]:
    """Returns the defaults of a function's parameters, by name.

    Args:
        function: Anything with a signature.
    """
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.default is not p.empty}


def check_names(call: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises a TypeError, as Python does, where an option does not exist, and names the nearest that does.

    Args:
        call: What was called.
        given: Names of options.
        known: Those that exist.

    Raises:
        TypeError: If one of them does not exist.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{call} got an unexpected keyword argument {name!r}{closest(name, known)}")
