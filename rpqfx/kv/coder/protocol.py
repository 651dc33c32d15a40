"""The interface of a coder, which encodes the keys or the values of one attention layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rpqfx.kv.attention.slots import Slots


class Coder(Protocol):
    r"""Codes of ``S`` slots for each token, and a linear way back for each head.

        y[b,h,t, group*d:(group+1)*d] = sum of books[slot_books[s], code[b,s,t]] over the head's slots of that group
        x[b,h,t] = scale[b,h,t] * (y[b,h,t] @ basis[h]) + mean[h]

    Since the way back is linear, attention goes through it with its queries and its results, and never with a token.

    Attributes:
        heads: ``H``, of keys and values.
        dim: ``D``, of a head.
        codebook_size: ``K``, 2 to 65,536.
        books: ``[P, K, d]``, floating.
        slot_books: ``[S]``, the codebook of each slot; slots of a head follow each other.
        slot_groups: ``[S]``, its sub-vector.
        head_slots: ``[P + 1]``, the first slot of each part, and ``S``. Parts are the heads, or as many heads that
            follow each other and share their ``y``; one may have no slot.
        basis: ``[H, D_y, D]``, or None where ``y`` is ``x``.
        mean: ``[H, D]`` or None.
    """

    @property
    def heads(self) -> int: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def codebook_size(self) -> int: ...  # noqa: D102
    @property
    def books(self) -> Tensor: ...  # noqa: D102
    @property
    def slot_books(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def slot_groups(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def head_slots(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def basis(self) -> Tensor | None: ...  # noqa: D102
    @property
    def mean(self) -> Tensor | None: ...  # noqa: D102

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the codes of vectors.

        Args:
            x: ``[B, H, T, D]``, floating.

        Returns:
            ``codes [B, S, T]``, an integer dtype, and ``scale [B, H, T]`` float16 or None.
        """
        ...


def slots_of(coder: Coder) -> Slots:
    """Returns the places of a coder's codes."""
    return Slots(coder.slot_books, coder.slot_groups, coder.head_slots)
