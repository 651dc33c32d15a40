"""Checks of single arguments: what was given, what is expected, and how both are said."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rpqfx.errors import InputError, PolicyError, RPQError

LARGEST = 2**63 - 1
"""The largest whole number that an option takes: what torch counts elements and bytes with."""

_LONG = 80


def shown(value: Any) -> str:
    """Says a value in a message: short whatever its size, and with its type where the text alone does not show it.

    Args:
        value: Anything, an integer of a million digits or a tensor too.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        return f"an integer of {value.bit_length()} bits"
    text = " ".join(_repr.repr(value).split())
    text = text if len(text) <= _LONG else f"{text[: _LONG - 4]} ..."
    plain = value is None or type(value) in (bool, int, float, str, tuple, list, dict)
    return text if plain or isinstance(value, type) or callable(value) else f"{text} ({type(value).__name__})"


def whole(
    name: str, value: Any, low: int, high: int = LARGEST, *, what: str = "", error: type[RPQError] = PolicyError
) -> None:
    """Sees that an argument is a whole number within a range.

    Args:
        name: Of the argument.
        value: What was given. NumPy's integers, tensors and booleans are no whole numbers here: policies are compared,
            hashed and written as JSON.
        low: The smallest.
        high: The largest.
        what: Of what it is a number, for the message.
        error: What to raise.

    Raises:
        RPQError: Of the class ``error``, if it is none.
    """
    if type(value) is int and low <= value <= high:
        return
    limits = f"from {low}" if high == LARGEST else f"from {low} to {high}"
    hint = ""
    if type(value) is not int and not isinstance(value, (bool, str)):
        try:
            near = int(value)
            hint = f"; give {near}" if near == value and low <= near <= high else ""
        except Exception:  # whatever the type makes of int()
            hint = ""
    raise error(f"{name} is a whole number {what + ' ' if what else ''}{limits}, got {shown(value)}{hint}")


def number(
    name: str, value: Any, meaning: str, holds: Callable[[float], bool], *, error: type[RPQError] = PolicyError
) -> None:
    """Sees that an argument is a real number (int or float, not a boolean or NaN) for which something holds.

    Args:
        name: Of the argument.
        value: What was given.
        meaning: What is expected, for the message.
        holds: Whether a number is in range.
        error: What to raise.

    Raises:
        RPQError: Of the class ``error``, if it is none or out of range.
    """
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or value != value or not holds(value):
        raise error(f"{name} is {meaning}, got {shown(value)}")


def flag(name: str, value: Any, *, error: type[RPQError] = PolicyError) -> None:
    """Sees that an argument is True or False.

    Args:
        name: Of the argument.
        value: What was given.
        error: What to raise.

    Raises:
        RPQError: Of the class ``error``, if it is neither.
    """
    if type(value) is not bool:
        raise error(f"{name} is True or False, got {shown(value)}")


def one_of(name: str, value: Any, values: Sequence[str], *, error: type[RPQError] = PolicyError) -> None:
    """Sees that an argument is one of some words.

    Args:
        name: Of the argument.
        value: What was given.
        values: The words.
        error: What to raise.

    Raises:
        RPQError: Of the class ``error``, if it is none of them; names the one that is spelled most like it.
    """
    if type(value) is not str or value not in values:
        raise error(f"{name} is one of {', '.join(values)}, got {shown(value)}{closest(value, values)}")


def check_seed(seed: Any) -> None:
    """Sees that a seed is one that ``torch.manual_seed`` takes.

    Args:
        seed: What was given.

    Raises:
        InputError: If it is no whole number from 0.
    """
    whole("seed", seed, 0, error=InputError)


def closest(name: Any, known: Iterable[str]) -> str:
    """Says which known name is spelled most like another, as the end of a message; nothing where none is near.

    Args:
        name: The name that is not known.
        known: Those that are.
    """
    if not isinstance(name, str) or len(name) > _LONG:
        return ""
    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _LONG
