"""Calls by which a rewritten transformers model is saved, pushed and given a state dict.

They are attributes of the instance, so the class and its code stay. What they do needs transformers, which is imported
with ``rpqfx.integrations`` when they are called, and never before.
"""

from __future__ import annotations

import importlib
import inspect
import math
import weakref
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from rpqfx.codebook.packed_tiles import unpack_tiles
from rpqfx.codebook.packing import packed_bytes, unpack_codes
from rpqfx.codebook.stored_codes import unpack
from rpqfx.nn.hosting.backed import SUFFIX
from rpqfx.nn.weight import RPQWeight

_SAVING = "rpqfx.integrations.saving"
EXTRA = "extra_state_rpq"
"""The name of a module's extra state in a folder; transformers would take torch's name of it for a tensor."""


class _Call:
    """A call of a model, which lies in an attribute of it and has the signature of the method that it stands for.

    It refers to the model weakly, since the model refers to it, and models are freed when the last name is gone. In
    ``rpqify(model, policy).save_pretrained(folder)`` that is before the call begins; so it keeps what the model's
    attributes are, which an object of the same class makes a model of again.

    Args:
        model: The model.
        state: Its attributes; left out, those that it has now.
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module, state: dict[str, Any] | None = None) -> None:
        self._model, self._kind = weakref.ref(model), type(model)
        self._state = _attributes(model) if state is None else state
        own = getattr(type(model), self.name, None)
        if own is not None:  # what help() and editors show of it, and what it takes
            asked = inspect.signature(own)
            self.__signature__ = asked.replace(parameters=list(asked.parameters.values())[1:])

    def __reduce__(self) -> Any:
        model = self._model()
        state = self._state if model is None else _attributes(model)
        return type(self), (self._whole() if model is None else model, state)

    def _whole(self) -> nn.Module:
        model = self._model()
        if model is None:
            model = object.__new__(self._kind)
            for name, value in self._state.items():  # those of its calls that refer to it refer to one that is gone
                refers = isinstance(getattr(value, "_model", None), weakref.ref)
                model.__dict__[name] = type(value)(model) if refers else value
        return model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Does what ``rpqfx.integrations.saving`` does.

        Args:
            *args: As for the model's own method.
            **kwargs: Likewise.
        """
        return getattr(importlib.import_module(_SAVING), self.name)(self._whole(), *args, **kwargs)


class SavePretrained(_Call):
    """Stands for a transformers model's ``save_pretrained``, which knows nothing of packed codes."""

    name = "save_pretrained"


class PushToHub(_Call):
    """Stands for a transformers model's ``push_to_hub``, which would write its own model card over ours."""

    name = "push_to_hub"


def renew_calls(model: nn.Module) -> None:
    """Has the calls of a model, and of models within it, keep the attributes that there are by now.

    Args:
        model: Any model; one without these calls stays as it is.
    """
    for module in model.modules():
        for name, value in module.__dict__.items():
            if isinstance(value, _Call):
                module.__dict__[name] = type(value)(module)


def _attributes(model: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in model.__dict__.items() if not isinstance(value, _Call)}


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

    So it does where a model has no quantized weights, but attention on codes, say: somebody who opens the folder
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
    for name in [name for name in state if name.startswith(prefix) and name.endswith(f".{EXTRA}")]:
        state[name.removesuffix(EXTRA) + _EXTRA_STATE_KEY_SUFFIX], packed = state.pop(name), True
    for path, weight in weights.items():
        codes = state.get(f"{path}.codes")
        if isinstance(codes, Tensor) and codes.dim() == 1:
            packed = True
            state[f"{path}.codes"] = _unpacked(weight, codes)
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


def _unpacked(weight: RPQWeight, stored: Tensor) -> Tensor:
    spec = weight.spec
    if len(stored) >= packed_bytes(math.prod(spec.codes_shape), spec.entries):
        if spec.tiled:
            return unpack_tiles(stored, spec.entries, spec.codes_shape)
        return unpack_codes(stored, spec.entries, spec.codes_shape, spec.code_dtype)
    codes, weight.code_seed = unpack(stored, spec.codes_shape, spec.entries)
    return codes


def _drop_more(model: nn.Module, state: dict[str, Any], prefix: str, weights: dict[str, RPQWeight]) -> None:
    """Drops what a folder has besides the tensors of a state dict, which never holds these."""
    for path in weights:
        state.pop(path.removesuffix(SUFFIX), None)
    for path, module in model.named_modules(remove_duplicate=False):
        plain = [name for name, value in module.__dict__.items() if isinstance(value, Tensor)]
        for name in (*module._non_persistent_buffers_set, *plain):
            state.pop(f"{prefix}{path}.{name}" if path else f"{prefix}{name}", None)
