"""Products that are linear in an input, in an output and in the codebooks.

A form is ``sum y * out(x, W(codebooks))``. Its three partial derivatives are the three methods here: ``out`` (in
``y``), ``left`` (in ``x``) and ``book`` (in the codebooks). ``rpqfx.ops.functions`` makes them differentiable
any number of times from nothing else. Forms hold plain numbers only: tensors are always passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx import codebook


class Form(Protocol):
    """What ``rpqfx.ops.functions`` needs of a product."""

    @property
    def batched(self) -> bool:
        """Whether inputs have exactly one batch axis, the first (else: any number of leading axes)."""

    def out(self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        """The product."""

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        """Its derivative in ``x``, applied to ``y``."""

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        """Its derivative in the codebooks, applied to ``x`` and ``y``."""

    def grads(
        self, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``left`` of ``y`` and ``book``, at once."""


@dataclass(frozen=True)
class Contract:
    """``x @ W.T`` through the table of dot products."""

    books: int
    entries: int
    batched = False

    def out(self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return _contract(x, codebooks, codes, signs)

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return _contract_t(y, codebooks, codes, signs)

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return _accumulate(x, y, codes, signs, self.books, self.entries)

    def grads(
        self, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _contract_grads(x, y, codebooks, codes, signs)


@dataclass(frozen=True)
class Matmul:
    """``x @ W.T`` through the expanded matrix, made anew each time."""

    books: int
    entries: int
    batched = False

    def out(self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return _matmul(x, codebooks, codes, signs)

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return _matmul_t(y, codebooks, codes, signs)

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return _matmul_book(x, y, codes, signs, self.books, self.entries)

    def grads(
        self, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.left(y, codebooks, codes, signs), self.book(x, y, codes, signs)


@dataclass(frozen=True)
class Conv:
    """A convolution, or a transposed one, whose filters are expanded anew each time.

    Args:
        books: ``G``.
        entries: ``K``.
        weight_shape: Of the filters, ``[N, ...]``.
        input_size: Spatial size of the input; fixes which of the sizes that round to one output size it had.
        stride: Per spatial axis, as the rest.
        padding: Zeros added on both sides.
        dilation: Spacing of the filter's taps.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed convolution.
        groups: Channel groups.
    """

    books: int
    entries: int
    weight_shape: tuple[int, ...]
    input_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    batched = True

    def out(self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return _conv(
            x, codebooks, codes, signs, self.weight_shape, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups,
        )  # fmt: skip

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        x = _conv(
            y, codebooks, codes, signs, self.weight_shape, self.stride, self.padding, self.dilation,
            not self.transposed, self._adjoint_padding(y.shape[2:]), self.groups,
        )  # fmt: skip
        for axis, size in enumerate(self.input_size, 2):  # an output padding past the stride leaves more than x had
            x = x.narrow(axis, 0, size)
        return x

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return _conv_book(
            x, y, codes, signs, self.weight_shape, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups, self.books, self.entries,
        )  # fmt: skip

    def grads(
        self, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.left(y, codebooks, codes, signs), self.book(x, y, codes, signs)

    def _adjoint_padding(self, output_size: torch.Size) -> tuple[int, ...]:
        if self.transposed:
            return (0,) * len(self.stride)
        sizes = zip(
            self.input_size, output_size, self.stride, self.padding, self.dilation, self.weight_shape[2:], strict=True
        )
        return tuple(size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, s, p, d, k in sizes)


# ------------------------------------------------------------------------- what runs, as operators of their own


def _opaque(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, which compiled graphs see as one operator; ``fake`` makes a result of the right shape from shapes.

    A compiler that saw inside would find the same expansion (or the same bins) in the forward and in the backward,
    merge the two and keep the result between them; and it would have to settle on blocks for every batch at once.
    Exported graphs (torch.export's default, non-strict way) are of torch's operators alone, so that they need nothing
    of this library.
    """
    operator = torch.library.custom_op(f"rpqfx::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)

    def call(*args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # and not in torch.export, whose tracing runs the code itself
            return operator(*args)
        return run(*args)

    return call


def _run_contract(x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
    return codebook.contract(x, codebooks, codes, signs=signs)


def _fake_contract(x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[2])


def _run_contract_t(y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
    return codebook.contract_t(y, codebooks, codes, signs=signs)


def _fake_contract_t(y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
    return y.new_empty(*y.shape[:-1], codes.shape[1] * codebooks.shape[3])


def _run_accumulate(x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Tensor:
    return codebook.accumulate(x, y, codes, books, entries, signs)


def _fake_accumulate(x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Tensor:
    return x.new_empty(codes.shape[0], books, entries, x.shape[-1] // codes.shape[1])


def _fake_contract_grads(
    x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(codebooks.shape)


def _run_matmul(x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
    return F.linear(x, codebook.expand(codebooks, codes, signs=signs))


def _run_matmul_t(y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
    return torch.matmul(y, codebook.expand(codebooks, codes, signs=signs))


def _run_matmul_book(x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None, books: int, entries: int) -> Tensor:
    weight = y.reshape(-1, y.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return codebook.collect(weight, codes, books, entries, signs)


def _run_conv(
    x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, weight_shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    weight = codebook.expand(codebooks, codes, signs=signs).view(tuple(weight_shape))
    y = torch.convolution(x, weight, None, stride, padding, dilation, transposed, output_padding, groups)
    return y.contiguous(memory_format=_memory_format(x))  # nothing to do but where a backend has an order of its own


def _fake_conv(
    x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, weight_shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """Counted out, since torch's own picks a backend by the batch's size and so binds a compiled graph to it."""
    geometry = zip(x.shape[2:], weight_shape[2:], stride, padding, dilation, output_padding, strict=True)
    sizes = [
        (n - 1) * s - 2 * p + d * (k - 1) + more + 1 if transposed else (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d, more in geometry
    ]
    shape = (x.shape[0], weight_shape[1] * groups if transposed else weight_shape[0], *sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    """Channels last where the input is, so that the order of a convolution's result is known without running it."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return torch.contiguous_format if x.is_contiguous() or not x.is_contiguous(memory_format=last) else last


def _run_conv_book(
    x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None, weight_shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    books: int, entries: int,
) -> Tensor:  # fmt: skip
    weight = x.new_empty(()).expand(tuple(weight_shape))
    _, grad, _ = torch.ops.aten.convolution_backward(
        y, x, weight, None, stride, padding, dilation, transposed, output_padding, groups, (False, True, False)
    )
    return codebook.collect(grad.reshape(weight_shape[0], -1), codes, books, entries, signs)


def _fake_conv_book(
    x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None, weight_shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    books: int, entries: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(codes.shape[0], books, entries, math.prod(weight_shape[1:]) // codes.shape[1])


_HELD = "Tensor codebooks, Tensor codes, Tensor? signs"
_GEOMETRY = (
    "SymInt[] weight_shape, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, "
    "SymInt[] output_padding, SymInt groups"
)
_contract = _opaque("contract", f"(Tensor x, {_HELD}) -> Tensor", _run_contract, _fake_contract)
_contract_t = _opaque("contract_t", f"(Tensor y, {_HELD}) -> Tensor", _run_contract_t, _fake_contract_t)
_accumulate = _opaque(
    "accumulate", "(Tensor x, Tensor y, Tensor codes, Tensor? signs, int books, int entries) -> Tensor",
    _run_accumulate, _fake_accumulate,
)  # fmt: skip
_contract_grads = _opaque(
    "contract_grads", f"(Tensor x, Tensor y, {_HELD}) -> (Tensor, Tensor)", codebook.contract_grads,
    _fake_contract_grads,
)  # fmt: skip
_matmul = _opaque("matmul", f"(Tensor x, {_HELD}) -> Tensor", _run_matmul, _fake_contract)
_matmul_t = _opaque("matmul_t", f"(Tensor y, {_HELD}) -> Tensor", _run_matmul_t, _fake_contract_t)
_matmul_book = _opaque(
    "matmul_book", "(Tensor x, Tensor y, Tensor codes, Tensor? signs, int books, int entries) -> Tensor",
    _run_matmul_book, _fake_accumulate,
)  # fmt: skip
_conv = _opaque("conv", f"(Tensor x, {_HELD}, {_GEOMETRY}) -> Tensor", _run_conv, _fake_conv)
_conv_book = _opaque(
    "conv_book", f"(Tensor x, Tensor y, Tensor codes, Tensor? signs, {_GEOMETRY}, int books, int entries) -> Tensor",
    _run_conv_book, _fake_conv_book,
)  # fmt: skip
