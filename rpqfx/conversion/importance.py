"""What errors of each weight cost the model, measured by gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.observe import Observer, Seen
from rpqfx.graph.calibration.probe import probe
from rpqfx.nn.weight import RPQWeight

_BLOCK = 4  # columns whose energies are averaged geometrically, as a sub-vector's errors are


class Gradients(Observer):
    """Hears the mean squared gradient of each product's result.

    The gradient is of a random direction in which the model's outputs could change: of logits (outputs under that
    name) one drawn so that its mean square is the Fisher information, and so the squared gradient what the Kullback-
    Leibler divergence grows by; of others a Gaussian one, for the squared error.

    Args:
        weights: What to listen to.
    """

    def __init__(self, weights: Iterable[StandIn]) -> None:
        super().__init__(weights)
        self.sums: dict[RPQWeight, float] = {}

    def asked(self, *args: Any) -> None:
        """See ``Listener``: inputs are known already."""

    def read(self, weight: RPQWeight) -> None:
        """See ``Listener``: which weights are read is known already."""

    def made(self, weight: RPQWeight, y: Tensor) -> Tensor:
        """See ``Listener``."""
        if not torch.is_grad_enabled() or not y.is_floating_point():
            return y
        if not y.requires_grad:
            y = y.detach().requires_grad_().clone()  # a leaf could not be changed in place

        def hook(grad: Tensor) -> None:
            self.sums[weight] = self.sums.get(weight, 0.0) + float(grad.float().square().mean())

        y.register_hook(hook)
        return y


def importance(
    model: nn.Module,
    weights: Sequence[StandIn],
    seen: dict[RPQWeight, Seen],
    runs: Sequence[Callable[[], Any]],
    *,
    seed: int = 0,
) -> dict[RPQWeight, float]:
    """What an error of each weight that is as large as the weight itself would add to the loss, to second order.

    For a weight ``W`` with outputs' mean squared gradient ``g`` and mean squared inputs ``h`` that is
    ``g * sum_nj W_nj^2 h_j``, the diagonal of the Kronecker-factored Fisher information (Martens and Grosse,
    1503.05671). Sub-vectors trade errors between their columns, so energies are averaged geometrically within four.

    Args:
        model: The model; its Parameters are left without gradients.
        weights: The stand-ins.
        seen: What was observed of them.
        runs: What runs each batch.
        seed: Of the random directions.

    Returns:
        For each weight a positive number.
    """
    listener = Gradients(weights)
    for weight in weights:
        weight.listener = listener
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for number, run in enumerate(runs):
            with torch.enable_grad():
                loss = probe(run(), seed + number)
                if loss is not None:
                    loss.backward()
    finally:
        for parameter in trained:
            parameter.requires_grad_()
    found = {}
    for weight in weights:
        mean = seen[weight].moments.mean
        energy = weight.vectors.float().square().mean(0)
        if mean is not None:
            energy = energy * (mean.diagonal() if mean.dim() == 2 else mean).to(energy.dtype)
        blocks = energy.clamp_min(1e-20).log()
        whole = len(blocks) // _BLOCK * _BLOCK
        mixed = blocks[:whole].view(-1, _BLOCK).mean(1).exp().sum() * _BLOCK + blocks[whole:].exp().sum()
        found[weight] = float(mixed) * len(weight.vectors) * listener.sums.get(weight, 0.0) / max(1, len(runs))
    known = [value for value in found.values() if value > 0]
    floor = min(known, default=1.0)  # what no gradient reached matters little, not less than anything
    return {weight: value if value > 0 else floor for weight, value in found.items()}
