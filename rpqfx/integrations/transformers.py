"""The quantiser by which ``from_pretrained`` of transformers opens and makes quantized models."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

try:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer
except ImportError as error:
    raise ImportError("this needs transformers 5, the extra: pip install 'rpqfx[transformers]'") from error

from rpqfx.errors import InputError
from rpqfx.integrations.config import METHOD, RPQConfig

if TYPE_CHECKING:  # these import what is not there yet while transformers itself is being imported
    from rpqfx.integrations.quantizing import Quantizing
    from rpqfx.integrations.restoring import Restoring


class RPQQuantizer(HfQuantizer):
    """Opens a folder of a quantized model, or quantizes weights as they are loaded.

    What it does with one model lies in an object of its own, which is there for the length of that call.

    Args:
        quantization_config: An ``RPQConfig``.
        **kwargs: As for its base.
    """

    requires_calibration = False

    def __init__(self, quantization_config: RPQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._work: Restoring | Quantizing | None = None
        self._model: weakref.ref[nn.Module] | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses what cannot be done with weights that are quantized on the way.

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
                "weights that are quantized while they are loaded stay in memory, and device_map sends some "
                "to the disk; load the model without, save it, and open the folder with this device_map"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._model = weakref.ref(model)
        if self.pre_quantized:
            from rpqfx.integrations.restoring import Restoring

            self._work = Restoring(
                model, kwargs.get("checkpoint_files"), self.quantization_config.routing, torch.get_default_dtype(),
                kwargs.get("device_map"),
            )  # fmt: skip
        else:
            from rpqfx.integrations.quantizing import Quantizing

            config = self.quantization_config
            self._work = Quantizing(model, config.asked(), config.seed, config.checkpoint)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._check_whole()
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
        self._check_whole()
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
        self._check_whole()
        return dtype if self._work is None else self._work.dtype_of(converter, dtype)

    def _check_whole(self) -> None:
        """Raises where transformers has shared out the model over processes, before it reads the first tensor, if any.

        It shares out after it has asked what becomes of the model, and tells no quantiser.
        """
        model = None if self._model is None else self._model()
        if getattr(model, "_device_mesh", None) is not None:
            raise InputError(
                "transformers shares out a model over processes (tp_plan=, distributed_config=) by styles of its own, "
                "which know no codebooks; load it without, whole in every process, and call torch's parallelize_module "
                "with ColwiseParallel and RowwiseParallel of rpqfx.distributed, or rpqfx.distributed.fully_shard"
            )

    def get_quantize_ops(self) -> Any:
        """Returns what quantizes a weight."""
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
        """Whether adapters can be trained beside quantized weights."""
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
