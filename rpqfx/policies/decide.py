"""Decides all sites of a model at once, by a policy or by any callable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rpqfx.errors import PolicyError
from rpqfx.policies.amount import EMBEDDING_BITS, Rate
from rpqfx.policies.decision import KeepDense, Quantize, as_decision
from rpqfx.policies.policy import Decide, Policy
from rpqfx.policies.site import Site


def decide_all(
    policy: Policy | Decide,
    sites: Sequence[Site],
    other_bytes: int = 0,
    importance: Mapping[str, float] | None = None,
) -> tuple[dict[str, Quantize | KeepDense], list[str]]:
    """Returns the decisions of a policy, or of any callable from a site to a spec or a skip.

    Args:
        policy: A [`Policy`][rpqfx.policies.policy.Policy], or a callable from a ``Site`` to a ``CodebookSpec``, a
            ``Quantize`` or a ``KeepDense``.
        sites: All sites of a model.
        other_bytes: Bytes of the model's other tensors.
        importance: As in [`decide`][rpqfx.policies.policy.Policy.decide].

    Returns:
        Decisions by site name, and notes for the report.

    Raises:
        PolicyError: If nothing at all would be rewritten, or an answer does not fit its site.
    """
    if isinstance(policy, Policy):
        decisions = policy.decide(sites, other_bytes, importance)
        notes = _remarks(policy, sites)
    else:
        decisions = {s.name: KeepDense(s.blocked) if s.blocked else as_decision(s, policy(s)) for s in sites}
        notes = []
    if not any(isinstance(decision, Quantize) for decision in decisions.values()):
        raise PolicyError(_nothing(decisions, notes))
    return decisions, notes


def _remarks(policy: Policy, sites: Sequence[Site]) -> list[str]:
    """Returns notes on the parts of a policy that have no effect on these sites."""
    followed = [policy.rule_for(site) for site in sites]
    found = []
    for rule in policy.rules:
        if not any(rule.matches(site) for site in sites):
            found.append(f"rule {rule.match!r} matches no site")
        elif not any(rule is other for other in followed):
            found.append(f"rule {rule.match!r} is never followed: rules before it match every site that it does")
    asked = isinstance(policy.amount, Rate) and policy.amount.embedding_bits not in (None, EMBEDDING_BITS)
    if asked and not any(site.kind in ("embedding", "embedding_bag") for site in sites):
        found.append("embedding_bits: the model has no embedding")
    return found


def _nothing(decisions: Mapping[str, Quantize | KeepDense], notes: Iterable[str]) -> str:
    if not decisions:
        return "the model has no weight of two or more axes, so there is nothing to rewrite"
    said = [f"{name}: {d.reason}" for name, d in decisions.items() if isinstance(d, KeepDense)]
    more = f"; and {len(said) - 5} more" if len(said) > 5 else ""
    return "the policy rewrites nothing. " + "; ".join([*notes, *said[:5]]) + more
