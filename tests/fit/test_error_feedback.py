"""Error feedback: as near as nearest coding without inputs, nearer to what inputs see with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.fit.error_feedback import encode
from tests.helpers import generator, naive_expand, randn, seeds

shapes = (st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(2, 9))


def inputs(seed: int, dim: int, rows: int = 64) -> Tensor:
    """The second moment of inputs that go together."""
    x = randn(seed, rows, max(1, dim // 3)) @ randn(seed + 1, max(1, dim // 3), dim) + 0.1 * randn(seed + 2, rows, dim)
    return x.t() @ x / rows


def loss(matrix: Tensor, decoded: Tensor, moment: Tensor, outputs: Tensor | None = None) -> float:
    rest = matrix - decoded
    return float(((rest @ moment) * (rest if outputs is None else outputs @ rest)).sum())


@given(seeds, *shapes)
def test_without_inputs_each_code_is_the_nearest(seed: int, rows: int, count: int, d: int, entries: int) -> None:
    matrix, books = randn(seed, rows, count * d), randn(seed + 1, 1, 1, entries, d)
    coded = encode(matrix, books)
    parts = matrix.view(rows, count, 1, d)
    distances = (parts - books[0, 0]).square().sum(-1)
    assert torch.equal(coded.codes[0].t(), distances.argmin(-1))
    assert torch.equal(coded.corrected, matrix)


@given(seeds, *shapes, st.floats(0.1, 100))
def test_inputs_that_do_not_go_together_change_nothing(
    seed: int, rows: int, count: int, d: int, entries: int, size: float
) -> None:
    matrix, books = randn(seed, rows, count * d), randn(seed + 1, 1, 1, entries, d)
    coded = encode(matrix, books, size * torch.eye(count * d, dtype=torch.float64))
    assert torch.equal(coded.codes, encode(matrix, books).codes)
    torch.testing.assert_close(coded.corrected, matrix)


@given(seeds, st.integers(1, 2), st.sampled_from([1, 2, 4]), st.booleans())
def test_what_is_decoded_are_the_entries_of_the_codes(seed: int, stages: int, groups: int, known: bool) -> None:
    matrix, books = randn(seed, 6, 12), randn(seed + 1, stages, groups, 5, 3)
    coded = encode(matrix, books, inputs(seed + 2, 12) if known else None)
    assert coded.codes.shape == (stages, 4, 6) and coded.codes.dtype == torch.int64 and coded.codes.is_contiguous()
    torch.testing.assert_close(coded.decoded, naive_expand(books, coded.codes))


@pytest.mark.parametrize("d", [1, 2, 4])
def test_feedback_comes_nearer_to_what_inputs_see(d: int) -> None:
    nearer = 0
    ratios = []
    for seed in range(30):
        matrix, books, moment = randn(seed, 24, 32), randn(seed + 1, 1, 1, 16, d), inputs(seed + 2, 32)
        with_inputs = loss(matrix, encode(matrix, books, moment).decoded, moment)
        without = loss(matrix, encode(matrix, books).decoded, moment)
        nearer += with_inputs < without
        ratios.append(with_inputs / without)
    assert nearer == 30 and sum(ratios) / 30 < 0.6


@given(seeds, st.sampled_from([3, 16, 40, 200]), st.floats(0.01, 100), st.booleans())
def test_outputs_that_do_not_go_together_change_nothing(seed: int, rows: int, size: float, alike: bool) -> None:
    matrix, books, moment = randn(seed, rows, 12), randn(seed + 1, 2, 1, 5, 3), inputs(seed + 2, 12)
    outputs = torch.diag(torch.full((rows,), size) if alike else size * (0.1 + randn(seed + 3, rows).square()))
    found, wanted = encode(matrix, books, moment, outputs), encode(matrix, books, moment)
    assert torch.equal(found.codes, wanted.codes)
    torch.testing.assert_close(found.corrected, wanted.corrected)


@given(seeds, st.sampled_from([3, 16, 40]))
def test_what_is_decoded_are_the_entries_with_outputs_too(seed: int, rows: int) -> None:
    matrix, books = randn(seed, rows, 12), randn(seed + 1, 2, 2, 5, 3)
    coded = encode(matrix, books, inputs(seed + 2, 12), inputs(seed + 3, rows))
    torch.testing.assert_close(coded.decoded, naive_expand(books, coded.codes))


def test_rows_come_nearer_to_what_outputs_feel() -> None:
    ratios = []
    for seed in range(20):
        matrix, books, moment = randn(seed, 64, 16), randn(seed + 1, 1, 1, 16, 2), inputs(seed + 2, 16)
        outputs = inputs(seed + 3, 64, 400) + 2 * torch.eye(64, dtype=torch.float64)
        both = loss(matrix, encode(matrix, books, moment, outputs).decoded, moment, outputs)
        ratios.append(both / loss(matrix, encode(matrix, books, moment).decoded, moment, outputs))
    assert max(ratios) < 1 and sum(ratios) / 20 < 0.7


@pytest.mark.few(25)
@given(seeds, st.sampled_from([17, 40, 150]))
def test_open_rows_move_to_the_least_that_is_left_to_them(seed: int, rows: int) -> None:
    """Each block of rows is coded as if the rows after it could be any numbers."""
    matrix, books, moment = randn(seed, rows, 8), randn(seed + 1, 1, 1, 4, 2), inputs(seed + 2, 8)
    outputs = inputs(seed + 3, rows, 500)
    coded = encode(matrix, books, moment, outputs)
    order = outputs.diagonal().argsort(descending=True, stable=True)
    work = outputs[order][:, order] / outputs.diagonal().mean()
    work = work + torch.diag(0.05 * (work.diagonal() + 0.1))
    error = (matrix - coded.decoded)[order]
    start = rows - (rows - 1) % max(16, -(-rows // 8)) - 1  # of the last block
    moved = -torch.linalg.solve(work[start:, start:], work[start:, :start] @ error[:start])
    columns = moment.diagonal().view(-1, 2).sum(1).argsort(descending=True, stable=True)
    first = torch.arange(2) + 2 * int(columns[0])  # which no other column has moved
    torch.testing.assert_close(
        coded.corrected[order][start:, first], (matrix[order][start:] - moved)[:, first], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_outputs_of_few_dimensions_are_no_obstacle(rank: int) -> None:
    matrix, books, moment = randn(0, 40, 12), randn(1, 1, 1, 8, 2), inputs(4, 12)
    y = randn(2, 20, rank) @ randn(3, rank, 40)
    coded = encode(matrix, books, moment, y.t() @ y)
    assert bool(torch.isfinite(coded.corrected).all())
    if not rank:
        assert torch.equal(coded.codes, encode(matrix, books, moment).codes)


def test_without_inputs_outputs_are_not_looked_at() -> None:
    matrix, books = randn(0, 40, 12), randn(1, 1, 1, 8, 2)
    assert torch.equal(encode(matrix, books, None, inputs(2, 40)).codes, encode(matrix, books).codes)


@pytest.mark.few(25)
@given(seeds, st.sampled_from([40, 128, 136, 260]))
def test_columns_are_corrected_across_blocks(seed: int, dim: int) -> None:
    """The same as one column after the other, with every correction applied at once."""
    matrix, books, moment = randn(seed, 2, dim), randn(seed + 1, 1, 1, 4, 2), inputs(seed + 2, dim)
    coded = encode(matrix, books, moment)
    order = moment.diagonal().view(-1, 2).sum(1).argsort(descending=True, stable=True)
    columns = (order[:, None] * 2 + torch.arange(2)).reshape(-1)
    work = moment[columns][:, columns] / moment.diagonal().mean()
    inverse = torch.linalg.inv(work + torch.diag(0.01 * (work.diagonal() + 0.1)))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rest, decoded = matrix[:, columns].clone(), coded.decoded[:, columns]
    for at in range(0, dim, 2):
        error = (rest[:, at : at + 2] - decoded[:, at : at + 2]) @ torch.linalg.inv(upper[at : at + 2, at : at + 2])
        rest[:, at + 2 :] -= error @ upper[at : at + 2, at + 2 :]
    torch.testing.assert_close(coded.corrected[:, columns], rest, rtol=1e-6, atol=1e-6)


@given(seeds)
def test_what_was_corrected_is_rounded_to_the_nearest_codes_of_its_metric(seed: int) -> None:
    matrix, books, moment = randn(seed, 5, 8), randn(seed + 1, 1, 1, 7, 2), inputs(seed + 2, 8)
    coded = encode(matrix, books, moment)
    order = moment.diagonal().view(-1, 2).sum(1).argsort(descending=True, stable=True)
    work = moment / moment.diagonal().mean()
    work = work + torch.diag(0.01 * (work.diagonal() + 0.1))
    for place, m in enumerate(order.tolist()):
        still = torch.cat([torch.arange(2) + 2 * int(k) for k in order[place:]])
        inverse = torch.linalg.inv(work[still][:, still])[:2, :2]  # of its block, given the columns still open
        rest = coded.corrected[:, None, 2 * m : 2 * m + 2] - books[0, 0]
        distances = torch.einsum("nki,ij,nkj->nk", rest, torch.linalg.inv(inverse), rest)
        chosen = distances.gather(1, coded.codes[0, m][:, None])[:, 0]
        torch.testing.assert_close(chosen, distances.amin(1), rtol=1e-6, atol=1e-9)


@given(seeds, st.integers(1, 2))
def test_a_matrix_of_entries_is_held_exactly(seed: int, stages: int) -> None:
    books = randn(seed, stages, 2, 6, 3)
    codes = torch.randint(6, (stages, 4, 9), generator=generator(seed + 1))
    matrix = naive_expand(books, codes)
    if stages == 1:
        torch.testing.assert_close(encode(matrix, books, inputs(seed + 2, 12)).decoded, matrix)
    wide = encode(matrix, books, inputs(seed + 2, 12), beam=36)
    torch.testing.assert_close(wide.decoded, matrix)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_inputs_of_few_dimensions_are_no_obstacle(rank: int) -> None:
    matrix, books = randn(0, 6, 12), randn(1, 1, 1, 8, 2)
    x = randn(2, 20, rank) @ randn(3, rank, 12)
    moment = x.t() @ x
    coded = encode(matrix, books, moment)
    assert bool(torch.isfinite(coded.corrected).all())
    if rank:
        assert loss(matrix, coded.decoded, moment) <= loss(matrix, encode(matrix, books).decoded, moment)
    else:
        assert torch.equal(coded.codes, encode(matrix, books).codes)


def test_silent_columns_are_no_obstacle() -> None:
    matrix, books, moment = randn(0, 6, 12), randn(1, 1, 1, 8, 2), inputs(2, 12)
    moment[4:8], moment[:, 4:8] = 0, 0
    assert bool(torch.isfinite(encode(matrix, books, moment).corrected).all())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(wrong: float) -> None:
    moment = torch.eye(4)
    moment[1, 2] = wrong
    with pytest.raises(InputError, match="second moment has infinite or NaN elements"):
        encode(randn(0, 3, 4), randn(1, 1, 1, 4, 2), moment)


def test_outputs_that_are_not_finite_are_refused() -> None:
    outputs = torch.eye(3)
    outputs[1, 2] = float("nan")
    with pytest.raises(InputError, match="outputs' gradients' second moment has infinite or NaN"):
        encode(randn(0, 3, 4), randn(1, 1, 1, 4, 2), torch.eye(4), outputs)


def test_what_is_no_second_moment_is_refused() -> None:
    with pytest.raises(InputError, match="not positive semidefinite"):
        encode(randn(0, 3, 4), randn(1, 1, 1, 4, 2), torch.diag(torch.tensor([1e9, -1e8, 1.0, 1.0])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_coded_in_float32(dtype: torch.dtype) -> None:
    coded = encode(randn(0, 6, 12, dtype=dtype), randn(1, 1, 1, 8, 2, dtype=dtype), inputs(2, 12).float())
    assert coded.corrected.dtype == coded.decoded.dtype == torch.float32
