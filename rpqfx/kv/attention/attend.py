r"""Attention on codes: scores of keys and sums of values that are never made, at least not all at once.

A coder's way back from codes is linear (see ``rpqfx.kv.coder.protocol``), so a query takes it once instead of every
key, and so does the sum of values instead of every value. Between them stand the two functions of
``rpqfx.kv.attention.slots``:

    q . x[t]     = scale[t] * sum over slots of table[s, code[s, t]] + q . mean
    sum p[t]x[t] = (sum over slots of bins[s] @ books[s], each in its group) @ basis + mean * sum p[t]

    table[s] = books[s] @ (basis @ q)[group of s],    bins[s, k] = sum of scale[t] p[t] where code[s, t] = k

Both are exact. Keys that were coded before their rotary embedding are made in tiles, rotated and used up; so are
vectors that are multiplied with many queries, since each of them then costs less than its terms in the table.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from rpqfx.codebook.steps import sum_dtype
from rpqfx.errors import InputError
from rpqfx.kv.attention.slots import KERNEL_ROWS, Stream, bin_masses, compiled, heads_of, pick, sums, tables
from rpqfx.kv.attention.vectors import Held, rotated_scores
from rpqfx.kv.coder.protocol import Coder, slots_of

Rope = tuple[Tensor, Tensor]
# Rows up to which tables and bins, made for ``KERNEL_ROWS`` at a time, beat tiles of vectors (measured, CPU: 32,768
# tokens of three heads, 16 slots each of 256 entries; with torch's own operators, bins lose much sooner).
TABLE_ROWS = 128
PLAIN_BIN_ROWS = 4


def scores(
    q: Tensor, coder: Coder, codes: Tensor | Stream, scale: Tensor | None = None, rope: Rope | None = None
) -> Tensor:
    """Returns dot products of queries with the keys of a cache.

    Args:
        q: ``[B, H, n, D]``, floating: the queries of each head of keys.
        coder: Of the keys.
        codes: ``[B, S, T]``, an integer dtype, or a ``Stream``.
        scale: ``[B, H, T]`` or None.
        rope: Where keys are coded before their rotary embedding, ``cos`` and ``sin`` of their positions, ``[T, R]`` or
            ``[B, T, R]``, of which the first half is read (the second repeats it): the first ``R <= D`` elements of a
            key are rotated, ``x * cos + rotate_half(x) * sin``.

    Returns:
        ``[B, H, n, T]``, in float32 at least.

    Raises:
        InputError: If queries, codes, scale and coder do not go together.
    """
    held = _held(q, coder, codes, scale)
    q = q.to(held.books.dtype)
    if rope is not None:
        cos, sin = (part[..., : part.shape[-1] // 2].contiguous() for part in rope)
        return scores_of_rotated(q, held, *((cos[None], sin[None]) if cos.dim() == 2 else (cos, sin)))
    return straight_scores(q, held)


def straight_scores(q: Tensor, held: Held, out: Tensor | None = None) -> Tensor:
    """Returns ``scores`` of vectors as they are, in ``out [B, H, n, T]`` if that is given."""
    batch, heads, rows, _ = q.shape
    queries = rows * (heads // held.parts)  # rows that are multiplied with a part's codes
    if queries > KERNEL_ROWS:
        y = q.new_empty(*q.shape[:3], held.codes.length) if out is None else out
        step = KERNEL_ROWS // (heads // held.parts)
        if step and queries <= TABLE_ROWS and compiled(q, held.codes, held.scale, KERNEL_ROWS):
            for start in range(0, rows, step):
                some = slice(start, start + step)
                straight_scores(q[:, :, some], held, y[:, :, some])
            return y
        for start, stop in held.codes.blocks(batch * heads * held.length):
            y[..., start:stop] = q @ held.vectors(start, stop).transpose(-1, -2)
        return y
    shift = None if held.mean is None else torch.einsum("bhnd,hd->bhn", q, held.mean)
    y = q if held.basis is None else q @ held.basis.transpose(-1, -2)
    parts = _parts(rearrange(y, "b (p h) n k -> b p (h n) k", p=held.parts), held)
    table = tables(parts, held.books, held.slots.books)
    if not held.shared:
        return pick(table, held.codes, held.slots.heads, held.scale, shift, out)
    found = rearrange(pick(table, held.codes, held.slots.heads), "b p (h n) t -> b (p h) n t", n=rows)
    found = found if held.scale is None else found * held.scale[:, :, None].to(found.dtype)
    found = found if shift is None else found + shift[..., None]
    return found if out is None else out.copy_(found)


def scores_of_rotated(q: Tensor, held: Held, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns ``scores`` of vectors that are rotated first; see ``rpqfx.kv.attention.vectors.rotated_scores``."""
    if cos.shape[1] != held.codes.length or cos.shape != sin.shape or cos.shape[0] not in (1, q.shape[0]):
        shapes = f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        raise InputError(f"{shapes} do not go with {held.codes.length} tokens of {q.shape[0]} samples")
    return rotated_scores(q, held, cos, sin)


def weighted(p: Tensor, coder: Coder, codes: Tensor | Stream, scale: Tensor | None = None) -> Tensor:
    """Returns sums of the values of a cache by their weights.

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
    """Returns ``weighted`` of ``Held`` vectors."""
    batch, heads, rows, _ = p.shape
    share = heads // held.parts
    by_kernel = compiled(p, held.codes, held.scale, KERNEL_ROWS) and share <= KERNEL_ROWS
    if by_kernel and KERNEL_ROWS < rows * share <= TABLE_ROWS:
        return torch.cat([weighted_sum(some, held) for some in p.split(KERNEL_ROWS // share, 2)], 2)
    if rows * share > (KERNEL_ROWS if by_kernel else PLAIN_BIN_ROWS):
        total = p.new_zeros(batch, heads, rows, held.dim)
        for start, stop in held.codes.blocks(batch * heads * held.length):
            total += p[..., start:stop] @ held.vectors(start, stop)
        return total
    scale, d, mass = held.scale, held.books.shape[2], p
    if held.shared:
        mass = p if scale is None else p * scale[:, :, None].to(p.dtype)
        mass, scale = rearrange(mass, "b (p h) n t -> b p (h n) t", p=held.parts), None
    bins = bin_masses(mass, held.codes, held.slots.heads, scale)
    y = p.new_zeros(batch, held.parts * (held.length // d), rows * share, d)
    y.index_add_(1, _cells(held), sums(bins, held.books, held.slots.books))
    y = rearrange(y, "b (p g) (h n) d -> b (p h) n (g d)", p=held.parts, n=rows)
    y = y if held.basis is None else y @ held.basis
    return y if held.mean is None else y + p.sum(-1)[..., None] * held.mean[:, None]


def hold(coder: Coder, codes: Stream, scale: Tensor | None, dtype: torch.dtype) -> Held:
    """Returns a coder's tensors and codes together, in the dtype of the computation."""
    basis, mean = coder.basis, coder.mean  # each read computes it
    basis, mean = (None if x is None else x.to(dtype) for x in (basis, mean))
    return Held(coder.books.to(dtype), slots_of(coder), codes, scale, basis, mean, coder.dim)


def compute_dtype(x: Tensor, coder: Coder) -> torch.dtype:
    """Returns the dtype in which attention of queries, or weights, with a coder's vectors is computed."""
    return sum_dtype(torch.promote_types(x.dtype, coder.books.dtype))


def _held(x: Tensor, coder: Coder, codes: Tensor | Stream, scale: Tensor | None) -> Held:
    stream = codes if isinstance(codes, Stream) else Stream.of(codes, coder.codebook_size)
    batch, slots = stream.data.shape[:2]
    if x.dim() != 4 or x.shape[:2] != (batch, coder.heads) or slots != coder.head_slots[-1]:
        raise InputError(
            f"{tuple(x.shape)} does not go with codes of {batch} samples and {slots} slots, of a coder of "
            f"{coder.heads} heads and {coder.head_slots[-1]} slots"
        )
    if scale is not None and scale.shape != (batch, coder.heads, stream.length):
        raise InputError(f"scale is {tuple(scale.shape)}, expected {(batch, coder.heads, stream.length)}")
    return hold(coder, stream, scale, compute_dtype(x, coder))


def _cells(held: Held) -> Tensor:
    """Returns ``[S]``: which sub-vector of all heads' each slot belongs to."""
    groups = held.length // held.books.shape[2]
    cells = [h * groups + g for h, g in zip(heads_of(held.slots.heads), held.slots.groups, strict=True)]
    return torch.tensor(cells, dtype=torch.int64, device=held.books.device)


def _parts(q: Tensor, held: Held) -> Tensor:
    """Returns ``[B, S, n, d]``: the part of its head's queries that each slot is multiplied with."""
    batch, _, rows, _ = q.shape
    parts = q.unflatten(-1, (-1, held.books.shape[2])).transpose(2, 3).reshape(batch, -1, rows, held.books.shape[2])
    return parts[:, _cells(held)]
