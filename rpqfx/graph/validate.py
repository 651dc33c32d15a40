"""Decisions held against the sites that they are about, before anything is done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import RewriteError
from rpqfx.nn.layout import Layout
from rpqfx.policies.decision import KeepDense, Quantize, as_decision
from rpqfx.policies.site import Site


def settle(
    decisions: Mapping[str, CodebookSpec | Quantize | KeepDense], sites: Sequence[Site]
) -> dict[str, Quantize | KeepDense]:
    """Decisions that can be carried out.

    Args:
        decisions: By site name; sites without one are left alone.
        sites: All sites of the model.

    Returns:
        The same, specs made into decisions.

    Raises:
        RewriteError: If a decision names no site, or one that cannot be rewritten, or does not fit it.
        PolicyError: If a spec fits neither side of its site.
    """
    by_name = {site.name: site for site in sites}
    unknown = sorted(set(decisions) - set(by_name))
    if unknown:
        raise RewriteError(f"decisions for sites that the model does not have: {', '.join(unknown[:5])}")
    settled = {name: as_decision(by_name[name], decision) for name, decision in decisions.items()}
    for name, decision in settled.items():
        if isinstance(decision, Quantize) and by_name[name].blocked is not None:
            raise RewriteError(f"{name} cannot be quantized: {by_name[name].blocked}")
    return settled


def groups_of(held: Mapping[str, Quantize]) -> dict[object, list[str]]:
    """Names of sites that share codebooks, together; every other site alone.

    Args:
        held: By site name.
    """
    groups: dict[object, list[str]] = defaultdict(list)
    for name, decision in held.items():
        key = name if decision.group is None else (decision.group, *decision.shared)
        groups[key].append(name)
    return groups


def layout_of(site: Site, decision: Quantize) -> Layout:
    """Returns how a site's tensor is seen as vectors, by a decision.

    Args:
        site: The site.
        decision: The decision.

    Raises:
        RewriteError: If the decision's vectors are not the site's.
    """
    layout = site.layout(decision.split, decision.experts)
    if (layout.num_vectors, layout.dim) != (decision.spec.num_vectors, decision.spec.dim):
        raise RewriteError(
            f"{site.name}: the decision has {decision.spec.num_vectors} vectors of length {decision.spec.dim}, the "
            f"site {layout.num_vectors} of length {layout.dim} with split={decision.split!r}"
        )
    if decision.spec.column_scale_group % site.taps:
        raise RewriteError(
            f"{site.name}: {decision.spec.column_scale_group} elements of a filter share a factor, which the "
            f"{site.taps} taps of a channel must; give the spec column_scale_group={site.taps}"
        )
    return layout
