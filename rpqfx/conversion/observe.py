"""Runs calibration batches through a dense model and collects statistics of the inputs of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.moments import Moments, input_rows
from rpqfx.conversion.ranks import Ranks
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
    read: bool = False

    @property
    def reached(self) -> bool:
        """Whether a batch used it in a product or a lookup, so that its inputs are known."""
        return self.rank >= 0

    @property
    def once(self) -> bool:
        """Whether each batch uses it once, with inputs along its vectors, so that runs can stop for it."""
        return self.uses == 1 and not self.looked_up and self.moments.rows > 0


@dataclass
class BatchSeen:
    """Statistics of one batch, by the numbers of weights, so that they can be sent to another process.

    Args:
        uses: Products with each weight, in the order of first use; a weight that was looked up only has 0.
        looked_up: Weights whose rows were looked up.
        read: Weights whose tensor was handed out.
        moments: Moments of inputs.
    """

    uses: dict[int, int] = field(default_factory=dict)
    looked_up: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)
    moments: dict[int, Moments] = field(default_factory=dict)


class Observer:
    """Collects statistics of the inputs of dense weights, run after run.

    Args:
        weights: The dense weights to observe.
        energy_only: Keep mean squared inputs only, not their second moments.
        rows: Weights of the rows of inputs; all alike if left out.
        ranks: The processes that share out the runs; all come to the same statistics.
    """

    def __init__(
        self, weights: Iterable[StandIn], energy_only: bool = True, rows: RowWeights | None = None,
        ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.seen: dict[RPQWeight, Seen] = {weight: Seen(Moments(energy_only)) for weight in weights}
        self.batch = 0
        self._numbers: dict[RPQWeight, int] = {weight: number for number, weight in enumerate(self.seen)}
        self._now = BatchSeen()
        self._energy_only = energy_only
        self._weigh = rows
        self._uses = 0
        self._ranks = Ranks() if ranks is None else ranks

    def watch(self, runs: Sequence[Callable[[], Any]], after: Callable[[int], None]) -> None:
        """Runs a model, batch after batch, or those batches that are this process's.

        Args:
            runs: Callables that run one batch each.
            after: Called with each batch's number when it is done.
        """
        for weight in self.seen:
            assert isinstance(weight, StandIn)
            weight.listener = self
        for first in range(0, len(runs), self._ranks.size):
            self.batch, self._now = first + self._ranks.rank, BatchSeen()
            if self.batch < len(runs):
                runs[self.batch]()
            self._collect(first)
            for number in range(first, min(first + self._ranks.size, len(runs))):
                after(number)

    def _collect(self, first: int) -> None:
        """Adds what the batches from ``first`` on have shown, one of each process, in the order of batches."""
        weights = list(self.seen.values())
        for now in self._ranks.gather("inputs' statistics", self._now):
            for number, uses in now.uses.items():
                seen = weights[number]
                seen.uses = max(seen.uses, uses)
                if seen.rank < 0:
                    seen.rank, self._uses = self._uses, self._uses + 1
            for number in now.looked_up:
                weights[number].looked_up = True
            for number in now.read:
                weights[number].read = True
            for number, moments in now.moments.items():
                weights[number].moments.merge(moments)

    def asked(self, weight: RPQWeight, product: str, x: Tensor, layout: Layout, geometry: tuple[Any, ...]) -> None:
        """See ``Listener``."""
        number = self._numbers.get(weight)
        if number is None:
            return
        uses = self._now.uses.setdefault(number, 0)
        if product == "lookup":
            self._now.looked_up.add(number)
            return
        self._now.uses[number] = uses + 1
        if layout.dim == weight.layout.dim:
            weights = None if self._weigh is None else self._weigh.of(weight, self.batch, uses)
            moments = self._now.moments.setdefault(number, Moments(self._energy_only))
            moments.add_all(input_rows(product, x, layout, geometry), weights)

    def made(self, weight: RPQWeight, y: Tensor) -> Tensor:
        """See ``Listener``."""
        return y

    def read(self, weight: RPQWeight) -> None:
        """See ``Listener``."""
        if weight in self._numbers:
            self._now.read.add(self._numbers[weight])
