"""What the hooks of one routed block hand to each other within a call."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

from rpqfx.routing.router import Choice


class Underway(threading.local):
    """The call of a routed block that is under way in this thread; threads that share a model do not see each other's.

    Outside of a call all of it is None.
    """

    input: Tensor | None = None
    """The block's input, as it was called."""

    kept: Tensor | None = None
    """``[B, n]`` bool, False for tokens that none may see."""

    choice: Choice | None = None
    """Which tokens take the heavy branch."""

    def begin(self, input: Tensor, choice: Choice, kept: Tensor | None = None) -> None:
        """Notes what was chosen."""
        self.input, self.choice, self.kept = input, choice, kept

    def end(self) -> tuple[Tensor | None, Choice | None, Tensor | None]:
        """Input, choice and mask, which are then forgotten."""
        found = self.input, self.choice, self.kept
        self.input = self.choice = self.kept = None
        return found

    def __reduce__(self) -> Any:
        """Copies and pickles take nothing of a call."""
        return type(self), ()


class Padding(threading.local):
    """The mask of the call that is under way in this thread: which tokens are padding, as far as the model was told."""

    mask: Tensor | None = None

    def of(self, x: Tensor) -> Tensor | None:
        """``[B, n]`` bool, False for padding, if there is a mask that fits tokens ``[B, n, d]``."""
        mask = self.mask
        return mask if mask is not None and mask.shape == x.shape[:2] else None

    def __reduce__(self) -> Any:
        """Copies and pickles take nothing of a call."""
        return type(self), ()
