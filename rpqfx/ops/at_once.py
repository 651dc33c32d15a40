"""Products and convolutions in one call of a kernel, factors and bias included, where nothing else has a say in it.

With one row, or one small image, what a layer does around its kernel takes longer than the kernel. So where no
gradient, transform, trace, compiler or autocast takes part, the whole call is one step, and everywhere else it is the
same product in several.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rpqfx.ops.autocast import autocast_dtype
from rpqfx.ops.cpu import build, kernels
from rpqfx.ops.cuda import kernels as cuda
from rpqfx.ops.mapped import differentiated
from rpqfx.ops.plan import Plan
from rpqfx.ops.products import Tensors, conv_plan


def linear_at_once(x: Tensor, weight: Tensors, bias: Tensor | None, plan: Plan) -> Tensor | None:
    """Returns ``x @ W.T + bias``, or None where this way is not open.

    Args:
        x: ``[..., D]``.
        weight: Its tensors, with codes in tiles.
        bias: ``[N]`` or None.
        plan: Which way it runs.
    """
    if not _plain(x, weight, bias) or x.dim() == 0 or x.shape[-1] != weight.codes.shape[1] * weight.codebooks.shape[3]:
        return None  # what does not fit is refused in the library's own words
    if not _on_cpu(x, weight) and not _on_gpu(x, weight, bias):
        return None
    tiled = kernels.tiled if x.is_cpu else cuda.tiled
    dims = weight.column_scale if weight.share == 1 else weight.dims
    return tiled(x, weight.codebooks, weight.codes, weight.tiled, bias, plan, dims, weight.scale)


def conv_at_once(
    x: Tensor, weight: Tensors, weight_shape: tuple[int, ...], bias: Tensor | None, stride: tuple[int, ...],
    padding: tuple[int, ...], dilation: tuple[int, ...], groups: int, transposed: bool,
    output_padding: tuple[int, ...] | None, plan: Plan,
) -> Tensor | None:  # fmt: skip
    """Returns a convolution with dequantized filters, or None where this way is not open, or looking up is better.

    Args:
        x: ``[B, C, *spatial]``.
        weight: Its tensors.
        weight_shape: Of the dense weight.
        bias: One number a channel of the result, or None.
        stride: Per spatial axis, as the rest.
        padding: Zeros added on both sides.
        dilation: Spacing of the filter's taps.
        groups: Channel groups.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed convolution.
        plan: Which way it runs.
    """
    channels = weight_shape[0] if transposed else weight_shape[1] * groups
    if not _plain(x, weight, bias) or x.dim() != len(stride) + 2 or x.shape[1] != channels or not x.is_contiguous():
        return None
    if not _on_cpu(x, weight):
        return None
    if weight.tiled or weight.share % math.prod(weight_shape[2:]):
        return None
    if conv_plan(x, weight, weight_shape, stride, groups, transposed, plan) == "lookup":
        return None
    return kernels.conv(
        x, weight.codebooks, weight.codes, weight.signs, weight.column_scale, weight.scale, bias, weight_shape, stride,
        padding, dilation, transposed, output_padding or (0,) * len(stride), groups,
    )  # fmt: skip


def _plain(x: Tensor, weight: Tensors, bias: Tensor | None) -> bool:
    """Returns whether nobody else wants to see these tensors, and they are of one dtype."""
    books, codes = weight.codebooks, weight.codes
    if type(x) is not Tensor or x.dtype is not books.dtype:
        return False  # whatever is traced, mapped over samples or of another kind is of a class of its own
    if type(books) not in (Tensor, nn.Parameter) or type(codes) is not Tensor:
        return False  # as those that are split over processes
    if bias is not None and (bias.dtype is not x.dtype or type(bias) not in (Tensor, nn.Parameter)):
        return False
    if differentiated(x, books, weight.scale, weight.column_scale, bias) or autocast_dtype(x.device) is not None:
        return False
    return not torch.jit.is_tracing()  # type: ignore[attr-defined]


def _on_cpu(x: Tensor, weight: Tensors) -> bool:
    """Returns whether the compiled kernels take tensors, which look for themselves where the others are."""
    return (
        x.is_cpu
        and weight.codebooks.is_cpu
        and weight.codes.is_cpu
        and kernels.take(x.dtype, weight.codes.dtype)
        and build.ready()
    )


def _on_gpu(x: Tensor, weight: Tensors, bias: Tensor | None) -> bool:
    """Returns whether Triton's kernels take tensors."""
    others = [t for t in (*weight[:5], bias) if t is not None]
    return x.is_cuda and all(t.device == x.device for t in others) and cuda.usable(x)
