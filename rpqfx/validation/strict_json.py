"""JSON as policies are written in: no NaN, no field twice, nothing that Python chokes on."""

from __future__ import annotations

import json
from typing import Any

from rpqfx.errors import PolicyError
from rpqfx.validation.values import shown


def read_object(text: Any, what: str) -> dict[str, Any]:
    """The fields of a JSON object.

    Args:
        text: The JSON.
        what: It is to be, for messages: ``"policy"``.

    Raises:
        PolicyError: If the text is no JSON, or another value than an object; if a field occurs twice, or a number is
            no number.
    """
    if not isinstance(text, str):
        raise PolicyError(f"a {what} is read from the text of its JSON, got {shown(text)}; read the file first")
    try:
        values = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except PolicyError as error:
        raise PolicyError(f"this JSON is not a {what}: {error}") from error
    except (ValueError, RecursionError) as error:  # also of integers of thousands of digits, and of deep nesting
        raise PolicyError(f"this is not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise PolicyError(f"this JSON is not a {what}: it is {shown(values)}, where an object with fields is expected")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PolicyError(f"the field {shown(twice)} occurs twice")
    return found


def _no_constant(name: str) -> Any:
    raise PolicyError(f"{name} is no number")
