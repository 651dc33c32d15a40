"""How a model's KV cache is held in codebooks: values that say it, and nothing that does it."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from dataclasses import dataclass
from typing import Literal

from rpqfx import byname
from rpqfx.errors import PolicyError

_MOST_BITS = 8.0


@dataclass(frozen=True)
class KVRule:
    """What differs for some attention layers.

    Args:
        match: A pattern (as of file names) for the qualified names of attention modules.
        skip: Why these keep their cache as it is, or None where they do not.
        bits: For these, in place of the policy's, and a budget of their own.
    """

    match: str
    skip: str | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        if (self.skip is None) == (self.bits is None):
            raise PolicyError(f"a KVRule either skips layers or sets bits for them; {self.match!r} has both or neither")
        if self.bits is not None:
            _check_bits(self.bits)

    def matches(self, name: str) -> bool:
        """Whether it holds for the attention module of this name."""
        return fnmatch.fnmatchcase(name, self.match)


@dataclass(frozen=True)
class KVPolicy:
    """How keys and values are held.

    Tokens older than the window are codes: each head's vector is turned by a linear map that makes its errors count
    alike and its coordinates uncorrelated, and sub-vectors of it are sums of entries, more of them where there is more
    to say (``transform=True``, after Huang and Schultheiss, 1963); or sub-vectors of the channels as they are, all with
    as many entries (``transform=False``, as in vqllm, 2410.15704).

    Of rules that match a layer the first is followed; else the policy's own values hold.

    Args:
        bits: For each number of keys and values together: codes, and scales where there are any. Codebooks, maps, and
            the window come on top; a cache's ``nbytes`` counts each.
        window: Recent tokens in full precision, at least so many.
        sinks: First tokens in full precision (Xiao et al., 2309.17453).
        keys: ``"before"`` or ``"after"`` the rotary embedding, or ``"auto"``: before it where the model shows it,
            after it elsewhere. Before it keys are easier to code; after it they are faster to use.
        sub_vector: ``d``, channels that share an entry.
        entries: ``K`` of each codebook.
        stages: Residual stages at most.
        transform: Whether there is the linear map, and a number of stages for each sub-vector.
        joint: Whether a layer's heads share codes, which saves about half a bit; each has its own otherwise.
        strided: Without transform: sub-vectors of channels that are far apart, for keys.
        scaled: A scale for each token and head; heads are apart then.
        cosine: Whether entries are chosen by angle.
        beam: Sums that go on from stage to stage while encoding; 1 is greedy.
        decay: Of moving averages that codebooks follow in training; None: they are trained by gradient.
        chunk: Tokens that leave the window at a time.
        rules: What differs for some layers.

    Raises:
        PolicyError: If a value is out of range.
    """

    bits: float = 2.0
    window: int = 128
    sinks: int = 4
    keys: Literal["auto", "before", "after"] = "auto"
    sub_vector: int = 8
    entries: int = 256
    stages: int = 6
    transform: bool = True
    joint: bool = True
    strided: bool = False
    scaled: bool = False
    cosine: bool = False
    beam: int = 8
    decay: float | None = None
    chunk: int = 16
    rules: tuple[KVRule, ...] = ()

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        for name, least in (("window", 0), ("sinks", 0), ("sub_vector", 1), ("stages", 1), ("beam", 1), ("chunk", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise PolicyError(f"{name} is a whole number of at least {least}, got {value!r}")
        if not isinstance(self.entries, int) or not 2 <= self.entries <= 65_536:
            raise PolicyError(f"entries are 2 to 65,536, got {self.entries!r}")
        if self.keys not in ("auto", "before", "after"):
            raise PolicyError(f'keys are held "before" or "after" the rotary embedding, or "auto", got {self.keys!r}')
        if self.decay is not None and not 0 < self.decay < 1:
            raise PolicyError(f"decay is between 0 and 1, got {self.decay!r}")
        object.__setattr__(self, "rules", tuple(self.rules))

    @property
    def code_bits(self) -> int:
        """Bits that a code takes."""
        return math.ceil(math.log2(self.entries))

    def of(self, name: str) -> KVPolicy | str:
        """What holds for a layer.

        Args:
            name: Qualified name of the attention module.

        Returns:
            A policy without rules, or why the layer is skipped.
        """
        for rule in self.rules:
            if rule.matches(name):
                return rule.skip or dataclasses.replace(self, bits=rule.bits or self.bits, rules=())
        return dataclasses.replace(self, rules=())

    def to_json(self) -> str:
        """The policy as JSON; ``from_json`` reads it."""
        return byname.to_json(self)

    @classmethod
    def from_json(cls, text: str) -> KVPolicy:
        """The policy that ``to_json`` wrote.

        Raises:
            PolicyError: If the text says something else.
        """
        return byname.from_json(cls, KVRule, text, cls.__name__)


def _check_bits(bits: float) -> None:
    if not (isinstance(bits, (int, float)) and 0 < bits <= _MOST_BITS):
        raise PolicyError(f"bits are more than 0 and at most {_MOST_BITS:g} for each number, got {bits!r}")
