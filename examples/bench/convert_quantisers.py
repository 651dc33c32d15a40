"""Quantisers of one matrix that other people wrote, and the settings that each has for a shape.

Each takes a matrix ``[N, D]`` float32 and a setting, and gives the matrix back with the error of that setting. Options
count codes, and scales, zeros and codebooks in float16; which is best is judged on a Gaussian, without data.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from convert_budget import Option, vector_error
from torch import Tensor, nn

_GROUPS = (16, 24, 32, 48, 64, 96, 128, 144, 192, 288, 384, 576, 768, 1152, 1536)
DIMS = (1, 2, 3, 4, 6, 8, 9, 12, 16)

# Scalar quantisers: a scale (and a zero) for each group of values.


def hqq(matrix: Tensor, bits: int, group: int) -> Tensor:
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    options = {"axis": 1, "bitpack": False, "compute_dtype": torch.float32, "device": "cpu"}
    codes, meta = quantizer.quantize(matrix, nbits=bits, group_size=group, **options)
    return ((codes.float() - meta["zero"].half().float()) * meta["scale"].half().float()).reshape(matrix.shape)


def hqq_options(n: int, dim: int) -> Iterator[Option]:
    groups = [group for group in _GROUPS if n * dim % group == 0]  # a group may go on in the next row
    for bits in (1, 2, 3, 4, 5, 6, 8):
        for group in groups:
            error = _gaussian_error(hqq, bits, group) * n * dim
            yield Option((bits, group), n * dim * bits + n * dim // group * 32, error)


def torchao(matrix: Tensor, bits: int, group: int) -> Tensor:
    quantization = importlib.import_module("torchao.quantization")
    workflows = importlib.import_module("torchao.quantization.quantize_.workflows")
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight = nn.Parameter(matrix.clone(), requires_grad=False)
    # Its plain way, from the smallest and largest value, has 1.5 to 3 times the error at 2 bits.
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=quantization.PerGroup(group),
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=workflows.IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
    )
    quantization.quantize_(layer, config)
    weight: Any = layer.weight
    return weight.dequantize().float()


def torchao_options(n: int, dim: int) -> Iterator[Option]:
    for bits in range(1, 9):
        for group in sorted({dim, *(group for group in _GROUPS if dim % group == 0)}):
            error = _gaussian_error(torchao, bits, group) * n * dim
            yield Option((bits, group), n * dim * bits + n * dim // group * 16, error)  # all zeros are 0


@functools.cache
def _gaussian_error(quantise: Callable[[Tensor, int, int], Tensor], bits: int, group: int) -> float:
    matrix = torch.randn(2**15 // group, group, generator=torch.Generator().manual_seed(0))
    return (quantise(matrix, bits, group) - matrix).square().mean().item()


# Vector quantisers: rows are cut into sub-vectors, padded with zeros where the length does not divide them.


def cut(matrix: Tensor, dim: int) -> Tensor:
    return nn.functional.pad(matrix, (0, -matrix.shape[1] % dim)).reshape(-1, dim).contiguous()


def joined(parts: Tensor, like: Tensor) -> Tensor:
    return parts.reshape(len(like), -1)[:, : like.shape[1]].contiguous()


def row_scale(matrix: Tensor) -> Tensor:
    scale = matrix.square().mean(1, keepdim=True).sqrt().half().float()
    return torch.where(scale > 0, scale, 1.0)


def kmeans(points: Tensor, bits: int) -> tuple[Tensor, Any]:
    """Faiss's k-means: float16 ``[K, d]``, and the index that finds the nearest."""
    faiss = importlib.import_module("faiss")
    means = faiss.Kmeans(points.shape[1], 2**bits, niter=25, seed=0, min_points_per_centroid=1)
    means.train(points.numpy())
    codebook = torch.from_numpy(means.centroids).half().float()
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(codebook.numpy())
    return codebook, index


def coded(points: Tensor, codebook: Tensor, index: Any) -> Tensor:
    codes = index.search(points.numpy(), 1)[1][:, 0]
    return codebook[torch.from_numpy(codes)]


def kmeans_own(matrix: Tensor, dim: int, bits: int) -> Tensor:
    scale = row_scale(matrix)
    points = cut(matrix / scale, dim)
    return joined(coded(points, *kmeans(points, bits)), matrix) * scale


def faiss_product(matrix: Tensor, dim: int, bits: int) -> Tensor:
    faiss = importlib.import_module("faiss")
    points = cut(matrix, dim)
    quantizer = faiss.ProductQuantizer(dim, 1, bits)
    quantizer.cp.min_points_per_centroid = 1
    quantizer.train(points.numpy())
    _round_to_half(quantizer.centroids)
    codes = quantizer.compute_codes(points.numpy())
    return joined(torch.from_numpy(quantizer.decode(codes)), matrix)


def faiss_residual(matrix: Tensor, dim: int, stages: int, bits: int) -> Tensor:
    faiss = importlib.import_module("faiss")
    points = cut(matrix, dim)
    quantizer = faiss.ResidualQuantizer(dim, stages, bits)
    quantizer.cp.min_points_per_centroid = 1
    quantizer.use_beam_LUT = 1  # the same codes in half the time
    quantizer.train_type = quantizer.Train_default  # progressive training takes 9 times as long for 0.3 % less error
    sample = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[: 64 << bits]
    quantizer.train(points[sample].numpy())
    _round_to_half(quantizer.codebooks)
    quantizer.compute_codebook_tables()  # of the rounded ones
    codes = quantizer.compute_codes(points.numpy())
    return joined(torch.from_numpy(quantizer.decode(codes)), matrix)


def _round_to_half(values: Any) -> None:
    """A vector of faiss's, in place."""
    faiss = importlib.import_module("faiss")
    faiss.copy_array_to_vector(faiss.vector_to_array(values).astype("float16").astype("float32"), values)


def product_options(n: int, dim: int, *, scale: bool) -> Iterator[Option]:
    for d in DIMS:
        parts = n * math.ceil(dim / d)
        for bits in range(1, min(12, int(math.log2(parts)) - 1) + 1):
            stored = parts * bits + 16 * d * 2**bits + (16 * n if scale else 0)
            yield Option((d, bits), stored, vector_error(d, bits / d) * n * dim)


def residual_options(n: int, dim: int) -> Iterator[Option]:
    for d in (8, 9, 16):
        parts = n * math.ceil(dim / d)
        for stages in (2, 3, 4):
            for bits in range(2, min(10, int(math.log2(parts)) - 1) + 1):
                # Taken to be as good as product codes with as many entries: a little worse than it is.
                error = vector_error(d / stages, bits * stages / d) * n * dim
                yield Option((d, stages, bits), stages * (parts * bits + 16 * d * 2**bits), error)
