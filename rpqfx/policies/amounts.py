"""Checks of what a policy is asked for: how much, and which kinds of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from rpqfx.errors import PolicyError
from rpqfx.policies.site import Kind
from rpqfx.validation.values import number, one_of, shown, whole

if TYPE_CHECKING:
    from rpqfx.policies.policy import Policy


def check_amounts(policy: Policy) -> None:
    """Sees that a policy is given at most one amount, and that it can be.

    Args:
        policy: The policy.

    Raises:
        PolicyError: If an amount is out of range, or there are two.
    """
    if policy.ratio is not None:
        meaning = "the size after over the size before, within 0 to 1"
        number("ratio", policy.ratio, meaning, lambda value: 0 < value <= 1)
    if policy.total_bytes is not None:
        whole("total_bytes", policy.total_bytes, 1, what="of bytes")
    for name in ("bits_per_weight", "embedding_bits"):
        if getattr(policy, name) is not None:
            meaning = "a number of bits, above 0 and at most 16"
            number(name, getattr(policy, name), meaning, lambda value: 0 < value <= 16)
    if policy.ratio is not None and policy.total_bytes is not None:
        raise PolicyError("give ratio or total_bytes, not both")
    if policy.bits_per_weight is not None and (policy.ratio is not None or policy.total_bytes is not None):
        raise PolicyError("give bits_per_weight, ratio or total_bytes, not two of them")
    if policy.embedding_bits is not None and policy.bits_per_weight is None:
        raise PolicyError("embedding_bits goes with bits_per_weight; give both, or neither")


def kinds_of(kinds: Any) -> tuple[Kind, ...]:
    """Returns kinds of sites as a tuple.

    Args:
        kinds: A sequence or a set of them.

    Raises:
        PolicyError: If it is neither, or has what is no kind.
    """
    known = get_args(Kind)
    if isinstance(kinds, str) or not isinstance(kinds, (Sequence, set, frozenset)):
        raise PolicyError(f"kinds is a sequence of some of {', '.join(known)}, got {shown(kinds)}; put it in a tuple")
    for kind in kinds:
        one_of("each of kinds", kind, known)
    return tuple(sorted(kinds)) if isinstance(kinds, (set, frozenset)) else tuple(kinds)
