"""The operations through torch's own operators: on every device and dtype, and what all others are checked against."""

from __future__ import annotations

from torch import Tensor

from rpqfx import codebook
from rpqfx.codebook import accumulate, collect, contract_grads, contract_t, expand, lookup
from rpqfx.maps import bin_sum, gather_sum

__all__ = [
    "accumulate",
    "bin_sum",
    "collect",
    "contract",
    "contract_grads",
    "contract_t",
    "expand",
    "gather_sum",
    "lookup",
]


def contract(
    x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``rpqfx.codebook.contract``, with a bias ``[N]`` added."""
    y = codebook.contract(x, codebooks, codes, signs=signs)
    return y if bias is None else y + bias
