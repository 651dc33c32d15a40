"""A policy as JSON, which says what differs from the defaults, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rpqfx.errors import PolicyError
from rpqfx.policies.modes import DEFAULTS, mode_of
from rpqfx.policies.name_rules import rules_from
from rpqfx.policies.options import Options, Rule
from rpqfx.validation.strict_json import read_object
from rpqfx.validation.values import closest, shown

if TYPE_CHECKING:
    from rpqfx.policies.policy import Policy

_VERSION = 1
_MARK = "rpqfx_policy"


def to_json(policy: Policy) -> str:
    """Writes a policy.

    Args:
        policy: The policy.

    Raises:
        PolicyError: If a rule matches by a predicate, which is code.
    """
    if any(callable(rule.match) for rule in policy.rules):
        raise PolicyError("a rule with a predicate is code and has no JSON; match by name or by type instead")
    fields = {field.name: field.default for field in dataclasses.fields(policy)}
    values = _differences(policy, {**fields, **DEFAULTS[mode_of(policy)]})
    if policy.rules:
        values["rules"] = [{"match": rule.match, **_differences(rule, {"match": rule.match})} for rule in policy.rules]
    return json.dumps({_MARK: _VERSION, **values}, indent=2)


def read(kind: type[Policy], text: str) -> Policy:
    """Reads a policy.

    Args:
        kind: Its class.
        text: What ``to_json`` wrote.

    Raises:
        PolicyError: If the text is no policy, or of a newer version.
    """
    values = read_object(text, "policy")
    if _MARK not in values:
        raise PolicyError(f"this JSON is not a policy: it has no field {_MARK!r}")
    version = values.pop(_MARK)
    if type(version) is not int or version != _VERSION:
        raise PolicyError(f"the policy is of version {shown(version)}, this library reads {_VERSION}")
    known = [field.name for field in dataclasses.fields(kind)]
    if wrong := sorted(set(values) - set(known)):
        raise PolicyError(f"a policy has no option {shown(wrong[0])}{closest(wrong[0], known)}")
    try:
        values["rules"] = rules_from(values.get("rules", []), Rule)
        return kind(**values)
    except PolicyError as error:
        raise PolicyError(f"this JSON is not a policy: {error}") from error


def _differences(options: Options, defaults: Mapping[str, Any]) -> dict[str, Any]:
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "rules"}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value != defaults.get(name)
    }
