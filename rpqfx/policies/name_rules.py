"""What policies share whose rules go by the names of modules: JSON both ways, and checks of rules."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from rpqfx.errors import PolicyError
from rpqfx.validation.strict_json import read_object
from rpqfx.validation.values import closest, shown

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
    held = read_object(text, name)
    try:
        rules = rules_from(held.pop("rules", []), rule)
        return kind(**held, rules=rules)
    except PolicyError as error:
        raise PolicyError(f"this JSON is not a {name}: {error}") from error


def rules_from(values: Any, rule: Callable[..., Any]) -> tuple[Any, ...]:
    """Rules as JSON has them.

    Args:
        values: A list of objects.
        rule: Makes one of an object's fields.

    Raises:
        PolicyError: If it is something else, or a rule is refused.
    """
    if not isinstance(values, list) or not all(isinstance(each, dict) for each in values):
        raise PolicyError(f"rules are a list of objects, got {shown(values)}")
    return tuple(rule(**each) for each in values)


def rules_of(rules: Any, kind: type) -> tuple[Any, ...]:
    """The rules of a policy as a tuple.

    Args:
        rules: What was given.
        kind: Class of a rule.

    Raises:
        PolicyError: If it is no sequence of rules.
    """
    name = kind.__name__
    if isinstance(rules, kind):
        raise PolicyError(f"rules is a sequence of {name}s, got one {name}; put it in a tuple: rules=({name}(...),)")
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise PolicyError(f"rules is a sequence of {name}s, got {shown(rules)}")
    for rule in rules:
        if not isinstance(rule, kind):
            raise PolicyError(f"rules are {name} values, got {shown(rule)}; write {name}('a glob', ...)")
    return tuple(rules)


def check_match(match: Any, kind: str) -> None:
    """Sees that what a rule matches by is a pattern.

    Args:
        match: What was given.
        kind: Class of the rule, for the message.

    Raises:
        PolicyError: If it is none.
    """
    if not isinstance(match, str):
        raise PolicyError(f"a {kind} matches modules by a glob on their names, such as '*.attn', got {shown(match)}")


def check_skip(skip: Any) -> None:
    """Sees that the reason to skip is words or None.

    Args:
        skip: What was given.

    Raises:
        PolicyError: If it is something else.
    """
    if skip is not None and not isinstance(skip, str):
        raise PolicyError(f"skip is the reason why modules are left alone, in words, or None, got {shown(skip)}")


def check_rules(rules: Iterable[NamedRule], names: Sequence[str], what: str) -> None:
    """Sees that every rule is followed somewhere.

    Args:
        rules: The rules.
        names: Of the modules there are.
        what: One of them, in words.

    Raises:
        PolicyError: If a rule matches none, or others before it match all that it does.
    """
    taken: dict[str, str] = {}
    for rule in rules:
        matched = [name for name in names if rule.matches(name)]
        if not matched:
            near = ", ".join(name or "(the model)" for name in names[:4])
            raise PolicyError(
                f"the rule for {shown(rule.match)} matches no {what}; there are {near}, ...{closest(rule.match, names)}"
            )
        if all(name in taken for name in matched):
            raise PolicyError(
                f"the rule for {shown(rule.match)} is never followed: that for {shown(taken[matched[0]])} before "
                f"it matches {matched[0]}, and the first that matches holds; put the narrower rule first"
            )
        for name in matched:
            taken.setdefault(name, rule.match)
