"""Layers work wherever torch transforms a computation, as the dense layers do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import assert_same, dense_twin, generator, gradients, randn, randomise
from tests.kinds import KINDS, NAMES, Kind


@pytest.fixture(params=NAMES)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def first(result: Tensor | tuple) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def with_gradients(kind: Kind) -> list[Tensor]:
    return [x.requires_grad_() if x.is_floating_point() else x for x in kind.make_inputs()]


def wanted(layer: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    return {
        **dict(layer.named_parameters()),
        **{f"input {i}": x for i, x in enumerate(inputs) if x.requires_grad},
    }


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_changes_nothing(kind: Kind, reentrant: bool) -> None:
    """Nor does the second forward that it runs."""
    layer, inputs = kind.make(), with_gradients(kind)
    # Reentrant checkpoints need an input with a gradient.
    hook = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def run(hook: Tensor, *inputs: Tensor) -> Tensor:
        return first(layer(*inputs, **dict(kind.call))) + hook

    outputs = run(hook, *inputs)
    again = checkpoint(run, hook, *inputs, use_reentrant=reentrant)
    assert torch.equal(outputs, again)
    names = wanted(layer, inputs)
    torch.autograd.backward((outputs * randn(0, *outputs.shape)).sum())
    grads = {name: p.grad.to_dense() for name, p in names.items() if p.grad is not None}
    for p in names.values():
        p.grad = None
    torch.autograd.backward((again * randn(0, *again.shape)).sum())
    assert grads
    for name, grad in grads.items():
        assert_same(names[name].grad, grad, name, tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtype_that_the_dense_layer_gives(kind: Kind, dtype: torch.dtype) -> None:
    """For inputs of full and of low precision; parameters get gradients of their own dtype."""
    layer, dense = kind.make(dtype=torch.float32), kind.make_dense(torch.float32)
    exact = first(layer(*kind.make_inputs(dtype=torch.float32), **dict(kind.call))).detach()
    inputs = kind.make_inputs(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            expected = first(dense(*inputs, **dict(kind.call)))
        except RuntimeError:
            pytest.skip("the dense layer cannot")
        out = first(layer(*inputs, **dict(kind.call)))
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.1)
    out.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())
    assert any(p.grad is not None for p in layer.parameters())


def test_functional_call_uses_the_tensors_it_is_given(kind: Kind) -> None:
    layer, other = kind.make(), kind.make()
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    inputs = kind.make_inputs()
    out = torch.func.functional_call(layer, state, inputs, dict(kind.call))
    assert torch.equal(first(out), first(other(*inputs, **dict(kind.call))))
    assert not torch.equal(first(out), first(layer(*inputs, **dict(kind.call))))
    grads = torch.autograd.grad(first(out).sum(), list(other.parameters()), allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in grads)


def test_gradients_accumulate_over_calls(kind: Kind) -> None:
    """Two backwards add up to that of the sum."""
    layer, inputs, others = kind.make(), kind.make_inputs(0), kind.make_inputs(9)
    for some in (inputs, others):
        first(layer(*some, **dict(kind.call))).square().sum().backward()
    total = sum(first(layer(*some, **dict(kind.call))).square().sum() for some in (inputs, others))
    names = {name: p for name, p in layer.named_parameters() if p.grad is not None}
    assert names
    for (name, p), grad in zip(names.items(), torch.autograd.grad(total, list(names.values())), strict=True):
        assert_same(p.grad, grad, name)


BATCHED = {
    "linear row": (0,), "linear column": (0,), "linear signs scale": (0,), "conv1d": (0,), "conv2d": (0,),
    "conv2d circular": (0,), "conv transpose 2d": (0,), "embedding": (0,), "bilinear row": (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("inner", [False, True], ids=["unbatched", "batched"])
def test_vmap_over_the_batch_is_the_batch(name: str, inner: bool) -> None:
    """Each sample alone, or with a batch of its own."""
    kind = KINDS[name]
    layer = kind.make()
    if kind.ids is None:
        shapes = [(3, *shape) if inner else (3, *shape[1:]) for shape in kind.inputs]
        inputs = [randn(i, *shape) for i, shape in enumerate(shapes)]
    else:
        shape = (3, 2, 4) if inner else (3, 4)
        inputs = [torch.randint(kind.ids, shape, generator=generator(0))]
    mapped = torch.vmap(layer)(*inputs)
    assert_same(mapped, torch.stack([layer(*sample) for sample in zip(*inputs, strict=True)]))


@pytest.mark.parametrize("name", BATCHED)
def test_per_sample_gradients_are_those_of_each_sample_alone(name: str) -> None:
    """vmap(grad(functional_call)), as in differential privacy."""
    kind = KINDS[name]
    layer = kind.make()
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    if kind.ids is None:
        inputs = [randn(i, 3, *shape[1:]) for i, shape in enumerate(kind.inputs)]
    else:
        inputs = [torch.randint(kind.ids, (3, 4), generator=generator(0))]
    grad = torch.func.grad(lambda p, *x: torch.func.functional_call(layer, p, x).square().sum())
    fast = torch.vmap(grad, (None, *[0] * len(inputs)))(parameters, *inputs)
    for i, sample in enumerate(zip(*inputs, strict=True)):
        for key, slow in grad(parameters, *sample).items():
            assert_same(fast[key][i], slow, key)


TWICE = ["linear row", "linear column", "linear signs scale", "conv1d", "conv2d", "conv3d", "conv2d circular",
         "conv transpose 1d", "conv transpose 2d", "conv transpose 3d", "bilinear row", "bilinear column", "embedding",
         "attention"]  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("grad_scale", ["sum", "mean"])
def test_second_gradients_are_those_of_the_dense_layer(name: str, grad_scale: str) -> None:
    """A penalty on the gradient of the input, or for tables of the weight."""
    kind = KINDS[name]
    layer = randomise(kind.make(signs=True, scale=True, grad_scale=grad_scale), 0)
    leaves, weights, factors = dense_twin(layer)
    dense = kind.make_dense()
    inputs, others = with_gradients(kind), with_gradients(kind)

    def penalty(out: Tensor, of: list[Tensor]) -> Tensor:
        grads = torch.autograd.grad(out.pow(3).sum(), of, create_graph=True)
        return sum(g.square().sum() for g in grads)

    if kind.ids is None:
        ours = penalty(first(layer(*inputs)), [inputs[-1]])
        theirs = penalty(first(torch.func.functional_call(dense, weights, tuple(others))), [others[-1]])
        mine, other = wanted(layer, inputs), {**leaves, **wanted(nn.Module(), others)}
    else:
        table = layer.weight_rpq
        ours = penalty(layer(*inputs), [table.scale])
        theirs = penalty(torch.func.functional_call(dense, weights, tuple(others)), [leaves["weight_rpq.scale"]])
        mine, other = dict(layer.named_parameters()), leaves
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    expected = gradients(theirs, other, factors=factors)
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for key, grad in gradients(ours, mine).items():
        assert_same(grad / largest, expected[key] / largest, key)
        if key.endswith("codebooks") and "out_proj" not in key:
            assert grad.any()
