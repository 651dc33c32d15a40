r"""Attention on codes: scores of keys and sums of values that are never made, at least not all at once.

A coder's way back from codes is linear (see ``rpqfx.kv.coder``), so a query takes it once instead of every key, and so
does the sum of values instead of every value. Between them stand the two functions of ``rpqfx.ops.slots``:

    q . x[t]     = scale[t] * sum over slots of table[s, code[s, t]] + q . mean
    sum p[t]x[t] = (sum over slots of bins[s] @ books[s], each in its group) @ basis + mean * sum p[t]

    table[s] = books[s] @ (basis @ q)[group of s],    bins[s, k] = sum of scale[t] p[t] where code[s, t] = k

Both are exact. Keys that were coded before their rotary embedding are made in tiles, turned and used up; so are
vectors that meet many queries, since each of them then costs less than its terms in the table.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.kv.coder import Coder, slots_of
from rpqfx.ops.slots import KERNEL_ROWS, Stream, bin_masses, heads_of, pick, tables
from rpqfx.ops.vectors import Held, rotated_scores
from rpqfx.steps import sum_dtype

Rope = tuple[Tensor, Tensor]


def scores(
    q: Tensor, coder: Coder, codes: Tensor | Stream, scale: Tensor | None = None, rope: Rope | None = None
) -> Tensor:
    """Dot products of queries with the keys of a cache.

    Args:
        q: ``[B, H, n, D]``, floating: the queries of each head of keys.
        coder: Of the keys.
        codes: ``[B, S, T]``, an integer dtype, or a ``Stream``.
        scale: ``[B, H, T]`` or None.
        rope: Where keys are coded before their rotary embedding, ``cos`` and ``sin`` of their positions, ``[T, R]`` or
            ``[B, T, R]``, of which the first half is read (the second repeats it): the first ``R <= D`` elements of a
            key are turned, ``x * cos + rotate_half(x) * sin``.

    Returns:
        ``[B, H, n, T]``, in float32 at least.

    Raises:
        InputError: If queries, codes, scale and coder do not go together.
    """
    held = _held(q, coder, codes, scale)
    q = q.to(held.books.dtype)
    if rope is not None:
        cos, sin = (part[..., : part.shape[-1] // 2].contiguous() for part in rope)
        return turned_scores(q, held, *((cos[None], sin[None]) if cos.dim() == 2 else (cos, sin)))
    return straight_scores(q, held)


def straight_scores(q: Tensor, held: Held) -> Tensor:
    """``scores`` of vectors as they are."""
    if q.shape[1] * q.shape[2] > KERNEL_ROWS * held.parts:
        y = q.new_empty(*q.shape[:3], held.codes.length)
        for start, stop in held.codes.blocks(q.shape[0] * q.shape[1] * held.length):
            torch.matmul(q, held.vectors(start, stop).transpose(-1, -2), out=y[..., start:stop])
        return y
    shift = None if held.mean is None else torch.einsum("bhnd,hd->bhn", q, held.mean)
    y = q if held.basis is None else q @ held.basis.transpose(-1, -2)
    parts = _parts(rearrange(y, "b (p h) n k -> b p (h n) k", p=held.parts), held)
    table = tables(parts, held.books, held.slots.books)
    if not held.shared:
        return pick(table, held.codes, held.slots.heads, held.scale, shift)
    found = rearrange(pick(table, held.codes, held.slots.heads), "b p (h n) t -> b (p h) n t", n=q.shape[2])
    found = found if held.scale is None else found * held.scale[:, :, None].to(found.dtype)
    return found if shift is None else found + shift[..., None]


def turned_scores(q: Tensor, held: Held, cos: Tensor, sin: Tensor) -> Tensor:
    """``scores`` of vectors that are turned first; see ``rpqfx.ops.vectors.rotated_scores``."""
    if cos.shape[1] != held.codes.length or cos.shape != sin.shape or cos.shape[0] not in (1, q.shape[0]):
        shapes = f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        raise InputError(f"{shapes} do not go with {held.codes.length} tokens of {q.shape[0]} samples")
    return rotated_scores(q, held, cos, sin)


def weighted(p: Tensor, coder: Coder, codes: Tensor | Stream, scale: Tensor | None = None) -> Tensor:
    """Sums of the values of a cache by their weights.

    Args:
        p: ``[B, H, n, T]``, floating: the weights of each head of values.
        coder: Of the values.
        codes: ``[B, S, T]``, an integer dtype, or a ``Stream``.
        scale: ``[B, H, T]`` or None.

    Returns:
        ``[B, H, n, D]``, in float32 at least.

    Raises:
        InputError: If weights, codes, scale and coder do not go together.
    """
    held = _held(p, coder, codes, scale)
    return weighted_sum(p.to(held.books.dtype), held)


def weighted_sum(p: Tensor, held: Held) -> Tensor:
    """``weighted`` of vectors that are held."""
    batch, heads, rows, _ = p.shape
    if heads * rows > KERNEL_ROWS * held.parts:
        total = p.new_zeros(batch, heads, rows, held.dim)
        for start, stop in held.codes.blocks(batch * heads * held.length):
            total += p[..., start:stop] @ held.vectors(start, stop)
        return total
    scale, d = held.scale, held.books.shape[2]
    mass = p
    if held.shared:
        mass = p if scale is None else p * scale[:, :, None].to(p.dtype)
        mass, scale = rearrange(mass, "b (p h) n t -> b p (h n) t", p=held.parts), None
    sums = bin_masses(mass, held.codes, held.slots.heads, scale).transpose(-1, -2) @ _books(held)
    y = p.new_zeros(batch, held.parts * (held.length // d), sums.shape[2], d)
    y.index_add_(1, _cells(held), sums)
    y = rearrange(y, "b (p g) (h n) d -> b (p h) n (g d)", p=held.parts, n=rows)
    y = y if held.basis is None else y @ held.basis
    return y if held.mean is None else y + p.sum(-1)[..., None] * held.mean[:, None]


def hold(coder: Coder, codes: Stream, scale: Tensor | None, dtype: torch.dtype) -> Held:
    """A coder's tensors and codes together, in the dtype that is computed in."""
    basis = None if coder.basis is None else coder.basis.to(dtype)
    mean = None if coder.mean is None else coder.mean.to(dtype)
    return Held(coder.books.to(dtype), slots_of(coder), codes, scale, basis, mean, coder.dim)


def compute_dtype(x: Tensor, coder: Coder) -> torch.dtype:
    """What attention of queries, or weights, with a coder's vectors is computed in."""
    return sum_dtype(torch.promote_types(x.dtype, coder.books.dtype))


def _held(x: Tensor, coder: Coder, codes: Tensor | Stream, scale: Tensor | None) -> Held:
    stream = codes if isinstance(codes, Stream) else Stream.of(codes, coder.entries)
    batch, slots = stream.data.shape[:2]
    if x.dim() != 4 or x.shape[:2] != (batch, coder.heads) or slots != coder.head_slots[-1]:
        raise InputError(
            f"{tuple(x.shape)} does not go with codes of {batch} samples and {slots} slots, of a coder of "
            f"{coder.heads} heads and {coder.head_slots[-1]} slots"
        )
    if scale is not None and scale.shape != (batch, coder.heads, stream.length):
        raise InputError(f"scale is {tuple(scale.shape)}, expected {(batch, coder.heads, stream.length)}")
    return hold(coder, stream, scale, compute_dtype(x, coder))


def _books(held: Held) -> Tensor:
    """``[S, K, d]``."""
    return held.books[torch.tensor(held.slots.books, dtype=torch.int64, device=held.books.device)]


def _cells(held: Held) -> Tensor:
    """``[S]``: which sub-vector of all heads' each slot belongs to."""
    groups = held.length // held.books.shape[2]
    cells = [h * groups + g for h, g in zip(heads_of(held.slots.heads), held.slots.groups, strict=True)]
    return torch.tensor(cells, dtype=torch.int64, device=held.books.device)


def _parts(q: Tensor, held: Held) -> Tensor:
    """``[B, S, n, d]``: the part of its head's queries that each slot meets."""
    batch, _, rows, _ = q.shape
    parts = q.unflatten(-1, (-1, held.books.shape[2])).transpose(2, 3).reshape(batch, -1, rows, held.books.shape[2])
    return parts[:, _cells(held)]
