"""A VirtualWeight equals the dense tensor wherever it is put, in value and gradient."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import RewriteError
from rpqfx.nn import Layout, RPQWeight, VirtualWeight
from rpqfx.nn.tensor.expanded import ExpandedWeight
from rpqfx.nn.tensor.virtual import initialising
from tests.helpers import assert_as_dense, randn, randomise

V = randn(1, 8)
X, Y = randn(2, 3, 8), randn(3, 3, 6)
BATCH = randn(4, 2, 3, 8)
BIAS = randn(5, 6)
IDS = torch.tensor([[0, 5], [2, 2]])

# w is [6, 8]. "served": by the codebooks, without the tensor; "expanded": by the tensor, for as long as it takes.
SERVED: dict[str, Callable[[Any], Tensor]] = {
    "F.linear": lambda w: F.linear(X, w, BIAS),
    "F.linear no bias": lambda w: F.linear(BATCH, weight=w),
    "F.linear 1d": lambda w: F.linear(V, w),
    "F.linear transposed": lambda w: F.linear(Y, w.t()),
    "y @ w": lambda w: Y @ w,
    "x @ w.T": lambda w: X @ w.T,
    "x @ w.t()": lambda w: BATCH @ w.t(),
    "x @ w.mT": lambda w: X @ w.mT,
    "x @ w.transpose": lambda w: X @ w.transpose(-1, 0),
    "x @ w.T.T.T": lambda w: X @ w.T.T.T,
    "w @ x.T": lambda w: w @ X.T,
    "w @ v": lambda w: w @ V,
    "w.T @ y.T": lambda w: w.T @ Y.T,
    "w @ batch": lambda w: w @ BATCH.mT,
    "matmul": lambda w: torch.matmul(Y, w),
    "matmul first": lambda w: torch.matmul(w, X.T),
    "Tensor.matmul": lambda w: Y.matmul(w),
    "mm": lambda w: torch.mm(Y, w),
    "Tensor.mm": lambda w: X.mm(w.t()),
    "addmm": lambda w: torch.addmm(BIAS, X, w.t()),
    "addmm scaled": lambda w: torch.addmm(BIAS, X, w.t(), beta=0.5, alpha=2.0),
    "addmm beta 0": lambda w: torch.addmm(BIAS, X, w.t(), beta=0),
    "Tensor.addmm": lambda w: BIAS.addmm(X, w.t()),
    "einsum bi,oi->bo": lambda w: torch.einsum("bi,oi->bo", X, w),
    "einsum bi,oi->ob": lambda w: torch.einsum("bi,oi->ob", X, w),
    "einsum oi,bi->bo": lambda w: torch.einsum("oi,bi->bo", w, X),
    "einsum oi,bo->bi": lambda w: torch.einsum("oi,bo->bi", w, Y),
    "einsum bo, oi -> ib": lambda w: torch.einsum("bo, oi -> ib", Y, w),
    "einsum flipped": lambda w: torch.einsum("bi,io->bo", X, w.T),
    "einsum four axes": lambda w: torch.einsum("abi,oi->aob", BATCH, w),
    "einsum summed in the middle": lambda w: torch.einsum("aib,oi->oba", BATCH.mT, w),
    "F.embedding": lambda w: F.embedding(IDS, w),
    "F.embedding padding": lambda w: F.embedding(IDS, w, padding_idx=2),
    "F.embedding padding from the end": lambda w: F.embedding(IDS, w, padding_idx=-1),
    "einsum list": lambda w: torch.einsum("bi,oi->bo", [X, w]),
    "F.embedding_bag": lambda w: F.embedding_bag(IDS, w, mode="sum"),
    "F.embedding_bag padding": lambda w: F.embedding_bag(IDS, w, padding_idx=-1),
    "F.embedding_bag offsets": lambda w: F.embedding_bag(IDS.flatten(), w, torch.tensor([0, 1]), mode="max"),
    "F.embedding_bag weighted": lambda w: F.embedding_bag(IDS, w, mode="sum", per_sample_weights=Y[:2, :2]),
}

EXPANDED: dict[str, Callable[[Any], Tensor]] = {
    "w * 2": lambda w: w * 2,
    "2 * w": lambda w: 2 * w,
    "w + w": lambda w: w + w,
    "tensor + w": lambda w: torch.ones(8, dtype=torch.float64) + w,
    "tensor * w": lambda w: X[:1] * w,
    "w - 1, 1 - w": lambda w: (w - 1) * (1 - w),
    "w / 3, 3 / w": lambda w: w / 3 + 3 / w,
    "w ** 2": lambda w: w**2,
    "-w": lambda w: -w,
    "abs(w)": lambda w: abs(w),
    "w[1:3]": lambda w: w[1:3],
    "w[ids]": lambda w: w[IDS],
    "w[mask]": lambda w: w[w > 0],
    "w.sum()": lambda w: w.sum(),
    "w.norm(dim=1)": lambda w: w.norm(dim=1),
    "w.view": lambda w: w.view(2, 3, 8),
    "w.reshape": lambda w: w.reshape(-1),
    "w.unbind": lambda w: torch.cat(w.unbind()),
    "w.chunk": lambda w: w.chunk(2)[1],
    "list(w)": lambda w: torch.stack(list(w)),
    "w.float()": lambda w: w.float().double(),
    "w.to(dtype)": lambda w: w.to(torch.float32).double(),
    "w.clone": lambda w: w.clone(),
    "w.contiguous": lambda w: w.contiguous() * 1,
    "w.detach": lambda w: w * w.detach(),
    "stack": lambda w: torch.stack([w, w]),
    "cat": lambda w: torch.cat([w, w.t().t(), Y.new_zeros(1, 8)]),
    "where": lambda w: torch.where(w > 0, w, torch.zeros_like(w)),
    "softmax": lambda w: F.softmax(w, -1),
    "F.normalize": lambda w: F.normalize(w, dim=0),
    "bmm": lambda w: torch.bmm(BATCH, w.t().expand(2, -1, -1)),
    "w @ w.T": lambda w: w @ w.T,
    "addmm onto w": lambda w: torch.addmm(w, Y.T, X),
    "F.linear of w": lambda w: F.linear(w, w),
    "F.bilinear": lambda w: F.bilinear(X, X, w[:, None] * w[..., None]),
    "einsum implicit": lambda w: torch.einsum("bi,oi", X, w),
    "einsum ellipsis": lambda w: torch.einsum("...i,oi->...o", BATCH, w),
    "einsum three operands": lambda w: torch.einsum("bi,oi,bo->b", X, w, Y),
    "einsum two axes met": lambda w: torch.einsum("io,oi->i", randn(6, 8, 6), w),
    "einsum batched weight": lambda w: torch.einsum("oi,oi->o", randn(6, 6, 8), w),
    "einsum twice": lambda w: torch.einsum("oi,pi->op", w, w),
    "einsum sum of an axis": lambda w: torch.einsum("bi,oi->b", X, w),
    "einsum outer": lambda w: torch.einsum("b,oi->boi", Y[:, 0], w),
    "F.embedding by frequency": lambda w: F.embedding(IDS, w, scale_grad_by_freq=True),
}


def make(transposed: bool) -> RPQWeight:
    """[6, 8] with its vectors along rows or columns."""
    spec = (
        CodebookSpec(8, 6, 3, 4, 2, scale=True, column_scale_group=2)
        if transposed
        else CodebookSpec(6, 8, 4, 4, signs=True)
    )
    return randomise(RPQWeight(spec, Layout((6, 8), transposed=transposed), dtype=torch.float64), 0)


@pytest.fixture
def expansions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One element for each time that a VirtualWeight becomes a tensor."""
    seen: list[int] = []
    expand = VirtualWeight.expand_dense
    monkeypatch.setattr(VirtualWeight, "expand_dense", lambda self: seen.append(1) or expand(self))
    return seen


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("transposed", [False, True], ids=["row", "column"])
def test_products_are_served_by_the_codebooks(name: str, transposed: bool, expansions: list[int]) -> None:
    """Equal to the dense tensor, which is never asked for."""
    assert_as_dense(make(transposed), SERVED[name])
    assert not expansions


@pytest.mark.parametrize("name", EXPANDED)
@pytest.mark.parametrize("transposed", [False, True], ids=["row", "column"])
def test_anything_else_gets_the_tensor(name: str, transposed: bool) -> None:
    assert_as_dense(make(transposed), EXPANDED[name])


CONVS = {
    "conv1d": (F.conv1d, (4, 3, 2), (2, 6, 7), {"stride": 2, "padding": 1, "groups": 2}),
    "conv2d": (F.conv2d, (4, 6, 2, 3), (2, 6, 7, 5), {"stride": (2, 1), "padding": 1, "dilation": (1, 2)}),
    "conv3d": (F.conv3d, (4, 2, 1, 2, 2), (1, 2, 3, 3, 3), {"padding": (1, 0, 1)}),
    "conv_transpose1d": (F.conv_transpose1d, (4, 3, 2), (2, 4, 5), {"stride": 2, "output_padding": 1, "groups": 2}),
    "conv_transpose2d": (F.conv_transpose2d, (4, 2, 2, 2), (2, 4, 5, 3), {"padding": 1, "dilation": 2}),
    "conv_transpose3d": (F.conv_transpose3d, (4, 2, 1, 2, 2), (1, 4, 2, 2, 2), {"stride": (1, 2, 1)}),
    "conv2d padding same": (F.conv2d, (4, 6, 2, 3), (2, 6, 7, 5), {"padding": "same", "dilation": (1, 2)}),
    "conv2d padding valid": (F.conv2d, (4, 6, 3, 3), (2, 6, 7, 5), {"padding": "valid"}),
    "conv2d no batch": (F.conv2d, (4, 6, 3, 3), (6, 7, 5), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_are_served(name: str, bias: bool, expansions: list[int]) -> None:
    function, shape, size, settings = CONVS[name]
    layout = Layout(shape)
    taps = math.prod(shape[2:])
    spec = CodebookSpec(layout.num_vectors, layout.dim, 2, 3, signs=True, scale=True, column_scale_group=taps)
    weight = randomise(RPQWeight(spec, layout, dtype=torch.float64), 0)
    channels = shape[1] * settings.get("groups", 1) if "transpose" in name else shape[0]
    offset = randn(1, channels) if bias else None
    assert_as_dense(weight, lambda w: function(randn(2, *size), w, offset, **settings))
    assert_as_dense(weight, lambda w: function(input=randn(2, *size), weight=w, bias=offset, **settings))
    assert not expansions


def test_a_convolution_whose_taps_have_factors_each_gets_the_tensor(expansions: list[int]) -> None:
    """Nothing says of a Parameter of unknown use that a convolution reads it."""
    weight = randomise(
        RPQWeight(CodebookSpec(4, 18, 2, 3, column_scale_group=1), Layout((4, 2, 3, 3)), dtype=torch.float64), 0
    )
    assert_as_dense(weight, lambda w: F.conv2d(randn(2, 1, 2, 5, 5), w))
    assert expansions


def test_a_convolution_refuses_what_torch_refuses() -> None:
    w = VirtualWeight(RPQWeight(CodebookSpec(4, 54, 2, 3), Layout((4, 6, 3, 3))))
    with pytest.raises(RuntimeError, match="padding='same' is not supported for strided"):
        F.conv2d(torch.zeros(1, 6, 7, 5), w, stride=2, padding="same")
    with pytest.raises(RuntimeError, match="padding"):
        F.conv2d(torch.zeros(1, 6, 7, 5), w, padding="full")


@pytest.mark.parametrize("transposed", [False, True])
def test_what_can_be_told_without_the_tensor(transposed: bool, expansions: list[int]) -> None:
    """Shapes, dtypes and transposes make nothing."""
    weight = make(transposed)
    w = VirtualWeight(weight)
    assert w.shape == w.size() == torch.Size([6, 8]) and w.size(-1) == 8 and len(w) == 6
    assert w.T.shape == torch.Size([8, 6]) and w.T.T.shape == w.shape
    assert (w.ndim, w.dim(), w.numel()) == (2, 2, 48)
    assert w.dtype == torch.float64 and w.device == torch.device("cpu") and w.requires_grad
    assert w.to(torch.float64) is w and w.to(w.device) is w and w.contiguous() is w
    assert "VirtualWeight((6, 8)" in repr(w)
    assert not expansions
    assert not VirtualWeight(weight.requires_grad_(False)).requires_grad


def test_it_can_be_a_key_and_be_compared() -> None:
    """Hashed by identity, compared by element, as a tensor is."""
    w = VirtualWeight(make(False))
    assert {w: 1}[w] == 1
    assert bool((w == w.expand_dense()).all())
    assert bool((w != w + 1).all())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "zero_": lambda w: w.zero_(),
    "data.add_": lambda w: w.data.add_(2),
    "mul_ by a tensor": lambda w: w.mul_(randn(0, 8)),
    "mul_ of a part": lambda w: w[:2].mul_(2),
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(w),
    "torch.relu_": lambda w: torch.relu_(w),
    "w[0] = 1": lambda w: w.__setitem__(0, 1.0),
    "init.zeros_": lambda w: nn.init.zeros_(w),
    "init.normal_": lambda w: nn.init.normal_(w),
    "init.uniform_": lambda w: nn.init.uniform_(w),
    "init.constant_": lambda w: nn.init.constant_(w, 2.0),
    "init.kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w),
    "init.xavier_normal_": lambda w: nn.init.xavier_normal_(w),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_place_is_refused_rather_than_lost(name: str) -> None:
    """But for initialisers that run again over codebooks which have been drawn."""
    weight, change = make(False), CHANGES[name]
    before = weight.codebooks.detach().clone()
    with torch.no_grad(), pytest.raises(RewriteError, match="a quantized weight, which is computed anew at each read"):
        change(VirtualWeight(weight))
    with initialising():
        change(VirtualWeight(weight))
    with torch.no_grad(), pytest.raises(RewriteError):
        change(VirtualWeight(weight))
    assert torch.equal(weight.codebooks, before)


MULTIPLIED: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda w: w.mul_(3),
    "data.mul_": lambda w: w.data.mul_(3),
    "div_": lambda w: w.div_(0.25),
}


@pytest.mark.parametrize("name", MULTIPLIED)
@pytest.mark.parametrize("transposed", [False, True], ids=["signs", "scale"])
@pytest.mark.parametrize("read", [VirtualWeight, ExpandedWeight.of])
def test_all_of_a_weight_may_be_multiplied_by_a_number(name: str, transposed: bool, read: Callable[..., Any]) -> None:
    """As models do that rescale themselves; codebooks that other weights share are not, unless a scale can be."""
    weight = make(transposed)
    before = weight().detach()
    with torch.no_grad():
        MULTIPLIED[name](read(weight))
    torch.testing.assert_close(weight(), before * (4 if name == "div_" else 3))
    weight.shares_codebooks = True
    with torch.no_grad(), contextlib.nullcontext() if transposed else pytest.raises(RewriteError, match="shares its"):
        MULTIPLIED[name](read(weight))


def test_a_weight_with_factors_of_its_columns_may_be_multiplied_though_it_shares_codebooks() -> None:
    weight = RPQWeight(CodebookSpec(6, 8, 4, 4, column_scale_group=1), Layout((6, 8)))
    weight.shares_codebooks = True
    before, books = weight().detach(), weight.codebooks.detach().clone()
    with torch.no_grad():
        VirtualWeight(weight).mul_(3)
    torch.testing.assert_close(weight(), before * 3)
    assert torch.equal(weight.codebooks, books)


def test_three_axes_have_transposes_too() -> None:
    layout = Layout((4, 3, 2))
    weight = randomise(RPQWeight(CodebookSpec(4, 6, 2, 3), layout, dtype=torch.float64), 0)
    assert_as_dense(weight, lambda w: w.transpose(1, 2))
    assert_as_dense(weight, lambda w: w.mT)
    assert_as_dense(weight, lambda w: torch.bmm(randn(1, 4, 5, 3), w))
    assert_as_dense(weight, lambda w: torch.einsum("ebi,eio->ebo", randn(1, 4, 5, 3), w))
    assert_as_dense(weight, lambda w: randn(1, 4, 5, 3) @ w)


def test_two_leading_axes_as_vectors() -> None:
    layout = Layout((4, 3, 2), lead=2)
    weight = randomise(RPQWeight(CodebookSpec(12, 2, 1, 3), layout, dtype=torch.float64), 0)
    assert_as_dense(weight, lambda w: torch.bmm(randn(1, 4, 5, 3), w))
    assert_as_dense(weight, lambda w: F.conv1d(randn(1, 1, 3, 5), w))
    assert_as_dense(weight, lambda w: w[1] * w.sum())
