"""How many tokens of a routed model are heavy, step after step of its training."""

from __future__ import annotations

from torch import nn

from rpqfx.routing.rewrite.rewrite import routed


class Easing:
    """Takes the heavy tokens of all blocks from every token to the policy's number, evenly.

    Args:
        model: A routed model; unchanged until ``at``.
        anneal: Share of the steps that this takes; 0 for the policy's number from the first step on.
        steps: Steps of the training.
    """

    def __init__(self, model: nn.Module, anneal: float, steps: int) -> None:
        self._choosers = {name: route.chooser for name, route in routed(model).items()}
        self._before = [chooser.easing for chooser in self._choosers.values()]
        self._anneal, self._steps = anneal, steps

    def __repr__(self) -> str:
        return f"Easing({self._anneal}, {self._choosers})"

    def left(self, number: int) -> float:
        """Returns what share of the tokens beyond the policy's number are heavy in a step, counted from 0."""
        length = self._anneal * self._steps
        return max(0.0, 1 - (number + 1) / length) if length else 0.0

    def at(self, number: int) -> None:
        """Has a step's tokens heavy."""
        for chooser in self._choosers.values():
            chooser.easing = self.left(number)

    def stop(self) -> None:
        """Makes the model choose as it did; may be called again."""
        for chooser, easing in zip(self._choosers.values(), self._before, strict=True):
            chooser.easing = easing
