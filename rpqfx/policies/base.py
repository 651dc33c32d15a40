"""The base of all policies: which rule holds, and one JSON form, which says the class, a version and what differs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from rpqfx.errors import PolicyError
from rpqfx.validation.strict_json import read_object
from rpqfx.validation.values import shown

VERSION = 1  # of the JSON
_CLASS = "policy"  # the field of the JSON that says the class


class PolicyBase:
    """Gives a frozen dataclass with ``rules`` its JSON, and finds the rule that holds."""

    goes_with: ClassVar[str]
    """The call that takes such policies."""
    rule: ClassVar[type]
    """The class of its rules."""

    rules: tuple[Any, ...]

    def rule_for(self, what: Any) -> Any:
        """Returns the rule that a site, or the module of a name, follows: the first that matches; or None."""
        return next((rule for rule in self.rules if rule.matches(what)), None)

    def _check_rules(self) -> None:
        """Makes the rules a tuple; raises an error where they are no sequence of rules."""
        rules, name = self.rules, self.rule.__name__
        if isinstance(rules, self.rule):
            raise PolicyError(
                f"rules is a sequence of {name}s, got one {name}; put it in a tuple: rules=({name}(...),)"
            )
        if not isinstance(rules, Sequence) or isinstance(rules, str):
            raise PolicyError(f"rules is a sequence of {name}s, got {shown(rules)}")
        for each in rules:
            if not isinstance(each, self.rule):
                raise PolicyError(f"rules are {name} values, got {shown(each)}; write {name}('a glob', ...)")
        object.__setattr__(self, "rules", tuple(rules))

    def defaults(self) -> dict[str, Any]:
        """Returns the values that fields have where they are left out."""
        return _defaults(self)

    def to_json(self) -> str:
        """Returns the policy as JSON: its class, the version of the form, and what differs from the defaults.

        Raises:
            PolicyError: If a rule matches by a predicate, which is code.
        """
        if any(callable(rule.match) for rule in self.rules):
            raise PolicyError("a rule with a predicate is code and has no JSON; match by name or by type instead")
        return json.dumps({_CLASS: type(self).__name__, "version": VERSION, **_values(self, self.defaults())}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Makes the policy that ``to_json`` wrote.

        Args:
            text: The JSON.

        Raises:
            PolicyError: If the text is no such policy, or of another version.
        """
        name = cls.__name__
        values = read_object(text, name)
        kind, version = values.pop(_CLASS, None), values.pop("version", None)
        if kind != name:
            said = f"says {shown(kind)}, where {name!r} is expected" if kind is not None else f"is to say {name!r}"
            raise PolicyError(f"this JSON is not a {name}: its field {_CLASS!r} {said}")
        if type(version) is not int or version != VERSION:
            raise PolicyError(f"the {name} is of version {shown(version)}, this library reads {VERSION}")
        try:
            rules = values.pop("rules", [])
            if not isinstance(rules, list) or not all(isinstance(each, dict) for each in rules):
                raise PolicyError(f"rules are a list of objects, got {shown(rules)}")
            return cls(**{**cls.decoded(values), "rules": tuple(cls.rule(**each) for each in rules)})
        except PolicyError as error:
            raise PolicyError(f"this JSON is not a {name}: {error}") from error

    @classmethod
    def decoded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields that the values of a JSON stand for, the rules apart."""
        return values


def _defaults(value: Any) -> dict[str, Any]:
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(value)
    }


def _values(value: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what differs from defaults, as JSON has it."""
    names = sorted((field.name for field in dataclasses.fields(value)), key=lambda name: name != "match")
    found = {name: getattr(value, name) for name in names}  # rules begin with what they are for
    return {name: _encoded(one) for name, one in found.items() if one != defaults[name]}


def _encoded(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {type(value).__name__: _values(value, _defaults(value))}
    if isinstance(value, tuple):  # of rules, of which all are of one class, or of plain values
        return [_values(one, _defaults(one)) if dataclasses.is_dataclass(one) else one for one in value]
    return value
