"""Each form's three partial derivatives are those of the dense product."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.codebook import CodebookSpec
from rpqfx.ops import conv_contract
from rpqfx.ops.conv_contract import ConvContract
from rpqfx.ops.conv_forms import Conv
from rpqfx.ops.forms import Contract, Form, Matmul
from tests.helpers import assert_same, naive_expand, randn, seeds, specs, stored


def assert_is_multilinear(form: Form, x: Tensor, tensors: tuple[Any, ...], dense: Any) -> None:
    """``out`` is the dense product; ``left`` and ``book`` are its derivatives, alone and at once."""
    books, codes, _, signs = tensors
    x, leaf = x.requires_grad_(), books.clone().requires_grad_()
    y = dense(x, naive_expand(leaf, codes, None, signs))
    grad = randn(1, *y.shape)
    grad_x, grad_books = torch.autograd.grad(y, (x, leaf), grad)
    with torch.no_grad():
        assert_same(form.out(x, books, codes, signs), y)
        assert_same(form.left(grad, books, codes, signs), grad_x)
        assert_same(form.book(x, grad, codes, signs), grad_books)
        for ours, theirs in zip(form.grads(x, grad, books, codes, signs), (grad_x, grad_books), strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("kind", [Contract, Matmul])
@given(spec=specs(scale=False), seed=seeds, batch=st.sampled_from([(), (3,), (2, 3)]))
def test_linear_forms(kind: type, spec: CodebookSpec, seed: int, batch: tuple[int, ...]) -> None:
    tensors = stored(spec, seed)
    x = randn(seed + 1, *batch, spec.dim)
    assert_is_multilinear(kind(spec.num_codebooks, spec.entries), x, tensors, F.linear)


@st.composite
def conv_cases(draw: st.DrawFn) -> dict[str, Any]:
    spatial = draw(st.integers(1, 3))
    axis = st.integers(0, 2)

    def every(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    stride, dilation = every(1, 3), every(1, 2)
    return {
        "spatial": spatial, "groups": draw(st.integers(1, 2)), "kernel": every(1, 3), "stride": stride,
        "padding": every(0, 2), "dilation": dilation, "transposed": draw(st.booleans()), "extra": draw(axis),
        "rest": tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)),
        "signs": draw(st.booleans()), "seed": draw(seeds),
    }  # fmt: skip


@given(conv_cases())
def test_convolutions(case: dict[str, Any]) -> None:
    """Plain and transposed, with every size that rounds to the same output size."""
    groups = case["groups"]
    shape = (2 * groups, 2, *case["kernel"])
    size = tuple(d * (k - 1) + 1 + case["extra"] for d, k in zip(case["dilation"], case["kernel"], strict=True))
    taps = math.prod(shape[1:])
    spec = CodebookSpec(shape[0], taps, 2 if taps % 2 == 0 else 1, entries=3, stages=2, signs=case["signs"])
    assert_is_a_convolution(Conv, spec, shape, size, groups, case)


@given(conv_cases(), st.sampled_from([(4, 1, 4), (4, 1, 2), (4, 1, 1), (4, 2, 2), (4, 4, 1)]), st.booleans())
def test_convolutions_that_contract(case: dict[str, Any], split: tuple[int, int, int], blocks: bool) -> None:
    """Entries of one channel or more, codebooks shared or not, the batch in one piece or in blocks."""
    channels, block, books = split
    shape = (5, channels, *case["kernel"])
    size = tuple(d * (k - 1) + 1 + case["extra"] for d, k in zip(case["dilation"], case["kernel"], strict=True))
    taps = math.prod(case["kernel"])
    spec = CodebookSpec(
        5,
        channels * taps,
        block * taps,
        entries=3,
        stages=2,
        num_codebooks=min(books, channels // block),
        signs=case["signs"],
    )
    with pytest.MonkeyPatch.context() as patch:
        if blocks:
            patch.setattr(conv_contract, "MAP_ELEMENTS", 1)
        assert_is_a_convolution(ConvContract, spec, shape, size, 1, case)


def assert_is_a_convolution(
    kind: type, spec: CodebookSpec, shape: tuple[int, ...], size: tuple[int, ...], groups: int, case: dict[str, Any]
) -> None:
    spatial, transposed = case["spatial"], case["transposed"]
    channels = shape[0] if transposed else shape[1] * groups
    tensors = stored(spec, case["seed"])
    rest = case["rest"] if transposed else (0,) * spatial
    settings = (case["stride"], case["padding"], case["dilation"], transposed, rest)
    form = kind(spec.num_codebooks, spec.entries, shape, size, *settings, groups)
    x = randn(case["seed"] + 1, 2, channels, *size)
    outputs = [
        (s - 1) * st_ - 2 * p + d * (k - 1) + r + 1
        for s, st_, p, d, k, r in zip(
            size, case["stride"], case["padding"], case["dilation"], case["kernel"], rest, strict=True
        )
    ]
    if transposed and min(outputs) < 1:
        return
    assert_is_multilinear(form, x, tensors, lambda x, w: torch.convolution(x, w.view(shape), None, *settings, groups))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_that_contracts_takes_an_empty_batch(transposed: bool) -> None:
    spec = CodebookSpec(5, 12, 6, entries=3, num_codebooks=1)
    books, codes, _, _ = stored(spec, 0)
    form = ConvContract(1, 3, (5, 4, 3), (7,), (1,), (1,), (1,), transposed, (0,), 1)
    x, y = (randn(1, 0, channels, 7) for channels in ((5, 4) if transposed else (4, 5)))
    assert form.out(x, books, codes, None).shape == y.shape
    assert form.left(y, books, codes, None).shape == x.shape
    assert_same(form.book(x, y, codes, None), torch.zeros_like(books))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_that_contracts_keeps_half_types(dtype: torch.dtype, transposed: bool) -> None:
    """Results have the type of the input, codebooks' gradients are float32, and all are close to those of float64."""
    spec = CodebookSpec(64, 48, 12, entries=8, stages=2)
    books, codes, _, _ = stored(spec, 0, dtype)
    form = ConvContract(4, 8, (64, 16, 3), (40,), (1,), (1,), (1,), transposed, (0,), 1)
    x, y = (randn(1, 2, channels, 40, dtype=dtype) for channels in ((64, 16) if transposed else (16, 64)))
    for run in (
        lambda t, x, y: form.out(x, t, codes, None), lambda t, x, y: form.left(y, t, codes, None),
        lambda t, x, y: form.book(x, y, codes, None), lambda t, x, y: form.grads(x, y, t, codes, None)[0],
        lambda t, x, y: form.grads(x, y, t, codes, None)[1],
    ):  # fmt: skip
        ours, exact = run(books, x, y), run(books.double(), x.double(), y.double())
        assert ours.dtype == (torch.float32 if ours.shape == books.shape else dtype)
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < (2e-2 if dtype is torch.bfloat16 else 3e-3)
