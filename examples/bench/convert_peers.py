"""Other quantisers of weights at a given number of stored bits: the peers of ``convert.py``.

    pip install hqq torchao faiss-cpu && python examples/bench/convert_peers.py --check

Each turns all matrices of a model into dense ones that carry its error, and counts what it would store: codes, and
scales, zeros and codebooks in float16. None sees data; the errors that choose between settings are a Gaussian's.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import convert_quantisers as by
import torch
from convert_budget import Option, share, vector_error
from torch import Tensor

# One codebook has one setting for the whole model, so it cannot fill a budget; this much more than it may be taken.
_SLACK = 1.015


class Converted(NamedTuple):
    """What a peer made of a model.

    Args:
        weights: By name, ``[N, D]`` float32, dequantised.
        stored_bits: All included.
        note: The settings, and whether they are above the target.
    """

    weights: dict[str, Tensor]
    stored_bits: int
    note: str


@dataclass(frozen=True)
class Peer:
    """A quantiser of other people.

    Args:
        name: For tables.
        needs: The module that has to import.
        convert: From matrices by name, ``[N, D]``, and bits a weight.
    """

    name: str
    needs: str
    convert: Callable[[Mapping[str, Tensor], float], Converted]

    def installed(self) -> bool:
        try:
            importlib.import_module(self.needs)
        except ImportError:
            return False
        return True

    def run(self, matrices: Mapping[str, Tensor], bits: float) -> Converted:
        """All matrices at ``bits`` stored bits a weight or fewer, or at the fewest there are (the note says so).

        Raises:
            ImportError: The peer is not installed.
        """
        importlib.import_module(self.needs)
        with torch.no_grad():
            return self.convert({name: matrix.detach().float() for name, matrix in matrices.items()}, bits)


_Quantise = Callable[..., Tensor]


class _Kind(NamedTuple):
    """A quantiser of one matrix: its options for a shape, its work, and a setting in words."""

    options: Callable[[int, int], Iterator[Option]]
    quantise: _Quantise
    label: str


def _each_matrix(kind: _Kind, matrices: Mapping[str, Tensor], bits: float) -> Converted:
    """Settings matrix by matrix, under one total."""
    size = sum(matrix.numel() for matrix in matrices.values())
    chosen = share({name: list(kind.options(*matrix.shape)) for name, matrix in matrices.items()}, bits * size)
    weights = {name: kind.quantise(matrix, *chosen[name].setting) for name, matrix in matrices.items()}
    stored = sum(option.bits for option in chosen.values())
    settings = collections.Counter(kind.label.format(*option.setting) for option in chosen.values())
    note = "; ".join(f"{count} x {setting}" for setting, count in settings.most_common())
    return Converted(weights, stored, note + _above(stored, bits * size))


def _above(stored: int, budget: float) -> str:
    return f" ({stored / budget - 1:.1%} above the target)" if stored > budget else ""


def _kmeans_model(matrices: Mapping[str, Tensor], bits: float) -> Converted:
    """One codebook for all matrices."""
    size = sum(matrix.numel() for matrix in matrices.values())

    def stored(dim: int, width: int) -> int:
        rows = (16 * len(m) + width * len(m) * math.ceil(m.shape[1] / dim) for m in matrices.values())
        return sum(rows) + 16 * 2**width * dim

    options = [Option((d, b), stored(d, b), vector_error(d, b / d)) for d in by.DIMS for b in range(2, 13)]
    fitting = [option for option in options if option.bits <= bits * size * _SLACK]
    taken = min(fitting, key=lambda o: o.error) if fitting else min(options, key=lambda o: o.bits)
    dim, width = taken.setting
    scales = {name: by.row_scale(matrix) for name, matrix in matrices.items()}
    points = {name: by.cut(matrix / scales[name], dim) for name, matrix in matrices.items()}
    codebook, index = by.kmeans(torch.cat(list(points.values())), width)
    weights = {
        name: by.joined(by.coded(points[name], codebook, index), matrix) * scales[name]
        for name, matrix in matrices.items()
    }
    return Converted(weights, taken.bits, f"d={dim}, K={2**width}" + _above(taken.bits, bits * size))


def _peer(name: str, needs: str, options: Callable[..., Iterator[Option]], quantise: _Quantise, label: str) -> Peer:
    return Peer(name, needs, functools.partial(_each_matrix, _Kind(options, quantise, label)))


_UNSCALED = functools.partial(by.product_options, scale=False)
_SCALED = functools.partial(by.product_options, scale=True)
PEERS: list[Peer] = [
    _peer("HQQ", "hqq.core.quantize", by.hqq_options, by.hqq, "{} bits, group {}"),
    _peer("torchao", "torchao.quantization", by.torchao_options, by.torchao, "{} bits, group {}"),
    _peer("faiss ProductQuantizer", "faiss", _UNSCALED, by.faiss_product, "d={}, {} bits"),
    _peer("faiss ResidualQuantizer", "faiss", by.residual_options, by.faiss_residual, "d={}, {} x {} bits"),
    _peer("k-means PQ, own codebooks", "faiss", _SCALED, by.kmeans_own, "d={}, {} bits"),
    Peer("k-means PQ, one codebook", "faiss", _kmeans_model),
]

_BLOCK = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
_ENCODER = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
_CONVS = [(16, 27), *[(16, 144)] * 6, (32, 144), *[(32, 288)] * 5, (64, 288), *[(64, 576)] * 5, (10, 64)]
_SHAPES = {
    "4 blocks of SmolLM2": (_BLOCK * 4, (4.0, 3.0, 2.1)),
    "MiniLM": (_ENCODER * 6, (3.1, 2.1)),
    "ResNet-20": (_CONVS, (2.1, 1.05)),
}


def _check() -> None:
    """Bits and error of every peer on Gaussian matrices of three models' shapes."""
    print("| matrices | target | peer | stored | relative squared error | seconds | note |")
    print("|---|---|---|---|---|---|---|")
    for model, (shapes, targets) in _SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        matrices = {str(i): torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
        size = sum(matrix.numel() for matrix in matrices.values())
        for target in targets:
            for peer in PEERS:
                if not peer.installed():
                    print(f"| {model} | {target} | {peer.name} | not installed | | | |")
                    continue
                start = time.perf_counter()
                made = peer.run(matrices, target)
                seconds = time.perf_counter() - start
                error = sum((made.weights[k] - m).square().sum().item() for k, m in matrices.items()) / size
                figures = f"{made.stored_bits / size:.3f} | {error:.4f} | {seconds:.1f}"
                print(f"| {model} | {target} | {peer.name} | {figures} | {made.note} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="bits and error on Gaussian matrices")
    if parser.parse_args().check:
        _check()
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
