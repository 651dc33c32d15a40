"""The check of a backend's kernels against the plain functions, before their first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rpqfx import codebook, maps
from rpqfx.errors import RPQError

# Rows of every path: a few, fewer than a table is wide, more, and several blocks with a rest.
ROWS = (1, 3, 7, 20, 70)
CODES = {torch.uint8: 40, torch.int16: 300, torch.uint16: 300}


def against_reference(backend: Any, device: torch.device) -> None:
    """Runs every kernel on small numbers.

    Args:
        backend: A module of kernels (see ``rpqfx.ops.backend``).
        device: Where they run.

    Raises:
        RPQError: If a result is not what the plain functions give in float64, within what its dtype rounds.
    """
    with torch.no_grad(), torch.device("cpu"), torch.autocast(device.type, enabled=False):  # wherever the first use is
        generator = torch.Generator().manual_seed(0)
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 4e-2)):
            for code_dtype, entries in CODES.items():
                for with_signs in (False, True):
                    _check(backend, device, dtype, tolerance, code_dtype, entries, with_signs, generator)
        if hasattr(backend, "nearest"):
            _check_nearest(backend.nearest, device, generator)


def _check(
    backend: Any, device: torch.device, dtype: torch.dtype, tolerance: float, code_dtype: torch.dtype, entries: int,
    with_signs: bool, g: torch.Generator,
) -> None:  # fmt: skip
    stages, books, share, d, vectors = 2, 3, 2, 20, 91
    sub_vectors = books * share
    codebooks = torch.randn(stages, books, entries, d, generator=g).to(dtype)
    codes = torch.randint(entries, (stages, sub_vectors, vectors), generator=g).to(code_dtype)
    minus = torch.randint(2, codes.shape, generator=g).bool()
    signs = codebook.pack_signs(minus) if with_signs else None
    scale = torch.randn(vectors, generator=g).to(dtype)
    ids = torch.randint(vectors, (5,), generator=g)
    weight = codebook.expand(codebooks.double(), codes, signs=signs)

    def run(name: str, *args: Any) -> Any:
        return getattr(backend, name)(*[arg.to(device) if isinstance(arg, Tensor) else arg for arg in args])

    def same(name: str, ours: Tensor, exact: Tensor) -> None:
        error = (ours.cpu().double() - exact).abs().max() / exact.abs().max()
        if not error <= tolerance:
            raise RPQError(f"the kernel of {name} is wrong by {float(error):.1e} in {dtype}; plain operators are not")

    for rows in ROWS:
        x, y = (
            torch.randn(rows, d * sub_vectors, generator=g).to(dtype),
            torch.randn(rows, vectors, generator=g).to(dtype),
        )
        same("contract", run("contract", x, codebooks, codes, signs, scale), x.double() @ weight.t() + scale.double())
        same("contract_t", run("contract_t", y, codebooks, codes, signs), y.double() @ weight)
        grad_x, grad_books = run("contract_grads", x, y, codebooks, codes, signs)
        same("contract_t", grad_x, y.double() @ weight)
        exact = codebook.collect(y.double().t() @ x.double(), codes, books, entries, signs)
        same("accumulate", grad_books, exact)
    same("expand", run("expand", codebooks, codes, scale, signs), weight * scale.double()[:, None])
    same("lookup", run("lookup", ids, codebooks, codes, None, signs), weight[ids])
    grad = torch.randn(vectors, d * sub_vectors, generator=g).to(dtype)
    exact = codebook.collect(grad.double(), codes, books, entries, signs)
    same("collect", run("collect", grad, codes, books, entries, signs), exact)
    table = torch.randn(2, stages, sub_vectors, entries, 50, generator=g).to(dtype)
    same("gather_sum", run("gather_sum", table, codes), maps.gather_sum(table.double(), codes))
    maps_of = torch.randn(2, vectors, 50, generator=g).to(dtype)
    same("bin_sum", run("bin_sum", maps_of, codes, entries), maps.bin_sum(maps_of.double(), codes, entries))


def _check_nearest(
    nearest: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], device: torch.device, g: torch.Generator
) -> None:
    for rows, entries, d in ((1, 1, 1), (70, 300, 1), (7, 40, 3), (20, 700, 20)):
        points, centres = torch.randn(rows, d, generator=g) + 5, torch.randn(entries, d, generator=g) + 5
        exact = (points[:, None].double() - centres.double()).square().sum(-1)
        codes, distances = (x.cpu() for x in nearest(points.to(device), centres.to(device)))
        found = exact.gather(1, codes.long().clamp(0, entries - 1)[:, None])[:, 0]
        error = (torch.stack([found, distances.double()]) - exact.min(1).values).abs().max() / exact.max()
        if not error <= 1e-4:
            raise RPQError(f"the kernel of nearest is wrong by {float(error):.1e}; plain operators are not")
