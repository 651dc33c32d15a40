"""Tensors of experts, heads and pieces of weights: every use equals the dense tensor's, which is never made."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import InputError
from rpqfx.nn import Layout, RPQWeight, VirtualWeight
from rpqfx.nn.weight_slice import Part
from tests.helpers import assert_as_dense, assert_same, naive_tensor, randn, randomise

E, A, B, T = 3, 8, 6, 5
XA, XB = randn(1, E, T, A), randn(2, E, T, B)
TA, TB = randn(3, T, A), randn(4, T, B)
MANY = randn(5, 2, E, T, A)
BIAS = randn(6, E, T, B)
IDS = torch.tensor([2, 0, 2, 1, 1])

# w is [E, A, B].
SERVED: dict[str, Callable[[Any], Tensor]] = {
    "bmm": lambda w: torch.bmm(XA, w),
    "Tensor.bmm transposed": lambda w: XB.bmm(w.transpose(1, 2)),
    "bmm first": lambda w: torch.bmm(w, XB.mT),
    "baddbmm": lambda w: torch.baddbmm(BIAS, XA, w, beta=0.5, alpha=2.0),
    "Tensor.baddbmm": lambda w: BIAS.baddbmm(XA, w),
    "x @ w": lambda w: XA @ w,
    "x @ w.mT": lambda w: XB @ w.mT,
    "one x for all": lambda w: TA @ w,
    "a batch of x": lambda w: MANY @ w,
    "a batch of x, one for all": lambda w: MANY[:, :1] @ w,
    "w @ x": lambda w: w @ XB.mT,
    "matmul": lambda w: torch.matmul(XA, w),
    "einsum eta,eab->etb": lambda w: torch.einsum("eta,eab->etb", XA, w),
    "einsum etb,eab->tea": lambda w: torch.einsum("etb,eab->tea", XB, w),
    "einsum ta,eab->teb": lambda w: torch.einsum("ta,eab->teb", TA, w),
    "einsum eta,eab->tb": lambda w: torch.einsum("eta,eab->tb", XA, w),
    "einsum w first": lambda w: torch.einsum("eab,etb->eta", w, XB),
    "einsum turned": lambda w: torch.einsum("eta,eba->etb", XA, w.mT),
    "one, F.linear": lambda w: F.linear(TB, w[1]),
    "one, @": lambda w: TA @ w[-1],
    "one by a tensor": lambda w: F.linear(TB, w[torch.tensor(2)]),
    "one by a negative tensor": lambda w: F.linear(TB, w[torch.tensor(-1)]),
    "unbind": lambda w: torch.stack([TA @ one for one in w.unbind()]),
    "torch.unbind": lambda w: torch.stack([TA @ one for one in torch.unbind(w)]),
    "list": lambda w: torch.stack([F.linear(TB, one) for one in w]),
    "two of them": lambda w: XA[1:] @ w[1:],
    "select": lambda w: TA @ w.select(0, 1),
    "narrow": lambda w: torch.bmm(XA[:2], w.narrow(0, 0, 2)),
    "some by ids": lambda w: torch.bmm(TA[IDS][:, None], w[IDS]),
}

EXPANDED: dict[str, Callable[[Any], Tensor]] = {
    "w * 2": lambda w: w * 2,
    "w.sum": lambda w: w.sum((0, 2)),
    "one * 2": lambda w: w[1] * 2,
    "a column of each": lambda w: w[:, :, 1] + 0,
    "a row of one": lambda w: w[1, 2] * TB,
    "every other": lambda w: w[::2] * 1,
    "reversed axes": lambda w: w.permute(2, 0, 1) * 1,
    "mask": lambda w: w[torch.tensor([True, False, True])],
    "pairs of ids": lambda w: w[IDS[:2, None]] * 1,
    "flatten": lambda w: w.flatten(0, 1) * 1,
    "view": lambda w: w.view(E * A, B) * 1,
    "einsum diagonal": lambda w: torch.einsum("eta,eab->etb", XA, w[:, :, :1] * 1),
}


def make(experts: str, transposed: bool) -> RPQWeight:
    layout = Layout((E, A, B), 1, transposed, None, experts)
    spec = CodebookSpec(layout.num_vectors, layout.dim, 2, 3, 2, scale=True, signs=transposed, column_scale_group=1)
    return randomise(RPQWeight(spec, layout, dtype=torch.float64), 0)


@pytest.fixture
def expansions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One element for each time that any part becomes a tensor."""
    seen: list[int] = []
    dense = Part.dense
    monkeypatch.setattr(Part, "dense", lambda self: seen.append(1) or dense(self))
    return seen


every_layout = pytest.mark.parametrize(
    ("experts", "transposed"), list(itertools.product(["shared", "own"], [False, True]))
)


@pytest.mark.parametrize("name", SERVED)
@every_layout
def test_products_of_experts_are_served(name: str, experts: str, transposed: bool, expansions: list[int]) -> None:
    assert_as_dense(make(experts, transposed), SERVED[name])
    assert not expansions


@pytest.mark.parametrize("flipped", [False, True])
@every_layout
def test_groups_of_rows_go_through_their_experts(
    flipped: bool, experts: str, transposed: bool, expansions: list[int]
) -> None:
    """Up to each offset; torch knows this for float32, in widths of whole vectors of memory."""
    layout = Layout((3, 8, 16), 1, transposed, None, experts)
    weight = randomise(RPQWeight(CodebookSpec(layout.num_vectors, layout.dim, 4, 3), layout), 0)
    dense = naive_tensor(weight)
    x = randn(0, 6, 16 if flipped else 8, dtype=torch.float32)
    offs = torch.tensor([2, 2, 6], dtype=torch.int32)

    def use(w: Any) -> Tensor:
        return F.grouped_mm(x, w.transpose(-2, -1) if flipped else w, offs=offs)

    assert_same(use(VirtualWeight(weight)), use(dense), tolerance=1e-5)
    assert not expansions


@pytest.mark.parametrize("name", EXPANDED)
@every_layout
def test_any_other_use_of_experts_gets_the_tensor(name: str, experts: str, transposed: bool) -> None:
    assert_as_dense(make(experts, transposed), EXPANDED[name])


def test_experts_that_are_not_there_are_torchs_error() -> None:
    w = VirtualWeight(make("shared", False))
    with pytest.raises(IndexError):
        w[3]
    with pytest.raises(IndexError):
        w[torch.tensor(3)] @ TB.T
    with pytest.raises(RuntimeError):
        torch.bmm(XA[:1], w)


# ---------------------------------------------------------------------------------------------- heads, and pieces

HEADS: dict[str, tuple[tuple[int, ...], int, Callable[[Any], Tensor]]] = {
    "btd,dhk->bthk": ((8, 3, 4), 1, lambda w: torch.einsum("btd,dhk->bthk", randn(0, 2, 5, 8), w)),
    "btd,hkd->bhtk": ((3, 4, 8), 2, lambda w: torch.einsum("btd,hkd->bhtk", randn(0, 2, 5, 8), w)),
    "bthk,hkd->btd": ((3, 4, 8), 2, lambda w: torch.einsum("bthk,hkd->btd", randn(0, 2, 5, 3, 4), w)),
    "hkd,bkht->tdb": ((3, 4, 8), 2, lambda w: torch.einsum("hkd,bkht->tdb", w, randn(0, 2, 4, 3, 5))),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("transposed", [False, True])
def test_several_axes_are_summed_or_kept_at_once(name: str, transposed: bool, expansions: list[int]) -> None:
    shape, lead, use = HEADS[name]
    layout = Layout(shape, lead, transposed)
    spec = CodebookSpec(layout.num_vectors, layout.dim, 4, 3, scale=True)
    assert_as_dense(randomise(RPQWeight(spec, layout, dtype=torch.float64), 0), use)
    assert not expansions


# w is [12, 8], in sub-vectors of 4 along rows or columns: a piece of whole sub-vectors is served.
X8, X12 = randn(7, 3, 8), randn(8, 3, 12)
PIECES: dict[str, Callable[[Any], Tensor]] = {
    "rows": lambda w: F.linear(X8, w[4:8], randn(9, 4)),
    "rows, a copy of the index": lambda w: F.linear(X8, w[4:8, :]),
    "columns": lambda w: F.linear(X8[:, :4], w[:, 4:]),
    "both": lambda w: X8[:, 4:] @ w[:4, 4:].T,
    "ellipsis": lambda w: F.linear(X8[:, :4], w[..., :4]),
    "chunk": lambda w: torch.stack([F.linear(X8, piece) for piece in w.chunk(3)]),
    "torch.chunk": lambda w: torch.stack([F.linear(X8, piece) for piece in torch.chunk(w, 3, dim=0)]),
    "split": lambda w: F.linear(X8, w.split([4, 8])[1]),
    "torch.split of columns": lambda w: F.linear(X8[:, :4], torch.split(w, 4, dim=1)[1]),
    "narrow of the transpose": lambda w: X8 @ w.t().narrow(1, 4, 8),
    "as experts": lambda w: torch.bmm(X8.expand(3, 3, 8), w.view(3, 4, 8).mT),
    "an embedding's first rows": lambda w: F.embedding(torch.tensor([1, 3, 0]), w[:4]),
    "reshaped to itself": lambda w: F.linear(X8, w.reshape(12, -1)),
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("transposed", [False, True], ids=["row", "column"])
def test_pieces_of_a_matrix_are_served(name: str, transposed: bool, expansions: list[int]) -> None:
    layout = Layout((12, 8), transposed=transposed)
    spec = CodebookSpec(layout.num_vectors, layout.dim, 4, 3, scale=True, signs=True)
    assert_as_dense(randomise(RPQWeight(spec, layout, dtype=torch.float64), 0), PIECES[name])
    assert not expansions or (name == "an embedding's first rows" and transposed)


@pytest.mark.parametrize("view", ["w[:, :, 0, 0]", "w.squeeze()", "w.view(8, 12)", "w.flatten(1)"])
def test_a_filter_of_one_tap_is_a_matrix(view: str, expansions: list[int]) -> None:
    weight = randomise(RPQWeight(CodebookSpec(8, 12, 4, 3), Layout((8, 12, 1, 1)), dtype=torch.float64), 0)
    assert_as_dense(weight, lambda w: F.linear(X12, eval(view, {"w": w})))
    assert not expansions


def test_a_filter_flattened_is_a_matrix(expansions: list[int]) -> None:
    weight = randomise(RPQWeight(CodebookSpec(8, 12, 4, 3), Layout((8, 3, 2, 2)), dtype=torch.float64), 0)
    assert_as_dense(weight, lambda w: F.linear(X12, w.flatten(1)))
    assert_as_dense(weight, lambda w: X12 @ w.view(8, -1).t())
    assert not expansions


@pytest.mark.parametrize("transposed", [False, True])
def test_pieces_that_cut_sub_vectors_are_exact_too(transposed: bool) -> None:
    layout = Layout((12, 8), transposed=transposed)
    weight = randomise(RPQWeight(CodebookSpec(layout.num_vectors, layout.dim, 4, 3), layout, dtype=torch.float64), 0)
    assert_as_dense(weight, lambda w: F.linear(X8[:, :3], w[1:4, 5:]))
    assert_as_dense(weight, lambda w: torch.cat([F.linear(X8, piece) for piece in w.chunk(5)], -1))
    assert_as_dense(weight, lambda w: w[2] @ X8.T)
    assert_as_dense(weight, lambda w: w[:, None].expand(12, 2, 8) * 1)


# --------------------------------------------------------------------------------------------------------- compiled


class Experts(torch.nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(randn(0, count, 16, 24, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.chunk(self.w[1], 2, dim=-1)
        return torch.bmm(x, self.w).sum(0) + torch.cat([x[0] @ first, x[0] @ second], -1)


@pytest.mark.parametrize("count", [4, 20])
@pytest.mark.parametrize("experts", ["shared", "own"])
def test_experts_compile_whole(count: int, experts: str) -> None:
    """Few with a product each, many through the tensor."""
    import rpqfx

    torch.compiler.reset()
    small = rpqfx.rpqify(Experts(count), rpqfx.Policy(codebook_dim=8, codebook_bits=2, min_size=0, experts=experts))
    x = randn(1, count, 3, 16, dtype=torch.float32)
    wanted = small(x)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), wanted, tolerance=1e-4)
    compiled(x).sum().backward()
    assert small.w_rpq.codebooks.grad is not None
    torch.compiler.reset()


# ------------------------------------------------------------------------------------- arguments, as torch takes them

ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "narrow from the end": lambda w: w.narrow(0, -4, 4),
    "split by name": lambda w: torch.split(w, split_size_or_sections=4, dim=0)[1],
    "permute by name": lambda w: torch.permute(w, dims=(1, 0)),
    "permute by a tuple": lambda w: w.permute((1, 0)),
    "permute from the end": lambda w: w.permute(-1, 0),
    "squeeze": lambda w: w[:, None].squeeze(1),
    "squeeze what is long": lambda w: w.squeeze(dim=0),
    "chunk by name": lambda w: w.chunk(chunks=3, dim=-2)[2],
    "unsqueeze": lambda w: torch.unsqueeze(w, 0),
    "flatten": lambda w: torch.flatten(w),
    "view by dtype": lambda w: w.detach().view(torch.int64),
    "a list of sizes": lambda w: w.reshape([4, -1]),
    "an empty range": lambda w: w[3:3],
    "past the end": lambda w: w[10:99],
    "a step": lambda w: w[::5],
    "None": lambda w: w[None, 2:4],
    "two ids": lambda w: w[torch.tensor([1, 2]), torch.tensor([0, 3])],
    "select": lambda w: w.select(-1, -2),
    "index_select": lambda w: w.index_select(0, torch.tensor([3, 1])),
    "gather": lambda w: w.gather(0, torch.zeros(2, 8, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_views_take_what_torch_takes(name: str) -> None:
    weight = randomise(RPQWeight(CodebookSpec(12, 8, 4, 3), Layout((12, 8)), dtype=torch.float64), 0)
    ours, theirs = ARGUMENTS[name](VirtualWeight(weight)), ARGUMENTS[name](weight())
    assert ours.shape == theirs.shape
    assert torch.equal(ours.expand_dense() if isinstance(ours, VirtualWeight) else ours, theirs)


WRONG: dict[str, Callable[[Any], Any]] = {
    "an index too far": lambda w: w[12],
    "too many indices": lambda w: w[0, 0, 0],
    "narrow too far": lambda w: w.narrow(0, 8, 5),
    "split that does not add up": lambda w: w.split([4, 4]),
    "an axis that is not there": lambda w: w.transpose(0, 2),
    "axes twice": lambda w: w.permute(0, 0),
    "sizes that do not fit": lambda w: w.view(5, 8),
    "inner sizes that differ": lambda w: torch.ones(3, 9, dtype=torch.float64) @ w.T,
    "bmm of a matrix": lambda w: torch.bmm(w, torch.ones(1, 8, 2, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_torch_refuses_is_refused_at_once(name: str) -> None:
    weight = RPQWeight(CodebookSpec(12, 8, 4, 3), Layout((12, 8)), dtype=torch.float64)
    for w in (weight(), VirtualWeight(weight)):
        with pytest.raises((IndexError, RuntimeError, ValueError, InputError)):
            WRONG[name](w)
