"""The residual search of GPUs: what it computes (in Triton's interpreter here), that it compiles, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rpqfx.errors import InputError
from rpqfx.ops import search
from rpqfx.ops.cuda import kernels as cuda
from tests.ops.cuda.test_triton_kernels import (
    INTERPRETED,
    OLD,
    Compiled,
    assert_claims_hold,
    for_gpus,
    needs_gpu,
    needs_triton,
)


@needs_triton
@pytest.mark.skipif(OLD, reason="its interpreter does not go with numpy 2.4")
@pytest.mark.parametrize("device", ["interpreter", pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])])
def test_what_the_kernel_computes(device: str) -> None:
    """All of ``triton_search_claims.py``, in a fresh process, where Triton can still become an interpreter."""
    assert_claims_hold("triton_search_claims.py", device)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has taken the compiler's place")
@pytest.mark.parametrize(
    ("rows", "stages", "entries", "d", "dtype", "capability"),
    for_gpus(
        (8192, 8, 2048, 32, torch.bfloat16),
        (5, 2, 256, 8, torch.float32),
        (1, 1, 2, 1, torch.float32),
    )
    # Takes longest to compile.
    + [pytest.param(300, 3, 65_536, 128, torch.float16, each, marks=pytest.mark.slow) for each in (80, 90)],
)
def test_it_compiles_for_a_gpu(
    rows: int, stages: int, entries: int, d: int, dtype: torch.dtype, capability: int,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    from rpqfx.ops.cuda import triton_search

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = Compiled(triton_search.residual_search, capability)
    monkeypatch.setattr(triton_search, "residual_search", kernel)
    for cosine in (False, True):
        cuda.residual_search(torch.zeros(rows, d, dtype=dtype), torch.zeros(stages, entries, d, dtype=dtype), cosine)
    assert [binary[:4] for binary in kernel.binaries] == [b"\x7fELF"] * 2


@pytest.mark.parametrize(
    ("points", "books", "message"),
    [
        (torch.zeros(3, 4).double(), torch.zeros(2, 5, 4).double(), "the kernels take float32"),
        (
            torch.zeros(3, 4),
            torch.zeros(2, 5, 4).half(),
            "points are torch.float32 on cpu and the codebooks are torch.float16 on cpu",
        ),
        (torch.zeros(3, 4), torch.zeros(2, 5, 3), "do not go with"),
        (torch.zeros(3, 4), torch.zeros(5, 4), "do not go with"),
        (torch.zeros(3, 4), torch.zeros(2, 0, 4), "do not go with"),
        (torch.zeros(3, 129), torch.zeros(2, 5, 129), "1 to 128 dimensions"),
        (torch.zeros(3, 0), torch.zeros(2, 5, 0), "1 to 128 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(points: torch.Tensor, books: torch.Tensor, message: str) -> None:
    """A kernel reads where it is told to, so shapes are checked before."""
    with pytest.raises(InputError, match=message):
        cuda.residual_search(points, books)


def test_greedy_searches_of_what_the_kernel_takes_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no others: a beam, other dtypes, long sub-vectors and traced tensors run elsewhere."""
    called: list[Any] = []
    run = search._greedy

    def kernel(points: torch.Tensor, books: torch.Tensor, cosine: bool = False) -> Any:
        called.append((points.dtype, cosine))
        monkeypatch.setattr(cuda, "usable", lambda x: False)
        try:
            return run(points, books, cosine)
        finally:
            monkeypatch.setattr(cuda, "usable", lambda x: x.dtype in cuda.DTYPES)

    monkeypatch.setattr(cuda, "residual_search", kernel)
    monkeypatch.setattr(cuda, "usable", lambda x: x.dtype in cuda.DTYPES)
    points, books = torch.randn(5, 4), torch.randn(2, 6, 4)
    for beam, cosine, dtype, expected in [
        (1, False, torch.float32, True),
        (4, True, torch.float32, True),
        (1, False, torch.bfloat16, True),
        (4, False, torch.float32, False),
        (1, False, torch.float64, False),
    ]:
        called.clear()
        search.residual_search(points.to(dtype), books.to(dtype), beam=beam, cosine=cosine)
        assert called == ([(dtype, cosine)] if expected else [])
    called.clear()
    search.residual_search(torch.randn(5, 200), torch.randn(2, 6, 200))
    with torch._subclasses.FakeTensorMode() as mode:
        assert search.residual_search(mode.from_tensor(points), mode.from_tensor(books))[0].shape == (5, 2)
    assert not called


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stages", "entries", "d"), [(8, 2048, 32), (2, 256, 8), (3, 4096, 128)])
def test_sizes_of_caches(stages: int, entries: int, d: int, dtype: torch.dtype) -> None:
    """What is left is as small as stage by stage in float64, and twice the same call gives the same bits."""
    points = torch.randn(8192, d, device="cuda").to(dtype)
    books = (torch.randn(stages, entries, d, device="cuda") * 0.7).to(dtype)
    codes, distances = cuda.residual_search(points, books)
    assert cuda.residual_search(points, books)[0].equal(codes)
    exact = search._greedy(points.double(), books.double(), False)
    assert (codes != exact[0]).double().mean() < 1e-3
    torch.testing.assert_close(distances.double().mean(), exact[1].mean(), rtol=1e-2, atol=0)
