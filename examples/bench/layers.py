"""Layers against what they are compared with, in one run and in turns.

    python examples/bench/layers.py              # two threads, float32, medians of 15
    python examples/bench/layers.py --opt66b     # and a token of OPT-66B, for minutes; needs the extra examples

Beside each other: the dense layer (in float32, and in bfloat16 where the CPU multiplies it in hardware), gather and
multiply (what RPQ-pytorch does, its own layer where it is installed), the codebooks through torch's own operators, and
the codebooks as they run. Each has tensors of its own, and a run of one follows a run of another, so all find cold
caches ("again at once": a run that follows a run of the same layer, as few rows of a small model would). The floor is
what the work of the codebooks must take at the least: its bytes at the speed of the memory, or its multiply-adds at the
speed of the matrix product plus its additions at the speed of adding from the cache, all measured first. Writes
``examples/results/layers.json``. A GPU's figures are those of ``gpu.py``.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx import codebook
from rpqfx.nn import RPQEmbedding, RPQLinear
from rpqfx.ops import library, reference

WARM_UP, RUNS = 2, 15
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A linear layer, ``M`` codebooks of 256 entries, and rows of a batch."""

    wide: int
    out: int
    count: int
    batch: int
    backward: bool = False


CPU_CASES = (
    *(Case(9216, 9216, 72, batch) for batch in (1, 4, 16, 64, 512)), Case(9216, 9216, 72, 512, True),
    *(Case(4096, 4096, 32, 512, backward) for backward in (False, True)),
    *(Case(1280, 5120, 16, batch, backward) for batch in (512, 2048) for backward in (False, True)),
    *(Case(768, 768, 12, batch, backward) for batch in (64, 128, 256, 512) for backward in (False, True)),
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What a device was measured to do, a second."""

    bytes: float
    products: float
    additions: float

    @classmethod
    def measure(cls) -> Machine:
        large, square, cached = torch.ones(2**27), torch.ones(4096, 4096), torch.ones(2**18)
        return cls(
            bytes=4 * large.numel() / fastest(large.sum),
            products=4096**3 / fastest(lambda: square @ square),
            additions=cached.numel() / fastest(cached.sum),
        )

    def floor(self, held: nn.Module, case: Case) -> dict[str, float]:
        """What a case counts, and the milliseconds that this takes at the least."""
        stages, _, entries, _ = held.codebooks.shape
        _, sub_vectors, vectors = held.codes.shape
        passes = 3 if case.backward else 1  # the gradients of input and codebooks are a product each
        books = held.codebooks.numel() * held.codebooks.element_size()
        numbers = held.codebooks.element_size() * case.batch * (case.wide + case.out)
        size = (1 + case.backward) * (books + held.codes.numel() + numbers) + (books if case.backward else 0)
        products = passes * case.batch * entries * case.wide * stages
        additions = (1 + case.backward) * case.batch * sub_vectors * vectors * stages
        least = max(size / self.bytes, products / self.products + additions / self.additions)
        return {"bytes": size, "products": products, "additions": additions, "floor_ms": 1e3 * least}


def fastest(run: Callable[[], object]) -> float:
    return min(seconds(run) for _ in range(7))


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def forward(layer: Layer, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: Layer, x: Tensor) -> None:
    y = layer(x)
    y.backward(torch.ones_like(y))


def milliseconds(run: Callable[..., None], layers: list[Layer], x: Tensor, plain: int | None = None) -> list[float]:
    """Medians of runs taken in turns, so that a drift of the machine's speed meets all alike.

    Args:
        run: What is timed, of a layer and an input.
        layers: The layers.
        x: The input, cast for layers of another dtype.
        plain: Which of them runs through torch's own operators.
    """
    times: list[list[float]] = [[] for _ in layers]
    inputs = [x.detach().to(dtype_of(layer, x)).requires_grad_(x.requires_grad) for layer in layers]
    order, shuffle = list(range(len(layers))), random.Random(0).shuffle
    for turn in range(WARM_UP + RUNS):
        shuffle(order)  # no layer always comes after the one that empties the caches
        for i in order:
            with torch_operators() if i == plain else nullcontext():
                taken = seconds(lambda: run(layers[i], inputs[i]))  # noqa: B023
            if turn >= WARM_UP:
                times[i].append(1e3 * taken)
    return [statistics.median(found) for found in times]


def dtype_of(layer: Layer, x: Tensor) -> torch.dtype:
    first = next(layer.parameters(), None) if isinstance(layer, nn.Module) else None
    return x.dtype if first is None or not x.is_floating_point() else first.dtype


def torch_operators() -> AbstractContextManager[object]:
    return patch.object(library, "choose", lambda *_: reference)


def gather_and_multiply(layer: RPQLinear) -> tuple[str, Layer]:
    """RPQ-pytorch's layer if it is there, else the same done here."""
    try:
        from rpq.nn import RPQLinear as Theirs
    except ImportError:
        held = layer.weight_rpq
        return "gather + linear", lambda x: F.linear(x, codebook.expand(held.codebooks, held.codes), layer.bias)
    theirs = Theirs(layer.in_features, layer.out_features, layer.weight_rpq.spec.num_subvectors)
    return "RPQ-pytorch", theirs.to(layer.bias.device, layer.bias.dtype)


def has_fast_bfloat16() -> bool:
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("amx_tile") or flags.get("avx512_bf16"))


def linear(case: Case, machine: Machine) -> dict[str, Any]:
    """One case: milliseconds of all that is compared, and what the codebooks have to do."""
    torch.manual_seed(0)
    dense = nn.Linear(case.wide, case.out)
    ours, plain, other = (RPQLinear(case.wide, case.out, num_subvectors=case.count) for _ in range(3))
    name, gather = gather_and_multiply(other)
    layers: list[Layer] = [dense, gather, plain, ours]
    layers += [nn.Linear(case.wide, case.out, dtype=torch.bfloat16)] if has_fast_bfloat16() else []
    x = torch.randn(case.batch, case.wide, requires_grad=case.backward)
    found = milliseconds(forward_backward if case.backward else forward, layers, x, plain=2)
    ways = ("dense_ms", "gather_ms", "operators_ms", "ours_ms", "dense_bfloat16_ms")
    row = {**dataclasses.asdict(case), "gather": name, **dict(zip(ways, found, strict=False))}
    if case.batch <= 16:
        row["again_ms"] = milliseconds(forward, [ours], x)[0]
    return row | machine.floor(ours.weight_rpq, case)


def embedding() -> dict[str, float]:
    """Eight rows of a large table."""
    ids = torch.randint(50_272, (8,))
    dense = nn.Embedding(50_272, 9216)
    other, ours = (RPQEmbedding(50_272, 9216, num_subvectors=72) for _ in range(2))
    held = other.weight_rpq

    def gather(ids: Tensor) -> Tensor:
        return F.embedding(ids, codebook.expand(held.codebooks, held.codes))

    return dict(
        zip(("dense_ms", "gather_ms", "ours_ms"), milliseconds(forward, [dense, gather, ours], ids), strict=True)
    )


def opt66b() -> dict[str, Any]:
    """Seconds for a token of OPT-66B with random weights, by the example that shows it."""
    example = Path(__file__).parents[1] / "02_opt66b.py"
    done = subprocess.run([sys.executable, str(example), "--json"], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    torch.set_num_threads(2)
    machine = Machine.measure()
    figures: dict[str, Any] = {"seed": 0, "runs": RUNS, "speeds": dataclasses.asdict(machine), "rows": []}
    for case in CPU_CASES:
        figures["rows"].append(linear(case, machine))
        print(json.dumps(figures["rows"][-1]), flush=True)
    figures["embedding"] = embedding()
    if "--opt66b" in sys.argv:
        figures["opt66b"] = opt66b()
    results.write("layers", " ".join(["python examples/bench/layers.py", *sys.argv[1:]]), figures)


if __name__ == "__main__":
    main()
