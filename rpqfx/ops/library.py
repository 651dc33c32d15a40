"""The operators that forms run: compilers see each as one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx.codebook import steps
from rpqfx.codebook.tiles import from_tiles
from rpqfx.ops import in_graphs
from rpqfx.ops.backend import choose
from rpqfx.ops.devices import check_devices
from rpqfx.ops.filters import conv_shape, filters_grad

# Holds what rpqfx.ops.rules adds to the operators.
LIBRARY = torch.library.Library("rpqfx", "FRAGMENT")


def _operator(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    compiled: Callable[..., Any] | None = None,
    kernel: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Returns ``run`` as an operator of torch, which compiled graphs see as one step; ``fake`` makes a result's shape.

    Results of operators lie in memory as ``fake`` says, whatever their inputs do: what a compiler expects of an input
    is not always so. ``compiled`` takes the place of ``run`` there, where that needs it; and ``kernel`` that of the
    whole operator, where it returns something.

    A compiler that saw inside would find the same expansion (or the same bins) in the forward and in the backward,
    merge the two and keep the result between them; and it would have to settle on blocks for every batch at once.
    Exported graphs (torch.export's default, non-strict way) are of torch's operators alone, so that they need nothing
    of this library; what torch.export traces strictly is as what is compiled.
    """
    operator = torch.library.custom_op(f"rpqfx::{name}", compiled or run, mutates_args=(), schema=schema)

    def checked(*args: Any) -> Any:
        # Torch runs the fake as soon as anything is on the meta device, and its result would be memory without values.
        check_devices(*[arg for arg in args if isinstance(arg, Tensor)])
        return fake(*args)

    operator.register_fake(checked)

    def call(*args: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():  # nor is torch.export, whose tracing runs the code itself
            return run(*args)
        result = None if kernel is None else kernel(*args)
        return operator(*args) if result is None else result

    return call


# ------------------------------------------------------------------------------------------- through tables and bins


def _run_contract(x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return choose(x, codes, codebooks, signs, bias).contract(x, codebooks.to(x.dtype), codes, signs, bias)


def _fake_contract(x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[2])


def _run_contract_t(y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
    return choose(y, codes, codebooks, signs).contract_t(y, codebooks.to(y.dtype), codes, signs=signs)


def _fake_contract_t(y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
    return y.new_empty(*y.shape[:-1], codes.shape[1] * codebooks.shape[3])


def _run_accumulate(x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Tensor:
    return choose(x, codes, y, signs).accumulate(x, y, codes, books, entries, signs)


def _fake_accumulate(x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Tensor:
    shape = (codes.shape[0], books, entries, x.shape[-1] // codes.shape[1])
    return x.new_empty(shape, dtype=steps.sum_dtype(x.dtype))


def _run_contract_grads(
    x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
) -> tuple[Tensor, Tensor]:
    return choose(x, codes, y, codebooks, signs).contract_grads(x, y, codebooks.to(x.dtype), codes, signs)


def _fake_contract_grads(
    x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(codebooks.shape, dtype=steps.sum_dtype(x.dtype))


# --------------------------------------------------------------------------------------- through the dequantized matrix


def _expanded(like: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
    return choose(like, codes, codebooks, signs).expand(codebooks.to(like.dtype), codes, None, signs)


def _run_matmul(x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, _expanded(x, codebooks, codes, signs), None if bias is None else bias.to(x.dtype))


def _run_matmul_t(y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
    return torch.matmul(y, _expanded(y, codebooks, codes, signs))


def _run_matmul_book(x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Tensor:
    weight = y.reshape(-1, y.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return choose(x, codes, y, signs).collect(weight, codes, books, entries, signs)


def _run_conv(
    x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, weight_shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    weight = _expanded(x, codebooks, codes, signs).view(tuple(weight_shape))
    y = torch.convolution(x, weight, None, stride, padding, dilation, transposed, output_padding, groups)
    return y.contiguous(memory_format=memory_format(x))  # nothing to do but where a backend has an order of its own


def _fake_conv(
    x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, weight_shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(conv_shape(x, weight_shape, stride, padding, dilation, transposed, output_padding, groups))


def _run_conv_in_graphs(*args: Any) -> Tensor:
    return _run_conv(*args).contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    """Returns channels last where the input is, so that a convolution's memory order is known without running it."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return torch.contiguous_format if x.is_contiguous() or not x.is_contiguous(memory_format=last) else last


def _run_conv_book(
    x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None, weight_shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    books: int, entries: int,
) -> Tensor:  # fmt: skip
    grad = filters_grad(y, x, weight_shape, stride, padding, dilation, transposed, output_padding, groups)
    return choose(x, codes, y, signs).collect(grad.reshape(weight_shape[0], -1), codes, books, entries, signs)


def _fake_conv_book(
    x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None, weight_shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    books: int, entries: int,
) -> Tensor:  # fmt: skip
    shape = (codes.shape[0], books, entries, math.prod(weight_shape[1:]) // codes.shape[1])
    return x.new_empty(shape, dtype=steps.sum_dtype(x.dtype))


# ------------------------------------------------------------------------------------------------- of codes in tiles


def _run_tiled(
    x: Tensor, codebooks: Tensor, tiles: Tensor, signs: Tensor | None, bias: Tensor | None, vectors: int, plan: str
) -> Tensor:  # fmt: skip
    bias = None if bias is None else bias.to(x.dtype)
    backend = choose(x, tiles, codebooks, bias)
    if hasattr(backend, "tiled"):
        return backend.tiled(x, codebooks.to(x.dtype), tiles, vectors, bias, plan)
    run = _run_contract if plan == "lookup" else _run_matmul
    return run(x, codebooks, from_tiles(tiles, vectors), None, bias)


def _fake_tiled(
    x: Tensor, codebooks: Tensor, tiles: Tensor, signs: Tensor | None, bias: Tensor | None, vectors: int, plan: str
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], vectors)


# ------------------------------------------------------------------------------------------------ of rows and of maps


def _run_expand(
    codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None, dims: Tensor | None = None
) -> Tensor:
    rows = choose(codebooks, codes, scale, signs, dims).expand(codebooks, codes, scale, signs)
    return rows if dims is None else rows.mul_(dims)


def _fake_expand(
    codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None, dims: Tensor | None = None
) -> Tensor:
    return codebooks.new_empty(codes.shape[2], codes.shape[1] * codebooks.shape[3])


def _run_lookup(
    ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None,
    dims: Tensor | None = None,
) -> Tensor:  # fmt: skip
    rows = choose(codebooks, codes, ids, scale, signs, dims).lookup(ids, codebooks, codes, scale, signs)
    return rows if dims is None else rows.mul_(dims)


def _fake_lookup(
    ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None,
    dims: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return codebooks.new_empty(*ids.shape, codes.shape[1] * codebooks.shape[3])


def _run_collect(grad: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Tensor:
    return choose(grad, codes, signs).collect(grad, codes, books, entries, signs)


def _fake_collect(grad: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Tensor:
    shape = (codes.shape[0], books, entries, grad.shape[-1] // codes.shape[1])
    return grad.new_empty(shape, dtype=steps.sum_dtype(grad.dtype))


def _run_gather_sum(table: Tensor, codes: Tensor) -> Tensor:
    return choose(table, codes).gather_sum(table, codes)


def _fake_gather_sum(table: Tensor, codes: Tensor) -> Tensor:
    return table.new_empty(table.shape[0], codes.shape[2], table.shape[4])


def _run_bin_sum(y: Tensor, codes: Tensor, entries: int, runs: tuple[Tensor, Tensor] | None = None) -> Tensor:
    return choose(y, codes).bin_sum(y, codes, entries, runs)


def _fake_bin_sum(y: Tensor, codes: Tensor, entries: int) -> Tensor:
    stages, sub_vectors, _ = codes.shape
    return y.new_empty(y.shape[0], stages, sub_vectors, entries, y.shape[2], dtype=steps.sum_dtype(y.dtype))


_HELD = "Tensor codebooks, Tensor codes, Tensor? signs"
_ROWS = "Tensor codebooks, Tensor codes, Tensor? scale, Tensor? signs, Tensor? dims=None"
_CODED = "Tensor codes, Tensor? signs"
_GEOMETRY = (
    "SymInt[] weight_shape, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, "
    "SymInt[] output_padding, SymInt groups"
)
_COUNTS = "int books, int entries"

contract = _operator(
    "contract", f"(Tensor x, {_HELD}, Tensor? bias) -> Tensor", _run_contract, _fake_contract, kernel=in_graphs.contract
)
contract_t = _operator("contract_t", f"(Tensor y, {_HELD}) -> Tensor", _run_contract_t, _fake_contract_t)
accumulate = _operator(
    "accumulate", f"(Tensor x, Tensor y, {_CODED}, {_COUNTS}) -> Tensor", _run_accumulate, _fake_accumulate
)
contract_grads = _operator(
    "contract_grads", f"(Tensor x, Tensor y, {_HELD}) -> (Tensor, Tensor)", _run_contract_grads, _fake_contract_grads
)
matmul = _operator(
    "matmul", f"(Tensor x, {_HELD}, Tensor? bias) -> Tensor", _run_matmul, _fake_contract, kernel=in_graphs.matmul
)
matmul_t = _operator("matmul_t", f"(Tensor y, {_HELD}) -> Tensor", _run_matmul_t, _fake_contract_t)
matmul_book = _operator(
    "matmul_book", f"(Tensor x, Tensor y, {_CODED}, {_COUNTS}) -> Tensor", _run_matmul_book, _fake_accumulate
)
tiled = _operator(
    "tiled", f"(Tensor x, {_HELD}, Tensor? bias, int vectors, str plan) -> Tensor", _run_tiled, _fake_tiled,
    kernel=in_graphs.tiled,
)  # fmt: skip
conv = _operator(
    "conv", f"(Tensor x, {_HELD}, {_GEOMETRY}) -> Tensor", _run_conv, _fake_conv, _run_conv_in_graphs, in_graphs.conv
)
conv_book = _operator(
    "conv_book", f"(Tensor x, Tensor y, {_CODED}, {_GEOMETRY}, {_COUNTS}) -> Tensor", _run_conv_book, _fake_conv_book
)
expand = _operator("expand", f"({_ROWS}) -> Tensor", _run_expand, _fake_expand, kernel=in_graphs.expand)
lookup = _operator("lookup", f"(Tensor ids, {_ROWS}) -> Tensor", _run_lookup, _fake_lookup, kernel=in_graphs.lookup)
collect = _operator("collect", f"(Tensor grad, {_CODED}, {_COUNTS}) -> Tensor", _run_collect, _fake_collect)
gather_sum = _operator("gather_sum", "(Tensor table, Tensor codes) -> Tensor", _run_gather_sum, _fake_gather_sum)
bin_sum = _operator("bin_sum", "(Tensor y, Tensor codes, int entries) -> Tensor", _run_bin_sum, _fake_bin_sum)
