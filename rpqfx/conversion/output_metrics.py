"""Moments of the gradients of outputs, in the form in which a weight's fit takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.gradients import Gradients
from rpqfx.conversion.ranks import Ranks


class OutputMetrics:
    """The second moments of outputs' gradients, trusted as far as their halves agree.

    One process makes each of them when its weight is fitted. Several, which keep the moments of some weights each, make
    all of theirs at the start, side by side.

    Args:
        gradients: What was collected.
        ranks: The processes that collected it.
    """

    def __init__(self, gradients: Gradients, ranks: Ranks) -> None:
        self._gradients, self._ranks = gradients, ranks
        self._made: dict[StandIn, Tensor | None] = {}
        if ranks.size > 1:
            for weight in list(gradients.outputs):
                assert isinstance(weight, StandIn)
                self._made[weight] = self._trusted(weight)

    def take(self, weight: StandIn) -> Tensor | None:
        """Returns the metric ``[N, N]`` of a weight's outputs, once; None where feedback between rows wins nothing.

        Args:
            weight: A weight that the gradients are of, the same in all processes.
        """
        if self._ranks.size == 1:
            return self._trusted(weight)
        mine = self._made.pop(weight, None)
        found: Tensor | None = self._ranks.from_rank(self._gradients.owner(weight), "metric of outputs", mine)
        return found

    def forget(self, weight: StandIn) -> None:
        """Drops what is kept of a weight that is finished.

        Args:
            weight: Any weight.
        """
        self._gradients.outputs.pop(weight, None)
        self._made.pop(weight, None)

    def _trusted(self, weight: StandIn) -> Tensor | None:
        moments = self._gradients.outputs.pop(weight, None)
        return None if moments is None else moments.trusted(_sizes(weight.vectors))


def _sizes(vectors: Tensor) -> Tensor:
    """Returns the root mean squares of rows, which their errors are in proportion to."""
    return (vectors if vectors.dtype == torch.float64 else vectors.float()).square().mean(1).sqrt()
