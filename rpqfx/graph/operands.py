"""Finds how the keys, or the values, of an attention lie in the operand of a product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Copies = Literal["beside", "around"]


@dataclass(frozen=True)
class Operand:
    """Keys or values ``[B, H, T, D]`` as an operand has them.

    Args:
        number: ``H``.
        width: ``D``.
        heads: Into how many heads the first axis is to be split, where samples and heads are one axis (or there are no
            heads, and it is 1); None where each has its own.
        copies: How many query heads in a row share one head, each with a copy of it.
        order: Whether copies of a head stand ``"beside"`` each other, or all heads are repeated (``"around"``).
    """

    number: int
    width: int
    heads: int | None = None
    copies: int = 1
    order: Copies = "beside"

    def fits(self, shape: Sequence[int], axes: Sequence[int] | None) -> bool:
        """Returns whether an operand of a shape may hold them.

        Args:
            shape: The operand's shape.
            axes: Its axes in the order ``[..., T, D]``; None where they are in none.
        """
        if axes is None or len(shape) != (4 if self.heads is None else 3) or shape[axes[-1]] != self.width:
            return False
        if self.heads is None:
            return shape[axes[1]] == self.number * self.copies
        return shape[axes[0]] % self.heads == 0

    def vectors(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Returns the vectors of each head, ``[B, H, T, D]``.

        Args:
            x: The operand.
            axes: Its axes in the order ``[..., T, D]``.
        """
        x = x.permute(tuple(axes))
        if self.heads is not None:
            x = x.unflatten(0, (-1, self.heads))
        if self.copies == 1:
            return x
        return x[:, :: self.copies] if self.order == "beside" else x[:, : x.shape[1] // self.copies]

    def operand(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Returns the operand in which vectors lie; the inverse of ``vectors``.

        Args:
            x: ``[B, H, T, D]``.
            axes: Its axes in the order ``[..., T, D]``.
        """
        if self.copies > 1:
            beside = self.order == "beside"
            x = x.repeat_interleave(self.copies, 1) if beside else x.repeat(1, self.copies, 1, 1)
        if self.heads is not None:
            x = x.flatten(0, 1)
        back = [0] * len(axes)
        for place, axis in enumerate(axes):
            back[axis] = place
        return x.permute(back)


def operand_of(x: Tensor, axes: Sequence[int] | None, heads: int | None, copies: int) -> Operand | str:
    """Returns how keys or values lie in an operand, or why that cannot be told.

    Args:
        x: The operand.
        axes: Its axes in the order ``[..., T, D]``; None where they are in none.
        heads: How many heads its first axis was folded of, where that is known.
        copies: How often each of its numbers is there, as far as is known.
    """
    if axes is None:
        return "multiplies keys or values in an order of axes that is not known"
    if x.dim() == 3 and heads is None:
        return f"multiplies keys or values {list(x.shape)}, whose samples and heads cannot be told apart"
    if x.dim() not in (3, 4):
        return f"multiplies keys or values {list(x.shape)}, where [B, H, T, D] or [B * H, T, D] is expected"
    split = heads if x.dim() == 3 else None
    together = x.shape[axes[1]] if split is None else split
    width = x.shape[axes[-1]]
    if copies == 1:
        return Operand(together, width, split)
    if together % copies == 0:
        for order in get_args(Copies):
            found = Operand(together // copies, width, split, copies, order)
            if torch.equal(found.operand(found.vectors(x, axes), axes), x):
                return found
    return f"repeats keys or values {copies} times in an order that is not known"
