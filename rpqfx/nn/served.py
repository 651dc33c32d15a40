"""The torch calls that codebooks can serve without the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx.nn.virtual import SERVED, VirtualWeight


def _apply(x: Tensor, weight: VirtualWeight, transpose: bool) -> Tensor:
    """``x @ weight``, or with ``transpose`` ``x @ weight.T``."""
    held = weight.held
    return held.linear(x) if transpose != weight.flipped else held.linear_t(x)


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, VirtualWeight) and weight.ndim == 2 and weight.held.layout.lead == 1


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not _is_matrix(weight) or isinstance(input, VirtualWeight):
        return NotImplemented
    y = _apply(input, weight, transpose=True)
    return y if bias is None else y + bias.to(y.dtype)


def _matmul(input: Any, other: Any) -> Any:
    if _is_matrix(other) and isinstance(input, Tensor):
        return _apply(input, other, transpose=False)
    if _is_matrix(input) and isinstance(other, Tensor):
        if other.dim() == 1:
            return _apply(other, input, transpose=True)
        return _apply(other.transpose(-1, -2), input, transpose=True).transpose(-1, -2)
    return NotImplemented


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    y = NotImplemented if isinstance(input, VirtualWeight) else _matmul(mat1, mat2)
    if y is NotImplemented:
        return y
    y = y if alpha == 1 else y * alpha
    return y + (input if beta == 1 else input * beta).to(y.dtype) if beta else y


def _einsum(equation: Any, *operands: Any) -> Any:
    """Two operands of which one is a codebook-held matrix that meets the other in exactly one axis."""
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return NotImplemented
    terms, out = equation.replace(" ", "").split("->")
    pairs = list(zip(terms.split(","), operands, strict=True))
    if isinstance(operands[0], VirtualWeight):
        pairs.reverse()
    (axes, x), (held, weight) = pairs
    if not _is_matrix(weight) or not isinstance(x, Tensor) or len(set(axes)) != len(axes) or len(set(held)) != 2:
        return NotImplemented
    summed, kept = (held[0], held[1]) if held[0] in axes else (held[1], held[0])
    rest = axes.replace(summed, "")
    if summed not in axes or summed in out or kept in axes or sorted(out) != sorted(rest + kept):
        return NotImplemented
    y = _apply(x.movedim(axes.index(summed), -1), weight, transpose=kept == held[0])
    return y.permute([(rest + kept).index(axis) for axis in out])


def _conv(spatial: int, transposed: bool) -> Callable[..., Any]:
    def every(value: Any) -> tuple[int, ...]:
        value = (value,) if isinstance(value, int) else tuple(value)
        return value * spatial if len(value) == 1 else value

    def run(
        input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, rest: Any, groups: int
    ) -> Any:
        if not isinstance(weight, VirtualWeight) or weight.held.layout.transposed:
            return NotImplemented
        if isinstance(input, VirtualWeight) or weight.held.layout.lead != 1:
            return NotImplemented
        if isinstance(padding, str):
            if padding == "same" and every(stride) != (1,) * spatial:
                return NotImplemented  # torch's own error
            if padding == "same":
                taps = zip(every(dilation), weight.shape[2:], strict=True)
                totals = [d * (k - 1) for d, k in taps]
                input = F.pad(input, [side for t in reversed(totals) for side in (t // 2, t - t // 2)])
            elif padding != "valid":
                return NotImplemented
            padding = 0
        return weight.held.conv(
            input, bias, every(stride), every(padding), every(dilation), groups, transposed, every(rest)
        )

    def plain(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        return run(input, weight, bias, stride, padding, dilation, 0, groups)

    def transpose(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
        groups: int = 1, dilation: Any = 1,
    ) -> Any:  # fmt: skip
        return run(input, weight, bias, stride, padding, dilation, output_padding, groups)

    return transpose if transposed else plain


def _embedding(
    input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    if not _is_matrix(weight) or weight.flipped or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    held = weight.held
    rows = held.lookup(input, sparse)
    if padding_idx is None or padding_idx % held.layout.rows == held.layout.zero_vector:
        return rows
    return torch.where((input == padding_idx % held.layout.rows)[..., None], rows.detach(), rows)


SERVED.update(
    {
        F.linear: _linear,
        F.embedding: _embedding,
        F.conv1d: _conv(1, False),
        F.conv2d: _conv(2, False),
        F.conv3d: _conv(3, False),
        F.conv_transpose1d: _conv(1, True),
        F.conv_transpose2d: _conv(2, True),
        F.conv_transpose3d: _conv(3, True),
        torch.matmul: _matmul,
        torch.mm: _matmul,
        torch.Tensor.matmul: _matmul,
        torch.Tensor.mm: _matmul,
        torch.Tensor.__matmul__: _matmul,
        torch.addmm: _addmm,
        torch.Tensor.addmm: _addmm,
        torch.einsum: _einsum,
    }
)
