"""Which way a product runs: through the table of dot products, or through the expanded matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Plan = Literal["auto", "expand", "contract"]
PLANS: tuple[Plan, ...] = get_args(Plan)


@dataclass(frozen=True)
class Costs:
    """What steps cost on a device, in multiply-adds of its dense matrix product.

    Args:
        gather: One addition of a gathered element.
        output: One element of the result, written by column and copied into rows.
        expand: One element of the matrix made from its codes.
    """

    gather: float
    output: float
    expand: float


# cpu: two cores, float32, torch 2.13, medians of 768 x 768 to 5120 x 1280 at 512 and 2048 rows: 160 G multiply-adds a
# second, 0.17 ns an addition, 0.9 ns a result, 0.9 ns an expanded element. cuda: an estimate from memory bandwidth, not
# measured on a GPU.
COSTS = {"cpu": Costs(gather=28.0, output=146.0, expand=150.0), "cuda": Costs(gather=100.0, output=100.0, expand=100.0)}


def cheaper(codebooks_shape: tuple[int, ...], codes_shape: tuple[int, ...], rows: int, device: torch.device) -> Plan:
    """The plan that costs less: the table of dot products, or the expanded matrix.

    Args:
        codebooks_shape: ``(R, G, K, d)``.
        codes_shape: ``(R, M, N)``.
        rows: ``B``. Left out of the choice in compiled graphs, which serve every batch.
        device: Where the product runs.

    Returns:
        ``"contract"`` or ``"expand"``.
    """
    costs = COSTS.get(device.type, COSTS["cuda"])
    stages, _, entries, d = codebooks_shape
    _, sub_vectors, num_vectors = codes_shape
    contract = stages * (entries / num_vectors + costs.gather / d) + costs.output / (sub_vectors * d)
    if torch.compiler.is_compiling():
        return "contract" if contract < 1 else "expand"
    return "contract" if rows * contract < rows + stages * costs.expand else "expand"


def cheaper_conv(
    codebooks_shape: tuple[int, ...], codes_shape: tuple[int, ...], positions: int, device: torch.device
) -> Plan:
    """The plan that costs less for a convolution whose entries are filters of whole channels.

    Args:
        codebooks_shape: ``(R, G, K, d)``.
        codes_shape: ``(R, M, N)``.
        positions: Of the vectors' maps in all samples. Left out of the choice in compiled graphs.
        device: Where the convolution runs.

    Returns:
        ``"contract"`` or ``"expand"``.
    """
    return "expand"
