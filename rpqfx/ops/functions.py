"""Autograd that keeps the input, the codebooks and the codes, and never a matrix of weight size.

``Out``, ``Left`` and ``Book`` are the three partial derivatives of a form that is linear in each of
its three arguments, so each one's backward is the other two, to every order. ``Expand`` and
``Collect`` are adjoint in the same way. Whatever a product expands is made again when a gradient needs it.

Codebooks and bias are cast to the input's dtype inside, not before: so no copy of them is saved, and their gradients
are float32 sums that are never rounded to a shorter dtype on the way to a float32 parameter.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rpqfx import codebook
from rpqfx.ops import operators
from rpqfx.ops.backend import choose
from rpqfx.ops.forms import Form


def _as_given(x: Tensor) -> AbstractContextManager[Any]:
    """Where autocast must not choose dtypes: forms have chosen."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def product(
    form: Form, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``Out``, or where nothing can ask for a gradient the form itself: a small layer's time is in the calls."""
    if _differentiated(x, codebooks, bias):
        return Out.apply(form, x, codebooks, codes, signs, bias)
    with _as_given(x):
        return form.out(x, codebooks, codes, signs, bias)


def product_t(form: Form, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
    """``Left`` in the same way."""
    if _differentiated(y, codebooks):
        return Left.apply(form, y, codebooks, codes, signs)
    with _as_given(y):
        return form.left(y, codebooks, codes, signs)


def look_up(
    ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None, sparse: bool
) -> Tensor:
    """``Lookup`` in the same way."""
    if _differentiated(codebooks, scale):
        return Lookup.apply(ids, codebooks, codes, scale, signs, sparse)
    return choose(codebooks, codes).lookup(ids, codebooks, codes, scale, signs)


def _differentiated(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class _Mapped(Function):
    """A Function whose vmap runs once a sample, unless a subclass knows better."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(
            cls
        ):  # torch asks for it at every call, and finding it out takes longer than a small layer
            cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

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
    """``form.out``: the product itself, with a bias."""

    @staticmethod
    def forward(
        form: Form, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        with _as_given(x):
            return form.out(x, codebooks, codes, signs, bias)

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
        return None, grad_x, _like(grad_books, codebooks), None, None, grad_bias

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Out._fold(info.batch_size, in_dims, args)


class Left(_Product):
    """``form.left``: the gradient of the input."""

    @staticmethod
    def forward(form: Form, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        with _as_given(y):
            return form.left(y, codebooks, codes, signs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, codebooks, codes, signs = ctx.saved_tensors
        # Codebooks first: the bins, which are dropped at once, are not there together with an input's whole gradient.
        grad_books = Book.apply(ctx.form, grad, y, codes, signs) if ctx.needs_input_grad[2] else None
        grad_y = Out.apply(ctx.form, grad, codebooks, codes, signs, None) if ctx.needs_input_grad[1] else None
        return None, grad_y, _like(grad_books, codebooks), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return Left._fold(info.batch_size, in_dims, args)


class Book(_Mapped):
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


class Grads(_Mapped):
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
            grad_books = _like(Book.apply(form, grad_left, y, codes, signs), codebooks)
        return None, grad_x, grad_y, grad_books, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
        form, x, y, codebooks, codes, signs = args
        left = Left.vmap(info, (None, *in_dims[2:]), form, y, codebooks, codes, signs)
        book = Book.vmap(info, (None, in_dims[1], in_dims[2], *in_dims[4:]), form, x, y, codes, signs)
        return (left[0], book[0]), (left[1], book[1])


class _Rows(_Mapped):
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
                grad_books = _like(Collect.apply(direct, codes, signs, books, entries), codebooks)
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


class Collect(_Mapped):
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


class Slow(Function):
    """Its input, whose gradient is multiplied by a number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad * ctx.factor, None


def _like(grad: Tensor | None, codebooks: Tensor) -> Tensor | None:
    return grad if grad is None else grad.to(codebooks.dtype)
