"""``RPQConfig`` and the quantiser by which ``from_pretrained`` of transformers opens and makes models in codebooks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

try:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError("this needs transformers 5, the extra: pip install 'rpqfx[transformers]'") from error

from rpqfx.errors import FormatError, InputError, PolicyError
from rpqfx.policies.arguments import check_path
from rpqfx.policies.options import Rule
from rpqfx.policies.policy import EMBEDDING_BITS, Policy
from rpqfx.validation.values import closest, number, shown, whole

if TYPE_CHECKING:  # these import what is not there yet while transformers itself is being imported
    from rpqfx.integrations.quantizing import Quantizing
    from rpqfx.integrations.restoring import Restoring

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
            for name in ("bits_per_weight", "embedding_bits"):
                if getattr(self, name) is not None:
                    meaning = "a number of bits, above 0 and at most 16"
                    number(name, getattr(self, name), meaning, lambda value: 0 < value <= 16)
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


class RPQQuantizer(HfQuantizer):
    """Opens a folder of a model in codebooks, or puts weights into codebooks as they are loaded.

    What it does with one model lies in an object of its own, which is there for the length of that call.

    Args:
        quantization_config: An ``RPQConfig``.
        **kwargs: As for its base.
    """

    requires_calibration = False

    def __init__(self, quantization_config: RPQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._work: Restoring | Quantizing | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses what cannot be done with weights that are put into codebooks on the way.

        Args:
            *args: As for its base.
            device_map: Where tensors go.
            **kwargs: As for its base.

        Raises:
            InputError: If some of them are to go to the disk.
        """
        if self.pre_quantized:
            return
        self.quantization_config.asked()
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise InputError(
                "weights that are put into codebooks while they are loaded stay in memory, and device_map sends some "
                "to the disk; load the model without, save it, and open the folder with this device_map"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from rpqfx.integrations.quantizing import Quantizing
        from rpqfx.integrations.restoring import Restoring

        if self.pre_quantized:
            files = kwargs.get("checkpoint_files")
            self._work = Restoring(model, files, self.quantization_config.routing, torch.get_default_dtype())
        else:
            config = self.quantization_config
            self._work = Quantizing(model, config.asked(), config.seed, config.checkpoint)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        work, self._work = self._work, None
        assert work is not None
        work.finish(model)
        for module in model.modules():  # it is an ordinary model, which can be cast and trained; these would forbid it
            module.__dict__.pop("is_quantized", None)
            getattr(getattr(module, "config", None), "__dict__", {}).pop("_is_quantized", None)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Returns whether a tensor goes through this library on its way into the model.

        Args:
            model: The model.
            param_name: Of the tensor, there.
            **kwargs: As for its base.
        """
        return self._work is not None and self._work.takes(param_name)

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Returns the bytes of an element of a tensor, once it is loaded.

        Args:
            model: The model.
            param_name: Of the tensor.
            param: As it is on the meta device.
        """
        size = None if self._work is None else self._work.element_size(param_name)
        return param.element_size() if size is None else size

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Returns the dtype that a tensor of a folder is given.

        Args:
            converter: Says where it goes.
            param: The tensor, as it is in the file.
            dtype: What transformers would give it.
        """
        return dtype if self._work is None else self._work.dtype_of(converter, dtype)

    def get_quantize_ops(self) -> Any:
        """Returns what puts a weight into codebooks."""
        return self._work

    def get_weight_conversions(self) -> list[Any]:
        """Returns what makes tensors of what a folder holds."""
        return [] if self._work is None else self._work.conversions()

    def update_weight_conversions(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Leaves out the model's own conversions for a folder, where tensors have the names that the model has.

        Args:
            *args: As for its base.
            **kwargs: Likewise.
        """
        return (
            self.get_weight_conversions() if self.pre_quantized else super().update_weight_conversions(*args, **kwargs)
        )

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[Any, dict[str, str]]:
        """Returns what a folder of a model holds.

        Args:
            model: A rewritten model.
        """
        from rpqfx.integrations.content import content

        return (None, {}) if getattr(model, "_hf_peft_config_loaded", False) else content(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Returns that its models can be saved.

        Args:
            *args: As for its base.
            **kwargs: Likewise.
        """
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained beside weights in codebooks."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether codebooks themselves can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model."""
        return True


AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, RPQConfig)
AUTO_QUANTIZER_MAPPING.setdefault(METHOD, RPQQuantizer)
