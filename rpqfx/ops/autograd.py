"""Autograd that keeps the input, the codebooks and the codes, and never a matrix of weight size.

``Out``, ``Left`` and ``Book`` are the three partial derivatives of a form that is linear in each of
its three arguments, so each one's backward is the other two, to every order. Whatever a product expands is
made again when a gradient needs it.

Codebooks and bias are cast to the input's dtype inside, not before: so no copy of them is saved, and their gradients
are float32 sums that are never rounded to a shorter dtype on the way to a float32 parameter.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rpqfx.ops.autocast import autocast_dtype
from rpqfx.ops.forms import Form
from rpqfx.ops.mapped import Mapped, differentiated, like_codebooks, no_view


def _as_given(x: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from choosing dtypes: forms have chosen."""
    return nullcontext() if autocast_dtype(x.device) is None else torch.autocast(x.device.type, enabled=False)


def product(
    form: Form, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Runs ``Out``, or the form itself where nothing can ask for a gradient: a small layer's time is in the calls."""
    if differentiated(x, codebooks, bias):
        return Out.apply(form, x, codebooks, codes, signs, bias)
    with _as_given(x):
        return form.out(x, codebooks, codes, signs, bias)


def product_t(form: Form, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
    """Runs ``Left`` in the same way."""
    if differentiated(y, codebooks):
        return Left.apply(form, y, codebooks, codes, signs)
    with _as_given(y):
        return form.left(y, codebooks, codes, signs)


class _Product(Mapped):
    """The base of ``Out`` and ``Left``, with arguments ``(form, tensor, codebooks, codes, signs)``."""

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
    """``form.out``: the product itself, with a bias."""

    @staticmethod
    def forward(
        form: Form, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        with _as_given(x):
            return no_view(form.out(x, codebooks, codes, signs, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *kept, bias = inputs
        _Product.setup_context(ctx, tuple(kept), output)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, codebooks, codes, signs = ctx.saved_tensors
        grad_x = grad_books = grad_bias = None
        if ctx.needs_input_grad[1] and ctx.needs_input_grad[2]:
            grad_x, grad_books = Grads.apply(ctx.form, x, grad, codebooks, codes, signs)
        elif ctx.needs_input_grad[1]:
            grad_x = Left.apply(ctx.form, grad, codebooks, codes, signs)
        elif ctx.needs_input_grad[2]:
            grad_books = Book.apply(ctx.form, x, grad, codes, signs)
        if ctx.needs_input_grad[5]:
            others = [axis for axis in range(grad.dim()) if axis != (1 if ctx.form.batched else grad.dim() - 1)]
            grad_bias = grad.sum(others, dtype=ctx.bias_dtype) if others else grad.to(ctx.bias_dtype)
        return None, grad_x, like_codebooks(grad_books, codebooks), None, None, grad_bias

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Out._fold(info.batch_size, in_dims, args)


class Left(_Product):
    """``form.left``: the gradient of the input."""

    @staticmethod
    def forward(form: Form, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        with _as_given(y):
            return no_view(form.left(y, codebooks, codes, signs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, codebooks, codes, signs = ctx.saved_tensors
        # Codebooks first: the bins, which are dropped at once, are not there together with an input's whole gradient.
        grad_books = Book.apply(ctx.form, grad, y, codes, signs) if ctx.needs_input_grad[2] else None
        grad_y = Out.apply(ctx.form, grad, codebooks, codes, signs, None) if ctx.needs_input_grad[1] else None
        return None, grad_y, like_codebooks(grad_books, codebooks), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Left._fold(info.batch_size, in_dims, args)


class Book(Mapped):
    """``form.book``: the gradient of the codebooks, in float32 at least."""

    @staticmethod
    def forward(form: Form, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        with _as_given(x):
            return form.book(x, y, codes, signs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.form = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, y, codes, signs = ctx.saved_tensors
        grad_x = Left.apply(ctx.form, y, grad, codes, signs) if ctx.needs_input_grad[1] else None
        grad_y = Out.apply(ctx.form, x, grad, codes, signs, None) if ctx.needs_input_grad[2] else None
        return None, grad_x, grad_y, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Book._each(info.batch_size, in_dims, args)


class Grads(Mapped):
    """``form.grads``: both gradients of ``Out`` at once."""

    @staticmethod
    def forward(
        form: Form, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with _as_given(x):
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
            grad_y = Out.apply(form, grad_left, codebooks, codes, signs, None)
            grad_y = grad_y + Out.apply(form, x, grad_book, codes, signs, None)
        if ctx.needs_input_grad[3]:
            grad_books = like_codebooks(Book.apply(form, grad_left, y, codes, signs), codebooks)
        return None, grad_x, grad_y, grad_books, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
        form, x, y, codebooks, codes, signs = args
        left = Left.vmap(info, (None, *in_dims[2:]), form, y, codebooks, codes, signs)
        book = Book.vmap(info, (None, in_dims[1], in_dims[2], *in_dims[4:]), form, x, y, codes, signs)
        return (left[0], book[0]), (left[1], book[1])
