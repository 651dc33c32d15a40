"""Errors against float64 beside their bounds, for each operation, dtype and implementation.

    python examples/bench/errors.py             # a layer of 1024 x 512, d = 64, K = 256, two stages, 128 rows

An error is divided by the sum of absolute values that its bound has (docs/design/errors.md), and given in units of the
dtype's roundoff ``u``: it is to be held against the bound's coefficient. tests/ops/test_errors.py checks these bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rpqfx.codebook import CodebookSpec
from rpqfx.codebook.steps import sum_dtype
from rpqfx.ops import reference
from rpqfx.ops.cpu import build, kernels

SPEC = CodebookSpec(1024, 512, 64, entries=256, stages=2)
ROWS = 128
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPERATIONS = ("contract", "contract_t", "accumulate", "expand", "lookup", "matmul", "matmul_book")


def unit(dtype: torch.dtype) -> float:
    """The roundoff ``u``: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


class Sizes(NamedTuple):
    """What a bound depends on (axes as in ``rpqfx.codebook``)."""

    rows: int
    dim: int
    d: int
    stages: int
    num_subvectors: int
    share: int
    entries: int
    vectors: int
    uses: int
    scale: bool = False

    @classmethod
    def of(cls, spec: CodebookSpec, codes: Tensor, rows: int, scale: bool = False) -> Sizes:
        """Of stored codes; ``uses`` is how many vectors use one entry at one position, at most."""
        uses = max(int(row.long().bincount().max()) for row in codes.flatten(0, 1))
        share = spec.num_subvectors // spec.num_codebooks
        return cls(
            rows, spec.dim, spec.codebook_dim, spec.stages, spec.num_subvectors, share, spec.entries, spec.num_vectors,
            uses, scale,
        )  # fmt: skip


def coefficient(operation: str, dtype: torch.dtype, s: Sizes) -> float:
    """What the sum of absolute values is multiplied by; a hundredth covers the terms of second order."""
    u, v, scaled = unit(dtype), unit(sum_dtype(dtype)), 1 if s.scale else 0
    sums = {
        "contract": (2 + scaled) * u + (s.d + s.stages * s.num_subvectors) * v,
        "contract_t": u + (s.uses + s.stages * min(s.entries, s.vectors)) * v,
        "accumulate": (s.uses + s.rows * s.share) * v,
        "expand": (s.stages - 1 + scaled) * u,
        "lookup": (s.stages - 1 + scaled) * u,
        "matmul": (s.stages + scaled) * u + s.dim * v,
        "matmul_book": u + (s.rows + s.uses * s.share) * v,
        "collect": s.uses * s.share * v,
    }
    return 1.01 * sums[operation]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    codes = torch.stack(
        [torch.randperm(SPEC.num_vectors) % SPEC.entries for _ in range(SPEC.stages * SPEC.num_subvectors)]
    )
    codes = codes.byte().view(SPEC.codes_shape)
    draws = [torch.randn(shape) for shape in (SPEC.codebooks_shape, (ROWS, SPEC.dim), (ROWS, SPEC.num_vectors))]
    sizes, ids = Sizes.of(SPEC, codes, ROWS), torch.arange(7)
    print("| operation | dtype | bound, in u | largest, plain | compiled | root mean square, plain | compiled |")
    print("|---|---|---|---|---|---|---|")
    for operation in OPERATIONS:
        for dtype in DTYPES:
            books, x, y = (t.to(dtype) for t in draws)
            wide = [t.double() for t in (books, x, y)]
            exact, absolute = (run(reference, operation, *t, codes, ids) for t in (wide, [t.abs() for t in wide]))
            most, typical = [], []
            for backend in (reference, kernels):
                if backend is kernels and not (kernels.take(dtype, codes.dtype) and build.ready()):
                    most, typical = [*most, "-"], [*typical, "-"]
                    continue
                found = run(backend, operation, books, x, y, codes, ids)
                error = ((found.double() - exact).abs() / absolute.clamp_min(1e-300)) / unit(dtype)
                most.append(f"{float(error.max()):.2g}")
                typical.append(f"{float(error.square().mean().sqrt()):.2g}")
            bound = coefficient(operation, dtype, sizes) / unit(dtype)
            kind = str(dtype).removeprefix("torch.")
            print(f"| {operation} | {kind} | {bound:.3g} | {' | '.join(most)} | {' | '.join(typical)} |", flush=True)


def run(backend: object, operation: str, books: Tensor, x: Tensor, y: Tensor, codes: Tensor, ids: Tensor) -> Tensor:
    """One operation without signs and scale."""
    if operation == "contract":
        return backend.contract(x, books, codes, None, None)
    if operation == "contract_t":
        return backend.contract_t(y, books, codes, signs=None)
    if operation == "accumulate":
        return backend.accumulate(x, y, codes, books.shape[1], books.shape[2], None)
    if operation == "lookup":
        return backend.lookup(ids, books, codes, None, None)
    weight = backend.expand(books, codes, None, None)
    if operation == "matmul_book":
        return backend.collect(y.t() @ x, codes, books.shape[1], books.shape[2], None)
    return x @ weight.t() if operation == "matmul" else weight


if __name__ == "__main__":
    main()
