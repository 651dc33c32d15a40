"""What needs the tensor itself does not keep it for backward, and its gradients are the same, to every order."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import InputError
from rpqfx.nn import Layout, RPQWeight, VirtualWeight
from rpqfx.nn.tensor.expanded import ExpandedWeight
from rpqfx.nn.weight_slice import Part
from tests.helpers import assert_same, gradients, naive_tensor, randn, randomise

X = randn(2, 3, 8).requires_grad_()

# Calls that codebooks do not serve and whose backward needs the tensor, w [6, 8].
CALLS: dict[str, Callable[[Any], Tensor]] = {
    "w * w": lambda w: w * w,
    "torch.exp of a view": lambda w: torch.sin(w.view(2, 3, 8)),
    "a view of a slice": lambda w: w[:, 2:5].unsqueeze(0).square(),
    "batch norm": lambda w: F.batch_norm(w.reshape(1, 6, -1), None, None, training=True),
    "softmax of x times w": lambda w: F.softmax(X[:, None] * w, -1),
    "a bilinear form": lambda w: F.bilinear(X, X, w.view(6, 8, 1) * w.unsqueeze(1)),
    "norm": lambda w: w.norm(dim=1),
    "einsum of three": lambda w: torch.einsum("bi,oi,bi->bo", X, w, X),
    "batched": lambda w: torch.bmm(X.expand(2, 3, 8), w.t().expand(2, 8, 6)),
    "a row": lambda w: w[2] * X,
}


def make(transposed: bool) -> RPQWeight:
    spec = (
        CodebookSpec(8, 6, 3, 4, scale=True, column_scale_group=1)
        if transposed
        else CodebookSpec(6, 8, 4, 4, signs=True)
    )
    return randomise(RPQWeight(spec, Layout((6, 8), transposed=transposed), dtype=torch.float64), 0)


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weak references to every tensor that parts were expanded into."""
    seen: list[Any] = []
    dense = Part.dense

    def spied(self: Part) -> Tensor:
        made = dense(self)
        seen.append(weakref.ref(made.untyped_storage()))
        return made

    monkeypatch.setattr(Part, "dense", spied)
    return seen


@pytest.fixture(scope="module", autouse=True)
def only_new_objects() -> None:
    """Leaves what is there by now out of the garbage collector's rounds: each would go through all of torch."""
    gc.collect()
    gc.freeze()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transposed", [False, True], ids=["row", "column"])
def test_gradients_are_those_of_the_tensor_to_the_second_order(name: str, transposed: bool) -> None:
    weight = make(transposed)
    parameters = dict(weight.named_parameters())
    grads = []
    for w in (VirtualWeight(weight), naive_tensor(weight)):
        out = CALLS[name](w)
        out = out.expand_dense() if isinstance(out, VirtualWeight) else out
        first = torch.autograd.grad(out.square().sum(), list(parameters.values()), create_graph=True)
        total = sum((grad * randn(i, *grad.shape)).sum() for i, grad in enumerate(first))
        grads.append((out, *first, *torch.autograd.grad(total, list(parameters.values()), allow_unused=True)))
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_same(ours, theirs)


@pytest.mark.parametrize("name", CALLS)
def test_the_tensor_is_gone_between_forward_and_backward(name: str, expanded: list[Any]) -> None:
    """Made in the forward and made again in the backward; nothing that lives on refers to it."""
    weight = make(False)
    out = CALLS[name](VirtualWeight(weight))
    gc.collect()
    assert expanded and not [ref for ref in expanded if ref() is not None]
    count = len(expanded)
    out.sum().backward()
    del out
    gc.collect()
    assert len(expanded) > count and not [ref for ref in expanded if ref() is not None]


def test_what_is_checked_can_fail(expanded: list[Any]) -> None:
    weight = make(False)
    out = weight.part().dense() ** 2
    gc.collect()
    assert [ref for ref in expanded if ref() is not None]
    del out


def test_it_is_made_once_for_one_backward(expanded: list[Any]) -> None:
    """Also where many operations of one call need it, as the steps of a recurrent layer do."""
    weight = make(False)
    w = VirtualWeight(weight)
    out = VirtualWeight.answer(lambda t: sum((t * t * i for i in range(5)), t * 0).sin().sum(), (w,), {})
    count = len(expanded)
    out.backward()
    assert len(expanded) == count + 1


def test_codebooks_that_change_before_backward_are_an_error() -> None:
    weight = make(False)
    out = (VirtualWeight(weight) * X.sum(0)).square().sum()
    with torch.no_grad():
        weight.codebooks.add_(1)
    with pytest.raises((InputError, RuntimeError), match=r"in place|inplace"):
        out.backward()


def test_under_torch_func_and_no_grad_it_is_the_plain_call() -> None:
    weight = make(False)
    w = VirtualWeight(weight)
    dense = naive_tensor(weight).detach()
    x = X[:1].detach()
    found = torch.func.grad(lambda x: (x * w).square().sum())(x)
    assert_same(found, torch.func.grad(lambda x: (x * dense).square().sum())(x))
    with torch.no_grad():
        assert_same(w * 2, dense * 2)
    with torch.inference_mode():
        assert_same(w * 2, dense * 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_works_within_checkpoints(reentrant: bool) -> None:
    weight = make(False)
    x = X.detach().clone().requires_grad_()

    def run(x: Tensor) -> Tensor:
        return (x[:, None] * VirtualWeight(weight)).sin().sum()

    run(x).backward()
    wanted = weight.codebooks.grad, x.grad
    weight.codebooks.grad = x.grad = None
    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant).backward()
    assert_same(weight.codebooks.grad, wanted[0])
    assert_same(x.grad, wanted[1])


def test_other_tensors_of_the_call_are_kept_as_a_checkpoint_says() -> None:
    """torch asks the innermost hooks only: these hand on what is not theirs."""
    weight, packed = make(False), []
    x = X.detach().clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t * 1, lambda t: t):
        out = (x[:, None] * VirtualWeight(weight)).sin()
    assert torch.Size([3, 1, 8]) in packed and torch.Size([6, 8]) not in packed
    out.sum().backward()
    dense = naive_tensor(weight).detach()
    assert_same(x.grad, torch.autograd.grad((x[:, None] * dense).sin().sum(), x)[0])


# ---------------------------------------------------------------------------- what people read as a layer's weight


def test_an_expanded_weight_is_a_tensor() -> None:
    weight = make(False)
    w, dense = ExpandedWeight.of(weight), weight()
    assert ExpandedWeight.of(make(True)).is_contiguous()
    assert isinstance(w, Tensor) and torch.is_tensor(w) and w.shape == dense.shape
    torch.testing.assert_close(w, dense)
    torch.testing.assert_close(w, torch.nn.Parameter(dense.detach()))
    assert type(w + 1) is Tensor and isinstance(w.t(), Tensor) and isinstance(w.detach(), Tensor)
    assert isinstance(w, torch.nn.Parameter) and torch.equal(w.T.contiguous(), dense.T)
    assert torch.equal(torch.stack([w, w])[1], dense) and str(w).startswith("tensor(")
    assert w.detach().numpy().shape == (6, 8)
    torch.nn.Parameter(w.detach())


def test_products_with_an_expanded_weight_run_on_the_codebooks(expanded: list[Any]) -> None:
    weight = make(False)
    w = ExpandedWeight.of(weight)
    expanded.clear()
    dense = naive_tensor(weight)

    def products(w: Tensor) -> tuple[Tensor, ...]:
        turned = X @ w.T, X @ w.t(), X @ w.mT, X @ w.transpose(-1, 0), X @ torch.t(w), X @ w.T.T.T
        return (F.linear(X, w), X @ randn(1, 8, 6) @ w, torch.einsum("bi,oi->bo", X, w), *turned)

    ours, theirs = products(w), products(dense)
    assert not expanded
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is Tensor
        assert_same(one, other)
    wanted = gradients(theirs, {"codebooks": weight.codebooks})["codebooks"]
    assert_same(gradients(ours, {"codebooks": weight.codebooks})["codebooks"], wanted)


@pytest.mark.parametrize("transposed", [False, True], ids=["row", "column"])
def test_other_uses_of_an_expanded_weight_do_not_keep_it(transposed: bool, expanded: list[Any]) -> None:
    weight = make(transposed)
    out = (ExpandedWeight.of(weight) * X[:1]).sin()
    gc.collect()
    assert not [ref for ref in expanded if ref() is not None]
    dense = naive_tensor(weight)
    wanted = gradients((dense * X[:1]).sin(), {"codebooks": weight.codebooks})
    assert_same(gradients(out, {"codebooks": weight.codebooks})["codebooks"], wanted["codebooks"])


def test_freezing_what_is_read_freezes_the_codebooks() -> None:
    for read in (VirtualWeight, ExpandedWeight.of):
        weight = make(False)
        read(weight).requires_grad_(False)
        assert not weight.codebooks.requires_grad
        read(weight).requires_grad = True
        assert weight.codebooks.requires_grad
