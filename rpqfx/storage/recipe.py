"""Recipes in files that say which class makes a model, and with which arguments: names and plain values, never code.

A file comes from anywhere, so what it names is never imported because of it: the class has to be one that this process
has imported already, a module's, and is called with what JSON can say.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rpqfx.errors import FormatError, InputError
from rpqfx.validation.values import shown

CLASS, ARGUMENTS = "class", "arguments"


def recipe_of(build: Any, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns what a file says of a class and its arguments.

    Args:
        build: A subclass of ``torch.nn.Module`` that other processes can import.
        arguments: Its keyword arguments: numbers, strings, booleans, None, and lists and dicts of these.

    Raises:
        InputError: If it is anything else.
    """
    if not isinstance(build, type) or not issubclass(build, nn.Module):
        raise InputError(f"build is a class of the dense model, which the file names, got {shown(build)}")
    name = f"{build.__module__}:{build.__qualname__}"
    if build.__module__ == "__main__" or _found(name) is not build:
        raise InputError(
            f"build is a class that another process can import, and {name} is not found by its name; define it at the "
            "top of a module"
        )
    given = {} if arguments is None else arguments
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise InputError(f"arguments is a dict of keyword arguments by name, got {shown(arguments)}")
    for key, value in given.items():
        if not _is_plain(value):
            raise InputError(
                f"arguments[{key!r}] is a number, a text, a boolean, None, or a list or dict of these, got "
                f"{shown(value)}"
            )
    return {CLASS: name, ARGUMENTS: copy.deepcopy(dict(given))}


def is_recipe(value: Any) -> bool:
    """Returns whether a manifest's value is one that ``recipe_of`` could have returned.

    Args:
        value: A value read from JSON.
    """
    if type(value) is not dict or value.keys() != {CLASS, ARGUMENTS} or type(value[ARGUMENTS]) is not dict:
        return False
    parts = value[CLASS].split(":") if type(value[CLASS]) is str else ()
    return len(parts) == 2 and all(name.isidentifier() for part in parts for name in part.split("."))


def builder_of(recipe: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Returns what makes the dense model.

    Args:
        recipe: Recipe of a manifest, checked.

    Raises:
        FormatError: If the class is none of this process, or no module's. The message goes on from the file's name.
    """
    module, _, name = recipe[CLASS].partition(":")
    if module not in sys.modules:
        raise FormatError(
            f"names the class {name} of {module}, which has not been imported, and a file imports nothing by itself: "
            f"import {module} before, or pass a build function"
        )
    kind = _found(recipe[CLASS])
    if kind is None:
        raise FormatError(
            f"names the class {name} of {module}, where there is no such module class; pass a build function"
        )
    return functools.partial(kind, **copy.deepcopy(recipe[ARGUMENTS]))


def _found(name: str) -> type[nn.Module] | None:
    """Returns the class of this name, where its module has been imported and the name is one of classes only."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = vars(found).get(part) if found is not None else None
        if not isinstance(found, type):
            return None
    return found if issubclass(found, nn.Module) else None


def _is_plain(value: Any) -> bool:
    """Returns whether JSON gives a value back, of the same types."""
    try:
        back = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return False
    return _same(value, back)


def _same(value: Any, back: Any) -> bool:
    if type(value) is not type(back):
        return False
    if isinstance(value, dict):
        return value.keys() == back.keys() and all(_same(value[key], back[key]) for key in value)
    if isinstance(value, list):
        return len(value) == len(back) and all(map(_same, value, back))
    return bool(value == back)
