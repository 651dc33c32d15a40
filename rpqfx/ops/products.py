"""The differentiable operations that layers are made of.

Every function takes the four tensors of ``rpqfx.codebook``, and the factors of the matrix's columns, as one
``Tensors``, picks a plan, follows autocast as the dense operation does, and saves nothing of weight size for backward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rpqfx import codebook
from rpqfx.codebook.tiles import TILE, from_tiles, pick
from rpqfx.errors import InputError, SpecError
from rpqfx.ops import library
from rpqfx.ops.autocast import autocast_dtype
from rpqfx.ops.autograd import product, product_t
from rpqfx.ops.conv_contract import ConvContract
from rpqfx.ops.conv_forms import Conv
from rpqfx.ops.forms import Contract, Form, Matmul, Tiled
from rpqfx.ops.library import memory_format
from rpqfx.ops.mapped import Slow
from rpqfx.ops.plan import Plan, cheaper, cheaper_conv
from rpqfx.ops.rows import Expand, look_up


class Tensors(NamedTuple):
    """The stored tensors of one matrix (axes as in ``rpqfx.codebook``).

    Args:
        codebooks: ``[R, G, K, d]``.
        codes: ``[R, M, N]``.
        scale: ``[N]`` or None.
        signs: ``[R, M, ceil(N/8)]`` or None.
        column_scale: ``[D / share]``, a factor for each ``share`` columns in a row, or None.
        tiled: ``N`` where the codes lie in tiles (``rpqfx.codebook.tiles``), else 0.
    """

    codebooks: Tensor
    codes: Tensor
    scale: Tensor | None = None
    signs: Tensor | None = None
    column_scale: Tensor | None = None
    tiled: int = 0

    @property
    def num_vectors(self) -> int:
        """``N``."""
        return self.tiled or self.codes.shape[2]

    def untiled(self) -> Tensors:
        """Returns the same, with codes ``[R, M, N]``."""
        return self._replace(codes=from_tiles(self.codes, self.tiled), tiled=0) if self.tiled else self

    @property
    def share(self) -> int:
        """How many columns have one factor; 0 without factors."""
        if self.column_scale is None:
            return 0
        return self.codes.shape[1] * self.codebooks.shape[3] // self.column_scale.shape[0]

    @property
    def dims(self) -> Tensor | None:
        """``[D]``, the factor of each column, or None."""
        return None if self.column_scale is None else _repeat(self.column_scale, self.share)

    def detach(self) -> Tensors:
        """Returns the same tensors, without a gradient."""
        scale, signs, dims = (t if t is None else t.detach() for t in (self.scale, self.signs, self.column_scale))
        return Tensors(self.codebooks.detach(), self.codes, scale, signs, dims, self.tiled)

    def vectors(self, index: Tensor | slice) -> Tensors:
        """Returns the same matrix, with some of its vectors only (see ``codebook.select_vectors``)."""
        if not self.tiled:
            some = codebook.select_vectors(index, self.codes, self.scale, self.signs)
            return Tensors(self.codebooks, *some, self.column_scale)
        if isinstance(index, Tensor):
            scale = None if self.scale is None else self.scale.index_select(0, index)
            return Tensors(self.codebooks, pick(self.codes, index), scale, None, self.column_scale)
        start, stop, step = codebook.range_of(index, self.tiled)
        if step != 1 or start % TILE or stop == start:
            return self.untiled().vectors(index)
        tiles, scale = self.codes[start // TILE : -(-stop // TILE)], self.scale
        return self._replace(codes=tiles, scale=scale if scale is None else scale[start:stop], tiled=stop - start)

    def sub_vectors(self, index: Tensor | slice) -> Tensors:
        """Returns some sub-vectors of every vector (see ``codebook.select_sub_vectors``)."""
        books, codes, signs = codebook.select_sub_vectors(index, self.codebooks, self.codes, self.signs)
        return Tensors(books, codes, self.scale, signs, self._column_scale_of(index), self.tiled)

    def _column_scale_of(self, index: Tensor | slice) -> Tensor | None:
        """Returns the factors of some sub-vectors' columns, one each unless all that share one are there."""
        if self.column_scale is None:
            return None
        d, share = self.codebooks.shape[3], self.share
        if isinstance(index, slice):
            start, stop, step = codebook.range_of(index, self.codes.shape[1])
            if step == 1 and start * d % share == 0 and stop * d % share == 0:
                return self.column_scale[start * d // share : stop * d // share]
        return _repeat(self.column_scale, share).view(-1, d)[index].reshape(-1)


def expand(weight: Tensors, grad_factor: float = 1.0) -> Tensor:
    """Returns the matrix ``[N, D]`` (see ``rpqfx.codebook.expand``)."""
    weight = weight.untiled()
    return Expand.apply(_slow(weight.codebooks, grad_factor), weight.codes, weight.scale, weight.signs, weight.dims)


def lookup(ids: Tensor, weight: Tensors, grad_factor: float = 1.0, sparse: bool = False) -> Tensor:
    """Returns rows ``[*ids.shape, D]``; ``sparse`` asks for a sparse gradient of the codebooks."""
    if weight.tiled and not sparse:  # the codes of these rows alone
        some = weight.vectors(ids.reshape(-1))
        return expand(some, grad_factor).view(*ids.shape, -1)
    weight = weight.untiled()
    books = _slow(weight.codebooks, grad_factor)
    return look_up(ids, books, weight.codes, weight.scale, weight.signs, weight.dims, sparse)


def linear(
    x: Tensor, weight: Tensors, bias: Tensor | None = None, grad_factor: float = 1.0, plan: Plan = "auto"
) -> Tensor:
    """Returns ``x @ W.T + bias``: ``[..., D]`` to ``[..., N]``."""
    x, scale, dims = _prepare(x, weight, weight.codes.shape[1] * weight.codebooks.shape[3])
    x = x if dims is None else x * _repeat(dims, weight.share)
    books, inside = _slow(weight.codebooks, grad_factor), bias if scale is None else None
    y = product(_form(x, weight, plan), x, books, weight.codes, weight.signs, inside)
    return y if scale is None else _scaled(y, scale, bias)


def linear_t(y: Tensor, weight: Tensors, grad_factor: float = 1.0, plan: Plan = "auto") -> Tensor:
    """Returns ``y @ W``: ``[..., N]`` to ``[..., D]``."""
    y, scale, dims = _prepare(y, weight, weight.num_vectors)
    y = y if scale is None else y * scale
    x = product_t(_form(y, weight, plan), y, _slow(weight.codebooks, grad_factor), weight.codes, weight.signs)
    return x if dims is None else x * _repeat(dims, weight.share)


def conv(
    x: Tensor,
    weight: Tensors,
    weight_shape: tuple[int, ...],
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    transposed: bool = False,
    output_padding: tuple[int, ...] | None = None,
    grad_factor: float = 1.0,
    plan: Plan = "auto",
) -> Tensor:
    """Runs a convolution whose filters are the vectors (of a transposed one: its input channels').

    Args:
        x: ``[B, C, *spatial]`` or, without a batch, ``[C, *spatial]``.
        weight: Its tensors; ``N`` is ``weight_shape[0]``.
        weight_shape: Of the dense weight.
        bias: One number a channel of the result, or None.
        stride: Per spatial axis, as the rest.
        padding: Zeros added on both sides.
        dilation: Spacing of the filter's taps.
        groups: Channel groups.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed convolution.
        grad_factor: What the gradient of the codebooks is multiplied by.
        plan: How it runs. ``"lookup"`` needs sub-vectors of whole channels (``d`` a multiple of the taps) and
            one channel group; where it cannot be, the filters are dequantized.

    Returns:
        As the dense convolution.

    Raises:
        InputError: If channels or dtype of ``x`` do not fit.
        SpecError: If taps of one channel have different ``column_scale`` factors.
    """
    if weight.share % math.prod(weight_shape[2:]):
        raise SpecError(
            f"the {math.prod(weight_shape[2:])} taps of a channel have one factor, but {weight.share} elements of a "
            "filter share one; give the spec a column_scale_group that is a multiple of the taps"
        )
    weight = weight.untiled()
    channels = weight_shape[0] if transposed else weight_shape[1] * groups
    x, scale, dims = _prepare(x, weight, channels, axis=-1 - len(stride))
    books = _slow(weight.codebooks, grad_factor)
    if x.dim() == len(stride) + 1:
        return conv(
            x[None], weight, weight_shape, bias, stride=stride, padding=padding, dilation=dilation, groups=groups,
            transposed=transposed, output_padding=output_padding, grad_factor=grad_factor, plan=plan,
        )[0]  # fmt: skip
    plan = conv_plan(x, weight, weight_shape, stride, groups, transposed, plan)
    if plan == "dequantize" and torch.compiler.is_compiling() and not torch.is_grad_enabled():
        # Nothing is kept for a backward pass here, and a compiler that sees the convolution chooses its layout.
        rows = library.expand(weight.codebooks, weight.codes, weight.scale, weight.signs, weight.dims).to(x.dtype)
        shift = None if bias is None else bias.to(x.dtype)
        output_padding = output_padding or (0,) * len(stride)
        return torch.convolution(
            x, rows.view(weight_shape), shift, stride, padding, dilation, transposed, output_padding, groups
        )
    per_vector = None if scale is None else scale.view(-1, *[1] * len(stride))
    per_channel = None if dims is None else _channels(dims, weight.share, weight_shape, groups)
    before, after = (per_vector, per_channel) if transposed else (per_channel, per_vector)
    x = x if before is None else x * before
    form = (ConvContract if plan == "lookup" else Conv)(
        books.shape[1], books.shape[2], weight_shape, tuple(x.shape[2:]), stride, padding, dilation, transposed,
        output_padding or (0,) * len(stride), groups,
    )  # fmt: skip
    inside = bias if after is None else None
    y = product(form, x, books, weight.codes, weight.signs, inside)
    y = y.contiguous(memory_format=memory_format(x))  # as torch's convolutions do: dropout follows it
    if after is None:
        return y
    return _scaled(y, after, None if bias is None else bias.view(after.shape))


def conv_plan(
    x: Tensor, weight: Tensors, weight_shape: tuple[int, ...], stride: tuple[int, ...], groups: int, transposed: bool,
    plan: Plan,
) -> Plan:  # fmt: skip
    """Returns the way that a convolution runs: ``"dequantize"`` where entries are not filters of whole channels.

    Args:
        x: ``[B, C, *spatial]``.
        weight: Its tensors, codes ``[R, M, N]``.
        weight_shape: The shape of the dense weight.
        stride: Steps along the spatial axes.
        groups: The number of channel groups.
        transposed: Whether it is a transposed convolution.
        plan: The plan; ``"auto"`` follows the cost model.
    """
    if not ConvContract.fits(weight.codebooks.shape[3], weight_shape, groups):
        return "dequantize"
    if plan != "auto":
        return plan
    positions = x.numel() // x.shape[1] // (1 if transposed else math.prod(stride))  # of the vectors' maps, about
    return cheaper_conv(weight.codebooks.shape, weight.codes.shape, positions, x.device, x.dtype)


def scale_grad(x: Tensor, factor: Tensor | float) -> Tensor:
    """Returns ``x``, to the last bit, with its gradient multiplied by ``factor`` (broadcast over ``x``)."""
    fixed = x.detach()
    return fixed + (x - fixed) * factor


def _slow(codebooks: Tensor, grad_factor: float) -> Tensor:
    return codebooks if grad_factor == 1.0 else Slow.apply(codebooks, grad_factor)


def _scaled(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y = y * scale
    return y if bias is None else y + bias.to(y.dtype)


def _repeat(factors: Tensor, times: int) -> Tensor:
    """Returns each factor so many times in a row."""
    return factors if times == 1 else factors[:, None].expand(-1, times).reshape(-1)


def _channels(dims: Tensor, share: int, weight_shape: tuple[int, ...], groups: int) -> Tensor:
    """Returns factors of a filter's channels, for every channel group: ``[C, 1, ...]``."""
    one = _repeat(dims, share // math.prod(weight_shape[2:]))
    every = one if groups == 1 else one.expand(groups, -1).reshape(-1)
    return every.view(-1, *[1] * (len(weight_shape) - 2))


def _form(x: Tensor, weight: Tensors, plan: Plan) -> Form:
    shape = weight.codebooks.shape
    if weight.tiled:
        return Tiled(shape[1], shape[2], weight.tiled, plan)
    if plan == "auto":
        plan = cheaper(shape, weight.codes.shape, x.numel() // x.shape[-1], x.device, x.dtype)
    return (Contract if plan == "lookup" else Matmul)(shape[1], shape[2])


def _prepare(x: Tensor, weight: Tensors, width: int, axis: int = -1) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Checks the input; casts it, the scale and the ``column_scale`` as autocast would for the dense operation."""
    books, scale, dims = weight.codebooks, weight.scale, weight.column_scale
    if x.dim() < -axis or x.shape[axis] != width:
        raise InputError(f"expected {width} features in dimension {axis} of the input, got shape {tuple(x.shape)}")
    if x.is_complex():
        raise InputError(f"codebooks hold real numbers, got {x.dtype} input; pass its real and imaginary parts apart")
    if not x.is_floating_point():
        raise InputError(f"expected floating-point input, got {x.dtype}; ids are for lookup")
    dtype = autocast_dtype(x.device)
    if dtype is not None and torch.float64 not in (x.dtype, books.dtype):
        return x.to(dtype), None if scale is None else scale.to(dtype), None if dims is None else dims.to(dtype)
    if x.dtype != books.dtype:
        raise InputError(f"the input is {x.dtype} and the codebooks are {books.dtype}; convert one with .to(dtype)")
    return x, scale, dims
