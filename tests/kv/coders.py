"""A plain coder for tests: residual stages, each taking the nearest entry of every sub-vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import generator, randn, seeds


@dataclass
class PlainCoder:
    """See ``rpqfx.kv.coder.protocol.Coder``; made by ``draw_coder`` and ``plain_coder``."""

    books: Tensor
    slot_books: tuple[int, ...]
    slot_groups: tuple[int, ...]
    head_slots: tuple[int, ...]
    dim: int
    basis: Tensor | None
    mean: Tensor | None
    scaled: bool

    @property
    def heads(self) -> int:
        return len(self.head_slots) - 1

    @property
    def codebook_size(self) -> int:
        return self.books.shape[1]

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.codebook_size <= 256 else torch.int16 if self.codebook_size <= 2**15 else torch.int32

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The basis of tests is orthogonal, so that its transpose leads there."""
        batch, heads, tokens, _ = x.shape
        assert heads == self.heads
        dtype = self.books.dtype
        y = x.to(dtype) if self.mean is None else x.to(dtype) - self.mean[:, None]
        scale = y.square().mean(-1).sqrt().half() if self.scaled else None
        y = y if scale is None else y / scale[..., None].to(dtype).clamp_min(1e-6)
        y = y if self.basis is None else y @ self.basis.transpose(-1, -2)
        d = self.books.shape[2]
        rest = y.reshape(batch, heads, tokens, y.shape[-1] // d, d).clone()
        codes = torch.zeros(batch, len(self.slot_books), tokens, dtype=self.code_dtype)
        for h in range(heads):
            for s in range(self.head_slots[h], self.head_slots[h + 1]):
                book, group = self.books[self.slot_books[s]], self.slot_groups[s]
                best = (rest[:, h, :, group, None] - book).square().sum(-1).argmin(-1)
                codes[:, s] = best
                rest[:, h, :, group] -= book[best]
        return codes, scale


def decode(coder: PlainCoder, codes: Tensor, scale: Tensor | None) -> Tensor:
    """``[B, H, T, D]`` from the definition, token by token."""
    batch, _, tokens = codes.shape
    length = coder.dim if coder.basis is None else coder.basis.shape[1]
    d = coder.books.shape[2]
    x = torch.zeros(batch, coder.heads, tokens, coder.dim, dtype=coder.books.dtype)
    for b in range(batch):
        for h in range(coder.heads):
            for t in range(tokens):
                y = torch.zeros(length, dtype=x.dtype)
                for s in range(coder.head_slots[h], coder.head_slots[h + 1]):
                    g = coder.slot_groups[s]
                    y[g * d : (g + 1) * d] += coder.books[coder.slot_books[s], int(codes[b, s, t])]
                y = y if coder.basis is None else y @ coder.basis[h]
                y = y if scale is None else y * scale[b, h, t].to(y.dtype)
                x[b, h, t] = y if coder.mean is None else y + coder.mean[h]
    return x


def plain_coder(
    seed: int, slots: list[int], groups: int, d: int, entries: int, books: int = 2, basis: bool = True,
    mean: bool = True, scaled: bool = True, dtype: torch.dtype = torch.float64,
) -> PlainCoder:  # fmt: skip
    """A coder of heads that have so many slots each, of sub-vectors and codebooks by chance."""
    heads, total, dim = len(slots), sum(slots), groups * d
    g = generator(seed)
    firsts = tuple(sum(slots[:h]) for h in range(heads + 1))
    rotation = torch.linalg.qr(randn(seed + 1, heads, dim, dim)).Q.to(dtype) if basis else None
    return PlainCoder(
        randn(seed, books, entries, d, dtype=dtype),
        tuple(torch.randint(books, (total,), generator=g).tolist()),
        tuple(torch.randint(groups, (total,), generator=g).tolist()),
        firsts, dim, rotation, randn(seed + 2, heads, dim, dtype=dtype) if mean else None, scaled,
    )  # fmt: skip


@st.composite
def coders(draw: st.DrawFn, dtype: torch.dtype = torch.float64, dim: int | None = None) -> PlainCoder:
    """Heads with many slots, few or none; codes of all widths."""
    d = draw(st.sampled_from([1, 2, 4, 8]))
    groups = draw(st.integers(1, 3)) if dim is None else dim // d
    slots = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    entries = draw(st.sampled_from([2, 3, 5, 16, 200, 256, 257, 700]))
    flags = {name: draw(st.booleans()) for name in ("basis", "mean", "scaled")}
    return plain_coder(draw(seeds), slots, groups, d, entries, draw(st.integers(1, 3)), **flags, dtype=dtype)


def draw_codes(seed: int, coder: PlainCoder, batch: int, tokens: int) -> tuple[Tensor, Tensor | None]:
    """Codes and scales by chance."""
    g = generator(seed)
    codes = torch.randint(coder.codebook_size, (batch, len(coder.slot_books), tokens), generator=g).to(coder.code_dtype)
    scale = torch.rand(batch, coder.heads, tokens, generator=g).half() + 0.5 if coder.scaled else None
    return codes, scale
