"""How a tensor is seen as vectors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a tensor is seen as ``N`` vectors of length ``D``.

    The tensor is first a matrix ``[rows, cols]``: its first ``lead`` axes by the others. Its vectors are the rows,
    or with ``transposed`` the columns.

    Args:
        shape: Of the tensor.
        lead: Axes that make the rows.
        transposed: Whether the vectors are the columns.
        zero_vector: A vector that is zero and stays zero (an embedding's ``padding_idx``).
    """

    shape: tuple[int, ...]
    lead: int = 1
    transposed: bool = False
    zero_vector: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.shape[: self.lead])

    @property
    def cols(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.shape[self.lead :])

    @property
    def num_vectors(self) -> int:
        """``N``."""
        return self.cols if self.transposed else self.rows

    @property
    def dim(self) -> int:
        """``D``."""
        return self.rows if self.transposed else self.cols

    def to_vectors(self, tensor: Tensor) -> Tensor:
        """The tensor as ``[N, D]``."""
        matrix = tensor.reshape(self.rows, self.cols)
        return matrix.t() if self.transposed else matrix

    def to_tensor(self, vectors: Tensor) -> Tensor:
        """``[N, D]`` as the tensor."""
        return (vectors.t() if self.transposed else vectors).reshape(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """The inverse of ``to_dict``."""
        return cls(**{**values, "shape": tuple(values["shape"])})
