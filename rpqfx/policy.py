"""Policies: frozen values that decide, site by site, how a weight is held."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rpqfx.budget import Candidate, choose
from rpqfx.codebook import CodebookSpec, GradScale
from rpqfx.decision import Hold, Skip, candidates, smallest, stored_bytes, together
from rpqfx.errors import PolicyError
from rpqfx.nn.layer import Split
from rpqfx.nn.layout import Experts
from rpqfx.ops import Plan
from rpqfx.options import Init, Options, Rule, Sharing
from rpqfx.rates import spread
from rpqfx.site import Kind, Site

__all__ = ["Decide", "Hold", "Options", "Policy", "Rule", "Skip"]

_JSON_VERSION = 1

Decide = Callable[[Site], CodebookSpec | Hold | Skip]


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
        bits_per_weight: What the weights in codebooks take as saved, everything counted, instead; see
            [`pretrained`][rpqfx.policy.Policy.pretrained].
        embedding_bits: The same for embeddings and an output head of as many rows, by themselves; left out, they stay
            dense.

    Raises:
        PolicyError: If an option is not one of those above.
    """

    codebook_dim: int | None = None
    bits: int | None = 8
    stages: int | None = 1
    sharing: Sharing | None = "own"
    experts: Experts | None = "shared"
    split: Split | Literal["auto"] | None = "auto"
    scale: bool | None = False
    dim_scale: bool | None = False
    signs: bool | None = False
    grad_scale: GradScale | None = "sum"
    init: Init | None = "fit"
    plan: Plan | None = "auto"
    min_size: int | None = 4096
    allow_growth: bool | None = False
    rules: tuple[Rule, ...] = ()
    kinds: tuple[Kind, ...] = (
        "linear", "embedding", "embedding_bag", "conv", "conv_transpose", "bilinear", "attention", "recurrent",
        "experts", "parameter",
    )  # fmt: skip
    ratio: float | None = None
    total_bytes: int | None = None
    bits_per_weight: float | None = None
    embedding_bits: float | None = None

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
        for name in ("bits_per_weight", "embedding_bits"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 16:
                raise PolicyError(f"{name} is a number of bits, above 0 and at most 16, got {value!r}")
        if self.bits_per_weight is not None and (self.ratio is not None or self.total_bytes is not None):
            raise PolicyError("give bits_per_weight, ratio or total_bytes, not two of them")
        if self.embedding_bits is not None and self.bits_per_weight is None:
            raise PolicyError("embedding_bits goes with bits_per_weight")

    @classmethod
    def from_scratch(cls, **options: Any) -> Policy:
        """For training from scratch: codebooks drawn anew, small layers with fewer entries rather than left dense.

        Args:
            **options: Those of the class, over these: ``init="random"``, ``min_bits=4``.
        """
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

    @classmethod
    def pretrained(cls, *, bits_per_weight: float, embedding_bits: float | None = None, **options: Any) -> Policy:
        """For converting a trained model: so many bits a weight, all that is stored counted.

        Codes, codebooks and factors together take at most that much, over the weights that are rewritten. The whole
        model shares a few large codebooks, and factors of columns make its weights look alike (``rpqfx.rates``). A
        weight that matches a rule with a shape of its own keeps that, and is not counted.

        Args:
            bits_per_weight: Of Linear, convolutional and other weights.
            embedding_bits: Of embeddings and an output head of as many rows; left out, they stay dense.
            **options: Those of the class, over this: ``min_size=1024``.
        """
        own = {"bits_per_weight": bits_per_weight, "embedding_bits": embedding_bits}
        return cls(**{**own, "min_size": 1024, **options})

    # ------------------------------------------------------------------------------------------------ deciding

    def decide(
        self, sites: Sequence[Site], other_bytes: int = 0, importance: Mapping[str, float] | None = None
    ) -> dict[str, Hold | Skip]:
        """Decides every site.

        Args:
            sites: All sites of a model.
            other_bytes: Bytes of the model's other tensors (a budget counts them).
            importance: What errors as large as a weight itself cost the model, by name, where that was measured
                (bits a weight are spread by it).

        Returns:
            A decision by site name.

        Raises:
            PolicyError: If an explicit count does not divide, a rule asks for what its site cannot give, or a
                budget cannot be met.
        """
        if self.bits_per_weight is not None:
            return self._by_rate(sites, importance)
        decisions = {site.name: self(site) for site in sites}
        decisions |= self._shared(sites)
        if self.ratio is None and self.total_bytes is None:
            return decisions
        before = other_bytes + sum(site.dense_bytes for site in sites)
        limit = self.total_bytes if self.total_bytes is not None else int(self.ratio * before)  # type: ignore[operator]
        free: dict[str, list[Candidate[Hold | Skip]]] = {}
        alike: dict[object, list[Candidate[Hold | Skip]]] = {}  # most layers of a model are like another one
        for site in sites:
            options, decision = self.options_for(site), decisions[site.name]
            fixed = self._rule_sets_shape(site) or self._refused(site, options) is not None
            if fixed:
                free[site.name] = [Candidate(decision, stored_bytes(site, decision), 0.0)]
                continue
            same = (site.shape, site.dtype, site.lead, site.flipped, site.splits, site.heads, site.taps, options)
            if same not in alike:
                alike[same] = candidates(site, options)
            free[site.name] = alike[same]
        return choose(free, limit, before, other_bytes)

    def _by_rate(self, sites: Sequence[Site], importance: Mapping[str, float] | None) -> dict[str, Hold | Skip]:
        rows = {site.shape[0] for site in sites if site.kind in ("embedding", "embedding_bag")}
        decisions: dict[str, Hold | Skip] = {}
        weights: list[Site] = []
        tables: list[Site] = []
        for site in sites:
            reason = self._refused(site, self.options_for(site))
            table = site.kind in ("embedding", "embedding_bag") or (site.kind == "linear" and site.shape[0] in rows)
            if reason is None and table and self.embedding_bits is None and not self._rule_sets_shape(site):
                reason = "embeddings and heads have a budget of their own, embedding_bits, and it is not given"
            if reason is not None:
                decisions[site.name] = Skip(reason)
            elif self._rule_sets_shape(site):
                decisions[site.name] = self(site)
            else:
                (tables if table else weights).append(site)
        decisions |= spread(weights, self.bits_per_weight or 0.0, importance)
        decisions |= spread(tables, self.embedding_bits or 0.0, None, "embeddings")
        return decisions

    def __call__(self, site: Site) -> Hold | Skip:
        """Decides one site by itself, leaving a budget and the sites that it could share codebooks with aside."""
        options = self.options_for(site)
        reason = self._refused(site, options)
        return Skip(reason) if reason is not None else together([(site, options)])[site.name]

    def options_for(self, site: Site) -> Options:
        """The options that hold for a site, the matching rule's laid over the policy's."""
        rule = self._rule_for(site)
        merged = {f.name: getattr(self, f.name) for f in dataclasses.fields(Options)}
        own = {name: value for name in merged if (value := getattr(rule, name, None)) is not None}
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

    def _shared(self, sites: Sequence[Site]) -> dict[str, Hold | Skip]:
        """Decisions for the sites whose codebooks other layers share: each group is decided as one."""
        groups: dict[object, list[tuple[Site, Options]]] = defaultdict(list)
        for site in sites:
            options = self.options_for(site)
            if options.sharing in ("shape", "role") and self._refused(site, options) is None:
                hold = smallest(site, options, options.bits or 8)
                key = (hold.group, hold.spec.codebooks_shape, options.min_bits, options.allow_growth)
                groups[key].append((site, options))
        return {name: decision for group in groups.values() for name, decision in together(group).items()}

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
