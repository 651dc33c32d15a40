"""A convolution whose filters are quantized, as a form (see ``rpqfx.ops.forms``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rpqfx.ops import library


@dataclass(frozen=True)
class Geometry:
    """The numbers of a convolution, or of a transposed one.

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

    def _adjoint_padding(self, output_size: torch.Size) -> tuple[int, ...]:
        if self.transposed:
            return (0,) * len(self.stride)
        sizes = zip(
            self.input_size, output_size, self.stride, self.padding, self.dilation, self.weight_shape[2:], strict=True
        )
        return tuple(size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, s, p, d, k in sizes)


@dataclass(frozen=True)
class Conv(Geometry):
    """A convolution, or a transposed one, whose filters are dequantized for each call."""

    def out(
        self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        y = library.conv(
            x, codebooks, codes, signs, self.weight_shape, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups,
        )  # fmt: skip
        return add_channels(y, bias)

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        x = library.conv(
            y, codebooks, codes, signs, self.weight_shape, self.stride, self.padding, self.dilation,
            not self.transposed, self._adjoint_padding(y.shape[2:]), self.groups,
        )  # fmt: skip
        for axis, size in enumerate(self.input_size, 2):  # an output padding past the stride leaves more than x had
            x = x.narrow(axis, 0, size)
        return x

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return library.conv_book(
            x, y, codes, signs, self.weight_shape, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups, self.books, self.entries,
        )  # fmt: skip

    def grads(
        self, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.left(y, codebooks, codes, signs), self.book(x, y, codes, signs)


def add_channels(y: Tensor, bias: Tensor | None) -> Tensor:
    """Returns ``y [B, N, *size]`` with a number added to each channel, in place where nothing is traced."""
    if bias is None:
        return y
    shift = bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2))
    return y + shift if torch.compiler.is_compiling() else y.add_(shift)  # torch 2.11 compiles the latter wrongly
