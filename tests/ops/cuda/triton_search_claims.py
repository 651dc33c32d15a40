"""What the residual search of GPUs computes. ``test_triton_search.py`` runs this file in a process of its own.

The interpreter is slow: shapes are tiny, and blocks are made tiny with them.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.kv.quantizer.quantizer import VectorQuantizer
from rpqfx.ops import check, search
from rpqfx.ops.cuda import kernels as cuda
from rpqfx.ops.cuda import triton_kernels, triton_search
from tests.helpers import randn, seeds

DEVICE = "cpu" if triton_kernels.INTERPRETED else "cuda"
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
# POINTS and ENTRIES: one block or many.
blocks = st.sampled_from([(4096, 64), (256, 16)])


def naive(points: Tensor, books: Tensor, cosine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and distances by a loop over stages in float64, and how near the second best entry was at the closest."""
    rest, codes, gaps = points.double(), [], []
    for book in books.double():
        if cosine:
            costs = -torch.nn.functional.normalize(rest, dim=1) @ torch.nn.functional.normalize(book, dim=1).t()
        else:
            costs = (rest[:, None] - book).square().sum(-1)
        order = costs.sort(dim=1, stable=True)
        codes.append(order.indices[:, 0])
        gaps.append(order.values[:, 1] - order.values[:, 0])
        rest = rest - book[codes[-1]]
    return torch.stack(codes, 1), rest.square().sum(1), torch.stack(gaps, 1).min(1).values


@settings(max_examples=20)
@given(
    st.sampled_from([0, 1, 5, 33]), st.integers(1, 3), st.integers(2, 40), st.sampled_from([1, 3, 8, 20]), seeds,
    dtypes, st.booleans(), blocks,
)  # fmt: skip
def test_it_is_the_loop_over_stages(
    rows: int, stages: int, entries: int, d: int, seed: int, dtype: torch.dtype, cosine: bool, sizes: tuple[int, int]
) -> None:
    """Codes and distances, far from the origin too, but for what float32 cannot tell apart."""
    points, books = randn(seed, rows, d, dtype=dtype) + 2, randn(seed + 1, stages, entries, d, dtype=dtype) + 1
    with patch.object(triton_search, "POINTS", sizes[0]), patch.object(triton_search, "ENTRIES", sizes[1]):
        codes, distances = cuda.residual_search(points.to(DEVICE), books.to(DEVICE), cosine)
    assert codes.shape == (rows, stages) and codes.dtype == torch.int64
    assert distances.shape == (rows,) and distances.dtype == dtype
    expected, exact, gaps = naive(points, books, cosine)
    clear = gaps > 1e-4
    assert codes.cpu()[clear].equal(expected[clear])
    rounding = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(distances.cpu().double()[clear], exact[clear], rtol=rounding, atol=rounding)


def test_the_first_of_equal_entries_is_taken_and_what_is_left_stays_exact() -> None:
    books = randn(0, 1, 20, 4, dtype=torch.float32)
    books = torch.cat([books, books], 1).expand(3, 40, 4).contiguous()
    with patch.object(triton_search, "ENTRIES", 16):
        codes, distances = cuda.residual_search(books[0, 20:].to(DEVICE), books.to(DEVICE))
    assert codes[:, 0].tolist() == list(range(20)) and codes.max() < 20
    rest = books[0, 20:] - books[0][codes[:, 0].cpu()]
    assert not rest.any()
    plain = rest - books[1][codes[:, 1].cpu()] - books[2][codes[:, 2].cpu()]
    torch.testing.assert_close(distances.cpu(), plain.square().sum(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("cosine", [False, True])
def test_codes_are_in_range_whatever_comes_in(bad: float, cosine: bool) -> None:
    points, books = randn(0, 20, 3, dtype=torch.float32), randn(1, 2, 5, 3, dtype=torch.float32)
    clean = cuda.residual_search(points.to(DEVICE), books.to(DEVICE), cosine)
    points[::2, 1] = bad
    codes, distances = cuda.residual_search(points.to(DEVICE), books.to(DEVICE), cosine)
    assert codes.min() >= 0 and codes.max() < 5 and not distances[::2].isfinite().any()
    assert codes[1::2].equal(clean[0][1::2])
    books[0, 2] = bad
    codes, _ = cuda.residual_search(points.to(DEVICE), books.to(DEVICE), cosine)
    assert codes.min() >= 0 and codes.max() < 5


def test_views_are_read_right() -> None:
    points, books = randn(0, 6, 50, dtype=torch.float32).t().to(DEVICE), randn(1, 4, 80, 12, dtype=torch.float32)
    books = books.to(DEVICE)[::2, ::4, ::2]
    ours = cuda.residual_search(points, books)
    assert ours[0].equal(cuda.residual_search(points.contiguous(), books.contiguous())[0])


@pytest.mark.parametrize(
    "given",
    [{}, {"use_cosine_sim": True}, {"stages": [2, 0, 1, 3], "shared": False}, {"normalize": True, "strided": True}],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantiser_runs_on_it(given: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, codes, loss and gradients are those of the plain loop."""
    torch.manual_seed(0)
    ours = VectorQuantizer(16, codebook_dim=4, codebook_size=9, beam=1, **given).to(DEVICE)
    plain = copy.deepcopy(ours)
    x = randn(1, 2, 7, 16, dtype=dtype).to(DEVICE)
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    called = []
    run = triton_search.launch
    monkeypatch.setattr(triton_search, "launch", lambda *args: called.append(1) or run(*args))
    monkeypatch.setattr(cuda, "_right", lambda device: True)  # it takes the interpreter a while to find out
    mine = ours(leaves[0])
    assert called
    called.clear()
    monkeypatch.setattr(search, "_fused", lambda points, books: False)
    other = plain(leaves[1])
    assert not called
    for left, right in zip(mine, other, strict=True):
        torch.testing.assert_close(left, right)
    for out in (mine, other):
        (out.loss + out.values.float().square().sum()).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    torch.testing.assert_close(ours.codebooks.grad, plain.codebooks.grad)


def test_the_check_before_the_first_use_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    device, right = torch.device(DEVICE), cuda.residual_search
    check._check_greedy(cuda, device, torch.Generator().manual_seed(0))
    for wrong in (
        lambda *args: ((right(*args)[0] + 1) % 2, right(*args)[1]),
        lambda *args: (right(*args)[0], right(*args)[1] * 1.01),
    ):
        monkeypatch.setattr(cuda, "residual_search", wrong)
        with pytest.raises(check.RPQError, match="residual_search is wrong"):
            check._check_greedy(cuda, device, torch.Generator().manual_seed(0))
