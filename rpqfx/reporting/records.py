"""Records of a rewrite, one for each site, attached to the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rpqfx.codebook import CodebookSpec
from rpqfx.ops import Plan
from rpqfx.policies.decision import KeepDense, Quantize
from rpqfx.policies.site import Site

_ATTRIBUTE = "_rpqfx_records"


@dataclass(frozen=True)
class SiteRecord:
    """One line of a report.

    Args:
        name: Qualified name of the Parameter.
        names: All its names, where it is tied.
        kind: Kind of the site.
        module_type: Class name of its owner.
        shape: Shape of the dense tensor.
        spec: How it is held, or None where it was left alone.
        split: ``"row"`` or ``"column"``.
        init: ``"fit"`` (codebooks fitted to the weight), ``"calibrated"`` (to what the model does with it, as
            calibration showed) or ``"random"`` (drawn anew); None for layers that were built by hand.
        reason: Why it was left alone, or None.
        error: Relative error of the fit, ``|W - W'| / |W|``, when it was made; None where nothing was fitted.
        before: Bytes of the dense tensor.
        after: Bytes of the tensors that are there now.
        shared: Bytes of codebooks that are counted with an earlier site.
        plan: Which way its products run now.
        stored_code_bits: Bits of its codes and signs in a saved file, which holds a seed in the place of codes that are
            drawn.
        stored_codebook_bits: Bits of its codebooks in a saved file, less those counted with an earlier site.
        stored_scale_bits: Bits of its scales in a saved file.
        drawn_stages: Stages of its codes for which a saved file holds the seed.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    module_type: str
    shape: tuple[int, ...]
    spec: CodebookSpec | None = None
    split: str | None = None
    init: str | None = None
    reason: str | None = None
    error: float | None = None
    before: int = 0
    after: int = 0
    shared: int = 0
    plan: Plan = "auto"
    stored_code_bits: int = 0
    stored_codebook_bits: int = 0
    stored_scale_bits: int = 0
    drawn_stages: int = 0

    @property
    def stored_bits(self) -> int:
        """Bits of all its tensors in a saved file; 0 where it was left alone."""
        return self.stored_code_bits + self.stored_codebook_bits + self.stored_scale_bits

    @property
    def bits_per_weight(self) -> float:
        """``stored_bits`` by the elements of the tensor that they stand for."""
        return ratio(self.stored_bits, math.prod(self.shape))

    @classmethod
    def of(
        cls, site: Site, decision: Quantize | KeepDense, error: float | None = None, calibrated: bool = False
    ) -> SiteRecord:
        """Makes the record of a decision.

        Args:
            site: The site.
            decision: The decision.
            error: Error of the fit; None where nothing was fitted, as on the meta device.
            calibrated: Whether it was fitted to what its inputs showed.
        """
        base = cls(
            name=site.name, names=site.names, kind=site.kind, module_type=site.module_type.__name__, shape=site.shape,
            before=site.dense_bytes, after=site.dense_bytes,
        )  # fmt: skip
        if isinstance(decision, KeepDense):
            return dataclasses.replace(base, reason=decision.reason)
        init = "random" if error is None else "calibrated" if calibrated else "fit"
        return dataclasses.replace(base, spec=decision.spec, split=decision.split, init=init, error=error)


def attach_records(model: nn.Module, records: Sequence[SiteRecord], notes: Sequence[str] = ()) -> None:
    """Keeps what a rewrite did with the model it did it to (plain values, copied and pickled with it)."""
    model.__dict__[_ATTRIBUTE] = (tuple(records), tuple(notes))


def attached_records(model: nn.Module) -> tuple[tuple[SiteRecord, ...], tuple[str, ...]] | None:
    """Returns the records that ``attach_records`` kept, or None."""
    return model.__dict__.get(_ATTRIBUTE)


def detach_records(model: nn.Module) -> None:
    """Forgets what ``attach_records`` kept."""
    model.__dict__.pop(_ATTRIBUTE, None)


def ratio(bits: int, weights: int) -> float:
    """Returns bits by weights, or 0 where there are none."""
    return bits / weights if weights else 0.0
