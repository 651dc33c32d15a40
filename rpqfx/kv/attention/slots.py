r"""Sums over the slots of a cache: codes of tokens, packed along them, and what heads make of them.

A cache has ``H`` heads and ``S`` slots; a head's slots follow each other, and there may be more of them, fewer or none.
A token has a code for each slot, an index into the slot's codebook, whose entries belong to one of the head's
sub-vectors (a group). Axes besides: ``b`` of the batch, ``t`` of the tokens, ``n`` rows of a head (its queries).

    pick:           y[b,h,n,t] = scale[b,h,t] * sum of table[b,s,code[b,s,t],n] over the slots s of h, + shift[b,h,n]
    bin_masses:     bins[b,s,k,n] = sum of scale[b,h,t] * p[b,h,n,t] over the tokens t with code[b,s,t] = k
    expand:         y[b,h,t, group of s] = sum of books[book of s, code[b,s,t]] over the slots s of h
    rotated_scores: the keys that ``expand`` gives, rotated by a rotary embedding, times queries

The first two are adjoint to each other. All run in blocks of tokens, so that nothing of the cache's size is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx.codebook.packing import code_bits, pack_codes
from rpqfx.errors import InputError
from rpqfx.ops.cpu import build, kernels

# Rows of a head that the compiled kernels take.
KERNEL_ROWS = 16
# Elements that are alive at a time where torch's own operators run.
BLOCK_ELEMENTS = 2**20
# Tokens whose codes fill whole bytes at every width.
UNIT = 8


class Slots(NamedTuple):
    """The places of the codes of a cache.

    Args:
        books: ``[S]``, the codebook of each slot.
        groups: ``[S]``, the sub-vector of its head that it is a part of.
        heads: ``[H + 1]``, the first slot of each head, and their number.
    """

    books: tuple[int, ...]
    groups: tuple[int, ...]
    heads: tuple[int, ...]


class Stream(NamedTuple):
    """The codes of a cache.

    Args:
        data: ``[B, S, bytes]`` uint8, at least as many bytes as the tokens take; see ``rpqfx.codebook.packing``.
        width: Bits of a code, 1 to 16.
        entries: ``K``, above every code.
        length: ``T``, tokens.
    """

    data: Tensor
    width: int
    entries: int
    length: int

    @staticmethod
    def of(codes: Tensor, entries: int) -> Stream:
        """Returns codes ``[B, S, T]`` of any integer dtype: uint8 as it lies, others packed."""
        if codes.dtype is torch.uint8 and codes.stride(-1) == 1:
            return Stream(codes, 8, entries, codes.shape[-1])
        return Stream(packed(codes, entries), code_bits(entries), entries, codes.shape[-1])

    def block(self, start: int, stop: int) -> Tensor:
        """Returns ``[B, S, stop - start]`` int32 (bytes as they lie)."""
        if self.width == 8:
            return self.data[:, :, start:stop]
        bits = torch.arange(start, stop, device=self.data.device) * self.width
        return bits_at(self.data, bits, self.width)

    def blocks(self, per_token: int) -> Iterator[tuple[int, int]]:
        """Yields ranges of tokens that make so many elements each, few enough at a time."""
        size = max(UNIT, BLOCK_ELEMENTS // max(1, per_token) // UNIT * UNIT)
        for start in range(0, self.length, size):
            yield start, min(start + size, self.length)


def bits_at(data: Tensor, bits: Tensor, width: int) -> Tensor:
    """Returns codes that begin at some bits.

    Args:
        data: ``[B, S, bytes]`` uint8.
        bits: ``[T]`` int64.
        width: Bits of a code, up to 16: it lies in three bytes at most.

    Returns:
        ``[B, S, T]`` int32.
    """
    words = [data[:, :, (bits // 8 + i).clamp(max=data.shape[2] - 1)].to(torch.int32) << 8 * i for i in range(3)]
    return (words[0] | words[1] | words[2]) >> (bits % 8).to(torch.int32) & 2**width - 1


def packed(codes: Tensor, entries: int) -> Tensor:
    """Returns codes at their true width, slot by slot.

    Args:
        codes: ``[B, S, T]``, an integer dtype.
        entries: ``K``.

    Returns:
        ``[B, S, ceil(T / 8) * bits]`` uint8.
    """
    padded = F.pad(codes.to(torch.int32), (0, -codes.shape[-1] % UNIT))
    size = padded.shape[-1] // UNIT * code_bits(entries)
    return pack_codes(padded, entries).view(*codes.shape[:2], size)


def tables(parts: Tensor, books: Tensor, which: Sequence[int]) -> Tensor:
    """Returns dot products of queries with the entries of each slot.

    Args:
        parts: ``[B, S, n, d]``, floating.
        books: ``[P, K, d]``, of the same dtype.
        which: ``[S]``, the codebook of each slot.

    Returns:
        ``[B, S, K, n]``, a view into wider lines where compiled kernels made them.
    """
    if parts.dtype is books.dtype and _compiled((parts, books), parts.shape[2]):
        return kernels.slot_tables(parts, books, list(which))[..., : parts.shape[2]]
    return books[torch.tensor(which, dtype=torch.int64, device=books.device)] @ parts.transpose(-1, -2)


def pick(
    table: Tensor, codes: Stream, heads: Sequence[int], scale: Tensor | None = None, shift: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Picks a line of the table for every token and slot, and sums over the slots of a head.

    Args:
        table: ``[B, S, K, n]``, floating, see ``tables``.
        codes: Of ``S`` slots.
        heads: ``[H + 1]``, first slots.
        scale: ``[B, H, T]`` or None.
        shift: ``[B, H, n]`` or None.
        out: Where the result goes, or None.

    Returns:
        ``[B, H, n, T]`` of the table's dtype.
    """
    rows = table.shape[-1]
    y = table.new_empty(codes.data.shape[0], len(heads) - 1, rows, codes.length) if out is None else out
    if compiled(table, codes, scale, rows):
        kernels.pick_sum(_lines(table), codes.data, codes.width, scale, shift, list(heads), y)
        return y
    batch, slots, entries, _ = table.shape
    first = torch.arange(batch * slots, device=table.device).view(batch, slots) * entries
    for start, stop in codes.blocks(batch * slots * rows):
        picked = _bags(table.reshape(-1, rows), codes.block(start, stop), first, heads)
        y[..., start:stop] = picked.permute(0, 2, 3, 1)
    if scale is not None:
        y *= scale[:, :, None].to(y.dtype)
    return y if shift is None else y.add_(shift[..., None])


def bin_masses(p: Tensor, codes: Stream, heads: Sequence[int], scale: Tensor | None = None) -> Tensor:
    """Sums the masses of tokens that have a code: the adjoint of ``pick``.

    Args:
        p: ``[B, H, n, T]``, floating.
        codes: Of ``S`` slots.
        heads: ``[H + 1]``, first slots.
        scale: ``[B, H, T]`` or None.

    Returns:
        ``[B, S, K, n]`` of ``p``'s dtype.
    """
    batch, _, rows, _ = p.shape
    slots, entries = heads[-1], codes.entries
    if compiled(p, codes, scale, rows):
        p = p if p.stride(-1) == 1 else p.contiguous()
        return kernels.bin_masses(p, codes.data, codes.width, scale, list(heads), entries)[..., :rows]
    bins = p.new_zeros(batch * slots * entries, rows)
    first = torch.arange(batch * slots, device=p.device).view(batch, slots, 1) * entries
    head_of = torch.tensor(heads_of(heads), dtype=torch.int64, device=p.device)
    for start, stop in codes.blocks(batch * slots * rows):
        some = p[..., start:stop]
        some = some if scale is None else some * scale[:, :, None, start:stop].to(p.dtype)
        index = codes.block(start, stop) + first
        bins.index_add_(0, index.view(-1), some.index_select(1, head_of).transpose(2, 3).reshape(-1, rows))
    return bins.view(batch, slots, entries, rows)


def sums(bins: Tensor, books: Tensor, which: Sequence[int]) -> Tensor:
    """Returns sums of the entries of each slot, by their bins: the adjoint of ``tables``.

    Args:
        bins: ``[B, S, K, n]``, floating, see ``bin_masses``.
        books: ``[P, K, d]``, of the same dtype.
        which: ``[S]``, the codebook of each slot.

    Returns:
        ``[B, S, n, d]``.
    """
    if bins.dtype is books.dtype and _compiled((bins, books), bins.shape[3]):
        return kernels.slot_sums(_lines(bins), bins.shape[3], books, list(which))
    return bins.transpose(-1, -2) @ books[torch.tensor(which, dtype=torch.int64, device=books.device)]


def expand(books: Tensor, slots: Slots, codes: Stream, start: int, stop: int, length: int) -> Tensor:
    """Returns the vectors of some tokens.

    Args:
        books: ``[P, K, d]``, floating.
        slots: Where the codes belong.
        codes: Of ``S`` slots.
        start: The first token.
        stop: The one after the last.
        length: Of a vector, a multiple of ``d``.

    Returns:
        ``[B, H, stop - start, length]`` of the codebooks' dtype.
    """
    _, entries, d = books.shape
    groups, bags = length // d, (len(slots.heads) - 1) * (length // d)
    bag_of = [head * groups + group for head, group in zip(heads_of(slots.heads), slots.groups, strict=True)]
    order = sorted(range(len(bag_of)), key=bag_of.__getitem__)
    firsts = [0] * (bags + 1)
    for bag in bag_of:
        firsts[bag + 1] += 1
    for bag in range(bags):
        firsts[bag + 1] += firsts[bag]
    some = codes.block(start, stop)[:, torch.tensor(order, dtype=torch.int64, device=books.device)]
    first = torch.tensor([slots.books[slot] * entries for slot in order], dtype=torch.int64, device=books.device)
    y = _bags(books.reshape(-1, d), some, first.expand(some.shape[0], -1), firsts)
    return y.view(*y.shape[:2], len(slots.heads) - 1, length).transpose(1, 2)


def compiled(x: Tensor, codes: Stream, scale: Tensor | None, rows: int) -> bool:
    """Returns whether compiled kernels take it: few rows of float32 on a CPU, scales of float16 that lie in order."""
    if scale is not None and (scale.dtype is not torch.float16 or scale.stride(-1) != 1):
        return False
    return _compiled((x, codes.data) if scale is None else (x, codes.data, scale), rows)


def heads_of(heads: Sequence[int]) -> list[int]:
    """Returns ``[S]``, the head of each slot."""
    return [head for head in range(len(heads) - 1) for _ in range(heads[head], heads[head + 1])]


def check(slots: Slots, books: Tensor, length: int, name: str) -> None:
    """Raises InputError, with a name in it, if slots are not of these codebooks and of vectors of a length."""
    number, entries, d = books.shape
    if length % d:
        raise InputError(f"{name}: vectors of {length} are not cut into sub-vectors of {d}")
    code_bits(entries)
    fit = len(slots.books) == len(slots.groups) == slots.heads[-1] and slots.heads[0] == 0
    fit = fit and list(slots.heads) == sorted(slots.heads)
    if not fit:
        raise InputError(f"{name}: {len(slots.books)} slots do not go with the first slots of heads {slots.heads}")
    if any(not 0 <= book < number for book in slots.books) or any(not 0 <= g < length // d for g in slots.groups):
        raise InputError(f"{name}: a slot is of a codebook or a sub-vector that is not there")


def _compiled(tensors: Sequence[Tensor], rows: int) -> bool:
    if tensors[0].dtype is not torch.float32 or not 1 <= rows <= KERNEL_ROWS or torch.compiler.is_compiling():
        return False
    plain = all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in tensors)
    return plain and build.ready()


def _lines(table: Tensor) -> Tensor:
    """Returns a table in lines as wide as the kernels take: what ``tables`` made already lies so."""
    rows = table.shape[-1]
    wide = 4 if rows <= 4 else 8 if rows <= 8 else 16
    shape = (*table.shape[:-1], wide)
    strides = torch.empty(shape, device="meta").stride()
    if table.stride() == strides and table.untyped_storage().nbytes() == math.prod(shape) * table.element_size():
        return table.as_strided(shape, strides)
    return F.pad(table, (0, wide - rows))


def _bags(lines: Tensor, codes: Tensor, first: Tensor, bounds: Sequence[int]) -> Tensor:
    """Sums ``lines[first[b,s] + codes[b,s,t]]`` over the slots between two bounds: ``[B, T, bags, width]``."""
    batch, slots, tokens = codes.shape
    if not slots:
        return lines.new_zeros(batch, tokens, len(bounds) - 1, lines.shape[1])
    index = (codes + first[..., None]).transpose(1, 2).reshape(-1)
    starts = torch.tensor(bounds[:-1], device=codes.device)
    offsets = (torch.arange(batch * tokens, device=codes.device)[:, None] * slots + starts).view(-1)
    sums = F.embedding_bag(index, lines, offsets, mode="sum")
    return sums.view(batch, tokens, len(bounds) - 1, lines.shape[1])
