"""From sub-vectors to codes and back, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx.kv.quantizer.groups import Groups, Run
from rpqfx.ops.search import residual_search


class Step(NamedTuple):
    """A stage of some groups: the remainder of the stages before, and the entries that this one subtracts."""

    run: Run
    stage: int
    rests: Tensor
    """``[T, n, d]``; gradients reach the points through it, and no entry."""
    codes: Tensor
    """``[T, n]`` int64."""
    entries: Tensor
    """``[T, n, d]``."""


@torch.no_grad()
def assign(parts: Tensor, books: Tensor, slots: Groups, beam: int, use_cosine_sim: bool) -> Tensor:
    """Returns the codes of sub-vectors.

    Args:
        parts: ``[T, M, d]``, floating.
        books: ``[R, G, K, d]``, of the same dtype.
        slots: Which groups have which stages.
        beam: As in ``rpqfx.ops.search.residual_search``.
        use_cosine_sim: Likewise.

    Returns:
        ``[T, S]`` int64.
    """
    found = []
    with exact(parts):
        for run in slots.runs:
            points = slots.parts_of(parts, run)
            if slots.shared:
                codes = residual_search(points.flatten(0, 1), books[: run.stages, 0], beam=beam, cosine=use_cosine_sim)[
                    0
                ]
                found.append(codes.view(len(parts), len(run.groups), run.stages))
                continue
            each = (
                residual_search(points[:, i], books[: run.stages, group], beam=beam, cosine=use_cosine_sim)[0]
                for i, group in enumerate(run.groups)
            )
            found.append(torch.stack(list(each), 1))
    if len(found) == 1:
        return found[0].flatten(1)
    return torch.cat(slots.in_order(found), 1) if found else parts.new_empty(len(parts), 0, dtype=torch.int64)


def decode(codes: Tensor, books: Tensor, slots: Groups) -> Tensor:
    """Returns the sums of entries that codes stand for.

    Args:
        codes: ``[T, S]``, an integer.
        books: ``[R, G, K, d]``.
        slots: Which groups have which stages.

    Returns:
        ``[T, M, d]`` of the codebooks' dtype.
    """
    found = []
    for run in slots.runs:
        of_run = slots.codes_of(codes, run)
        total = _entries(of_run[..., 0].long(), slots.books_of(books[0], run))
        for stage in range(1, run.stages):
            total = total + _entries(of_run[..., stage].long(), slots.books_of(books[stage], run))
        found.append(total)
    return _whole(found, slots, books.new_zeros(len(codes), slots.codebook_dim))


def walk(parts: Tensor, codes: Tensor, books: Tensor, slots: Groups) -> Iterator[Step]:
    """Yields the stages one by one.

    Args:
        parts: ``[T, M, d]``.
        codes: ``[T, S]``, an integer.
        books: ``[R, G, K, d]`` of the parts' dtype.
        slots: Which groups have which stages.
    """
    for run in slots.runs:
        rests, of_run = slots.parts_of(parts, run), slots.codes_of(codes, run)
        for stage in range(run.stages):
            index = of_run[..., stage].long()
            entries = _entries(index, slots.books_of(books[stage], run))
            yield Step(run, stage, rests, index, entries)
            rests = rests - entries.detach()


def exact(x: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from rounding distances: with codes there is no second chance."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _entries(index: Tensor, books: Tensor) -> Tensor:
    """Returns ``[T, n, d]``: entry ``index[t, i]`` of book ``i``, or of the only one."""
    if len(books) > 1:
        index = index + books.shape[1] * torch.arange(len(books), device=index.device)
    return F.embedding(index, books.flatten(0, 1))


def _whole(found: list[Tensor], slots: Groups, zeros: Tensor) -> Tensor:
    if len(found) == 1 and len(slots.runs[0].groups) == slots.groups:
        return found[0]
    return torch.stack(slots.in_order(found, zeros), 1)
