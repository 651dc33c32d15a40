"""The shape of a convolution's result, and the gradient of its filters.

The gradient is summed in float32 at least, whatever torch runs the convolution with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.codebook import steps

# Torch's ways of running a convolution whose sums are float32 where its numbers are float16 or bfloat16. The others,
# its own loops, add the samples up in the numbers' dtype: with eight bits such a sum stops growing at some 256 terms.
# They run wherever oneDNN does not: on CPUs without AVX-512, and of some transposed and grouped convolutions on all.
SUM_WIDE = frozenset({"Cudnn", "CudnnTranspose", "Miopen", "MiopenTranspose", "Mkldnn", "MkldnnTranspose"})
# Numbers of a float32 copy of the input and of the result's gradient that are alive at a time.
COPY_ELEMENTS = 2**22


def conv_shape(
    x: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool, output_padding: Sequence[int], groups: int,
) -> tuple[int, ...]:  # fmt: skip
    """Returns the shape of a convolution's result.

    Counted out, since torch's own fake picks a backend by the batch's size and so binds a compiled graph to it.

    Args:
        x: ``[B, C_in, *size]``, the input.
        weight_shape: Of the weight.
        stride: Per spatial axis, as the rest.
        padding: Zeros added on both sides.
        dilation: Spacing of the filter's taps.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed convolution.
        groups: Channel groups.
    """
    geometry = zip(x.shape[2:], weight_shape[2:], stride, padding, dilation, output_padding, strict=True)
    sizes = [
        (n - 1) * s - 2 * p + d * (k - 1) + more + 1 if transposed else (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d, more in geometry
    ]
    return (x.shape[0], weight_shape[1] * groups if transposed else weight_shape[0], *sizes)


def filters_grad(
    grad: Tensor, x: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """Returns the gradient of a convolution's weight.

    Args:
        grad: ``[B, C_out, *size]``, the gradient of the result.
        x: ``[B, C_in, *size]``, the input, of the same dtype.
        weight_shape: Of the weight.
        stride: Per spatial axis, as the rest.
        padding: Zeros added on both sides.
        dilation: Spacing of the taps.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed convolution.
        groups: Channel groups.

    Returns:
        A tensor of ``weight_shape``. For float16 and bfloat16 inputs it has their dtype where torch sums in float32 and
        rounds once, and is float32 where the library sums.
    """
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    if _sums_wide(x, weight_shape, geometry):
        return _filters_grad(grad, x, weight_shape, geometry)
    wide = steps.sum_dtype(x.dtype)
    first, *rest = _blocks(x, grad)
    total = _filters_grad(grad[first].to(wide), x[first].to(wide), weight_shape, geometry)
    for part in rest:
        total += _filters_grad(grad[part].to(wide), x[part].to(wide), weight_shape, geometry)
    return total


def _filters_grad(grad: Tensor, x: Tensor, weight_shape: Sequence[int], geometry: tuple[Any, ...]) -> Tensor:
    weight = x.new_empty(()).expand(tuple(weight_shape))
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, (False, True, False))[1]


def _sums_wide(x: Tensor, weight_shape: Sequence[int], geometry: tuple[Any, ...]) -> bool:
    """Returns whether torch sums in float32 at least; a tensor without storage may run anywhere, and is not asked."""
    if steps.sum_dtype(x.dtype) is x.dtype:
        return True
    if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return False
    weight = x.new_empty(()).expand(tuple(weight_shape))
    return torch._C._select_conv_backend(x, weight, None, *geometry).name in SUM_WIDE


def _blocks(x: Tensor, grad: Tensor) -> list[slice]:
    """Returns slices of a batch that are copied at a time; one slice where a compiler plans the memory."""
    samples, numbers = x.shape[0], x.numel() + grad.numel()
    if torch.compiler.is_compiling() or numbers <= COPY_ELEMENTS:
        return [slice(None)]
    size = max(1, COPY_ELEMENTS * samples // numbers)
    return [slice(first, first + size) for first in range(0, samples, size)]
