"""The amount that a policy takes: one of three values, each of which knows the options that it leaves open."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rpqfx.errors import PolicyError
from rpqfx.policies.options import Options, PartialOptions, Rule
from rpqfx.validation.spelling import spelled
from rpqfx.validation.values import number, one_of, shown, whole

EMBEDDING_BITS = 8.5  # eight of codes, and factors of rows and columns


class Amount:
    """The base of the three, which chooses no option and leaves all of them to be given."""

    chosen: ClassVar[frozenset[str]] = frozenset()
    """Options that are chosen for each weight where they are left out."""
    never: ClassVar[frozenset[str]] = frozenset()
    """Options that not even a rule with a shape of its own may set to something else."""

    def defaults(self) -> dict[str, Any]:
        """Returns the values of options that are left out and not chosen."""
        return {f.name: f.default for f in dataclasses.fields(Options) if f.name not in self.chosen}

    def _idle(self, options: PartialOptions) -> tuple[str, str] | None:
        """Returns the first option of a policy or a rule that would do nothing, and why, or None."""
        return None

    def check(self, options: PartialOptions, rules: Sequence[Rule]) -> None:
        """Raises an error where an option would do nothing beside this amount.

        Args:
            options: Those of a policy, its defaults filled in.
            rules: Those of the policy.

        Raises:
            PolicyError: Names the option, and says what to do instead.
        """
        for rule in (None, *rules):
            given: PartialOptions = options if rule is None else rule
            if rule is not None and rule.sets_shape:  # which leaves nothing to be chosen
                given = PartialOptions(**{name: rule.given().get(name) for name in self.never})
            if (found := self._idle(given)) is None:
                continue
            name, why = found
            whose = "" if rule is None else f" of the rule for {shown(rule.match)}"
            advice = ", or give it in a Rule that sets codebook_dim, num_subvectors or codebook_bits"
            if rule is not None:
                advice = (
                    ", or set codebook_dim, num_subvectors or codebook_bits in the rule as well, for a shape of its own"
                )
            raise PolicyError(
                f"{name}={getattr(given, name)!r}{whose} would do nothing: {why}; leave it out"
                f"{'' if name in self.never else advice}"
            )


@spelled
@dataclass(frozen=True)
class Fixed(Amount):
    """Takes for each weight what the options say."""


@spelled
@dataclass(frozen=True)
class Budget(Amount):
    """Takes a number of bytes for the whole model in memory, everything in it counted, random codes as any others.

    Args:
        ratio: Bytes of the model after, over before.
        bytes: Bytes of the model after.

    Raises:
        PolicyError: Unless exactly one of the two is given, and in range.
    """

    chosen: ClassVar[frozenset[str]] = frozenset({"codebook_bits", "sharing", "codebook_dim", "num_subvectors"})

    ratio: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.bytes is None):
            raise PolicyError("a budget needs either ratio or bytes, as in Policy.budget(ratio=0.25)")
        if self.ratio is not None:
            meaning = "the size after over the size before, within 0 to 1"
            number("ratio", self.ratio, meaning, lambda value: 0 < value <= 1)
        if self.bytes is not None:
            whole("bytes", self.bytes, 1, what="of bytes")

    def limit(self, before: int) -> int:
        """Returns the bytes that a model may take, which takes ``before`` bytes dense."""
        return int(self.ratio * before) if self.bytes is None else self.bytes  # type: ignore[operator]

    def _idle(self, options: PartialOptions) -> tuple[str, str] | None:
        if options.allow_growth:
            return "allow_growth", "under a budget no weight is given more bytes than it has"
        if options.sharing in ("shape", "role"):
            return "sharing", "a budget trades layers off one by one, so it can give each its own codebooks or one"
        return None


@spelled
@dataclass(frozen=True)
class Rate(Amount):
    """Takes a number of bits for each weight that is rewritten, all that is stored counted.

    Args:
        bits_per_weight: Codes, codebooks and factors of linear, convolutional and other weights together.
        embedding_bits: The same for embeddings and an output head of as many rows; None leaves them dense.

    Raises:
        PolicyError: If one of them is out of range.
    """

    chosen: ClassVar[frozenset[str]] = frozenset(PartialOptions.__dataclass_fields__) - {
        "grad_scale", "plan", "min_size", "init", "allow_growth",
    }  # fmt: skip
    never: ClassVar[frozenset[str]] = frozenset({"init"})

    bits_per_weight: float
    embedding_bits: float | None = EMBEDDING_BITS

    def __post_init__(self) -> None:
        meaning = "a number of bits, above 0 and at most 16"
        number("bits_per_weight", self.bits_per_weight, meaning, lambda value: 0 < value <= 16)
        if self.embedding_bits is not None:
            number("embedding_bits", self.embedding_bits, meaning, lambda value: 0 < value <= 16)

    def _idle(self, options: PartialOptions) -> tuple[str, str] | None:
        if (name := next((name for name in options.given() if name in self.chosen), None)) is not None:
            return name, f"bits_per_weight chooses {name} for each weight"
        if options.allow_growth:
            return "allow_growth", "bits_per_weight holds for all weights together, so no weight may grow"
        if options.init == "random":
            return "init", "bits_per_weight fits codebooks to the weights there are (Policy.from_scratch draws them)"
        return None


def amount_from(values: Any) -> Amount:
    """Returns the amount that JSON stands for, an object with one field, whose name is that of the class."""
    kinds = {kind.__name__: kind for kind in (Fixed, Budget, Rate)}
    if not isinstance(values, dict) or len(values) != 1 or not isinstance(next(iter(values.values())), dict):
        raise PolicyError(f"amount is an object with one field, one of {', '.join(kinds)}, got {shown(values)}")
    name, options = next(iter(values.items()))
    one_of("amount", name, tuple(kinds))
    return kinds[name](**options)
