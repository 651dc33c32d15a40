"""The compiled kernels are the plain functions, for every shape, dtype of codes, and number of rows and threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx import codebook
from rpqfx.codebook import CodebookSpec, feature_maps
from rpqfx.codebook.tiles import to_tiles
from rpqfx.ops.backend import choose
from rpqfx.ops.cpu import build, kernels
from tests.helpers import divisors, randn, seeds, stored

pytestmark = pytest.mark.skipif(not build.ready(), reason="no compiled kernels on this machine")

# Of the largest element, or of 1: sums of some hundred terms that may cancel (tests/ops/test_errors.py holds each to
# its bound); bfloat16 results are rounded once (2**-8) or twice.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
dtypes = st.sampled_from(list(TOLERANCE))
# A few rows, around what a vector and a table hold, several blocks, and a pass of bins with a rest.
rows = st.sampled_from([0, 1, 2, 4, 5, 15, 16, 17, 31, 32, 33, 70, 130])


@st.composite
def specs(draw: st.DrawFn) -> CodebookSpec:
    """Sub-vectors shorter and longer than a vector register, and numbers of vectors around a tile."""
    d, sub_vectors = draw(st.sampled_from([1, 2, 3, 4, 16, 20, 33])), draw(st.integers(1, 9))
    books = draw(st.sampled_from(divisors(sub_vectors)))
    numbers = {"entries": draw(st.integers(2, 40)), "stages": draw(st.integers(1, 3)), "num_codebooks": books}
    vectors = draw(st.sampled_from([1, 2, 7, 8, 9, 16, 23, 70]))
    signs, scale = draw(st.booleans()), draw(st.booleans())
    return CodebookSpec(vectors, d * sub_vectors, d, signs=signs, scale=scale, **numbers)


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == exact.shape
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=TOLERANCE[dtype] * max(1.0, largest))


@pytest.fixture(scope="module", autouse=True, params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fewer blocks than threads, and more."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@given(specs(), seeds, dtypes, rows, st.booleans())
def test_products_are_those_of_the_dense_matrix(
    spec: CodebookSpec, seed: int, dtype: torch.dtype, batch: int, biased: bool
) -> None:
    books, codes, _, signs = stored(spec, seed, dtype)
    exact = codebook.expand(books.double(), codes, signs=signs)
    x, y = randn(seed + 1, batch, spec.dim, dtype=dtype), randn(seed + 2, batch, spec.num_vectors, dtype=dtype)
    bias = randn(seed + 3, spec.num_vectors, dtype=dtype) if biased else None
    shift = 0 if bias is None else bias.double()
    close(kernels.contract(x, books, codes, signs, bias), x.double() @ exact.T + shift, dtype)
    close(kernels.contract_t(y, books, codes, signs), y.double() @ exact, dtype)
    grad = codebook.collect(y.double().T @ x.double(), codes, spec.num_codebooks, spec.entries, signs)
    close(kernels.accumulate(x, y, codes, spec.num_codebooks, spec.entries, signs), grad, dtype)
    both = kernels.contract_grads(x, y, books, codes, signs)
    close(both[0], y.double() @ exact, dtype)
    close(both[1], grad, dtype)
    assert both[1].dtype == torch.float32  # sums keep their bits


@st.composite
def tiled_specs(draw: st.DrawFn) -> CodebookSpec:
    """Codes of at most four bits: a few vectors, half tiles, whole tiles and panels of them."""
    d, sub_vectors = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16])), draw(st.integers(1, 12))
    books = draw(st.sampled_from(divisors(sub_vectors)))
    vectors = draw(st.sampled_from([1, 20, 32, 33, 64, 70, 96, 130, 300]))
    return CodebookSpec(
        vectors, d * sub_vectors, d, draw(st.integers(2, 16)), draw(st.integers(1, 9)), books, scale=draw(st.booleans())
    )


@given(tiled_specs(), seeds, dtypes, rows, st.booleans(), st.booleans(), st.booleans())
def test_products_with_expanded_tiles_are_those_of_the_dense_matrix(
    spec: CodebookSpec, seed: int, dtype: torch.dtype, batch: int, biased: bool, columns: bool, inference: bool
) -> None:
    books, codes, scale, _ = stored(spec, seed, dtype)
    x = randn(seed + 1, batch, spec.dim, dtype=dtype)
    bias = randn(seed + 2, spec.num_vectors, dtype=dtype) if biased else None
    dims = randn(seed + 3, spec.dim, dtype=dtype) if columns else None
    dense = codebook.expand(books.double(), codes, None if scale is None else scale.double())
    dense = (dense if dims is None else dense * dims.double()).to(dtype)  # as this way makes it: rounded once
    exact = x.double() @ dense.double().T
    exact = exact if bias is None else exact + bias.double()
    with torch.inference_mode(inference):
        y = kernels.tiled(x, books, to_tiles(codes), spec.num_vectors, bias, "dequantize", dims, scale)
    close(y, exact, dtype)


@given(specs(), seeds, dtypes)
def test_rows_and_their_adjoint(spec: CodebookSpec, seed: int, dtype: torch.dtype) -> None:
    books, codes, scale, signs = stored(spec, seed, dtype)
    exact = codebook.expand(books.double(), codes, None if scale is None else scale.double(), signs)
    close(kernels.expand(books, codes, scale, signs), exact, dtype)
    ids = torch.randint(spec.num_vectors, (3, 5), generator=torch.Generator().manual_seed(seed))
    close(kernels.lookup(ids, books, codes, scale, signs), exact[ids], dtype)
    for share in divisors(spec.dim):  # a factor for each so many columns in a row
        dims = randn(seed + 2, spec.dim // share, dtype=dtype)
        wide = dims.double().repeat_interleave(share)
        close(kernels.expand(books, codes, scale, signs, dims), exact * wide, dtype)
        close(kernels.lookup(ids, books, codes, scale, signs, dims), exact[ids] * wide, dtype)
    grad = randn(seed + 1, spec.num_vectors, spec.dim, dtype=dtype)
    adjoint = codebook.collect(grad.double(), codes, spec.num_codebooks, spec.entries, signs)
    close(kernels.collect(grad, codes, spec.num_codebooks, spec.entries, signs), adjoint, dtype)


@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 7, 16, 33, 64]),
    st.sampled_from([torch.uint8, torch.int16, torch.uint16, torch.int32]), dtypes, seeds,
)  # fmt: skip
def test_sums_of_maps(
    stages: int, sub_vectors: int, vectors: int, positions: int, codes_in: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    codes = torch.randint(6, (stages, sub_vectors, vectors), generator=torch.Generator().manual_seed(seed)).to(codes_in)
    table = randn(seed, 2, stages, sub_vectors, 6, positions, dtype=dtype)
    close(kernels.gather_sum(table, codes), feature_maps.gather_sum(table.double(), codes), dtype)
    y = randn(seed, 2, vectors, positions, dtype=dtype)
    close(kernels.bin_sum(y, codes, 6), feature_maps.bin_sum(y.double(), codes, 6), dtype)


@pytest.mark.parametrize("entries", [2, 256, 300, 40_000])
@pytest.mark.parametrize("batch", [1, 40])
def test_codes_are_read_as_they_are_stored(entries: int, batch: int) -> None:
    """uint8, int16 and uint16, up to their largest values, and tables larger than the cache."""
    spec = CodebookSpec(90, 40, 20, entries=entries, stages=2, signs=True)
    books, codes, _, signs = stored(spec, 0, torch.float32)
    codes[..., 0], codes[..., -1] = 0, entries - 1
    x = randn(1, batch, 40, dtype=torch.float32)
    exact = codebook.expand(books.double(), codes, signs=signs)
    close(kernels.contract(x, books, codes, signs), x.double() @ exact.T, x.dtype)
    y = randn(2, batch, 90, dtype=torch.float32)
    close(kernels.contract_t(y, books, codes, signs), y.double() @ exact, y.dtype)


def test_views_are_read_right() -> None:
    """Inputs, codebooks, codes and gradients that do not lie in order."""
    spec = CodebookSpec(64, 32, 16, entries=16)
    books, codes, _, _ = stored(spec, 0, torch.float32)
    books, codes = books.transpose(2, 3).contiguous().transpose(2, 3), codes.flip(-1).contiguous()[..., ::2]
    x, y = randn(1, 32, 7, dtype=torch.float32).t(), randn(2, 32, 7, dtype=torch.float32).t()
    exact = codebook.expand(books.double(), codes)
    close(kernels.contract(x, books, codes), x.double() @ exact.T, x.dtype)
    close(kernels.contract_t(y, books, codes), y.double() @ exact, x.dtype)
    close(kernels.contract_t(torch.ones(()).expand(7, 32), books, codes), torch.ones(7, 32).double() @ exact, x.dtype)


@pytest.mark.parametrize("batch", [0, 1, 40])
def test_a_matrix_without_vectors_has_empty_products(batch: int) -> None:
    """A slice of a layer's rows may leave none, and nothing is divided by their number."""
    books, codes, _, _ = stored(CodebookSpec(64, 32, 16, entries=16), 0, torch.float32)
    assert kernels.contract(torch.ones(batch, 32), books, codes[..., :0]).shape == (batch, 0)
    assert kernels.expand(books, codes[..., :0]).shape == (0, 32)


@pytest.mark.parametrize("bad", [-1, 64, 10**12])
def test_an_id_out_of_range_is_refused(bad: int) -> None:
    books, codes, _, _ = stored(CodebookSpec(64, 32, 16, entries=16), 0, torch.float32)
    with pytest.raises(IndexError, match=str(bad)):
        kernels.lookup(torch.tensor([0, bad]), books, codes)


def test_results_do_not_change_from_run_to_run() -> None:
    spec = CodebookSpec(500, 64, 16, entries=64, signs=True)
    books, codes, _, signs = stored(spec, 0, torch.float32)
    for batch in (1, 100):
        x, y = randn(1, batch, 64, dtype=torch.float32), randn(2, batch, 500, dtype=torch.float32)
        held = (books, codes, signs)
        first, again = (
            (kernels.contract(x, *held), kernels.contract_t(y, *held), *kernels.contract_grads(x, y, *held))
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_forward_mode_is_refused_not_dropped() -> None:
    books, codes, _, _ = stored(CodebookSpec(64, 32, 16, entries=16), 0, torch.float32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(2, 32), torch.ones(2, 32))
        with pytest.raises(RuntimeError, match="forward-mode"):
            kernels.contract(dual, books, codes)
        turned = torch.autograd.forward_ad.make_dual(torch.ones(2, 64), torch.ones(2, 64))
        with pytest.raises(RuntimeError, match="forward-mode"):
            kernels.contract_t(turned, books, codes)


@pytest.mark.parametrize(
    ("dtype", "compiled"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.float64, False), (torch.float16, False)],
)
def test_the_kernels_are_chosen_for_what_they_take(dtype: torch.dtype, compiled: bool) -> None:
    codes = torch.zeros(1, 1, 1, dtype=torch.uint8)
    assert (choose(torch.ones(1, dtype=dtype), codes) is kernels) == compiled
    assert choose(torch.ones(1, device="meta"), codes) is not kernels
    with torch._subclasses.FakeTensorMode():
        assert choose(torch.ones(1), codes) is not kernels
