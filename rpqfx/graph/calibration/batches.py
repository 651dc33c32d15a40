"""Calibration batches as calls of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rpqfx.errors import InputError
from rpqfx.validation.values import shown


class Batches:
    """The batches that are run to see a model's inputs.

    Args:
        model: The model.
        batches: Each a tensor (the one positional input), a tuple or list (positional inputs) or a mapping (keyword
            inputs).

    Raises:
        InputError: If a batch is none of these, is empty or holds NaN.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        _check_container(batches)
        self.calls = [_call(batch, f"calibration batch {number}") for number, batch in enumerate(batches)]
        self.runs: list[Callable[[], Any]] = [self._run(model, number) for number in range(len(self.calls))]

    def _run(self, model: nn.Module, number: int) -> Callable[[], Any]:
        args, kwargs = self.calls[number]

        def run() -> Any:
            try:
                return model(*args, **kwargs)
            except Exception as error:
                raise InputError(
                    f"the model rejects calibration batch {number} ({type(error).__name__}: {error}); a batch is a "
                    "tensor, a tuple of positional inputs or a mapping of keyword inputs"
                ) from error

        return run


def calibration_of(batches: Any) -> list[Any]:
    """Calibration batches, checked before any work is done with them.

    Args:
        batches: What a caller gave as calibration.

    Returns:
        The batches; a generator is used up by this.

    Raises:
        InputError: If it is no iterable of batches (one batch, most often), holds none, or one of them is empty, holds
            NaN or is something else than a batch.
    """
    _check_container(batches)
    found = list(batches)
    if not found:
        spent = iter(batches) is batches
        why = "an iterator that was gone through before holds nothing any more; give a list" if spent else "give some"
        raise InputError(f"there are no calibration batches: calibration is an empty {type(batches).__name__}; {why}")
    for number, batch in enumerate(found):
        _call(batch, f"calibration batch {number}")
    return found


def arguments(batch: Any, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of a batch.

    Args:
        batch: A tensor, a tuple or list, or a mapping.
        name: Of the batch, for the message.

    Raises:
        InputError: If it is something else, or its tensors hold nothing.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, Mapping):
        kwargs = dict(batch)
    elif isinstance(batch, (tuple, list)):
        args = tuple(batch)
    else:
        raise InputError(f"{name} is a tensor, a tuple or a mapping, got {shown(batch)}{_hint(batch)}")
    if wrong := next((key for key in kwargs if not isinstance(key, str)), None):
        raise InputError(f"{name} is a mapping of keyword inputs, whose keys are names, got the key {shown(wrong)}")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
    if tensors and not any(tensor.numel() for tensor in tensors):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors[:3])
        raise InputError(f"{name} is empty: its tensors have the shapes {shapes}; leave it out")
    if any(tensor.is_inference() for tensor in tensors):
        args, kwargs = tree_map(_recordable, (args, kwargs))
    return args, kwargs


def _check_container(batches: Any) -> None:
    if isinstance(batches, (Tensor, Mapping, str)):
        raise InputError(f"calibration is a sequence of batches, got one {type(batches).__name__}; put it in a list")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        hint = "; call it, and pass what it returns" if callable(batches) else "; give a list of them"
        raise InputError(f"calibration is a sequence of batches, got {shown(batches)}{hint}")


def _call(batch: Any, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As ``arguments``, of a calibration batch, which holds no NaN."""
    args, kwargs = arguments(batch, name)
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.is_meta and bool(leaf.isnan().any()):
            bad = int(leaf.isnan().sum())
            raise InputError(
                f"{name} holds NaN ({bad:,} of {leaf.numel():,} numbers of a tensor {list(leaf.shape)}); look at where "
                "it comes from, or leave it out"
            )
    return args, kwargs


def _recordable(leaf: Any) -> Any:
    """Tensors that were made in inference mode take no part in gradients; their copies do."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _hint(batch: Any) -> str:
    if hasattr(batch, "__array__") and not isinstance(batch, torch.Tensor):
        return "; make a tensor of it: torch.as_tensor(...)"
    return ""
