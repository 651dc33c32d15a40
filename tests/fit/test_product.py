"""Product and residual codes approximate a matrix as well as their spec allows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.codebook import CodebookSpec, expand
from rpqfx.errors import InputError
from rpqfx.fit import fit_codebooks
from tests.helpers import randn, seeds, specs

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@given(specs(), seeds, st.sampled_from(DTYPES))
def test_the_tensors_are_those_of_the_spec(spec: CodebookSpec, seed: int, dtype: torch.dtype) -> None:
    """Shapes, dtypes, codes in range; what the spec does not have is None."""
    fit = fit_codebooks(randn(seed, spec.num_vectors, spec.dim, dtype=dtype), spec, steps=2, seed=seed)
    assert fit.codebooks.shape == spec.codebooks_shape and fit.codebooks.dtype == dtype
    assert fit.codes.shape == spec.codes_shape and fit.codes.dtype == spec.code_dtype
    assert int(fit.codes.long().min()) >= 0 and int(fit.codes.long().max()) < spec.entries
    assert (fit.scale is not None) == spec.scale and (fit.signs is not None) == spec.signs
    if fit.scale is not None:
        assert fit.scale.shape == (spec.num_vectors,) and fit.scale.dtype == dtype
    if fit.signs is not None:
        assert fit.signs.shape == spec.signs_shape and fit.signs.dtype == torch.uint8
    assert expand(*fit).isfinite().all()


@pytest.mark.few(40)
@given(specs(scale=False), seeds)
def test_more_stages_never_fit_worse(spec: CodebookSpec, seed: int) -> None:
    matrix = randn(seed, spec.num_vectors, spec.dim)
    errors = []
    for stages in (1, 2, 3):
        fit = fit_codebooks(matrix, dataclasses.replace(spec, stages=stages), steps=3, seed=seed)
        errors.append(float((expand(*fit) - matrix).square().sum()))
    assert errors[1] <= errors[0] + 1e-9 and errors[2] <= errors[1] + 1e-9


@given(specs(), seeds)
def test_enough_entries_reproduce_the_matrix(spec: CodebookSpec, seed: int) -> None:
    """As many entries as sub-vectors that a codebook serves leave nothing to the later stages."""
    served = spec.num_vectors * spec.num_subvectors // spec.num_codebooks
    spec = dataclasses.replace(spec, entries=max(2, served))
    matrix = randn(seed, spec.num_vectors, spec.dim)
    torch.testing.assert_close(expand(*fit_codebooks(matrix, spec, seed=seed)), matrix, rtol=1e-12, atol=1e-12)


@given(specs(scale=False, signs=False), seeds)
def test_plain_codes_reproduce_the_matrix_to_the_last_bit(spec: CodebookSpec, seed: int) -> None:
    spec = dataclasses.replace(spec, entries=max(2, spec.num_vectors), stages=1, num_codebooks=spec.num_subvectors)
    matrix = randn(seed, spec.num_vectors, spec.dim, dtype=torch.float32)
    assert torch.equal(expand(*fit_codebooks(matrix, spec, seed=seed)), matrix)


def test_a_scale_takes_rows_of_any_size() -> None:
    """Rows that differ only by a positive factor need one entry; a row of zeros stays zero."""
    factors = torch.tensor([1.0, 1e3, 1e-3, 0.0], dtype=torch.float64)
    matrix = factors[:, None] * randn(0, 1, 6)
    fit = fit_codebooks(matrix, CodebookSpec(4, 6, 3, entries=2, scale=True))
    torch.testing.assert_close(expand(*fit), matrix, rtol=1e-12, atol=1e-15)


def test_signs_let_opposite_rows_share_an_entry() -> None:
    half = randn(0, 4, 6)
    fit = fit_codebooks(torch.cat([half, -half]), CodebookSpec(8, 6, 3, entries=4, signs=True))
    torch.testing.assert_close(expand(*fit), torch.cat([half, -half]), rtol=1e-12, atol=1e-12)


def test_a_shared_codebook_serves_all_its_sub_vectors() -> None:
    """Equal blocks in different places of a row need one entry between them."""
    block = randn(0, 3, 2)
    matrix = torch.cat([block, block.flip(0)], 1)
    fit = fit_codebooks(matrix, CodebookSpec(3, 4, 2, entries=3, num_codebooks=1))
    torch.testing.assert_close(expand(*fit), matrix)


def test_clustered_matrices_fit_closely_in_half_precision() -> None:
    """The work is done in float32 whatever comes in."""
    centres = randn(0, 8, 16)
    matrix = centres.repeat(20, 1).half()
    fit = fit_codebooks(matrix, CodebookSpec(160, 16, 8, entries=8))
    torch.testing.assert_close(expand(*fit), matrix, rtol=0, atol=0)


def test_the_same_seed_gives_the_same_fit_and_the_matrix_is_untouched() -> None:
    matrix = randn(0, 40, 6).requires_grad_()
    before = matrix.detach().clone()
    spec = CodebookSpec(40, 6, 2, entries=4, stages=2, scale=True, signs=True)
    first, again = fit_codebooks(matrix, spec, seed=3), fit_codebooks(matrix, spec, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(matrix, before) and not first.codebooks.requires_grad


@pytest.mark.parametrize(("stages", "bound"), [(1, 0.0095 * 1.5), (2, 0.0005)])
def test_random_matrices_fit_about_as_well_as_theory_says(stages: int, bound: float) -> None:
    """With d = 1 and K = 16 a Gaussian's least possible error is 0.0095; a second stage divides it some 30 times."""
    matrix = randn(0, 4096, 4)
    fit = fit_codebooks(matrix, CodebookSpec(4096, 4, 1, entries=16, stages=stages), steps=40)
    assert float((expand(*fit) - matrix).square().mean()) < bound


@given(specs(signs=False), seeds)
def test_beams_and_refits_never_fit_worse_than_stages_as_they_start(spec: CodebookSpec, seed: int) -> None:
    """Measured where the fit is made: on rows divided by their scale, as weighted.

    Of two stages: a third is fitted to what different first two leave, and k-means may do worse on that.
    """
    spec = dataclasses.replace(spec, stages=min(spec.stages, 2))
    matrix, weights = randn(seed, spec.num_vectors, spec.dim), randn(seed + 1, spec.dim).exp()
    work = matrix / matrix.square().mean(1, keepdim=True).sqrt() if spec.scale else matrix
    shares = weights.view(-1, spec.codebook_dim).mean(1).repeat_interleave(spec.codebook_dim)
    errors = []
    for beam in (1, 4):
        fit = fit_codebooks(matrix, spec, weights=weights, steps=3, beam=beam, seed=seed)
        found = expand(fit.codebooks, fit.codes)
        errors.append(float((shares * (found - work).square()).sum()))
    assert errors[1] <= errors[0] * (1 + 1e-9) + 1e-9


@pytest.mark.few(15)  # each fits four times
@given(specs(signs=False, scale=False), seeds)
def test_weights_broadcast_and_count_by_the_mean_of_a_sub_vector(spec: CodebookSpec, seed: int) -> None:
    matrix = randn(seed, spec.num_vectors, spec.dim)
    rows, columns = randn(seed + 1, spec.num_vectors, 1).exp(), randn(seed + 2, spec.dim).exp()
    means = columns.view(-1, spec.codebook_dim).mean(1).repeat_interleave(spec.codebook_dim)
    for given_weights, whole in ((rows, rows.expand_as(matrix)), (columns, means.expand_as(matrix))):
        ours, theirs = (
            fit_codebooks(matrix, spec, weights=weights, steps=2, seed=seed) for weights in (given_weights, whole)
        )
        torch.testing.assert_close(ours.codebooks, theirs.codebooks)
        assert torch.equal(ours.codes, theirs.codes)


@pytest.mark.parametrize("stages", [1, 2])
def test_what_weighs_more_fits_better(stages: int) -> None:
    matrix = randn(0, 400, 8)
    weights = torch.where(torch.arange(400) % 10 == 0, 100.0, 1.0)[:, None]
    spec = CodebookSpec(400, 8, 4, entries=8, stages=stages, num_codebooks=1)
    errors = [
        (expand(*fit_codebooks(matrix, spec, weights=each)) - matrix)[::10].square().mean() for each in (None, weights)
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("weights", [torch.ones(5), torch.ones(3, 1), -torch.ones(4), torch.full((4,), torch.inf)])
def test_weights_that_make_no_sense_are_refused(weights: torch.Tensor) -> None:
    with pytest.raises(InputError, match="weights"):
        fit_codebooks(randn(0, 20, 4), CodebookSpec(20, 4, 2, entries=3), weights=weights)
