"""``RPQConfig``: how ``from_pretrained`` puts weights into codebooks, and what a saved folder says of them."""

from __future__ import annotations

import os
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
from rpqfx.validation.values import closest, shown, whole

METHOD = "rpq"
FORMAT = 1  # of what a saved config says


class RPQConfig(QuantizationConfigMixin):
    """Says how ``from_pretrained`` holds weights in codebooks, while it loads them.

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
        **saved: What ``save_pretrained`` wrote to ``config.json``; nothing that a caller gives.

    Raises:
        PolicyError: If an option does not exist, is out of range, or would do nothing beside the others.
        FormatError: If it is of a folder that a newer version of this library wrote.
    """

    def __init__(
        self,
        bits_per_weight: float | None = None,
        *,
        embedding_bits: float | None = EMBEDDING_BITS,
        modules_to_not_convert: list[str] | None = None,
        policy: Policy | str | None = None,
        seed: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        **saved: Any,
    ) -> None:
        self.quant_method = saved.pop("quant_method", METHOD)
        self.format: int | None = saved.pop("format", None)
        self.version: str | None = saved.pop("version", None)
        self.routing: dict[str, str] = saved.pop("routing", {})
        self.bits_per_weight, self.embedding_bits, self.seed = bits_per_weight, embedding_bits, seed
        self.modules_to_not_convert, self.checkpoint = modules_to_not_convert, checkpoint
        self.policy = policy.to_json() if isinstance(policy, Policy) else policy
        if self.format is not None:
            self._check_saved(saved)
        else:
            self._check_asked(saved)

    def _check_saved(self, more: dict[str, Any]) -> None:
        whole("format of the quantization_config", self.format, 1, error=FormatError)
        assert self.format is not None
        if self.format > FORMAT:
            raise FormatError(
                f"its config.json is of format {self.format} (rpqfx {self.version}), newer than this library reads "
                f"({FORMAT}); update rpqfx"
            )
        if self.checkpoint is not None:
            more = {**more, "checkpoint": self.checkpoint}
        if more or not isinstance(self.routing, dict):
            raise FormatError(f"its config.json has no right quantization_config at {next(iter(more), 'routing')!r}")

    def _check_asked(self, more: dict[str, Any]) -> None:
        known = ["bits_per_weight", "embedding_bits", "modules_to_not_convert", "policy", "seed", "checkpoint"]
        if more or self.routing or self.version:
            wrong = next(iter(more), "routing")
            raise PolicyError(
                f"RPQConfig has no option {shown(wrong)}; it has {', '.join(known)}{closest(wrong, known)}"
            )
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
            FormatError: If it is that of a saved model, whose weights are in codebooks already.
        """
        if self.format is not None:
            raise FormatError(
                "this quantization_config is of a model in codebooks, and the weights to be loaded are dense; give "
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
            bits_per_weight: What its weights in codebooks take; None where there are none.
            routing: Policies of ``route``, as JSON, by the names of what it was called with.
        """
        from rpqfx import __version__

        return cls(bits_per_weight, format=FORMAT, version=__version__, routing=routing)

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``config.json`` holds of it."""
        values: dict[str, Any] = {"quant_method": self.quant_method}
        if self.format is None:
            names = ["bits_per_weight", "embedding_bits", "modules_to_not_convert", "policy", "seed"]
        else:
            names = ["format", "version", "bits_per_weight", "routing"]
        return values | {name: getattr(self, name) for name in names if getattr(self, name) not in (None, {})}
