"""Codes that follow a gradient: a dense matrix behind each weight, and the entries nearest to it."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from rpqfx.codebook.signs import unpack_signs
from rpqfx.nn.weight import RPQWeight
from rpqfx.ops.search import beam_search, nearest

_BEAM = 4
# Distances between entries that are alive at a time.
_BLOCK_ELEMENTS = 2**22


class Latent:
    """The latent dense matrix of a weight, in the scale of its codebooks, whose gradients choose codes.

    It takes the gradient that its quantised value gets, as if rounding were not there (Bengio, Leonard and Courville,
    "Estimating or Propagating Gradients Through Stochastic Neurons", 1308.3432), and after some steps its sub-vectors
    are coded anew. It starts at the quantised values themselves, since nothing else is known to have their codes:
    conversions choose codes that make up for one another's errors. So a code changes only where gradients have pushed
    its sub-vector over to another entry, a few a step, as PV-Tuning (Malinovskii et al., 2405.14852) asks for.

    Args:
        weight: The weight whose codes follow. With several stages and signs codes stay as they are.
    """

    def __init__(self, weight: RPQWeight) -> None:
        self._weight = weight
        self._signs = None
        if weight.signs is not None:
            self._signs = 1.0 - 2.0 * rearrange(unpack_signs(weight.signs, weight.spec.num_vectors)[0], "m n -> n m 1")
        self.values = self._entries().requires_grad_()
        self.values.grad = torch.zeros_like(self.values)

    @staticmethod
    def fits(weight: RPQWeight) -> bool:
        """Returns whether the codes of a weight can follow."""
        return weight.spec.stages == 1 or weight.signs is None

    @torch.no_grad()
    def push(self, grad: Tensor) -> None:
        """Sets the gradient from that of the decoded vectors, ``[N, D]``."""
        weight, dims = self._weight, self._weight_dims()
        grad = grad if weight.scale is None else grad * weight.scale[:, None]
        grad = grad if dims is None else grad * dims
        cut = grad.reshape(self.values.shape).to(self.values.dtype)
        self.values.grad = cut if self._signs is None else cut * self._signs

    @torch.no_grad()
    def recode(self, apart: dict[tuple[int, int], Tensor]) -> int:
        """Gives each sub-vector the nearest entry (with several stages: nearer ones, by beam search).

        Args:
            apart: How far the entries of each codebook are from their nearest others, once for all that share it;
                empty at first.

        Returns:
            How many sub-vectors' codes have changed.
        """
        books, codes = self._weight.codebooks.detach(), self._weight.codes.long()
        moved = (self.values - self._entries()).square().sum(-1)
        changed = 0
        share = codes.shape[1] // books.shape[1]
        for g in range(books.shape[1]):
            block = slice(g * share, (g + 1) * share)
            old = rearrange(codes[:, block], "r m n -> (n m) r").clone()
            far = moved[:, block].flatten() > self._reach(g, old, apart)
            where = far.nonzero().flatten()
            if not len(where):
                continue
            points = self.values.detach()[:, block].reshape(-1, books.shape[3])[where]
            new, distances = self._search(points, books[:, g])
            nearer = distances < moved[:, block].flatten()[where]
            better = (new != old[where]).any(1) & nearer
            old[where[better]] = new[better]
            codes[:, block] = rearrange(old, "(n m) r -> r m n", m=share)
            changed += int(better.sum())
        self._weight.codes = codes.to(self._weight.codes.dtype)
        return changed

    def _search(self, points: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
        if len(books) == 1:
            new, distances = nearest(points.contiguous(), books[0].contiguous())
            return new[:, None], distances
        return beam_search(points.contiguous(), books.contiguous(), _BEAM)

    def _reach(self, g: int, codes: Tensor, apart: dict[tuple[int, int], Tensor]) -> Tensor:
        """Returns squared distances within which no other entry can be nearer; with several stages none is known."""
        books = self._weight.codebooks
        if len(books) > 1:
            return torch.zeros(len(codes), device=books.device)
        key = (id(books), g)
        if key not in apart:
            apart[key] = _gaps(books.detach()[0, g])
        return (apart[key] / 2).square()[codes[:, 0]]

    def _entries(self) -> Tensor:
        """Returns the entries that the codes stand for, without signs and factors, ``[N, M, d]``."""
        books, codes = self._weight.codebooks.detach(), self._weight.codes.long()
        book = torch.arange(codes.shape[1], device=codes.device) // (codes.shape[1] // books.shape[1])
        stages = [stage[book[:, None], code] for stage, code in zip(books, codes, strict=True)]
        return rearrange(sum(stages[1:], stages[0]), "m n d -> n m d").contiguous()

    def _weight_dims(self) -> Tensor | None:
        scale, share = self._weight.column_scale, self._weight.spec.column_scale_group
        return None if scale is None else scale.detach().repeat_interleave(share)


def _gaps(book: Tensor) -> Tensor:
    """Returns the distance of each entry ``[K, d]`` to the nearest other one."""
    gaps = torch.empty(len(book), device=book.device, dtype=book.dtype)
    step = max(1, _BLOCK_ELEMENTS // len(book))
    for start in range(0, len(book), step):
        distances = torch.cdist(book[start : start + step], book)
        distances.diagonal(start).fill_(torch.inf)
        gaps[start : start + step] = distances.min(1).values
    return gaps
