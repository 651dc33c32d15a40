"""Options that are given by name: names that do not exist are refused with the nearest that do."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from rpqfx.errors import PolicyError
from rpqfx.validation.values import closest, shown

T = TypeVar("T", bound=Callable[..., Any])


def spelled(made: T) -> T:
    """Has a dataclass, or a function that makes one, refuse wrong names with a PolicyError that says which there are.

    Args:
        made: The class, or a function whose first parameter is ``self`` or ``cls``; its signature stays. A class may
            say in ``elsewhere`` what to write in place of a name.
    """
    call = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]
    name = f"a {made.__name__}" if isinstance(made, type) else made.__qualname__
    signature = inspect.signature(call)
    known = list(signature.parameters)[1:]

    @functools.wraps(call)
    def checked(self: Any, *args: Any, **options: Any) -> Any:
        wrong = next((name for name in options if name not in known), None)
        if wrong is not None:
            there = getattr(made, "elsewhere", {}).get(wrong)
            hint = closest(wrong, known) if there is None else f"; write {there}"
            raise PolicyError(f"{name} has no option {shown(wrong)}; it has {', '.join(sorted(known)) or 'none'}{hint}")
        try:
            signature.bind(self, *args, **options)
        except TypeError as error:
            example = f"{made.__qualname__}({known[0]}=..., ...)" if known else f"{made.__qualname__}()"
            raise PolicyError(f"{name} is made of options by name, {example}: {error}") from None
        return call(self, *args, **options)

    if not isinstance(made, type):
        return checked  # type: ignore[return-value]
    made.__init__ = checked  # type: ignore[misc]
    return made


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
