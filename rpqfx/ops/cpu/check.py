"""The one-time check of freshly compiled kernels against the plain functions."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx import codebook, maps
from rpqfx.errors import RPQError
from rpqfx.ops.cpu import kernels

# Rows of every path: a few, fewer than a table is wide, more, and several blocks with a rest.
ROWS = (1, 3, 7, 20, 70)
CODES = {torch.uint8: 40, torch.int16: 300, torch.uint16: 300}


def against_reference() -> None:
    """Runs every kernel on small numbers.

    Raises:
        RPQError: If a result is not what the plain functions give in float64, within what its dtype rounds.
    """
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):  # wherever the first use is
        _check_all(torch.Generator().manual_seed(0))


def _check_all(generator: torch.Generator) -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 4e-2)):
        for code_dtype, entries in CODES.items():
            for with_signs in (False, True):
                _check(dtype, tolerance, code_dtype, entries, with_signs, generator)


def _check(
    dtype: torch.dtype, tolerance: float, code_dtype: torch.dtype, entries: int, with_signs: bool, g: torch.Generator
) -> None:
    stages, books, share, d, vectors = 2, 3, 2, 20, 91
    sub_vectors = books * share
    codebooks = torch.randn(stages, books, entries, d, generator=g).to(dtype)
    codes = torch.randint(entries, (stages, sub_vectors, vectors), generator=g).to(code_dtype)
    minus = torch.randint(2, codes.shape, generator=g).bool()
    signs = codebook.pack_signs(minus) if with_signs else None
    scale = torch.randn(vectors, generator=g).to(dtype)
    ids = torch.randint(vectors, (5,), generator=g)
    weight = codebook.expand(codebooks.double(), codes, signs=signs)

    def same(name: str, ours: Tensor, exact: Tensor) -> None:
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        if not error <= tolerance:
            raise RPQError(f"the compiled {name} is wrong by {float(error):.1e} in {dtype}; plain operators are not")

    for rows in ROWS:
        x, y = (
            torch.randn(rows, d * sub_vectors, generator=g).to(dtype),
            torch.randn(rows, vectors, generator=g).to(dtype),
        )
        same("contract", kernels.contract(x, codebooks, codes, signs, scale), x.double() @ weight.t() + scale.double())
        same("contract_t", kernels.contract_t(y, codebooks, codes, signs), y.double() @ weight)
        grad_x, grad_books = kernels.contract_grads(x, y, codebooks, codes, signs)
        same("contract_t", grad_x, y.double() @ weight)
        exact = codebook.collect(y.double().t() @ x.double(), codes, books, entries, signs)
        same("accumulate", grad_books, exact)
    same("expand", kernels.expand(codebooks, codes, scale, signs), weight * scale.double()[:, None])
    same("lookup", kernels.lookup(ids, codebooks, codes, None, signs), weight[ids])
    grad = torch.randn(vectors, d * sub_vectors, generator=g).to(dtype)
    exact = codebook.collect(grad.double(), codes, books, entries, signs)
    same("collect", kernels.collect(grad, codes, books, entries, signs), exact)
    table = torch.randn(2, stages, sub_vectors, entries, 50, generator=g).to(dtype)
    same("gather_sum", kernels.gather_sum(table, codes), maps.gather_sum(table.double(), codes))
    maps_of = torch.randn(2, vectors, 50, generator=g).to(dtype)
    same("bin_sum", kernels.bin_sum(maps_of, codes, entries), maps.bin_sum(maps_of.double(), codes, entries))
