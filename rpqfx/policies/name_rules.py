"""Rules that go by the names of modules, as policies of caches and of routing have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from rpqfx.errors import PolicyError
from rpqfx.validation.values import closest, shown


@dataclass(frozen=True)
class NameRule:
    """Says what differs for the modules whose names match: that they are skipped, or another value of one option.

    Args:
        match: A pattern (as of file names) for the qualified names of modules.
        skip: Why these are left alone, or None where they are not.
    """

    match: str
    skip: str | None = None

    def __post_init__(self) -> None:
        kind, option = type(self).__name__, dataclasses.fields(self)[-1].name
        if not isinstance(self.match, str):
            raise PolicyError(
                f"a {kind} matches modules by a glob on their names, such as '*.attn', got {shown(self.match)}"
            )
        check_skip(self.skip)
        if (self.skip is None) == (getattr(self, option) is None):
            raise PolicyError(
                f"a {kind} either skips or sets {option}; that for {shown(self.match)} has both or neither"
            )

    def matches(self, name: str) -> bool:
        """Returns whether it holds for the module of this name."""
        return fnmatchcase(name, self.match)


def check_skip(skip: Any) -> None:
    """Raises an error unless the reason to skip is words or None."""
    if skip is not None and not isinstance(skip, str):
        raise PolicyError(f"skip is the reason why modules are left alone, in words, or None, got {shown(skip)}")


def check_rules(rules: Iterable[NameRule], names: Sequence[str], what: str) -> None:
    """Raises an error unless every rule is followed somewhere.

    Args:
        rules: The rules.
        names: Names of the modules there are.
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
