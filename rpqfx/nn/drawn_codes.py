"""Codes that are drawn rather than learned: every entry serves as many vectors as any other."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.codebook import CodebookSpec


def balanced_codes(
    spec: CodebookSpec, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Returns random codes ``[R, M, N]`` in the narrowest integer, each sub-vector's a shuffled repetition of 0..K-1.

    With ``K = N`` the layer is exactly as free as a dense one.

    Args:
        spec: Shape of the codebooks.
        device: Where the codes go; the generator's shuffles are drawn there.
        generator: Draws the shuffles; torch's global one of the device if None.
    """
    balanced = (torch.arange(spec.num_vectors, device=device) % spec.entries).to(spec.code_dtype)
    codes = torch.empty(spec.codes_shape, device=device, dtype=spec.code_dtype)
    for stage in codes:
        for some in stage:
            some.copy_(balanced[torch.randperm(spec.num_vectors, device=device, generator=generator)])
    return codes
