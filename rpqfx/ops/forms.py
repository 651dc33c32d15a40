"""Products that are linear in an input, in an output and in the codebooks.

A form is ``sum y * out(x, W(codebooks))``. Its three partial derivatives are the three methods here: ``out`` (in
``y``), ``left`` (in ``x``) and ``book`` (in the codebooks). :mod:`rpqfx.ops.functions` makes them differentiable
any number of times from nothing else. Forms hold plain numbers only: tensors are always passed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx import codebook


class Form(Protocol):
    """What :mod:`rpqfx.ops.functions` needs of a product."""

    @property
    def batched(self) -> bool:
        """Whether inputs have exactly one batch axis, the first (else: any number of leading axes)."""

    def out(self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        """The product."""

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        """Its derivative in ``x``, applied to ``y``."""

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        """Its derivative in the codebooks, applied to ``x`` and ``y``."""


@dataclass(frozen=True)
class Contract:
    """``x @ W.T`` through the table of dot products."""

    books: int
    entries: int
    batched = False

    def out(self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return codebook.contract(x, codebooks, codes, signs=signs)

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return codebook.contract_t(y, codebooks, codes, signs=signs)

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return codebook.accumulate(x, y, codes, self.books, self.entries, signs)


@dataclass(frozen=True)
class Matmul:
    """``x @ W.T`` through the expanded matrix, made anew each time."""

    books: int
    entries: int
    batched = False

    def out(self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return F.linear(x, codebook.expand(codebooks, codes, signs=signs))

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return torch.matmul(y, codebook.expand(codebooks, codes, signs=signs))

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        weight = y.reshape(-1, y.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return codebook.collect(weight, codes, self.books, self.entries, signs)


@dataclass(frozen=True)
class Conv:
    """A convolution, or a transposed one, whose filters are expanded anew each time.

    Args:
        books: ``G``.
        entries: ``K``.
        weight_shape: Of the filters, ``[N, ...]``.
        input_size: Spatial size of the input; fixes which of the sizes that round to one output size it had.
        stride: Per spatial axis, as the rest.
        padding: Zeros added on both sides.
        dilation: Spacing of the filter's taps.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed convolution.
        groups: Channel groups.
    """

    books: int
    entries: int
    weight_shape: tuple[int, ...]
    input_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    batched = True

    def _weight(self, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return codebook.expand(codebooks, codes, signs=signs).view(self.weight_shape)

    def out(self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        weight = self._weight(codebooks, codes, signs)
        return torch.convolution(
            x, weight, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        weight = self._weight(codebooks, codes, signs)
        rest = self._adjoint_padding(y.shape[2:])
        x = torch.convolution(
            y, weight, None, self.stride, self.padding, self.dilation, not self.transposed, rest, self.groups
        )
        for axis, size in enumerate(self.input_size, 2):  # an output padding past the stride leaves more than x had
            x = x.narrow(axis, 0, size)
        return x

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        weight = x.new_empty(()).expand(self.weight_shape)
        _, grad, _ = torch.ops.aten.convolution_backward(
            y, x, weight, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups, (False, True, False),
        )  # fmt: skip
        flat = grad.reshape(self.weight_shape[0], math.prod(self.weight_shape[1:]))
        return codebook.collect(flat, codes, self.books, self.entries, signs)

    def _adjoint_padding(self, output_size: torch.Size) -> tuple[int, ...]:
        if self.transposed:
            return (0,) * len(self.stride)
        sizes = zip(
            self.input_size, output_size, self.stride, self.padding, self.dilation, self.weight_shape[2:], strict=True
        )
        return tuple(size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, s, p, d, k in sizes)
