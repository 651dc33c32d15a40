"""Policies: frozen values that decide, site by site, how a weight is held."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import nn

from rpqfx.budget import Candidate, choose
from rpqfx.codebook import CodebookSpec, GradScale, nearest_divisor
from rpqfx.errors import PolicyError, SpecError
from rpqfx.nn.layer import Split
from rpqfx.site import Kind, Site

Sharing = Literal["own", "layer", "shape", "role"]
Init = Literal["fit", "random"]

_JSON_VERSION = 1
_TYPE = "type:"


@dataclass(frozen=True)
class Skip:
    """A decision to leave a site as it is.

    Args:
        reason: Said in the report.
    """

    reason: str


@dataclass(frozen=True)
class Hold:
    """A decision to hold a site's weight in codebooks.

    Args:
        spec: Shape of the codebooks.
        split: Vectors along outputs (``"row"``) or inputs (``"column"``).
        init: Codebooks fitted to the weight, or drawn anew with its standard deviation.
        group: Sites of one group and one shape of codebooks share them.
    """

    spec: CodebookSpec
    split: Split = "row"
    init: Init = "fit"
    group: str | None = None


Decide = Callable[[Site], CodebookSpec | Hold | Skip]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a policy and each of its rules can say; None in a rule means: as the policy.

    Args:
        codebook_dim: Length of a sub-vector; the divisor of the vector length nearest to it is taken.
        codebooks: Number of sub-vectors instead: a number, which must divide, or ``"heads"`` for one an attention
            head (of the model, where a module has none), or the nearest number that divides.
        bits: ``log2`` of the entries of a codebook.
        min_bits: Where ``bits`` would make a layer larger, fewer are tried down to this; left out, the layer is
            left alone then.
        stages: Residual stages.
        sharing: One codebook for each sub-vector (``"own"``), one for the layer (``"layer"``), or for each
            sub-vector one that all layers of equal shape (``"shape"``) or of equal role (``"role"``: their names
            differ in numbers only) share.
        split: Vectors along outputs (``"row"``), inputs (``"column"``), or whichever is smaller (``"auto"``).
        scale: A trainable factor for each vector.
        signs: A random fixed sign for each use of an entry.
        grad_scale: How gradients of vectors that share an entry are gathered.
        init: Codebooks fitted to the weights that are there (``"fit"``), or drawn anew with their standard
            deviation (``"random"``), for training from scratch.
        min_size: Weights of fewer elements are left alone.
        allow_growth: Whether a layer may become larger than it was.
    """

    codebook_dim: int | None = None
    codebooks: int | Literal["heads"] | None = None
    bits: int | None = None
    min_bits: int | None = None
    stages: int | None = None
    sharing: Sharing | None = None
    split: Split | Literal["auto"] | None = None
    scale: bool | None = None
    signs: bool | None = None
    grad_scale: GradScale | None = None
    init: Init | None = None
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
            "split": ("row", "column", "auto"),
            "grad_scale": ("sum", "sqrt", "mean"),
            "init": ("fit", "random"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in (None, *values):
                raise PolicyError(f"{name} is one of {', '.join(values)}, got {getattr(self, name)!r}")
        if self.codebooks not in (None, "heads") and (type(self.codebooks) is not int or self.codebooks < 1):
            raise PolicyError(f"codebooks is a number from 1 or 'heads', got {self.codebooks!r}")
        if self.min_size is not None and (type(self.min_size) is not int or self.min_size < 0):
            raise PolicyError(f"min_size is a number of elements, got {self.min_size!r}")
        for name in ("scale", "signs", "allow_growth"):
            if getattr(self, name) not in (None, True, False):
                raise PolicyError(f"{name} is True or False, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Rule(Options):
    """Other options, or a skip, for the sites that match.

    Args:
        match: A glob on the qualified name of the Parameter or of its module (``"*.attn.*"``, ``"head"``); a module
            class, which its subclasses match too; or a predicate on the [`Site`][rpqfx.graph.Site].
        skip: Leave matching sites alone, for this reason.
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


@dataclass(frozen=True, kw_only=True)
class Policy(Options):
    """Decides how each weight of a model is held.

    Precedence, strongest first: what a site cannot do (it is skipped, with the reason); the first rule that matches
    it; the policy's own options. Of a rule, only the options it sets count; the others come from the policy.

    A policy returns a spec that divides, or a [`Skip`][rpqfx.policy.Skip] with the reason. It makes no layer larger
    unless ``allow_growth`` says so. It is a value: printable, comparable, and JSON both ways (predicates apart).

    Args:
        rules: Tried in order; the first that matches wins.
        kinds: Kinds of site to rewrite; the others are skipped.
        ratio: The whole model after, over before; see [`budget`][rpqfx.policy.Policy.budget].
        total_bytes: The whole model's bytes after, instead.

    Raises:
        PolicyError: If an option is not one of those above.
    """

    codebook_dim: int | None = None
    bits: int | None = 8
    stages: int | None = 1
    sharing: Sharing | None = "own"
    split: Split | Literal["auto"] | None = "auto"
    scale: bool | None = False
    signs: bool | None = False
    grad_scale: GradScale | None = "sum"
    init: Init | None = "fit"
    min_size: int | None = 4096
    allow_growth: bool | None = False
    rules: tuple[Rule, ...] = ()
    kinds: tuple[Kind, ...] = (
        "linear", "embedding", "embedding_bag", "conv", "conv_transpose", "bilinear", "attention", "parameter",
    )  # fmt: skip
    ratio: float | None = None
    total_bytes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise PolicyError(f"rules are Rule values, got {rule!r}")
        for kind in self.kinds:
            if kind not in get_args(Kind):
                raise PolicyError(f"kinds are among {', '.join(get_args(Kind))}, got {kind!r}")
        if self.ratio is not None and self.total_bytes is not None:
            raise PolicyError("give ratio or total_bytes, not both")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise PolicyError(f"ratio is the size after over the size before, within 0 to 1, got {self.ratio}")
        if self.total_bytes is not None and self.total_bytes < 1:
            raise PolicyError(f"total_bytes must be positive, got {self.total_bytes}")

    @classmethod
    def from_scratch(cls, **options: Any) -> Policy:
        """For training from scratch: codebooks drawn anew, small layers with fewer entries rather than left dense.

        Args:
            **options: Those of the class, over these: ``init="random"``, ``min_bits=4``, ``codebook_dim=64`` unless
                ``codebooks`` is given.
        """
        if "codebooks" not in options:
            options.setdefault("codebook_dim", 64)
        return cls(**{"init": "random", "min_bits": 4, **options})

    @classmethod
    def budget(cls, *, ratio: float | None = None, bytes: int | None = None, **options: Any) -> Policy:
        """Chooses entries, sub-vector length and sharing per layer to meet a total, everything in it counted.

        Layers are traded off by the rate-distortion rule of thumb for vector quantisation (see ``rpqfx.budget``).
        A layer that matches a rule with a shape of its own (``codebook_dim``, ``codebooks`` or ``bits``) keeps it.

        Args:
            ratio: Bytes of the whole model after, over before.
            bytes: Bytes of the whole model after.
            **options: Those of the class.

        Raises:
            PolicyError: Unless exactly one of the two is given; and, once the model is known, where the total
                cannot be reached, with the closest that can.
        """
        if (ratio is None) == (bytes is None):
            raise PolicyError("a budget needs either ratio or bytes")
        return cls(**{"ratio": ratio, "total_bytes": bytes, **options})

    # ------------------------------------------------------------------------------------------------ deciding

    def decide(self, sites: Sequence[Site], other_bytes: int = 0) -> dict[str, Hold | Skip]:
        """Decides every site.

        Args:
            sites: All sites of a model.
            other_bytes: Bytes of the model's other tensors (a budget counts them).

        Returns:
            A decision by site name.

        Raises:
            PolicyError: If an explicit count does not divide, a rule asks for what its site cannot give, or a
                budget cannot be met.
        """
        decisions = {site.name: self(site) for site in sites}
        if self.ratio is None and self.total_bytes is None:
            return decisions
        before = other_bytes + sum(site.dense_bytes for site in sites)
        limit = self.total_bytes if self.total_bytes is not None else int(self.ratio * before)  # type: ignore[operator]
        free: dict[str, list[Candidate[Hold | Skip]]] = {}
        for site in sites:
            options, decision = self.options_for(site), decisions[site.name]
            fixed = isinstance(self._rule_for(site), Rule) and self._rule_sets_shape(site)
            refused = isinstance(decision, Skip) and self._refused(site, options) is not None
            free[site.name] = (
                [Candidate(decision, _bytes(site, decision), 0.0)]
                if fixed or refused
                else self._candidates(site, options)
            )
        return choose(free, limit, before, other_bytes)

    def __call__(self, site: Site) -> Hold | Skip:
        """Decides one site, leaving a budget aside."""
        options = self.options_for(site)
        reason = self._refused(site, options)
        if reason is not None:
            return Skip(reason)
        bits, lowest = options.bits or 8, options.min_bits or options.bits or 8
        for trial in range(bits, min(lowest, bits) - 1, -1):
            hold = self._smallest(site, options, trial)
            if options.allow_growth or _bytes(site, hold) < site.dense_bytes:
                return hold
        first = self._smallest(site, options, bits)
        return Skip(
            f"would not shrink: {site.dense_bytes:,} bytes dense, {_bytes(site, first):,} with {bits} bits "
            f"for {first.spec.num_vectors} vectors of length {first.spec.dim}"
        )

    def options_for(self, site: Site) -> Options:
        """The options that hold for a site, the matching rule's laid over the policy's."""
        rule = self._rule_for(site)
        if rule is None:
            return self
        merged = {f.name: getattr(self, f.name) for f in dataclasses.fields(Options)}
        own = {name: getattr(rule, name) for name in merged if getattr(rule, name) is not None}
        if "codebook_dim" in own or "codebooks" in own:
            merged["codebook_dim"] = merged["codebooks"] = None
        return Options(**{**merged, **own})

    def unmatched_rules(self, sites: Sequence[Site]) -> list[Rule]:
        """Rules that match no site: most often a name that was mistyped."""
        return [rule for rule in self.rules if not any(rule.matches(site) for site in sites)]

    def _rule_for(self, site: Site) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(site)), None)

    def _rule_sets_shape(self, site: Site) -> bool:
        rule = self._rule_for(site)
        return rule is not None and any(getattr(rule, n) is not None for n in ("codebook_dim", "codebooks", "bits"))

    def _refused(self, site: Site, options: Options) -> str | None:
        rule = self._rule_for(site)
        if site.blocked is not None:
            return site.blocked
        if rule is not None and rule.skip is not None:
            return rule.skip
        if site.kind not in self.kinds:
            return f"the policy leaves every {site.kind} alone"
        if site.numel < (options.min_size or 0):
            return f"{site.numel} elements, fewer than min_size {options.min_size}"
        return None

    def _smallest(self, site: Site, options: Options, bits: int) -> Hold:
        """The site's spec at so many bits, with the smaller split where the policy leaves that open."""
        if options.split == "column" and not site.splits:
            raise PolicyError(f"{site.name}: vectors of a {site.kind} lie along its outputs, split='column' cannot be")
        splits: tuple[Split, ...] = ("row",) if not site.splits else ("row", "column")
        splits = splits if options.split == "auto" else (options.split or "row",)
        holds = [_hold(site, options, split, bits) for split in splits]
        return min(holds, key=lambda hold: _bytes(site, hold))

    def _candidates(self, site: Site, options: Options) -> list[Candidate[Hold | Skip]]:
        """Every spec a budget may choose for a site, and leaving it dense."""
        found = [Candidate[Hold | Skip](Skip("the budget affords it dense"), site.dense_bytes, 0.0)]
        dims = sorted({nearest_divisor(site.layout("row").dim, d) for d in (2, 4, 8, 16, 32, 64, 128)})
        for d in dims if options.codebooks is None else (None,):
            for bits in range(2, 13):
                for sharing in ("own", "layer"):
                    own = dataclasses.replace(_plain(options), sharing=sharing)
                    own = own if d is None else dataclasses.replace(own, codebook_dim=d)
                    hold = self._smallest(site, own, bits)
                    size = _bytes(site, hold)
                    if size < site.dense_bytes and hold.spec.users_per_entry > 1:
                        found.append(Candidate(hold, size, _distortion(hold.spec)))
        return found

    # ---------------------------------------------------------------------------------------------------- JSON

    def to_json(self) -> str:
        """The policy as JSON.

        Raises:
            PolicyError: If a rule matches by a predicate, which is code.
        """
        if any(callable(rule.match) for rule in self.rules):
            raise PolicyError("a rule with a predicate is code and has no JSON; match by name or by type instead")
        return json.dumps({"rpqfx_policy": _JSON_VERSION, **_differences(self, Policy())}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """The inverse of [`to_json`][rpqfx.policy.Policy.to_json].

        Raises:
            PolicyError: If the text is no policy, or of a newer version.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise PolicyError(f"this is not JSON: {error}") from error
        if not isinstance(values, dict) or "rpqfx_policy" not in values:
            raise PolicyError("this JSON is not a policy: it has no field 'rpqfx_policy'")
        version = values.pop("rpqfx_policy")
        if version != _JSON_VERSION:
            raise PolicyError(f"the policy is of version {version}, this library reads {_JSON_VERSION}")
        known = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(set(values) - known):
            raise PolicyError(f"a policy has no option {wrong[0]!r}")
        try:
            values["rules"] = tuple(Rule(**rule) for rule in values.get("rules", ()))
            return cls(**values)
        except TypeError as error:
            raise PolicyError(f"this JSON is not a policy: {error}") from error


def decide_all(
    policy: Policy | Decide, sites: Sequence[Site], other_bytes: int = 0
) -> tuple[dict[str, Hold | Skip], list[str]]:
    """Decisions of a policy, or of any callable from a site to a spec or a skip.

    Args:
        policy: A [`Policy`][rpqfx.policy.Policy], or a callable ``Site -> CodebookSpec | Hold | Skip``.
        sites: All sites of a model.
        other_bytes: Bytes of the model's other tensors.

    Returns:
        Decisions by site name, and notes for the report.

    Raises:
        PolicyError: If nothing at all would be rewritten, or an answer does not fit its site.
    """
    if isinstance(policy, Policy):
        decisions = policy.decide(sites, other_bytes)
        notes = [f"rule {rule.match!r} matches no site" for rule in policy.unmatched_rules(sites)]
    else:
        decisions = {s.name: Skip(s.blocked) if s.blocked else _answer(s, policy(s)) for s in sites}
        notes = []
    if not any(isinstance(decision, Hold) for decision in decisions.values()):
        raise PolicyError(_nothing(decisions, notes))
    return decisions, notes


def _answer(site: Site, answer: CodebookSpec | Hold | Skip) -> Hold | Skip:
    if isinstance(answer, (Hold, Skip)):
        return answer
    if not isinstance(answer, CodebookSpec):
        raise PolicyError(f"{site.name}: a policy returns a CodebookSpec, a Hold or a Skip, got {answer!r}")
    splits: tuple[Split, ...] = ("row", "column") if site.splits else ("row",)
    for split in splits:
        layout = site.layout(split)
        if (layout.num_vectors, layout.dim) == (answer.num_vectors, answer.dim):
            return Hold(answer, split)
    row = site.layout("row")
    raise PolicyError(
        f"{site.name}: the spec has {answer.num_vectors} vectors of length {answer.dim}, "
        f"the site {row.num_vectors} of length {row.dim}"
    )


def _nothing(decisions: Mapping[str, Hold | Skip], notes: Iterable[str]) -> str:
    if not decisions:
        return "the model has no weight of two or more axes, so there is nothing to rewrite"
    said = [f"{name}: {d.reason}" for name, d in decisions.items() if isinstance(d, Skip)]
    more = f"; and {len(said) - 5} more" if len(said) > 5 else ""
    return "the policy rewrites nothing. " + "; ".join([*notes, *said[:5]]) + more


def _hold(site: Site, options: Options, split: Split, bits: int) -> Hold:
    layout = site.layout(split)
    dim, count = layout.dim, options.codebooks
    if count == "heads":
        if site.heads is None:
            raise PolicyError(f"{site.name}: the model names no number of heads; give codebooks as a number")
        d = nearest_divisor(dim, max(1, dim // site.heads))
    elif count is not None:
        if count < 1 or dim % count:
            near = dim // nearest_divisor(dim, max(1, dim // max(1, count)))
            raise PolicyError(
                f"{site.name}: {count} codebooks do not divide its vector length {dim}; the nearest count that does "
                f"is {near}; give codebook_dim to let the policy choose"
            )
        d = dim // count
    else:
        d = nearest_divisor(dim, options.codebook_dim or 64)
    books = 1 if options.sharing == "layer" else None
    try:
        spec = CodebookSpec(
            layout.num_vectors, dim, d, 2**bits, options.stages or 1, books, bool(options.scale), bool(options.signs),
            options.grad_scale or "sum",
        )  # fmt: skip
    except SpecError as error:
        raise PolicyError(f"{site.name}: {error}") from error
    return Hold(spec, split, options.init or "fit", _group(site, options, layout.dim))


def _group(site: Site, options: Options, dim: int) -> str | None:
    if options.sharing == "shape":
        return f"shape {dim} {site.dtype}"
    if options.sharing == "role":
        return ".".join("*" if part.isdigit() else part for part in site.name.split("."))
    return None


def _plain(options: Options) -> Options:
    return Options(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Options)})


def _bytes(site: Site, decision: Hold | Skip) -> int:
    return site.dense_bytes if isinstance(decision, Skip) else decision.spec.stored_bytes(site.dtype)


def _distortion(spec: CodebookSpec) -> float:
    """Expected squared error of holding unit-variance weights so, by rule of thumb: ``4**-rate`` an element."""
    rate = spec.stages * spec.bits / spec.codebook_dim
    return spec.num_vectors * spec.dim * (1 - 1 / spec.users_per_entry) * 4.0**-rate


def _differences(value: Options, default: Options) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if field.name == "rules":
            if item:
                found["rules"] = [{"match": rule.match, **_differences(rule, Rule(""))} for rule in item]
        elif item != getattr(default, field.name):
            found[field.name] = list(item) if isinstance(item, tuple) else item
    return found
