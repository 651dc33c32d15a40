"""Autograd of rows of the matrix: all of them, or some, and the adjoint of making them.

``Expand`` and ``Collect`` are each other's backward, to every order. Codes are kept for it, and no rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpqfx import codebook
from rpqfx.codebook import steps
from rpqfx.ops import library
from rpqfx.ops.mapped import Mapped, differentiated, like_codebooks, no_view


def look_up(
    ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None, dims: Tensor | None,
    sparse: bool,
) -> Tensor:  # fmt: skip
    """Runs ``Lookup``, or returns the rows themselves where nothing can ask for a gradient."""
    if differentiated(codebooks, scale, dims):
        return Lookup.apply(ids, codebooks, codes, scale, signs, dims, sparse)
    return library.lookup(ids, codebooks, codes, scale, signs, dims)


class _Rows(Mapped):
    """The base of ``Expand`` and ``Lookup``: ``(..., codebooks, codes, scale, signs, dims, ...)``, and rows."""

    @staticmethod
    def _grads(
        ctx: Any, first: int, grad: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None,
        signs: Tensor | None, dims: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Returns gradients of codebooks (input number ``first``), scale and dims; the tensors are of the rows made."""
        grad_books = grad_scale = grad_dims = None
        if ctx.needs_input_grad[first]:
            direct = grad if dims is None else grad * dims
            direct = direct if scale is None else direct * scale[:, None]
            _, books, entries, _ = codebooks.shape
            if ctx.sparse:
                grad_books = codebook.collect_sparse(direct, codes, books, entries, signs)
            else:
                grad_books = like_codebooks(Collect.apply(direct, codes, signs, books, entries), codebooks)
        scaled = scale is not None and ctx.needs_input_grad[first + 2]
        stretched = dims is not None and ctx.needs_input_grad[first + 4]
        if scaled or stretched:
            # of other inputs than the forward's, or a compiler would merge the two and keep the rows in between
            product = grad * Expand.apply(codebooks, codes, None, signs, None)
            grad_scale = (product if dims is None else product * dims).sum(-1) if scaled else None
            grad_dims = (product if scale is None else product * scale[:, None]).sum(0) if stretched else None
        return grad_books, grad_scale, grad_dims


class Expand(_Rows):
    """``codebook.expand``, times ``dims [D]`` where given."""

    @staticmethod
    def forward(
        codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None, dims: Tensor | None
    ) -> Tensor:
        return library.expand(codebooks, codes, scale, signs, dims)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.sparse = False
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_books, grad_scale, grad_dims = Expand._grads(ctx, 0, grad, *ctx.saved_tensors)
        return grad_books, None, grad_scale, None, grad_dims

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Expand._each(info.batch_size, in_dims, args)


class Lookup(_Rows):
    """``codebook.lookup``, times ``dims``; ``sparse`` asks for a sparse gradient of the codebooks."""

    @staticmethod
    def forward(
        ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None,
        dims: Tensor | None, sparse: bool,
    ) -> Tensor:  # fmt: skip
        return no_view(library.lookup(ids, codebooks, codes, scale, signs, dims))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.sparse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ids, codebooks, codes, scale, signs, dims = ctx.saved_tensors
        some = codebook.select_vectors(ids.reshape(-1), codes, scale, signs)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_books, grad_some, grad_dims = Lookup._grads(ctx, 1, rows, codebooks, *some, dims)
        grad_scale = None
        if grad_some is not None:  # a row may be named many times
            total = torch.zeros_like(scale, dtype=steps.sum_dtype(scale.dtype))
            grad_scale = total.index_add(0, ids.reshape(-1), grad_some.to(total.dtype)).to(scale.dtype)
        return None, grad_books, None, grad_scale, None, grad_dims, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Lookup._each(info.batch_size, in_dims, args)


class Collect(Mapped):
    """``codebook.collect``: the gradient of ``Expand``, in float32 at least."""

    @staticmethod
    def forward(grad: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Tensor:
        return library.collect(grad, codes, signs, books, entries)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, codes, signs, *_ = inputs
        ctx.dtype = grad.dtype
        ctx.save_for_backward(codes, signs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        codes, signs = ctx.saved_tensors
        return Expand.apply(grad, codes, None, signs, None).to(ctx.dtype), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Collect._each(info.batch_size, in_dims, args)
