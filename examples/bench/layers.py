"""Layers against what they are compared with, in one run and in turns.

    python examples/bench/layers.py             # two threads, float32, medians of 15, in milliseconds

Beside each other: the dense layer (in float32, and in bfloat16 where the CPU multiplies it in hardware), gather and
multiply (what RPQ-pytorch does, its own layer where it is installed), the codebooks through torch's own operators, and
the codebooks as they run. Each has tensors of its own, and a run of one follows a run of another, so all find cold
caches ("again at once": a run that follows a run of the same layer, as few rows of a small model would). The floor is
what the work of the codebooks must take at the least: its bytes at the speed of the memory, or its multiply-adds at the
speed of the matrix product plus its additions at the speed of adding from the cache, all measured first.
"""

from __future__ import annotations

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
from unittest.mock import patch

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
GPU_CASES = (Case(9216, 9216, 72, 1), Case(9216, 9216, 72, 512), Case(9216, 9216, 72, 2048, True))


HEAD = (
    "| in x out, M, batch | pass | dense | dense bfloat16 | {gather} | torch's operators | rpqfx | again at once "
    "| over dense | over gather | bytes, multiply-adds, additions | floor | of the floor |"
)


@dataclass(frozen=True)
class Machine:
    """What a device was measured to do, a second."""

    bytes: float
    products: float
    additions: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        large, square = torch.ones(2**27, device=device), torch.ones(4096, 4096, device=device, dtype=dtype)
        cached = torch.ones(2**18, device=device)
        return cls(
            bytes=4 * large.numel() / fastest(large.sum, device),
            products=4096**3 / fastest(lambda: square @ square, device),
            additions=cached.numel() / fastest(cached.sum, device),
        )

    def floor(self, held: nn.Module, case: Case) -> tuple[str, float]:
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
        return f"{size / 1e6:.1f} MB, {products / 1e9:.2f} G, {additions / 1e9:.2f} G", 1e3 * least


def fastest(run: Callable[[], object], device: torch.device) -> float:
    return min(seconds(run, device) for _ in range(7))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
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
                taken = seconds(lambda: run(layers[i], inputs[i]), x.device)  # noqa: B023
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


def table(cases: tuple[Case, ...], device: torch.device, dtype: torch.dtype) -> None:
    machine = Machine.measure(device, dtype)
    print(
        f"\n{dtype}: {machine.bytes / 1e9:.0f} GB/s, {machine.products / 1e9:.0f} G multiply-adds/s, "
        f"{machine.additions / 1e9:.0f} G additions/s\n"
    )
    half = device.type == "cpu" and has_fast_bfloat16()
    for i, case in enumerate(cases):
        torch.manual_seed(0)
        made = {"device": device, "dtype": dtype}
        dense = nn.Linear(case.wide, case.out, **made)
        ours, plain, other = (RPQLinear(case.wide, case.out, num_subvectors=case.count, **made) for _ in range(3))
        name, gather = gather_and_multiply(other)
        layers: list[Layer] = [dense, gather, plain, ours]
        layers += [nn.Linear(case.wide, case.out, device=device, dtype=torch.bfloat16)] if half else []
        x = torch.randn(case.batch, case.wide, **made, requires_grad=case.backward)
        run = forward_backward if case.backward else forward
        a, b, c, d, *rest = milliseconds(run, layers, x, plain=2)
        counted, floor = machine.floor(ours.weight_rpq, case)
        if i == 0:
            print(HEAD.format(gather=name) + "\n|" + "---|" * 13)
        again = "-"
        if case.batch <= 16:
            again = f"{milliseconds(forward, [ours], x)[0]:.2f}"
        cells = (
            f"{case.wide} x {case.out}, {case.count}, B={case.batch}", "f + b" if case.backward else "f", f"{a:.2f}",
            f"{rest[0]:.2f}" if rest else "-", f"{b:.2f}", f"{c:.2f}", f"{d:.2f}", again, f"{a / d:.1f} x",
            f"{b / d:.1f} x", counted, f"{floor:.2f}", f"{floor / d:.0%}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


def embedding(device: torch.device) -> None:
    """Eight rows of a large table."""
    ids = torch.randint(50_272, (8,), device=device)
    dense, other, ours = (
        kind(50_272, 9216, device=device, **rest)
        for kind, rest in (
            (nn.Embedding, {}),
            (RPQEmbedding, {"num_subvectors": 72}),
            (RPQEmbedding, {"num_subvectors": 72}),
        )
    )
    held = other.weight_rpq

    def gather(ids: Tensor) -> Tensor:
        return F.embedding(ids, codebook.expand(held.codebooks, held.codes))

    a, b, c = milliseconds(forward, [dense, gather, ours], ids)
    print("\n| embedding | dense | gather + lookup | rpqfx | of dense | over gather |\n|---|---|---|---|---|---|")
    print(f"| 50272 x 9216, 72, 8 ids | {a:.3f} | {b:.1f} | {c:.3f} | {c / a:.1f} | {b / c:.0f} x |", flush=True)


def opt66b() -> None:
    """Seconds for a token of OPT-66B with random weights, by the example that shows it, where it can run."""
    example = Path(__file__).parents[1] / "02_opt66b.py"
    done = subprocess.run([sys.executable, str(example), "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:  # it has said what it lacks
        return
    found = json.loads(done.stdout.splitlines()[-1])
    gather, ours = found["gather"]["token_s"], found["float32"]
    print("\n| OPT-66B, one sequence, float32 | dense | gather + linear, scaled | rpqfx | over gather | resident |")
    print("|---|---|---|---|---|---|")
    print(
        f"| seconds for a token | does not fit | {gather:.1f} | {ours['token_s']:.3f} "
        f"| {gather / ours['token_s']:.0f} x | {ours['peak_bytes'] / 1e9:.2f} GB |",
        flush=True,
    )


def main() -> None:
    torch.set_num_threads(2)
    cpu = torch.device("cpu")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    table(CPU_CASES, cpu, torch.float32)
    embedding(cpu)
    opt66b()
    if torch.cuda.is_available():
        print(f"\n{torch.cuda.get_device_name()}")
        table(GPU_CASES, torch.device("cuda"), torch.bfloat16)


if __name__ == "__main__":
    main()
