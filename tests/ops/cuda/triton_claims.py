"""What the CUDA kernels compute. ``test_triton.py`` runs this file in a process of its own.

Triton becomes an interpreter, for good, if ``TRITON_INTERPRET=1`` is there when it is first imported, and other tests
import it through torch's compiler. The interpreter is slow: shapes are tiny, and blocks are made tiny with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.codebook import CodebookSpec
from rpqfx.codebook.tiles import to_tiles
from rpqfx.ops import check
from rpqfx.ops.cuda import kernels as cuda
from rpqfx.ops.cuda import triton_kernels, triton_launch, triton_tiles
from tests.helpers import naive_expand, randn, seeds, specs, stored

MORE = 5 if settings.get_current_profile_name() == "thorough" else 1
DEVICE = "cpu" if triton_kernels.INTERPRETED else "cuda"
# Relative to the largest element: sums are in float32 and rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
dtypes = st.sampled_from(list(TOLERANCE))
code_dtypes = st.sampled_from([torch.uint8, torch.int16, torch.uint16])
batches = st.sampled_from([(), (1,), (3,), (2, 3), (18,)])
# PROGRAMS, TILE and TABLE_ELEMENTS: one program or many, tiles smaller or larger than the tensors, one slice or many.
blocks = st.sampled_from([(512, 2048, 2**23), (1, 2048, 64), (512, 16, 2**23), (3, 64, 2**23)])


@contextmanager
def block_sizes(programs: int, tile: int, table_elements: int) -> Iterator[None]:
    with (
        patch.object(triton_launch, "PROGRAMS", programs),
        patch.object(triton_launch, "TILE", tile),
        patch.object(cuda, "TABLE_ELEMENTS", table_elements),
        patch.object(cuda, "BLOCK_ROWS", 2),
    ):
        yield


def tensors(spec: CodebookSpec, seed: int, dtype: torch.dtype, code_dtype: torch.dtype) -> tuple[Any, ...]:
    codebooks, codes, scale, signs = stored(spec, seed, dtype)
    held = codebooks, codes.to(code_dtype), scale, signs
    return tuple(None if t is None else t.to(DEVICE) for t in held)


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == exact.shape
    assert ours.dtype == dtype
    largest = float(exact.detach().abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(
        ours.double().cpu(), exact.detach().cpu(), rtol=0, atol=TOLERANCE[dtype] * max(1.0, largest)
    )


def dense(codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None) -> Tensor:
    scale = None if scale is None else scale.double().cpu()
    return naive_expand(codebooks.double().cpu(), codes.cpu(), scale, None if signs is None else signs.cpu())


@settings(max_examples=10 * MORE)
@given(specs(), seeds, dtypes, code_dtypes, blocks)
def test_expand_is_the_definition(
    spec: CodebookSpec, seed: int, dtype: torch.dtype, code_dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    """The matrix is what the formula says, in the codebooks' dtype."""
    held = tensors(spec, seed, dtype, code_dtype)
    with block_sizes(*sizes):
        close(cuda.expand(*held), dense(*held), dtype)


@settings(max_examples=6 * MORE)
@given(specs(scale=False), seeds, dtypes, code_dtypes, batches, blocks)
def test_contract_is_the_dense_product(
    spec: CodebookSpec, seed: int, dtype: torch.dtype, code_dtype: torch.dtype, batch: tuple[int, ...],
    sizes: tuple[int, int, int],
) -> None:  # fmt: skip
    """contract is the product with the expanded matrix, whatever the blocks."""
    codebooks, codes, _, signs = tensors(spec, seed, dtype, code_dtype)
    x = randn(seed + 1, *batch, spec.dim, dtype=dtype)
    with block_sizes(*sizes):
        ours = cuda.contract(x.to(DEVICE), codebooks, codes, signs)
    close(ours, x.double() @ dense(codebooks, codes, None, signs).T, dtype)


@settings(max_examples=3 * MORE)  # four kernels each
@given(specs(scale=False), seeds, dtypes, code_dtypes, batches, blocks)
def test_gradients_are_those_of_autograd_through_the_dense_matrix(
    spec: CodebookSpec, seed: int, dtype: torch.dtype, code_dtype: torch.dtype, batch: tuple[int, ...],
    sizes: tuple[int, int, int],
) -> None:  # fmt: skip
    """contract_t, accumulate and contract_grads are the gradients of ``x @ W.T``, computed in float64."""
    codebooks, codes, _, signs = tensors(spec, seed, dtype, code_dtype)
    x, y = (
        randn(seed + 1, *batch, spec.dim, dtype=dtype),
        randn(seed + 2, *batch, spec.num_vectors, dtype=dtype),
    )
    leaves = x.double().requires_grad_(), codebooks.double().cpu().requires_grad_()
    out = leaves[0] @ dense(leaves[1], codes, None, signs).T
    grad_x, grad_codebooks = torch.autograd.grad(out, leaves, y.double())
    x, y = x.to(DEVICE), y.to(DEVICE)
    with block_sizes(*sizes):
        close(cuda.contract_t(y, codebooks, codes, signs), grad_x, dtype)
        close(cuda.accumulate(x, y, codes, spec.num_codebooks, spec.entries, signs), grad_codebooks, torch.float32)
        both = cuda.contract_grads(x, y, codebooks, codes, signs)
    close(both[0], grad_x, dtype)
    close(both[1], grad_codebooks, torch.float32)


@settings(max_examples=3 * MORE)  # several kernels each
@given(
    seed=seeds, dtype=dtypes, rows=st.sampled_from([1, 2, 5, 17]), d=st.sampled_from([1, 2, 3, 6, 16]),
    stages=st.integers(1, 5), books=st.sampled_from([1, 2]), share=st.integers(1, 9), entries=st.integers(2, 16),
    vectors=st.sampled_from([1, 64, 100]), factors=st.booleans(), small=st.booleans(),
)  # fmt: skip
def test_products_with_tiles_are_the_dense_product(
    seed: int, dtype: torch.dtype, rows: int, d: int, stages: int, books: int, share: int, entries: int, vectors: int,
    factors: bool, small: bool,
) -> None:  # fmt: skip
    """Both ways, with factors of rows and columns and a bias or without, whatever the blocks."""
    spec = CodebookSpec(vectors, d * books * share, d, entries=entries, stages=stages, num_codebooks=books)
    codebooks, codes, _, _ = stored(spec, seed, dtype)
    tiles = to_tiles(codes.byte()).to(DEVICE)
    dims, scale, bias = (
        randn(seed + i, n, dtype=dtype) if factors else None for i, n in ((1, spec.dim), (2, vectors), (3, vectors))
    )
    x = randn(seed + 4, rows, spec.dim, dtype=dtype)
    matrix = dense(codebooks, codes, scale, None)
    exact = (x.double() if dims is None else x.double() * dims.double()) @ matrix.T
    exact = exact if bias is None else exact + bias.double()
    books_, x_, dims_, scale_, bias_ = (None if t is None else t.to(DEVICE) for t in (codebooks, x, dims, scale, bias))
    sizes = {"WARPS": 3, "COLUMNS": d, "UNDER_WAY": 2} if small else {"UNDER_WAY": 16}
    elements = 16 if small else 2**23  # of a table: a slice of the batch, or all of it
    with patch.multiple(triton_tiles, **sizes), patch.multiple(cuda, TABLE_ELEMENTS=elements, BLOCK_ROWS=2):
        for plan in ("lookup", "dequantize"):
            ours = cuda.tiled(x_, books_, tiles, vectors, bias_, plan, dims_, scale_)
            assert ours.shape == exact.shape and ours.dtype == dtype
            # the matrix, the factors of the columns and the product are rounded in turn
            error = float((ours.double().cpu() - exact).abs().max())
            assert error <= 4 * TOLERANCE[dtype] * max(1.0, float(exact.abs().max()))


def test_a_code_in_tiles_that_points_to_nothing_is_nan() -> None:
    """Where a codebook has fewer than 16 entries; other vectors are as before."""
    codebooks, codes = randn(0, 2, 1, 10, 3, dtype=torch.float32), torch.zeros(2, 4, 70, dtype=torch.uint8)
    codes[1, 2, 69] = 12
    x = randn(1, 3, 12, dtype=torch.float32).to(DEVICE)
    for plan in ("lookup", "dequantize"):
        found = cuda.tiled(x, codebooks.to(DEVICE), to_tiles(codes).to(DEVICE), 70, None, plan)
        assert found[:, 69].isnan().all() and int(found.isnan().sum()) == 3


def test_no_rows_and_strided_rows_go_with_tiles() -> None:
    codebooks, codes = randn(0, 2, 1, 16, 3, dtype=torch.float32), torch.zeros(2, 4, 70, dtype=torch.uint8)
    held = codebooks.to(DEVICE), to_tiles(codes).to(DEVICE), 70
    x = randn(1, 2, 3, 12, dtype=torch.float32).to(DEVICE)
    for plan in ("auto", "lookup", "dequantize"):
        assert cuda.tiled(x[:0], *held, None, plan).shape == (0, 3, 70)
        turned = x.transpose(0, 2).contiguous().transpose(0, 2)
        assert cuda.tiled(turned, *held, None, plan).equal(cuda.tiled(x, *held, None, plan))


@pytest.mark.parametrize(
    ("spec", "rows", "slices"),
    [
        (CodebookSpec(300, 140, 70, entries=90, signs=True), 70, 1),  # past every block, in every direction
        (
            CodebookSpec(513, 8, 1, entries=2, stages=2, num_codebooks=4),
            1,
            1,
        ),  # single numbers; runs of half the vectors
        (CodebookSpec(9, 6, 2, entries=4), 37, 3),  # the batch in slices
    ],
)
def test_sizes_past_a_block(spec: CodebookSpec, rows: int, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of the real sizes, or slices of the batch, the last of them not full."""
    if slices > 1:
        monkeypatch.setattr(cuda, "TABLE_ELEMENTS", 64)
    codebooks, codes, _, signs = tensors(spec, 0, torch.float32, torch.uint8)
    assert len(cuda._slices(torch.empty(rows, 1), spec.stages * spec.num_subvectors * spec.entries)) == slices
    x, y = randn(1, rows, spec.dim), randn(2, rows, spec.num_vectors)
    leaves = x.requires_grad_(), codebooks.double().cpu().requires_grad_()
    matrix = dense(leaves[1], codes, None, signs)
    out = leaves[0] @ matrix.T
    grads = torch.autograd.grad(out, leaves, y)
    x, y = x.detach().float().to(DEVICE), y.float().to(DEVICE)
    close(cuda.expand(codebooks, codes, None, signs), matrix, torch.float32)
    close(cuda.contract(x, codebooks, codes, signs), out, torch.float32)
    for ours, exact in zip(cuda.contract_grads(x, y, codebooks, codes, signs), grads, strict=True):
        close(ours, exact, torch.float32)


def test_the_last_of_65536_entries() -> None:
    """Codes past the range of int16 and of uint8 are read as what they are."""
    codes = torch.tensor([0, 32_767, 32_768, 65_535], dtype=torch.int32, device=DEVICE).to(torch.uint16)[None, None]
    codebooks = randn(0, 1, 1, 65_536, 2, dtype=torch.float32).to(DEVICE)
    assert cuda.expand(codebooks, codes).equal(codebooks[0, 0, codes[0, 0].long()])
    dots = codebooks[0, :, :, :1].contiguous()
    assert triton_launch.gather_sum(dots, codes, None, torch.float32)[0].equal(dots[0, codes[0, 0].long(), 0])
    bins = triton_launch.Bins(codes, None, 1, 65_536)
    assert bins.order.flatten().tolist() == [0, 1, 2, 3]
    assert bins.ends[0, [0, 1, 32_767, 32_768, 65_534, 65_535]].tolist() == [1, 1, 2, 3, 3, 4]


@pytest.mark.parametrize("wrong", [4, 255])
def test_a_code_outside_its_codebook_is_nan_and_reads_nothing_else(wrong: int) -> None:
    """Also where it would be an entry of the next codebook; what has other codes is as before."""
    spec = CodebookSpec(9, 6, 2, entries=4, stages=2, signs=True)
    codebooks, codes, _, signs = tensors(spec, 0, torch.float32, torch.uint8)
    x, damaged = randn(1, 3, 6, dtype=torch.float32).to(DEVICE), codes.clone()
    damaged[0, 1, 5] = wrong
    whole, found = cuda.expand(codebooks, codes, None, signs), cuda.expand(codebooks, damaged, None, signs)
    assert found[5, 2:4].isnan().all() and int(found.isnan().sum()) == 2
    assert torch.equal(found.nan_to_num(7), torch.where(found.isnan(), 7, whole))
    whole, found = cuda.contract(x, codebooks, codes, signs), cuda.contract(x, codebooks, damaged, signs)
    assert found[:, 5].isnan().all() and int(found.isnan().sum()) == 3
    assert torch.equal(found.nan_to_num(7), torch.where(found.isnan(), 7, whole))


def test_strided_inputs_and_an_empty_batch() -> None:
    """Inputs need not be contiguous, and no rows are fine."""
    spec = CodebookSpec(9, 6, 2, entries=4, stages=2, signs=True)
    codebooks, codes, _, signs = tensors(spec, 0, torch.float32, torch.uint8)
    x, y = randn(1, 3, 6, dtype=torch.float32).to(DEVICE), randn(2, 3, 9, dtype=torch.float32).to(DEVICE)
    held = codebooks, codes, signs
    strided = tuple(t.transpose(0, -1).contiguous().transpose(0, -1) for t in held)
    assert not strided[0].is_contiguous()
    assert cuda.expand(strided[0], strided[1], None, strided[2]).equal(cuda.expand(codebooks, codes, None, signs))
    assert cuda.contract(x.t().contiguous().t(), *strided).equal(cuda.contract(x, *held))
    assert cuda.contract_t(y.t().contiguous().t(), *strided).equal(cuda.contract_t(y, *held))
    assert cuda.contract(x[:0], *held).shape == (0, 9)
    assert cuda.contract_t(y[:0], *held).shape == (0, 6)
    assert cuda.contract_grads(x[:0], y[:0], *held)[1].equal(torch.zeros_like(codebooks))


def test_the_check_before_the_first_use_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    monkeypatch.setattr(check, "ROWS", (3,))  # products of any number of rows are above
    monkeypatch.setattr(check, "CODES", {torch.uint8: 9})
    monkeypatch.setattr(check, "DTYPES", {torch.float32: 1e-4})
    monkeypatch.setattr(check, "TILES", ((2, 1, 5, 3, 70),))
    assert cuda._right.__wrapped__(device)
    right = cuda.contract
    monkeypatch.setattr(cuda, "contract", lambda *args: right(*args) * 1.2)
    assert not cuda._right.__wrapped__(device)


def test_usable_says_whether_the_kernels_run() -> None:
    """On the device of these tests they do; for float64 they never do."""
    assert cuda.usable(torch.empty(1, device=DEVICE))
    assert not cuda.usable(torch.empty(1, device=DEVICE, dtype=torch.float64))
