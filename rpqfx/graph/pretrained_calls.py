"""Calls by which a rewritten transformers model is saved, pushed and given a state dict.

They are attributes of the instance, so the class and its code stay. What they do needs transformers, which is imported
with ``rpqfx.integrations`` when they are called, and never before.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any

from torch import Tensor, nn

from rpqfx.nn.backed import SUFFIX
from rpqfx.nn.weight import RPQWeight
from rpqfx.packing import unpack_codes

_SAVING = "rpqfx.integrations.saving"


class SavePretrained:
    """Stands for a transformers model's ``save_pretrained``, which knows nothing of packed codes.

    Args:
        model: The model; not kept alive, as it keeps this object.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> Any:
        return SavePretrained, (self._model(),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Writes a folder that ``from_pretrained`` reads (see ``rpqfx.integrations.saving``).

        Args:
            *args: As for the model's own method.
            **kwargs: Likewise.
        """
        return importlib.import_module(_SAVING).save_pretrained(self._model(), *args, **kwargs)


class PushToHub:
    """Stands for a transformers model's ``push_to_hub``, which would write its own model card over ours.

    Args:
        model: The model; not kept alive, as it keeps this object.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> Any:
        return PushToHub, (self._model(),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the model and uploads what was written.

        Args:
            *args: As for the model's own method.
            **kwargs: Likewise.
        """
        return importlib.import_module(_SAVING).push_to_hub(self._model(), *args, **kwargs)


def take_packed(model: nn.Module) -> None:
    """Has a model's ``load_state_dict`` take what ``save_pretrained`` wrote, as ``Trainer`` hands it over.

    Args:
        model: A transformers model; one that does so already stays as it is.
    """
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", hook) is _unpack for hook in hooks):
        model.register_load_state_dict_pre_hook(_unpack)


def first_matrix(model: nn.Module) -> tuple[str, Tensor] | None:
    """Returns name and Parameter of a model's first one of several axes, which a folder may hold flat.

    So it does where a model has no weights in codebooks, but attention on codes, say: somebody who opens the folder
    without this library is to meet a shape that does not fit, as with codebooks, and not to get another model.

    Args:
        model: Any model.
    """
    return next(((name, tensor) for name, tensor in model.named_parameters() if tensor.dim() > 1), None)


def _unpack(
    model: nn.Module, state: dict[str, Any], prefix: str, local: Any, strict: bool, missing: Any, unexpected: Any,
    errors: Any,
) -> None:  # fmt: skip
    """Makes of tensors as they are in a folder those that a state dict has; others stay as they are."""
    weights = {
        f"{prefix}{path}": module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, RPQWeight)
    }
    packed = False
    for path, weight in weights.items():
        codes = state.get(f"{path}.codes")
        if isinstance(codes, Tensor) and codes.dim() == 1:
            packed = True
            spec = weight.spec
            state[f"{path}.codes"] = unpack_codes(codes, spec.entries, spec.codes_shape, spec.code_dtype)
            for name, parameter in weight.named_parameters(recurse=False):
                stored = state.get(f"{path}.{name}")
                if isinstance(stored, Tensor) and stored.dtype.itemsize < parameter.dtype.itemsize:
                    state[f"{path}.{name}"] = stored.to(parameter.dtype)
    if (first := None if weights else first_matrix(model)) is not None:
        name, own = first
        flat = state.get(f"{prefix}{name}")
        if isinstance(flat, Tensor) and flat.shape == (own.numel(),):
            state[f"{prefix}{name}"], packed = flat.view(own.shape), True
    if packed:
        _drop_more(model, state, prefix, weights)


def _drop_more(model: nn.Module, state: dict[str, Any], prefix: str, weights: dict[str, RPQWeight]) -> None:
    """Drops what a folder has besides the tensors of a state dict, which never holds these."""
    for path in weights:
        state.pop(path.removesuffix(SUFFIX), None)
    for path, module in model.named_modules(remove_duplicate=False):
        plain = [name for name, value in module.__dict__.items() if isinstance(value, Tensor)]
        for name in (*module._non_persistent_buffers_set, *plain):
            state.pop(f"{prefix}{path}.{name}" if path else f"{prefix}{name}", None)
