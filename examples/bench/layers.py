"""A linear layer three ways, in one run and in turns: dense, gather-then-linear, and straight from the codebooks.

    python examples/bench/layers.py             # two threads, float32, medians of 9, in milliseconds

Gather-then-linear expands the weight with autograd and multiplies, as RPQ-pytorch does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx import codebook
from rpqfx.nn import RPQLinear

# in, out, codebooks, batch
CASES = ((9216, 9216, 72, 1), (9216, 9216, 72, 64), (9216, 9216, 72, 512), (4096, 4096, 32, 512), (1280, 5120, 16, 512))
CASES += ((1280, 5120, 16, 2048), (768, 768, 12, 64), (768, 768, 12, 512))
WARM_UP, RUNS = 2, 9


def forward(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    y = layer(x)
    y.backward(torch.ones_like(y))


def milliseconds(run: Callable[..., None], layers: list[Callable[[Tensor], Tensor]], x: Tensor) -> list[float]:
    """Medians of runs taken in turns, so that a drift of the machine's speed meets all alike."""
    times: list[list[float]] = [[] for _ in layers]
    for turn in range(WARM_UP + RUNS):
        for layer, found in zip(layers, times, strict=True):
            start = time.perf_counter()
            run(layer, x)
            if turn >= WARM_UP:
                found.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]


def main() -> None:
    torch.set_num_threads(2)
    print("| layer (in x out, M), batch | pass | dense | gather + linear | codebooks | over dense | over gather |")
    print("|---|---|---|---|---|---|---|")
    for wide, out, count, batch in CASES:
        torch.manual_seed(0)
        dense, ours = nn.Linear(wide, out), RPQLinear(wide, out, codebooks=count)
        held = ours.weight_rpq

        def gather(x: Tensor, held: nn.Module = held, ours: RPQLinear = ours) -> Tensor:
            return F.linear(x, codebook.expand(held.codebooks, held.codes), ours.bias)

        x = torch.randn(batch, wide, requires_grad=True)
        for name, run in (("forward", forward), ("forward + backward", forward_backward)):
            a, b, c = milliseconds(run, [dense, gather, ours], x)
            shape = f"{wide} x {out}, {count}, B={batch}"
            print(f"| {shape} | {name} | {a:.2f} | {b:.2f} | {c:.2f} | {a / c:.1f} x | {b / c:.1f} x |", flush=True)


if __name__ == "__main__":
    main()
