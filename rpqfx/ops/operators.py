"""What forms run, as operators of their own: compilers see each as one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx import codebook, maps, steps


def _opaque(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """``run``, which compiled graphs see as one operator; ``fake`` makes a result of the right shape from shapes.

    A compiler that saw inside would find the same expansion (or the same bins) in the forward and in the backward,
    merge the two and keep the result between them; and it would have to settle on blocks for every batch at once.
    Exported graphs (torch.export's default, non-strict way) are of torch's operators alone, so that they need nothing
    of this library.
    """
    operator = torch.library.custom_op(f"rpqfx::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake or run)

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
    return torch.convolution(x, weight, None, stride, padding, dilation, transposed, output_padding, groups)


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


def _fake_gather_sum(table: Tensor, codes: Tensor) -> Tensor:
    return table.new_empty(table.shape[0], codes.shape[2], table.shape[4])


def _fake_bin_sum(y: Tensor, codes: Tensor, entries: int) -> Tensor:
    stages, sub_vectors, _ = codes.shape
    return y.new_empty(y.shape[0], stages, sub_vectors, entries, y.shape[2], dtype=steps.sum_dtype(y.dtype))


_HELD = "Tensor codebooks, Tensor codes, Tensor? signs"
_GEOMETRY = (
    "SymInt[] weight_shape, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, "
    "SymInt[] output_padding, SymInt groups"
)
contract = _opaque("contract", f"(Tensor x, {_HELD}) -> Tensor", _run_contract, _fake_contract)
contract_t = _opaque("contract_t", f"(Tensor y, {_HELD}) -> Tensor", _run_contract_t, _fake_contract_t)
accumulate = _opaque(
    "accumulate", "(Tensor x, Tensor y, Tensor codes, Tensor? signs, int books, int entries) -> Tensor",
    _run_accumulate, _fake_accumulate,
)  # fmt: skip
contract_grads = _opaque(
    "contract_grads", f"(Tensor x, Tensor y, {_HELD}) -> (Tensor, Tensor)", codebook.contract_grads,
    _fake_contract_grads,
)  # fmt: skip
matmul = _opaque("matmul", f"(Tensor x, {_HELD}) -> Tensor", _run_matmul)
matmul_t = _opaque("matmul_t", f"(Tensor y, {_HELD}) -> Tensor", _run_matmul_t)
matmul_book = _opaque(
    "matmul_book", "(Tensor x, Tensor y, Tensor codes, Tensor? signs, int books, int entries) -> Tensor",
    _run_matmul_book,
)  # fmt: skip
conv = _opaque("conv", f"(Tensor x, {_HELD}, {_GEOMETRY}) -> Tensor", _run_conv)
conv_book = _opaque(
    "conv_book", f"(Tensor x, Tensor y, Tensor codes, Tensor? signs, {_GEOMETRY}, int books, int entries) -> Tensor",
    _run_conv_book,
)  # fmt: skip
gather_sum = _opaque("gather_sum", "(Tensor table, Tensor codes) -> Tensor", maps.gather_sum, _fake_gather_sum)
bin_sum = _opaque("bin_sum", "(Tensor y, Tensor codes, int entries) -> Tensor", maps.bin_sum, _fake_bin_sum)
