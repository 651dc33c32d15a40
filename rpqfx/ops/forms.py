"""Products that are linear in an input, in an output and in the codebooks.

A form is ``sum y * out(x, W(codebooks))``. Its three partial derivatives are the three methods here: ``out`` (in
``y``), ``left`` (in ``x``) and ``book`` (in the codebooks). ``rpqfx.ops.autograd`` makes them differentiable
any number of times from nothing else. Forms hold plain numbers only: tensors are always passed. Products run in the
dtype of the input, whatever the codebooks' dtype is; gradients of codebooks come as they were summed, in float32 at
least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rpqfx.codebook.tiles import from_tiles
from rpqfx.ops import library
from rpqfx.ops.plan import Plan


class Form(Protocol):
    """The derivatives of a product that ``rpqfx.ops.autograd`` runs."""

    @property
    def batched(self) -> bool:
        """Whether inputs have exactly one batch axis, the first (else: any number of leading axes)."""

    def out(
        self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        """Returns the product, with a bias added to each of its rows (or channels)."""

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        """Returns its derivative in ``x``, applied to ``y``."""

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        """Returns its derivative in the codebooks, applied to ``x`` and ``y``."""

    def grads(
        self, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns ``left`` of ``y`` and ``book``, at once."""


@dataclass(frozen=True)
class Contract:
    """``x @ W.T`` through the table of dot products."""

    books: int
    entries: int
    batched = False

    def out(
        self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        return library.contract(x, codebooks, codes, signs, bias)

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return library.contract_t(y, codebooks, codes, signs)

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return library.accumulate(x, y, codes, signs, self.books, self.entries)

    def grads(
        self, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return library.contract_grads(x, y, codebooks, codes, signs)


@dataclass(frozen=True)
class Matmul:
    """``x @ W.T`` through the matrix, dequantized for each call."""

    books: int
    entries: int
    batched = False

    def out(
        self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        return library.matmul(x, codebooks, codes, signs, bias)

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return library.matmul_t(y, codebooks, codes, signs)

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return library.matmul_book(x, y, codes, signs, self.books, self.entries)

    def grads(
        self, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        book = self.book(x, y, codes, signs)  # first: what it takes for a moment is gone before there is a result
        return self.left(y, codebooks, codes, signs), book


@dataclass(frozen=True)
class Tiled:
    """``x @ W.T`` of codes in tiles: through tables that registers hold, or through the dequantized matrix, by rows.

    Its gradients are those of ``Matmul``; the codes are read out of the tiles for them.
    """

    books: int
    entries: int
    vectors: int
    plan: Plan = "auto"
    batched = False

    def out(
        self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        return library.tiled(x, codebooks, codes, signs, bias, self.vectors, self.plan)

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return library.matmul_t(y, codebooks, from_tiles(codes, self.vectors), signs)

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        plain = from_tiles(codes, self.vectors)
        return library.matmul_book(x, y, plain, signs, self.books, self.entries)

    def grads(
        self, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        plain = from_tiles(codes, self.vectors)
        return Matmul(self.books, self.entries).grads(x, y, codebooks, plain, signs)
