"""What the cost model behind ``plan="auto"`` says, beside what both plans take.

    python examples/bench/plans.py              # two threads, float32 and bfloat16, medians of 7, in milliseconds

The last column is the time of the plan that is taken over that of the faster one: 1 where the model is right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rpqfx import CodebookSpec, ops
from rpqfx.ops.plan import cheaper, cheaper_conv
from rpqfx.timing.clock import in_turns

REPEATS = 7


@dataclass(frozen=True)
class Case:
    """A product ``[rows, D] x [N, D]``, or a convolution of ``rows`` samples where there is a kernel."""

    vectors: int
    dim: int
    d: int
    entries: int
    rows: int
    stages: int = 1
    sharing: str = "own"
    kernel: int = 0
    size: int = 0

    def __str__(self) -> str:
        conv = f", {self.kernel} x {self.kernel} on {self.size} x {self.size}" if self.kernel else ""
        stages = f", R={self.stages}" if self.stages > 1 else ""
        shared = ", one codebook" if self.sharing == "layer" else ""
        return f"{self.vectors} x {self.dim}, d={self.d}, K={self.entries}{stages}{shared}, B={self.rows}{conv}"


LINEAR = (
    *(Case(768, 768, d, 256, rows) for d in (8, 64) for rows in (1, 64, 512)),
    *(Case(3072, 768, d, 256, rows) for d in (4, 16, 64) for rows in (1, 64, 512)),
    *(Case(768, 3072, 8, 16, rows) for rows in (64, 2048)),
    *(Case(4096, 1024, d, entries, 512) for d in (8, 32) for entries in (16, 1024)),
    *(Case(1536, 576, d, 256, rows, sharing="layer") for d in (4, 8) for rows in (1, 64, 512)),
    *(Case(4096, 1024, 32, 256, rows, stages=3) for rows in (1, 16, 512)),
    Case(256, 1024, 64, 256, 512), Case(512, 512, 64, 256, 4096), Case(5120, 1280, 80, 256, 2048),
)  # fmt: skip
CONV = (
    Case(512, 256 * 9, 72, 64, 8, kernel=3, size=14), Case(512, 256 * 9, 144, 64, 8, kernel=3, size=14),
    Case(512, 256 * 9, 72, 256, 8, kernel=3, size=14), Case(512, 128 * 9, 72, 64, 4, kernel=3, size=28),
    Case(256, 64 * 9, 72, 16, 4, kernel=3, size=56), Case(1024, 1024 * 9, 72, 64, 8, kernel=3, size=7),
    Case(2048, 1024, 64, 256, 8, kernel=1, size=14), Case(2048, 1024, 16, 256, 8, kernel=1, size=14),
    Case(64, 64 * 9, 72, 16, 8, kernel=3, size=32),
)  # fmt: skip


def regret(case: Case, dtype: torch.dtype, repeats: int = REPEATS) -> tuple[float, float, str]:
    """Milliseconds of dequantizing and of looking up, and which is taken."""
    torch.manual_seed(0)
    books = 1 if case.sharing == "layer" else None
    spec = CodebookSpec(case.vectors, case.dim, case.d, case.entries, case.stages, books)
    held = ops.Tensors(
        (torch.randn(spec.codebooks_shape) / math.sqrt(case.dim)).to(dtype),
        torch.randint(case.entries, spec.codes_shape).to(spec.code_dtype),
    )
    cpu = torch.device("cpu")
    if case.kernel:
        channels = case.dim // case.kernel**2
        x = torch.randn(case.rows, channels, case.size, case.size).to(dtype)
        shape = (case.vectors, channels, case.kernel, case.kernel)
        geometry = {"stride": (1, 1), "padding": (case.kernel // 2,) * 2, "dilation": (1, 1), "groups": 1}
        taken = cheaper_conv(spec.codebooks_shape, spec.codes_shape, case.rows * case.size**2, cpu, dtype)

        def run(plan: ops.Plan) -> Tensor:
            return ops.conv(x, held, shape, plan=plan, **geometry)

    else:
        x = torch.randn(case.rows, case.dim).to(dtype)
        taken = cheaper(spec.codebooks_shape, spec.codes_shape, case.rows, cpu, dtype)

        def run(plan: ops.Plan) -> Tensor:
            return ops.linear(x, held, plan=plan)

    with torch.no_grad():
        dequantize, lookup = in_turns([lambda: run("dequantize"), lambda: run("lookup")], cpu, repeats)
    return dequantize, lookup, taken


def main() -> None:
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16):
        print(f"\n{dtype}\n\n| product | dequantize | lookup | auto takes | over the faster |\n|---|---|---|---|---|")
        worst = []
        for case in (*LINEAR, *CONV):
            dequantize, lookup, taken = regret(case, dtype)
            lost = (lookup if taken == "lookup" else dequantize) / min(dequantize, lookup)
            worst.append(lost)
            print(f"| {case} | {dequantize:.3f} | {lookup:.3f} | {taken} | {lost:.2f} |", flush=True)
        print(f"\ngeometric mean {math.exp(sum(map(math.log, worst)) / len(worst)):.2f}, worst {max(worst):.2f}")


if __name__ == "__main__":
    main()
