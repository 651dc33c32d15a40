"""Some steps of AdamW: the rewritten model, and its twin, whose weights are expanded before each step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo_models import Model
from zoo_pairs import Pair, book_grads, fill, quantized_weights
from zoo_runs import arguments, floating, precision, seed_all


def loss_of(entry: Model, model: nn.Module, dtype: torch.dtype, step: int) -> Tensor:
    """Mean square distance of all outputs from random ones."""
    call = arguments(entry, True, dtype)
    seed_all(10 + step)
    with precision(dtype):
        result = model(*call.args, **call.kwargs or {})
        outputs = [x for x in floating(entry.pick(result) if entry.pick else result) if x.requires_grad]
        generator = torch.Generator().manual_seed(7)
        total = torch.zeros((), dtype=dtype)
        for x in outputs:
            target = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
            total = total + (torch.where(x.isfinite(), x, 0.0) - target).square().mean()
    return total


def _optimiser(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, foreach=False)


def train(entry: Model, small: nn.Module, dtype: torch.dtype, steps: int) -> list[float]:
    small.train()
    optimiser, losses = _optimiser([p for p in small.parameters() if p.requires_grad]), []
    for step in range(steps):
        optimiser.zero_grad()
        loss = loss_of(entry, small, dtype, step)
        loss.backward()
        _densify(small)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def train_twin(
    entry: Model, small: nn.Module, twin: nn.Module, dtype: torch.dtype, steps: int, pair: Pair
) -> list[float]:
    """The dense model, whose weights are expanded before each step from codebooks of its own."""
    mirror, _ = pair.copies(dtype)
    twin.train()
    held = {id(twin.get_parameter(name)) for name in quantized_weights(mirror)}
    books = list({id(p): p for weight in quantized_weights(mirror).values() for p in weight.parameters()}.values())
    rest = [p for p in twin.parameters() if id(p) not in held]
    optimiser, losses = _optimiser([p for p in [*rest, *books] if p.requires_grad]), []
    for step in range(steps):
        fill(twin, mirror)
        twin.zero_grad()
        loss = loss_of(entry, twin, dtype, step)
        loss.backward()
        _densify(twin)
        grads = book_grads(mirror, twin)
        for book in books:
            book.grad = grads.get(id(book))
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def _densify(model: nn.Module) -> None:
    """AdamW takes no sparse gradients."""
    for p in model.parameters():
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.to_dense()
