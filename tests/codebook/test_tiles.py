"""Codes in tiles: two to a byte, in the order of a product; and layers whose codes lie so."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rpqfx import CodebookSpec, ops
from rpqfx.codebook.tiles import from_tiles, pick, tiles_shape, to_tiles
from rpqfx.errors import CodeError, InputError, SpecError
from rpqfx.nn import RPQWeight
from rpqfx.ops import Tensors, linear, linear_t, lookup

shapes = st.tuples(st.integers(2, 4), st.integers(1, 5), st.integers(1, 200))


def spec_of(vectors: int = 70, dim: int = 24, entries: int = 16, stages: int = 3, signs: bool = False) -> CodebookSpec:
    return CodebookSpec(vectors, dim, 4, entries, stages, 1, signs=signs, tiled=True)


@given(shape=shapes, seed=st.integers(0, 2**16))
def test_codes_come_back_from_tiles_whole_and_in_part(shape: tuple[int, int, int], seed: int):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, shape, generator=g).to(torch.uint8)
    tiles = to_tiles(codes)
    assert tiles.shape == tiles_shape(*shape) and tiles.dtype == torch.uint8
    assert torch.equal(from_tiles(tiles, shape[2]), codes)
    index = torch.randint(shape[2], (7,), generator=g)
    assert torch.equal(pick(tiles, index), codes[..., index])


def test_tiles_take_half_a_byte_a_code():
    spec = spec_of(vectors=640)
    assert RPQWeight(spec).stored_codes.nbytes * 2 == torch.Size(spec.codes_shape).numel()
    assert spec.stored_bytes() == RPQWeight(spec).stored_codes.nbytes + RPQWeight(spec).codebooks.nbytes


@pytest.mark.parametrize("wrong", [{"entries": 17}, {"stages": 1}, {"signs": True}])
def test_what_does_not_fit_into_tiles_is_refused(wrong: dict[str, object]):
    with pytest.raises(SpecError, match="tiles hold codes of at most 16 entries"):
        spec_of(**wrong)  # type: ignore[arg-type]


@given(
    rows=st.sampled_from([1, 2, 5, 33, 70, 600]), entries=st.sampled_from([2, 11, 16]), stages=st.integers(2, 6),
    d=st.sampled_from([1, 2, 3, 4, 6, 8, 16]), vectors=st.integers(1, 150), plan=st.sampled_from(ops.PLANS),
    seed=st.integers(0, 2**16), factors=st.booleans(),
)  # fmt: skip
def test_products_are_those_of_the_same_codes_without_tiles(
    rows: int, entries: int, stages: int, d: int, vectors: int, plan: ops.Plan, seed: int, factors: bool
):
    g = torch.Generator().manual_seed(seed)
    books = torch.randn(stages, 1, entries, d, generator=g, requires_grad=True)
    codes = torch.randint(entries, (stages, 6, vectors), generator=g).to(torch.uint8)
    scale = torch.rand(vectors, generator=g).requires_grad_() if factors else None
    dims = torch.rand(6 * d, generator=g).requires_grad_() if factors else None
    x, bias = torch.randn(rows, 6 * d, generator=g, requires_grad=True), torch.randn(vectors, generator=g)
    y = torch.randn(rows, vectors, generator=g)
    held = Tensors(books, to_tiles(codes), scale, None, dims, vectors)
    plain = held.untiled()
    wanted = [t for t in (x, books, scale, dims) if t is not None]

    def grads(tensors: Tensors) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = linear(x, tensors, bias, plan=plan)
        return out, torch.autograd.grad(out, wanted, y)

    (ours, our_grads), (theirs, their_grads) = grads(held), grads(plain)
    seen = x if dims is None else x * dims
    dots = torch.einsum("bmi,rki->brmk", seen.view(rows, 6, d), books[:, 0]).abs().amax((1, 2, 3))
    rounding = (dots / 32767 / 2 * 6 * stages)[:, None].detach() * (1 if scale is None else scale.detach())
    assert ((ours - theirs).abs() <= rounding + 1e-5 * theirs.abs().max()).all()
    for tensor, a, b in zip(wanted, our_grads, their_grads, strict=True):
        if tensor is scale:  # which the product itself is part of
            assert ((a - b).abs() <= (rounding * y.abs()).sum(0) / scale + 1e-4).all()
        else:
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6
    assert torch.allclose(linear_t(y, held), linear_t(y, plain), atol=1e-4)
    ids = torch.randint(vectors, (3, 2), generator=g)
    assert torch.equal(lookup(ids, held), lookup(ids, plain))


def test_what_tables_round_is_within_its_bound():
    """Half a unit a use, where the unit is the largest dot product of the 128 uses that share it over 32,767."""
    g = torch.Generator().manual_seed(0)
    books = torch.randn(4, 1, 16, 8, generator=g)
    codes = torch.randint(16, (4, 24, 130), generator=g).to(torch.uint8)
    x = torch.randn(5, 24 * 8, generator=g) * torch.logspace(-3, 3, 24 * 8)
    held = Tensors(books, to_tiles(codes), tiled=130)
    weight = sum(book[0][code.long()] for book, code in zip(books.double(), codes, strict=True))
    exact = x.double() @ weight.transpose(0, 1).reshape(130, -1).t()
    dots = torch.einsum("bmi,rki->brmk", x.double().view(5, 24, 8), books[:, 0].double()).abs()
    bound = dots.amax((1, 2, 3)) / 32767 / 2 * 96 + 1e-5 * exact.abs().amax(1)
    assert ((linear(x, held, plan="lookup") - exact).abs().amax(1) <= bound).all()


def test_parts_of_a_tiled_weight_are_parts_of_the_matrix():
    weight = RPQWeight(spec_of(vectors=200, dim=32))
    whole, part = weight(), weight.part()
    x = torch.randn(3, 32)
    for start, length in ((0, 64), (64, 136), (128, 10), (5, 70), (64, 1)):
        some = part.narrow(0, start, length)
        assert some is not None and torch.allclose(some.dense(), whole[start : start + length])
        assert torch.allclose(some.linear(x), x @ whole[start : start + length].t(), atol=1e-3)
    for start, length in ((0, 4), (8, 12)):
        some = part.narrow(1, start, length)
        assert some is not None and torch.allclose(some.dense(), whole[:, start : start + length])
        assert torch.allclose(
            some.linear(x[:, :length]), x[:, :length] @ whole[:, start : start + length].t(), atol=1e-3
        )


def test_tiles_are_saved_copied_loaded_and_sent_as_they_lie():
    weight, other = RPQWeight(spec_of()), RPQWeight(spec_of())
    [(_, buffer)] = weight.named_buffers()
    assert buffer is weight.stored_codes and buffer.dtype == torch.uint8 and buffer.dim() == 3
    other.load_state_dict(weight.state_dict())
    assert torch.equal(other(), weight()) and other.stored_codes is not weight.stored_codes
    other.codes = torch.zeros_like(other.codes)
    other.load_state_dict({**weight.state_dict(), "codes": weight.codes})  # and codes as they are without tiles
    assert torch.equal(other(), weight())
    other.load_state_dict(weight.state_dict(), assign=True)
    assert torch.equal(other(), weight())
    made = copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))
    assert all(torch.equal(one(), weight()) for one in made)
    file = io.BytesIO()
    torch.save(weight.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(), weight())
    few = RPQWeight(spec_of(entries=9))
    with pytest.raises(CodeError, match="has 9 entries"):
        few.load_state_dict({**few.state_dict(), "codes": torch.full_like(few.stored_codes, 255)})


def test_inputs_that_do_not_fit_are_refused_in_the_same_words_without_gradients():
    weight = RPQWeight(spec_of())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for x in (torch.randn(2, 23), torch.randn(())):
                with pytest.raises(InputError, match="expected 24 features"):
                    weight.linear(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_every_dtype_runs(dtype: torch.dtype):
    weight = RPQWeight(spec_of(), dtype=dtype)
    x = torch.randn(3, 24).to(dtype)
    exact = x.double() @ weight().double().t()
    limit = {torch.float32: 2e-4, torch.float64: 1e-12}.get(dtype, 2e-2)
    assert (weight.linear(x).double() - exact).norm() <= limit * exact.norm()


def test_numbers_that_are_none_stay_none():
    weight = RPQWeight(spec_of(vectors=64))
    x = torch.randn(4, 24)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    y = weight.linear(x)
    assert y[[0, 3]].isfinite().all() and not y[1].isfinite().any() and not y[2].isfinite().any()
    tiny = torch.full((1, 24), 1e-42)
    assert weight.linear(tiny).isfinite().all() and weight.linear(torch.zeros(2, 24)).eq(0).all()


@pytest.mark.traced
def test_compiled_products_are_the_same():
    weight = RPQWeight(spec_of(dim=32), std=0.2).requires_grad_(False)
    x = torch.randn(2, 32)
    with torch.no_grad():
        compiled = torch.compile(weight.linear, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (1, 2, 50):
            some = torch.randn(rows, 32)
            assert torch.allclose(compiled(some), weight.linear(some), atol=1e-5)
    program = torch.export.export(_Product(weight), (x,))
    assert torch.allclose(program.module()(x), weight.linear(x), atol=1e-3)


class _Product(nn.Module):
    def __init__(self, weight: RPQWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.linear(x)


def test_tiles_on_the_meta_device_have_the_shapes_of_others() -> None:
    codes = torch.zeros(3, 2, 70, dtype=torch.uint8)
    tiles = to_tiles(codes)
    assert to_tiles(codes.to("meta")).shape == tiles.shape
    assert from_tiles(tiles.to("meta"), 70).shape == from_tiles(tiles, 70).shape
