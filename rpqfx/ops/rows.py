"""Autograd of rows of the matrix: all of them, or some, and the adjoint of making them.

``Expand`` and ``Collect`` are each other's backward, to every order. Codes are kept for it, and no rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpqfx import codebook
from rpqfx.ops import operators
from rpqfx.ops.backend import choose
from rpqfx.ops.mapped import Mapped, differentiated, like_codebooks


def look_up(
    ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None, sparse: bool
) -> Tensor:
    """``Lookup``, or where nothing can ask for a gradient the rows themselves."""
    if differentiated(codebooks, scale):
        return Lookup.apply(ids, codebooks, codes, scale, signs, sparse)
    return choose(codebooks, codes).lookup(ids, codebooks, codes, scale, signs)


class _Rows(Mapped):
    """What ``Expand`` and ``Lookup`` share: ``(..., codebooks, codes, scale, signs, ...)``, and rows of the matrix."""

    @staticmethod
    def _grads(
        ctx: Any, first: int, grad: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of codebooks (input number ``first``) and scale; the tensors are of the rows that were made."""
        grad_books = grad_scale = None
        if ctx.needs_input_grad[first]:
            direct = grad if scale is None else grad * scale[:, None]
            _, books, entries, _ = codebooks.shape
            if ctx.sparse:
                grad_books = codebook.collect_sparse(direct, codes, books, entries, signs)
            else:
                grad_books = like_codebooks(Collect.apply(direct, codes, signs, books, entries), codebooks)
        if ctx.needs_input_grad[first + 2]:
            grad_scale = (grad * Expand.apply(codebooks, codes, None, signs)).sum(-1)
        return grad_books, grad_scale


class Expand(_Rows):
    """``codebook.expand``."""

    @staticmethod
    def forward(codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None) -> Tensor:
        return operators.expand(codebooks, codes, scale, signs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.sparse = False
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_books, grad_scale = Expand._grads(ctx, 0, grad, *ctx.saved_tensors)
        return grad_books, None, grad_scale, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Expand._each(info.batch_size, in_dims, args)


class Lookup(_Rows):
    """``codebook.lookup``; ``sparse`` asks for a sparse gradient of the codebooks."""

    @staticmethod
    def forward(
        ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None, sparse: bool
    ) -> Tensor:
        return operators.lookup(ids, codebooks, codes, scale, signs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.sparse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ids, codebooks, codes, scale, signs = ctx.saved_tensors
        some = codebook.select_vectors(ids.reshape(-1), codes, scale, signs)
        grad_books, grad_some = Lookup._grads(ctx, 1, grad.reshape(-1, grad.shape[-1]), codebooks, *some)
        grad_scale = None if grad_some is None else torch.zeros_like(scale).index_add(0, ids.reshape(-1), grad_some)
        return None, grad_books, None, grad_scale, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Lookup._each(info.batch_size, in_dims, args)


class Collect(Mapped):
    """``codebook.collect``: the gradient of ``Expand``, in float32 at least."""

    @staticmethod
    def forward(grad: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Tensor:
        return operators.collect(grad, codes, signs, books, entries)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, codes, signs, *_ = inputs
        ctx.dtype = grad.dtype
        ctx.save_for_backward(codes, signs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        codes, signs = ctx.saved_tensors
        return Expand.apply(grad, codes, None, signs).to(ctx.dtype), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Collect._each(info.batch_size, in_dims, args)
