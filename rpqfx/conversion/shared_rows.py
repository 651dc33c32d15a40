"""The search for codes, its rows shared out over the processes of a conversion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rpqfx.conversion.ranks import Ranks
from rpqfx.fit.error_feedback import Search
from rpqfx.ops.column_search import column_search
from rpqfx.ops.search import compiled


def shared_search(ranks: Ranks) -> Search:
    """Returns ``column_search``, of which each process does a part of the rows.

    The compiled kernel computes each row by itself. A product of torch's operators may round otherwise for fewer rows,
    so where the kernel does not run, every process searches for all of them.

    Args:
        ranks: The processes, which all search with the same arguments.
    """

    def search(
        matrix: Tensor, books: Tensor, groups: Sequence[int], to_metric: Tensor, upper: Tensor, beam: int
    ) -> tuple[Tensor, Tensor]:
        if ranks.size == 1 or not compiled(matrix, books):
            return column_search(matrix, books, groups, to_metric, upper, beam)
        mine = matrix.tensor_split(ranks.size)[ranks.rank].contiguous()
        found = ranks.gather("codes of rows", column_search(mine, books, groups, to_metric, upper, beam))
        codes, seen = zip(*found, strict=True)
        return torch.cat(codes), torch.cat(seen)

    return search
