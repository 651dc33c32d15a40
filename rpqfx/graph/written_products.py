"""Which of a module's products are those of an attention that it writes out."""

from __future__ import annotations

from dataclasses import dataclass

from rpqfx.graph.operands import Operand


@dataclass(frozen=True)
class Products:
    """Which of a module's products are those of its attention.

    Args:
        scores: The number of the product of queries and keys, among the products that a call makes.
        mix: The number of the product of weights and values.
        total: How many products a call makes.
        keys: How keys lie in the first of the two.
        values: How values lie in the second.
    """

    scores: int
    mix: int
    total: int
    keys: Operand
    values: Operand


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
