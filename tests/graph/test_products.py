"""Claims on products of two activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rpqfx.graph.products import Product, is_product
from tests.helpers import generator

Q, K = (torch.randn(2, 3, n, 4, generator=generator(n)) for n in (5, 6))


def product(func: Any, *args: Any, **kwargs: Any) -> Product:
    assert is_product(func)
    found = Product.of(func, args, kwargs)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("found", "axes"),
    [
        (product(torch.matmul, Q, K.mT), (0, 1, 3, 2)),
        (product(torch.matmul, Q, other=K.mT), (0, 1, 3, 2)),
        (product(Tensor.__rmatmul__, K.mT, Q), (0, 1, 3, 2)),
        (product(torch.bmm, Q[0], mat2=K[0].mT), (0, 2, 1)),
        (product(Tensor.baddbmm, torch.zeros(3, 5, 6), Q[0], K[0].mT, alpha=2), (0, 2, 1)),
        (product(torch.einsum, "bhqd,bhkd->bhqk", Q, K), (0, 1, 2, 3)),
        (product(torch.einsum, "bqhd,bkhd->bhqk", Q.transpose(1, 2), K.transpose(1, 2)), (0, 2, 1, 3)),
        (product(torch.einsum, "...id,...jd->...ij", (Q, K)), (0, 1, 2, 3)),
    ],
)  # fmt: skip
def test_keys_are_found_and_other_operands_taken(found: Product, axes: tuple[int, ...]) -> None:
    assert found.score_axes() == axes and found.queries() == 5
    made = found.func(*found.args, **found.kwargs)
    assert torch.equal(found.again(found.left, found.right), made)
    assert not torch.equal(found.again(found.left, found.right + 1), made)


@pytest.mark.parametrize("equation", ["bhqd,bhkd->bhkq", "bhqd,bhkd->bhqk", "bhqd,bhkd->bqkh"])
def test_scores_whose_last_axes_are_not_queries_and_keys_are_none(equation: str) -> None:
    assert (product(torch.einsum, equation, Q, K).score_axes() is not None) == equation.endswith("hqk")


def test_values_are_found() -> None:
    weights, values = torch.randn(2, 3, 5, 6, generator=generator(0)), K.transpose(1, 2)
    assert product(torch.matmul, weights, K).value_axes() == (0, 1, 2, 3)
    assert product(torch.einsum, "bhij,bjhd->bihd", weights, values).value_axes() == (0, 2, 1, 3)
    assert product(torch.einsum, "bhji,bjhd->bihd", weights.mT, values).value_axes() is None


def test_what_is_no_product_of_two_is_none() -> None:
    assert not is_product(torch.add) and not is_product(torch.nn.functional.linear)
    assert Product.of(torch.einsum, ("ij->ji", Q[0, 0]), {}) is None
    assert Product.of(torch.einsum, ("ij,jk,kl->il", *(torch.ones(2, 2),) * 3), {}) is None
