"""RPQWeight and the ways to see a tensor as vectors."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx import ops
from rpqfx.codebook import CodebookSpec
from rpqfx.errors import CodeError, InputError, SpecError
from rpqfx.nn import Layout, RPQWeight
from rpqfx.ops import PLANS
from tests.helpers import (
    assert_same,
    codebook_options,
    dense_twin,
    forms_run,
    generator,
    gradients,
    naive_tensor,
    randn,
    randomise,
    seeds,
)

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shape = draw(shapes)
    layout = Layout(shape, lead=draw(st.integers(1, len(shape))), transposed=draw(st.booleans()))
    zero = draw(st.one_of(st.none(), st.integers(0, layout.num_vectors - 1)))
    return dataclasses.replace(layout, zero_vector=zero)


@st.composite
def weights(draw: st.DrawFn) -> RPQWeight:
    layout = draw(layouts())
    options = draw(codebook_options([(layout.num_vectors, layout.dim)]))
    spec = CodebookSpec.make(layout.num_vectors, layout.dim, **options)
    weight = RPQWeight(spec, layout, plan=draw(st.sampled_from(PLANS)), dtype=torch.float64)
    return randomise(weight, draw(seeds))


def expected(weight: RPQWeight) -> torch.Tensor:
    return naive_tensor(weight)


# ------------------------------------------------------------------------------------------------------ layouts


@given(layouts(), seeds)
def test_a_layout_and_its_inverse(layout: Layout, seed: int) -> None:
    tensor = randn(seed, *layout.shape)
    vectors = layout.to_vectors(tensor)
    assert vectors.shape == (layout.num_vectors, layout.dim)
    assert torch.equal(layout.to_tensor(vectors), tensor)
    matrix = tensor.reshape(math.prod(layout.shape[: layout.lead]), -1)
    assert (layout.rows, layout.cols) == matrix.shape
    assert torch.equal(vectors, matrix.T if layout.transposed else matrix)


@given(layouts())
def test_a_layout_survives_json(layout: Layout) -> None:
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


# ------------------------------------------------------------------------------------------------------- forms


@given(weights(), seeds)
def test_calling_it_gives_the_tensor_with_its_gradients(weight: RPQWeight, seed: int) -> None:
    leaves, dense, factors = dense_twin_of(weight)
    assert_same(weight(), dense)
    theirs = gradients(dense, leaves, seed, factors)
    for name, grad in gradients(weight(), dict(weight.named_parameters()), seed).items():
        assert_same(grad, theirs[name], name)


def dense_twin_of(weight: RPQWeight) -> tuple[dict, torch.Tensor, dict]:
    """The twin of a bare RPQWeight."""
    leaves, dense, factors = dense_twin(torch.nn.ModuleDict({"w_rpq": weight}))
    short = {name.removeprefix("w_rpq."): leaf for name, leaf in leaves.items()}
    return short, dense["w"], {name.removeprefix("w_rpq."): factor for name, factor in factors.items()}


@given(weights(), seeds, st.sampled_from([(), (3,), (2, 2), (0,)]))
def test_rows_and_products_are_those_of_the_matrix(weight: RPQWeight, seed: int, batch: tuple[int, ...]) -> None:
    """lookup, linear (also of some rows), linear_t; whatever the layout, zero vector included."""
    layout = weight.layout
    matrix = expected(weight).reshape(layout.rows, layout.cols)
    ids = torch.randint(layout.rows, batch, generator=generator(seed))
    assert_same(weight(ids), matrix[ids])
    assert_same(weight.lookup(ids.to(torch.int32)), matrix[ids])
    x, y, bias = randn(seed, *batch, layout.cols), randn(seed + 1, *batch, layout.rows), randn(2, layout.rows)
    assert_same(weight.linear(x, bias), x @ matrix.T + bias)
    assert_same(weight.linear_t(y), y @ matrix)
    if layout.zero_vector is None:
        rows = slice(layout.rows // 3, layout.rows // 3 + max(1, layout.rows // 2))
        assert_same(weight.linear(x, bias[rows], rows), x @ matrix[rows].T + bias[rows])


@given(seeds, st.booleans())
def test_a_column_view_looks_rows_up_too(seed: int, signs: bool) -> None:
    spec = CodebookSpec(8, 12, 4, entries=4, signs=signs)
    weight = randomise(RPQWeight(spec, Layout((12, 8), transposed=True), dtype=torch.float64), seed)
    ids = torch.tensor([[3, 0], [11, 3]])
    assert_same(weight(ids), expected(weight)[ids])


def test_a_convolution_needs_filters_as_vectors() -> None:
    weight = RPQWeight(CodebookSpec(9, 4, 2, entries=2), Layout((4, 3, 3), transposed=True))
    with pytest.raises(SpecError, match="a convolution's vectors are its filters"):
        weight.conv(torch.zeros(1, 3, 5), None, (1,), (0,), (1,), 1)


@pytest.mark.parametrize(("grad_scale", "power"), [("sum", 0.0), ("sqrt", 0.5), ("mean", 1.0)])
@pytest.mark.parametrize("sharing", ["own", "layer"])
def test_grad_scale_divides_by_users_to_a_power(grad_scale: str, power: float, sharing: str) -> None:
    """Of the codebooks only: 40 rows in 4 entries are 10 users each, times the sub-vectors of a shared codebook."""
    grads = []
    for how in ("sum", grad_scale):
        spec = CodebookSpec.make(40, 12, codebook_dim=4, codebook_bits=2, sharing=sharing, scale=True, grad_scale=how)
        weight = randomise(RPQWeight(spec, dtype=torch.float64), 0)
        x = randn(1, 5, 12).requires_grad_()
        grads.append(gradients(weight.linear(x), {**dict(weight.named_parameters()), "x": x}))
    users = 10 if sharing == "own" else 30
    assert_same(grads[1]["codebooks"], grads[0]["codebooks"] * users**-power)
    assert torch.equal(grads[1]["x"], grads[0]["x"])
    assert torch.equal(grads[1]["scale"], grads[0]["scale"])


# -------------------------------------------------------------------------------------------------------- plans

PLANNED = {"lookup": {"Contract"}, "dequantize": {"Matmul"}}


@pytest.mark.parametrize("plan", PLANNED)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("rows", [1, 4000])
def test_a_pinned_plan_is_what_runs(plan: str, transposed: bool, rows: int) -> None:
    """In both directions, for some rows too, and backward; whatever the batch would have spoken for."""
    layout = Layout((12, 40) if transposed else (40, 12), transposed=transposed)
    weight = RPQWeight(CodebookSpec(40, 12, 4, entries=4), layout, plan=plan)
    x, y = torch.randn(rows, layout.cols), torch.randn(rows, layout.rows)
    for product in (lambda: weight.linear(x), lambda: weight.linear(x, None, slice(2, 7)), lambda: weight.linear_t(y)):
        with forms_run() as ran:
            product().sum().backward()
        assert ran == PLANNED[plan]


def test_auto_takes_either_plan() -> None:
    """By the batch: otherwise the test above could pass without a plan."""
    weight, seen = RPQWeight(CodebookSpec(256, 256, 16, entries=256)), set()
    for rows in (1, 4000):
        with forms_run() as ran, torch.no_grad():
            weight.linear(torch.zeros(rows, 256))
        seen |= ran
    assert weight.plan == "auto" and seen == {"Contract", "Matmul"}


@pytest.mark.parametrize("plan", PLANS)
def test_a_convolution_is_told_the_plan(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = RPQWeight(CodebookSpec(4, 9, 3, entries=2), Layout((4, 3, 3)), plan=plan)
    told, conv = [], ops.conv
    monkeypatch.setattr(ops, "conv", lambda *args, **kwargs: told.append(kwargs["plan"]) or conv(*args, **kwargs))
    weight.conv(torch.zeros(1, 3, 5), None, (1,), (0,), (1,), 1)
    assert told == [plan]


def test_a_plan_changes_in_place_and_is_no_tensor() -> None:
    weight = RPQWeight(CodebookSpec(40, 12, 4, entries=4))
    keys = list(weight.state_dict())
    weight.plan = "lookup"
    assert weight.plan == "lookup" and list(weight.state_dict()) == keys
    weight.load_state_dict(RPQWeight(weight.spec).state_dict())
    weight.reset_parameters()
    assert weight.plan == "lookup"
    for again in (copy.copy(weight), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.double()):
        assert again.plan == "lookup"


def test_what_was_pickled_before_there_were_plans_chooses_for_itself() -> None:
    weight = RPQWeight(CodebookSpec(40, 12, 4, entries=4), plan="dequantize")
    state = {name: value for name, value in weight.__dict__.items() if name != "_plan"}
    old = RPQWeight.__new__(RPQWeight)
    old.__setstate__(state)
    assert old.plan == "auto"
    old.plan = "lookup"
    assert old.plan == "lookup" and RPQWeight(weight.spec).plan == "auto"


@pytest.mark.parametrize("plan", ["fast", "Expand", "", None, True, 1])
def test_what_is_no_plan_is_refused(plan: object) -> None:
    spec = CodebookSpec(40, 12, 4, entries=4)
    wrong = rf"^plan is one of auto, dequantize, lookup, got {plan!r}$"
    weight = RPQWeight(spec, plan="dequantize")
    with pytest.raises(SpecError, match=wrong):
        weight.plan = plan
    assert weight.plan == "dequantize"
    with pytest.raises(SpecError, match=wrong):
        RPQWeight(spec, plan=plan)
    with pytest.raises(SpecError, match=wrong):
        RPQWeight.from_dense(torch.zeros(40, 12), spec, plan=plan)


# ----------------------------------------------------------------------------------------- making and mistakes


@given(layouts(), seeds, *[st.booleans()] * 3)
def test_from_dense_has_the_layout_of_its_tensor(
    layout: Layout, seed: int, scale: bool, signs: bool, dims: bool
) -> None:
    """With an entry for each vector it is the tensor itself, but for the vector that is zero."""
    flags = {"scale": scale, "signs": signs, "column_scale_group": int(dims)}
    spec = CodebookSpec(layout.num_vectors, layout.dim, 1, entries=max(2, layout.num_vectors), **flags)
    tensor = randn(seed, *layout.shape)
    weight = RPQWeight.from_dense(tensor, spec, layout, plan="lookup")
    vectors = layout.to_vectors(tensor).clone()
    if layout.zero_vector is not None:
        vectors[layout.zero_vector] = 0
    torch.testing.assert_close(weight(), layout.to_tensor(vectors))
    assert weight.spec == spec and weight.layout == layout and weight.plan == "lookup"
    assert all(p.requires_grad == tensor.requires_grad for p in weight.parameters())
    assert (weight.column_scale is not None) == dims and (not dims or bool((weight.column_scale == 1).all()))
    assert not any(t.is_meta for t in (*weight.parameters(), *weight.buffers()))


def test_random_draws_have_the_standard_deviation_asked_for() -> None:
    for stages in (1, 3):
        weight = RPQWeight(CodebookSpec(512, 256, 8, entries=256, stages=stages), std=0.02)
        assert float(weight().detach().std()) == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({}, "N=40, D=12, M=3, d=4, K=4"),
        ({"stages": 2, "num_codebooks": 1}, "N=40, D=12, M=3, d=4, K=4, R=2, G=1"),
        ({"scale": True, "signs": True}, "N=40, D=12, M=3, d=4, K=4, scale, signs"),
        ({"column_scale_group": 3}, "N=40, D=12, M=3, d=4, K=4, column_scale"),
    ],
)
def test_printing_gives_the_numbers(flags: dict, text: str) -> None:
    assert repr(RPQWeight(CodebookSpec(40, 12, 4, entries=4, **flags))) == f"RPQWeight({text})"
    columns = RPQWeight(CodebookSpec(40, 12, 4, entries=4, **flags), Layout((12, 40), transposed=True))
    assert repr(columns) == f"RPQWeight({text}, columns)"
    columns.plan = "dequantize"
    assert repr(columns) == f"RPQWeight({text}, columns, plan=dequantize)"


def test_stored_bytes_are_those_of_the_module() -> None:
    spec = CodebookSpec(40, 12, 4, entries=300, stages=2, num_codebooks=1, scale=True, signs=True, column_scale_group=2)
    weight = RPQWeight(spec)
    tensors = (*weight.parameters(), *weight.buffers())
    assert sum(t.numel() * t.element_size() for t in tensors) == spec.stored_bytes()


def test_factors_are_drawn_as_ones() -> None:
    """So that a weight is as the one without them, until they are trained."""
    weight = RPQWeight(CodebookSpec(40, 12, 4, entries=4, scale=True, column_scale_group=3))
    with torch.no_grad():
        weight.column_scale.normal_()
    weight.reset_parameters()
    assert weight.column_scale.shape == (4,) and bool((weight.column_scale == 1).all())


def test_a_module_from_before_there_was_a_column_scale_works() -> None:
    weight = RPQWeight(CodebookSpec(40, 12, 4, entries=4))
    state = {**weight.__dict__, "_parameters": {k: p for k, p in weight._parameters.items() if k != "column_scale"}}
    old = RPQWeight.__new__(RPQWeight)
    old.__setstate__(state)
    assert old.column_scale is None and torch.equal(old(), weight()) and repr(old) == repr(weight)


def test_mistakes_are_refused() -> None:
    spec = CodebookSpec(40, 12, 4, entries=4)
    with pytest.raises(SpecError, match=r"the spec has 40 vectors of length 12, the tensor 12 of length 40"):
        RPQWeight(spec, Layout((12, 40)))
    for dtype in (torch.complex64, torch.int32):
        with pytest.raises(InputError, match=f"floating point, got {dtype}"):
            RPQWeight(spec, dtype=dtype)
        with pytest.raises(InputError, match=f"floating tensors can be fitted, got {dtype}"):
            RPQWeight.from_dense(torch.zeros(40, 12, dtype=dtype), spec)
    with pytest.raises(InputError, match="infinite or NaN"):
        RPQWeight.from_dense(torch.full((40, 12), float("inf")), spec)
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(InputError, match=f"looked up by integers, got {dtype}"):
            RPQWeight(spec)(torch.zeros(3, dtype=dtype))


def test_codes_of_two_bytes_load_and_are_checked() -> None:
    """uint16 has few operators in torch; loading, range checks and lookups need none that are missing."""
    spec = CodebookSpec(40, 12, 4, entries=65_536)
    weight, other = RPQWeight(spec), RPQWeight(spec)
    assert weight.codes.dtype == torch.uint16
    other.load_state_dict(weight.state_dict())
    assert torch.equal(other(), weight())
    small = RPQWeight(CodebookSpec(40, 12, 4, entries=40_000))
    state = small.state_dict()
    state["codes"] = torch.full_like(state["codes"].int(), 40_000).to(torch.uint16)
    with pytest.raises(CodeError, match=r"codes holds 40000 to 40000, but the codebook has 40000 entries"):
        small.load_state_dict(state)


@pytest.mark.parametrize("name", ["codebooks", "column_scale"])
def test_parametrised_tensors_are_the_ones_in_use(name: str) -> None:
    """torch.nn.utils.parametrize takes the Parameter away and computes an attribute instead."""
    weight = RPQWeight(CodebookSpec(32, 8, 4, entries=4, column_scale_group=1), dtype=torch.float64)
    before = weight().detach()
    torch.nn.utils.parametrize.register_parametrization(weight, name, Doubled())
    torch.testing.assert_close(weight(), 2 * before)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(weight.linear(x), x @ (2 * before).T)


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x
