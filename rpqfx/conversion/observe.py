"""Runs calibration batches through a dense model and collects statistics of the inputs of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.moments import Moments, input_rows
from rpqfx.conversion.row_weights import RowWeights
from rpqfx.nn.layout import Layout
from rpqfx.nn.weight import RPQWeight


@dataclass
class Seen:
    """Statistics of one weight's inputs.

    Args:
        moments: Moments of inputs that lie along its vectors.
        uses: Products a batch, at most.
        looked_up: Whether rows were looked up.
        rank: When it was first used.
    """

    moments: Moments
    uses: int = 0
    looked_up: bool = False
    rank: int = -1
    now: int = field(default=0, repr=False)
    read: bool = False

    @property
    def reached(self) -> bool:
        """Whether a batch used it in a product or a lookup, so that its inputs are known."""
        return self.rank >= 0

    @property
    def once(self) -> bool:
        """Whether each batch uses it once, with inputs along its vectors, so that runs can stop for it."""
        return self.uses == 1 and not self.looked_up and self.moments.rows > 0


class Observer:
    """Collects statistics of the inputs of dense weights, run after run.

    Args:
        weights: The dense weights to observe.
        energy_only: Keep mean squared inputs only, not their second moments.
        rows: Weights of the rows of inputs; all alike if left out.
    """

    def __init__(self, weights: Iterable[StandIn], energy_only: bool = True, rows: RowWeights | None = None) -> None:
        self.seen: dict[RPQWeight, Seen] = {weight: Seen(Moments(energy_only)) for weight in weights}
        self.batch = 0
        self._weigh = rows
        self._ranks = 0

    def watch(self, runs: Sequence[Callable[[], Any]], after: Callable[[int], None]) -> None:
        """Runs a model, batch after batch.

        Args:
            runs: Callables that run one batch each.
            after: Called with each batch's number when it is done.
        """
        for weight in self.seen:
            assert isinstance(weight, StandIn)
            weight.listener = self
        for number, run in enumerate(runs):
            self.batch = number
            run()
            for seen in self.seen.values():
                seen.uses, seen.now = max(seen.uses, seen.now), 0
            after(number)

    def asked(self, weight: RPQWeight, product: str, x: Tensor, layout: Layout, geometry: tuple[Any, ...]) -> None:
        """See ``Listener``."""
        seen = self.seen.get(weight)
        if seen is None:
            return
        if seen.rank < 0:
            seen.rank, self._ranks = self._ranks, self._ranks + 1
        if product == "lookup":
            seen.looked_up = True
            return
        seen.now += 1
        if layout.dim == weight.layout.dim:
            weights = None if self._weigh is None else self._weigh.of(weight, self.batch, seen.now - 1)
            seen.moments.add_all(input_rows(product, x, layout, geometry), weights)

    def made(self, weight: RPQWeight, y: Tensor) -> Tensor:
        """See ``Listener``."""
        return y

    def read(self, weight: RPQWeight) -> None:
        """See ``Listener``."""
        if weight in self.seen:
            self.seen[weight].read = True
