"""Sub-vectors coded one after the other find what a loop over rows and columns finds, compiled or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.ops import column_search as module
from rpqfx.ops.column_search import column_search
from rpqfx.ops.cpu import build, kernels
from rpqfx.ops.search import beam_search
from tests.helpers import randn, seeds

dtypes = st.sampled_from([torch.float32, torch.float64])


def problem(
    seed: int, rows: int, count: int, stages: int, books: int, entries: int, d: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:
    """Returns the arguments of a search whose metrics are no identities and whose columns go together."""
    width = count * d
    groups = torch.randint(books, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    to_metric = torch.eye(d, dtype=dtype) + 0.3 * randn(seed + 1, count, d, d, dtype=dtype)
    upper = 0.3 * randn(seed + 2, width, width, dtype=dtype).triu()
    return (
        randn(seed + 3, rows, width, dtype=dtype), randn(seed + 4, stages, books, entries, d, dtype=dtype), groups,
        to_metric, upper,
    )  # fmt: skip


@given(
    seeds, st.sampled_from([0, 1, 5, 16, 17, 40]), st.integers(1, 5), st.integers(1, 3), st.integers(1, 2),
    st.sampled_from([1, 2, 7, 16]), st.sampled_from([1, 2, 3, 4, 17]), st.sampled_from([1, 4]), dtypes,
)  # fmt: skip
def test_each_sub_vector_is_searched_for_and_the_later_ones_take_over_its_error(
    seed: int, rows: int, count: int, stages: int, books: int, entries: int, d: int, beam: int, dtype: torch.dtype
) -> None:
    matrix, given_books, groups, to_metric, upper = problem(seed, rows, count, stages, books, entries, d, dtype)
    before = matrix.clone()
    codes, seen = column_search(matrix, given_books, groups, to_metric, upper, beam)
    assert torch.equal(matrix, before) and codes.shape == (rows, count, stages) and codes.dtype == torch.int64
    left = matrix.double()
    for c in range(count):
        part = slice(c * d, c * d + d)
        torch.testing.assert_close(seen[:, part].double(), left[:, part], rtol=1e-4, atol=1e-4)
        turn = to_metric[c].double()
        point, own = seen[:, part].double() @ turn, given_books[:, groups[c]].double() @ turn
        error = point - sum(book[codes[:, c, r]] for r, book in enumerate(own))
        wanted = point - sum(book[code] for book, code in zip(own, beam_search(point, own, beam)[0].t(), strict=True))
        ours, theirs = error.square().sum(1), wanted.square().sum(1)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # codes as near may take each other's place
        left[:, c * d + d :] -= error @ upper[part, c * d + d :].double()


@pytest.mark.parametrize("entries", [16, 5000])
def test_kernels_and_torchs_operators_agree(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    if not build.ready():
        pytest.skip("no compiled kernels on this machine")
    given_ = problem(0, 50, 12, 2, 3, entries, 8, torch.float32)  # of 5,000 entries a few sub-vectors at a time
    codes, seen = column_search(*given_, 4)
    monkeypatch.setattr(module, "compiled", lambda *tensors: False)
    plain_codes, plain = column_search(*given_, 4)
    assert (codes == plain_codes).double().mean() > 0.999
    assert ((seen - plain).abs() < 1e-3).double().mean() > 0.999


def test_what_does_not_fit_is_refused() -> None:
    if not build.ready():
        pytest.skip("no compiled kernels on this machine")
    matrix, books, groups, to_metric, upper = problem(0, 4, 3, 2, 2, 5, 4, torch.float32)
    with pytest.raises(ValueError, match="does not go with"):
        kernels.column_search(matrix[:, 1:], books, groups, to_metric, upper, 2)
    with pytest.raises(ValueError, match="group 2 of 2"):
        kernels.column_search(matrix, books, [0, 2, 1], to_metric, upper, 2)
    with pytest.raises(TypeError, match="float32"):
        kernels.column_search(matrix.double(), books, groups, to_metric, upper, 2)
