"""What an entry of the zoo is, and the catalogue of all of them.

An entry says how to build a dense model with random weights and how to call it. Libraries are imported when an entry
is built, so the catalogue can be listed without any of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LIBRARIES = ("torch", "timm", "torchvision", "transformers", "vit-pytorch")


@dataclass(frozen=True)
class Call:
    """The arguments of one forward."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Model:
    """One model of the zoo.

    Args:
        id: Library and name, such as ``"timm/resnet18"``.
        architecture: What it is counted as; models of different libraries may share one.
        build: Makes the dense model, with random weights.
        call: Makes the arguments of forward, the same ones at each call under the same seed.
        train_call: Those in train mode, where they differ.
        pick: Takes what is to be compared out of what forward returns.
        grad_inputs: Whether gradients of floating inputs are compared; not where a model changes its inputs in place.
    """

    id: str
    architecture: str
    build: Callable[[], nn.Module]
    call: Callable[[], Call]
    train_call: Callable[[], Call] | None = None
    pick: Callable[[Any], Any] | None = None
    grad_inputs: bool = True

    @property
    def library(self) -> str:
        """The first part of the id."""
        return self.id.partition("/")[0]


def catalogue(libraries: Sequence[str] = LIBRARIES) -> list[Model]:
    """Every entry of some libraries.

    Raises:
        ValueError: If two entries have one id.
    """
    found = []
    for library in libraries:
        found += importlib.import_module(f"zoo_{library.replace('-', '_')}").models()
    ids = [model.id for model in found]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise ValueError(f"ids that are taken twice: {sorted(twice)}")
    return found


# ------------------------------------------------------------------------------------------------- usual arguments


def images(size: int = 64, batch: int = 2, channels: int = 3) -> Callable[[], Call]:
    """A batch of square images."""
    return lambda: Call((torch.randn(batch, channels, size, size),))


def floats(*shapes: tuple[int, ...]) -> Callable[[], Call]:
    """One random tensor of each shape."""
    return lambda: Call(tuple(torch.randn(shape) for shape in shapes))


def tokens(vocab: int, length: int = 12, batch: int = 2) -> Tensor:
    """Random ids; 3 at least, so that none has a meaning of its own."""
    return torch.randint(3, vocab, (batch, length))
