"""Weight after weight, block after block, in the order of the model's run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor, nn

from rpqfx.calibration.batches import Batches
from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.moments import Moments, input_rows
from rpqfx.conversion.observe import Observer
from rpqfx.conversion.parallel_runs import Lockstep, RunError
from rpqfx.conversion.refine import Call, Watch, blocks_of
from rpqfx.nn.layout import Layout
from rpqfx.nn.weight import RPQWeight

Asked = tuple[str, Tensor, Layout, tuple[Any, ...]]
FitWeight = Callable[[RPQWeight, Callable[[], Tensor]], None]
FitBlock = Callable[[str, nn.Module, list[Call], list[Any], Watch], None]


class Turns:
    """Runs of the model side by side that stop before each weight, and after each block.

    Args:
        batches: Of the model that is being rewritten.
        names: Qualified names of the stand-ins to stop for.
        ranks: When each is used.
        fit: Fits a weight, given how its inputs' mean second moment is made.
    """

    def __init__(
        self, batches: Batches, names: Mapping[RPQWeight, str], ranks: Mapping[RPQWeight, int], fit: FitWeight
    ) -> None:
        self._batches, self._names, self._ranks, self._fit = batches, names, ranks, fit
        self._last: tuple[list[Asked], list[object], Tensor] | None = None
        self._blocks: dict[str, nn.Module] = {}
        self._dense: Batches | None = None

    def refine(self, model: nn.Module, dense: nn.Module, batches: Batches, fit: FitBlock) -> None:
        """Has each block fitted as well, when its weights are.

        Args:
            model: The model that is being rewritten.
            dense: The dense model.
            batches: The same batches, of the dense model.
            fit: Fits a block (by name), given its calls and what the dense block returned for the same batches.
        """
        self._blocks, self._dense, self._fit_block = blocks_of(model, self._names.values()), batches, fit
        self._dense_blocks = {name: dense.get_submodule(name) for name in self._blocks}

    def run(self) -> None:
        """Runs all batches to their end.

        Raises:
            InputError: If the model rejects a batch.
        """
        students = self._batches.runs
        lockstep: Lockstep[Any] = Lockstep([*students, *(self._dense.runs if self._dense else [])])
        watches = []
        if self._blocks:
            watches.append(Watch(self._blocks, lockstep.stop, again=True))
            watches.append(Watch(self._dense_blocks, lockstep.stop, again=False))
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

        def handle(key: Hashable, seen: dict[int, Any]) -> None:
            if isinstance(key, RPQWeight):
                self._fit(key, lambda: self._moment(list(seen.values())))
                return
            assert isinstance(key, str)
            pairs = [(seen[n], seen[n + len(students)].output) for n in seen if n + len(students) in seen]
            if pairs:
                self._fit_block(key, self._blocks[key], [c for c, _ in pairs], [t for _, t in pairs], watches[0])

        try:
            lockstep.run(handle, self._rank)
        except RunError as error:
            raise error.__cause__ or error from None
        finally:
            lockstep.close()
            for watch in watches:
                watch.close()

    def _rank(self, key: Hashable) -> float:
        if isinstance(key, RPQWeight):
            return self._ranks[key]
        return 0.5 + max(self._ranks[w] for w, name in self._names.items() if name.startswith(f"{key}."))

    def _moment(self, inputs: list[Asked]) -> Tensor:
        """Of inputs that several weights have in common made once."""
        marks = [_mark(asked) for asked in inputs]
        if self._last is None or self._last[1] != marks:
            moments = Moments()
            for asked in inputs:
                for rows in input_rows(*asked):
                    moments.add(rows)
            mean = moments.mean
            assert mean is not None
            self._last = inputs, marks, mean  # inputs live on, so that no other has their address
        return self._last[2]


def _mark(asked: Asked) -> object:
    """Equal for two uses while the first one's input is alive, if their inputs' rows are the same."""
    product, x, layout, geometry = asked
    version = object() if x.is_inference() else x._version
    lies = (layout.transposed, layout.dim, layout.shape[2:] if product == "conv" else ())
    return product, x.data_ptr(), version, x.dtype, x.device, x.shape, x.stride(), lies, geometry
