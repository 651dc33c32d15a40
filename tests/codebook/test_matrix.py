"""The algebra: all forms agree with the dense matrix, and the spec says what is stored."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rpqfx import codebook
from rpqfx.codebook import CodebookSpec, default_codebook_dim, nearest_divisor, range_of, steps
from rpqfx.errors import InputError, RPQError, SpecError
from tests.helpers import assert_same, naive_expand, randn, seeds, specs, stored, stored_all

# Relative to the largest element of the dense result, which is computed in float64. Dot products of float16 and
# bfloat16 are rounded once each (2**-11 and 2**-8) and then summed in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
dtypes = st.sampled_from(list(TOLERANCE))
batches = st.sampled_from([(), (1,), (3,), (2, 3), (60,)])


def close(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == exact.shape
    assert ours.dtype == dtype
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=TOLERANCE[dtype] * max(1.0, largest))


def as_double(tensors: tuple) -> tuple:
    return tuple(t.double() if t is not None and t.is_floating_point() else t for t in tensors)


# -------------------------------------------------------------------------------------------------- the algebra


@given(specs(), seeds)
def test_expand_is_the_definition(spec: CodebookSpec, seed: int) -> None:
    """The matrix is what the formula in the module's docstring says, element by element."""
    tensors = stored(spec, seed)
    dense = codebook.expand(*tensors)
    assert dense.shape == (spec.num_vectors, spec.dim)
    assert_same(dense, naive_expand(*tensors), tolerance=1e-12)


@given(specs(), seeds, dtypes, batches)
def test_all_forms_agree_with_the_dense_matrix(
    spec: CodebookSpec, seed: int, dtype: torch.dtype, batch: tuple[int, ...]
) -> None:
    """expand, lookup, contract and contract_t are the dense products with the expanded matrix."""
    tensors = stored(spec, seed, dtype)
    dense = naive_expand(*as_double(tensors))
    x, y = (
        randn(seed + 1, *batch, spec.dim, dtype=dtype),
        randn(seed + 2, *batch, spec.num_vectors, dtype=dtype),
    )
    ids = torch.randint(spec.num_vectors, batch, generator=torch.Generator().manual_seed(seed))
    close(codebook.expand(*tensors), dense, dtype)
    close(codebook.lookup(ids, *tensors), dense[ids], dtype)
    close(codebook.contract(x, *tensors), x.double() @ dense.T, dtype)
    close(codebook.contract_t(y, *tensors), y.double() @ dense, dtype)


@given(specs(scale=False), seeds, dtypes, batches)
def test_gradients_of_the_codebooks_agree_with_autograd_on_the_dense_matrix(
    spec: CodebookSpec, seed: int, dtype: torch.dtype, batch: tuple[int, ...]
) -> None:
    """accumulate, collect and collect_sparse are the codebooks' gradients through the expanded matrix."""
    books, codes, _, signs = stored(spec, seed, dtype)
    leaf = books.double().requires_grad_()
    dense = naive_expand(leaf, codes, None, signs)
    x, y = (
        randn(seed + 1, *batch, spec.dim, dtype=dtype),
        randn(seed + 2, *batch, spec.num_vectors, dtype=dtype),
    )
    grad = randn(seed + 3, spec.num_vectors, spec.dim, dtype=dtype)
    numbers = (codes, spec.num_codebooks, spec.entries, signs)
    (exact,) = torch.autograd.grad((y.double() * (x.double() @ dense.T)).sum(), leaf, retain_graph=True)
    summed = steps.sum_dtype(dtype)  # float32 where the dtype is shorter: sums of many terms keep their bits
    assert codebook.accumulate(x, y, *numbers).dtype == codebook.collect(grad, *numbers).dtype == summed
    close(codebook.accumulate(x, y, *numbers).to(dtype), exact, dtype)
    (exact,) = torch.autograd.grad((grad.double() * dense).sum(), leaf)
    close(codebook.collect(grad, *numbers).to(dtype), exact, dtype)
    sparse = codebook.collect_sparse(grad, *numbers)
    assert sparse.is_sparse and sparse.sparse_dim() == 3 and sparse.dense_dim() == 1
    # A coalesced sum of float16 is rounded at every step, so only the wide types are compared closely.
    torch.testing.assert_close(
        sparse.double().to_dense() if dtype.itemsize < 4 else sparse.to_dense().double(),
        exact, rtol=0, atol=TOLERANCE[dtype] * max(1.0, float(exact.abs().max())),
    )  # fmt: skip


@given(specs(), seeds, batches)
def test_contract_and_contract_t_are_adjoint(spec: CodebookSpec, seed: int, batch: tuple[int, ...]) -> None:
    """<contract(x), y> = <x, contract_t(y)>."""
    tensors = stored(spec, seed)
    x, y = randn(seed + 1, *batch, spec.dim), randn(seed + 2, *batch, spec.num_vectors)
    left = (codebook.contract(x, *tensors) * y).sum()
    right = (x * codebook.contract_t(y, *tensors)).sum()
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@given(specs(signs=False), seeds, dtypes)
def test_a_scale_of_ones_changes_no_bit(spec: CodebookSpec, seed: int, dtype: torch.dtype) -> None:
    books, codes, _, _ = stored(spec, seed, dtype)
    ones = torch.ones(spec.num_vectors, dtype=dtype)
    x, y = randn(seed + 1, 3, spec.dim, dtype=dtype), randn(seed + 2, 3, spec.num_vectors, dtype=dtype)
    ids = torch.arange(spec.num_vectors)
    assert torch.equal(codebook.expand(books, codes), codebook.expand(books, codes, ones))
    assert torch.equal(codebook.lookup(ids, books, codes), codebook.lookup(ids, books, codes, ones))
    assert torch.equal(codebook.contract(x, books, codes), codebook.contract(x, books, codes, ones))
    assert torch.equal(codebook.contract_t(y, books, codes), codebook.contract_t(y, books, codes, ones))


@given(specs(scale=False, signs=False), seeds, dtypes)
def test_signs_without_a_minus_change_no_bit_of_the_matrix(spec: CodebookSpec, seed: int, dtype: torch.dtype) -> None:
    """Products differ by no more than the order of their sums: a signed codebook is a taller matrix to multiply."""
    books, codes, _, _ = stored(spec, seed, dtype)
    plus = torch.zeros(spec.signs_shape, dtype=torch.uint8)
    x, y = randn(seed + 1, 3, spec.dim, dtype=dtype), randn(seed + 2, 3, spec.num_vectors, dtype=dtype)
    ids = torch.arange(spec.num_vectors)
    assert torch.equal(codebook.expand(books, codes), codebook.expand(books, codes, signs=plus))
    assert torch.equal(codebook.lookup(ids, books, codes), codebook.lookup(ids, books, codes, signs=plus))
    close(codebook.contract(x, books, codes, signs=plus), codebook.contract(x, books, codes).double(), dtype)
    close(codebook.contract_t(y, books, codes, signs=plus), codebook.contract_t(y, books, codes).double(), dtype)


@given(specs(), seeds, st.sampled_from([1, 5, 64]), st.sampled_from([1, 40, 400]), st.booleans())
def test_blocks_and_both_ways_of_binning_agree(
    spec: CodebookSpec, seed: int, rows: int, table_elements: int, scatter: bool
) -> None:
    """However rows are blocked, and whether bins are summed by sorting or by scattering, the result is the same."""
    tensors = stored(spec, seed)
    x, y = randn(seed + 1, rows, spec.dim), randn(seed + 2, rows, spec.num_vectors)
    dense = naive_expand(*tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "TABLE_ELEMENTS", table_elements)
        patch.setattr(steps, "BLOCK_ROWS", 1)
        patch.setattr(steps, "SCATTER_ROWS", 10**9 if scatter else 0)
        patch.setattr(steps, "GATHER_ROWS", 10**9 if scatter else 0)
        assert_same(codebook.contract(x, *tensors), x @ dense.T)
        assert_same(codebook.contract_t(y, *tensors), y @ dense)
        found = codebook.accumulate(x, y, tensors[1], spec.num_codebooks, spec.entries, tensors[3])
        assert_same(found, codebook.collect(y.T @ x, tensors[1], spec.num_codebooks, spec.entries, tensors[3]))
        both = codebook.contract_grads(x, y, tensors[0], tensors[1], tensors[3])
        assert_same(both[0], codebook.contract_t(y, tensors[0], tensors[1], signs=tensors[3]))
        assert_same(both[1], found)


def test_blocks_keep_the_table_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No table of dot products grows beyond the limit, unless one row alone does."""
    spec = CodebookSpec(20, 8, 2, entries=4)
    tensors = stored(spec, 0)
    sizes = []
    table = steps.table
    monkeypatch.setattr(steps, "table", lambda *args: sizes.append(table(*args).numel()) or table(*args))
    monkeypatch.setattr(steps, "TABLE_ELEMENTS", 64)
    monkeypatch.setattr(steps, "GATHER_ROWS", 0)
    monkeypatch.setattr(steps, "BLOCK_ROWS", 1)
    codebook.contract(randn(1, 50, 8), *tensors)
    assert len(sizes) > 1 and max(sizes) <= 64


@pytest.mark.parametrize(
    ("entries", "dtype"),
    [
        (2, torch.uint8), (3, torch.uint8), (256, torch.uint8), (257, torch.int16), (32_768, torch.int16),
        (32_769, torch.uint16), (65_536, torch.uint16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("signs", [False, True])
def test_codes_take_the_narrowest_integer_up_to_their_last_value(entries: int, dtype: torch.dtype, signs: bool) -> None:
    """The first and the last entry of a codebook of any size are found by every form."""
    spec = CodebookSpec(6, 4, 2, entries=entries, signs=signs)
    books, codes, _, bits = stored(spec, entries)
    codes = codes.long()
    codes[..., 0], codes[..., 1] = 0, entries - 1
    codes = codes.to(spec.code_dtype)
    assert codes.dtype == spec.code_dtype == dtype
    assert codes.long().max() == entries - 1
    dense = naive_expand(books, codes, None, bits)
    x, y = randn(1, 3, 4), randn(2, 3, 6)
    ids = torch.tensor([1, 0, 5])
    assert_same(codebook.expand(books, codes, signs=bits), dense)
    assert_same(codebook.lookup(ids, books, codes, signs=bits), dense[ids])
    assert_same(codebook.contract(x, books, codes, signs=bits), x @ dense.T)
    assert_same(codebook.contract_t(y, books, codes, signs=bits), y @ dense)
    many = randn(3, 50, 6)
    assert_same(codebook.contract_t(many, books, codes, signs=bits), many @ dense)
    found = codebook.accumulate(x, y, codes, 2, entries, bits)
    assert_same(found, codebook.collect(y.T @ x, codes, 2, entries, bits))
    assert_same(found, codebook.collect_sparse(y.T @ x, codes, 2, entries, bits).to_dense())
    assert int((found.abs().sum(-1) > 0).sum()) <= 2 * 6


@given(st.integers(1, 40), seeds)
def test_signs_pack_eight_to_a_byte_and_come_back(num_vectors: int, seed: int) -> None:
    """unpack_signs(pack_signs(x)) = x, the first sign in the lowest bit."""
    minus = torch.rand(2, 3, num_vectors, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = codebook.pack_signs(minus)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, math.ceil(num_vectors / 8))
    assert torch.equal(codebook.unpack_signs(packed, num_vectors), minus)
    assert int(packed[0, 0, 0]) & 1 == int(minus[0, 0, 0])


@pytest.mark.parametrize("form", ["expand", "lookup", "contract", "contract_t"])
def test_complex_codebooks_are_refused(form: str) -> None:
    books, codes, _, _ = stored(CodebookSpec(6, 4, 2, entries=4), 0)
    first = {
        "expand": (),
        "lookup": (torch.arange(3),),
        "contract": (randn(1, 3, 4),),
        "contract_t": (randn(1, 3, 6),),
    }
    with pytest.raises(InputError, match=r"complex128.*real and imaginary parts"):
        getattr(codebook, form)(*first[form], books.to(torch.complex128), codes)


@pytest.mark.parametrize(("form", "width"), [("contract", 4), ("contract_t", 6)])
def test_complex_input_is_refused(form: str, width: int) -> None:
    books, codes, _, _ = stored(CodebookSpec(6, 4, 2, entries=4), 0)
    with pytest.raises(InputError, match=r"complex128.*real and imaginary parts"):
        getattr(codebook, form)(randn(1, 3, width).to(torch.complex128), books, codes)


# ------------------------------------------------------------------------------------------------------ the spec


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_vectors": 0}, "num_vectors must be at least 1, got 0"),
        ({"dim": -3}, "dim must be at least 1, got -3"),
        ({"codebook_dim": 0}, "codebook_dim must be at least 1, got 0"),
        ({"stages": 0}, "stages must be at least 1, got 0"),
        ({"entries": 1}, r"2 to 65536 entries \(1 to 16 bits\), got 1"),
        ({"entries": 65_537}, r"2 to 65536 entries \(1 to 16 bits\), got 65537"),
        (
            {"codebook_dim": 5},
            r"codebook_dim 5 does not divide the vector length 12; .* is 6 \(2 sub-vectors\)",
        ),
        ({"num_codebooks": 4}, "4 codebooks cannot be shared evenly by 6 sub-vectors"),
        ({"num_codebooks": 0}, "0 codebooks cannot be shared evenly by 6 sub-vectors"),
        ({"grad_scale": "max"}, "grad_scale is 'sum', 'sqrt' or 'mean', got 'max'"),
    ],
)
def test_a_spec_that_cannot_be_says_which_number_and_what_to_do(values: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        CodebookSpec(**{"num_vectors": 16, "dim": 12, "codebook_dim": 2, "entries": 4, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"codebook_dim": 4, "num_subvectors": 3}, r"give codebook_dim \(4\) or num_subvectors \(3\), not both"),
        (
            {"num_subvectors": 5},
            r"num_subvectors 5 does not divide the vector length 12; the nearest that does\D+6",
        ),
        ({"num_subvectors": 0}, "num_subvectors 0 does not divide the vector length 12"),
        (
            {"codebook_dim": 7},
            "codebook_dim 7 does not divide the vector length 12; the nearest that does is 6",
        ),
        ({"codebook_bits": 0}, r"codebook_bits is 1 to 16 \(2 to 65536 entries\), got 0"),
        ({"codebook_bits": 17}, r"codebook_bits is 1 to 16 \(2 to 65536 entries\), got 17"),
        (
            {"codebook_bits": 6},
            r"64 entries \(codebook_bits=6\) for 40 sub-vectors.*use at most 5 bits or leave the layer dense",
        ),
        ({"codebook_dim": 0}, "codebook_dim must be at least 1, got 0"),
    ],
)
def test_make_says_which_number_and_what_to_do(values: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        CodebookSpec.make(40, 12, **values)


def test_spec_errors_are_value_errors() -> None:
    assert issubclass(SpecError, ValueError) and issubclass(SpecError, RPQError)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 3))
def test_make_always_finds_a_spec_by_itself(num_vectors: int, dim: int, stages: int) -> None:
    """Left to choose, make divides any vector length and never has more entries than vectors (but two)."""
    spec = CodebookSpec.make(num_vectors, dim, stages=stages)
    assert spec.codebook_dim * spec.num_subvectors == dim
    assert spec.num_codebooks == spec.num_subvectors and spec.stages == stages
    assert spec.entries <= max(2, num_vectors) and spec.entries <= 256


@given(st.integers(1, 5000), st.integers(1, 6000))
@example(97, 64)
def test_nearest_divisor_divides_and_no_divisor_is_nearer(dim: int, target: int) -> None:
    def distance(d: int) -> float:
        return abs(math.log(d) - math.log(target))

    found = nearest_divisor(dim, target)
    assert dim % found == 0
    for d in range(1, dim + 1):
        if dim % d == 0:
            assert distance(found) <= distance(d) + 1e-12


@pytest.mark.parametrize(
    ("dim", "taps", "found"),
    [
        (4096, 1, 64), (256 * 9, 9, 72), (512 * 9, 9, 72), (64 * 25, 25, 50), (3 * 49, 49, 49), (27, 9, 27), (9, 9, 9),
        (64 * 27, 27, 54), (7 * 9, 9, 63), (16 * 343, 343, 56), (97, 1, 97), (96 * 121, 121, 121),
    ],
)  # fmt: skip
def test_a_sub_vector_of_filters_is_whole_channels_where_such_a_length_is_near(dim: int, taps: int, found: int) -> None:
    """Near is within a factor of two of 64; elsewhere it is the nearest divisor."""
    assert default_codebook_dim(dim, taps) == found
    assert CodebookSpec.make(4096, dim, taps=taps).codebook_dim == found


@given(st.integers(1, 600), st.integers(1, 30))
def test_the_default_length_divides_and_is_the_nearest_for_what_has_no_taps(channels: int, taps: int) -> None:
    dim = channels * taps
    assert dim % default_codebook_dim(dim, taps) == 0
    assert default_codebook_dim(dim) == nearest_divisor(dim, 64)


@pytest.mark.parametrize(("dim", "target", "found"), [(12, 64, 12), (4, 2, 2), (6, 4, 3), (4096, 64, 64), (7, 3, 7)])
def test_nearest_divisor_by_example(dim: int, target: int, found: int) -> None:
    assert nearest_divisor(dim, target) == found


@given(specs(column_scale=True), st.sampled_from([torch.float16, torch.float32, torch.float64]), st.booleans())
def test_stored_bytes_are_those_of_the_tensors(spec: CodebookSpec, dtype: torch.dtype, codebooks: bool) -> None:
    tensors = [t for t in stored_all(spec, 0, dtype) if isinstance(t, torch.Tensor)]
    counted = sum(t.numel() * t.element_size() for t in (tensors if codebooks else tensors[1:]))
    assert spec.stored_bytes(dtype, codebooks=codebooks) == counted


@given(specs(column_scale=True), st.sampled_from(["sum", "sqrt", "mean"]))
def test_a_spec_survives_json(spec: CodebookSpec, grad_scale: str) -> None:
    spec = dataclasses.replace(spec, grad_scale=grad_scale)
    assert CodebookSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_spec_from_before_there_was_a_column_scale_has_none() -> None:
    values = CodebookSpec(4, 6, 2).to_dict()
    del values["column_scale_group"]
    assert CodebookSpec.from_dict(values) == CodebookSpec(4, 6, 2, column_scale_group=0)


def test_a_column_scale_divides_and_is_one_a_channel_of_filters() -> None:
    made = CodebookSpec.make(64, 36, taps=9, codebook_bits=2, column_scale=True)
    assert (made.column_scale_group, made.num_column_scales) == (9, 4)
    assert CodebookSpec.make(64, 36, codebook_bits=2, column_scale=True).num_column_scales == 36
    assert CodebookSpec.make(64, 36, taps=9, codebook_bits=2).num_column_scales == 0
    for wrong in (-1, 5, 72):
        with pytest.raises(SpecError, match=f"divides its length 36; got {wrong}"):
            CodebookSpec(64, 36, 4, column_scale_group=wrong)


@given(specs())
def test_users_and_grad_factor(spec: CodebookSpec) -> None:
    """Each entry serves M*N / (G*K) sub-vectors on average; fewer than one does not raise gradients."""
    users = spec.num_subvectors * spec.num_vectors / (spec.num_codebooks * spec.entries)
    assert spec.users_per_entry == pytest.approx(users)
    for grad_scale, power in (("sum", 0), ("sqrt", 0.5), ("mean", 1)):
        factor = dataclasses.replace(spec, grad_scale=grad_scale).grad_factor
        assert factor == pytest.approx(max(users, 1.0) ** -power)


@given(st.integers(2, 65_536))
def test_bits_hold_every_code(entries: int) -> None:
    spec = CodebookSpec(4, 4, 2, entries=entries)
    assert 2 ** (spec.codebook_bits - 1) < entries <= 2**spec.codebook_bits


@given(st.integers(0, 9), *[st.one_of(st.none(), st.integers(-12, 12))] * 2, st.sampled_from([None, 1, 2]))
def test_a_range_is_what_python_makes_of_a_slice(size: int, start: int | None, stop: int | None, step: int | None):
    first, last, every = range_of(slice(start, stop, step), size)
    assert range(first, last, every) == range(*slice(start, stop, step).indices(size)) and 0 <= first <= last <= size
