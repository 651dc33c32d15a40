"""Policies: frozen values that decide, site by site, how a weight is quantized."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rpqfx.codebook import CodebookSpec, GradScale
from rpqfx.errors import PolicyError
from rpqfx.nn.layer import Split
from rpqfx.nn.layout import Experts
from rpqfx.ops import Plan
from rpqfx.policies.amount import EMBEDDING_BITS, Amount, Budget, Fixed, Rate, amount_from
from rpqfx.policies.base import PolicyBase
from rpqfx.policies.bit_allocation import spread
from rpqfx.policies.budget import Candidate, choose
from rpqfx.policies.decision import KeepDense, Quantize, candidates, smallest, stored_bytes, together
from rpqfx.policies.options import Init, Options, PartialOptions, Rule, Sharing
from rpqfx.policies.site import KINDS, Kind, Site
from rpqfx.validation.spelling import spelled
from rpqfx.validation.values import one_of, shown

__all__ = ["Budget", "Decide", "Fixed", "KeepDense", "Options", "Policy", "Quantize", "Rate", "Rule"]

Decide = Callable[[Site], CodebookSpec | Quantize | KeepDense]
_TABLES = ("embedding", "embedding_bag")


@spelled
@dataclass(frozen=True, kw_only=True)
class Policy(PartialOptions, PolicyBase):
    """Decides how each weight of a model is quantized.

    Precedence, strongest first: what a site cannot do (it is skipped, with the reason); the first rule that matches
    it; the policy's own options. Of a rule, only the options it sets count; the others come from the policy.

    A policy returns a spec that divides, or a [`KeepDense`][rpqfx.policies.policy.KeepDense] with the reason. It makes
    no layer larger unless ``allow_growth`` says so. It is a value: printable, comparable, and JSON both ways
    (predicates apart).

    Options that are left out have the values of [`Options`][rpqfx.policies.policy.Options], unless ``amount`` chooses
    them for each weight; those read None here. An option that would do nothing beside an amount is refused.

    Args:
        amount: How much the model takes: [`Fixed`][rpqfx.policies.policy.Fixed], what the options say;
            [`Budget`][rpqfx.policies.policy.Budget], bytes of the whole model; or
            [`Rate`][rpqfx.policies.policy.Rate], bits for each weight.
        rules: Tried in order; the first that matches wins.
        kinds: Kinds of site to rewrite; the others are skipped.

    Raises:
        PolicyError: If an option does not exist, is out of range, or would do nothing beside the others.
    """

    goes_with: ClassVar[str] = "rpqify"
    rule: ClassVar[type] = Rule
    elsewhere: ClassVar[Mapping[str, str]] = {
        "ratio": "Policy.budget(ratio=...)", "bytes": "Policy.budget(bytes=...)",
        "bits_per_weight": "Policy.pretrained(...)", "embedding_bits": "Policy.pretrained(..., embedding_bits=...)",
    }  # fmt: skip

    amount: Amount = field(default=Fixed())
    rules: tuple[Rule, ...] = ()
    kinds: tuple[Kind, ...] = KINDS

    def __post_init__(self) -> None:
        self._check_rules()
        object.__setattr__(self, "kinds", _kinds(self.kinds))
        if not isinstance(self.amount, Amount):
            raise PolicyError(
                f"amount is Fixed(), Budget(ratio=...) or Rate(bits_per_weight), got {shown(self.amount)}"
            )
        for name, value in self.amount.defaults().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        for rule in self.rules:
            if rule.codebook_bits is None and (rule.min_codebook_bits or 0) > (self.codebook_bits or 16):
                raise PolicyError(
                    f"min_codebook_bits={rule.min_codebook_bits} of the rule for {shown(rule.match)} is more than the "
                    f"policy's codebook_bits ({self.codebook_bits}); set codebook_bits in the rule as well"
                )
        self.amount.check(self, self.rules)

    @classmethod
    @spelled
    def from_scratch(
        cls, *, codebook_dim: int | None = None, num_subvectors: int | Literal["heads"] | None = None,
        codebook_bits: int = 8, min_codebook_bits: int | None = None, stages: int = 1, sharing: Sharing = "own",
        experts: Experts = "shared", split: Split | Literal["auto"] = "auto", scale: bool = False,
        column_scale: bool = False, signs: bool = False, grad_scale: GradScale = "sum", plan: Plan = "auto",
        min_size: int = 4096, allow_growth: bool = False, rules: tuple[Rule, ...] = (), kinds: tuple[Kind, ...] = KINDS,
    ) -> Policy:  # fmt: skip
        """Makes a policy for training from scratch: codebooks are drawn anew, with fewer entries in small layers.

        Options are those of [`Options`][rpqfx.policies.policy.Options], with ``init="random"``. ``min_codebook_bits``
        is 4 (or ``codebook_bits``, if fewer) if left out, so that small layers get fewer entries rather than stay
        dense.

        Raises:
            PolicyError: As the class.
        """
        fewest = min(4, codebook_bits) if type(codebook_bits) is int else 4
        return cls(
            codebook_dim=codebook_dim, num_subvectors=num_subvectors, codebook_bits=codebook_bits,
            min_codebook_bits=fewest if min_codebook_bits is None else min_codebook_bits, stages=stages,
            sharing=sharing, experts=experts, split=split, scale=scale, column_scale=column_scale, signs=signs,
            grad_scale=grad_scale, init="random", plan=plan, min_size=min_size, allow_growth=allow_growth, rules=rules,
            kinds=kinds,
        )  # fmt: skip

    @classmethod
    @spelled
    def budget(
        cls, *, ratio: float | None = None, bytes: int | None = None, codebook_dim: int | None = None,
        num_subvectors: int | Literal["heads"] | None = None, codebook_bits: int | None = None,
        min_codebook_bits: int | None = None, stages: int = 1, sharing: Literal["own", "layer"] | None = None,
        experts: Experts = "shared", split: Split | Literal["auto"] = "auto", scale: bool = False,
        column_scale: bool = False, signs: bool = False, grad_scale: GradScale = "sum", init: Init = "fit",
        plan: Plan = "auto", min_size: int = 4096, rules: tuple[Rule, ...] = (), kinds: tuple[Kind, ...] = KINDS,
    ) -> Policy:  # fmt: skip
        """Makes a policy that meets a total of bytes, everything in it counted.

        It chooses entries, sub-vector length and sharing for each layer, and which layers stay dense; of these, what
        is given (``codebook_bits``, ``codebook_dim`` or ``num_subvectors``, ``sharing``) holds for every layer, and
        ``min_codebook_bits`` without ``codebook_bits`` is the fewest. Layers are traded off by the rate-distortion rule
        of thumb for vector quantisation (see ``rpqfx.policies.budget``). A layer that matches a rule with a shape of
        its own (``codebook_dim``, ``num_subvectors`` or ``codebook_bits``) keeps it. The total is that of
        [`Budget`][rpqfx.policies.policy.Budget], the options are those of [`Options`][rpqfx.policies.policy.Options].

        Raises:
            PolicyError: Unless exactly one of the two is given; as the class; and, once the model is known, where the
                total cannot be reached, with the closest that can.
        """
        return cls(
            amount=Budget(ratio=ratio, bytes=bytes), codebook_dim=codebook_dim, num_subvectors=num_subvectors,
            codebook_bits=codebook_bits, min_codebook_bits=min_codebook_bits, stages=stages, sharing=sharing,
            experts=experts, split=split, scale=scale, column_scale=column_scale, signs=signs, grad_scale=grad_scale,
            init=init, plan=plan, min_size=min_size, rules=rules, kinds=kinds,
        )  # fmt: skip

    @classmethod
    @spelled
    def pretrained(
        cls, bits_per_weight: float, *, embedding_bits: float | None = EMBEDDING_BITS, min_size: int = 1024,
        grad_scale: GradScale = "sum", plan: Plan = "auto", rules: tuple[Rule, ...] = (),
        kinds: tuple[Kind, ...] = KINDS,
    ) -> Policy:  # fmt: skip
        """Makes a policy for converting a trained model: so many bits a weight, all that is stored counted.

        Codes, codebooks and factors together take at most that much, over the weights that are rewritten. The whole
        model shares a few codebooks, and factors of rows and columns make its weights look alike
        (``rpqfx.policies.bit_allocation``). Linear maps and tables get stages of 16 entries, which products with few
        rows read fastest (``rpqfx.policies.fast_shapes``), filters of convolutions one codebook. A weight that matches
        a rule with a shape of its own keeps that, and is not counted. The bits are those of
        [`Rate`][rpqfx.policies.policy.Rate], the options are those of [`Options`][rpqfx.policies.policy.Options].

        Raises:
            PolicyError: As the class; and, once the model is known, if so few bits cannot be had.
        """
        return cls(
            amount=Rate(bits_per_weight, embedding_bits), min_size=min_size, grad_scale=grad_scale, plan=plan,
            rules=rules, kinds=kinds,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ deciding

    def decide(
        self, sites: Sequence[Site], other_bytes: int = 0, importance: Mapping[str, float] | None = None
    ) -> dict[str, Quantize | KeepDense]:
        """Decides every site.

        Args:
            sites: All sites of a model.
            other_bytes: Bytes of the model's other tensors (a budget counts them).
            importance: Cost of errors as large as a weight itself, by name, where that was measured
                (bits a weight are spread by it).

        Returns:
            A decision by site name.

        Raises:
            PolicyError: If an explicit count does not divide, a rule asks for what its site cannot give, or a
                budget cannot be met.
        """
        if isinstance(self.amount, Rate):
            return self._by_rate(self.amount, sites, importance)
        decisions = {site.name: self(site) for site in sites}
        decisions |= self._shared(sites)
        if not isinstance(self.amount, Budget):
            return decisions
        before = other_bytes + sum(site.dense_bytes for site in sites)
        free: dict[str, list[Candidate[Quantize | KeepDense]]] = {}
        alike: dict[object, list[Candidate[Quantize | KeepDense]]] = {}  # most layers of a model are like another one
        for site in sites:
            options, decision = self._written_for(site), decisions[site.name]
            if self._rule_sets_shape(site) or self._refused(site, self.options_for(site)) is not None:
                free[site.name] = [Candidate(decision, stored_bytes(site, decision), 0.0)]
                continue
            same = (site.shape, site.dtype, site.lead, site.flipped, site.splits, site.heads, site.taps, options)
            if same not in alike:
                alike[same] = candidates(site, options)
            free[site.name] = alike[same]
        return choose(free, self.amount.limit(before), before, other_bytes)

    def _by_rate(
        self, rate: Rate, sites: Sequence[Site], importance: Mapping[str, float] | None
    ) -> dict[str, Quantize | KeepDense]:
        options = {site.name: self.options_for(site) for site in sites}
        decisions: dict[str, Quantize | KeepDense] = {}
        for site in sites:
            if (reason := self._refused(site, options[site.name])) is not None:
                decisions[site.name] = KeepDense(reason)
            elif self._rule_sets_shape(site):
                decisions[site.name] = self(site)
        rows = {site.shape[0] for site in sites if site.kind in _TABLES}
        free = [site for site in sites if site.name not in decisions]
        tables = [s for s in free if s.kind in _TABLES or (s.kind == "linear" and s.shape[0] in rows)]
        weights = [site for site in free if site not in tables]
        if rate.embedding_bits is None:
            reason = "embeddings and heads have a budget of their own, embedding_bits, and it is not given"
            decisions |= {site.name: KeepDense(reason) for site in tables}
            tables = []
        held = spread(weights, rate.bits_per_weight, importance)
        held |= spread(tables, rate.embedding_bits or 0.0, None, "embeddings", "embedding_bits")
        for name, decision in held.items():
            spec = dataclasses.replace(decision.spec, grad_scale=options[name].grad_scale)
            decisions[name] = dataclasses.replace(decision, spec=spec, plan=options[name].plan)
        return decisions

    def __call__(self, site: Site) -> Quantize | KeepDense:
        """Decides one site by itself, leaving a budget and the sites that it could share codebooks with aside."""
        options = self.options_for(site)
        reason = self._refused(site, options)
        return KeepDense(reason) if reason is not None else together([(site, options)])[site.name]

    def options_for(self, site: Site) -> Options:
        """Returns all options of a site: those of the rule that it follows, else the policy's, else the defaults."""
        return Options(**self._written_for(site).given())

    def _written_for(self, site: Site) -> PartialOptions:
        """Returns the options of a site that are written down, the matching rule's laid over the policy's."""
        rule = self.rule_for(site)
        own, merged = {} if rule is None else rule.given(), self.given()
        if "codebook_dim" in own or "num_subvectors" in own:
            merged = {name: value for name, value in merged.items() if name not in ("codebook_dim", "num_subvectors")}
        if "codebook_bits" in own and merged.get("min_codebook_bits", 0) > own["codebook_bits"]:
            del merged["min_codebook_bits"]  # the rule asks for fewer than the policy would go down to
        return PartialOptions(**{**merged, **own})

    def _rule_sets_shape(self, site: Site) -> bool:
        rule = self.rule_for(site)
        return rule is not None and rule.sets_shape

    def _shared(self, sites: Sequence[Site]) -> dict[str, Quantize | KeepDense]:
        """Returns the decisions for the sites whose codebooks other layers share: each group is decided as one."""
        groups: dict[object, list[tuple[Site, Options]]] = defaultdict(list)
        for site in sites:
            options = self.options_for(site)
            if options.sharing in ("shape", "role") and self._refused(site, options) is None:
                decision = smallest(site, options)
                key = (decision.group, *decision.shared, options.min_codebook_bits, options.allow_growth)
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
        if site.numel < options.min_size:
            return f"{site.numel} elements, fewer than min_size {options.min_size}"
        return None

    # ---------------------------------------------------------------------------------------------------- JSON

    def defaults(self) -> dict[str, Any]:
        """Returns the values that fields have where they are left out, which depend on the amount."""
        return {**super().defaults(), **self.amount.defaults()}

    @classmethod
    def decoded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields that the values of a JSON stand for, the rules apart."""
        return {**values, "amount": amount_from(values["amount"])} if "amount" in values else values


def _kinds(kinds: Any) -> tuple[Kind, ...]:
    """Returns kinds of sites as a tuple, sorted where they are a set."""
    if isinstance(kinds, str) or not isinstance(kinds, (Sequence, set, frozenset)):
        raise PolicyError(f"kinds is a sequence of some of {', '.join(KINDS)}, got {shown(kinds)}; put it in a tuple")
    for kind in kinds:
        one_of("each of kinds", kind, KINDS)
    return tuple(sorted(kinds)) if isinstance(kinds, (set, frozenset)) else tuple(kinds)
