"""The policy of a KV cache: how its keys and values are quantized."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rpqfx.errors import PolicyError
from rpqfx.policies.base import PolicyBase
from rpqfx.policies.name_rules import NameRule
from rpqfx.validation.spelling import spelled
from rpqfx.validation.values import flag, number, one_of, shown, whole

_MOST_BITS = 8.0
_STAGES, _BEAM = 6, 8
_UNIT = 8  # tokens whose codes fill whole bytes, whatever their bits


@spelled
@dataclass(frozen=True)
class KVRule(NameRule):
    """Says what differs for some attention layers.

    Args:
        match: A pattern (as of file names) for the qualified names of attention modules.
        skip: Why these keep their cache as it is, or None where they do not.
        bits_per_value: Bits for these, in place of the policy's, and a budget of their own.
    """

    goes_with: ClassVar[str] = "KVPolicy"

    bits_per_value: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits_per_value is not None:
            _check_bits(self.bits_per_value)


@spelled
@dataclass(frozen=True)
class KVPolicy(PolicyBase):
    """Says how keys and values are quantized.

    Tokens older than the window are kept as codes. With ``transform=True`` a linear map takes each head's vector to
    uncorrelated coordinates in which errors count alike, and each sub-vector of these is a sum of entries, of more
    entries where there is more to say (after Huang and Schultheiss, 1963). With ``transform=False`` the sub-vectors are
    of the channels as they are, and all are sums of as many entries (as in vqllm, 2410.15704).

    Of rules that match a layer the first is followed; else the policy's own values hold.

    Args:
        bits_per_value: Bits for each number of keys and values together: codes, and scales where there are any.
            Codebooks, maps, and the window come on top; a cache's ``nbytes`` counts each.
        window: Recent tokens in full precision, at least so many.
        sinks: First tokens in full precision (Xiao et al., 2309.17453).
        keys: ``"before"`` or ``"after"`` the rotary embedding, or ``"auto"``: before it where the model shows it,
            after it elsewhere. Before it keys are easier to code; after it they are faster to use.
        codebook_dim: ``d``, channels that share an entry.
        codebook_size: ``K`` of each codebook.
        stages: Residual stages of a sub-vector at most, 6 if left out. Without transform their number follows from
            ``bits_per_value``, and is not given.
        transform: Whether there is the linear map, and a number of stages for each sub-vector.
        joint: Whether a layer's heads share codes, which saves about half a bit; each has its own otherwise. Left out,
            they do where there is a transform and no scale, and only there they can.
        strided: Without transform: sub-vectors of channels that are far apart, for keys.
        normalize: Whether there is a scale for each token and head; heads are apart then.
        use_cosine_sim: Whether entries are chosen by angle.
        beam: Sums that go on from stage to stage while encoding, 8 if left out; 1 is greedy, as by angle always.
        decay: Of moving averages that codebooks follow in training; None: they are trained by gradient.
        chunk: Tokens that leave the window at a time, a multiple of 8.
        rules: What differs for some layers.
        skip_layers: Numbers of the attention modules, in the order in which the model has them, that keep their cache
            as it is; negative ones count from the last.

    Raises:
        PolicyError: If an option does not exist, is out of range, or would do nothing beside the others.
    """

    goes_with: ClassVar[str] = "quantize_kv"
    rule: ClassVar[type] = KVRule

    bits_per_value: float = 2.0
    window: int = 128
    sinks: int = 4
    keys: Literal["auto", "before", "after"] = "auto"
    codebook_dim: int = 8
    codebook_size: int = 256
    stages: int | None = None
    transform: bool = True
    joint: bool | None = None
    strided: bool = False
    normalize: bool = False
    use_cosine_sim: bool = False
    beam: int | None = None
    decay: float | None = None
    chunk: int = 16
    rules: tuple[KVRule, ...] = ()
    skip_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_bits(self.bits_per_value)
        for name, (least, most) in _RANGES.items():
            if getattr(self, name) is not None or name not in ("stages", "beam"):
                whole(name, getattr(self, name), least, most)
        for name in ("transform", "strided", "normalize", "use_cosine_sim"):
            flag(name, getattr(self, name))
        if self.joint is not None:
            flag("joint", self.joint)
        one_of("keys", self.keys, ("auto", "before", "after"))
        if self.decay is not None:
            number("decay", self.decay, "between 0 and 1, or None", lambda value: 0 < value < 1)
        if self.chunk % _UNIT:
            near = max(_UNIT, round(self.chunk / _UNIT) * _UNIT)
            raise PolicyError(
                f"chunk is a multiple of {_UNIT}, so that codes fill whole bytes, got {self.chunk}; give {near}"
            )
        self._check_rules()
        self._check_skipped()
        self._check_idle()
        for name, value in self.defaults().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def defaults(self) -> dict[str, Any]:
        """Returns the values that fields have where they are left out, which depend on the others."""
        joint, beam = self.transform and not self.normalize, 1 if self.use_cosine_sim else _BEAM
        return {**super().defaults(), "joint": joint, "beam": beam, "stages": _STAGES if self.transform else None}

    def _check_skipped(self) -> None:
        layers = self.skip_layers
        if not isinstance(layers, (tuple, list)) or any(type(layer) is not int for layer in layers):
            raise PolicyError(f"skip_layers are numbers of layers, as in skip_layers=(0, -1), got {shown(layers)}")
        if len(set(layers)) < len(layers):
            raise PolicyError(f"skip_layers names a layer twice: {shown(layers)}")
        object.__setattr__(self, "skip_layers", tuple(layers))

    def _check_idle(self) -> None:
        """Sees that no option is given that would do nothing."""
        if self.strided and self.transform:
            raise PolicyError(
                "strided=True would do nothing with the linear map, which mixes channels anyway; leave it out, or give "
                "transform=False"
            )
        if self.joint and not (self.transform and not self.normalize):
            cause = "normalize=True" if self.transform else "transform=False"
            raise PolicyError(f"joint=True cannot be had with {cause}, where heads are apart; leave joint out")
        if self.stages is not None and not self.transform:
            raise PolicyError(
                f"stages={self.stages} would do nothing with transform=False, where bits_per_value says how many "
                "stages there are (bits_per_value * codebook_dim / log2(codebook_size)); leave it out"
            )
        if self.use_cosine_sim and self.beam not in (None, 1):
            raise PolicyError(
                f"beam={self.beam} would do nothing with use_cosine_sim=True, which is greedy; leave it out"
            )

    @property
    def codebook_bits(self) -> int:
        """Bits that a code takes."""
        return math.ceil(math.log2(self.codebook_size))

    def of(self, name: str) -> KVPolicy | str:
        """Returns the policy of a layer.

        Args:
            name: Qualified name of the attention module.

        Returns:
            A policy without rules, or why the layer is skipped.
        """
        rule = self.rule_for(name)
        if rule is not None and rule.skip is not None:
            return str(rule.skip)
        return dataclasses.replace(
            self, bits_per_value=self.bits_per_value if rule is None else rule.bits_per_value, rules=(), skip_layers=()
        )

    @classmethod
    def preset(cls, name: str) -> KVPolicy:
        """Returns the policy of a name: ``"2bit"``, ``"3bit"`` or ``"4bit"``, bits for each number.

        All else is as it is left out; ``dataclasses.replace`` changes more of it.

        Args:
            name: Name of the preset.

        Raises:
            PolicyError: If there is no preset of that name.
        """
        one_of("preset", name, tuple(_PRESETS))
        return cls(bits_per_value=_PRESETS[name])


_PRESETS = {"2bit": 2.0, "3bit": 3.0, "4bit": 4.0}
_RANGES = {
    "window": (0, 2**31 - 1), "sinks": (0, 2**31 - 1), "codebook_dim": (1, 2**31 - 1), "codebook_size": (2, 65_536),
    "stages": (1, 64), "beam": (1, 65_536), "chunk": (1, 2**31 - 1),
}  # fmt: skip


def _check_bits(bits: float) -> None:
    meaning = f"more than 0 and at most {_MOST_BITS:g} for each number"
    number("bits_per_value", bits, meaning, lambda value: 0 < value <= _MOST_BITS)
