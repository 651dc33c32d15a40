"""The three ways in which a policy decides, and which options each of them leaves to be given.

A plain policy does what its options say. Under a budget of bytes (``"budget"``) and under a rate of bits a weight
(``"rate"``) some of them are chosen for each weight, so that giving them would do nothing: those are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rpqfx.errors import PolicyError
from rpqfx.policies.options import Options, Rule
from rpqfx.validation.values import shown

if TYPE_CHECKING:
    from rpqfx.policies.policy import Policy

Mode = Literal["plain", "budget", "rate"]

_PLAIN: dict[str, Any] = {
    "bits": 8, "stages": 1, "sharing": "own", "experts": "shared", "split": "auto", "scale": False, "dim_scale": False,
    "signs": False, "grad_scale": "sum", "init": "fit", "plan": "auto", "min_size": 4096, "allow_growth": False,
}  # fmt: skip
FREE_OF_RATE = ("grad_scale", "plan", "min_size")
"""Options that bits a weight leave to be given."""
_KEPT_BY_RATE = (*FREE_OF_RATE, "init", "allow_growth")

DEFAULTS: Mapping[Mode, Mapping[str, Any]] = {
    "plain": _PLAIN,
    "budget": {name: value for name, value in _PLAIN.items() if name not in ("bits", "sharing")},
    "rate": {name: _PLAIN[name] for name in _KEPT_BY_RATE},
}
"""Values of options that are left out; an option that is not listed is chosen, or has no value of its own."""

_SHAPED = "give it in a Rule that sets codebook_dim, codebooks or bits"


def mode_of(policy: Policy) -> Mode:
    """Says in which way a policy decides."""
    if policy.bits_per_weight is not None:
        return "rate"
    return "plain" if policy.ratio is None and policy.total_bytes is None else "budget"


def check_mode(policy: Policy, rules: Sequence[Rule]) -> None:
    """Sees that every option of a policy, and of its rules, does something in its mode.

    Args:
        policy: The policy, its defaults filled in.
        rules: Its rules.

    Raises:
        PolicyError: If one would do nothing; names it, and what to do instead.
    """
    mode = mode_of(policy)
    if mode == "plain":
        return
    if (found := _idle(policy, mode)) is not None:
        name, why = found
        raise PolicyError(f"{name}={getattr(policy, name)!r} would do nothing: {why}; leave it out, or {_SHAPED}")
    for rule in rules:
        if rule.init == "random" and mode == "rate":
            raise PolicyError(f"the rule for {shown(rule.match)} has init='random', but {_ALWAYS_FITTED}; leave it out")
        if not rule.sets_shape and (found := _idle(rule, mode)) is not None:
            name, why = found
            raise PolicyError(
                f"{name}={getattr(rule, name)!r} of the rule for {shown(rule.match)} would do nothing: {why}; leave it "
                "out, or set codebook_dim, codebooks or bits in the rule as well, so that its weights have a shape of "
                "their own"
            )


_ALWAYS_FITTED = "bits_per_weight fits codebooks to the weights that are there (Policy.from_scratch draws them)"


def _idle(options: Options, mode: Mode) -> tuple[str, str] | None:
    """The first option that a mode does not look at, and why."""
    if mode == "budget":
        if options.allow_growth:
            return "allow_growth", "under a budget no weight is given more bytes than it has"
        if options.sharing in ("shape", "role"):
            return "sharing", "a budget trades layers off one by one, so it can give each its own codebooks or one"
        return None
    for name in Options.__dataclass_fields__:
        if name not in _KEPT_BY_RATE and getattr(options, name) is not None:
            return name, f"bits_per_weight chooses {name} for each weight"
    if options.allow_growth:
        return "allow_growth", "bits_per_weight holds for all weights together, so no weight may grow"
    if options.init == "random":
        return "init", _ALWAYS_FITTED
    return None
