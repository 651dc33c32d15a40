"""The rows that a weight's vectors are multiplied with, and their second moments."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx.nn.layout import Layout

# Elements of unfolded inputs that are alive at a time.
_BLOCK_ELEMENTS = 2**24


def input_rows(product: str, x: Tensor, layout: Layout, geometry: tuple[Any, ...] = ()) -> Iterator[Tensor]:
    """Yields the inputs of a product as rows that lie along the weight's vectors.

    Args:
        product: ``"linear"``, ``"linear_t"`` or ``"conv"``.
        x: Its input.
        layout: Layout of the weight's tensor.
        geometry: The numbers of a convolution: stride, padding, dilation, groups, transposed, output padding.

    Yields:
        ``[B, D]`` in float32 at least, block after block. Nothing where inputs lie across the vectors: as each is then
        multiplied by one element of the input only, errors of its elements weigh alike.
    """
    work = x if x.dtype == torch.float64 else x.float()
    if not lies_along(product, layout, geometry):
        return
    if product == "conv":
        yield from _unfolded(work, layout, *geometry[:4])
    elif x.shape[-1] == layout.dim:
        yield work.reshape(-1, layout.dim)


def lies_along(product: str, layout: Layout, geometry: tuple[Any, ...] = ()) -> bool:
    """Returns whether a product's inputs lie along the weight's vectors, so that each output is of one vector.

    Args:
        product: ``"linear"``, ``"linear_t"``, ``"conv"`` or ``"lookup"``.
        layout: Layout of the weight's tensor.
        geometry: The numbers of a convolution, as ``input_rows`` takes them.
    """
    if product == "conv":
        return not geometry[4]
    return product != "lookup" and layout.transposed == (product == "linear_t")


def _unfolded(x: Tensor, layout: Layout, stride: Any, padding: Any, dilation: Any, groups: int) -> Iterator[Tensor]:
    kernel = layout.shape[2:]
    if x.dim() == len(kernel) + 1:
        x = x[None]
    x = F.pad(x, list(itertools.chain.from_iterable((p, p) for p in reversed(padding))))
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(axis + 2, (size - 1) * gap + 1, step)[..., ::gap]
    x = x.unflatten(1, (groups, -1)).movedim(2, 2 + len(kernel))  # [B, groups, *places, C / groups, *kernel]
    size = max(1, x[:1].numel())
    for block in x.split(max(1, _BLOCK_ELEMENTS // size)):
        yield block.reshape(-1, layout.dim)


class Moments:
    """Second moments of inputs, over all the products that are added.

    Those of each batch are made by themselves and added to those of the batches before it, so that a sum is the same to
    the last bit whichever process has run which batch.

    Args:
        energy_only: Keep the diagonal alone.
    """

    def __init__(self, energy_only: bool = False) -> None:
        self._energy_only = energy_only
        self._sum: Tensor | None = None
        self._total = 0.0
        self.rows = 0

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Adds inputs.

        Args:
            rows: ``[B, D]``.
            weights: ``[B]``, how much each counts; ones if left out.
        """
        if weights is not None:
            rows = rows * weights.to(rows.dtype).sqrt()[:, None]
        new = rows.square().sum(0) if self._energy_only else rows.t() @ rows
        self._sum = new if self._sum is None else self._sum.add_(new)
        self._total += len(rows) if weights is None else float(weights.sum(dtype=torch.float64))
        self.rows += len(rows)

    def add_all(self, blocks: Iterable[Tensor], weights: Tensor | None = None) -> None:
        """Adds inputs that come in blocks.

        Args:
            blocks: Each ``[B, D]``.
            weights: One for each row of all blocks; ones if left out.
        """
        start = 0
        for rows in blocks:
            self.add(rows, None if weights is None else weights[start : start + len(rows)])
            start += len(rows)

    def merge(self, other: Moments) -> None:
        """Adds what another one holds, which it may keep from then on.

        Args:
            other: It has as many columns as this one, and like this one is whole or holds the diagonal alone.
        """
        if other._sum is not None:
            self._sum = other._sum if self._sum is None else self._sum.add_(other._sum)
        self._total += other._total
        self.rows += other.rows

    def parts(self, count: int) -> list[Moments]:
        """Returns moments that hold a part of the rows of the matrix each, of all that was added.

        Args:
            count: How many.
        """
        sums = [None] * count if self._sum is None else self._sum.tensor_split(count)
        return [self._like(one) for one in sums]

    def joined(self, others: Sequence[Moments]) -> Moments:
        """Returns the whole of ``parts``, this one being any of them.

        Args:
            others: All parts, this one among them, in order.
        """
        sums = [part._sum for part in others if part._sum is not None]
        return self._like(torch.cat(sums) if sums else None)

    def _like(self, held: Tensor | None) -> Moments:
        other = Moments(self._energy_only)
        other._sum, other._total, other.rows = held, self._total, self.rows
        return other

    @property
    def mean(self) -> Tensor | None:
        """The mean over inputs, ``[D, D]``, or ``[D]`` of the diagonal alone; None before the first."""
        return None if self._sum is None else self._sum / (self._total if self._total > 0 else 1)
