"""What policies share whose rules go by the names of modules: JSON both ways, and a check that rules match."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from rpqfx.errors import PolicyError

P = TypeVar("P")


class NamedRule(Protocol):
    """A rule for modules whose names match a pattern."""

    @property
    def match(self) -> str:
        """The pattern."""

    def matches(self, name: str) -> bool:
        """Whether it holds for a module of this name."""


def to_json(policy: Any) -> str:
    """A policy, a dataclass with ``rules``, as JSON."""
    return json.dumps(dataclasses.asdict(policy))


def from_json(kind: Callable[..., P], rule: Callable[..., Any], text: str, name: str) -> P:
    """The policy that ``to_json`` wrote.

    Args:
        kind: Its class.
        rule: That of its rules.
        text: The JSON.
        name: Of the class, for messages.

    Raises:
        PolicyError: If the text says something else.
    """
    try:
        held: dict[str, Any] = json.loads(text)
        rules = tuple(rule(**each) for each in held.pop("rules", ()))
        return kind(**held, rules=rules)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError(f"not a {name} in JSON: {error}") from error


def check_rules(rules: Iterable[NamedRule], names: Sequence[str], what: str) -> None:
    """Sees that every rule matches something.

    Args:
        rules: The rules.
        names: Of the modules there are.
        what: One of them, in words.

    Raises:
        PolicyError: If a rule matches none.
    """
    for rule in rules:
        if not any(rule.matches(name) for name in names):
            shown = ", ".join(name or "(the model)" for name in names[:4])
            raise PolicyError(f"the rule for {rule.match!r} matches no {what}; there are {shown}, ...")
