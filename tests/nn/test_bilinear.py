"""RPQBilinear is torch.nn.Bilinear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rpqfx.errors import InputError
from rpqfx.nn import RPQBilinear
from tests.helpers import assert_equals_dense, codebook_options, randn, randomise, seeds

sizes = st.integers(1, 5)


@given(st.data(), sizes, sizes, sizes, st.booleans(), seeds, st.sampled_from([(), (3,), (2, 3), (0,)]))
def test_equals_the_dense_layer(
    data: st.DataObject, in1: int, in2: int, out: int, bias: bool, seed: int, batch: tuple[int, ...]
) -> None:
    options = data.draw(codebook_options([(out * in1, in2)], split=True))
    layer = randomise(RPQBilinear(in1, in2, out, bias, dtype=torch.float64, **options), seed)
    dense = nn.Bilinear(in1, in2, out, bias, dtype=torch.float64)
    assert_equals_dense(layer, dense, randn(seed, *batch, in1), randn(seed + 1, *batch, in2))


def test_inputs_that_do_not_fit_are_refused() -> None:
    layer = RPQBilinear(3, 4, 5, codebook_dim=2)
    with pytest.raises(InputError, match="expected 4 features"):
        layer(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InputError, match="float64"):
        layer(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(InputError, match="complex64"):
        layer(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.complex64))
    with pytest.raises(InputError, match="expected 3 features"):
        layer(torch.zeros(2, 1), torch.zeros(2, 4))
    with pytest.raises(InputError, match="float64"):
        layer(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 4))
