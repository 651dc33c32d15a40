"""Autograd that keeps the input, the codebooks and the codes, and never a matrix of weight size.

``Out``, ``Left`` and ``Book`` are the three partial derivatives of a form that is linear in each of
its three arguments, so each one's backward is the other two, to every order. ``Expand`` and
``Collect`` are adjoint in the same way. Whatever a product expands is made again when a gradient needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rpqfx import codebook
from rpqfx.ops.forms import Form


class _Mapped(Function):
    """A Function whose vmap runs once a sample, unless a subclass knows better."""

    @classmethod
    def _each(cls, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Tensor, int | None]:
        if all(dim is None for dim in in_dims):
            return cls.apply(*args), None
        pick = [
            [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)]
            for i in range(size)
        ]
        return torch.stack([cls.apply(*one) for one in pick]), 0


class _Product(_Mapped):
    """What ``Out`` and ``Left`` share: ``(form, tensor, codebooks, codes, signs)``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.form = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @classmethod
    def _fold(cls, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Tensor, int | None]:
        form, x, *rest = args
        if in_dims[1] is None or any(dim is not None for dim in in_dims[2:]):
            return cls._each(size, in_dims, args)
        x = x.movedim(in_dims[1], 0)
        if not form.batched:
            return cls.apply(form, x, *rest), 0
        return cls.apply(form, x.flatten(0, 1), *rest).unflatten(0, (size, -1)), 0


class Out(_Product):
    """``form.out``: the product itself."""

    @staticmethod
    def forward(form: Form, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return form.out(x, codebooks, codes, signs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, codebooks, codes, signs = ctx.saved_tensors
        grad_x = grad_books = None
        if ctx.needs_input_grad[1] and ctx.needs_input_grad[2]:
            grad_x, grad_books = Grads.apply(ctx.form, x, grad, codebooks, codes, signs)
        elif ctx.needs_input_grad[1]:
            grad_x = Left.apply(ctx.form, grad, codebooks, codes, signs)
        elif ctx.needs_input_grad[2]:
            grad_books = Book.apply(ctx.form, x, grad, codes, signs)
        return None, grad_x, grad_books, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Out._fold(info.batch_size, in_dims, args)


class Left(_Product):
    """``form.left``: the gradient of the input."""

    @staticmethod
    def forward(form: Form, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return form.left(y, codebooks, codes, signs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, codebooks, codes, signs = ctx.saved_tensors
        grad_y = Out.apply(ctx.form, grad, codebooks, codes, signs) if ctx.needs_input_grad[1] else None
        grad_books = Book.apply(ctx.form, grad, y, codes, signs) if ctx.needs_input_grad[2] else None
        return None, grad_y, grad_books, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Left._fold(info.batch_size, in_dims, args)


class Book(_Mapped):
    """``form.book``: the gradient of the codebooks."""

    @staticmethod
    def forward(form: Form, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return form.book(x, y, codes, signs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.form = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, y, codes, signs = ctx.saved_tensors
        grad_x = Left.apply(ctx.form, y, grad, codes, signs) if ctx.needs_input_grad[1] else None
        grad_y = Out.apply(ctx.form, x, grad, codes, signs) if ctx.needs_input_grad[2] else None
        return None, grad_x, grad_y, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Book._each(info.batch_size, in_dims, args)


class Grads(_Mapped):
    """``form.grads``: both gradients of ``Out`` at once."""

    @staticmethod
    def forward(
        form: Form, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return form.grads(x, y, codebooks, codes, signs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.form = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_left: Tensor, grad_book: Tensor) -> tuple[Any, ...]:
        form = ctx.form
        x, y, codebooks, codes, signs = ctx.saved_tensors
        grad_x = Left.apply(form, y, grad_book, codes, signs) if ctx.needs_input_grad[1] else None
        grad_y = grad_books = None
        if ctx.needs_input_grad[2]:
            grad_y = Out.apply(form, grad_left, codebooks, codes, signs) + Out.apply(form, x, grad_book, codes, signs)
        if ctx.needs_input_grad[3]:
            grad_books = Book.apply(form, grad_left, y, codes, signs)
        return None, grad_x, grad_y, grad_books, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
        form, x, y, codebooks, codes, signs = args
        left = Left.vmap(info, (None, *in_dims[2:]), form, y, codebooks, codes, signs)
        book = Book.vmap(info, (None, in_dims[1], in_dims[2], *in_dims[4:]), form, x, y, codes, signs)
        return (left[0], book[0]), (left[1], book[1])


class Expand(_Mapped):
    """``codebook.expand``; ``sparse`` asks for a sparse gradient of the codebooks."""

    @staticmethod
    def forward(codebooks: Tensor, scale: Tensor | None, codes: Tensor, signs: Tensor | None, sparse: bool) -> Tensor:
        return codebook.expand(codebooks, codes, scale, signs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.sparse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        codebooks, scale, codes, signs = ctx.saved_tensors
        grad_books = grad_scale = None
        if ctx.needs_input_grad[0]:
            direct = grad if scale is None else grad * scale[:, None]
            _, books, entries, _ = codebooks.shape
            if ctx.sparse:
                grad_books = codebook.collect_sparse(direct, codes, books, entries, signs)
            else:
                grad_books = Collect.apply(direct, codes, signs, books, entries)
        if ctx.needs_input_grad[1]:
            grad_scale = (grad * Expand.apply(codebooks, None, codes, signs, False)).sum(-1)
        return grad_books, grad_scale, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Expand._each(info.batch_size, in_dims, args)


class Collect(_Mapped):
    """``codebook.collect``: the gradient of ``Expand``."""

    @staticmethod
    def forward(grad: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Tensor:
        return codebook.collect(grad, codes, books, entries, signs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        codes, signs = ctx.saved_tensors
        return Expand.apply(grad, None, codes, signs, False), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Collect._each(info.batch_size, in_dims, args)
