"""The options of one weight, written down in part or complete, and rules that override them for some sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from torch import nn

from rpqfx.codebook import GradScale
from rpqfx.errors import PolicyError
from rpqfx.nn.layer import Split
from rpqfx.nn.layout import Experts
from rpqfx.ops import PLANS, Plan
from rpqfx.policies.name_rules import check_skip
from rpqfx.policies.site import Site
from rpqfx.validation.spelling import spelled
from rpqfx.validation.values import flag, one_of, shown, whole

Sharing = Literal["own", "layer", "shape", "role"]
Init = Literal["fit", "random"]

_TYPE = "type:"


@dataclass(frozen=True, kw_only=True)
class PartialOptions:
    """Options as a policy or a rule writes them down, those of ``Options``; None stands for one that is left out."""

    codebook_dim: int | None = None
    num_subvectors: int | Literal["heads"] | None = None
    codebook_bits: int | None = None
    min_codebook_bits: int | None = None
    stages: int | None = None
    sharing: Sharing | None = None
    experts: Experts | None = None
    split: Split | Literal["auto"] | None = None
    scale: bool | None = None
    column_scale: bool | None = None
    signs: bool | None = None
    grad_scale: GradScale | None = None
    init: Init | None = None
    plan: Plan | None = None
    min_size: int | None = None
    allow_growth: bool | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), low, high)
        for name, values in _WORDS.items():
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), values)
        for name in ("scale", "column_scale", "signs", "allow_growth"):
            if getattr(self, name) is not None:
                flag(name, getattr(self, name))
        count = self.num_subvectors
        counts = type(count) is int and 1 <= count <= _LONGEST
        if count is not None and not counts and not (isinstance(count, str) and count == "heads"):
            raise PolicyError(f"num_subvectors is a number from 1 or 'heads', got {shown(count)}")
        if self.codebook_dim is not None and self.num_subvectors is not None:
            raise PolicyError(
                f"give codebook_dim ({self.codebook_dim}) or num_subvectors ({self.num_subvectors}), not both"
            )
        if (
            self.codebook_bits is not None
            and self.min_codebook_bits is not None
            and self.min_codebook_bits > self.codebook_bits
        ):
            raise PolicyError(
                f"min_codebook_bits is how far codebook_bits may be lowered, at most {self.codebook_bits} here, got "
                f"{self.min_codebook_bits}; raise codebook_bits, or leave min_codebook_bits out"
            )

    def given(self) -> dict[str, Any]:
        """Returns the options that are written down, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(PartialOptions)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def sets_shape(self) -> bool:
        """Whether it says how long sub-vectors are, or how many entries there are for them."""
        return any(value is not None for value in (self.codebook_dim, self.num_subvectors, self.codebook_bits))


_LONGEST = 2**31 - 1
_RANGES = {
    "codebook_bits": (1, 16), "min_codebook_bits": (1, 16), "stages": (1, 64), "codebook_dim": (1, _LONGEST),
    "min_size": (0, 2**63 - 1),
}  # fmt: skip
_WORDS = {
    "sharing": ("own", "layer", "shape", "role"),
    "experts": ("shared", "own"),
    "split": ("row", "column", "auto"),
    "grad_scale": ("sum", "sqrt", "mean"),
    "init": ("fit", "random"),
    "plan": PLANS,
}


@dataclass(frozen=True, kw_only=True)
class Options(PartialOptions):
    """All options of one weight, with the values that they have where nothing else is written down.

    Args:
        codebook_dim: Length of a sub-vector; the divisor of the vector length nearest to it is taken. Left out, 64, or
            near it a multiple of a convolution's taps.
        num_subvectors: Number of sub-vectors instead: a number, which must divide, or ``"heads"`` for one an attention
            head (of the model, where a module has none), or the nearest number that divides.
        codebook_bits: ``log2`` of the entries of a codebook.
        min_codebook_bits: Where ``codebook_bits`` would make a layer larger, fewer are tried down to this; left out,
            the layer is left alone then.
        stages: Residual stages.
        sharing: One codebook for each sub-vector (``"own"``), one for the layer (``"layer"``), or for each
            sub-vector one that all layers of equal shape (``"shape"``) or of equal role (``"role"``: their names
            differ in numbers only) share.
        experts: Tensors of experts, ``[E, out, in]``: one set of codebooks for all of them (``"shared"``) or one for
            each (``"own"``).
        split: Vectors along outputs (``"row"``), inputs (``"column"``), or whichever is smaller (``"auto"``).
        scale: A trainable factor for each vector.
        column_scale: A trainable factor for each element of the vectors (a Linear's inputs, where its vectors are
            rows), or for each channel of filters.
        signs: A random fixed sign for each use of an entry.
        grad_scale: How gradients of vectors that share an entry are gathered.
        init: Codebooks fitted to the weights that are there (``"fit"``), or drawn anew with their standard
            deviation (``"random"``), for training from scratch.
        plan: Which way products run: the weight made for each call (``"dequantize"``), the table of dot products
            (``"lookup"``), or the cheaper by a cost model (``"auto"``); [`tune`][rpqfx.timing.tune.tune] measures
            instead.
        min_size: Weights of fewer elements are left alone.
        allow_growth: Whether a layer may become larger than it was.
    """

    codebook_bits: int = 8
    stages: int = 1
    sharing: Sharing = "own"
    experts: Experts = "shared"
    split: Split | Literal["auto"] = "auto"
    scale: bool = False
    column_scale: bool = False
    signs: bool = False
    grad_scale: GradScale = "sum"
    init: Init = "fit"
    plan: Plan = "auto"
    min_size: int = 4096
    allow_growth: bool = False


@spelled
@dataclass(frozen=True, kw_only=True)
class Rule(PartialOptions):
    """Overrides options, or says to skip, for the sites that match; an option that is left out is the policy's.

    Args:
        match: A glob on the qualified name of the Parameter or of its module (``"*.attn.*"``, ``"head"``); a module
            class, which its subclasses match too; or a predicate on the [`Site`][rpqfx.graph.Site].
        skip: Leave matching sites alone, for this reason. A rule that skips says nothing else.

    Raises:
        PolicyError: If an option does not exist or is out of range, or ``match`` is none of these.
    """

    goes_with: ClassVar[str] = "Policy"

    match: str | type[nn.Module] | Callable[[Site], bool] = field(kw_only=False)
    skip: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.match, type):  # by name, so that a rule read from JSON equals the one that was written
            if not issubclass(self.match, nn.Module):
                raise PolicyError(
                    f"a Rule matches by a glob, a module class or a predicate, got the class {self.match.__name__}, "
                    "which is no torch.nn.Module"
                )
            object.__setattr__(self, "match", f"{_TYPE}{self.match.__module__}.{self.match.__qualname__}")
        if not isinstance(self.match, str) and (not callable(self.match) or isinstance(self.match, nn.Module)):
            raise PolicyError(f"a Rule matches by a glob, a module class or a predicate, got {shown(self.match)}")
        check_skip(self.skip)
        super().__post_init__()
        if self.skip is not None and (given := self.given()):
            raise PolicyError(
                f"the rule for {shown(self.match)} skips, so its {next(iter(given))} does nothing; leave out one of "
                "the two"
            )

    def matches(self, site: Site) -> bool:
        """Returns whether this rule is about a site."""
        if callable(self.match):
            return bool(self.match(site))
        assert isinstance(self.match, str)
        if self.match.startswith(_TYPE):
            return any(f"{_TYPE}{t.__module__}.{t.__qualname__}" == self.match for t in site.module_type.__mro__)
        return any(fnmatchcase(name, self.match) for name in (*site.names, *site.module_names))
