"""Which way a product runs: through the table of dot products, or through the expanded matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Costs:
    """What steps cost on a device, in multiply-adds of its dense matrix product.

    Args:
        gather: One addition of a gathered element.
        expand: One element of the matrix made from its codes.
    """

    gather: float
    expand: float


# cpu: two cores, float32, torch 2.13 (9216 x 9216, M 72: 168 G multiply-adds a second against 13 G gathered
# additions and 1 G expanded elements). cuda: an estimate from memory bandwidth, not measured on a GPU.
COSTS = {"cpu": Costs(gather=13.0, expand=150.0), "cuda": Costs(gather=100.0, expand=100.0)}


def contracts(codebooks_shape: tuple[int, ...], codes_shape: tuple[int, ...], rows: int, device: torch.device) -> bool:
    """Whether the table of dot products costs less than expanding the matrix.

    Args:
        codebooks_shape: ``(R, G, K, d)``.
        codes_shape: ``(R, M, N)``.
        rows: ``B``. Left out of the choice in compiled graphs, which serve every batch.
        device: Where the product runs.

    Returns:
        True for contract, False for expand.
    """
    costs = COSTS.get(device.type, COSTS["cuda"])
    stages, _, entries, d = codebooks_shape
    num_vectors = codes_shape[2]
    table = stages * (entries / num_vectors + costs.gather / d)
    if torch.compiler.is_compiling():
        return table < 1
    return rows * table < rows + stages * costs.expand
