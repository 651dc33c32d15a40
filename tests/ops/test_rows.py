"""Rows of the matrix and their adjoint, differentiable to the second order and under vmap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from rpqfx.codebook import CodebookSpec
from rpqfx.ops.rows import Collect, Expand, Lookup
from tests.helpers import assert_same, naive_expand, one_by_one, randn, stored

DIMS = randn(3, 6)
SPEC = CodebookSpec(5, 6, 2, entries=3, stages=2, num_codebooks=3, scale=True, signs=True)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_signs", [False, True])
@pytest.mark.parametrize("with_dims", [False, True])
def test_expand_has_right_gradients_of_first_and_second_order(
    with_scale: bool, with_signs: bool, with_dims: bool
) -> None:
    books, codes, scale, signs = stored(SPEC, 4)
    signs = signs if with_signs else None
    books, scale, dims = (t.clone().requires_grad_() for t in (books, scale, DIMS))
    given = {"scale": scale} if with_scale else {}
    given |= {"dims": dims} if with_dims else {}

    def expand(books: Tensor, *factors: Tensor) -> Tensor:
        named = dict(zip(given, factors, strict=True))
        return Expand.apply(books, codes, named.get("scale"), signs, named.get("dims"))

    inputs = (books, *given.values())
    assert_same(expand(*inputs), naive_expand(books, codes, given.get("scale"), signs, given.get("dims")))
    assert gradcheck(expand, inputs)
    assert gradgradcheck(expand, inputs)


@pytest.mark.parametrize("with_signs", [False, True])
def test_collect_has_right_gradients_of_first_and_second_order(with_signs: bool) -> None:
    _, codes, _, signs = stored(SPEC, 4)
    grad = randn(5, 5, 6).requires_grad_()

    def collect(grad: Tensor) -> Tensor:
        return Collect.apply(grad, codes, signs if with_signs else None, 3, 3)

    assert gradcheck(collect, (grad,))
    assert gradgradcheck(collect, (grad,))


def test_expand_gives_a_sparse_gradient_when_asked() -> None:
    """It lists the entries in use and equals the dense gradient."""
    books, codes, scale, signs = stored(SPEC, 6)
    grad = randn(7, 5, 6)
    grads = []
    for sparse in (False, True):
        leaf = books.clone().requires_grad_()
        Lookup.apply(torch.arange(5), leaf, codes, scale, signs, DIMS, sparse).backward(grad)
        assert leaf.grad.is_sparse == sparse
        grads.append(leaf.grad.to_dense())
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None, None), (None, 0, None, None), (None, None, 0, None), (None, None, None, 0), (0, 0, 0, 0)],
)
def test_vmap_of_expand_is_one_call_a_sample(in_dims: tuple[int | None, ...]) -> None:
    _, codes, _, signs = stored(SPEC, 9)
    books, scale = randn(1, 3, *SPEC.codebooks_shape), randn(2, 3, 5)
    codes = torch.stack([codes, (codes + 1) % 3, (codes + 2) % 3])
    mapped = (books, scale, codes, randn(3, 3, 6))
    args = [t if d == 0 else t[0] for t, d in zip(mapped, in_dims, strict=True)]

    def run(books: Tensor, scale: Tensor, codes: Tensor, dims: Tensor) -> Tensor:
        return Expand.apply(books, codes, scale, signs, dims)

    assert_same(torch.vmap(run, in_dims)(*args), one_by_one(run, in_dims, *args))


def test_vmap_of_collect_is_one_call_a_sample() -> None:
    _, codes, _, signs = stored(SPEC, 9)
    grads = randn(1, 3, 5, 6)

    def run(grad: Tensor) -> Tensor:
        return Collect.apply(grad, codes, signs, 3, 3)

    assert_same(torch.vmap(run)(grads), one_by_one(run, (0,), grads))
