"""The layout by which a tensor is seen as vectors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor

Experts = Literal["shared", "own"]


@dataclass(frozen=True)
class Layout:
    """The layout by which a tensor is seen as ``N`` vectors of length ``D``.

    The tensor is first a matrix ``[rows, cols]``: its first ``lead`` axes by the others. Its vectors are the rows,
    or with ``transposed`` the columns.

    With ``experts`` the tensor ``[E, rows, cols]`` is a matrix for each expert. Their vectors stand one below the
    other, ``N = E * rows`` and ``D = cols`` (``"shared"``: all experts use the same codebooks), or side by side,
    ``N = rows`` and ``D = E * cols`` (``"own"``: sub-vectors of different experts have different codebooks); with
    ``transposed`` rows and columns change places in this.

    Args:
        shape: Shape of the tensor.
        lead: Axes that make the rows.
        transposed: Whether the vectors are the columns.
        zero_vector: A vector that is zero and stays zero (an embedding's ``padding_idx``).
        experts: How the matrices of several experts share codebooks; None for one matrix.
    """

    shape: tuple[int, ...]
    lead: int = 1
    transposed: bool = False
    zero_vector: int | None = None
    experts: Experts | None = None

    @property
    def rows(self) -> int:
        """Rows of the matrix, or of each expert's."""
        return self.shape[1] if self.experts else math.prod(self.shape[: self.lead])

    @property
    def cols(self) -> int:
        """Columns of the matrix, or of each expert's."""
        return self.shape[2] if self.experts else math.prod(self.shape[self.lead :])

    @property
    def num_vectors(self) -> int:
        """``N``."""
        return math.prod([self.shape[axis] for axis in self.vector_axes])

    @property
    def dim(self) -> int:
        """``D``."""
        return math.prod([self.shape[axis] for axis in self.dim_axes])

    @property
    def unit(self) -> int:
        """The length that sub-vectors must divide: ``D``, or one expert's part of it."""
        return self.dim // self.shape[0] if self.experts == "own" else self.dim

    @property
    def vector_axes(self) -> tuple[int, ...]:
        """The tensor's axes that number the vectors."""
        return self._axes(not self.transposed, self.experts == "shared")

    @property
    def dim_axes(self) -> tuple[int, ...]:
        """The tensor's axes that lie within a vector."""
        return self._axes(self.transposed, self.experts == "own")

    def _axes(self, rows: bool, experts: bool) -> tuple[int, ...]:
        if self.experts:
            matrix = (1,) if rows else (2,)
            return (0, *matrix) if experts else matrix
        axes = tuple(range(len(self.shape)))
        return axes[: self.lead] if rows else axes[self.lead :]

    def to_vectors(self, tensor: Tensor) -> Tensor:
        """Returns the tensor as ``[N, D]``."""
        if self.experts:
            return tensor.permute(*self.vector_axes, *self.dim_axes).reshape(self.num_vectors, self.dim)
        matrix = tensor.reshape(self.rows, self.cols)
        return matrix.t() if self.transposed else matrix

    def to_tensor(self, vectors: Tensor) -> Tensor:
        """``[N, D]`` as the tensor."""
        if self.experts:
            order = (*self.vector_axes, *self.dim_axes)
            axes = vectors.reshape([self.shape[axis] for axis in order])
            return axes.permute([order.index(axis) for axis in range(3)])
        return (vectors.t() if self.transposed else vectors).reshape(self.shape)

    def resized(self, axis: int, size: int) -> Layout:
        """Returns the layout of a tensor with another size along one axis."""
        return replace(self, shape=(*self.shape[:axis], size, *self.shape[axis + 1 :]))

    def without(self, axis: int) -> Layout | None:
        """Returns the layout without an axis of size one; None where an expert's own row or column would go."""
        shape = self.shape[:axis] + self.shape[axis + 1 :]
        if not self.experts:
            return replace(self, shape=shape, lead=self.lead - (axis < self.lead))
        return replace(self, shape=shape, lead=1, experts=None) if axis == 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """Returns the inverse of ``to_dict``."""
        return cls(**{**values, "shape": tuple(values["shape"])})
