"""Importance: what an error of each weight costs, held against finite differences and the divergence itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.gradients import Gradients
from rpqfx.conversion.importance import importance
from rpqfx.conversion.observe import Observer
from rpqfx.graph.calibration.probe import probe
from rpqfx.nn.layout import Layout
from tests.helpers import randn


class Chain(nn.Module):
    """Products of stand-ins, with what may come between."""

    def __init__(self, between: nn.Module, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.between, self.bias = between, nn.Parameter(torch.zeros(shapes[-1][0]))
        self.stands = nn.ModuleList(
            StandIn(
                rpqfx.CodebookSpec(n, d, 4, 4), Layout((n, d)), randn(i, n, d, dtype=torch.float32), Observer(())
            )
            for i, (n, d) in enumerate(shapes)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for stand in self.stands[:-1]:
            x = self.between(stand.linear(x))
        return self.stands[-1].linear(x, self.bias)


def measured(model: Chain, batches: list[Tensor], **options: Any) -> list[float]:
    gradients = Gradients(model, model.stands, **options)
    gradients.watch([lambda x=x: model(x) for x in batches], lambda number: None)
    found = importance(list(model.stands), gradients, len(batches))
    return [found[stand] for stand in model.stands]


@pytest.mark.parametrize("between", [nn.Tanh(), nn.ReLU(inplace=True), nn.Identity()])
def test_no_gradient_stays_and_flags_do(between: nn.Module) -> None:
    model = Chain(between, (8, 8), (8, 8))
    model.bias.requires_grad_(False)
    other = nn.Parameter(torch.zeros(1))
    model.register_parameter("other", other)
    assert all(value > 0 for value in measured(model, [randn(9, 4, 8, dtype=torch.float32)]))
    assert all(p.grad is None for p in model.parameters())
    assert not model.bias.requires_grad and other.requires_grad


def test_weights_that_the_output_hears_more_of_matter_more() -> None:
    model = Chain(nn.Identity(), (8, 8), (8, 8))
    batches = [randn(9 + i, 50, 8, dtype=torch.float32) for i in range(4)]
    plain = measured(model, batches)
    model.stands[1].vectors *= 10
    louder = measured(model, batches)
    assert louder[0] == pytest.approx(100 * plain[0], rel=1e-3)
    assert louder[1] == pytest.approx(100 * plain[1], rel=1e-3)


def test_importance_is_the_squared_error_that_noise_as_large_as_the_weight_makes() -> None:
    model = Chain(nn.Identity(), (64, 64), (16, 64))
    batches = [randn(9 + i, 100, 64, dtype=torch.float32) for i in range(16)]
    found = measured(model, batches)
    x = torch.cat(batches)
    model.bias.requires_grad_(False)
    kept = model(x)
    costs = []
    for stand in model.stands:
        noise = randn(99, *stand.vectors.shape, dtype=torch.float32) * stand.vectors.square().mean().sqrt()
        stand.vectors += 1e-2 * noise
        costs.append(float((model(x) - kept).detach().square().sum()) * 1e4)
        stand.vectors -= 1e-2 * noise
    assert found[0] / found[1] == pytest.approx(costs[0] / costs[1], rel=0.4)


def test_what_no_gradient_reaches_matters_as_little_as_the_least() -> None:
    model = Chain(nn.Identity(), (8, 8), (8, 8))
    unused = StandIn(rpqfx.CodebookSpec(8, 8, 4, 4), Layout((8, 8)), randn(5, 8, 8), Observer(()))
    model.stands.insert(1, unused)
    model.forward = lambda x: model.stands[2].linear(model.stands[0].linear(x))  # type: ignore[method-assign]
    values = measured(model, [randn(9, 4, 8, dtype=torch.float32)])
    assert values[1] == min(values[0], values[2])


@pytest.mark.parametrize("output", [torch.zeros(3), torch.tensor([1, 2]), None, "text", SimpleNamespace()])
def test_outputs_without_gradients_have_noprobe(output: Any) -> None:
    assert probe(output, 0) is None


def test_the_probe_of_logits_has_the_fisher_information() -> None:
    logits = randn(0, 1, 5, dtype=torch.float32).requires_grad_()
    grads = []
    for seed in range(4000):
        loss = probe(SimpleNamespace(logits=logits), seed)
        assert loss is not None
        grads.append(torch.autograd.grad(loss, logits)[0][0])
    chances = logits.detach().softmax(-1)[0]
    found = torch.stack(grads).t() @ torch.stack(grads) / len(grads)
    torch.testing.assert_close(found, torch.diag(chances) - chances[:, None] * chances, rtol=0.15, atol=0.01)


def test_the_same_seed_gives_the_same_numbers() -> None:
    batches = [randn(9, 4, 8, dtype=torch.float32)]
    made = [measured(Chain(nn.Tanh(), (8, 8), (8, 8)), batches, seed=seed) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
