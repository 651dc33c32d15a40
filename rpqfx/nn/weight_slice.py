"""A quantized tensor or a part of it: the ways it is used, without the tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx import ops
from rpqfx.errors import InputError, SpecError
from rpqfx.nn.layout import Layout
from rpqfx.nn.placement import check_placed

Note = Callable[[Any, Tensor, tuple[Any, ...], tuple[Any, ...]], None]


class Part:
    """A quantized tensor, or some of its vectors or sub-vectors.

    Parts of a part are views of the codes and codebooks: nothing is expanded to take one.

    Args:
        tensors: The stored tensors.
        layout: How the tensor is seen as vectors.
        grad_factor: Factor of the gradient of the codebooks.
        plan: Which way products run.
        path: How the part was taken from the whole: names and arguments of the methods here.
        note: Called with the name, the input, the arguments and the path of each product, where somebody listens.
        owner: The module that holds the whole, which errors name.
    """

    lasting = True
    """Whether the tensors stay where they are after a product."""

    def __init__(
        self,
        tensors: ops.Tensors,
        layout: Layout,
        grad_factor: float = 1.0,
        plan: ops.Plan = "auto",
        path: tuple[tuple[Any, ...], ...] = (),
        note: Note | None = None,
        owner: nn.Module | None = None,
    ) -> None:
        self.tensors = tensors
        self.layout = layout
        self.grad_factor = grad_factor
        self.plan = plan
        self.path = path
        self.note = note
        self.owner = owner

    # ------------------------------------------------------------------------------------------- parts

    def narrow(self, axis: int, start: int, length: int) -> Part | None:
        """Returns a range of an axis of the tensor, or None where that is not whole vectors or sub-vectors in a row.

        Args:
            axis: Axis of the tensor.
            start: First index.
            length: How many.
        """
        layout = self.layout
        if start == 0 and length == layout.shape[axis]:
            return self
        along = layout.vector_axes if axis in layout.vector_axes else layout.dim_axes
        place = along.index(axis)
        if any([layout.shape[outer] != 1 for outer in along[:place]]) or length == 0:
            return None
        inner = math.prod([layout.shape[other] for other in along[place + 1 :]])
        first, last = start * inner, (start + length) * inner
        if along == layout.vector_axes:
            tensors = self.tensors.vectors(slice(first, last))
            zero = layout.zero_vector
            layout = replace(layout, zero_vector=zero - first if zero is not None and first <= zero < last else None)
        else:
            _, books, _, d = self.tensors.codebooks.shape
            step = d * (self.tensors.codes.shape[1] // books if books > 1 else 1)
            if first % step or last % step:
                return None
            tensors = self.tensors.sub_vectors(slice(first // d, last // d))
        return self._part(tensors, layout.resized(axis, length), ("narrow", axis, start, length))

    def seen_as(self, layout: Layout) -> Part:
        """Returns the same vectors as a tensor of another layout, of as many vectors of the same length."""
        return self._part(self.tensors, layout, ("seen_as", layout))

    def drop(self, axis: int) -> Part | None:
        """Returns the part without an axis of size one, or None where it cannot be."""
        layout = self.layout.without(axis)
        return None if layout is None else self._part(self.tensors, layout, ("drop", axis))

    def take(self, experts: Tensor) -> Part:
        """Returns some experts' matrices, ``[len(experts), rows, cols]``, of a tensor of experts.

        Args:
            experts: One-dimensional integer tensor, none below zero.
        """
        layout, held = self.layout, self.tensors.untiled()
        total, codes = layout.shape[0], held.codes
        size = codes.shape[-1] // total if layout.experts == "shared" else codes.shape[1] // total
        index = (experts.long()[:, None] * size + torch.arange(size, device=codes.device)).reshape(-1)
        tensors = held.vectors(index) if layout.experts == "shared" else held.sub_vectors(index)
        count = experts.shape[0]
        return self._part(tensors, layout.resized(0, count), ("take", count))

    def experts(self) -> list[Part]:
        """Returns each expert's matrix."""
        tensors, layout = self.tensors, self.layout.without(0)
        assert layout is not None
        total = self.layout.shape[0]
        if self.layout.experts == "shared":
            size = tensors.num_vectors // total
            each = [tensors.vectors(slice(e * size, (e + 1) * size)) for e in range(total)]
        else:  # split at once: the gradients of slices, each as large as all codebooks, would add up
            tensors = tensors.untiled()
            size, books = tensors.codes.shape[1] // total, tensors.codebooks
            own = books.split(books.shape[1] // total, 1) if books.shape[1] > 1 else [books] * total
            codes = tensors.codes.split(size, 1)
            signs = [None] * total if tensors.signs is None else tensors.signs.split(size, 1)
            dims = [None] * total if tensors.dims is None else tensors.dims.split(layout.dim)
            parts = zip(own, codes, signs, dims, strict=True)
            each = [ops.Tensors(b, c, tensors.scale, s, dim) for b, c, s, dim in parts]
        return [self._part(one, layout, ("narrow", 0, e, 1), ("drop", 0)) for e, one in enumerate(each)]

    def _part(self, tensors: ops.Tensors, layout: Layout, *steps: tuple[Any, ...]) -> Part:
        return Part(tensors, layout, self.grad_factor, self.plan, (*self.path, *steps), self.note, self.owner)

    # ----------------------------------------------------------------------------------------- products

    def dense(self) -> Tensor:
        """Returns the tensor."""
        check_placed(self.tensors, None, self.owner)
        vectors = ops.expand(self.tensors, self.grad_factor)
        return self.layout.to_tensor(self._zero(vectors, 0))

    def lookup(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Returns rows of the matrix ``[rows, cols]`` (see ``RPQWeight.lookup``)."""
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InputError(f"rows are looked up by integers, got {ids.dtype}")
        check_placed(self.tensors, ids, self.owner)
        if self.layout.transposed:  # by torch's lookup, which takes no ids below zero
            return F.embedding(ids.long(), self.dense().reshape(self.layout.rows, self.layout.cols))
        sparse = sparse and not torch.compiler.is_compiling()  # compilers cannot trace how such a gradient is made
        rows = ops.lookup(ids.long(), self.tensors, self.grad_factor, sparse)
        if self.layout.zero_vector is None:
            return rows
        return rows.masked_fill((ids == self.layout.zero_vector)[..., None], 0)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ matrix.T + bias`` (see ``RPQWeight.linear``)."""
        if self.note is not None:
            self.note("linear", x, (), self.path)
        check_placed(self.tensors, x, self.owner, bias)
        if self.layout.transposed:
            y = ops.linear_t(self._zero(x, -1), self.tensors, self.grad_factor, self.plan)
            return y if bias is None else y + bias.to(y.dtype)
        if self.layout.zero_vector is None:
            return ops.linear(x, self.tensors, bias, self.grad_factor, self.plan)
        y = self._zero(ops.linear(x, self.tensors, None, self.grad_factor, self.plan), -1)
        return y if bias is None else y + bias.to(y.dtype)

    def linear_t(self, y: Tensor) -> Tensor:
        """``y @ matrix`` (see ``RPQWeight.linear_t``)."""
        if self.note is not None:
            self.note("linear_t", y, (), self.path)
        check_placed(self.tensors, y, self.owner)
        if self.layout.transposed:
            return self._zero(ops.linear(y, self.tensors, None, self.grad_factor, self.plan), -1)
        return ops.linear_t(self._zero(y, -1), self.tensors, self.grad_factor, self.plan)

    def conv(self, x: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        """Returns a convolution (see ``RPQWeight.conv``)."""
        if self.note is not None:
            self.note("conv", x, geometry, self.path)
        check_placed(self.tensors, x, self.owner, bias)
        layout = self.layout
        if layout.transposed or layout.lead != 1 or layout.experts:
            raise SpecError("a convolution's vectors are its filters (rows of its weight)")
        stride, padding, dilation, groups, transposed, output_padding = geometry
        return ops.conv(
            x, self.tensors, layout.shape, bias, stride=stride, padding=padding, dilation=dilation, groups=groups,
            transposed=transposed, output_padding=output_padding, grad_factor=self.grad_factor, plan=self.plan,
        )  # fmt: skip

    def _zero(self, x: Tensor, axis: int) -> Tensor:
        """``x`` with the zero vector's element of an axis over vectors set to zero."""
        if self.layout.zero_vector is None:
            return x
        zeros = torch.zeros_like(x.select(axis, 0))
        return torch.select_scatter(x, zeros, axis, self.layout.zero_vector)
