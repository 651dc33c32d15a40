"""``RPQConfig``: how ``from_pretrained`` quantizes weights, and what a saved folder says of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

try:
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError("this needs transformers 5, the extra: pip install 'rpqfx[transformers]'") from error

from rpqfx.errors import FormatError, PolicyError
from rpqfx.policies.amount import EMBEDDING_BITS, Rate
from rpqfx.policies.arguments import check_path
from rpqfx.policies.options import Rule
from rpqfx.policies.policy import Policy
from rpqfx.validation.spelling import spelled
from rpqfx.validation.values import shown, whole

METHOD = "rpq"
FORMAT = 1  # of what a saved config says
_OPTIONS = ("bits_per_weight", "embedding_bits", "modules_to_not_convert", "policy", "seed", "checkpoint")
_SAVED = ("format", "version", "bits_per_weight", "routing")


@spelled
class RPQConfig(QuantizationConfigMixin):
    """Says how ``from_pretrained`` quantizes weights while it loads them.

    Weights are fitted as they come, without data, so at no time is there more than about one dense layer beside what is
    done. Codebooks are those of the first weight that needs them: scaled, weights look alike. To calibrate on data,
    which costs less quality at the same size, use [`rpqify`][rpqfx.rpqify] and ``save_pretrained``.

    Example:
        >>> AutoModelForCausalLM.from_pretrained(name, quantization_config=RPQConfig(bits_per_weight=3))

    Args:
        bits_per_weight: As in [`Policy.pretrained`][rpqfx.policies.policy.Policy.pretrained].
        embedding_bits: The same for embeddings and a head of as many rows; None leaves them dense.
        modules_to_not_convert: Names of modules, or ends of their names, whose weights stay dense.
        policy: A [`Policy`][rpqfx.policies.policy.Policy] (or what its ``to_json`` returned) in place of these three.
        seed: Of the fits.
        checkpoint: Folder for finished weights. The same call with the same folder goes on where it was interrupted; no
            saved config says it.

    Raises:
        PolicyError: If an option does not exist, is out of range, or would do nothing beside the others.
    """

    modules_to_not_convert: list[str] | None
    policy: str | None
    checkpoint: str | os.PathLike[str] | None
    format: int | None
    version: str | None
    routing: dict[str, str]

    def __init__(
        self,
        bits_per_weight: float | None = None,
        *,
        embedding_bits: float | None = EMBEDDING_BITS,
        modules_to_not_convert: list[str] | None = None,
        policy: Policy | str | None = None,
        seed: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        self._set(bits_per_weight, embedding_bits)
        self.modules_to_not_convert, self.seed, self.checkpoint = modules_to_not_convert, seed, checkpoint
        self.policy = policy.to_json() if isinstance(policy, Policy) else policy
        self._check()

    def _set(self, bits_per_weight: float | None, embedding_bits: float | None) -> None:
        """Sets what both kinds have: those that ask for codebooks, and those that say that there are some."""
        self.quant_method = METHOD
        self.bits_per_weight, self.embedding_bits, self.seed = bits_per_weight, embedding_bits, 0
        self.modules_to_not_convert = self.checkpoint = self.policy = self.format = self.version = None
        self.routing = {}

    def _check(self) -> None:
        whole("seed", self.seed, 0)
        if self.checkpoint is not None:
            check_path(self.checkpoint, "checkpoint")
        if self.policy is None:
            if self.bits_per_weight is None:
                raise PolicyError("RPQConfig needs a number of bits, as in RPQConfig(bits_per_weight=3), or a policy")
            Rate(self.bits_per_weight, self.embedding_bits)  # which checks them
            self._skips()
        elif (self.bits_per_weight, self.embedding_bits, self.modules_to_not_convert) != (None, EMBEDDING_BITS, None):
            raise PolicyError("RPQConfig takes a policy, or bits_per_weight and what goes with it; give one of them")
        elif not isinstance(self.policy, str):
            raise PolicyError(f"policy is a Policy or its JSON, got {shown(self.policy)}")
        self.asked()

    def _skips(self) -> tuple[Rule, ...]:
        names = self.modules_to_not_convert or []
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
            raise PolicyError(f"modules_to_not_convert is a list of names, got {shown(names)}")
        return tuple(Rule(f"*{name}.*", skip="in modules_to_not_convert") for name in names)

    def asked(self) -> Policy:
        """Returns the policy that it stands for.

        Raises:
            FormatError: If it is that of a saved model, whose weights are quantized already.
        """
        if self.format is not None:
            raise FormatError(
                "this quantization_config is of a quantized model, and the weights to be loaded are dense; give "
                "RPQConfig(bits_per_weight=...)"
            )
        if self.policy is not None:
            return Policy.from_json(self.policy)
        assert self.bits_per_weight is not None
        return Policy.pretrained(self.bits_per_weight, embedding_bits=self.embedding_bits, rules=self._skips())

    @classmethod
    def of_saved(cls, bits_per_weight: float | None, routing: dict[str, str]) -> RPQConfig:
        """Makes the one of a model that is saved.

        Args:
            bits_per_weight: What its quantized weights take; None where there are none.
            routing: Policies of ``route``, as JSON, by the names of what it was called with.
        """
        from rpqfx import __version__

        made = cls.__new__(cls)
        made._set(bits_per_weight, EMBEDDING_BITS)
        made.format, made.version, made.routing = FORMAT, __version__, routing
        return made

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> RPQConfig | tuple[RPQConfig, dict[str, Any]]:
        """Makes one of what ``to_dict`` returned, as transformers does with what ``config.json`` says.

        Args:
            config_dict: The values by name.
            return_unused_kwargs: Whether to return arguments that are no options, too, and not to refuse them.
            **kwargs: Options that take the place of those values.

        Raises:
            PolicyError: If an option does not exist, is out of range, or would do nothing beside the others.
            FormatError: If it is of a folder that a newer version of this library wrote, or was altered.
        """
        values = {name: value for name, value in config_dict.items() if name != "quant_method"}
        unused = {name: value for name, value in kwargs.items() if return_unused_kwargs and name not in _OPTIONS}
        values |= {name: value for name, value in kwargs.items() if name not in unused}
        made = cls._of_folder(values) if values.get("format") is not None else cls(**values)
        return (made, unused) if return_unused_kwargs else made

    @classmethod
    def _of_folder(cls, values: Mapping[str, Any]) -> RPQConfig:
        written, version = values["format"], values.get("version")
        whole("format of the quantization_config", written, 1, error=FormatError)
        if written > FORMAT:
            raise FormatError(
                f"its config.json is of format {written} (rpqfx {version}), newer than this library reads "
                f"({FORMAT}); update rpqfx"
            )
        bits, routing = values.get("bits_per_weight"), values.get("routing", {})
        wrong = [name for name in values if name not in _SAVED]
        wrong += [] if isinstance(routing, dict) else ["routing"]
        wrong += [] if bits is None or type(bits) in (int, float) else ["bits_per_weight"]
        if wrong:
            raise FormatError(f"its config.json has no right quantization_config at {wrong[0]!r}")
        made = cls.of_saved(bits, routing)
        made.format, made.version = written, version
        return made

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``config.json`` holds of it."""
        values: dict[str, Any] = {"quant_method": self.quant_method}
        if self.format is None and self.policy is None:
            values["embedding_bits"] = self.embedding_bits  # None says that embeddings stay dense
        names = [name for name in _OPTIONS if name != "checkpoint"] if self.format is None else _SAVED
        return values | {name: getattr(self, name) for name in names if getattr(self, name) not in (None, {})}
