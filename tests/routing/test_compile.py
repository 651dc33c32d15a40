"""Routers and blocks in one graph: compiled and exported, with the results of eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.export import Dim, export

from rpqfx.routing import coordinate_descent, cumulative_softmax, exact_offset, exact_scores, sinkhorn, topk
from tests.helpers import randn
from tests.routing.test_blocks import KINDS, made, x_and_mask


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


ROUTERS: dict[str, Callable[..., Tensor]] = {
    "exact": lambda s, mask: exact_scores(s, 5.5, eps=0.5, mask=mask),
    "offset": lambda s, mask: exact_offset(s, 5.5, eps=0.5, mask=mask),
    "tensor k": lambda s, mask: exact_scores(s, mask.sum(-1) / 2, eps=0.5, mask=mask),
    "coordinate_descent": lambda s, mask: coordinate_descent(s, 5, mask=mask, n_iters=3, eps_init=4.0),
    "sinkhorn": lambda s, mask: sinkhorn(s, 5, mask=mask, n_iters=3),
    "cumulative_softmax": lambda s, mask: cumulative_softmax(s, 5, mask=mask),
    "topk": lambda s, mask: topk(s, 5, eps=0.5).values,
}


@pytest.mark.parametrize("name", ROUTERS)
def test_compiled_routers_equal_eager(name: str) -> None:
    s, mask = randn(0, 3, 30).requires_grad_(), torch.arange(30) < torch.tensor([30, 20, 12])[:, None]
    ours, theirs = torch.compile(ROUTERS[name], fullgraph=True, backend="aot_eager")(s, mask), ROUTERS[name](s, mask)
    torch.testing.assert_close(ours, theirs)
    seen = randn(1, *ours.shape)
    grads = [torch.autograd.grad((out * seen).sum(), s)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*grads)


def kinds(*names: str) -> list[Any]:
    """All kinds, of which all but these are slow: by default each is compiled or exported, or made of what is."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]


@pytest.mark.parametrize("name", kinds("cross"))
def test_compiled_blocks_equal_eager(name: str) -> None:
    """Forward and backward, with a mask."""
    (x, mask), layer = x_and_mask(), made(name, 6, router={"eps": 1.0})
    ours, theirs = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, mask), layer(x, mask)
    torch.testing.assert_close(ours, theirs)
    wanted = list(layer.parameters())
    seen = randn(1, *ours.shape)
    for mine, other in zip(*(torch.autograd.grad((out * seen).sum(), wanted) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.slow
def test_one_graph_serves_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    layer = made("attention", 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for n in (48, 40, 64):
        x = randn(n, 2, n, 16)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("name", kinds("feed forward", "autoregressive"))
def test_exported_blocks_take_any_batch(name: str) -> None:
    (x, mask), layer = x_and_mask(), made(name, 6).eval()
    batch = Dim("batch", min=2, max=64)
    exported = export(layer, (x, mask), dynamic_shapes=({0: batch}, {0: batch}), strict=False).module()
    for size in (2, 5):
        some, kept = randn(size, size, 48, 16), mask[:1].expand(size, -1)
        torch.testing.assert_close(exported(some, kept), layer(some, kept))


@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    layer, x = made("block", 6).float(), x_and_mask()[0].float()
    compiled: nn.Module = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    grads = [torch.autograd.grad(f(x).square().sum(), list(layer.parameters())) for f in (compiled, layer)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
