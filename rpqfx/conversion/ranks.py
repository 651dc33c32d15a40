"""The processes that share a conversion, as the conversion sees them: a single one by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Ranks:
    """One process, which has every batch and every weight to itself.

    ``rpqfx.distributed`` has one of several processes. All of them make the same calls in the same order.

    Attributes:
        rank: This process.
        size: How many there are.
    """

    rank = 0
    size = 1

    def exchange(self, what: str, parcels: Sequence[Any]) -> list[Any]:
        """Sends each process a parcel of its own, and returns what each has sent to this one, by rank.

        Args:
            what: What is sent, in words; the same in all processes.
            parcels: One for each process, of plain values and tensors. What is returned may be the same objects.
        """
        return list(parcels)

    def gather(self, what: str, mine: Any) -> list[Any]:
        """Returns what each process has, by rank.

        Args:
            what: What is sent, in words.
            mine: What this process has.
        """
        return self.exchange(what, [mine] * self.size)

    def from_rank(self, rank: int, what: str, mine: Any) -> Any:
        """Returns what one process has, in all of them.

        Args:
            rank: Whose.
            what: What is sent, in words.
            mine: What this process has; counts in that process alone.
        """
        return self.exchange(what, [mine if rank == self.rank else None] * self.size)[rank]
