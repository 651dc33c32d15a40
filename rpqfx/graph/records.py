"""Attaches the records of a rewrite to its model, for the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from rpqfx.nn.wrappers import modules_within
from rpqfx.policies.decision import KeepDense, Quantize
from rpqfx.policies.site import Site
from rpqfx.reporting.records import SiteRecord, attach_records


def record(
    model: nn.Module,
    sites: Sequence[Site],
    settled: Mapping[str, Quantize | KeepDense],
    errors: Mapping[str, float | None],
    *,
    calibrated: Collection[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """Keeps what was done with a model for its report.

    Args:
        model: The model.
        sites: All its sites.
        settled: What was decided.
        errors: Relative errors of fits; None where nothing was fitted.
        calibrated: Names of what was fitted to what its inputs showed.
        notes: Remarks.
    """
    undecided = KeepDense("no decision")
    known = {path: name for name, path, _ in modules_within(model)}  # without the names of wrappers

    def plain(name: str) -> str:
        path, _, attribute = name.rpartition(".")
        return f"{known[path]}.{attribute}".lstrip(".")

    made = [SiteRecord.of(s, settled.get(s.name, undecided), errors.get(s.name), s.name in calibrated) for s in sites]
    attach_records(
        model,
        [replace(one, name=plain(one.name), names=tuple(plain(name) for name in one.names)) for one in made],
        notes,
    )
