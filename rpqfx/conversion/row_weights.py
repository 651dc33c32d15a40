"""Weights of calibration inputs: the mean squared gradient of the model's output at each row."""

from __future__ import annotations

from torch import Tensor

from rpqfx.nn.weight import RPQWeight

# The largest weight of a row, in means of its batch. Tokens that attention rests on have a thousand times the mean, so
# that without a limit they would be all that a weight is fitted to.
_LIMIT = 4.0
# The part of the weight that all rows have alike: gradients of one random direction know a row's own part roughly.
_FLOOR = 0.2


class RowWeights:
    """Mean squared gradients of the outputs of each row of inputs, kept in two bytes for each row of each weight.

    Rows are those of batches that this process has run; what they are measured by is the mean over all batches.
    """

    def __init__(self) -> None:
        self._energies: dict[tuple[RPQWeight, int, int], Tensor] = {}
        self._sums: dict[RPQWeight, float] = {}
        self._counts: dict[RPQWeight, int] = {}

    def put(self, weight: RPQWeight, batch: int, use: int, energies: Tensor) -> None:
        """Keeps what was found for a product.

        Args:
            weight: Of the product.
            batch: Number of the batch.
            use: Which product of that weight it is in the batch.
            energies: ``[B]``, mean squared gradients, ``limited``, in the order of the rows of inputs.
        """
        self._energies[weight, batch, use] = energies.bfloat16()

    def count(self, weight: RPQWeight, total: float, rows: int) -> None:
        """Counts what a batch gave, of whichever process, into the mean.

        Args:
            weight: The weight whose products these are.
            total: Sum of the energies that were put.
            rows: How many they are.
        """
        self._sums[weight] = self._sums.get(weight, 0.0) + total
        self._counts[weight] = self._counts.get(weight, 0) + rows

    def of(self, weight: RPQWeight, batch: int, use: int) -> Tensor | None:
        """Returns ``[B]``, what rows of inputs weigh, about 1 in the mean over all batches; None where all weigh alike.

        Args:
            weight: Of the product.
            batch: Number of the batch.
            use: Which product of that weight it is in the batch.
        """
        found = self._energies.get((weight, batch, use))
        if found is None or not self._sums.get(weight, 0.0) > 0:
            return None
        return (1 - _FLOOR) * found.float() * (self._counts[weight] / self._sums[weight]) + _FLOOR

    def forget(self, weight: RPQWeight) -> None:
        """Drops what is kept of a weight that is finished.

        Args:
            weight: Any weight.
        """
        for key in [key for key in self._energies if key[0] is weight]:
            del self._energies[key]


def limited(energies: Tensor) -> Tensor:
    """Returns energies of which none is more than four times their mean.

    Args:
        energies: ``[B]``, not negative.
    """
    return energies.clamp_max(_LIMIT * float(energies.mean()))
