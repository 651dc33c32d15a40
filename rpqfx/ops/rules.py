"""Rules of the operators for torch.library: gradients, and autocast, where ``torch.ops.rpqfx`` is called directly.

The library's own layers go through ``rpqfx.ops.autograd``; an operator's gradient is that of the function that runs
it, so it is right to every order, and what it saves is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rpqfx.ops import library
from rpqfx.ops.autograd import Book, Grads, Left, Out
from rpqfx.ops.conv_forms import Conv
from rpqfx.ops.forms import Contract, Form, Matmul, Tiled
from rpqfx.ops.rows import Collect, Expand, Lookup


class _Shifted:
    """A context whose inputs begin with the form, as a function of ``rpqfx.ops.autograd`` expects."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.needs_input_grad = (False, *ctx.needs_input_grad)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _by_form(name: str, function: Any, tensors: int, form: Callable[..., Form], rest: tuple[Any, ...] = ()) -> None:
    """Registers the gradient of an operator that runs a derivative of a form.

    Args:
        name: Of the operator.
        function: The derivative's function.
        tensors: How many of the operator's inputs the function takes, the first ones.
        form: Makes the form from the operator's inputs.
        rest: What else the function takes.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.length = len(inputs)
        function.setup_context(ctx, (form(*inputs), *inputs[:tensors], *rest), output)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        found = function.backward(_Shifted(ctx), *grads)[1 : 1 + tensors]
        return *found, *[None] * (ctx.length - tensors)

    torch.library.register_autograd(f"rpqfx::{name}", backward, setup_context=setup_context)


def _conv_form(books: int, entries: int, x: Tensor, *geometry: Any) -> Conv:
    weight_shape, stride, padding, dilation, transposed, output_padding, groups = geometry
    return Conv(
        books, entries, tuple(weight_shape), tuple(x.shape[2:]), tuple(stride), tuple(padding), tuple(dilation),
        transposed, tuple(output_padding), groups,
    )  # fmt: skip


for _prefix, _form in (("contract", Contract), ("matmul", Matmul)):
    _by_form(_prefix, Out, 5, lambda x, books, *_, form=_form: form(*books.shape[1:3]))
    _by_form(f"{_prefix}_t", Left, 4, lambda y, books, *_, form=_form: form(*books.shape[1:3]))
for _name, _form in (("accumulate", Contract), ("matmul_book", Matmul)):
    _by_form(_name, Book, 4, lambda x, y, codes, signs, *counts, form=_form: form(*counts))
_by_form("tiled", Out, 5, lambda x, books, codes, signs, bias, *rest: Tiled(*books.shape[1:3], *rest))
_by_form("contract_grads", Grads, 5, lambda x, y, books, *_: Contract(*books.shape[1:3]))
_by_form(
    "conv", Out, 4, lambda x, books, codes, signs, *numbers: _conv_form(*books.shape[1:3], x, *numbers), rest=(None,)
)
_by_form(
    "conv_book", Book, 4, lambda x, y, codes, signs, *numbers: _conv_form(*numbers[-2:], x, *numbers[:-2])
)  # fmt: skip


def _setup_lookup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    Lookup.setup_context(ctx, (*inputs, False), output)


def _backward_lookup(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return Lookup.backward(ctx, grad)[:-1]


torch.library.register_autograd("rpqfx::lookup", _backward_lookup, setup_context=_setup_lookup)
torch.library.register_autograd("rpqfx::expand", Expand.backward, setup_context=Expand.setup_context)
torch.library.register_autograd("rpqfx::collect", Collect.backward, setup_context=Collect.setup_context)


def _setup_gather_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, codes = inputs
    ctx.entries, ctx.dtype = table.shape[3], table.dtype
    ctx.save_for_backward(codes)


def _backward_gather_sum(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.rpqfx.bin_sum(grad, *ctx.saved_tensors, ctx.entries).to(ctx.dtype), None


def _setup_bin_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, codes, _ = inputs
    ctx.dtype = y.dtype
    ctx.save_for_backward(codes)


def _backward_bin_sum(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.rpqfx.gather_sum(grad, *ctx.saved_tensors).to(ctx.dtype), None, None


torch.library.register_autograd("rpqfx::gather_sum", _backward_gather_sum, setup_context=_setup_gather_sum)
torch.library.register_autograd("rpqfx::bin_sum", _backward_bin_sum, setup_context=_setup_bin_sum)


# ---------------------------------------------------------------------------------------------------------- autocast


def _autocast(name: str) -> None:
    """Products run in autocast's dtype, as dense ones do; sums of gradients and rows of a matrix keep theirs."""
    operator = getattr(torch.ops.rpqfx, name)

    def cast(x: Tensor, *args: Any) -> Tensor:
        kind = x.device.type
        dtype = x.dtype if x.dtype is torch.float64 else torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return operator(x.to(dtype), *args)

    for key in ("AutocastCPU", "AutocastCUDA"):
        library.LIBRARY.impl(name, cast, key)


for _name in ("contract", "contract_t", "matmul", "matmul_t", "tiled", "conv"):
    _autocast(_name)
