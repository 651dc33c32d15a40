"""Fits coders to the moments of a calibration: maps, numbers of stages, codebooks.

An error ``e`` of a head's keys costs the model ``e F e'`` to second order, where ``F`` is the mean outer product of
gradients (the Fisher information; Kim et al., "SqueezeLLM", 2306.07629, and Zhang et al., "CQ", 2405.03917, use its
diagonal). In coordinates in which ``F`` is the identity all errors count alike, and a rotation makes coordinates there
uncorrelated. Then bits go where they save most, over all layers, keys and values together (reverse water-filling:
Cover and Thomas, section 10.3), and since every sub-vector is scaled to unit energy, one set of codebooks serves all.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from rpqfx.errors import PolicyError
from rpqfx.fit.residual import encode, train
from rpqfx.kv.coder.head_coder import HeadCoder
from rpqfx.kv.coder.statistics import Moments

# Of the mean of its diagonal, what is added to a Fisher matrix: directions that no gradient took are not free.
_RIDGE = 1e-3
# Of the largest, what the size of a sub-vector has to be to be brought to one.
_SILENT = 1e-6
# Times the energy of the weakest sub-vector with codes, from which on rows of maps have sixteen bits.
_FINE = 32.0
_POINTS = (2**14, 2**16)  # that codebooks are trained on: first to learn how stages do, then for good
_STEPS = (3, 8)
_BEAM = 8
_MEASURED = 256  # samples of a sub-vector that say what stages leave of it
# What is left of a sub-vector's energy after each stage of 8 bits over 8 channels, to begin with.
_LEFT = 0.31


@dataclass
class Space:
    """Coordinates of one coder's parts.

    Args:
        analysis: ``[P, n, n]``, from channels to coordinates, those with the most energy first.
        synthesis: ``[P, n, n]``, its inverse.
        mean: ``[H, D]``.
        energy: ``[P, n / d]`` of each sub-vector: the cost of its being zero.
        samples: ``[P, n / d, N, d]``, sub-vectors scaled to unit energy in the mean over sub-vectors of one.
    """

    analysis: Tensor
    synthesis: Tensor
    mean: Tensor
    energy: Tensor
    samples: Tensor


@torch.no_grad()
def find_space(coder: HeadCoder, moments: Moments) -> Space:
    """Returns coordinates in which errors count alike and what is coded is uncorrelated.

    Args:
        coder: With a transform.
        moments: Of what it is to code, of all channels of a part together.
    """
    parts, width, d = coder.parts, coder.width, coder.codebook_dim
    covariance, fisher = moments.covariance, moments.fisher
    eye = torch.eye(width, dtype=torch.float64, device=fisher.device)
    fisher = fisher + (_RIDGE * fisher.diagonal(dim1=1, dim2=2).mean(1) + 1e-30)[:, None, None] * eye
    root = torch.linalg.cholesky(fisher)
    energy, rotation = torch.linalg.eigh(root.mT @ covariance @ root)
    energy, rotation = energy.flip(1).clamp_min(0), rotation.flip(2)
    analysis = root @ rotation
    groups = energy.view(parts, -1, d).sum(2)
    size = (groups / d).sqrt()
    size = torch.where(size > _SILENT * size.max(), size, torch.ones_like(size)).repeat_interleave(d, 1)
    analysis = analysis / size[:, None]
    synthesis = torch.linalg.inv(analysis)
    samples = (torch.cat(moments.samples, 1) - moments.mean[:, None]).to(torch.float64) @ analysis
    return Space(
        analysis.float(), synthesis.float(), moments.mean.float().view(coder.heads, coder.dim), groups.float(),
        rearrange(samples.float(), "p n (g d) -> p g n d", d=d).contiguous(),
    )  # fmt: skip


@torch.no_grad()
def fit_coders(
    coders: Sequence[HeadCoder], spaces: Sequence[Space], bits: float, stages: int, *, seed: int = 0
) -> None:
    """Fits coders that share a budget and codebooks.

    Args:
        coders: The coders, all with the same ``d`` and ``K``.
        spaces: Of each.
        bits: For each number: codes, and scales where there are any.
        stages: Of a sub-vector, at most.
        seed: Of the codebooks.

    Raises:
        PolicyError: If scales take all the bits.
    """
    d, entries = coders[0].codebook_dim, coders[0].codebook_size
    numbers = sum(coder.heads * coder.dim for coder in coders)
    scales = sum(16 * coder.heads for coder in coders if coder.normalize)
    budget = int((bits * numbers - scales) // (entries - 1).bit_length())
    if budget < 1:
        raise PolicyError(
            f"{bits} bits for each number leave none for codes: scales take {scales / numbers:.2f} of them"
        )
    energy = torch.cat([space.energy.flatten() for space in spaces])
    left = energy[:, None] * _LEFT ** torch.arange(stages + 1, device=energy.device)
    for count, steps in zip(_POINTS, _STEPS, strict=True):
        counts = allocate(left, budget)
        points = _points(spaces, counts, count, seed)
        books = train(points, stages, entries, steps=steps, beam=_BEAM, seed=seed)[0].half().float()
        if count != _POINTS[-1]:
            left = _measure(spaces, books, energy)
    codebooks = nn.Parameter(books[:, None].to(coders[0].books.dtype), coders[0].quantizer.codebooks.requires_grad)
    used = _used(points, books) if coders[0].quantizer.decay is not None else None
    start = 0
    for coder, space in zip(coders, spaces, strict=True):
        size = space.energy.numel()
        own = counts[start : start + size].view(coder.parts, -1)
        start += size
        kept = max(1, int((own > 0).sum(1).max()))  # energies fall, so what is not kept has no codes
        own = own[:, :kept]
        fine = int((space.energy[:, :kept] > _FINE * space.energy[:, kept - 1 : kept]).sum(1).max())
        coder.set_transform(
            space.analysis[:, :, : kept * d], space.synthesis[:, : kept * d], space.mean,
            own.flatten().tolist(), codebooks, fine * d, used,
        )  # fmt: skip


def share_codebooks(coders: Sequence[HeadCoder], stages: int) -> None:
    """Gives coders one set of random codebooks, which all share.

    Args:
        coders: The coders, all with the same ``d`` and ``K``.
        stages: Of the set, at least those of any sub-vector.
    """
    own = coders[0].quantizer.codebooks
    _, books, entries, d = own.shape
    deviation = _LEFT ** (torch.arange(stages, device=own.device) / 2)
    drawn = torch.randn(stages, books, entries, d, device=own.device) * deviation[:, None, None, None]
    codebooks = nn.Parameter(drawn.to(own.dtype), own.requires_grad)
    for coder in coders:
        coder.quantizer.adopt(codebooks)


def allocate(left: Tensor, budget: int) -> Tensor:
    """Returns stages for sub-vectors, each next one where it saves most.

    Args:
        left: ``[n, R + 1]``, what an error costs with 0 to ``R`` stages.
        budget: Stages in all.

    Returns:
        ``[n]`` int64; sums to the budget, or to all there are.
    """
    rows = left.double().tolist()
    heap = [(-gain, n, r) for n, row in enumerate(rows) for gain, r in [_best_step(row, 0)] if r]
    heapq.heapify(heap)
    counts = [0] * len(rows)
    while heap and budget > 0:
        _, n, step = heapq.heappop(heap)
        step = min(step, budget)
        counts[n] += step
        budget -= step
        gain, further = _best_step(rows[n], counts[n])
        if further:
            heapq.heappush(heap, (-gain, n, further))
    return torch.tensor(counts, dtype=torch.int64, device=left.device)


def _best_step(row: list[float], at: int) -> tuple[float, int]:
    """Finds how many more stages save most for each of them: the lower convex hull of the row, step by step."""
    gains = [((row[at] - row[r]) / (r - at), r - at) for r in range(at + 1, len(row))]
    return max(gains, default=(0.0, 0))


def _points(spaces: Sequence[Space], counts: Tensor, most: int, seed: int) -> Tensor:
    """Returns sub-vectors that have codes, drawn evenly."""
    kept, start = [], 0
    for space in spaces:
        size = space.energy.numel()
        kept.append(space.samples.flatten(0, 1)[counts[start : start + size] > 0].flatten(0, 1))
        start += size
    points = torch.cat(kept)
    if len(points) <= most:
        return points
    generator = torch.Generator(points.device).manual_seed(seed)
    return points[torch.randint(len(points), (most,), generator=generator, device=points.device)]


def _used(points: Tensor, books: Tensor) -> Tensor:
    """Returns ``[R, 1, K]``: how many points chose each entry, at least one."""
    codes = encode(points, books, beam=_BEAM, passes=0)
    counts = [torch.bincount(code, minlength=books.shape[1]) for code in codes.t()]
    return torch.stack(counts).clamp_min(1).float()[:, None]


def _measure(spaces: Sequence[Space], books: Tensor, energy: Tensor) -> Tensor:
    """Returns the energy left of each sub-vector after 0 to ``R`` stages, ``[n, R + 1]``."""
    shares = []
    for space in spaces:
        points = space.samples[:, :, :_MEASURED].flatten(0, 1)
        whole = points.square().sum((1, 2)).clamp_min(1e-30)
        own = [torch.ones_like(whole)]
        for count in range(1, len(books) + 1):
            codes = encode(points.flatten(0, 1), books[:count].contiguous(), beam=_BEAM, passes=0)
            made = sum(book[code] for book, code in zip(books, codes.t(), strict=False))
            own.append((points - made.view_as(points)).square().sum((1, 2)) / whole)
        shares.append(torch.stack(own, 1))
    return energy[:, None] * torch.cat(shares)
