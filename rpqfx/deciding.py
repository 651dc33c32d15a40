"""All sites of a model decided at once, by a policy or by any callable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rpqfx.decision import Hold, Skip, as_decision
from rpqfx.errors import PolicyError
from rpqfx.policy import Decide, Policy
from rpqfx.site import Site


def decide_all(
    policy: Policy | Decide,
    sites: Sequence[Site],
    other_bytes: int = 0,
    importance: Mapping[str, float] | None = None,
) -> tuple[dict[str, Hold | Skip], list[str]]:
    """Decisions of a policy, or of any callable from a site to a spec or a skip.

    Args:
        policy: A [`Policy`][rpqfx.policy.Policy], or a callable ``Site -> CodebookSpec | Hold | Skip``.
        sites: All sites of a model.
        other_bytes: Bytes of the model's other tensors.
        importance: As in [`decide`][rpqfx.policy.Policy.decide].

    Returns:
        Decisions by site name, and notes for the report.

    Raises:
        PolicyError: If nothing at all would be rewritten, or an answer does not fit its site.
    """
    if isinstance(policy, Policy):
        decisions = policy.decide(sites, other_bytes, importance)
        notes = [f"rule {rule.match!r} matches no site" for rule in policy.unmatched_rules(sites)]
    else:
        decisions = {s.name: Skip(s.blocked) if s.blocked else as_decision(s, policy(s)) for s in sites}
        notes = []
    if not any(isinstance(decision, Hold) for decision in decisions.values()):
        raise PolicyError(_nothing(decisions, notes))
    return decisions, notes


def _nothing(decisions: Mapping[str, Hold | Skip], notes: Iterable[str]) -> str:
    if not decisions:
        return "the model has no weight of two or more axes, so there is nothing to rewrite"
    said = [f"{name}: {d.reason}" for name, d in decisions.items() if isinstance(d, Skip)]
    more = f"; and {len(said) - 5} more" if len(said) > 5 else ""
    return "the policy rewrites nothing. " + "; ".join([*notes, *said[:5]]) + more
