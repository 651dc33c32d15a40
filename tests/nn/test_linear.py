"""RPQLinear is torch.nn.Linear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rpqfx.errors import InputError, SpecError
from rpqfx.nn import RPQLinear
from rpqfx.ops import products
from tests.helpers import assert_equals_dense, codebook_options, randn, randomise, seeds


@given(
    st.data(), st.integers(1, 12), st.integers(1, 12), st.booleans(), seeds, st.booleans(),
    st.sampled_from([(), (1,), (5,), (2, 3), (2, 0)]),
)  # fmt: skip
def test_equals_the_dense_layer(
    data: st.DataObject, inputs: int, outputs: int, bias: bool, seed: int, table: bool, batch: tuple[int, ...]
) -> None:
    """Same outputs and gradients as torch.nn.Linear holding the expanded weight, by either plan."""
    options = data.draw(codebook_options([(outputs, inputs)], split=True))
    layer = randomise(RPQLinear(inputs, outputs, bias, dtype=torch.float64, **options), seed)
    dense = nn.Linear(inputs, outputs, bias, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "cheaper", lambda *args: "lookup" if table else "dequantize")
        assert_equals_dense(layer, dense, randn(seed, *batch, inputs))


def test_a_frozen_layer_passes_gradients_through() -> None:
    layer = randomise(RPQLinear(6, 4, codebook_dim=3, dtype=torch.float64), 0).requires_grad_(False)
    assert_equals_dense(layer, nn.Linear(6, 4, dtype=torch.float64), randn(1, 3, 6))


def test_split_says_whether_vectors_are_rows_or_columns() -> None:
    row, column = (RPQLinear(48, 32, codebook_dim=8, split=split).weight_rpq for split in ("row", "column"))
    assert (row.spec.num_vectors, row.spec.dim) == (32, 48)
    assert (column.spec.num_vectors, column.spec.dim) == (48, 32)
    assert row().shape == column().shape == (32, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_dim": 5}, "codebook_dim 5 does not divide the vector length 12"),
        ({"num_subvectors": 5}, "num_subvectors 5 does not divide"),
        ({"codebook_bits": 9}, "use at most 3 bits"),
        ({"stages": 0}, "stages must be at least 1"),
    ],
)
def test_codebooks_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        RPQLinear(12, 8, **options)


@pytest.mark.parametrize("split", ["row", "column"])
def test_inputs_that_do_not_fit_are_refused(split: str) -> None:
    layer = RPQLinear(12, 8, codebook_dim=4, split=split)
    with pytest.raises(InputError, match=r"expected 12 features .* \(3, 8\)"):
        layer(torch.zeros(3, 8))
    with pytest.raises(InputError, match=r"float64 and the codebooks are torch.float32; convert one"):
        layer(torch.zeros(3, 12, dtype=torch.float64))
    with pytest.raises(InputError, match="complex64"):
        layer(torch.zeros(3, 12, dtype=torch.complex64))
