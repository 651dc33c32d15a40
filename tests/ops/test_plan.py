"""The choice between the table of dot products and the expanded matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.ops.cpu import build
from rpqfx.ops.plan import COSTS, cheaper, cheaper_conv

CPU = torch.device("cpu")
sizes = st.tuples(
    st.integers(1, 3),
    st.integers(1, 16),
    st.sampled_from([2, 16, 256, 4096]),
    st.sampled_from([1, 8, 64, 256]),
)


def choice(shape: tuple[int, int, int, int], num_vectors: int, rows: int, device: torch.device = CPU) -> bool:
    return cheaper(shape, (shape[0], shape[1], num_vectors), rows, device) == "lookup"


def test_large_layers_contract() -> None:
    """9216 x 9216 with sub-vectors of 128 and 256 entries: measured several times faster at every batch."""
    for rows in (1, 64, 512, 8192):
        assert choice((1, 72, 256, 128), 9216, rows)


def test_a_codebook_as_large_as_the_layer_expands_when_the_batch_is_large() -> None:
    """With K = N the table costs what the dense product costs, and the gathers come on top."""
    assert not choice((1, 8, 256, 16), 256, 100_000)


def test_short_sub_vectors_expand_when_the_batch_is_large() -> None:
    """One gathered addition for every multiply-add of the dense product cannot win."""
    assert not choice((1, 512, 2, 1), 4096, 100_000)


@pytest.mark.parametrize(
    ("vectors", "dim", "d", "entries", "rows", "faster"),
    [
        (4096, 1024, 64, 256, 256, "lookup"),
        (512, 512, 2, 256, 2048, "dequantize"),
        (256, 2048, 8, 256, 2048, "dequantize"),
    ],
)
def test_the_plan_that_was_measured_several_times_faster_is_taken(
    vectors: int, dim: int, d: int, entries: int, rows: int, faster: str
) -> None:
    """``examples/bench/plans.py`` measures it."""
    assert choice((1, dim // d, entries, d), vectors, rows) is (faster == "lookup")


def conv_choice(stages: int, channels: int, entries: int, c: int, taps: int, num_vectors: int, positions: int) -> bool:
    shape = (stages, channels // c, entries, c * taps)
    return cheaper_conv(shape, (stages, channels // c, num_vectors), positions, CPU) == "lookup"


@pytest.mark.parametrize("positions", [49, 8 * 196, 10**6])
def test_convolutions_with_many_filters_for_each_entry_contract(positions: int) -> None:
    """512 3 x 3 filters and 16 or 64 entries, 2048 1 x 1 filters and 256: measured faster, forward and training."""
    assert conv_choice(1, 256, 16, 8, 9, 512, positions)
    assert conv_choice(1, 256, 64, 16, 9, 512, positions)
    assert conv_choice(1, 1024, 256, 64, 1, 2048, positions)


def test_convolutions_with_few_filters_for_each_entry_expand() -> None:
    """512 3 x 3 filters and 256 entries: measured three times slower."""
    assert not conv_choice(1, 256, 256, 8, 9, 512, 8 * 196)
    assert not conv_choice(3, 256, 64, 8, 9, 512, 8 * 196)


@given(sizes, st.integers(2, 10_000), st.integers(1, 10_000))
def test_a_larger_image_never_turns_a_convolution_towards_contracting(
    shape: tuple[int, int, int, int], num_vectors: int, positions: int
) -> None:
    def contracts(positions: int) -> bool:
        return cheaper_conv(shape, (shape[0], shape[1], num_vectors), positions, CPU) == "lookup"

    if contracts(positions + 1):
        assert contracts(positions)


@given(sizes, st.integers(2, 10_000), st.integers(1, 10_000))
def test_a_larger_batch_never_turns_towards_contracting(
    shape: tuple[int, int, int, int], num_vectors: int, rows: int
) -> None:
    """Expanding is paid once for the whole batch, so it can only gain as the batch grows."""
    if choice(shape, num_vectors, rows + 1):
        assert choice(shape, num_vectors, rows)


@given(sizes, st.integers(2, 10_000))
def test_compiled_graphs_choose_without_the_batch(shape: tuple[int, int, int, int], num_vectors: int) -> None:
    """The choice that holds for large batches holds for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "ready", lambda: True)  # as a compiled graph takes for granted
        eager = choice(shape, num_vectors, 10**9)
        eager_conv = cheaper_conv(shape, (shape[0], shape[1], num_vectors), 10**9, CPU)
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
        compiled = [choice(shape, num_vectors, rows) for rows in (1, 7, 10**9)]
        convs = [cheaper_conv(shape, (shape[0], shape[1], num_vectors), rows, CPU) for rows in (1, 7, 10**9)]
    assert compiled == [eager] * 3 and convs == [eager_conv] * 3


def test_an_empty_batch_and_an_unknown_device_have_an_answer() -> None:
    assert choice((1, 4, 16, 8), 64, 0) in (True, False)
    assert "xpu" not in COSTS
    assert choice((1, 72, 256, 128), 9216, 64, torch.device("xpu")) in (True, False)
