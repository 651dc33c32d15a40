"""What stages of 16 entries leave of unit Gaussian numbers, shape by shape: the table that rates are chosen by.

    python examples/bench/shapes.py      # two threads, about two minutes; writes examples/results/shapes.json

Codebooks are trained as a conversion trains them, and points coded with its beam. The excess is over the
rate-distortion bound, 4 ** -bits, in bits.
"""

from __future__ import annotations

import math

import results
import torch

from rpqfx.fit.refitting import left_over
from rpqfx.fit.residual import improve, train
from rpqfx.ops.search import beam_search
from rpqfx.policies import fast_shapes

BEAMS = (8, 16, 32, 64)
POINTS = 20_000


def measure(shape: fast_shapes.Shape, seed: int = 0) -> dict[str, float]:
    """Returns the mean squared error of a shape with each beam."""
    d, stages = shape
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(2**15, d, generator=g)
    books = improve(points, train(points, stages, fast_shapes.ENTRIES, seed=seed)[0], beam=16)
    test = torch.randn(POINTS, d, generator=g)
    return {
        str(beam): float(left_over(test, beam_search(test, books, beam)[0], books).square().mean()) for beam in BEAMS
    }


def main() -> None:
    torch.set_num_threads(2)
    rows = []
    for shape in sorted(fast_shapes.LEFT, key=fast_shapes.rate):
        left, bits = measure(shape), fast_shapes.rate(shape)
        excess = 0.5 * math.log2(left["32"] * 4**bits)
        rows.append({"d": shape[0], "stages": shape[1], "bits": bits, "left": left, "excess": excess})
        print(rows[-1], flush=True)
    results.write("shapes", "python examples/bench/shapes.py", {"seed": 0, "points": POINTS, "rows": rows})


if __name__ == "__main__":
    main()
