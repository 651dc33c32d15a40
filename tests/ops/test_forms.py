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
from rpqfx.ops.conv_forms import Conv
from rpqfx.ops.forms import Contract, Form, Matmul
from tests.helpers import assert_same, naive_expand, randn, seeds, specs, stored


def assert_is_multilinear(form: Form, x: Tensor, tensors: tuple[Any, ...], dense: Any) -> None:
    """``out`` is the dense product; ``left`` and ``book`` are its derivatives."""
    books, codes, _, signs = tensors
    x, leaf = x.requires_grad_(), books.clone().requires_grad_()
    y = dense(x, naive_expand(leaf, codes, None, signs))
    grad = randn(1, *y.shape)
    grad_x, grad_books = torch.autograd.grad(y, (x, leaf), grad)
    with torch.no_grad():
        assert_same(form.out(x, books, codes, signs), y)
        assert_same(form.left(grad, books, codes, signs), grad_x)
        assert_same(form.book(x, grad, codes, signs), grad_books)


@pytest.mark.parametrize("kind", [Contract, Matmul])
@given(spec=specs(scale=False), seed=seeds, batch=st.sampled_from([(), (3,), (2, 3)]))
def test_linear_forms(kind: type, spec: CodebookSpec, seed: int, batch: tuple[int, ...]) -> None:
    tensors = stored(spec, seed)
    x = randn(seed + 1, *batch, spec.dim)
    assert_is_multilinear(kind(spec.books, spec.entries), x, tensors, F.linear)


@st.composite
def conv_cases(draw: st.DrawFn) -> dict[str, Any]:
    spatial = draw(st.integers(1, 2))
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
    groups, spatial, transposed = case["groups"], case["spatial"], case["transposed"]
    shape = (2 * groups, 2, *case["kernel"])
    channels = shape[0] if transposed else shape[1] * groups
    size = tuple(d * (k - 1) + 1 + case["extra"] for d, k in zip(case["dilation"], case["kernel"], strict=True))
    taps = math.prod(shape[1:])
    spec = CodebookSpec(shape[0], taps, 2 if taps % 2 == 0 else 1, entries=3, stages=2, signs=case["signs"])
    tensors = stored(spec, case["seed"])
    rest = case["rest"] if transposed else (0,) * spatial
    settings = (case["stride"], case["padding"], case["dilation"], transposed, rest)
    form = Conv(spec.books, spec.entries, shape, size, *settings, groups)
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
