"""The vectors that a cache's codes stand for, some tokens at a time, and scores of those that are rotated first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from rpqfx.kv.attention.slots import Slots, Stream, compiled, expand
from rpqfx.ops.cpu import kernels


class Held(NamedTuple):
    """Vectors in codes: ``scale * (y @ basis) + mean``, with ``y`` as ``rpqfx.kv.attention.slots.expand`` gives it.

    Args:
        books: ``[P, K, d]``, floating.
        slots: Where the codes belong.
        codes: Of ``T`` tokens.
        scale: ``[B, H, T]`` or None.
        basis: ``[H, D_y, D]``, of the codebooks' dtype, or None. Heads that share codes are a part, of which ``slots``
            says where its codes belong; there are ``P`` parts, ``H`` where heads share none.
        mean: ``[H, D]``, of the codebooks' dtype, or None.
        dim: ``D``.
    """

    books: Tensor
    slots: Slots
    codes: Stream
    scale: Tensor | None
    basis: Tensor | None
    mean: Tensor | None
    dim: int

    @property
    def length(self) -> int:
        """``D_y``."""
        return self.dim if self.basis is None else self.basis.shape[1]

    @property
    def parts(self) -> int:
        """``P``."""
        return len(self.slots.heads) - 1

    @property
    def shared(self) -> bool:
        """Whether heads share codes."""
        return self.basis is not None and self.basis.shape[0] != self.parts

    def vectors(self, start: int, stop: int) -> Tensor:
        """Returns ``[B, H, stop - start, D]`` of the codebooks' dtype."""
        x = expand(self.books, self.slots, self.codes, start, stop, self.length)
        if self.basis is not None:
            wide = rearrange(self.basis, "(p h) k d -> p k (h d)", p=self.parts)
            x = rearrange(x @ wide, "b p t (h d) -> b (p h) t d", d=self.dim)
        x = x if self.scale is None else x * self.scale[:, :, start:stop, None].to(x.dtype)
        return x if self.mean is None else x + self.mean[:, None]


def rotated_scores(q: Tensor, held: Held, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns products of queries with vectors that a rotary embedding has rotated.

    Args:
        q: ``[B, H, n, D]``, of the codebooks' dtype.
        held: The vectors.
        cos: ``[B or 1, T, R / 2]``, see ``rotate``.
        sin: The same.

    Returns:
        ``[B, H, n, T]`` of the queries' dtype.
    """
    codes, slots = held.codes, held.slots
    in_order = cos.dtype in (torch.float32, torch.float16, torch.bfloat16) and cos.stride() == sin.stride()
    in_order = in_order and not held.shared and cos.stride()[1:] == (cos.shape[2], 1) and held.books.dtype is q.dtype
    if in_order and compiled(q, codes, held.scale, q.shape[2]):
        layout = (list(slots.books), list(slots.groups), list(slots.heads))
        packed = (codes.data, codes.width, codes.length)
        return kernels.rotated_scores(q, held.books, *layout, *packed, held.scale, held.basis, held.mean, cos, sin)
    y = q.new_empty(*q.shape[:3], codes.length)
    for start, stop in codes.blocks(q.shape[0] * q.shape[1] * held.length):
        keys = rotate(held.vectors(start, stop), cos[:, start:stop], sin[:, start:stop])
        y[..., start:stop] = q @ keys.transpose(-1, -2)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies a rotary embedding whose pairs lie half its width apart (Su et al., "RoFormer", 2021).

    Args:
        x: ``[B, H, T, D]``.
        cos: ``[B or 1, T, R / 2]``, of the first ``R <= D`` elements; the others stay.
        sin: The same.

    Returns:
        ``[B, H, T, D]``.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)
