"""The torch calls that codebooks can serve without the weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx.nn.bags import bags
from rpqfx.nn.tensor.virtual import SERVED, VirtualWeight
from rpqfx.nn.weight_slice import Part

# A graph that is being compiled has a product for each expert; with more of them it takes all at once, expanded.
_EXPERTS_IN_GRAPHS = 16


def _apply(x: Tensor, weight: VirtualWeight, transpose: bool) -> Tensor:
    """``x @ weight``, or with ``transpose`` ``x @ weight.T``."""
    return weight.part.linear(x) if transpose != weight.flipped else weight.part.linear_t(x)


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, VirtualWeight) and weight.is_matrix


def _are_experts(weight: Any) -> bool:
    """Returns whether it is one matrix an expert, ``[E, a, b]``, few enough for a product each."""
    if not isinstance(weight, VirtualWeight) or weight.views or not weight.part.layout.experts or weight.order[0]:
        return False
    return not torch.compiler.is_compiling() or weight.shape[0] <= _EXPERTS_IN_GRAPHS


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not _is_matrix(weight) or isinstance(input, VirtualWeight):
        return NotImplemented
    bias = bias.expand_dense() if isinstance(bias, VirtualWeight) else bias
    if not weight.flipped:
        return weight.part.linear(input, bias)
    y = weight.part.linear_t(input)
    return y if bias is None else y + bias.to(y.dtype)


def _matmul(input: Any, other: Any) -> Any:
    if _is_matrix(other) and isinstance(input, Tensor):
        return _apply(input, other, transpose=False)
    if _is_matrix(input) and isinstance(other, Tensor):
        if other.dim() == 1:
            return _apply(other, input, transpose=True)
        return _apply(other.transpose(-1, -2), input, transpose=True).transpose(-1, -2).contiguous()
    if _are_experts(other) and isinstance(input, Tensor) and input.dim() > 1:
        return _of_experts(input, other)
    if _are_experts(input) and isinstance(other, Tensor) and other.dim() > 1:
        y = _of_experts(other.transpose(-1, -2), input.mT)
        return y if y is NotImplemented else y.transpose(-1, -2).contiguous()
    return NotImplemented


def _of_experts(x: Tensor, weight: VirtualWeight) -> Any:
    """``x @ weight``, ``[..., E or 1, B, a]`` or ``[B, a]`` with ``[E, a, b]``: a product an expert."""
    count = weight.shape[0]
    if x.dim() > 2 and x.shape[-3] not in (1, count):
        return NotImplemented  # torch's own error, or an expert for each of several inputs
    if x.dim() == 2 or x.shape[-3] == 1:
        inputs = [x if x.dim() == 2 else x.squeeze(-3)] * count
    else:
        inputs = list(x.unbind(-3))
    products = [_apply(one, matrix, transpose=False) for one, matrix in zip(inputs, weight.unbind(), strict=True)]
    return torch.stack(products, -3)


def _bmm(input: Any, mat2: Any) -> Any:
    same = input.ndim == mat2.ndim == 3 and input.shape[0] == mat2.shape[0]
    return _matmul(input, mat2) if same else NotImplemented


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    y = NotImplemented if isinstance(input, VirtualWeight) else _matmul(mat1, mat2)
    if y is NotImplemented:
        return y
    y = y if alpha == 1 else y * alpha
    return y + (input if beta == 1 else input * beta).to(y.dtype) if beta else y


def _baddbmm(input: Any, batch1: Any, batch2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return _addmm(input, batch1, batch2, beta=beta, alpha=alpha) if _are_experts(batch2) else NotImplemented


def _einsum(equation: Any, *operands: Any) -> Any:
    """Returns two operands, of which one is quantized and is contracted along all axes of its rows or columns."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return NotImplemented
    terms, out = equation.replace(" ", "").split("->")
    pairs = list(zip(terms.split(","), operands, strict=True))
    if isinstance(operands[0], VirtualWeight):
        pairs.reverse()
    (axes, x), (held, weight) = pairs
    if not isinstance(weight, VirtualWeight) or weight.views or not isinstance(x, Tensor):
        return NotImplemented
    if [len(set(term)) for term in (axes, held, out)] != [len(axes), len(held), len(out)]:
        return NotImplemented
    labels = "".join([held[weight.order.index(axis)] for axis in range(len(held))])
    if not weight.part.layout.experts:
        return _einsum_part(weight.part, labels, axes, out, x)
    return _einsum_experts(weight, labels, axes, out, x)


def _einsum_part(part: Part, labels: str, axes: str, out: str, x: Tensor) -> Any:
    """Returns one matrix, whose rows and columns may be several axes each."""
    lead = part.layout.lead
    for summed, kept, product in (
        (labels[lead:], labels[:lead], part.linear),
        (labels[:lead], labels[lead:], part.linear_t),
    ):
        rest = "".join([axis for axis in axes if axis not in summed])
        if sorted(axes) == sorted(rest + summed) and sorted(out) == sorted(rest + kept):
            sizes = [part.layout.shape[labels.index(axis)] for axis in kept]
            x = x.permute([axes.index(axis) for axis in rest + summed]).flatten(len(rest))
            y = product(x).unflatten(-1, sizes)
            return y.permute([(rest + kept).index(axis) for axis in out])
    return NotImplemented


def _einsum_experts(weight: VirtualWeight, labels: str, axes: str, out: str, x: Tensor) -> Any:
    """Returns a matrix an expert: the expert is an axis of the batch, of the result alone (heads), or summed over."""
    expert, matrix = labels[0], labels[1:]
    if not _are_experts(VirtualWeight(weight.held, weight.part)) or expert not in axes + out:
        return NotImplemented
    parts = weight.part.experts()
    each = x.unbind(axes.index(expert)) if expert in axes else [x] * len(parts)
    rest = axes.replace(expert, ""), out.replace(expert, "")
    if len(each) != len(parts):
        return NotImplemented  # torch's own error
    products = [_einsum_part(part, matrix, *rest, one) for part, one in zip(parts, each, strict=True)]
    if products[0] is NotImplemented:
        return NotImplemented
    return torch.stack(products, out.index(expert)) if expert in out else torch.stack(products).sum(0)


def _grouped_mm(
    input: Any, mat_b: Any, *, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Any:
    """Multiplies the rows up to each offset by the matrix of one expert."""
    if not _are_experts(mat_b) or torch.compiler.is_compiling() or not isinstance(input, Tensor):
        return NotImplemented
    if offs is None or input.dim() != 2 or bias is not None or out_dtype not in (None, input.dtype):
        return NotImplemented
    ends = offs.tolist()
    groups = [input[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    products = [_apply(rows, w, transpose=False) for rows, w in zip(groups, mat_b.unbind(), strict=True)]
    rest = input.new_zeros(input.shape[0] - ends[-1], mat_b.shape[-1])
    return torch.cat([*products, rest.to(products[0].dtype)])


def _conv(spatial: int, transposed: bool) -> Callable[..., Any]:
    def every(value: Any) -> tuple[int, ...]:
        value = (value,) if isinstance(value, int) else tuple(value)
        return value * spatial if len(value) == 1 else value

    def run(
        input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, rest: Any, groups: int
    ) -> Any:
        if not isinstance(weight, VirtualWeight) or weight.views or weight.flipped or isinstance(input, VirtualWeight):
            return NotImplemented
        layout = weight.part.layout
        if layout.transposed or layout.lead != 1 or layout.experts or len(layout.shape) != spatial + 2:
            return NotImplemented
        if weight.part.tensors.share % math.prod(layout.shape[2:]):
            return NotImplemented  # taps of one channel have different factors
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
        return weight.part.conv(
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
    layout = weight.part.layout
    rows = weight.part.lookup(input, sparse)
    if padding_idx is None or padding_idx % layout.rows == layout.zero_vector:
        return rows
    return torch.where((input == padding_idx % layout.rows)[..., None], rows.detach(), rows)


def _embedding_bag(
    input: Any, weight: Any, offsets: Tensor | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
    per_sample_weights: Tensor | None = None, include_last_offset: bool = False, padding_idx: int | None = None,
) -> Any:  # fmt: skip
    if isinstance(input, VirtualWeight) or (isinstance(weight, Tensor) and not weight.is_floating_point()):
        input, weight = weight, input  # torch takes both orders
    rows = _embedding(input.reshape(-1), weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if rows is NotImplemented:
        return rows
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    return bags(input, rows, padding, offsets, per_sample_weights, mode, include_last_offset)


SERVED.update(
    {
        F.linear: _linear,
        F.embedding: _embedding,
        F.embedding_bag: _embedding_bag,
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
        torch.bmm: _bmm,
        torch.Tensor.bmm: _bmm,
        torch.baddbmm: _baddbmm,
        torch.Tensor.baddbmm: _baddbmm,
        torch.einsum: _einsum,
        torch._grouped_mm: _grouped_mm,
        F.grouped_mm: _grouped_mm,
    }
)


_AXES = ("dim", "dim0", "dim1", "start_dim", "end_dim")  # keywords that functions and methods have in common


def _view(name: str) -> Callable[..., Any]:
    """Returns a function that takes a view."""

    def run(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, VirtualWeight) or not all([key in _AXES for key in kwargs]):
            return NotImplemented
        return getattr(input, name)(*args, **kwargs)

    return run


for _name in (
    "t", "transpose", "permute", "narrow", "select", "split", "chunk", "unbind", "squeeze", "reshape", "flatten",
    "unsqueeze", "movedim", "swapaxes", "swapdims",
):  # fmt: skip
    SERVED[getattr(torch, _name)] = _view(_name)
