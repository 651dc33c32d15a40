"""Claims on how keys and values lie in operands."""

from __future__ import annotations

from typing import get_args

import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.graph.operands import Copies, Operand, operand_of
from tests.helpers import generator


@given(
    seed=st.integers(0, 999), axes=st.permutations(range(4)), heads=st.integers(1, 3), copies=st.integers(1, 3),
    order=st.sampled_from(get_args(Copies)), folded=st.booleans(),
)  # fmt: skip
def test_vectors_are_found_in_the_operand_that_is_made_of_them(
    seed: int, axes: list[int], heads: int, copies: int, order: Copies, folded: bool
) -> None:
    x = torch.randn(2, heads, 5, 4, generator=generator(seed))
    axes = sorted(axes[:3], key=axes.index) if folded else axes
    axes = [sorted(axes).index(axis) for axis in axes]
    how = Operand(heads, 4, heads * copies if folded else None, copies, order)
    operand = how.operand(x, axes)
    assert operand.dim() == (3 if folded else 4)
    assert how.fits(operand.shape, axes) and torch.equal(how.vectors(operand, axes), x)
    found = operand_of(operand, axes, how.heads, copies)
    assert isinstance(found, Operand) and torch.equal(found.operand(x, axes), operand)


def test_what_cannot_be_told_is_said() -> None:
    x = torch.randn(4, 3, 2, generator=generator(0))
    assert "told apart" in str(operand_of(x, (0, 1, 2), None, 1))
    assert "order of axes" in str(operand_of(x, None, 1, 1))
    assert "repeats keys" in str(operand_of(x, (0, 1, 2), 2, 2))
    assert "is expected" in str(operand_of(x[None, None], (0, 1, 2, 3, 4), None, 1))
