"""The differentiable functions, to the second order and under vmap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from rpqfx.codebook import CodebookSpec
from rpqfx.ops.conv_contract import ConvContract
from rpqfx.ops.conv_forms import Conv
from rpqfx.ops.forms import Contract, Form, Matmul
from rpqfx.ops.functions import Book, Collect, Expand, Grads, Left, Lookup, Out
from tests.helpers import assert_same, naive_expand, randn, stored

SPEC = CodebookSpec(5, 6, 2, entries=3, stages=2, books=3, scale=True, signs=True)
FILTERS = CodebookSpec(4, 6, 2, entries=3, stages=2, books=3, signs=True)
CHANNELS = CodebookSpec(4, 12, 3, entries=3, stages=2, books=2, signs=True)


def conv(transposed: bool) -> tuple[Form, Tensor, Tensor]:
    """A convolution with stride, padding, dilation and groups; its input and its output's shape."""
    form = Conv(3, 3, (4, 2, 3), (7,), (2,), (1,), (2,), transposed, (1 if transposed else 0,), 2)
    x = randn(1, 2, 4, 7)
    y = torch.convolution(x, randn(0, 4, 2, 3), None, (2,), (1,), (2,), transposed, form.output_padding, 2)
    return form, x, randn(2, *y.shape)


def conv_contract(transposed: bool) -> tuple[Form, Tensor, Tensor]:
    """One whose entries are filters of one channel, a codebook for two."""
    form = ConvContract(2, 3, (4, 4, 3), (7,), (2,), (1,), (2,), transposed, (1 if transposed else 0,), 1)
    x = randn(1, 2, 4, 7)
    y = torch.convolution(x, randn(0, 4, 4, 3), None, (2,), (1,), (2,), transposed, form.output_padding, 1)
    return form, x, randn(2, *y.shape)


FORMS = {
    "contract": (Contract(3, 3), randn(1, 2, 6), randn(2, 2, 5), SPEC),
    "matmul": (Matmul(3, 3), randn(1, 2, 6), randn(2, 2, 5), SPEC),
    "conv": (*conv(False), FILTERS),
    "conv transposed": (*conv(True), FILTERS),
    "conv contract": (*conv_contract(False), CHANNELS),
    "conv contract transposed": (*conv_contract(True), CHANNELS),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("with_signs", [False, True])
def test_products_have_right_gradients_of_first_and_second_order(name: str, with_signs: bool) -> None:
    form, x, y, spec = FORMS[name]
    books, codes, _, signs = stored(spec, 3)
    signs = signs if with_signs else None
    x, y, books = (t.clone().requires_grad_() for t in (x, y, books))
    for function, inputs in (
        (lambda x, books: Out.apply(form, x, books, codes, signs, None), (x, books)),
        (lambda y, books: Left.apply(form, y, books, codes, signs), (y, books)),
        (lambda x, y: Book.apply(form, x, y, codes, signs), (x, y)),
        (lambda x, y, books: Grads.apply(form, x, y, books, codes, signs), (x, y, books)),
    ):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_signs", [False, True])
def test_expand_and_collect_have_right_gradients_of_first_and_second_order(with_scale: bool, with_signs: bool) -> None:
    books, codes, scale, signs = stored(SPEC, 4)
    signs = signs if with_signs else None
    books, scale, grad = (t.clone().requires_grad_() for t in (books, scale, randn(5, 5, 6)))

    def expand(books: Tensor, scale: Tensor | None = None) -> Tensor:
        return Expand.apply(books, codes, scale, signs)

    inputs = (books, scale) if with_scale else (books,)
    assert_same(expand(*inputs), naive_expand(books, codes, scale if with_scale else None, signs))
    assert gradcheck(expand, inputs)
    assert gradgradcheck(expand, inputs)

    def collect(grad: Tensor) -> Tensor:
        return Collect.apply(grad, codes, signs, 3, 3)

    assert gradcheck(collect, (grad,))
    assert gradgradcheck(collect, (grad,))


def test_expand_gives_a_sparse_gradient_when_asked() -> None:
    """It lists the entries in use and equals the dense gradient."""
    books, codes, scale, signs = stored(SPEC, 6)
    grad = randn(7, 5, 6)
    grads = []
    for sparse in (False, True):
        leaf = books.clone().requires_grad_()
        Lookup.apply(torch.arange(5), leaf, codes, scale, signs, sparse).backward(grad)
        assert leaf.grad.is_sparse == sparse
        grads.append(leaf.grad.to_dense())
    assert_same(grads[1], grads[0])


def one_by_one(function: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> Tensor:
    size = next(a.shape[d] for a, d in zip(args, in_dims, strict=True) if d is not None)
    return torch.stack(
        [
            function(*[a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)])
            for i in range(size)
        ]
    )


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, None), (-1, 0)])
def test_vmap_of_products_is_one_call_a_sample(name: str, in_dims: tuple[int | None, int | None]) -> None:
    """Over the tensor (any axis), over the codebooks, or over both."""
    form, x, y, spec = FORMS[name]
    _, codes, _, signs = stored(spec, 3)
    books = randn(8, 3, *spec.codebooks_shape)

    def batched(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor if dim is None else torch.stack([tensor, 2 * tensor, tensor - 1], dim)

    for function, tensor in ((Out, x), (Left, y)):
        args = (batched(tensor, in_dims[0]), books if in_dims[1] == 0 else books[0])

        def run(a: Tensor, b: Tensor, function: Any = function) -> Tensor:
            return function.apply(form, a, b, codes, signs, *[None] * (function is Out))

        dims = (in_dims[0] % args[0].dim() if in_dims[0] is not None else None, in_dims[1])
        assert_same(torch.vmap(run, in_dims)(*args), one_by_one(run, dims, *args))
    xs, ys = batched(x, in_dims[0]), batched(y, in_dims[1])
    if in_dims[0] in (0, None):

        def run_book(a: Tensor, b: Tensor) -> Tensor:
            return Book.apply(form, a, b, codes, signs)

        assert_same(torch.vmap(run_book, in_dims)(xs, ys), one_by_one(run_book, in_dims, xs, ys))


@pytest.mark.parametrize("name", FORMS)
def test_both_gradients_at_once_are_the_two_alone(name: str) -> None:
    form, x, y, spec = FORMS[name]
    books, codes, _, signs = stored(spec, 3)
    grad_x, grad_books = Grads.apply(form, x, y, books, codes, signs)
    assert_same(grad_x, Left.apply(form, y, books, codes, signs))
    assert_same(grad_books, Book.apply(form, x, y, codes, signs))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, None), (0, 0, 0)])
def test_vmap_of_both_gradients_is_one_call_a_sample(name: str, in_dims: tuple[int | None, ...]) -> None:
    form, x, y, spec = FORMS[name]
    books, codes, _, signs = stored(spec, 3)
    args = [t if dim is None else torch.stack([t, 2 * t, t - 1]) for t, dim in zip((x, y, books), in_dims, strict=True)]

    def run(x: Tensor, y: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
        return Grads.apply(form, x, y, books, codes, signs)

    mapped = torch.vmap(run, in_dims)(*args)
    for i in range(2):
        assert_same(mapped[i], one_by_one(lambda *a, i=i: run(*a)[i], in_dims, *args))


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)])
def test_vmap_of_expand_is_one_call_a_sample(in_dims: tuple[int | None, ...]) -> None:
    _, codes, _, signs = stored(SPEC, 9)
    books, scale = randn(1, 3, *SPEC.codebooks_shape), randn(2, 3, 5)
    codes = torch.stack([codes, (codes + 1) % 3, (codes + 2) % 3])
    args = [t if d == 0 else t[0] for t, d in zip((books, scale, codes), in_dims, strict=True)]

    def run(books: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
        return Expand.apply(books, codes, scale, signs)

    assert_same(torch.vmap(run, in_dims)(*args), one_by_one(run, in_dims, *args))


def test_vmap_of_collect_is_one_call_a_sample() -> None:
    _, codes, _, signs = stored(SPEC, 9)
    grads = randn(1, 3, 5, 6)

    def run(grad: Tensor) -> Tensor:
        return Collect.apply(grad, codes, signs, 3, 3)

    assert_same(torch.vmap(run)(grads), one_by_one(run, (0,), grads))


def test_a_gradient_that_nobody_wants_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen codebooks, or an input without a gradient, save that half of the backward."""
    books, codes, _, signs = stored(SPEC, 3)
    called = []
    for name in ("left", "book", "grads"):
        method = getattr(Contract, name)
        monkeypatch.setattr(Contract, name, lambda *a, m=method, n=name: called.append(n) or m(*a))
    x = randn(1, 2, 6)
    Out.apply(Contract(3, 3), x.clone().requires_grad_(), books, codes, signs, None).sum().backward()
    assert called == ["left"]
    called.clear()
    Out.apply(Contract(3, 3), x, books.clone().requires_grad_(), codes, signs, None).sum().backward()
    assert called == ["book"]
    called.clear()
    Out.apply(
        Contract(3, 3), x.clone().requires_grad_(), books.clone().requires_grad_(), codes, signs, None
    ).sum().backward()
    assert called == ["grads"]
