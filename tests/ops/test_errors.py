"""Rounding errors stay within the bounds that docs/design/errors.md states, for every dtype and implementation.

The bounds' coefficients are those of ``examples/bench/errors.py``, which prints them beside measured errors. Exact
results are float64's; those for float64 itself are rational numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from rpqfx.codebook import CodebookSpec
from rpqfx.ops import reference
from rpqfx.ops.cpu import build, kernels
from tests.helpers import is_minus, randn, seeds, specs, stored


def _bounds() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "bench" / "errors.py"
    spec = importlib.util.spec_from_file_location("bench_errors", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BOUNDS = _bounds()
ROWS = 5
PAIRS = [(reference, dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
PAIRS += [(kernels, dtype) for dtype in (torch.float32, torch.bfloat16) if build.ready()]


def each_of(pairs: list[tuple[Any, torch.dtype]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("backend", "dtype"), pairs, ids=lambda x: str(getattr(x, "__name__", x)).rpartition(".")[2]
    )


def numbers(tensor: Tensor, exactly: bool) -> np.ndarray:
    """float64, or rational numbers."""
    array = tensor.double().numpy()
    return np.vectorize(Fraction, otypes=[object])(array) if exactly else array


class Exact:
    """All operations from their definitions, on float64 or rational numbers."""

    def __init__(self, books: np.ndarray, codes: Tensor, scale: np.ndarray | None, signs: Tensor | None) -> None:
        self.codes, self.signs, self.scale, self.books = codes, signs, scale, books
        _, sub_vectors, vectors = codes.shape
        self.plain = np.zeros((vectors, sub_vectors * books.shape[3]), dtype=books.dtype)
        for r, m, n, part, entry in self.uses():
            self.plain[n, part] += self.sign(r, m, n) * books[entry]
        self.matrix = self.plain if scale is None else self.plain * scale[:, None]

    def uses(self) -> Any:
        """Every use of an entry: stage, sub-vector, vector, its place in the vector, and the entry."""
        stages, sub_vectors, vectors = self.codes.shape
        d, share = self.books.shape[3], sub_vectors // self.books.shape[1]
        for r in range(stages):
            for m in range(sub_vectors):
                for n in range(vectors):
                    yield r, m, n, slice(m * d, (m + 1) * d), (r, m // share, int(self.codes[r, m, n]))

    def sign(self, r: int, m: int, n: int) -> int:
        return -1 if self.signs is not None and is_minus(self.signs, r, m, n) else 1

    def collect(self, grad: np.ndarray) -> np.ndarray:
        total = np.zeros_like(self.books) + 0 * self.books
        for r, m, n, part, entry in self.uses():
            total[entry] += self.sign(r, m, n) * grad[n, part]
        return total

    def run(self, operation: str, x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> np.ndarray:
        results: dict[str, Callable[[], np.ndarray]] = {
            "contract": lambda: x @ self.matrix.T,
            "matmul": lambda: x @ self.matrix.T,
            "contract_t": lambda: y @ self.plain,
            "accumulate": lambda: self.collect(y.T @ x),
            "matmul_book": lambda: self.collect(y.T @ x),
            "collect": lambda: self.collect(x[:1] * y[:1].T),
            "expand": lambda: self.matrix,
            "lookup": lambda: self.matrix[ids],
        }
        return results[operation]()


def run(backend: Any, operation: str, held: tuple[Any, ...], x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    """What the library's own steps give."""
    books, codes, scale, signs = held
    counts = (codes, books.shape[1], books.shape[2], signs)
    if operation == "contract":
        found = backend.contract(x, books, codes, signs, None)
        return found if scale is None else found * scale
    results: dict[str, Callable[[], Tensor]] = {
        "matmul": lambda: x @ backend.expand(books, codes, scale, signs).t(),
        "contract_t": lambda: backend.contract_t(y, books, codes, signs=signs),
        "accumulate": lambda: backend.accumulate(x, y, *counts),
        "matmul_book": lambda: backend.collect(y.t() @ x, *counts),
        "collect": lambda: backend.collect(x[:1] * y[:1].t(), *counts),
        "expand": lambda: backend.expand(books, codes, scale, signs),
        "lookup": lambda: backend.lookup(ids, books, codes, scale, signs),
    }
    return results[operation]()


def excess(backend: Any, dtype: torch.dtype, spec: CodebookSpec, seed: int, operation: str, rows: int = ROWS) -> float:
    """The largest error, as a part of its bound."""
    held = stored(spec, seed, dtype)
    books, codes, scale, signs = held
    x, y = randn(seed + 1, rows, spec.dim, dtype=dtype), randn(seed + 2, rows, spec.num_vectors, dtype=dtype)
    ids = torch.arange(spec.num_vectors - 1, -1, -2)
    if operation == "collect":  # of numbers whose products are exact
        x, y = x.sign(), y
    exactly = dtype is torch.float64
    scale_numbers = None if scale is None else numbers(scale, exactly)
    exact = Exact(numbers(books, exactly), codes, scale_numbers, signs)
    wanted = exact.run(operation, numbers(x, exactly), numbers(y, exactly), ids.numpy())
    sums = Exact(numbers(books.abs(), False), codes, None if scale is None else scale.double().numpy(), None)
    absolute = sums.run(operation, numbers(x.abs(), False), numbers(y.abs(), False), ids.numpy())
    found = numbers(run(backend, operation, held, x, y, ids), exactly)
    sizes = BOUNDS.Sizes.of(spec, codes, rows, spec.scale and operation not in ("contract_t", "accumulate"))
    # Numbers below the smallest normal one are rounded to a multiple of the smallest at all.
    small = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * (2 + spec.stages * spec.num_subvectors)
    bound = BOUNDS.coefficient(operation, dtype, sizes) * absolute + small
    return float((np.abs(found - wanted).astype(np.float64) / bound).max(initial=0.0))


@each_of(PAIRS)
@pytest.mark.parametrize("operation", (*BOUNDS.OPERATIONS, "collect"))
@pytest.mark.parametrize("most", [None, pytest.param(100, marks=pytest.mark.slow)], ids=["some", "many"])
def test_errors_are_within_their_bounds(backend: Any, dtype: torch.dtype, operation: str, most: int | None) -> None:
    @settings(max_examples=most or (20 if dtype is torch.float64 else 50))  # rational numbers take long
    @given(specs(), seeds)
    def check(spec: CodebookSpec, seed: int) -> None:
        assert excess(backend, dtype, spec, seed, operation) <= 1

    check()


@each_of(PAIRS[1:])  # rational numbers, for float64, would take minutes
@pytest.mark.parametrize("operation", (*BOUNDS.OPERATIONS, "collect"))
@pytest.mark.parametrize("signs", [False, True], ids=["plain", "signs"])
def test_errors_of_longer_sums_are_too(backend: Any, dtype: torch.dtype, operation: str, signs: bool) -> None:
    """Lengths that fill registers and blocks, with a rest."""
    spec = CodebookSpec(91, 120, 20, entries=40, stages=2, num_codebooks=3, signs=signs)
    assert excess(backend, dtype, spec, 1, operation, rows=70) <= 1


def test_sums_in_a_half_precision_are_beyond_them() -> None:
    """The check can fail: many terms, added up in bfloat16 by an implementation that does not know better."""

    class Short:
        """``contract_t`` whose bins are bfloat16."""

        @staticmethod
        def contract_t(y: Tensor, books: Tensor, codes: Tensor, *, signs: Tensor | None) -> Tensor:
            weight = reference.expand(books, codes, None, signs)
            total = torch.zeros(len(y), weight.shape[1], dtype=y.dtype)
            for column, row in zip(y.t(), weight, strict=True):
                total += column[:, None] * row
            return total

    spec = CodebookSpec(64, 8, 4, entries=4)
    assert excess(reference, torch.bfloat16, spec, 0, "contract_t") <= 1
    assert excess(Short, torch.bfloat16, spec, 0, "contract_t") > 1
