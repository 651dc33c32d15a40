"""Policies: frozen values that decide, site by site, how a weight is held."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import PolicyError
from rpqfx.policies.amounts import check_amounts, kinds_of
from rpqfx.policies.bit_allocation import spread
from rpqfx.policies.budget import Candidate, choose
from rpqfx.policies.decision import Hold, Skip, candidates, smallest, stored_bytes, together
from rpqfx.policies.modes import DEFAULTS, FREE_OF_RATE, check_mode, mode_of
from rpqfx.policies.name_rules import rules_of
from rpqfx.policies.options import Options, Rule
from rpqfx.policies.policy_json import read, to_json
from rpqfx.policies.site import Kind, Site
from rpqfx.validation.spelling import shows, spelled
from rpqfx.validation.values import shown

__all__ = ["Decide", "Hold", "Options", "Policy", "Rule", "Skip"]

EMBEDDING_BITS = 8.5  # eight of codes, and factors of rows and columns
Decide = Callable[[Site], CodebookSpec | Hold | Skip]


@spelled
@dataclass(frozen=True, kw_only=True)
class Policy(Options):
    """Decides how each weight of a model is held.

    Precedence, strongest first: what a site cannot do (it is skipped, with the reason); the first rule that matches
    it; the policy's own options. Of a rule, only the options it sets count; the others come from the policy.

    A policy returns a spec that divides, or a [`Skip`][rpqfx.policies.policy.Skip] with the reason. It makes no layer
    larger unless ``allow_growth`` says so. It is a value: printable, comparable, and JSON both ways (predicates apart).

    Options that are left out have the values ``bits=8``, ``stages=1``, ``sharing="own"``, ``experts="shared"``,
    ``split="auto"``, ``scale=False``, ``dim_scale=False``, ``signs=False``, ``grad_scale="sum"``, ``init="fit"``,
    ``plan="auto"``, ``min_size=4096`` and ``allow_growth=False``. Under a budget (``ratio``, ``total_bytes``) ``bits``,
    ``sharing`` and ``codebook_dim`` are chosen for each layer where they are left out, and kept where they are given.
    Under ``bits_per_weight`` all that shapes codebooks is chosen. What is chosen reads None here, and an option that
    would do nothing under a budget is refused.

    Args:
        rules: Tried in order; the first that matches wins.
        kinds: Kinds of site to rewrite; the others are skipped.
        ratio: The whole model after, over before; see [`budget`][rpqfx.policies.policy.Policy.budget].
        total_bytes: The whole model's bytes after, instead.
        bits_per_weight: What the weights in codebooks take as saved, everything counted, instead; see
            [`pretrained`][rpqfx.policies.policy.Policy.pretrained].
        embedding_bits: The same for embeddings and an output head of as many rows, by themselves; left out, they stay
            dense.

    Raises:
        PolicyError: If an option does not exist, is out of range, or would do nothing beside the others.
    """

    goes_with: ClassVar[str] = "rpqify"

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
        object.__setattr__(self, "rules", rules_of(self.rules, Rule))
        object.__setattr__(self, "kinds", kinds_of(self.kinds))
        check_amounts(self)
        for name, value in DEFAULTS[mode_of(self)].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        for rule in self.rules:
            if rule.bits is None and (rule.min_bits or 0) > (self.bits or 16):
                raise PolicyError(
                    f"min_bits={rule.min_bits} of the rule for {shown(rule.match)} is more than the policy's bits "
                    f"({self.bits}); set bits in the rule as well"
                )
        check_mode(self, self.rules)

    @classmethod
    def from_scratch(cls, **options: Any) -> Policy:
        """Makes a policy for training from scratch: codebooks are drawn anew, with fewer entries in small layers.

        Args:
            **options: Those of the class, over these: ``init="random"``, and ``min_bits=4`` (or ``bits``, if fewer) so
                that small layers get fewer entries rather than stay dense.

        Raises:
            PolicyError: As the class.
        """
        bits = options.get("bits")
        fewest = min(4, bits) if type(bits) is int else 4
        return cls(**{"init": "random", "min_bits": fewest, **options})

    @classmethod
    def budget(cls, *, ratio: float | None = None, bytes: int | None = None, **options: Any) -> Policy:
        """Makes a policy that meets a total, everything in it counted.

        It chooses entries, sub-vector length and sharing for each layer, and which layers stay dense; of these, what
        is given (``bits``, ``codebook_dim`` or ``codebooks``, ``sharing``) holds for every layer, and ``min_bits``
        without ``bits`` is the fewest. Layers are traded off by the rate-distortion rule of thumb for vector
        quantisation (see ``rpqfx.policies.budget``). A layer that matches a rule with a shape of its own
        (``codebook_dim``, ``codebooks`` or ``bits``) keeps it.

        Args:
            ratio: Bytes of the whole model after, over before.
            bytes: Bytes of the whole model after.
            **options: Those of the class.

        Raises:
            PolicyError: Unless exactly one of the two is given; as the class; and, once the model is known, where the
                total cannot be reached, with the closest that can.
        """
        if (ratio is None) == (bytes is None):
            raise PolicyError("a budget needs either ratio or bytes, as in Policy.budget(ratio=0.25)")
        return cls(**{"ratio": ratio, "total_bytes": bytes, **options})

    @classmethod
    def pretrained(
        cls, bits_per_weight: float, *, embedding_bits: float | None = EMBEDDING_BITS, **options: Any
    ) -> Policy:
        """Makes a policy for converting a trained model: so many bits a weight, all that is stored counted.

        Codes, codebooks and factors together take at most that much, over the weights that are rewritten. The whole
        model shares a few codebooks, and factors of rows and columns make its weights look alike
        (``rpqfx.policies.bit_allocation``). Linear maps and tables get stages of 16 entries, which products with few
        rows read fastest (``rpqfx.policies.fast_shapes``), filters of convolutions one codebook. A weight that matches
        a rule with a shape of its own keeps that, and is not counted.

        Args:
            bits_per_weight: Of Linear, convolutional and other weights.
            embedding_bits: The same for embeddings and an output head of as many rows; None leaves them dense. The
                default costs a language model less than half a percent of its perplexity.
            **options: ``min_size`` (1024 if left out), ``kinds``, ``rules``, ``plan`` and ``grad_scale`` of the class.
                What shapes codebooks is chosen, and refused here; rules may set it.

        Raises:
            PolicyError: As the class; and, once the model is known, if so few bits cannot be had.
        """
        if bits_per_weight is None:
            raise PolicyError("bits_per_weight is a number of bits, as in Policy.pretrained(3), got None")
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
        held = spread(weights, self.bits_per_weight or 0.0, importance)
        held |= spread(tables, self.embedding_bits or 0.0, None, "embeddings", "embedding_bits")
        for site in (*weights, *tables):
            options, hold = self.options_for(site), held[site.name]
            spec = dataclasses.replace(hold.spec, grad_scale=options.grad_scale or "sum")
            decisions[site.name] = dataclasses.replace(hold, spec=spec, plan=options.plan or "auto")
        return decisions

    def __call__(self, site: Site) -> Hold | Skip:
        """Decides one site by itself, leaving a budget and the sites that it could share codebooks with aside."""
        options = self.options_for(site)
        reason = self._refused(site, options)
        return Skip(reason) if reason is not None else together([(site, options)])[site.name]

    def options_for(self, site: Site) -> Options:
        """The options that hold for a site, the matching rule's laid over the policy's."""
        rule = self.rule_for(site)
        merged = {f.name: getattr(self, f.name) for f in dataclasses.fields(Options)}
        own = {name: value for name in merged if (value := getattr(rule, name, None)) is not None}
        if "codebook_dim" in own or "codebooks" in own:
            merged["codebook_dim"] = merged["codebooks"] = None
        if "bits" in own and "min_bits" not in own and (merged["min_bits"] or 0) > own["bits"]:
            merged["min_bits"] = None  # the rule asks for fewer than the policy would go down to
        if self._rule_sets_shape(site) or mode_of(self) == "rate":  # nothing of it is chosen
            merged = {name: DEFAULTS["plain"].get(name) if value is None else value for name, value in merged.items()}
        return Options(**{**merged, **own})

    def unmatched_rules(self, sites: Sequence[Site]) -> list[Rule]:
        """Rules that match no site: most often a name that was mistyped."""
        return [rule for rule in self.rules if not any(rule.matches(site) for site in sites)]

    def rule_for(self, site: Site) -> Rule | None:
        """The rule that a site follows, if one matches."""
        return next((rule for rule in self.rules if rule.matches(site)), None)

    def _rule_sets_shape(self, site: Site) -> bool:
        rule = self.rule_for(site)
        return rule is not None and rule.sets_shape

    def _shared(self, sites: Sequence[Site]) -> dict[str, Hold | Skip]:
        """Decisions for the sites whose codebooks other layers share: each group is decided as one."""
        groups: dict[object, list[tuple[Site, Options]]] = defaultdict(list)
        for site in sites:
            options = self.options_for(site)
            if options.sharing in ("shape", "role") and self._refused(site, options) is None:
                hold = smallest(site, options, options.bits or 8)
                key = (hold.group, *hold.shared, options.min_bits, options.allow_growth)
                groups[key].append((site, options))
        return {name: decision for group in groups.values() for name, decision in together(group).items()}

    def _refused(self, site: Site, options: Options) -> str | None:
        rule = self.rule_for(site)
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
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """The inverse of [`to_json`][rpqfx.policies.policy.Policy.to_json].

        Raises:
            PolicyError: If the text is no policy, or of a newer version.
        """
        return read(cls, text)


_COMMON = (*(field.name for field in dataclasses.fields(Options)), "rules", "kinds")
shows(Policy.from_scratch, Policy, (*_COMMON, "ratio", "total_bytes"))
shows(Policy.budget, Policy, _COMMON)
shows(Policy.pretrained, Policy, (*FREE_OF_RATE, "rules", "kinds"))
