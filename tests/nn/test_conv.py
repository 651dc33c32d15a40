"""Convolutions are those of torch.nn, with every argument that they take."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rpqfx import nn as rnn
from rpqfx.errors import InputError, SpecError
from rpqfx.ops import products
from tests.helpers import assert_equals_dense, codebook_options, divisors, randn, randomise, seeds

CONVS = {1: rnn.RPQConv1d, 2: rnn.RPQConv2d, 3: rnn.RPQConv3d}
TRANSPOSED = {1: rnn.RPQConvTranspose1d, 2: rnn.RPQConvTranspose2d, 3: rnn.RPQConvTranspose3d}


@st.composite
def common(draw: st.DrawFn, spatial: int) -> dict[str, Any]:
    """Arguments of every convolution: a number for all axes, or one for each."""

    def number(low: int, high: int) -> Any:
        if draw(st.booleans()):
            return draw(st.integers(low, high))
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    groups = draw(st.integers(1, 3))
    return {
        "in_channels": groups * draw(st.integers(1, 2)), "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": number(1, 3 if spatial < 3 else 2), "stride": number(1, 3), "dilation": number(1, 2),
        "groups": groups, "bias": draw(st.booleans()), "padding": number(0, 2), "dtype": torch.float64,
    }  # fmt: skip


def every(value: Any, spatial: int) -> tuple[int, ...]:
    return (value,) * spatial if isinstance(value, int) else value


@st.composite
def whole_channels(draw: st.DrawFn, channels: int, taps: int) -> dict[str, Any]:
    """A sub-vector of any number of whole channels."""
    return {"codebook_dim": taps * draw(st.sampled_from(divisors(channels)))}


def assert_contracts_to_the_dense_layer(layer: nn.Module, dense: nn.Module, x: Tensor, **kwargs: Any) -> None:
    """Without its filters: expanding them is an error here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "cheaper_conv", lambda *args: "lookup")
        patch.setattr(products, "Conv", None)
        assert_equals_dense(layer, dense, x, **kwargs)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.few(40)  # each of two layers, forward and backward
@given(data=st.data(), seed=seeds, batch=st.sampled_from([(), (1,), (2,)]))
def test_equals_the_dense_layer(spatial: int, data: st.DataObject, seed: int, batch: tuple[int, ...]) -> None:
    """Same outputs and gradients: groups, dilation, stride, all padding modes, named padding, no batch."""
    args = data.draw(common(spatial))
    named = data.draw(st.sampled_from([None, "same", "valid"]))
    if named is not None:
        args["padding"] = named
        args["stride"] = 1 if named == "same" else args["stride"]
    args["padding_mode"] = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    kernel, dilation = (every(args[name], spatial) for name in ("kernel_size", "dilation"))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    # Reflection needs more pixels than it pads.
    size = [max(r, 3, math.ceil(r / 2) + 1) + data.draw(st.integers(0, 2)) for r in reach]
    taps = args["in_channels"] // args["groups"] * math.prod(kernel)
    options = data.draw(codebook_options([(args["out_channels"], taps)]))
    layer = randomise(CONVS[spatial](**args, **options), seed)
    dense = getattr(nn, f"Conv{spatial}d")(**args)
    x = randn(seed, *batch, args["in_channels"], *size)
    assert_equals_dense(layer, dense, x)
    if args["groups"] == 1:
        whole = data.draw(whole_channels(args["in_channels"], math.prod(kernel)))
        layer = randomise(CONVS[spatial](**args, **{**options, "num_subvectors": None, **whole}), seed)
        assert_contracts_to_the_dense_layer(layer, dense, x)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.few(40)
@given(data=st.data(), seed=seeds, batch=st.sampled_from([(), (1,), (2,)]), ask_size=st.booleans())
def test_transposed_equals_the_dense_layer(
    spatial: int, data: st.DataObject, seed: int, batch: tuple[int, ...], ask_size: bool
) -> None:
    """Same outputs and gradients: output_padding past the stride, or an output_size asked for at the call."""
    args = data.draw(common(spatial))
    names = ("kernel_size", "stride", "dilation", "padding")
    kernel, stride, dilation, padding = (every(args[name], spatial) for name in names)
    axes = list(zip(kernel, stride, dilation, padding, strict=True))
    rest = tuple(data.draw(st.integers(0, max(s, d) - 1)) for _, s, d, _ in axes)
    # Large enough that something is left after the padding.
    size = tuple(-(-2 * p // s) + 1 + data.draw(st.integers(0, 2)) for _, s, _, p in axes)
    kwargs = {}
    if ask_size:
        least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, (k, s, d, p) in zip(size, axes, strict=True)]
        extra = [data.draw(st.integers(0, s - 1)) for _, s, _, _ in axes]
        wanted = [a + b for a, b in zip(least, extra, strict=True)]
        kwargs["output_size"] = wanted
    else:
        args["output_padding"] = rest
    taps = args["out_channels"] // args["groups"] * math.prod(kernel)
    options = data.draw(codebook_options([(args["in_channels"], taps)]))
    layer = randomise(TRANSPOSED[spatial](**args, **options), seed)
    dense = getattr(nn, f"ConvTranspose{spatial}d")(**args)
    x = randn(seed, *batch, args["in_channels"], *size)
    assert_equals_dense(layer, dense, x, **kwargs)
    if args["groups"] == 1:
        whole = data.draw(whole_channels(args["out_channels"], math.prod(kernel)))
        layer = randomise(TRANSPOSED[spatial](**args, **{**options, "num_subvectors": None, **whole}), seed)
        assert_contracts_to_the_dense_layer(layer, dense, x, **kwargs)
    if ask_size:
        assert list(layer(x, output_size=kwargs["output_size"]).shape[-spatial:]) == kwargs["output_size"]


@pytest.mark.parametrize("layer", [*CONVS.values(), *TRANSPOSED.values()])
def test_inputs_that_do_not_fit_are_refused(layer: type) -> None:
    spatial = int(layer.__name__[-2])
    made = layer(4, 6, 1, codebook_dim=2, codebook_bits=1)
    size = (3,) * spatial
    with pytest.raises(InputError, match="expected 4 features"):
        made(torch.zeros(2, 5, *size))
    with pytest.raises(InputError, match=r"torch\.float64 and the codebooks are torch\.float32"):
        made(torch.zeros(2, 4, *size, dtype=torch.float64))
    with pytest.raises(InputError, match="complex64"):
        made(torch.zeros(2, 4, *size, dtype=torch.complex64))


@pytest.mark.parametrize("rank", [2, 5])
def test_an_input_of_another_rank_is_refused(rank: int) -> None:
    """As torch.nn.Conv2d, which takes three or four axes."""
    with pytest.raises((InputError, RuntimeError, ValueError)):
        rnn.RPQConv2d(4, 6, 1, codebook_dim=2, codebook_bits=1)(torch.zeros(*[4] * rank))


@pytest.mark.parametrize("layer", [*CONVS.values(), *TRANSPOSED.values()])
def test_sub_vectors_are_whole_channels_unless_a_length_is_asked_for(layer: type) -> None:
    made = layer(64, 64, 3, codebook_bits=4)
    taps = math.prod(made.kernel_size)
    assert made.weight_rpq.spec.codebook_dim % taps == 0 and made.weight_rpq.spec.codebook_dim != 64
    assert layer(64, 64, 3, codebook_bits=4, codebook_dim=64).weight_rpq.spec.codebook_dim == 64


def test_columns_are_refused() -> None:
    with pytest.raises(SpecError, match=r"RPQConv2d's vectors are the rows.*split='column' does not apply"):
        rnn.RPQConv2d(4, 6, 3, split="column")
