"""Outputs from inputs by an affine map of low rank, in least squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rpqfx.errors import InputError


@dataclass(frozen=True)
class AffineFit:
    """The map ``x -> (x - shift) @ down @ up + offset``.

    Args:
        down: ``[D, r]``, its columns in ascending order of what they explain.
        up: ``[r, N]``, with orthonormal rows.
        shift: ``[D]``, mean of the inputs.
        offset: ``[N]``, mean of the outputs.
        sizes: ``[r]``, root mean squares of ``(x - shift) @ down`` with the penalty's part, so that even a number that
            hardly varies has weights ``down / sizes`` within bounds.
    """

    down: Tensor
    up: Tensor
    shift: Tensor
    offset: Tensor
    sizes: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Maps ``[B, D]`` to ``[B, N]``."""
        return (x - self.shift) @ self.down @ self.up + self.offset

    def to(self, dtype: torch.dtype) -> AffineFit:
        """Returns the map in another dtype."""
        return AffineFit(*(t.to(dtype) for t in (self.down, self.up, self.shift, self.offset, self.sizes)))


class PairSums:
    """Second moments of inputs, and of inputs with outputs, over all pairs that are added.

    Sums are float64, of products that are made in float32 (float64 stays) from values less those of the first pairs'
    mean, so that a large mean costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._means: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds pairs.

        Args:
            x: ``[B, D]``.
            y: ``[B, N]``.
        """
        if not len(x):
            return
        dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
        x, y = x.detach().to(dtype), y.detach().to(dtype)
        if self._means is None:
            self._means = x.mean(0), y.mean(0)
        x, y = x - self._means[0], y - self._means[1]
        new = [x.sum(0), y.sum(0), x.T @ x, x.T @ y]
        self._sums = (
            [t.double() for t in new] if not self.count else [a + b for a, b in zip(self._sums, new, strict=True)]
        )
        self.count += len(x)

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the means ``[D]`` and ``[N]``, and the sums ``[D, D]`` and ``[D, N]`` of what is left without them.

        Raises:
            InputError: If there are no pairs, or their sums are not finite.
        """
        if self._means is None:
            raise InputError("there are no pairs of inputs and outputs to fit to")
        x, y, xx, xy = self._sums
        if not all(bool(torch.isfinite(t).all()) for t in self._sums):
            raise InputError("inputs or outputs hold numbers that are not finite")
        n = self.count
        shift, offset = (mean + t / n for mean, t in zip(self._means, (x, y), strict=True))
        return shift, offset, xx - torch.outer(x, x) / n, xy - torch.outer(x, y) / n


def least_squares(xx: Tensor, xy: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Returns the ``W`` that minimises ``|Y - X W|^2 + c |W|^2``, and ``X^T X + c I``.

    Args:
        xx: ``X^T X``, ``[D, D]``.
        xy: ``X^T Y``, ``[D, N]``.
        ridge: ``c`` over the mean of the diagonal of ``xx``.

    Returns:
        ``[D, N]`` and ``[D, D]``. Where all inputs are zero, so is ``W``.
    """
    size = float(xx.diagonal().mean()) * ridge
    kept = xx + torch.eye(len(xx), dtype=xx.dtype, device=xx.device) * (size if size > 0 else 1.0)
    return torch.linalg.solve(kept, xy), kept


def reduced_rank(sums: PairSums, rank: int, ridge: float = 1e-3) -> AffineFit:
    """Fits an affine map of low rank.

    Among the matrices ``W`` of at most this rank it minimises ``|Y - X W|^2 + c |W|^2``, where ``X`` and ``Y`` are
    inputs and outputs less their means: reduced-rank regression (Izenman, "Reduced-rank regression for the multivariate
    linear model", Journal of Multivariate Analysis 5, 1975), which projects the full solution on the directions of the
    outputs in which it is largest.

    Args:
        sums: Second moments of inputs and outputs.
        rank: The rank, at most; 0 for the mean of the outputs.
        ridge: ``c`` over the mean square of an input, times the number of pairs.

    Returns:
        The map, float64.

    Raises:
        InputError: If there are no pairs, or some number is not finite.
    """
    shift, offset, xx, xy = sums.centred()
    weight, kept = least_squares(xx, xy, ridge)
    values, directions = torch.linalg.eigh(weight.T @ kept @ weight)
    start = max(0, len(values) - rank)
    sizes, up = (values[start:].clamp_min(0) / sums.count).sqrt(), directions[:, start:]
    return AffineFit(weight @ up, up.T.contiguous(), shift.double(), offset.double(), sizes)
