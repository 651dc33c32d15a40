"""Products and convolutions that are one call of a kernel are those of the way in several steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rpqfx import CodebookSpec
from rpqfx import nn as rnn
from rpqfx.nn import RPQWeight
from rpqfx.nn import weight_products as weights
from rpqfx.ops.cpu import build
from tests.helpers import generator, randn, randomise, seeds

needs_kernels = pytest.mark.skipif(not build.ready(), reason="no compiled kernels on this machine")
LAYERS = (rnn.RPQConv1d, rnn.RPQConv2d, rnn.RPQConvTranspose1d, rnn.RPQConvTranspose2d)


def both(call: Any, name: str) -> tuple[Tensor, Tensor]:
    """Returns the result of one call of a kernel, and that of several steps."""
    taken = []
    run = getattr(weights, name)

    def spy(*args: Any) -> Tensor | None:
        taken.append(run(*args))
        return taken[-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(weights, name, spy)
        once = call()
        assert [result is not None for result in taken] == [True]
        patch.setattr(weights, name, lambda *args: None)
        return once, call()


def assert_near(once: Tensor, several: Tensor, tolerance: float) -> None:
    assert once.shape == several.shape and once.dtype is several.dtype
    assert (once - several).abs().max() <= tolerance * several.abs().max() + 1e-6


@needs_kernels
@settings(max_examples=60)
@given(
    kind=st.sampled_from(LAYERS), seed=seeds, groups=st.integers(1, 3), stride=st.integers(1, 2),
    d=st.sampled_from([1, 2, 4, 6]), stages=st.integers(1, 3), factors=st.booleans(), signs=st.booleans(),
    bias=st.booleans(), kernel=st.sampled_from([1, 3]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    plan=st.sampled_from(["auto", "dequantize"]),
)  # fmt: skip
def test_a_convolution_in_one_call_is_that_in_several(
    kind: type[nn.Module], seed: int, groups: int, stride: int, d: int, stages: int, factors: bool, signs: bool,
    bias: bool, kernel: int, dtype: torch.dtype, plan: str,
):  # fmt: skip
    spatial = 1 if kind.__name__.endswith("1d") else 2
    options: dict[str, Any] = {
        "codebook_dim": d,
        "codebook_bits": 3,
        "stages": stages,
        "signs": signs,
        "scale": factors,
    }
    if factors:
        options["column_scale"] = True
    layer = randomise(
        kind(12 * groups, 24 * groups, kernel, stride, 1, groups=groups, bias=bias, dtype=dtype, **options), seed
    )
    layer.weight_rpq.plan = "dequantize" if plan == "dequantize" or not _expands(d, kernel**spatial, groups) else "auto"
    x = randn(seed, 2, 12 * groups, *(7,) * spatial, dtype=torch.float32).to(dtype)
    assert_near(*both(lambda: layer(x), "conv_at_once"), 1e-5 if dtype is torch.float32 else 4e-2)


def _expands(d: int, taps: int, groups: int) -> bool:
    """Whether entries are not filters of whole channels, so that any plan expands."""
    return groups > 1 or d % taps != 0


@needs_kernels
@settings(max_examples=40)
@given(
    seed=seeds, rows=st.sampled_from([1, 5, 40]), d=st.sampled_from([2, 4, 6, 8]), stages=st.integers(2, 6),
    factors=st.booleans(), bias=st.booleans(), vectors=st.sampled_from([33, 64, 150]),
)  # fmt: skip
def test_a_product_in_one_call_is_that_in_several(
    seed: int, rows: int, d: int, stages: int, factors: bool, bias: bool, vectors: int
):
    spec = CodebookSpec(vectors, 24, d, 16, stages, 1, scale=factors, column_scale_group=int(factors), tiled=True)
    weight = randomise(RPQWeight(spec), seed)
    weight.codes = torch.randint(16, spec.codes_shape, generator=generator(seed)).to(spec.code_dtype)
    x = randn(seed, rows, 24, dtype=torch.float32)
    shift = randn(seed, vectors, dtype=torch.float32) if bias else None
    assert_near(*both(lambda: weight.linear(x, shift), "linear_at_once"), 1e-3)


@needs_kernels
def test_a_convolution_that_contracts_or_learns_is_not_one_call():
    layer = rnn.RPQConv2d(8, 64, 3, codebook_dim=9, codebook_bits=2, plan="lookup")
    x = torch.randn(1, 8, 5, 5)
    for learns in (False, True):
        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(learns):
            patch.setattr("rpqfx.ops.at_once.kernels.conv", None)  # would raise where it is called
            assert layer(x).shape == (1, 64, 3, 3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert rnn.RPQConv2d(8, 64, 3, codebook_dim=2, codebook_bits=2)(x).dtype is torch.bfloat16
