"""Which of a module's products are those of an attention that it writes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rpqfx.graph.operands import Operand
from rpqfx.graph.products import Product


@dataclass(frozen=True)
class Products:
    """Which of a module's products are those of its attention.

    Args:
        scores: The number of the product of queries and keys, among the products of a call whose right operand may hold
            the keys or the values. Others, such as those that layers with weights make, do not count.
        mix: The number of the product of weights and values.
        total: How many of these products a call makes.
        keys: How keys lie in the first of the two.
        values: How values lie in the second.
    """

    scores: int
    mix: int
    total: int
    keys: Operand
    values: Operand

    def count(self, product: Product) -> bool:
        """Returns whether a product is one of those that are counted.

        Args:
            product: The product.
        """
        return counts(self.keys, self.values, Shape.of(product))


class Shape(NamedTuple):
    """The facts known of a product without its operands.

    Args:
        right: The shape of the right operand.
        score_axes: See ``Product.score_axes``.
        value_axes: See ``Product.value_axes``.
    """

    right: tuple[int, ...]
    score_axes: tuple[int, ...] | None
    value_axes: tuple[int, ...] | None

    @classmethod
    def of(cls, product: Product) -> Shape:
        """Returns that of a product.

        Args:
            product: The product.
        """
        return cls(tuple(product.right.shape), product.score_axes(), product.value_axes())


def counts(keys: Operand, values: Operand, shape: Shape) -> bool:
    """Returns whether a product may be one of an attention's two.

    Args:
        keys: How keys lie in their operand.
        values: How values lie.
        shape: The product's shape.
    """
    return keys.fits(shape.right, shape.score_axes) or values.fits(shape.right, shape.value_axes)


@dataclass(frozen=True)
class Written:
    """Attention in a module's own code.

    Args:
        products: Which products are its; None where ``obstacle`` says why that cannot be told.
        obstacle: What the module does that is not known here.
        causal: Whether no token sees later ones.
    """

    products: Products | None
    obstacle: str | None = None
    causal: bool = True
