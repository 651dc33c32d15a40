"""Decisions about a site, and the candidates that options leave open."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rpqfx.codebook import CodebookSpec, default_codebook_dim, nearest_divisor
from rpqfx.errors import PolicyError, SpecError
from rpqfx.nn.layer import Split
from rpqfx.nn.layout import Experts
from rpqfx.ops import Plan
from rpqfx.policies.budget import Candidate
from rpqfx.policies.options import Init, Options, PartialOptions, Sharing
from rpqfx.policies.site import Site


@dataclass(frozen=True)
class KeepDense:
    """A decision to leave a site as it is.

    Args:
        reason: Said in the report.
    """

    reason: str


@dataclass(frozen=True)
class Quantize:
    """A decision to quantize a site's weight.

    Args:
        spec: Shape of the codebooks.
        split: Vectors along outputs (``"row"``) or inputs (``"column"``).
        init: Codebooks fitted to the weight, or drawn anew with its standard deviation.
        group: Sites of one group share codebooks where these have one shape and are fitted alike (``shared``).
        plan: Which way its products run.
        experts: Whether experts share codebooks, where it is a tensor of experts.
    """

    spec: CodebookSpec
    split: Split = "row"
    init: Init = "fit"
    group: str | None = None
    plan: Plan = "auto"
    experts: Experts = "shared"

    @property
    def shared(self) -> tuple[object, ...]:
        """The values that sites of one group must agree in to share codebooks: their shape, and how they are fitted."""
        return (self.spec.codebooks_shape, self.spec.scale, self.spec.signs, self.init)


def as_decision(site: Site, answer: CodebookSpec | Quantize | KeepDense) -> Quantize | KeepDense:
    """Returns a spec as a decision: its shape says along which side of the site its vectors lie.

    Args:
        site: The site.
        answer: A spec, or a decision, which is returned as it is.

    Raises:
        PolicyError: If the spec fits neither side, or the answer is something else.
    """
    if isinstance(answer, (Quantize, KeepDense)):
        return answer
    if not isinstance(answer, CodebookSpec):
        raise PolicyError(f"{site.name}: a policy returns a CodebookSpec, a Quantize or a KeepDense, got {answer!r}")
    splits: tuple[Split, ...] = ("row", "column") if site.splits else ("row",)
    sharings: tuple[Experts, ...] = ("shared", "own") if site.experts else ("shared",)
    for experts, split in itertools.product(sharings, splits):
        layout = site.layout(split, experts)
        fits = (layout.num_vectors, layout.dim) == (answer.num_vectors, answer.dim)
        if fits and layout.unit % answer.codebook_dim == 0:
            return Quantize(answer, split, experts=experts)
    row = site.layout("row")
    raise PolicyError(
        f"{site.name}: the spec has {answer.num_vectors} vectors of length {answer.dim}, "
        f"the site {row.num_vectors} of length {row.dim}"
    )


def smallest(site: Site, options: Options) -> Quantize:
    """Returns the site's spec, with the smaller split where the options leave that open.

    Raises:
        PolicyError: If the options ask for what the site cannot give.
    """
    if options.split == "column" and not site.splits:
        raise PolicyError(f"{site.name}: vectors of a {site.kind} lie along its outputs, split='column' cannot be")
    splits: tuple[Split, ...] = ("row",) if not site.splits else ("row", "column")
    splits = splits if options.split == "auto" else (options.split,)
    decisions, errors = [], []
    for split in splits:
        try:
            decisions.append(_quantize(site, options, split))
        except PolicyError as error:  # a count may divide one way and not the other
            errors.append(error)
    if not decisions:
        raise errors[0]
    return min(decisions, key=lambda decision: stored_bytes(site, decision))


def together(members: Sequence[tuple[Site, Options]]) -> dict[str, Quantize | KeepDense]:
    """Decides sites that share one set of codebooks, or a single site, so that all of them together shrink.

    A site takes part where its codes are smaller than its dense tensor; the codebooks are taken on where they are
    smaller than what those sites gain. Otherwise fewer bits are tried, down to ``min_codebook_bits``, and then all are
    left, or with ``allow_growth`` all are quantized with the number of bits that the options give.

    Args:
        members: Sites whose codebooks have one shape, with their options; none empty.

    Returns:
        A decision by site name.

    Raises:
        PolicyError: If the options ask for what a site cannot give.
    """
    options = members[0][1]
    most, growing = options.codebook_bits, options.allow_growth
    tries = [(bits, False) for bits in range(most, min(options.min_codebook_bits or most, most) - 1, -1)]
    for bits, grown in [*tries, (most, True)] if growing else tries:
        if len(members) == 1:
            site, own = members[0]
            decisions = {
                site.name: smallest(site, dataclasses.replace(own, codebook_bits=bits, min_codebook_bits=None))
            }
        else:  # one shape for all: the split stays the one that made them a group
            decisions = {site.name: _with_bits(smallest(site, own), bits) for site, own in members}
        gains = {
            s.name: s.dense_bytes - decisions[s.name].spec.stored_bytes(s.dtype, codebooks=False) for s, _ in members
        }
        taking = {name for name, gain in gains.items() if gain > 0 or grown}
        first = members[0][0]
        codebooks = stored_bytes(first, decisions[first.name]) - (first.dense_bytes - gains[first.name])
        shrinks = sum(gains[name] for name in taking) > codebooks and (not growing or len(taking) == len(members))
        if grown or shrinks:
            return {s.name: decisions[s.name] if s.name in taking else _no_gain(s, own) for s, own in members}
    return {site.name: _no_gain(site, own, len(members)) for site, own in members}


def _with_bits(decision: Quantize, bits: int) -> Quantize:
    return dataclasses.replace(decision, spec=dataclasses.replace(decision.spec, entries=2**bits))


def _no_gain(site: Site, options: Options, sharers: int = 1) -> KeepDense:
    decision = smallest(site, options)
    others = f", and {sharers} sites that share codebooks would not either" if sharers > 1 else ""
    return KeepDense(
        f"would not shrink: {site.dense_bytes:,} bytes dense, {stored_bytes(site, decision):,} with "
        f"{options.codebook_bits} bits for {decision.spec.num_vectors} vectors of length {decision.spec.dim}{others}"
    )


def candidates(site: Site, options: PartialOptions) -> list[Candidate[Quantize | KeepDense]]:
    """Returns every spec that a budget may choose for a site, as its options leave that open, and leaving it dense."""
    found = [Candidate[Quantize | KeepDense](KeepDense("the budget affords it dense"), site.dense_bytes, 0.0)]
    unit = site.layout("row", options.experts or "shared").unit
    lengths = _LENGTHS if options.codebook_dim is None else (options.codebook_dim,)
    dims = sorted({nearest_divisor(unit, d) for d in lengths})
    fewest = options.min_codebook_bits or options.codebook_bits or _FEWEST_BITS
    most = options.codebook_bits or max(_MOST_BITS, fewest)
    sharings: tuple[Sharing, ...] = ("own", "layer") if options.sharing is None else (options.sharing,)
    for d in dims if options.num_subvectors is None else (None,):
        for bits in range(fewest, most + 1):
            for sharing in sharings:
                chosen = {
                    "sharing": sharing,
                    "codebook_bits": bits,
                    "min_codebook_bits": None,
                    **({} if d is None else {"codebook_dim": d}),
                }
                decision = smallest(site, Options(**{**options.given(), **chosen}))
                size = stored_bytes(site, decision)
                if size < site.dense_bytes and decision.spec.users_per_entry > 1:
                    found.append(Candidate(decision, size, _distortion(decision.spec)))
    return found


_LENGTHS = (2, 4, 8, 16, 32, 64, 128)
_FEWEST_BITS, _MOST_BITS = 2, 12


def _quantize(site: Site, options: Options, split: Split) -> Quantize:
    layout = site.layout(split, options.experts)
    dim, count = layout.unit, options.num_subvectors
    if count == "heads":
        if site.heads is None:
            raise PolicyError(f"{site.name}: the model names no number of heads; give num_subvectors as a number")
        d = nearest_divisor(dim, max(1, dim // site.heads))
    elif count is not None:
        if count < 1 or dim % count:
            near = dim // nearest_divisor(dim, max(1, dim // max(1, count)))
            raise PolicyError(
                f"{site.name}: num_subvectors {count} does not divide its vector length {dim}; the nearest that does "
                f"is {near}; give codebook_dim to let the policy choose"
            )
        d = dim // count
    else:
        asked = options.codebook_dim
        d = default_codebook_dim(dim, site.taps) if asked is None else nearest_divisor(dim, asked)
    books = layout.dim // dim if options.sharing == "layer" else None  # one, or one an expert
    try:
        spec = CodebookSpec(
            layout.num_vectors, layout.dim, d, 2**options.codebook_bits, options.stages, books, options.scale,
            options.signs, options.grad_scale, site.taps if options.column_scale else 0,
        )  # fmt: skip
    except SpecError as error:
        raise PolicyError(f"{site.name}: {error}") from error
    group = _group(site, options, layout.dim)
    return Quantize(spec, split, options.init, group, options.plan, options.experts)


def _group(site: Site, options: Options, dim: int) -> str | None:
    if options.sharing == "shape":
        return f"shape {dim} {site.dtype}"
    if options.sharing == "role":
        return ".".join("*" if part.isdigit() else part for part in site.name.split("."))
    return None


def stored_bytes(site: Site, decision: Quantize | KeepDense) -> int:
    """Returns the bytes of a site's tensors after a decision."""
    return site.dense_bytes if isinstance(decision, KeepDense) else decision.spec.stored_bytes(site.dtype)


def _distortion(spec: CodebookSpec) -> float:
    """Returns the expected squared error of unit-variance weights, by rule of thumb: ``4**-rate`` an element."""
    rate = spec.stages * spec.codebook_bits / spec.codebook_dim
    return spec.num_vectors * spec.dim * (1 - 1 / spec.users_per_entry) * 4.0**-rate
