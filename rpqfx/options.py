"""What a policy can say, and the rules that say it for some sites only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from rpqfx.codebook import GradScale
from rpqfx.errors import PolicyError
from rpqfx.nn.layer import Split
from rpqfx.nn.layout import Experts
from rpqfx.ops import PLANS, Plan
from rpqfx.site import Site

Sharing = Literal["own", "layer", "shape", "role"]
Init = Literal["fit", "random"]

_TYPE = "type:"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a policy and each of its rules can say; None in a rule means: as the policy.

    Args:
        codebook_dim: Length of a sub-vector; the divisor of the vector length nearest to it is taken. Left
            out, 64, or near it a multiple of a convolution's taps.
        codebooks: Number of sub-vectors instead: a number, which must divide, or ``"heads"`` for one an attention
            head (of the model, where a module has none), or the nearest number that divides.
        bits: ``log2`` of the entries of a codebook.
        min_bits: Where ``bits`` would make a layer larger, fewer are tried down to this; left out, the layer is
            left alone then.
        stages: Residual stages.
        sharing: One codebook for each sub-vector (``"own"``), one for the layer (``"layer"``), or for each
            sub-vector one that all layers of equal shape (``"shape"``) or of equal role (``"role"``: their names
            differ in numbers only) share.
        experts: Tensors of experts, ``[E, out, in]``: one set of codebooks for all of them (``"shared"``) or one for
            each (``"own"``).
        split: Vectors along outputs (``"row"``), inputs (``"column"``), or whichever is smaller (``"auto"``).
        scale: A trainable factor for each vector.
        dim_scale: A trainable factor for each element of the vectors (a Linear's inputs, where its vectors are rows),
            or for each channel of filters.
        signs: A random fixed sign for each use of an entry.
        grad_scale: How gradients of vectors that share an entry are gathered.
        init: Codebooks fitted to the weights that are there (``"fit"``), or drawn anew with their standard
            deviation (``"random"``), for training from scratch.
        plan: Which way products run: the weight made for each call (``"expand"``), the table of dot products
            (``"contract"``), or the cheaper by a cost model (``"auto"``); [`tune`][rpqfx.tune.tune] measures instead.
        min_size: Weights of fewer elements are left alone.
        allow_growth: Whether a layer may become larger than it was.
    """

    codebook_dim: int | None = None
    codebooks: int | Literal["heads"] | None = None
    bits: int | None = None
    min_bits: int | None = None
    stages: int | None = None
    sharing: Sharing | None = None
    experts: Experts | None = None
    split: Split | Literal["auto"] | None = None
    scale: bool | None = None
    dim_scale: bool | None = None
    signs: bool | None = None
    grad_scale: GradScale | None = None
    init: Init | None = None
    plan: Plan | None = None
    min_size: int | None = None
    allow_growth: bool | None = None

    def __post_init__(self) -> None:
        if self.codebook_dim is not None and self.codebooks is not None:
            raise PolicyError(f"give codebook_dim ({self.codebook_dim}) or codebooks ({self.codebooks}), not both")
        for name, low, high in (("bits", 1, 16), ("min_bits", 1, 16), ("stages", 1, 64), ("codebook_dim", 1, None)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < low or (high and value > high)):
                raise PolicyError(f"{name} is a whole number from {low}{f' to {high}' if high else ''}, got {value!r}")
        allowed = {
            "sharing": ("own", "layer", "shape", "role"),
            "experts": ("shared", "own"),
            "split": ("row", "column", "auto"),
            "grad_scale": ("sum", "sqrt", "mean"),
            "init": ("fit", "random"),
            "plan": PLANS,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in (None, *values):
                raise PolicyError(f"{name} is one of {', '.join(values)}, got {getattr(self, name)!r}")
        if self.codebooks not in (None, "heads") and (type(self.codebooks) is not int or self.codebooks < 1):
            raise PolicyError(f"codebooks is a number from 1 or 'heads', got {self.codebooks!r}")
        if self.min_size is not None and (type(self.min_size) is not int or self.min_size < 0):
            raise PolicyError(f"min_size is a number of elements, got {self.min_size!r}")
        for name in ("scale", "dim_scale", "signs", "allow_growth"):
            if getattr(self, name) not in (None, True, False):
                raise PolicyError(f"{name} is True or False, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Rule(Options):
    """Other options, or a skip, for the sites that match.

    Args:
        match: A glob on the qualified name of the Parameter or of its module (``"*.attn.*"``, ``"head"``); a module
            class, which its subclasses match too; or a predicate on the [`Site`][rpqfx.graph.Site].

    Keyword Args:
        skip (str | None): Leave matching sites alone, for this reason.
    """

    match: str | type[nn.Module] | Callable[[Site], bool] = "*"
    skip: str | None = None

    def __init__(self, match: str | type[nn.Module] | Callable[[Site], bool], **options: Any) -> None:
        if isinstance(match, type):  # by name, so that a rule read from JSON equals the one that was written
            match = f"{_TYPE}{match.__module__}.{match.__qualname__}"
        if not isinstance(match, str) and not callable(match):
            raise PolicyError(f"a Rule matches by a glob, a module class or a predicate, got {match!r}")
        known = {field.name: field.default for field in dataclasses.fields(self)}
        wrong = sorted(set(options) - set(known))
        if wrong:
            raise PolicyError(f"a Rule has no option {wrong[0]!r}; it has {', '.join(sorted(known))}")
        for name, value in {**known, **options, "match": match}.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def matches(self, site: Site) -> bool:
        """Whether this rule is about a site."""
        if callable(self.match):
            return bool(self.match(site))
        assert isinstance(self.match, str)
        if self.match.startswith(_TYPE):
            return any(f"{_TYPE}{t.__module__}.{t.__qualname__}" == self.match for t in site.module_type.__mro__)
        return any(fnmatchcase(name, self.match) for name in (*site.names, *site.module_names))
