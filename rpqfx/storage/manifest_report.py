"""The report of a model from the manifest of its file: nothing is built, and no tensor is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import RPQError
from rpqfx.nn.hosting.backed import SUFFIX
from rpqfx.nn.layout import Layout
from rpqfx.reporting.records import SiteRecord
from rpqfx.reporting.report import Report
from rpqfx.storage.manifest_check import packed_size
from rpqfx.storage.pickle_reader import DTYPES
from rpqfx.storage.restore import record_of

_FLOATS, _INTEGERS = ("codebooks", "scale", "column_scale"), ("codes", "signs")


def report_of(manifest: Mapping[str, Any]) -> Report:
    """Returns what ``report`` returns of the model that a file holds, but for the classes of layers built by hand.

    Args:
        manifest: Manifest of the file, checked.

    Raises:
        RPQError: If the file has no quantized weight, as that of a model whose keys and values alone are.
    """
    if not manifest["sites"]:
        raise RPQError("holds no quantized weights, so there is nothing to report")
    entries = {name: entry for entry in manifest["tensors"] for name in entry["names"]}
    held = {name: site for site in manifest["sites"] for name in site["names"]}
    seen: set[str] = set()
    sites, codebooks, codes = [], 0, 0
    for record in [record_of(values) for values in manifest["records"]] or [_built(site) for site in manifest["sites"]]:
        site = held.get(record.name)
        if site is None:
            sites.append(record)
            continue
        counts = _Counts(entries, record.name, site, seen)
        codebooks += counts.floats
        codes += counts.codes
        shape = tuple(site["layout"]["shape"])
        before = record.before // math.prod(record.shape) * math.prod(shape) or _dense_bytes(entries, site)
        sites.append(
            dataclasses.replace(
                record, shape=shape, spec=CodebookSpec.from_dict(site["spec"]), before=before,
                after=counts.floats + counts.codes, shared=counts.shared, plan=site.get("plan", "auto"),
                stored_code_bits=counts.stored_code_bits, stored_codebook_bits=counts.stored_codebook_bits,
                stored_scale_bits=counts.stored_scale_bits, drawn_stages=counts.drawn_stages,
            )
        )  # fmt: skip
    others = {e["names"][0]: e for e in manifest["tensors"] if e["kind"] != "attribute" and e["names"][0] not in seen}
    other = sum(_nbytes(entry) for entry in others.values())
    dense = sum(site.before for site in sites if site.spec is not None)
    return Report(tuple(sites), dense + other, codebooks, codes, other, tuple(manifest["notes"]))


class _Counts:
    """Bytes and bits of one weight, less those of tensors that were counted before; see ``reporting.counting``."""

    def __init__(self, entries: Mapping[str, Any], name: str, site: Mapping[str, Any], seen: set[str]) -> None:
        spec = CodebookSpec.from_dict(site["spec"])
        self.floats = self.codes = self.shared = self.stored_code_bits = self.stored_codebook_bits = (
            self.stored_scale_bits
        ) = 0
        self.drawn_stages = 0
        for part in (*_FLOATS, *_INTEGERS):
            entry = entries.get(f"{name}{SUFFIX}.{part}")
            if entry is None:
                continue
            new = entry["names"][0] not in seen
            seen.add(entry["names"][0])
            if part in _FLOATS:
                self._count_floats(part, entry, new)
            elif new:
                self._count_integers(part, entry, spec)

    def _count_integers(self, part: str, entry: Mapping[str, Any], spec: CodebookSpec) -> None:
        if part == "signs":
            self.codes += _nbytes(entry)
            self.stored_code_bits += 8 * _nbytes(entry)
            return
        self.codes += math.prod(spec.stored_codes_shape) if spec.tiled else _nbytes(entry)
        self.drawn_stages = len(entry.get("drawn", ()))
        whole = {"packed": {"entries": spec.entries}}  # in a file of earlier versions codes may not be packed
        self.stored_code_bits += 8 * packed_size(entry if self.drawn_stages else {**entry, **whole})

    def _count_floats(self, part: str, entry: Mapping[str, Any], new: bool) -> None:
        if not new:
            self.shared += _nbytes(entry)
            return
        self.floats += _nbytes(entry)
        bits = 8 * math.prod(entry["shape"]) * DTYPES[entry.get("stored", entry["dtype"])].itemsize
        if part == "codebooks":
            self.stored_codebook_bits += bits
        else:
            self.stored_scale_bits += bits


def _built(site: Mapping[str, Any]) -> SiteRecord:
    """Returns the record of a layer that was built by hand."""
    layout = Layout.from_dict(site["layout"])
    return SiteRecord(
        name=site["names"][0], names=tuple(site["names"]), kind="layer", module_type="", shape=layout.shape,
        spec=CodebookSpec.from_dict(site["spec"]), split="column" if layout.transposed else "row",
    )  # fmt: skip


def _dense_bytes(entries: Mapping[str, Any], site: Mapping[str, Any]) -> int:
    books = entries[f"{site['names'][0]}{SUFFIX}.codebooks"]
    return math.prod(site["layout"]["shape"]) * DTYPES[books["dtype"]].itemsize


def _nbytes(entry: Mapping[str, Any]) -> int:
    return math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
