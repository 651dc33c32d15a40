"""A feed-forward block that its own modules' hooks make routed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.routing.gather import put, put_instead, take
from rpqfx.routing.rewrite.call_state import Underway
from rpqfx.routing.rewrite.chooser import Chooser


class FeedForwardRoute(nn.Module):
    """The router and the light branch of a feed-forward block, whose own layers are the heavy branch.

    The first of the block's layers are handed the chosen tokens alone. What its last layer makes of them is multiplied
    by their scores and added to what the light branch makes of all tokens; ``y_i = light(x_i) + score_i * heavy(x_i)``
    (CoLT5, Ainslie et al., 2023, arXiv:2303.09752, section 3.1). Everything between works token by token, so the code
    that calls the layers stays as it was written.

    A light branch that stands in for the heavy one gives way to it instead,
    ``y_i = (1 - score_i) * light(x_i) + score_i * heavy(x_i)``: tokens whose score is 1 have what the block itself
    makes of them.

    Args:
        chooser: Chooses tokens.
        light: From the block's input to its output, or None.
        name: Of the block, for messages.
        time_first: Whether tokens are ``[n, B, d]`` rather than ``[B, ..., d]``.
        stands_in: Whether the light branch stands in for the heavy one, rather than being added to it.
    """

    def __init__(
        self, chooser: Chooser, light: nn.Module | None, name: str, time_first: bool = False, stands_in: bool = False
    ) -> None:
        super().__init__()
        self.time_first, self.stands_in = time_first, stands_in
        self.chooser, self.light, self.name = chooser, light, name
        self._call = Underway()

    def first(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hook before the layer that runs first: chooses, and hands on what was chosen.

        Raises:
            InputError: If the layer was called without a positional tensor.
        """
        if not args or not isinstance(args[0], Tensor):
            raise InputError(f"{self.name}: its first layer was called without a positional tensor")
        self._call.begin(args[0], self.chooser(self.line(args[0])))
        return self.another(module, args)

    def another(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hook before a layer that has the same input: hands on what was chosen for the first."""
        choice = self._call.choice
        if choice is None:
            raise InputError(f"{self.name}: its layers ran without its first one; skip it with a RouteRule")
        if choice.indices is None:
            return None
        return (take(self.line(args[0]), choice)[:, 0], *args[1:])

    def last(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Hook behind the last layer: puts its results in the places of their tokens, with the light branch.

        Raises:
            InputError: If the block's first layer has not run.
        """
        x, choice, _ = self._call.end()
        if x is None or choice is None:
            raise InputError(f"{self.name}: its last layer ran without its first one; skip it with a RouteRule")
        if choice.indices is None:
            return out if self.light is None or self.stands_in else out + self.light(x)
        line = self.line(x)
        light = out.new_zeros(*line.shape[:2], out.shape[-1]) if self.light is None else self.light(line)
        if self.stands_in:
            out = put_instead(light.to(out.dtype), choice, out)
        else:
            out = put(light, choice, out * choice.scores[:, 0, :, None].to(out.dtype))
        if self._turned(x):
            return out.transpose(0, 1)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def _turned(self, x: Tensor) -> bool:
        return self.time_first and x.dim() == 3

    def line(self, x: Tensor) -> Tensor:
        """Returns the block's input, or its output, as ``[B, n, d]``; ``[B, d]`` are samples of one token each."""
        if self._turned(x):
            return x.transpose(0, 1)
        if x.dim() < 3:
            return x[None, None] if x.dim() == 1 else x[:, None]
        return x.flatten(1, -2)
