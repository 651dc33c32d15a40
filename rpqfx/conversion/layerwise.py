"""Weight after weight, in the order of the model's run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

from torch import Tensor

from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.moments import Moments, input_rows
from rpqfx.conversion.observe import Observer
from rpqfx.conversion.parallel_runs import Lockstep, RunError
from rpqfx.conversion.ranks import Ranks
from rpqfx.conversion.row_weights import RowWeights
from rpqfx.graph.calibration.batches import Batches
from rpqfx.nn.layout import Layout
from rpqfx.nn.weight import RPQWeight

Asked = tuple[str, Tensor, Layout, tuple[Any, ...]]
FitWeight = Callable[[RPQWeight, Callable[[], Tensor]], None]


class Turns:
    """Runs of the model side by side that stop before each weight.

    Args:
        batches: Batches of the model that is being rewritten.
        names: Qualified names of the stand-ins to stop for.
        order: When each is used.
        fit: Fits a weight, given how its inputs' mean second moment is made.
        rows: Weights of the rows of inputs; all alike if left out.
        ranks: The processes that share out the batches; all of them fit every weight, to the same moments.
    """

    def __init__(
        self, batches: Batches, names: Mapping[RPQWeight, str], order: Mapping[RPQWeight, int], fit: FitWeight,
        rows: RowWeights | None = None, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self._batches, self._names, self._order, self._fit = batches, names, order, fit
        self._rows = RowWeights() if rows is None else rows
        self._ranks = Ranks() if ranks is None else ranks
        self._at = {place: weight for weight, place in order.items()}
        self._last: tuple[list[Asked], list[object], Tensor] | None = None

    def run(self) -> None:
        """Runs all batches to their end, or those that are this process's.

        Raises:
            InputError: If the model rejects a batch.
        """
        mine = range(self._ranks.rank, len(self._batches.runs), self._ranks.size)
        lockstep: Lockstep[Any] = Lockstep([self._batches.runs[number] for number in mine])
        names = self._names

        class Stopping(Observer):
            def asked(
                self, weight: RPQWeight, product: str, x: Tensor, layout: Layout, geometry: tuple[Any, ...]
            ) -> None:
                if weight in names:
                    lockstep.stop(weight, (product, x, layout, geometry))

        for weight in names:
            assert isinstance(weight, StandIn)
            weight.listener = Stopping(())

        def handle(weight: Hashable, seen: dict[int, Any]) -> None:
            assert isinstance(weight, RPQWeight)
            inputs = {mine[number]: asked for number, asked in seen.items()}
            self._fit(weight, lambda: self._moment(weight, inputs))

        try:
            lockstep.run(handle, self._next)
        except RunError as error:
            raise error.__cause__ or error from None
        finally:
            lockstep.close()

    def _next(self, waiting: Collection[Hashable]) -> Hashable | None:
        """Returns the weight that is used first of those that runs of any process wait for; None when all are over."""
        own = min((self._order[weight] for weight in waiting if isinstance(weight, RPQWeight)), default=math.inf)
        return self._at.get(min(self._ranks.gather("the weight that is used next", own)))

    def _moment(self, weight: RPQWeight, seen: Mapping[int, Asked]) -> Tensor:
        """Makes the moments of inputs that several weights have in common, all rows alike, once."""
        weights = {number: self._rows.of(weight, number, 0) for number in seen}
        marks = [_mark(asked) for asked in seen.values()]
        here = all(one is None for one in weights.values()), self._last is not None and self._last[1] == marks
        alike, same = (all(said) for said in zip(*self._ranks.gather("whether inputs are known", here), strict=True))
        if alike and same:
            assert self._last is not None
            return self._last[2]
        total = Moments()
        for first in range(0, len(self._batches.runs), self._ranks.size):
            own, asked = Moments(), seen.get(first + self._ranks.rank)
            if asked is not None:
                own.add_all(input_rows(*asked), weights[first + self._ranks.rank])
            # Each process adds up some rows of the matrix, of one batch after the other.
            for part in self._ranks.exchange("inputs' moments", own.parts(self._ranks.size)):
                total.merge(part)
        mean = total.joined(self._ranks.gather("sums of inputs' moments", total)).mean
        assert mean is not None
        if alike:  # inputs live on, so that no other has their address
            self._last = list(seen.values()), marks, mean
        return mean


def _mark(asked: Asked) -> object:
    """Returns a key, equal for two uses with the same rows of inputs while the first one's input is alive."""
    product, x, layout, geometry = asked
    version = object() if x.is_inference() else x._version
    lies = (layout.transposed, layout.dim, layout.shape[2:] if product == "conv" else ())
    return product, x.data_ptr(), version, x.dtype, x.device, x.shape, x.stride(), lies, geometry
