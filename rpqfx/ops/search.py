"""The nearest centre of each point: by a compiled kernel on a CPU, else by torch's own operators in blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rpqfx.ops.cpu import build, kernels

# Distances that are alive at a time: few enough to stay in cache.
_BLOCK_ELEMENTS = 2**20


@torch.no_grad()
def nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each point, the first of them where several are as near.

    Which is nearest is found by ``|c|^2 - 2 x.c`` relative to the centres' mean, so centres whose distances differ
    by less than rounding may take each other's place; the distance itself is that of the centre found. A point with
    NaN gets some code in range.

    Args:
        points: ``[N, d]``, floating.
        centres: ``[K, d]`` of the same dtype and device, ``K >= 1``.

    Returns:
        ``codes [N]`` int64 and squared ``distances [N]``.
    """
    plain = all(type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 for x in (points, centres))
    on_cpu = points.device.type == centres.device.type == "cpu"
    if plain and on_cpu and not torch.compiler.is_compiling() and build.ready():
        return kernels.nearest(points, centres)
    shift = centres.mean(0)  # distances far from the origin would cancel
    shifted = centres - shift
    norms = shifted.square().sum(1)
    codes, distances = [], []
    for block in points.split(max(1, _BLOCK_ELEMENTS // len(centres))):
        code = torch.addmm(norms, block - shift, shifted.t(), alpha=-2).argmin(1)
        codes.append(code)
        distances.append((block - centres[code]).square().sum(1))
    return torch.cat(codes), torch.cat(distances)
