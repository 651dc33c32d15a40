"""Gradients of codebooks are sums in float32, whatever the dtype that autocast multiplies in.

An entry serves many vectors and many rows, so its gradient has many terms. Added up in bfloat16, which has eight bits,
such a sum stops growing at some 256 terms.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rpqfx.nn import (
    RPQConv1d,
    RPQConv2d,
    RPQConv3d,
    RPQConvTranspose1d,
    RPQConvTranspose2d,
    RPQConvTranspose3d,
    RPQEmbedding,
    RPQLinear,
)
from rpqfx.ops import filters, products
from tests.helpers import generator, randn

UNIT = 2**-8  # half the distance from 1 to the next bfloat16
SAMPLES = 512


class Case(NamedTuple):
    """A layer whose entries have many uses, its input's shape, and how many rows ids name."""

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    ids: int | None = None


def _options(d: int) -> dict[str, Any]:
    return {"codebook_dim": d, "codebook_bits": 2}


CASES = {
    "linear": Case(lambda **kw: RPQLinear(16, 256, **_options(8), **kw), (16,)),
    "linear, columns": Case(lambda **kw: RPQLinear(256, 16, split="column", **_options(8), **kw), (256,)),
    "linear, signs and stages": Case(
        lambda **kw: RPQLinear(16, 256, signs=True, stages=2, scale=True, **_options(8), **kw), (16,)
    ),
    "embedding": Case(lambda **kw: RPQEmbedding(256, 16, **_options(8), **kw), (4,), ids=256),
    "conv": Case(lambda **kw: RPQConv2d(4, 64, 3, padding=1, **_options(9), **kw), (4, 4, 4)),
    "conv transposed": Case(lambda **kw: RPQConvTranspose2d(64, 4, 3, padding=1, **_options(9), **kw), (64, 4, 4)),
}  # fmt: skip


# By torch's own loops where oneDNN does not serve them, which depends on the CPU.
CONVOLUTIONS = {
    "1d": (lambda **kw: RPQConv1d(4, 64, 3, padding=1, **_options(12), **kw), (4, 8)),
    "3d": (lambda **kw: RPQConv3d(4, 64, 2, **_options(8), **kw), (4, 3, 3, 3)),
    "groups": (lambda **kw: RPQConv2d(8, 64, 3, padding=1, groups=4, **_options(9), **kw), (8, 4, 4)),
    "depthwise": (lambda **kw: RPQConv2d(64, 64, 3, padding=1, groups=64, **_options(9), **kw), (64, 4, 4)),
    "dilation": (lambda **kw: RPQConv2d(4, 64, 3, padding=2, dilation=2, stride=2, **_options(9), **kw), (4, 8, 8)),
    "transposed 1d": (lambda **kw: RPQConvTranspose1d(64, 4, 3, padding=1, **_options(12), **kw), (64, 8)),
    "transposed 3d": (lambda **kw: RPQConvTranspose3d(64, 4, 2, **_options(8), **kw), (64, 2, 2, 2)),
    "transposed, groups": (
        lambda **kw: RPQConvTranspose2d(64, 8, 3, padding=1, groups=4, **_options(9), **kw), (64, 4, 4)
    ),
    "transposed, output padding": (
        lambda **kw: RPQConvTranspose2d(64, 4, 3, 2, 1, output_padding=1, dilation=2, **_options(9), **kw),
        (64, 4, 4),
    ),
}  # fmt: skip


def _choose(table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cheaper", "cheaper_conv"):
        monkeypatch.setattr(products, name, lambda *args: "lookup" if table else "dequantize")


def _layer(name: str, **options: Any) -> nn.Module:
    """The layer of a case; its scale, if it has one, is such that products with bfloat16 numbers are exact."""
    torch.manual_seed(0)
    layer = CASES[name].make(**options)
    if layer.weight_rpq.scale is not None:
        layer.weight_rpq.scale.data.fill_(0.5)
    return layer


def _inputs(case: Case, layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input and a gradient of the output, bfloat16 numbers with a mean, so that sums of them grow."""
    if case.ids is not None:
        x = torch.randint(case.ids, (SAMPLES, *case.shape), generator=generator(1))
    else:
        x = (1 + 0.1 * randn(1, SAMPLES, *case.shape)).bfloat16().to(dtype)
    with torch.no_grad():
        shape = layer(x).shape
    return x, (1 + 0.1 * randn(2, *shape)).bfloat16()


def _exact(layer: nn.Module, x: Tensor, y: Tensor, each: int = SAMPLES) -> list[Tensor]:
    """The gradients of the codebooks in float64, for so many samples of the same bfloat16 inputs each."""
    exact, found = copy.deepcopy(layer).double(), []
    for some, grad in zip(x.split(each), y.split(each), strict=True):
        exact.zero_grad(set_to_none=True)
        exact(some.double() if some.is_floating_point() else some).backward(grad.double())
        found.append(exact.weight_rpq.codebooks.grad)
    return found


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def _cancelled(layer: nn.Module, x: Tensor, y: Tensor) -> float:
    """How much larger the terms of a gradient are in sum than the gradient is, which is where signs take some away."""
    plain, [exact] = copy.deepcopy(layer), _exact(layer, x, y)
    if plain.weight_rpq.signs is not None:
        plain.weight_rpq.signs.zero_()
    return float(_exact(plain, x, y)[0].abs().max() / exact.abs().max())


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("table", [True, False], ids=["lookup", "dequantize"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_codebooks_are_float32_sums_under_autocast(
    name: str, table: bool, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _choose(table, monkeypatch)
    case, layer = CASES[name], _layer(name)
    x, y = _inputs(case, layer, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        if inside:
            out.backward(y.to(out.dtype))
    if not inside:
        out.backward(y.to(out.dtype))
    grad, [exact] = layer.weight_rpq.codebooks.grad, _exact(layer, x, y)
    assert grad.dtype == torch.float32
    assert (grad != grad.bfloat16()).float().mean() > 0.2, "the sum was rounded to bfloat16"
    # Through the expanded weight each of its N x D gradients is rounded, as a dense layer's are, and then summed.
    error = _error(grad, exact)
    assert error < (1e-5 if table or case.ids else UNIT * _cancelled(layer, x, y))
    assert _bfloat16_error(name) > 20 * error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table", [True, False], ids=["lookup", "dequantize"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_filters_of_every_convolution_have_float32_sums(
    name: str, table: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch rounds each filter's gradient at all, it does so once."""
    _choose(table, monkeypatch)
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[name]
    layer = make()
    x, y = _inputs(Case(make, shape), layer, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
    out.backward(y.to(out.dtype))
    assert out.dtype == dtype
    assert _error(layer.weight_rpq.codebooks.grad, *_exact(layer, x, y)) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_batch_in_blocks_has_the_same_sums(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 copy is made of some samples at a time."""
    _choose(False, monkeypatch)
    monkeypatch.setattr(filters, "SUM_WIDE", frozenset())
    make, shape = CONVOLUTIONS[name]
    layer = make(dtype=torch.bfloat16)
    x, y = (tensor[:20] for tensor in _inputs(Case(make, shape), layer, torch.bfloat16))
    grads = []
    for size in (filters.COPY_ELEMENTS, 7 * (x[0].numel() + y[0].numel()), 1):
        monkeypatch.setattr(filters, "COPY_ELEMENTS", size)
        layer.zero_grad()
        layer(x).backward(y)
        grads.append(layer.weight_rpq.codebooks.grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=2**-7, atol=0)


@functools.cache
def _bfloat16_error(name: str) -> float:
    """What is wrong with the gradient where those of single samples are added up in bfloat16."""
    layer = _layer(name)
    x, y = _inputs(CASES[name], layer, torch.float32)
    [exact] = _exact(layer, x, y)
    total = torch.zeros_like(exact, dtype=torch.bfloat16)
    for grad in _exact(layer, x, y, each=1):
        total += grad.bfloat16()
    return _error(total, exact)


@pytest.mark.parametrize("table", [True, False], ids=["lookup", "dequantize"])
def test_micro_batches_add_up_in_float32(table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adds less than half a bfloat16 step of what is there already."""
    _choose(table, monkeypatch)
    case, layer = CASES["linear"], _layer("linear")
    x, y = _inputs(case, layer, torch.float32)
    for one, grad in zip(x.split(1), y.split(1), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(one)
        out.backward(grad)
    found, [exact] = layer.weight_rpq.codebooks.grad, _exact(layer, x, y)
    assert found.dtype == torch.float32
    assert _error(found, exact) < (1e-5 if table else UNIT / 2)


@pytest.mark.parametrize("table", [True, False], ids=["lookup", "dequantize"])
@pytest.mark.parametrize("name", CASES)
def test_a_bfloat16_layer_rounds_its_gradient_once(name: str, table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the codebooks are bfloat16 themselves, so is their gradient; the sum behind it is not."""
    _choose(table, monkeypatch)
    case, layer = CASES[name], _layer(name, dtype=torch.bfloat16)
    x, y = _inputs(case, layer, torch.bfloat16)
    layer(x).backward(y)
    grad = layer.weight_rpq.codebooks.grad
    assert grad.dtype == torch.bfloat16
    once = UNIT if table or case.ids else UNIT * _cancelled(layer, x, y)  # of the terms, as above, then of their sum
    assert _error(grad, *_exact(layer, x, y)) < (1.01 * UNIT if table or case.ids else 0.5 * UNIT + once)
