"""The differentiable functions, to the second order and under vmap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from rpqfx.codebook import CodebookSpec
from rpqfx.ops.autograd import Book, Grads, Left, Out
from rpqfx.ops.conv_contract import ConvContract
from rpqfx.ops.conv_forms import Conv, Geometry
from rpqfx.ops.forms import Contract, Form, Matmul
from tests.helpers import assert_same, one_by_one, randn, stored

# As small as they can be with two of everything: a check to the second order runs some hundred times a number.
SPEC = CodebookSpec(3, 4, 2, entries=2, stages=2, num_codebooks=2, scale=True, signs=True)
FILTERS = CodebookSpec(4, 4, 2, entries=2, stages=2, num_codebooks=2, signs=True)
CHANNELS = CodebookSpec(3, 8, 2, entries=2, stages=2, num_codebooks=2, signs=True)


def conv(transposed: bool) -> tuple[Form, Tensor, Tensor]:
    """A convolution with stride, padding, dilation and groups; its input and its output's shape."""
    x = randn(1, 2, 4, 2 if transposed else 3)
    form = Conv(2, 2, (4, 2, 2), x.shape[2:], (2,), (1,), (2,), transposed, (int(transposed),), 2)
    return form, x, result(form, x)


def conv_contract(transposed: bool) -> tuple[Form, Tensor, Tensor]:
    """One whose entries are filters of one channel, a codebook for two."""
    x = randn(1, 2, 3, 2) if transposed else randn(1, 2, 4, 3)
    form = ConvContract(2, 2, (3, 4, 2), x.shape[2:], (2,), (1,), (2,), transposed, (int(transposed),), 1)
    return form, x, result(form, x)


def result(form: Geometry, x: Tensor) -> Tensor:
    """Of the shape that the convolution of an input has."""
    y = torch.convolution(
        x, randn(0, *form.weight_shape), None, form.stride, form.padding, form.dilation, form.transposed,
        form.output_padding, form.groups,
    )  # fmt: skip
    return randn(2, *y.shape)


FORMS = {
    "contract": (Contract(2, 2), randn(1, 2, 4), randn(2, 2, 3), SPEC),
    "matmul": (Matmul(2, 2), randn(1, 2, 4), randn(2, 2, 3), SPEC),
    "conv": (*conv(False), FILTERS),
    "conv transposed": (*conv(True), FILTERS),
    "conv contract": (*conv_contract(False), CHANNELS),
    "conv contract transposed": (*conv_contract(True), CHANNELS),
}


def with_and_without_signs() -> list[Any]:
    """Every form both ways; by default each one way, in turn, without the transposed ones, whose code is the same."""
    pairs = [
        (name, signs, (i + signs) % 2 or "transposed" in name)
        for i, name in enumerate(FORMS)
        for signs in (False, True)
    ]
    return [pytest.param(name, signs, marks=[pytest.mark.slow] * bool(other)) for name, signs, other in pairs]


@pytest.mark.parametrize(("name", "with_signs"), with_and_without_signs())
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


def test_a_gradient_that_nobody_wants_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen codebooks, or an input without a gradient, save that half of the backward."""
    books, codes, _, signs = stored(SPEC, 3)
    called = []
    for name in ("left", "book", "grads"):
        method = getattr(Contract, name)
        monkeypatch.setattr(Contract, name, lambda *a, m=method, n=name: called.append(n) or m(*a))
    x = randn(1, 2, 4)
    Out.apply(Contract(2, 2), x.clone().requires_grad_(), books, codes, signs, None).sum().backward()
    assert called == ["left"]
    called.clear()
    Out.apply(Contract(2, 2), x, books.clone().requires_grad_(), codes, signs, None).sum().backward()
    assert called == ["book"]
    called.clear()
    Out.apply(
        Contract(2, 2), x.clone().requires_grad_(), books.clone().requires_grad_(), codes, signs, None
    ).sum().backward()
    assert called == ["grads"]
