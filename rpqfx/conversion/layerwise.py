"""Weight after weight, in the order of the model's run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor

from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.moments import Moments, input_rows
from rpqfx.conversion.observe import Observer
from rpqfx.conversion.parallel_runs import Lockstep, RunError
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
        ranks: When each is used.
        fit: Fits a weight, given how its inputs' mean second moment is made.
        rows: Weights of the rows of inputs; all alike if left out.
    """

    def __init__(
        self, batches: Batches, names: Mapping[RPQWeight, str], ranks: Mapping[RPQWeight, int], fit: FitWeight,
        rows: RowWeights | None = None,
    ) -> None:  # fmt: skip
        self._batches, self._names, self._ranks, self._fit = batches, names, ranks, fit
        self._rows = RowWeights() if rows is None else rows
        self._last: tuple[list[Asked], list[object], Tensor] | None = None

    def run(self) -> None:
        """Runs all batches to their end.

        Raises:
            InputError: If the model rejects a batch.
        """
        lockstep: Lockstep[Any] = Lockstep(self._batches.runs)
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
            self._fit(weight, lambda: self._moment(weight, seen))

        try:
            lockstep.run(handle, self._rank)
        except RunError as error:
            raise error.__cause__ or error from None
        finally:
            lockstep.close()

    def _rank(self, weight: Hashable) -> float:
        assert isinstance(weight, RPQWeight)
        return self._ranks[weight]

    def _moment(self, weight: RPQWeight, seen: Mapping[int, Asked]) -> Tensor:
        """Makes the moments of inputs that several weights have in common, all rows alike, once."""
        inputs = list(seen.values())
        weights = [self._rows.of(weight, number, 0) for number in seen]
        alike = all(one is None for one in weights)
        marks = [_mark(asked) for asked in inputs]
        if alike and self._last is not None and self._last[1] == marks:
            return self._last[2]
        moments = Moments()
        for asked, own in zip(inputs, weights, strict=True):
            moments.add_all(input_rows(*asked), own)
        mean = moments.mean
        assert mean is not None
        if alike:
            self._last = inputs, marks, mean  # inputs live on, so that no other has their address
        return mean


def _mark(asked: Asked) -> object:
    """Returns a key, equal for two uses with the same rows of inputs while the first one's input is alive."""
    product, x, layout, geometry = asked
    version = object() if x.is_inference() else x._version
    lies = (layout.transposed, layout.dim, layout.shape[2:] if product == "conv" else ())
    return product, x.data_ptr(), version, x.dtype, x.device, x.shape, x.stride(), lies, geometry
