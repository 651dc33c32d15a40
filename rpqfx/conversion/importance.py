"""Measures by gradients how much errors of each weight cost the model."""

from __future__ import annotations

from collections.abc import Sequence

from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.gradients import Gradients
from rpqfx.nn.weight import RPQWeight

_BLOCK = 4  # columns whose energies are averaged geometrically, as a sub-vector's errors are


def importance(weights: Sequence[StandIn], gradients: Gradients, batches: int) -> dict[RPQWeight, float]:
    """Returns what an error of each weight, as large as the weight itself, would add to the loss to second order.

    For a weight ``W`` with outputs' mean squared gradient ``g`` and mean squared inputs ``h`` that is
    ``g * sum_nj W_nj^2 h_j``, the diagonal of the Kronecker-factored Fisher information (Martens and Grosse,
    1503.05671). Sub-vectors trade errors between their columns, so energies are averaged geometrically within four.

    Args:
        weights: The stand-ins.
        gradients: The gradients that were collected.
        batches: How many were run.

    Returns:
        For each weight a positive number.
    """
    found = {}
    for weight in weights:
        mean = gradients.seen[weight].moments.mean
        energy = weight.vectors.float().square().mean(0)
        if mean is not None:
            energy = energy * (mean.diagonal() if mean.dim() == 2 else mean).to(energy.dtype)
        blocks = energy.clamp_min(1e-20).log()
        whole = len(blocks) // _BLOCK * _BLOCK
        mixed = blocks[:whole].view(-1, _BLOCK).mean(1).exp().sum() * _BLOCK + blocks[whole:].exp().sum()
        found[weight] = float(mixed) * len(weight.vectors) * gradients.sums.get(weight, 0.0) / max(1, batches)
    known = [value for value in found.values() if value > 0]
    floor = min(known, default=1.0)  # what no gradient reached matters little, not less than anything
    return {weight: value if value > 0 else floor for weight, value in found.items()}
