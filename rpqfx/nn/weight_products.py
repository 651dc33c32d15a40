"""The ways in which a layer uses a quantized tensor: rows, products, convolutions, and hooks around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rpqfx import ops
from rpqfx.codebook import CodebookSpec, range_of
from rpqfx.nn.layout import Layout
from rpqfx.nn.loading import Loaded
from rpqfx.nn.recorded_slice import CalledPart
from rpqfx.nn.weight_slice import Part
from rpqfx.ops.at_once import conv_at_once, linear_at_once


class Products(Loaded):
    """Uses a quantized tensor: gives its rows, its products and its convolutions, and fires hooks around them."""

    spec: CodebookSpec
    layout: Layout
    codebooks: nn.Parameter
    scale: nn.Parameter | None
    column_scale: nn.Parameter | None
    signs: Tensor | None
    _plan: ops.Plan = "auto"  # also of modules that were pickled before there was a choice

    @property
    def tensors(self) -> ops.Tensors:
        """The stored tensors, as the operations take them."""
        held, buffers = self._parameters, self._buffers
        if "codes" in held:  # FSDP changes it for whole codes as long as they are used
            stored = self.stored_codes.detach()
            signs = None if self.signs is None else self.signs.detach()
            tiled = self.tiled_vectors(stored)
            whole = stored if tiled else self._read(stored)
            return ops.Tensors(self.codebooks, whole, self.scale, signs, self.column_scale, tiled)
        if self.spec.tiled:
            tiles = self.stored_codes
            return ops.Tensors(
                self.codebooks, tiles, self.scale, self.signs, self.column_scale, self.tiled_vectors(tiles)
            )  # fmt: skip
        if "codebooks" in held and "scale" in held and "column_scale" in held:  # torch's lookup takes longer
            codes: Any = buffers["codes"] if self.spec.entries <= 256 else self.codes  # bytes, where there are more
            return ops.Tensors(
                held["codebooks"], codes, held["scale"], buffers["signs"], held["column_scale"]  # type: ignore[arg-type]
            )  # fmt: skip
        return ops.Tensors(self.codebooks, self.codes, self.scale, self.signs, self.column_scale)  # one is computed

    def part(self) -> Part:
        """Returns the whole tensor as a [`Part`][rpqfx.nn.weight_slice.Part], of which parts may be taken."""
        if self._hooked:
            return CalledPart(self, self.tensors, self.layout, self.spec.grad_factor, self._plan)
        return self.whole()

    def whole(self) -> Part:
        """Returns the same part, whose products fire no hooks."""
        return Part(self.tensors, self.layout, self.spec.grad_factor, self._plan, owner=self)

    @property
    def _hooked(self) -> bool:
        """Whether somebody wants to know of calls: hooks of torch, or a forward in place of this one (accelerate)."""
        found = self.__dict__
        if found["_forward_pre_hooks"] or found["_forward_hooks"] or "forward" in found:
            return True
        return bool(found["_backward_hooks"] or found["_backward_pre_hooks"])

    @property
    def _alone(self) -> bool:
        """Whether nobody wants to know of calls: no hook, and no subclass with parts of its own."""
        return type(self).part is Products.part and not self._hooked

    def forward(self, ids: Tensor | None = None, *operands: Any, use: Callable[..., Tensor] | None = None) -> Tensor:
        """Returns the tensor, or rows of it.

        Layers use the weight without a call, unless it has hooks: then ``linear``, ``lookup`` and the rest call it with
        their operands and with ``use``, so that forward and backward hooks get the operand and the product.

        Args:
            ids: Integer rows of any shape, or None for all; with ``use`` the first operand.
            *operands: Further ones, with ``use``.
            use: Called with the whole [`Part`][rpqfx.nn.weight_slice.Part] and the operands that were given.

        Returns:
            The tensor in its layout's shape, or ``[*ids.shape, cols]``, or what ``use`` returns.
        """
        if use is not None:
            return use(self.whole(), *(() if ids is None else (ids, *operands)))
        return self.whole().dense() if ids is None else self.whole().lookup(ids)

    def lookup(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Returns rows of the matrix ``[rows, cols]``.

        Args:
            ids: Integer rows of any shape.
            sparse: Whether the codebooks' gradient is a sparse tensor.

        Returns:
            ``[*ids.shape, cols]``.

        Raises:
            InputError: If ``ids`` are not integers.
        """
        return self.part().lookup(ids, sparse)

    def linear(self, x: Tensor, bias: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """``x @ matrix.T + bias``, as a linear layer whose weight is the matrix ``[rows, cols]``.

        Args:
            x: ``[..., cols]``.
            bias: ``[rows]`` or None.
            rows: Use these rows of the matrix only (``bias`` then belongs to them).

        Returns:
            ``[..., rows]``.

        Raises:
            InputError: If width or dtype of ``x`` do not fit.
        """
        if rows is None:
            if self.spec.tiled and self._alone and not self.layout.transposed and self.layout.zero_vector is None:
                y = linear_at_once(x, self.tensors, bias, self._plan)
                if y is not None:
                    return y
            return self.part().linear(x, bias)
        start, stop, _ = range_of(rows, self.layout.rows)
        matrix = replace(self.layout, shape=(self.layout.rows, self.layout.cols), lead=1)
        some = self.part().seen_as(matrix).narrow(0, start, stop - start)
        if some is not None:
            return some.linear(x, bias)
        y = self.part().linear(x)[..., rows]  # their columns' sub-vectors do not end where the rows do
        return y if bias is None else y + bias.to(y.dtype)

    def linear_t(self, y: Tensor) -> Tensor:
        """``y @ matrix``.

        Args:
            y: ``[..., rows]``.

        Returns:
            ``[..., cols]``.

        Raises:
            InputError: If width or dtype of ``y`` do not fit.
        """
        return self.part().linear_t(y)

    def conv(
        self,
        x: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        transposed: bool = False,
        output_padding: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Returns a convolution (or a transposed one) whose weight is the tensor.

        Args:
            x: ``[B, C, *spatial]`` or ``[C, *spatial]``.
            bias: One number a channel of the result, or None.
            stride: Per spatial axis, as the rest.
            padding: Zeros added on both sides.
            dilation: Spacing of the taps.
            groups: Channel groups.
            transposed: Whether it is a transposed convolution.
            output_padding: Output padding of a transposed convolution.

        Returns:
            As the dense convolution.

        Raises:
            InputError: If channels or dtype of ``x`` do not fit.
        """
        geometry = (stride, padding, dilation, groups, transposed, output_padding)
        layout = self.layout
        if self._alone and not layout.transposed and layout.lead == 1 and not layout.experts:
            y = conv_at_once(x, self.tensors, layout.shape, bias, *geometry, self._plan)
            if y is not None:
                return y
        return self.part().conv(x, bias, *geometry)
