"""Product and residual codes for a matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from rpqfx.codebook import CodebookSpec, pack_signs
from rpqfx.fit.kmeans import kmeans


class Fit(NamedTuple):
    """Codebooks and codes that approximate a matrix (axes as in ``rpqfx.codebook``).

    Args:
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
def fit_codebooks(matrix: Tensor, spec: CodebookSpec, *, steps: int = 10, seed: int = 0) -> Fit:
    """Product quantisation, stage upon stage of residuals.

    Each codebook is fitted by k-means to the sub-vectors it serves (Jegou et al., 2011); each further stage to what
    the stages before left over (Chen, Guan, Wang, "Approximate Nearest Neighbor Search by Residual Vector
    Quantization", 2010). With a scale, rows are divided by their root mean square first; with signs, a sub-vector
    is turned so that its sum is not negative. All work is done in float32 (float64 stays).

    Args:
        matrix: ``[N, D]``.
        spec: What to fit.
        steps: Lloyd steps at most.
        seed: Of the k-means starts.

    Returns:
        The tensors of the spec, in ``matrix``'s dtype.
    """
    work = matrix if matrix.dtype == torch.float64 else matrix.float()
    scale = None
    if spec.scale:
        scale = work.square().mean(1).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        work = work / scale[:, None]
    rest = rearrange(work, "n (m d) -> m n d", d=spec.codebook_dim)
    codebooks, codes, minus = [], [], []
    for stage in range(spec.stages):
        flip = rest.sum(-1) < 0 if spec.signs else torch.zeros_like(rest[..., 0], dtype=torch.bool)
        turned = torch.where(flip[..., None], -rest, rest)
        books, stage_codes = _fit_stage(turned, spec, steps, seed + stage * spec.sub_vectors)
        share = spec.sub_vectors // books.shape[0]
        found = torch.stack([books[m // share][stage_codes[m]] for m in range(spec.sub_vectors)])
        rest = rest - torch.where(flip[..., None], -found, found)
        codebooks.append(books)
        codes.append(stage_codes)
        minus.append(flip)
    return Fit(
        torch.stack(codebooks).to(matrix.dtype),
        torch.stack(codes).to(spec.code_dtype),
        None if scale is None else scale.to(matrix.dtype),
        pack_signs(torch.stack(minus)) if spec.signs else None,
    )


def _fit_stage(parts: Tensor, spec: CodebookSpec, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """``[M, N, d]`` to codebooks ``[G, K, d]`` and codes ``[M, N]``."""
    groups = rearrange(parts, "(g s) n d -> g (s n) d", g=spec.codebooks_shape[1])
    fits = [kmeans(group, spec.entries, steps=steps, seed=seed + g) for g, group in enumerate(groups)]
    codes = torch.stack([codes for _, codes in fits])
    return torch.stack([centres for centres, _ in fits]), rearrange(codes, "g (s n) -> (g s) n", n=parts.shape[1])
