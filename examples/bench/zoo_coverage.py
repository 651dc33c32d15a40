"""What became of every weight of a model: quantized, left by the policy, no weight at all, or missed."""

from __future__ import annotations

from typing import Any

from torch import nn

import rpqfx

CLASSES = ("rewritten", "policy", "no weight", "missed")


def coverage(dense: nn.Module, small: nn.Module | None, held: set[str]) -> dict[str, Any]:
    """Sorts every Parameter with two or more axes, by what the model itself has and not by what the report counts.

    Args:
        dense: The model as it was.
        small: The rewritten one, or None where it could not be rewritten.
        held: Names of the Parameters that are quantized.

    Returns:
        Bytes and number of each class, and every tensor that is missed, with name, shape, bytes and reason.
    """
    skipped = rpqfx.report(small).skipped if small is not None else ()
    reasons = {name: site.reason for site in skipped for name in site.names}
    unknown = "the report does not name it" if small is not None else "the model was not rewritten"
    names: dict[int, list[str]] = {}
    tensors = {}
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1:
            names.setdefault(id(parameter), []).append(name)
            tensors[id(parameter)] = parameter
    sums: dict[str, Any] = {kind: {"bytes": 0, "count": 0} for kind in CLASSES}
    told: dict[str, list[dict[str, Any]]] = {"missed": [], "no weight": []}
    for key, parameter in tensors.items():
        reason = next((reasons[name] for name in names[key] if name in reasons), None)
        kind = "rewritten" if held & set(names[key]) else _class(reason)
        if kind == "missed" and (parameter.numel() < 4096 or sum(n > 1 for n in parameter.shape) < 2):
            kind = "policy"  # it would not have been rewritten either way
        sums[kind]["bytes"] += parameter.nbytes
        sums[kind]["count"] += 1
        if kind in told:
            line = {"name": names[key][0], "shape": list(parameter.shape), "bytes": parameter.nbytes}
            told[kind].append({**line, "reason": reason or unknown})
    unnamed = [line["name"] for line in told["missed"] if line["reason"] == unknown] if small is not None else []
    return {
        "state": "failed" if unnamed else "ok",
        "detail": f"{unnamed[0]}: {unknown}" if unnamed else "",
        "sums": sums,
        "missed": told["missed"],
        "no_weight": told["no weight"],
    }


def _class(reason: str | None) -> str:
    if reason is None:
        return "missed"
    if "fewer than min_size" in reason or reason.startswith("would not shrink"):
        return "policy"
    return "no weight" if reason.startswith("used by") and "not as a weight of" in reason else "missed"


def share(sums: list[dict[str, Any]]) -> float:
    """Bytes rewritten or left by the policy, over those of all weights."""
    done = sum(s["rewritten"]["bytes"] + s["policy"]["bytes"] for s in sums)
    missed = sum(s["missed"]["bytes"] for s in sums)
    return done / (done + missed) if done + missed else 1.0
