"""Parts of a quantized tensor are the parts of the tensor, for every layout, and so are products with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.codebook import CodebookSpec
from rpqfx.nn import Layout, RPQWeight
from rpqfx.nn.weight_slice import Part
from tests.helpers import assert_same, divisors, gradients, naive_tensor, randn, randomise, seeds


@st.composite
def expert_layouts(draw: st.DrawFn) -> Layout:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=3, max_size=3)))
    return Layout(shape, 1, draw(st.booleans()), None, draw(st.sampled_from(["shared", "own"])))


@st.composite
def plain_layouts(draw: st.DrawFn) -> Layout:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
    layout = Layout(shape, draw(st.integers(1, len(shape) - 1)), draw(st.booleans()))
    zero = draw(st.one_of(st.none(), st.integers(0, layout.num_vectors - 1)))
    return Layout(shape, layout.lead, layout.transposed, zero)


@st.composite
def held(draw: st.DrawFn, layouts: st.SearchStrategy[Layout]) -> RPQWeight:
    layout = draw(layouts)
    d = draw(st.sampled_from(divisors(layout.unit)))
    sub_vectors = layout.dim // d
    experts = layout.shape[0] if layout.experts == "own" else 1
    books = draw(st.sampled_from([n for n in divisors(sub_vectors) if n in (1, sub_vectors) or n % experts == 0]))
    flags = {"scale": draw(st.booleans()), "signs": draw(st.booleans())}
    flags["column_scale_group"] = draw(st.sampled_from([0, *divisors(layout.dim)]))
    spec = CodebookSpec(layout.num_vectors, layout.dim, d, 3, draw(st.integers(1, 2)), books, **flags)
    return randomise(RPQWeight(spec, layout, dtype=torch.float64), draw(seeds))


def tensor_of(weight: RPQWeight) -> Tensor:
    return naive_tensor(weight)


def assert_equal_with_gradients(weight: RPQWeight, ours: Tensor, theirs: Tensor) -> None:
    assert_same(ours, theirs)
    parameters = dict(weight.named_parameters())
    wanted = gradients(theirs, parameters)
    for name, grad in gradients(ours, parameters).items():
        assert_same(grad, wanted[name], name)


@given(expert_layouts(), seeds)
def test_vectors_of_experts_by_definition(layout: Layout, seed: int) -> None:
    """Shared: all experts' vectors one below the other. Own: side by side. Both ways lead back."""
    tensor = randn(seed, *layout.shape)
    matrices = [matrix.T if layout.transposed else matrix for matrix in tensor]
    vectors = torch.cat(matrices, 0 if layout.experts == "shared" else 1)
    assert torch.equal(layout.to_vectors(tensor), vectors)
    assert torch.equal(layout.to_tensor(vectors), tensor)
    assert (layout.num_vectors, layout.dim) == vectors.shape
    assert layout.unit == matrices[0].shape[1]
    assert Layout.from_dict(layout.to_dict()) == layout


@given(held(st.one_of(plain_layouts(), expert_layouts())), st.data())
def test_a_range_of_an_axis_is_that_range_of_the_tensor(weight: RPQWeight, data: st.DataObject) -> None:
    """And a range of that; where it is None, it is not whole vectors or sub-vectors in a row."""
    part, tensor = weight.part(), tensor_of(weight)
    for _ in range(2):
        axis = data.draw(st.integers(0, tensor.dim() - 1))
        start = data.draw(st.integers(0, tensor.shape[axis] - 1))
        length = data.draw(st.integers(1, tensor.shape[axis] - start))
        some = part.narrow(axis, start, length)
        if some is None:
            along = part.layout.vector_axes if axis in part.layout.vector_axes else part.layout.dim_axes
            assert along != (axis,) or along == part.layout.dim_axes
            return
        part, tensor = some, tensor.narrow(axis, start, length)
        assert part.layout.shape == tuple(tensor.shape)
    assert_equal_with_gradients(weight, part.dense(), tensor)


@given(held(plain_layouts()), st.data())
def test_vectors_in_a_row_are_always_a_part(weight: RPQWeight, data: st.DataObject) -> None:
    first = weight.layout.vector_axes[0]
    start = data.draw(st.integers(0, weight.layout.shape[first] - 1))
    some = weight.part().narrow(first, start, weight.layout.shape[first] - start)
    assert some is not None
    assert_same(some.dense(), tensor_of(weight).narrow(first, start, weight.layout.shape[first] - start))


@given(held(expert_layouts()), st.data())
def test_experts_one_by_one_and_some_of_them(weight: RPQWeight, data: st.DataObject) -> None:
    tensor = tensor_of(weight)
    each = [part.dense() for part in weight.part().experts()]
    assert_equal_with_gradients(weight, torch.stack(each), tensor)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, len(tensor) - 1), min_size=1, max_size=4)))
    assert_equal_with_gradients(weight, weight.part().take(ids).dense(), tensor_of(weight)[ids])


@pytest.mark.few(50)
@given(held(expert_layouts()), st.integers(1, 3), seeds)
def test_products_with_one_expert(weight: RPQWeight, rows: int, seed: int) -> None:
    tensor, (experts, a, b) = tensor_of(weight), weight.layout.shape
    e = seed % experts
    narrowed = weight.part().narrow(0, e, 1)
    assert narrowed is not None
    one = narrowed.drop(0)
    assert one is not None and one.layout.shape == (a, b)
    x, y = randn(seed, rows, b), randn(seed + 1, rows, a)
    assert_equal_with_gradients(weight, one.linear(x), x @ tensor[e].T)
    assert_equal_with_gradients(weight, one.linear_t(y), y @ tensor_of(weight)[e])


def test_a_part_is_not_expanded_to_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even its codes are copied."""
    weight = RPQWeight(CodebookSpec(3 * 16, 8, 4, 4), Layout((3, 16, 8), experts="shared"))
    monkeypatch.setattr(Part, "dense", lambda self: pytest.fail("expanded"))
    memory = weight.codes.untyped_storage().data_ptr()
    for part in (weight.part().narrow(0, 1, 2), *weight.part().experts()):
        assert part is not None and part.tensors.codes.untyped_storage().data_ptr() == memory


def test_only_one_experts_row_cannot_be_dropped() -> None:
    weight = RPQWeight(CodebookSpec(3, 8, 4, 2), Layout((3, 1, 8), experts="shared"))
    assert weight.part().drop(1) is None
