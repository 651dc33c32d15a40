"""Codebooks as moving averages of the vectors that they quantise, the same on all ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rpqfx.kv.quantizer.encode import Step
from rpqfx.kv.quantizer.groups import Groups

# Points that each entry is taken to have on top of its own.
_SMOOTHING = 1e-5
# Multiples of the golden ratio, modulo 1 and in 32 bits: any run of them is spread evenly.
_GOLDEN = 2654435769


class Sums(NamedTuple):
    """The numbers of points that chose each entry, ``[R, G, K]``, and their sums, ``[R, G, K, d]``; float32."""

    counts: Tensor
    sums: Tensor


@torch.no_grad()
def batch_sums(steps: list[Step], mask: Tensor, slots: Groups, copies: int = 1) -> Sums:
    """Returns the counts and sums of the points that chose each entry in a batch, added up over all ranks.

    Args:
        steps: All stages (``rpqfx.kv.quantizer.encode.walk``).
        mask: ``[T]`` bool, False for tokens that do not count.
        slots: Which groups have which stages.
        copies: Ranks that have the same tokens, of which each counts once.
    """
    stages, books, entries, d = slots.codebooks_shape
    flat = torch.zeros(stages * books * entries, d + 1, device=mask.device)
    own = flat.view(stages, books, entries, d + 1)
    for step in steps:
        points = torch.cat([step.rests.float(), torch.ones_like(step.rests[..., :1], dtype=torch.float32)], -1)
        points = points.masked_fill(~mask[:, None, None], 0)
        if slots.shared:
            own[step.stage, 0].index_add_(0, step.codes.flatten(), points.flatten(0, 1))
            continue
        for i, group in enumerate(step.run.groups):
            own[step.stage, group].index_add_(0, step.codes[:, i], points[:, i])
    if _several_ranks():
        dist.all_reduce(flat)
        flat /= copies
    return Sums(own[..., d], own[..., :d])


@torch.no_grad()
def draw(steps: list[Step], mask: Tensor, slots: Groups, number: Tensor) -> Tensor:
    """Returns a point of the batch for each entry, ``[R, G, K, d]`` float32: rank 0's for all ranks.

    Which points is a matter of ``number`` alone, and they are different ones while there are enough. NaN where no
    token counts, or no group uses a codebook.

    Args:
        steps: All stages.
        mask: ``[T]`` bool.
        slots: Which groups have which stages.
        number: Int64 scalar, of the call: other numbers give other points.
    """
    stages, books, entries, d = slots.codebooks_shape
    drawn = torch.full((stages, books, entries, d), float("nan"), device=mask.device)
    upto = mask.cumsum(0)
    tokens = upto[-1] if len(mask) else upto.new_zeros(())
    for stage in range(stages if len(mask) else 0):
        at_stage = [step for step in steps if step.stage == stage]
        pools = {0: torch.cat([step.rests for step in at_stage], 1)} if slots.shared else {
            group: step.rests[:, i : i + 1] for step in at_stage for i, group in enumerate(step.run.groups)
        }  # fmt: skip
        for book, pool in pools.items():
            first = (number * stages + stage) * books + book
            run = (first * entries + torch.arange(entries, device=mask.device)) & 0x7FFFFFFF
            rank = ((run * _GOLDEN & 0xFFFFFFFF) * (tokens * pool.shape[1])) >> 32
            token = torch.searchsorted(upto, rank // pool.shape[1], right=True).clamp_max(len(mask) - 1)
            points = pool[token, rank % pool.shape[1]].float()
            drawn[stage, book] = torch.where(tokens > 0, points, float("nan"))
    if _several_ranks():
        dist.broadcast(drawn, 0)
    return drawn


@torch.no_grad()
def update(
    codebooks: Tensor,
    held: Sums,
    batch: Sums,
    *,
    decay: float,
    threshold_ema_dead_code: float = 0.0,
    drawn: Tensor | None = None,
) -> None:
    """Updates averages, and codebooks with them, in place.

    Counts and sums decay toward those of the batch; an entry is its sum over its count, where counts are smoothed as
    Laplace did (van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv 1711.00937, appendix A.1;
    Razavi et al., "Generating Diverse High-Fidelity Images with VQ-VAE-2", 2019, arXiv 1906.00446). Codebooks that
    nothing was coded with stay as they are.

    Args:
        codebooks: ``[R, G, K, d]``, of any floating dtype.
        held: The averages.
        batch: Of the batch.
        decay: How much of the averages stays, 0 to 1.
        threshold_ema_dead_code: Entries whose average count falls below this become a point of the batch, with this
            count and the sum that goes with it.
        drawn: ``[R, G, K, d]``, these points (``draw``).
    """
    seen = batch.counts.sum(-1, keepdim=True) > 0
    keep = torch.where(seen, decay, 1.0)
    counts = held.counts * keep + batch.counts * (1 - keep)
    sums = held.sums * keep[..., None] + batch.sums * (1 - keep[..., None])
    dead = torch.zeros_like(counts, dtype=torch.bool)
    if threshold_ema_dead_code > 0 and drawn is not None:
        dead = seen & (counts < threshold_ema_dead_code) & drawn.isfinite().all(-1)
        counts = torch.where(dead, threshold_ema_dead_code, counts)
        sums = torch.where(dead[..., None], drawn * threshold_ema_dead_code, sums)
        drawn = torch.where(dead[..., None], drawn, 0)
    held.counts.copy_(counts)
    held.sums.copy_(sums)
    total = counts.sum(-1, keepdim=True)
    smooth = (counts + _SMOOTHING) / (total + counts.shape[-1] * _SMOOTHING) * total
    entries = sums / smooth[..., None]
    if drawn is not None:
        entries = torch.where(dead[..., None], drawn, entries)
    codebooks.copy_(torch.where(seen[..., None], entries, codebooks))


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
