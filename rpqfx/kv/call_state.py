"""The state of one call of an attention module."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from rpqfx.kv.attention.rotary import Rotary
from rpqfx.kv.cache.layer import LayerStore


class Underway(threading.local):
    """The call of an attention module that is under way in this thread, and the loss of this thread's last one.

    Threads that share a model do not see each other's.
    """

    rotary: Rotary | None = None
    """Angles of the call's tokens."""

    store: LayerStore | None = None
    """The cache that the call's tokens go to."""

    near: Tensor | None = None
    """Which tokens the queries of the call find as they are, where keys and values have been handed on twice."""

    loss: Tensor | None = None
    """The quantisers' loss of the last call in training."""

    recorded: bool = True
    """Whether that call was one that gradients are recorded of."""

    def __reduce__(self) -> Any:
        """Copies and pickles take nothing of a call."""
        return type(self), ()


_ANGLES = "_kv_angles"


def keep_angles(key: Tensor, angles: Rotary) -> None:
    """Gives a layer that reuses another's keys the angles by which they have been rotated.

    Args:
        key: As the layer that made it attends to it.
        angles: Of its tokens.
    """
    if not torch.compiler.is_compiling():
        setattr(key, _ANGLES, angles)


def angles_of(key: Tensor) -> Rotary | None:
    """Returns the angles that ``keep_angles`` kept for keys in this call, or None.

    Args:
        key: Keys.
    """
    found: Rotary | None = None if torch.compiler.is_compiling() else getattr(key, _ANGLES, None)
    return found
