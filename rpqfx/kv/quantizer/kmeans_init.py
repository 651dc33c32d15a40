"""The k-means start of codebooks of keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx.fit.k_means import kmeans
from rpqfx.fit.refitting import left_over
from rpqfx.fit.residual import train
from rpqfx.kv.quantizer.groups import Groups
from rpqfx.ops.search import nearest, residual_search

# Sub-vectors that a codebook is fitted to.
SAMPLES = 100_000


@torch.no_grad()
def start(
    parts: Tensor,
    weights: Tensor | None,
    slots: Groups,
    *,
    shared_stages: int = 1,
    beam: int,
    use_cosine_sim: bool,
    seed: int,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Returns codebooks by k-means, stage after stage, on at most 100,000 sub-vectors each.

    Stage ``r`` is trained on what is left of the groups that have more than ``r`` stages. By the cosine, a stage
    clusters directions, and gives each entry the length that leaves the least error. Codebooks of several stages are
    clusters of what all of these see.

    Args:
        parts: ``[N, M, d]``, finite.
        weights: ``[N, M]``, not negative, or None for ones.
        slots: Which groups have which stages.
        shared_stages: Stages in a row that share a codebook.
        beam: As in ``rpqfx.fit.train``.
        use_cosine_sim: Whether entries will be chosen by direction.
        seed: Of the samples and of k-means.
        steps: As in ``rpqfx.fit.train``.

    Returns:
        Codebooks ``[R, G, K, d]``, zero where no group has a stage, and how many points of the sample chose each
        entry, ``[R, G, K]`` float32.

    Raises:
        InputError: If there are no points, or weights are negative or not finite.
    """
    stages, books, entries, d = slots.codebooks_shape
    made = parts.new_zeros(stages, books, entries, d)
    counts = torch.zeros(stages, books, entries, device=parts.device)
    for book in range(books):
        used = [m for m in (range(slots.groups) if slots.shared else [book]) if slots.stages[m]]
        if not used:
            continue
        own = seed + book * stages
        rests, share, stages_of = _sample(parts, weights, used, slots, own)
        done = 0
        for end in sorted({slots.stages[m] for m in used}):
            live = stages_of >= end
            rests, stages_of = rests[live], stages_of[live]
            share = None if share is None else share[live]
            if shared_stages > 1:
                new, codes = _train_repeated(
                    rests, end - done, entries, share, steps, own + done, shared_stages, use_cosine_sim
                )
            elif use_cosine_sim:
                new, codes = _train_directions(rests, end - done, entries, share, steps, own + done)
            else:
                new, codes = train(
                    rests, end - done, entries, weights=share, steps=steps, beam=beam, seed=own + done
                )  # fmt: skip
            made[done:end, book] = new
            for stage in range(done, end):
                counts[stage, book] = torch.bincount(codes[:, stage - done], minlength=entries)
            rests, done = left_over(rests, codes, new), end
    return made, counts


def _sample(
    parts: Tensor, weights: Tensor | None, used: list[int], slots: Groups, seed: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns sub-vectors ``[P, d]`` of some groups, their weights, and how many stages their groups have."""
    count = len(parts) * len(used)
    if count > SAMPLES:
        generator = torch.Generator(parts.device).manual_seed(seed)
        chosen = torch.randperm(count, generator=generator, device=parts.device)[:SAMPLES]
    else:
        chosen = torch.arange(count, device=parts.device)
    row, group = chosen // len(used), torch.tensor(used, device=parts.device)[chosen % len(used)]
    stages_of = torch.tensor(slots.stages, device=parts.device)[group]
    return parts[row, group], None if weights is None else weights[row, group], stages_of


def _train_directions(
    points: Tensor, stages: int, entries: int, weights: Tensor | None, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns codebooks ``[stages, K, d]`` whose entries are chosen by direction, and codes ``[P, stages]``."""
    books, codes = [], []
    rests = points
    for stage in range(stages):
        units = F.normalize(rests, dim=1)
        share = rests.square().sum(1)  # a direction matters as much as what is long in it
        share = share if weights is None else share * weights
        centres = F.normalize(kmeans(units, entries, weights=share, steps=steps, seed=seed + stage)[0], dim=1)
        code = nearest(units, centres)[0]
        mass = torch.ones_like(share) if weights is None else weights
        along = (rests * centres[code]).sum(1)
        total, whole = (torch.bincount(code, values.double(), minlength=entries) for values in (mass * along, mass))
        mean = (total.sum() / whole.sum().clamp_min(1e-30)).clamp_min(1e-6)
        length = torch.where(whole > 0, total / whole.clamp_min(1e-30), mean)
        book = centres * length.clamp_min(1e-6 * mean).to(rests.dtype)[:, None]  # a direction needs some length
        books.append(book)
        codes.append(code)
        rests = rests - book[code]
    return torch.stack(books), torch.stack(codes, 1)


def _train_repeated(
    points: Tensor,
    stages: int,
    entries: int,
    weights: Tensor | None,
    steps: int,
    seed: int,
    shared_stages: int,
    use_cosine_sim: bool,
) -> tuple[Tensor, Tensor]:
    """Returns codebooks ``[stages, K, d]``, ``shared_stages`` in a row the same, and codes ``[P, stages]``."""
    books, codes = [], []
    for first in range(0, stages, shared_stages):
        start, seen = None, [points]
        for _ in range(shared_stages):  # what later stages see depends on the codebook, and it on what they see
            share = None if weights is None else weights.repeat(len(seen))
            book = kmeans(torch.cat(seen), entries, weights=share, steps=steps, seed=seed + first, start=start)[0]
            start, own, seen = book, [], []
            rest = points
            for _ in range(shared_stages):
                seen.append(rest)
                own.append(residual_search(rest, book[None], cosine=use_cosine_sim)[0][:, 0])
                rest = rest - book[own[-1]]
        points = rest
        books += [book] * shared_stages
        codes += own
    return torch.stack(books), torch.stack(codes, 1)
