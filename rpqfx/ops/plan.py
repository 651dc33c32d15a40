"""Chooses how a product runs: through the table of dot products, or through the dequantized matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from rpqfx.ops.cpu import build

Plan = Literal["auto", "dequantize", "lookup"]
PLANS: tuple[Plan, ...] = get_args(Plan)


@dataclass(frozen=True)
class Costs:
    """The costs of steps on a device, in multiply-adds of its dense matrix product.

    Args:
        dot: One multiply-add of the table of a linear map: its products are small ones.
        gather: One addition of a gathered element.
        output: One element of the result, written by column and copied into rows.
        dequantize: One element of the matrix made from its codes.
        table: One element of a convolution's table of maps, beyond its multiply-adds: written, read again.
        add: One addition of an element of a gathered map.
    """

    dot: float
    gather: float
    output: float
    dequantize: float
    table: float
    add: float


# What examples/bench/plans.py is checked against: two cores with AVX-512, torch 2.13, 160 G multiply-adds a second in
# float32 and 900 G in bfloat16 (AMX). With the compiled kernels an addition takes 0.025 ns, with torch's own operators
# 0.17 ns; products of the table run as fast in bfloat16 as in float32. cuda: an H200, 400 T multiply-adds a second in
# bfloat16 and 25 T in float32 (examples/bench/gpu.py); what concerns convolutions is an estimate.
COSTS = {
    "cpu float32": Costs(dot=1.0, gather=5.0, output=15.0, dequantize=40.0, table=150.0, add=6.0),
    "cpu bfloat16": Costs(dot=5.5, gather=24.0, output=80.0, dequantize=150.0, table=600.0, add=30.0),
    "cpu plain": Costs(dot=1.0, gather=28.0, output=146.0, dequantize=150.0, table=250.0, add=8.0),
    "cuda float32": Costs(dot=1.0, gather=28.0, output=0.0, dequantize=28.0, table=50.0, add=28.0),
    "cuda": Costs(dot=1.0, gather=220.0, output=0.0, dequantize=210.0, table=200.0, add=100.0),
}


def costs_of(device: torch.device, dtype: torch.dtype) -> Costs:
    """Returns the row of the table for what a product runs on; exported graphs run on torch's own operators."""
    if device.type != "cpu":
        return COSTS["cuda float32" if dtype is torch.float32 else "cuda"]
    name = f"cpu {str(dtype).removeprefix('torch.')}"
    if name not in COSTS or torch.compiler.is_dynamo_compiling():
        return COSTS.get(name, COSTS["cpu plain"])
    return COSTS[name if not torch.compiler.is_compiling() and build.ready() else "cpu plain"]


def cheaper(
    codebooks_shape: tuple[int, ...],
    codes_shape: tuple[int, ...],
    rows: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """Returns the plan that costs less: the table of dot products, or the dequantized matrix.

    Args:
        codebooks_shape: ``(R, G, K, d)``.
        codes_shape: ``(R, M, N)``.
        rows: ``B``. Left out of the choice in compiled graphs, which serve every batch.
        device: Where the product runs.
        dtype: In which it runs.

    Returns:
        ``"lookup"`` or ``"dequantize"``.
    """
    costs = costs_of(device, dtype)
    stages, _, entries, d = codebooks_shape
    _, sub_vectors, num_vectors = codes_shape
    lookup = stages * (costs.dot * entries / num_vectors + costs.gather / d) + costs.output / (sub_vectors * d)
    return _choose(lookup, stages * costs.dequantize, rows)


def cheaper_conv(
    codebooks_shape: tuple[int, ...],
    codes_shape: tuple[int, ...],
    positions: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """Returns the plan that costs less for a convolution whose entries are filters of whole channels.

    Args:
        codebooks_shape: ``(R, G, K, d)``.
        codes_shape: ``(R, M, N)``.
        positions: Of the vectors' maps in all samples. Left out of the choice in compiled graphs.
        device: Where the convolution runs.
        dtype: In which it runs.

    Returns:
        ``"lookup"`` or ``"dequantize"``.
    """
    costs = costs_of(device, dtype)
    stages, _, entries, d = codebooks_shape
    lookup = stages * (entries / codes_shape[2] * (1 + costs.table / d) + costs.add / d)
    return _choose(lookup, stages * costs.dequantize, positions)


def _choose(lookup: float, dequantize: float, rows: int) -> Plan:
    """Returns the plan, given the cost of looking up a row and of dequantizing once; a dense product costs 1 a row."""
    if torch.compiler.is_compiling():  # one graph serves every batch
        return "lookup" if lookup < 1 else "dequantize"
    return "lookup" if rows * lookup < rows + dequantize else "dequantize"
