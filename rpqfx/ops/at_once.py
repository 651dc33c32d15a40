"""A product in one call of a kernel, factors and bias included, where nothing else has a say in it.

With one row, what a layer does around its kernel takes longer than the kernel. So where no gradient, transform, trace,
compiler or autocast looks on, it is asked in one step, and everywhere else it is the same product in several.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rpqfx.ops.cpu import build, kernels
from rpqfx.ops.mapped import differentiated
from rpqfx.ops.plan import Plan
from rpqfx.ops.products import Tensors


def at_once(x: Tensor, weight: Tensors, bias: Tensor | None, plan: Plan) -> Tensor | None:
    """Returns ``x @ W.T + bias``, or None where this way is not open.

    Args:
        x: ``[..., D]``.
        weight: Its tensors, with codes in tiles.
        bias: ``[N]`` or None.
        plan: Which way it runs.
    """
    books, dims = weight.codebooks, weight.dim_scale
    if type(x) is not Tensor or x.dtype is not books.dtype or not kernels.take(x.dtype, torch.uint8):
        return None  # whatever is traced, mapped over samples or of another kind is of a class of its own
    if not (weight.tiled and x.is_cpu and books.is_cpu and weight.codes.is_cpu):
        return None
    if x.dim() == 0 or x.shape[-1] != weight.codes.shape[1] * books.shape[3]:
        return None  # and is refused in the library's own words
    if bias is not None and (bias.dtype is not x.dtype or type(bias) not in (Tensor, nn.Parameter)):
        return None
    if differentiated(x, books, weight.scale, dims, bias) or torch.is_autocast_enabled("cpu"):
        return None
    if torch.jit.is_tracing() or not build.ready():  # type: ignore[attr-defined]
        return None
    if dims is not None and weight.share != 1:
        dims = weight.dims
    return kernels.tiled(x, books, weight.codes, weight.tiled, bias, plan, dims, weight.scale)
