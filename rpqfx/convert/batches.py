"""Calibration batches as calls of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from rpqfx.errors import InputError


class Batches:
    """What is run to see a model's inputs.

    Args:
        model: The model.
        batches: Each a tensor (the one positional input), a tuple or list (positional inputs) or a mapping (keyword
            inputs).

    Raises:
        InputError: If a batch is none of these.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        if isinstance(batches, (Tensor, Mapping, str)):
            raise InputError(
                f"calibration is a sequence of batches, got one {type(batches).__name__}; put it in a list"
            )
        self.calls = [arguments(batch, f"calibration batch {number}") for number, batch in enumerate(batches)]
        self.runs: list[Callable[[], Any]] = [self._run(model, number) for number in range(len(self.calls))]

    def of(self, model: nn.Module) -> Batches:
        """The same batches for another model."""
        twin = copy.copy(self)
        twin.runs = [twin._run(model, number) for number in range(len(self.calls))]
        return twin

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


def arguments(batch: Any, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of a batch.

    Args:
        batch: A tensor, a tuple or list, or a mapping.
        name: Of the batch, for the message.

    Raises:
        InputError: If it is something else.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise InputError(f"{name} is a tensor, a tuple or a mapping, got {type(batch).__name__}")
