"""The operations that layers call: checks, autocast, per-sample gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from rpqfx import ops
from rpqfx.codebook import CodebookSpec
from rpqfx.errors import InputError, SpecError
from rpqfx.ops import products
from rpqfx.ops.conv_contract import ConvContract
from rpqfx.ops.conv_forms import Conv
from tests.helpers import assert_same, floats, gradients, naive_expand, randn, seeds, specs, stored, stored_all

SPEC = CodebookSpec(5, 6, 2, entries=3, stages=2, num_codebooks=3, scale=True, signs=True, column_scale_group=1)
FILTERS = CodebookSpec(4, 6, 3, entries=3, scale=True, signs=True, column_scale_group=3)
# With two of everything, for checks that go number by number.
SMALL = CodebookSpec(3, 4, 2, entries=2, stages=2, num_codebooks=2, scale=True, signs=True, column_scale_group=1)
CONV = {"stride": (1,), "padding": (1,), "dilation": (1,), "groups": 1}


@pytest.fixture(params=[True, False], ids=["lookup", "matmul"])
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Both ways to run a product."""
    for name in ("cheaper", "cheaper_conv"):
        monkeypatch.setattr(products, name, lambda *args: "lookup" if request.param else "dequantize")
    return request.param


@given(
    specs(column_scale=True),
    seeds,
    st.booleans(),
    st.sampled_from([(), (4,), (2, 3), (0,)]),
    st.sampled_from([1.0, 0.25]),
)
def test_linear_and_linear_t_are_the_dense_products_with_their_gradients(
    spec: CodebookSpec, seed: int, table: bool, batch: tuple[int, ...], factor: float
) -> None:
    """Under both plans; grad_factor multiplies the codebooks' gradient and nothing else."""
    weight = stored_all(spec, seed)
    leaves = floats(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "cheaper", lambda *args: "lookup" if table else "dequantize")
        for form, dense, width in (
            (ops.linear, F.linear, spec.dim), (ops.linear_t, torch.matmul, spec.num_vectors),
        ):  # fmt: skip
            x = randn(seed + 1, *batch, width).requires_grad_()
            ours = form(x, weight, grad_factor=factor)
            theirs = dense(x, naive_expand(*weight[:5]))
            assert_same(ours, theirs)
            expected = gradients(theirs, {**leaves, "x": x}, factors={"codebooks": factor})
            for name, grad in gradients(ours, {**leaves, "x": x}).items():
                assert_same(grad, expected[name], name)


@given(
    specs(column_scale=True),
    seeds,
    st.sampled_from([(), (4,), (2, 3), (0,)]),
    st.booleans(),
    st.sampled_from([1.0, 0.25]),
)
def test_lookup_is_rows_of_expand_with_their_gradients(
    spec: CodebookSpec, seed: int, batch: tuple[int, ...], sparse: bool, factor: float
) -> None:
    weight = stored_all(spec, seed)
    leaves = floats(weight)
    ids = torch.randint(spec.num_vectors, batch, generator=torch.Generator().manual_seed(seed))
    ours = ops.lookup(ids, weight, factor, sparse)
    theirs = naive_expand(*weight[:5])[ids]
    assert_same(ours, theirs)
    expected = gradients(theirs, leaves, factors={"codebooks": factor})
    for name, grad in gradients(ours, leaves).items():
        assert_same(grad, expected[name], name)


@given(specs(column_scale=True), seeds, st.sampled_from([1.0, 0.25]))
def test_expand_is_the_definition_with_its_gradients(spec: CodebookSpec, seed: int, factor: float) -> None:
    """The factors of the columns are the last thing: the matrix without them, times them."""
    weight = stored_all(spec, seed)
    leaves = floats(weight)
    ours, theirs = ops.expand(weight, factor), naive_expand(*weight[:5])
    assert_same(ours, theirs)
    if weight.dims is not None:
        assert torch.equal(ours, ops.expand(weight._replace(column_scale=None)) * weight.dims)
    expected = gradients(theirs, leaves, factors={"codebooks": factor})
    for name, grad in gradients(ours, leaves).items():
        assert_same(grad, expected[name], name)


@given(specs(column_scale=True), seeds)
def test_vectors_is_the_matrix_of_those_rows(spec: CodebookSpec, seed: int) -> None:
    """By index and by slice; codes, signs and scale follow, the codebooks stay the same tensor."""
    tensors = stored_all(spec, seed)
    dense = naive_expand(*tensors[:5])
    index = torch.arange(spec.num_vectors - 1, -1, -2)
    for picked in (index, slice(0, max(1, spec.num_vectors // 2))):
        some = tensors.vectors(picked)
        assert some.codebooks is tensors.codebooks
        assert_same(ops.expand(some), dense[picked])


@given(specs(column_scale=True), seeds)
def test_sub_vectors_is_the_matrix_of_those_columns(spec: CodebookSpec, seed: int) -> None:
    """By index and by slice; factors that several columns share stay shared where a slice does not cut through them."""
    tensors, d = stored_all(spec, seed), spec.codebook_dim
    share = spec.num_subvectors // spec.codebooks_shape[1]
    dense = naive_expand(*tensors[:5])
    first = share * (spec.num_subvectors // share // 2)
    for picked in (
        torch.arange(first, spec.num_subvectors),
        slice(first, spec.num_subvectors),
        slice(0, spec.num_subvectors),
    ):
        some = tensors.sub_vectors(picked)
        begin = int(picked[0] if isinstance(picked, Tensor) else picked.start) * d
        assert_same(ops.expand(some), dense[:, begin:])
        if isinstance(picked, slice) and spec.column_scale_group and begin % spec.column_scale_group == 0:
            assert some.share == spec.column_scale_group


@given(
    seeds, st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.sampled_from([3, 6, 12]),
    st.sampled_from(["lookup", "dequantize"]), st.booleans(),
)  # fmt: skip
def test_conv_is_the_dense_one_with_a_factor_for_each_channel(
    seed: int, transposed: bool, scale: bool, groups: int, share: int, plan: ops.Plan, batched: bool
) -> None:
    """Of a filter's own channels, for every channel group the same; or for each two or four of them."""
    spec = CodebookSpec(4, 12, 6, entries=3, scale=scale, column_scale_group=share)
    weight, shape = stored_all(spec, seed), (4, 4, 3)
    x = randn(seed + 1, *(2,) * batched, 4 if transposed else 4 * groups, 7).requires_grad_()
    bias = randn(seed + 2, 4 * groups if transposed else 4).requires_grad_()
    settings = {"stride": (2,), "padding": (1,), "dilation": (1,), "groups": groups}
    leaves = {**floats(weight), "x": x, "bias": bias}
    ours = ops.conv(x, weight, shape, bias, **settings, transposed=transposed, plan=plan)
    dense = F.conv_transpose1d if transposed else F.conv1d
    theirs = dense(x, naive_expand(*weight[:5]).view(shape), bias, **settings)
    assert_same(ours, theirs)
    expected = gradients(theirs, leaves)
    for name, grad in gradients(ours, leaves).items():
        assert_same(grad, expected[name], name)


def test_a_convolution_refuses_factors_that_differ_within_a_channel() -> None:
    filters = stored_all(CodebookSpec(4, 6, 3, entries=3, column_scale_group=2), 0)
    with pytest.raises(SpecError, match=r"the 3 taps of a channel have one factor, but 2 elements of a filter share"):
        ops.conv(randn(1, 2, 2, 7), filters, (4, 2, 3), **CONV)


@pytest.mark.parametrize("name", ["linear", "linear_t", "expand", "lookup", "conv"])
def test_gradients_are_right_to_the_second_order(name: str, plan: bool) -> None:
    """Of everything that is trained, the factors included."""
    weight = stored_all(FILTERS if name == "conv" else SMALL, 0)
    leaves = floats(weight)
    x = {"linear": randn(1, 2, 4), "linear_t": randn(1, 2, 3), "conv": randn(1, 2, 2, 5)}.get(name)

    def run(*args: Tensor) -> Tensor:
        tensors = weight._replace(**dict(zip(leaves, args, strict=False)))
        if name == "conv":
            return ops.conv(args[-1], tensors, (4, 2, 3), **CONV)
        if name == "lookup":
            return ops.lookup(torch.tensor([2, 0, 2]), tensors)
        return ops.expand(tensors) if name == "expand" else getattr(ops, name)(args[-1], tensors)

    inputs = (*leaves.values(), *(() if x is None else (x.requires_grad_(),)))
    assert gradcheck(run, inputs) and gradgradcheck(run, inputs)


def test_scale_grad_keeps_every_bit_and_scales_the_gradient() -> None:
    x = randn(0, 7, dtype=torch.float32).mul_(1e-20).requires_grad_()
    y = ops.scale_grad(x, 0.25)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("under", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_the_dense_operation(plan: bool, dtype: torch.dtype, under: torch.dtype) -> None:
    """Whatever floating dtype arrives; the gradients have the dtype of what they belong to."""
    weight, filters = stored_all(SPEC, 0, torch.float32), stored_all(FILTERS, 0, torch.float32)
    leaves = floats(weight)
    x = randn(1, 3, 6, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", dtype=under):
        y = ops.linear(x, weight)
        dense = F.linear(x, ops.expand(weight))
        back = ops.linear_t(y, weight)
        image = ops.conv(randn(2, 2, 2, 7, dtype=dtype), filters, (4, 2, 3), **CONV)
    assert y.dtype == dense.dtype == back.dtype == image.dtype == under
    torch.testing.assert_close(y, dense, rtol=0.05, atol=0.1)
    y.float().sum().backward()
    assert x.grad.dtype == dtype and {leaf.grad.dtype for leaf in leaves.values()} == {torch.float32}


def test_autocast_leaves_float64_alone(plan: bool) -> None:
    tensors = stored_all(SPEC, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.linear(randn(1, 3, 6), tensors)
    assert y.dtype == torch.float64
    assert_same(y, randn(1, 3, 6) @ naive_expand(*tensors[:5]).T)


@pytest.mark.parametrize("function", [ops.linear, ops.linear_t])
def test_inputs_that_do_not_fit_are_refused(function: object) -> None:
    tensors = stored_all(SPEC, 0)
    width = 6 if function is ops.linear else 5
    with pytest.raises(InputError, match=rf"expected {width} features in dimension -1 .* \(3, 4\)"):
        function(randn(1, 3, 4), tensors)
    with pytest.raises(InputError, match=rf"expected {width} features"):
        function(randn(1), tensors)
    with pytest.raises(InputError, match=r"the input is torch.float32 and the codebooks are torch.float64"):
        function(randn(1, 3, width, dtype=torch.float32), tensors)
    with pytest.raises(InputError, match=r"complex64 input; pass its real and imaginary parts apart"):
        function(torch.zeros(3, width, dtype=torch.complex64), tensors)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers_are_refused_with_and_without_autocast(dtype: torch.dtype) -> None:
    tensors = stored_all(SPEC, 0, torch.float32)
    for enabled in (False, True):
        with torch.autocast("cpu", enabled=enabled), pytest.raises(InputError, match=str(dtype)):
            ops.linear(torch.ones(3, 6, dtype=dtype), tensors)


def test_a_convolution_refuses_other_channels_and_dtypes() -> None:
    filters = stored_all(FILTERS, 0)
    with pytest.raises(InputError, match=r"expected 2 features in dimension -2 .* \(2, 3, 7\)"):
        ops.conv(randn(1, 2, 3, 7), filters, (4, 2, 3), **CONV)
    with pytest.raises(InputError, match=r"float32 and the codebooks are torch.float64"):
        ops.conv(randn(1, 2, 2, 7, dtype=torch.float32), filters, (4, 2, 3), **CONV)


def per_sample(function: object, books: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by vmap(grad), and by one backward a sample."""
    grad = torch.func.grad(lambda books, x: function(books, x).square().sum())
    return torch.vmap(grad, (None, 0))(books, samples), torch.stack([grad(books, x) for x in samples])


def test_per_sample_gradients_of_linear_maps(plan: bool) -> None:
    books, *rest = stored_all(SPEC, 0)
    for form, width in ((ops.linear, 6), (ops.linear_t, 5)):
        fast, slow = per_sample(
            lambda books, x, form=form: form(x, ops.Tensors(books, *rest)),
            books,
            randn(1, 4, width),
        )
        assert_same(fast, slow)


@pytest.mark.parametrize("transposed", [False, True])
def test_per_sample_gradients_of_convolutions(plan: bool, transposed: bool) -> None:
    books, *rest = stored_all(FILTERS, 0)
    fast, slow = per_sample(
        lambda books, x: ops.conv(
            x, ops.Tensors(books, *rest), (4, 2, 3), **CONV, transposed=transposed
        ),
        books, randn(1, 3, 4 if transposed else 2, 7),
    )  # fmt: skip
    assert_same(fast, slow)


@pytest.mark.parametrize(
    ("shape", "d", "groups", "runs"),
    [
        ((4, 4, 3), 3, 1, "lookup"), ((4, 4, 3), 6, 1, "lookup"), ((4, 4, 3), 4, 1, "dequantize"),
        ((4, 4, 1), 2, 1, "lookup"), ((4, 4, 3), 3, 2, "dequantize"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_contracts_when_asked_to_and_able_to(
    shape: tuple[int, ...], d: int, groups: int, runs: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs sub-vectors of whole channels and one channel group; else it expands, as it does when told to."""
    ran = []
    for kind in (Conv, ConvContract):
        monkeypatch.setattr(kind, "out", lambda *args, kind=kind, out=kind.out: ran.append(kind) or out(*args))
    weight = ops.Tensors(*stored(CodebookSpec(4, math.prod(shape[1:]), d, entries=3), 0))
    settings = {**CONV, "groups": groups, "transposed": transposed}
    results = [
        ops.conv(randn(1, 2, 4 * groups, 7)[:, : 4 if transposed else None], weight, shape, **settings, plan=p)
        for p in ("lookup", "dequantize")
    ]
    assert ran == [ConvContract if runs == "lookup" else Conv, Conv]
    assert_same(*results)


def test_left_to_itself_a_convolution_takes_what_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked about the positions of the vectors' maps: of the output, or of a transposed one's input."""
    asked = []
    monkeypatch.setattr(products, "cheaper_conv", lambda *args: asked.append(args) or "lookup")
    weight = stored_all(FILTERS, 0)
    for transposed, channels in ((False, 2), (True, 4)):
        ops.conv(randn(1, 5, channels, 8), weight, (4, 2, 3), **{**CONV, "stride": (2,), "transposed": transposed})
    device = torch.device("cpu")
    given = ((1, 2, 3, 3), (1, 2, 4))
    assert asked == [(*given, 20, device, torch.float64), (*given, 40, device, torch.float64)]


def test_per_sample_gradients_of_lookups() -> None:
    books, *rest = stored_all(SPEC, 0)
    fast, slow = per_sample(
        lambda books, ids: ops.lookup(ids, ops.Tensors(books, *rest)), books,
        torch.tensor([[0, 1], [4, 4], [2, 0]]),
    )  # fmt: skip
    assert_same(fast, slow)


def test_vmap_over_the_batch_is_the_batch(plan: bool) -> None:
    """Linear maps, convolutions and lookups take a mapped axis as a batch axis."""
    tensors, filters = stored_all(SPEC, 0), stored_all(FILTERS, 0)
    for form, width in ((ops.linear, 6), (ops.linear_t, 5)):
        x = randn(1, 4, 3, width)
        assert_same(torch.vmap(lambda x, form=form: form(x, tensors))(x), form(x, tensors))
    x = randn(1, 4, 2, 7)
    assert_same(
        torch.vmap(lambda x: ops.conv(x, filters, (4, 2, 3), **CONV))(x),
        ops.conv(x, filters, (4, 2, 3), **CONV),
    )
    x = randn(1, 4, 3, 2, 7)
    mapped = torch.vmap(lambda x: ops.conv(x, filters, (4, 2, 3), **CONV))(x)
    assert_same(mapped, torch.stack([ops.conv(one, filters, (4, 2, 3), **CONV) for one in x]))
    ids = torch.tensor([[0, 1], [4, 4], [2, 0]])
    assert_same(torch.vmap(lambda ids: ops.lookup(ids, tensors))(ids), ops.lookup(ids, tensors))
