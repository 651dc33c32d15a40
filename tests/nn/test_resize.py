"""More or fewer rows: those that stay are the same to the bit, new ones are the nearest that the codebooks hold."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec, unpack_signs
from rpqfx.errors import RewriteError
from rpqfx.nn import Layout, RPQEmbedding, RPQLinear, RPQWeight, VirtualWeight
from rpqfx.nn.resize import resize_rows
from tests.helpers import naive_tensor, randn, randomise, specs

SEEDS = st.integers(0, 2**32 - 1)


def held(spec: CodebookSpec, seed: int, layout: Layout | None = None) -> RPQWeight:
    return randomise(RPQWeight(spec, layout, dtype=torch.float64), seed)


def dense(weight: RPQWeight) -> Tensor:
    return naive_tensor(weight).detach()


def nearest_by_hand(weight: RPQWeight, row: Tensor) -> Tensor:
    """The sum of each stage's nearest (signed) entries to what the stages before left over."""
    spec, parts, dims = weight.spec, [], weight.tensors.dims
    factors = (torch.ones_like(row) if dims is None else dims.detach()).split(spec.codebook_dim)
    for m, rest in enumerate(row.split(spec.codebook_dim)):
        found = torch.zeros_like(rest)
        for stage in weight.codebooks.detach():
            entries = stage[m // (spec.num_subvectors // stage.shape[0])] * factors[m]
            entries = torch.cat([entries, -entries]) if spec.signs else entries
            found = found + entries[(entries - (rest - found)).square().sum(1).argmin()]
        parts.append(found)
    return torch.cat(parts)


@pytest.mark.few(50)
@given(spec=specs(column_scale=True), rows=st.integers(1, 30), seed=SEEDS)
def test_rows_that_stay_keep_their_codes_and_new_ones_are_the_nearest(spec: CodebookSpec, rows: int, seed: int):
    weight = held(spec, seed)
    before, table, codebooks = copy.deepcopy(weight), weight().detach(), weight.codebooks
    kept = min(rows, spec.num_vectors)
    wanted = torch.cat([table[:kept], randn(seed + 1, rows - kept, spec.dim)])  # apart from the entries: no ties
    resize_rows(weight, wanted)
    assert weight.spec.num_vectors == rows == weight.layout.rows and weight.codebooks is codebooks
    assert torch.equal(weight.codebooks, before.codebooks) and weight.codes.shape == weight.spec.codes_shape
    assert torch.equal(weight.codes[..., :kept], before.codes[..., :kept])
    if spec.signs:
        old, new = unpack_signs(before.signs, spec.num_vectors), unpack_signs(weight.signs, rows)
        assert weight.signs.shape == weight.spec.signs_shape and torch.equal(new[..., :kept], old[..., :kept])
    assert torch.equal(weight()[:kept], table[:kept])
    for row, found in zip(wanted[kept:], dense(weight)[kept:], strict=True):
        if spec.scale:  # of least squares: what is left over is orthogonal to what was found
            assert abs(float((row - found) @ found)) < 1e-9
        else:
            torch.testing.assert_close(found, nearest_by_hand(weight, row), rtol=1e-9, atol=1e-9)


@given(spec=specs(scale=False, column_scale=True), seed=SEEDS)
def test_rows_the_codebooks_hold_come_back_exactly(spec: CodebookSpec, seed: int):
    weight = held(CodebookSpec(**{**spec.to_dict(), "stages": 1}), seed)
    table = dense(weight)
    resize_rows(weight, torch.cat([weight().detach(), table.flip(0)]))
    torch.testing.assert_close(dense(weight), torch.cat([table, table.flip(0)]), rtol=1e-12, atol=1e-12)


def test_a_scaled_row_is_closer_than_without_its_scale():
    weight = held(CodebookSpec(40, 8, 4, entries=16, scale=True), 0)
    row = 1e-3 * randn(1, 1, 8)
    resize_rows(weight, torch.cat([weight().detach(), row, torch.zeros(1, 8, dtype=torch.float64)]))
    assert float((weight().detach()[40] - row).norm()) < float(row.norm())
    assert not bool(weight()[41].any())


@pytest.mark.parametrize("entries", [300, 40_000])
def test_wide_codes(entries: int):
    weight = held(CodebookSpec(5, 4, 2, entries=entries), 0)
    table, codes = weight().detach(), weight.codes.clone()
    resize_rows(weight, torch.cat([table, table[:2]]))
    assert weight.codes.dtype == codes.dtype and torch.equal(weight(), torch.cat([table, table[:2]]))


def test_half_precision():
    weight = RPQWeight(CodebookSpec(20, 8, 4, entries=8, scale=True, signs=True), dtype=torch.bfloat16)
    table = weight().detach()
    resize_rows(weight, torch.cat([table, torch.randn(3, 8).bfloat16()]))
    assert weight().dtype == torch.bfloat16 and torch.equal(weight()[:20], table)


def test_a_zero_row_stays_zero_or_goes():
    layout = Layout((6, 4), zero_vector=4)
    for rows, zero in ((8, 4), (4, None)):
        weight = held(CodebookSpec(6, 4, 2, entries=3), 0, layout)
        resize_rows(weight, torch.cat([weight().detach(), randn(1, 2, 4)])[:rows])
        assert weight.layout.zero_vector == zero
        assert zero is None or not bool(weight()[zero].any())


def test_rows_of_more_than_one_axis():
    """Vectors per expert: an expert more, an expert fewer."""
    weight = held(CodebookSpec(6, 4, 2, entries=3), 0, Layout((2, 3, 4), lead=2))
    table = weight().detach()
    resize_rows(weight, torch.cat([table, table[:1]]))
    assert weight.spec.num_vectors == 9 and torch.equal(weight(), torch.cat([table, table[:1]]))
    resize_rows(weight, table[:1])
    assert weight.spec.num_vectors == 3 and torch.equal(weight(), table[:1])


@pytest.mark.parametrize("transposed", [True, False])
def test_experts_that_share_codebooks_and_such_as_do_not(transposed: bool):
    spec = CodebookSpec(12, 4, 2, entries=3)
    shape = (3, 4, 4)
    shared = held(spec, 0, Layout(shape, transposed=transposed, experts="shared"))
    table = shared().detach()
    resize_rows(shared, torch.cat([table, table[:2]]))
    assert shared.spec.num_vectors == 20 and torch.equal(shared(), torch.cat([table, table[:2]]))
    own = held(CodebookSpec(4, 12, 2, entries=3), 0, Layout(shape, transposed=transposed, experts="own"))
    with pytest.raises(RewriteError, match="do not lie along its rows"):
        resize_rows(own, own().detach()[:2])


def test_on_the_meta_device_only_shapes_change():
    weight = RPQWeight(CodebookSpec(6, 4, 2, entries=3, scale=True, signs=True, column_scale_group=2), device="meta")
    resize_rows(weight, torch.empty(9, 4, device="meta"))
    assert weight.codes.shape == weight.spec.codes_shape == (1, 2, 9)
    assert (
        weight.signs.shape == weight.spec.signs_shape
        and weight.scale.shape == (9,)
        and weight.column_scale.shape == (2,)
    )
    assert weight.codes.is_meta


def test_anything_else_is_refused_and_changes_nothing():
    rows, columns = held(CodebookSpec(6, 4, 2, entries=3), 0), Layout((4, 6), transposed=True)
    across = held(CodebookSpec(6, 4, 2, entries=3), 0, columns)
    table, turned = rows().detach(), across().detach()
    moved = table.clone()
    moved[2, 1] += 1e-9
    for weight, tensor, why in (
        (rows, moved, "would change the values"),
        (rows, torch.cat([moved, moved]), "would change the values"),
        (across, 2 * turned, "would change the values"),
        (across, torch.cat([turned, turned]), 'split="row"'),
        (rows, torch.cat([table, table], 1), "more or fewer rows, and nothing else"),
        (rows, table[:0], "more or fewer rows, and nothing else"),
        (rows, table.float(), "more or fewer rows, and nothing else"),
    ):
        before, spec, layout = copy.deepcopy(weight.state_dict()), weight.spec, weight.layout
        with pytest.raises(RewriteError, match=why):
            resize_rows(weight, tensor)
        assert (weight.spec, weight.layout) == (spec, layout)
        assert all(torch.equal(value, before[name]) for name, value in weight.state_dict().items())
    resize_rows(across, turned)  # nothing to change


# ------------------------------------------------------------------------------------------- through a layer's weight


def test_a_layers_weight_takes_rows_as_a_dense_ones_does():
    table = RPQEmbedding(10, 8, codebook_dim=4, codebook_bits=2, scale=True)
    values, scale = table.weight.detach().clone(), table.weight_rpq.scale
    table.weight.data = torch.cat([values, values[:3]])
    assert table.weight.shape == (13, 8) and table.weight_rpq.scale is scale and scale.shape == (13,)
    assert torch.equal(table(torch.arange(10)), values)
    table(torch.tensor([12])).sum().backward()
    assert scale.grad.shape == (13,)
    table.weight.data = table.weight.data
    with pytest.raises(RewriteError, match="would change a quantized weight"):
        table.weight.data += 1
    with pytest.raises(RewriteError, match="would change the values"):
        table.weight.data = 2 * table.weight.data


def test_tied_tables_get_their_rows_together():
    table, head = (
        RPQEmbedding(10, 8, codebook_dim=4, codebook_bits=2),
        RPQLinear(8, 10, bias=False, codebook_dim=4, codebook_bits=2),
    )
    head.weight = table.weight
    assert head.weight_rpq is table.weight_rpq
    values = table.weight.detach().clone()
    table.weight.data = torch.cat([values, values[:2]])
    assert head(torch.ones(1, 8)).shape == (1, 12)


def test_a_dense_weight_is_not_laid_over_codebooks():
    head = RPQLinear(8, 10, codebook_dim=4, codebook_bits=2)
    for value in (nn.Parameter(torch.randn(10, 8)), torch.randn(10, 8), None, head.weight.t()):
        with pytest.raises(RewriteError, match="cannot be assigned"):
            head.weight = value
    with pytest.raises(RewriteError, match="would change a quantized weight"):
        VirtualWeight(head.weight_rpq).t().data = torch.randn(8, 10)
