"""Which tokens of a sequence take the heavy branch of a block that was rewritten."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from rpqfx.graph.leaves import own
from rpqfx.routing.causal import choose_by_the_past
from rpqfx.routing.left_padding import moved, padding_in_front, places
from rpqfx.routing.rewrite.call_state import Padding
from rpqfx.routing.router import Choice, Router


@own
class Chooser(nn.Module):
    """The router of a rewritten block.

    Args:
        dim: Width of tokens.
        number: How many are chosen of each sequence, or of each window; a float is a share.
        window: Choose window by window, by the past alone; the first is chosen whole.
        padding: Of the model.
        router: Arguments of ``Router``.
        device: Where the tensors go.
        dtype: Of the Parameters.

    Attributes:
        easing: Share of the tokens beyond the number that are chosen too: 0 but while a model is fitted or trained, 1
            for all.

    Raises:
        SpecError: As ``Router``.
    """

    def __init__(
        self,
        dim: int,
        number: int | float,
        window: int | None,
        padding: Padding,
        router: Mapping[str, Any],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.number, self.window, self.padding = number, window, padding
        self.easing = 0.0
        self.router = Router(dim, **router, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.number} heavy tokens" + ("" if self.window is None else f" of {self.window}")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Choice:
        """Chooses.

        Args:
            x: ``[B, n, d]``.
            mask: ``[B, n]`` bool, False for tokens that are not chosen; left out, that of the model's call.

        Returns:
            A choice in the order of tokens; or, where every token is chosen, one without indices, whose scores are
            all 1 whatever the mask.
        """
        if self._all(x.shape[1]) or not x.numel():
            return _everyone(x)
        mask = self.padding.of(x) if mask is None else mask
        if self.window is None:
            return _in_order(self.router(x, self._number(x.shape[1]), mask=mask))
        if mask is None:
            return self._by_window(x, None, self.window)
        at = places(padding_in_front(mask), x.shape[1])  # windows count from the first token
        choice = self._by_window(moved(x, at), moved(mask, at), self.window)
        assert choice.indices is not None
        return choice._replace(indices=at[:, None].gather(-1, choice.indices))

    def _by_window(self, x: Tensor, mask: Tensor | None, window: int) -> Choice:
        """As ``forward``, of a sequence without padding in front."""
        slots = self._slots(window)
        choice = choose_by_the_past(self.router, x, slots, window, mask, fill=True)
        return _with_first(choice, window, mask)

    def _all(self, n: int) -> bool:
        """Whether all of ``n`` tokens are chosen."""
        if self.window is not None and (n <= self.window or self._slots(self.window) >= self.window):
            return True
        return self._slots(n) >= n

    def _number(self, n: int) -> int | float:
        """How many of ``n`` tokens are chosen, or what share of each sample's."""
        if not self.easing:
            return self.number
        if isinstance(self.number, float):
            return self.number + (1 - self.number) * self.easing
        return self.number + math.ceil(max(0, n - self.number) * self.easing - 1e-4)

    def _slots(self, n: int) -> int:
        """Of so many tokens."""
        number = self._number(n)
        return math.ceil(n * number - 1e-4) if isinstance(number, float) else number


def _everyone(x: Tensor) -> Choice:
    return Choice(None, torch.ones(x.shape[0], 1, x.shape[1], device=x.device), None)


def _in_order(choice: Choice) -> Choice:
    """The same, in the order of tokens: what is causal stays so."""
    assert choice.indices is not None
    indices, at = choice.indices.sort(-1)
    return Choice(indices, choice.scores.gather(-1, at), None if choice.mask is None else choice.mask.gather(-1, at))


def _with_first(choice: Choice, window: int, mask: Tensor | None) -> Choice:
    """With all tokens of the first window before the others."""
    indices, scores, kept = choice
    assert indices is not None and kept is not None
    first = repeat(torch.arange(window, device=indices.device), "w -> b 1 w", b=indices.shape[0])
    taken = torch.ones_like(first, dtype=torch.bool) if mask is None else mask[:, None, :window]
    return Choice(
        torch.cat([first, indices], -1), torch.cat([taken.to(scores.dtype), scores], -1), torch.cat([taken, kept], -1)
    )
