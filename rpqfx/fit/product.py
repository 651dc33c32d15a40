"""Product and residual codes for a matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from rpqfx.codebook import CodebookSpec, pack_signs
from rpqfx.errors import InputError
from rpqfx.fit.residual import train


class Fit(NamedTuple):
    """Codebooks and codes that approximate a matrix (axes as in ``rpqfx.codebook``).

    Attributes:
        codebooks: ``[R, G, K, d]``.
        codes: ``[R, M, N]``.
        scale: ``[N]``, or None where the spec has none.
        signs: Packed, or None where the spec has none.
    """

    codebooks: Tensor
    codes: Tensor
    scale: Tensor | None
    signs: Tensor | None


@torch.no_grad()
def fit_codebooks(
    matrix: Tensor,
    spec: CodebookSpec,
    *,
    weights: Tensor | None = None,
    steps: int = 10,
    beam: int = 8,
    seed: int = 0,
) -> Fit:
    """Fits product quantisation with residual stages.

    Each codebook is fitted by k-means to the sub-vectors it serves (Jegou et al., 2011). Further stages start from what
    the stages before leave, and all are then fitted together, alternating beam search and least squares
    (``rpqfx.fit.residual.train``). With a scale, rows are divided by their root mean square first. With signs, a
    sub-vector is flipped so that its sum is not negative, and stages stay as they started. All work is done in float32
    (float64 stays).

    Args:
        matrix: ``[N, D]``, finite.
        spec: What to fit.
        weights: How much the squared error of each element counts, not negative, of any shape that broadcasts to
            ``[N, D]``: ``[D]`` for columns, ``[N, 1]`` for rows. A sub-vector counts by its mean. With a scale, errors
            are those of the divided rows.
        steps: Lloyd steps, and alternations after each stage but the first, at most.
        beam: Sums that go on from stage to stage; 1 leaves the stages as they started.
        seed: Of the k-means starts.

    Returns:
        The tensors of the spec, in ``matrix``'s dtype.

    Raises:
        InputError: If weights do not broadcast, or are negative or not finite.
    """
    work = matrix if matrix.dtype == torch.float64 else matrix.float()
    shares = None if weights is None else _shares(weights.to(work), work, spec)
    scale = None
    if spec.scale:
        scale = work.square().mean(1).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        work = work / scale[:, None]
    rest = rearrange(work, "n (m d) -> m n d", d=spec.codebook_dim)
    codebooks, codes, minus = [], [], []
    together = 1 if spec.signs else spec.stages
    for stage in range(0, spec.stages, together):
        flip = rest.sum(-1) < 0 if spec.signs else torch.zeros_like(rest[..., 0], dtype=torch.bool)
        flipped = torch.where(flip[..., None], -rest, rest)
        books, found = _fit_groups(flipped, shares, spec, together, steps, beam, seed + stage * spec.num_subvectors)
        codebooks.append(books)
        codes.append(found)
        minus.append(flip)
        if spec.signs:
            share = spec.num_subvectors // books.shape[1]
            sums = torch.stack([books[0, m // share][found[0, m]] for m in range(spec.num_subvectors)])
            rest = rest - torch.where(flip[..., None], -sums, sums)
    return Fit(
        torch.cat(codebooks).to(matrix.dtype),
        torch.cat(codes).to(spec.code_dtype),
        None if scale is None else scale.to(matrix.dtype),
        pack_signs(torch.stack(minus)) if spec.signs else None,
    )


def _shares(weights: Tensor, matrix: Tensor, spec: CodebookSpec) -> Tensor:
    """Returns how much each sub-vector counts, ``[M, N]``."""
    try:
        each = weights.expand(matrix.shape)
    except RuntimeError:
        raise InputError(f"weights {list(weights.shape)} do not broadcast to {list(matrix.shape)}") from None
    return reduce(each, "n (m d) -> m n", "mean", d=spec.codebook_dim)


def _fit_groups(
    parts: Tensor, shares: Tensor | None, spec: CodebookSpec, stages: int, steps: int, beam: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns ``[M, N, d]`` to codebooks ``[R, G, K, d]`` and codes ``[R, M, N]``."""
    books = spec.codebooks_shape[1]
    groups = rearrange(parts, "(g s) n d -> g (s n) d", g=books)
    each = [None] * books if shares is None else rearrange(shares, "(g s) n -> g (s n)", g=books)
    fits = [
        train(group, stages, spec.entries, weights=share, steps=steps, beam=beam, seed=seed + g)
        for g, (group, share) in enumerate(zip(groups, each, strict=True))
    ]
    codes = torch.stack([codes for _, codes in fits])
    return torch.stack([found for found, _ in fits], 1), rearrange(codes, "g (s n) r -> r (g s) n", n=parts.shape[1])
