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
        table: One element of a convolution's table of maps, beyond its multiply-adds: written, read again.
        add: One addition of an element of a gathered map.
    """

    gather: float
    output: float
    expand: float
    table: float
    add: float


# cpu: two cores, float32, torch 2.13, medians of 768 x 768 to 5120 x 1280 at 512 and 2048 rows: 160 G multiply-adds a
# second, 0.17 ns an addition, 0.9 ns a result, 0.9 ns an expanded element. Convolutions: fitted to 3 x 3 and 1 x 1
# filters of 64 to 1024 channels, 16 to 256 entries, images of 7 x 7 to 56 x 56; 1.6 ns an element of the table (a new
# one touches new memory, and sub-vectors of eight channels run at half speed), 0.05 ns an addition. cuda: an estimate
# from memory bandwidth, not measured on a GPU.
COSTS = {
    "cpu": Costs(gather=28.0, output=146.0, expand=150.0, table=250.0, add=8.0),
    "cuda": Costs(gather=100.0, output=100.0, expand=100.0, table=200.0, add=100.0),
}


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
    return _choose(contract, stages * costs.expand, rows)


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
    costs = COSTS.get(device.type, COSTS["cuda"])
    stages, _, entries, d = codebooks_shape
    contract = stages * (entries / codes_shape[2] * (1 + costs.table / d) + costs.add / d)
    return _choose(contract, stages * costs.expand, positions)


def _choose(contract: float, expand: float, rows: int) -> Plan:
    """The plan, from what contracting costs a row and expanding costs once, where a dense product costs 1 a row."""
    if torch.compiler.is_compiling():  # one graph serves every batch
        return "contract" if contract < 1 else "expand"
    return "contract" if rows * contract < rows + expand else "expand"
