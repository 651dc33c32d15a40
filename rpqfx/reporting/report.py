"""The report of a rewritten model: its sites, reasons where they stayed dense, and bytes before, after and as saved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rpqfx.errors import InputError, RPQError
from rpqfx.nn.hosting.backed import backed_weights
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.wrappers import modules_within, names_within, unwrapped
from rpqfx.reporting.counting import counted, unseen_bytes
from rpqfx.reporting.records import SiteRecord, attached_records, ratio
from rpqfx.reporting.tables import Table, size, to_html, to_markdown, to_text
from rpqfx.reporting.variance import shares_of
from rpqfx.validation.values import shown

_HEAD = ("site", "kind", "N x D", "M", "d", "K", "before", "after", "note")


@dataclass(frozen=True)
class Report:
    """Sites and totals of a model; ``str``, ``to_markdown`` and ``to_html`` show the same data.

    Args:
        sites: Every site, in the model's order.
        before: Bytes of the whole dense model.
        codebooks: Bytes of codebooks and scales, shared ones once.
        codes: Bytes of codes and signs.
        other: Bytes of everything else: biases, norms, buffers, weights left dense.
        notes: Remarks, such as rules that matched nothing.
    """

    sites: tuple[SiteRecord, ...]
    before: int
    codebooks: int
    codes: int
    other: int
    notes: tuple[str, ...] = field(default=())

    @property
    def after(self) -> int:
        """Bytes of the whole model now."""
        return self.codebooks + self.codes + self.other

    @property
    def stored_bits(self) -> int:
        """Bits that all quantized sites take in a saved file, shared codebooks once."""
        return sum(site.stored_bits for site in self.rewritten)

    @property
    def bits_per_weight(self) -> float:
        """``stored_bits`` by ``weights``."""
        return ratio(self.stored_bits, self.weights)

    @property
    def weights(self) -> int:
        """Elements of all quantized tensors."""
        return sum(math.prod(site.shape) for site in self.rewritten)

    @property
    def rewritten(self) -> tuple[SiteRecord, ...]:
        """Sites that are quantized."""
        return tuple(site for site in self.sites if site.spec is not None)

    @property
    def skipped(self) -> tuple[SiteRecord, ...]:
        """Sites that were left alone."""
        return tuple(site for site in self.sites if site.spec is None)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        values = dataclasses.asdict(self)
        for site, record in zip(values["sites"], self.sites, strict=True):
            site["bits_per_weight"] = record.bits_per_weight
        totals = {name: getattr(self, name) for name in ("after", "weights", "stored_bits", "bits_per_weight")}
        return {**values, **totals}

    def table(self) -> Table:
        """Returns the rows and totals that every form shows."""
        return Table(_HEAD, [_row(site) for site in self.sites], _totals(self))

    def __str__(self) -> str:
        return to_text(self.table())

    def to_markdown(self) -> str:
        """Returns a Markdown table with totals."""
        return to_markdown(self.table())

    def to_html(self) -> str:
        """Returns a self-contained HTML page: a bar for each layer, before and after."""
        return to_html(self.table(), [(site.before, site.after, site.spec is not None) for site in self.sites])


def report(model: nn.Module) -> Report:
    """Returns which weights of a model are quantized, which stayed dense and why, and the bytes of all of it.

    Bytes are counted from the tensors that are in the model now; a tensor with several names counts once.

    Args:
        model: A model that ``rpqify`` returned, or any that has RPQ layers. What stands around it or parts of it
            (``torch.compile``, ``DataParallel``, ...) is looked through.

    Returns:
        The report.

    Raises:
        RPQError: If no weight of the model is quantized.
        InputError: If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"report takes a torch.nn.Module, got {shown(model)}; pass the model that rpqify returned")
    model = unwrapped(model)
    held = {
        f"{path}.{name}".lstrip("."): weight
        for path, _, module in modules_within(model)
        for name, weight in backed_weights(module).items()
    }
    if not held:
        raise RPQError("no weight of this model is quantized; pass the model that rpqify returned")
    records, notes = attached_records(model) or (tuple(_found(model, held)), ())
    seen: set[int] = set()
    sites, codebooks, codes = [], 0, 0
    for record in records:
        weight = held.get(record.name)
        if weight is None:
            sites.append(record)
            continue
        now = counted(weight, seen)
        codebooks += now.floats
        codes += now.codes
        shape = weight.layout.shape  # a table may have got more or fewer rows since
        before = record.before // math.prod(record.shape) * math.prod(shape)
        sites.append(
            dataclasses.replace(
                record, shape=shape, spec=weight.spec, before=before, after=now.floats + now.codes, shared=now.shared,
                plan=weight.plan, stored_code_bits=now.stored_code_bits, stored_codebook_bits=now.stored_codebook_bits,
                stored_scale_bits=now.stored_scale_bits, drawn_stages=now.drawn_stages,
            )
        )  # fmt: skip
    other = unseen_bytes([*model.parameters(), *model.buffers()], seen)
    dense = sum(site.before for site in sites if site.spec is not None)
    return Report(tuple(sites), dense + other, codebooks, codes, other, tuple(notes))


def dense_bytes(model: nn.Module) -> int:
    """Returns the bytes of all Parameters and buffers of a model, each tensor once."""
    return unseen_bytes([*model.parameters(), *model.buffers()], set())


def _found(model: nn.Module, held: dict[str, RPQWeight]) -> Iterator[SiteRecord]:
    """Records of RPQ layers that were built by hand."""
    names: dict[int, list[str]] = {}
    known = names_within(model)
    for name, weight in held.items():
        names.setdefault(id(weight), []).append(name)
    for all_names in names.values():
        weight = held[all_names[0]]
        owner = model.get_submodule(known[all_names[0].rpartition(".")[0]])
        shape = weight.layout.shape
        yield SiteRecord(
            name=all_names[0], names=tuple(all_names), kind="layer", module_type=type(owner).__name__, shape=shape,
            spec=weight.spec, split="column" if weight.layout.transposed else "row",
            before=weight.layout.rows * weight.layout.cols * weight.codebooks.element_size(),
        )  # fmt: skip


def _row(site: SiteRecord) -> tuple[str, ...]:
    name = site.name if len(site.names) == 1 else f"{site.name} (= {', '.join(site.names[1:])})"
    if site.spec is None:
        shape = " x ".join(str(n) for n in site.shape)
        return (name, site.kind, shape, "-", "-", "-", size(site.before), size(site.after), f"left: {site.reason}")
    spec = site.spec
    notes = [
        "columns" if site.split == "column" else "",
        f"{spec.stages} stages" if spec.stages > 1 else "",
        f"{spec.num_codebooks} shared codebook{'s' if spec.num_codebooks != 1 else ''}"
        if spec.num_codebooks != spec.num_subvectors
        else "",
        f"{size(site.shared)} shared with earlier sites" if site.shared else "",
        f"plan {site.plan}" if site.plan != "auto" else "",
        "calibrated" if site.init == "calibrated" else "",
        f"fit error {site.error:.3f}" if site.error is not None else "",
    ]
    shape = f"{spec.num_vectors} x {spec.dim}"
    counts = (str(spec.num_subvectors), str(spec.codebook_dim), str(spec.entries))
    return (name, site.kind, shape, *counts, size(site.before), size(site.after), ", ".join(n for n in notes if n))


def _totals(report: Report) -> list[str]:
    share = report.after / report.before if report.before else 1.0
    bits = {
        "codes": sum(site.stored_code_bits for site in report.rewritten),
        "codebooks": sum(site.stored_codebook_bits for site in report.rewritten),
        "scales": sum(site.stored_scale_bits for site in report.rewritten),
    }
    parts = [f"{name} {ratio(count, report.weights):.2f}" for name, count in bits.items() if count]
    drawn = sum(site.drawn_stages > 0 for site in report.rewritten)
    seeds = f"; random codes of {drawn} site{'s' * (drawn > 1)} as a seed" if drawn else ""
    return [
        f"{len(report.rewritten)} of {len(report.sites)} sites quantized; "
        f"{size(report.before)} before, {size(report.after)} after ({share:.1%})",
        f"codebooks and scales {size(report.codebooks)}, codes and signs {size(report.codes)}, "
        f"everything else {size(report.other)}",
        f"{report.bits_per_weight:.2f} bits a weight as saved: {', '.join(parts)}{seeds}",
        *_variance(report.rewritten),
        *report.notes,
    ]


def _variance(sites: Sequence[SiteRecord]) -> list[str]:
    """Says what codebooks that were drawn can carry; those that were fitted have an error instead."""
    drawn = [site.spec for site in sites if site.spec is not None and (site.init == "random" or site.drawn_stages)]
    if not drawn:
        return []
    random, learned = shares_of(drawn)
    return [f"of the variance of a weight random codes carry {random:.1%} at most, learned codes {learned:.1%}"]
