"""Codes of points: the nearest centre, and sums of entries by beam search.

By compiled kernels for float32 on a CPU, by Triton for greedy search on a GPU, else by torch's own operators in blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx.ops.cpu import build, kernels
from rpqfx.ops.cuda import kernels as cuda

# Distances that are alive at a time: few enough to stay in cache.
_BLOCK_ELEMENTS = 2**20
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# An odd number without a pattern: 2**64 divided by the golden ratio, as an int64 (Knuth, "Sorting and Searching", 6.4).
_MIX = 0x9E3779B97F4A7C15 - 2**64


@torch.no_grad()
def nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the nearest centre of each point, of centres that are equal the first.

    Which is nearest is found by ``|c|^2 - 2 x.c`` relative to the centres' mean, so centres that differ, and whose
    distances differ by less than rounding, may take each other's place; the distance itself is that of the centre
    found. A point that is not finite gets some code in range, and so does every point where a centre is not finite.

    Args:
        points: ``[N, d]``, floating.
        centres: ``[K, d]`` of the same dtype and device, ``K >= 1``.

    Returns:
        ``codes [N]`` int64 and squared ``distances [N]``.
    """
    if compiled(points, centres):
        return kernels.nearest(points, centres)
    if len(centres) == 1:
        return points.new_zeros(len(points), dtype=torch.int64), (points - centres).square().sum(1)
    codes, distances, first = [], [], firsts(centres)
    for block in points.split(max(1, _BLOCK_ELEMENTS // len(centres))):
        code = first[_scores(block, centres).argmin(1)]
        codes.append(code)
        distances.append((block - centres[code]).square().sum(1))
    return torch.cat(codes), torch.cat(distances)


@torch.no_grad()
def beam_search(points: Tensor, books: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Returns codes whose entries add up to nearly the points (Babenko and Lempitsky, "Additive Quantization", 2014).

    Stage after stage, the ``beam`` best sums so far are tried with every entry of the stage. A beam of 1 is greedy.
    A wider one is nearly always nearer, but no bound says so for each point. Of entries that are equal the first is
    taken, and what is not finite gets some codes in range.

    Args:
        points: ``[N, d]``, floating.
        books: ``[R, K, d]`` of the same dtype and device, ``R >= 1`` and ``K >= 1``.
        beam: Sums that go on to the next stage, at least 1.

    Returns:
        ``codes [N, R]`` int64 and squared ``distances [N]``.
    """
    if beam == 1 or len(books) == 1:
        return _greedy(points, books, cosine=False)
    if compiled(points, books):
        return kernels.beam_search(points, books, beam)
    found = [_beam(block, books, beam) for block in points.split(max(1, _BLOCK_ELEMENTS // (beam * books.shape[1])))]
    return torch.cat([codes for codes, _ in found]), torch.cat([distances for _, distances in found])


@torch.no_grad()
def cosine_search(points: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes of entries that point where what is left of the points does, stage after stage.

    A stage chooses the entry of the largest cosine with what the stages before leave, the first of several; the entry
    itself, whatever its length, is what it takes off. What is zero has the cosine zero.

    Args:
        points: ``[N, d]``, floating.
        books: ``[R, K, d]`` of the same dtype and device, ``R >= 1`` and ``K >= 1``.

    Returns:
        ``codes [N, R]`` int64 and squared ``distances [N]``.
    """
    return _greedy(points, books, cosine=True)


def residual_search(points: Tensor, books: Tensor, *, beam: int = 1, cosine: bool = False) -> tuple[Tensor, Tensor]:
    """Returns ``beam_search``, or ``cosine_search``, which has no beam, as one step of compiled graphs.

    Args:
        points: ``[N, d]``, floating.
        books: ``[R, K, d]`` of the same dtype and device, ``R >= 1`` and ``K >= 1``.
        beam: Sums that go on to the next stage, at least 1.
        cosine: Whether entries are chosen by direction.

    Returns:
        ``codes [N, R]`` int64 and squared ``distances [N]``.
    """
    if torch.compiler.is_dynamo_compiling():  # which would unroll the blocks, and could not run kernels
        return _OPERATOR(points, books, beam, cosine)
    return _search(points, books, beam, cosine)


def _search(points: Tensor, books: Tensor, beam: int, cosine: bool) -> tuple[Tensor, Tensor]:
    return cosine_search(points, books) if cosine else beam_search(points, books, beam)


def _fake_search(points: Tensor, books: Tensor, beam: int, cosine: bool) -> tuple[Tensor, Tensor]:
    return points.new_empty(len(points), len(books), dtype=torch.int64), points.new_empty(len(points))


_OPERATOR = torch.library.custom_op(
    "rpqfx::residual_search",
    _search,
    mutates_args=(),
    schema="(Tensor points, Tensor books, int beam, bool cosine) -> (Tensor, Tensor)",
)
_OPERATOR.register_fake(_fake_search)


def _greedy(points: Tensor, books: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """Returns each stage's best entry for what the stages before leave."""
    if _fused(points, books):
        return cuda.residual_search(points, books, cosine)
    codes, distances = [], None
    for book in books:
        if cosine:
            code = firsts(book)[nearest(F.normalize(points, dim=1), F.normalize(book, dim=1))[0]]
        else:
            code, distances = nearest(points, book)
        points = points - book[code]
        codes.append(code)
    return torch.stack(codes, 1), points.square().sum(1) if distances is None else distances


def _fused(points: Tensor, books: Tensor) -> bool:
    """Returns whether Triton's kernel takes them."""
    plain = all(type(x) in (Tensor, nn.Parameter) for x in (points, books)) and points.dtype == books.dtype
    fits = plain and books.shape[2] <= cuda.MOST_SEARCHED and points.device == books.device
    return fits and not torch.compiler.is_compiling() and cuda.usable(points)


def compiled(points: Tensor, centres: Tensor) -> bool:
    """Returns whether a compiled kernel searches for points among centres: float32 on a CPU, where there are kernels.

    Args:
        points: Of any shape.
        centres: Of any shape.
    """
    plain = all(type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 for x in (points, centres))
    on_cpu = points.device.type == centres.device.type == "cpu"
    return plain and on_cpu and not torch.compiler.is_compiling() and build.ready()


def firsts(centres: Tensor) -> Tensor:
    """Returns the first centre that equals each centre, as an index.

    A matrix product may round one column as it does no other, so equal centres need not have equal scores. Which are
    equal is found by sorting a hash of their bits, in integers, which no order of additions changes.

    Args:
        centres: ``[K, d]``, floating. One with NaN equals none.

    Returns:
        ``[K]`` int64.
    """
    own = torch.arange(len(centres), device=centres.device)
    bits = (centres + 0.0).contiguous().view(_INTEGERS[centres.element_size()]).long()  # of both zeros as of one
    mixed = (bits ^ (bits >> 29)) * _MIX
    places = torch.arange(1, centres.shape[1] + 1, device=centres.device) * _MIX
    places = (places ^ (places >> 31)) * _MIX | 1  # in no progression, where sums of some equal sums of others
    hashes, order = ((mixed ^ (mixed >> 32)) * places).sum(1).sort(stable=True)
    begins = F.pad(hashes[1:] != hashes[:-1], (1, 0), value=True)
    found = torch.empty_like(own).scatter_(0, order, order[torch.where(begins, own, 0).cummax(0).values])
    return torch.where((centres == centres[found]).all(1), found, own)


def _scores(points: Tensor, centres: Tensor) -> Tensor:
    """Returns squared distances ``[N, K]``, less each point's own part."""
    shift = centres.mean(0)  # distances far from the origin would cancel
    centres = centres - shift
    return torch.addmm(centres.square().sum(1), points - shift, centres.t(), alpha=-2)


def _beam(points: Tensor, books: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    stages, entries, d = books.shape
    rests = points[:, None]
    codes = torch.empty(len(points), 1, 0, dtype=torch.int64, device=points.device)
    for stage, book in enumerate(books):
        own = (rests - book.mean(0)).square().sum(-1)
        scores = _scores(rests.reshape(-1, d), book).view(*own.shape, entries) + own[..., None]
        kept = min(beam if stage + 1 < stages else 1, own.shape[1] * entries)
        best = scores.flatten(1).topk(kept, largest=False).indices
        parent, code = (best // entries)[..., None], firsts(book)[best % entries]
        rests = rests.gather(1, parent.expand(-1, -1, d)) - book[code]
        codes = torch.cat([codes.gather(1, parent.expand(-1, -1, stage)), code[..., None]], -1)
    return codes[:, 0], rests[:, 0].square().sum(-1)
