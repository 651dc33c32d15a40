"""The CUDA kernels: what they compute (in Triton's interpreter here), that they compile, and what is refused."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rpqfx import codebook
from rpqfx.codebook import CodebookSpec
from rpqfx.codebook.tiles import tiles_shape, to_tiles
from rpqfx.errors import InputError
from rpqfx.ops.cuda import kernels as cuda
from tests import forks
from tests.helpers import randn, stored

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
try:
    OLD = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
except PackageNotFoundError:
    OLD = True
NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int16: "i16",
    torch.uint16: "u16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@needs_triton
@pytest.mark.skipif(OLD, reason="its interpreter does not go with numpy 2.4")
@pytest.mark.parametrize("device", ["interpreter", pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("profile", ["default", pytest.param("thorough", marks=pytest.mark.slow)])
def test_what_the_kernels_compute(profile: str, device: str) -> None:
    """All of ``triton_claims.py``, in a fresh process, where Triton can still become an interpreter."""
    chosen = () if profile == "default" else ("--hypothesis-profile", profile)
    assert_claims_hold("triton_claims.py", device, *chosen)


def assert_claims_hold(name: str, device: str, *arguments: str) -> None:
    """Runs the tests of a file next to this one."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(device == "interpreter"))}
    path = Path(__file__).with_name(name)
    done = forks.run(forks.module("pytest"), "-q", str(path), *arguments, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout


# ---------------------------------------------------------------------------------------- what a compiler says


class Compiled:
    """Stands in for a kernel: a launch compiles it for a GPU that need not be there.

    The interpreter takes more than the compiler does. Like Triton at a launch, None and 1 become constants.
    """

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability, self.binaries = kernel, capability, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, enable_fp_fusion: bool, num_warps: int = 4, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature = {}
        for param, value in zip(self.kernel.params, [*args, *constants.values()], strict=True):
            if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[param.name], constants[param.name] = "constexpr", value
            else:
                signature[param.name] = f"*{NAMES[value.dtype]}" if isinstance(value, Tensor) else "i32"
        source = ASTSource(self.kernel, signature, constants)
        target = GPUTarget("cuda", self.capability, 32)
        options = {"enable_fp_fusion": enable_fp_fusion, "num_warps": num_warps}
        compiled = triton.compile(source, target, options=options)
        self.binaries.append(compiled.asm["cubin"])


def for_gpus(*cases: tuple[Any, ...]) -> list[Any]:
    """Each case for two kinds of GPU, their capability last; by default for one of them, in turn."""
    return [
        pytest.param(*case, capability, marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, case in enumerate(cases)
        for j, capability in enumerate((80, 90))
    ]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has taken the compiler's place")
@pytest.mark.parametrize(
    ("spec", "rows", "dtype", "capability"),
    for_gpus(
        (CodebookSpec(9216, 9216, 128), 1, torch.bfloat16),
        (CodebookSpec(100, 48, 6, entries=40_000, stages=2, num_codebooks=1, scale=True, signs=True), 3, torch.float32),
        (CodebookSpec(1, 1, 1, entries=2, scale=True, signs=True), 1, torch.float16),
    ),
)
def test_every_kernel_compiles_for_a_gpu(
    spec: CodebookSpec, rows: int, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The launches that the host side makes become binaries."""
    from rpqfx.ops.cuda import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = {
        name: Compiled(getattr(triton_kernels, name), capability)
        for name in ("table", "gather_sum", "expand", "bin_sum")
    }
    for name, kernel in kernels.items():
        monkeypatch.setattr(triton_kernels, name, kernel)
    codebooks, codes, scale, signs = (
        None if shape is None else torch.zeros(shape, dtype=kind)
        for shape, kind in [
            (spec.codebooks_shape, dtype),
            (spec.codes_shape, spec.code_dtype),
            ((spec.num_vectors,) if spec.scale else None, dtype),
            (spec.signs_shape if spec.signs else None, torch.uint8),
        ]
    )
    cuda.expand(codebooks, codes, scale, signs)
    cuda.contract(torch.zeros(rows, spec.dim, dtype=dtype), codebooks, codes, signs)
    cuda.contract_t(torch.zeros(rows, spec.num_vectors, dtype=dtype), codebooks, codes, signs)
    for name, kernel in kernels.items():
        assert [binary[:4] for binary in kernel.binaries] == [b"\x7fELF"], name


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has taken the compiler's place")
@pytest.mark.parametrize(
    ("shape", "rows", "dtype", "capability"),
    [
        *for_gpus(((6, 1, 16, 8, 300, 200), 5, torch.bfloat16)),
        *[pytest.param((2, 4, 10, 3, 64, 64), 300, torch.float32, each, marks=pytest.mark.slow) for each in (80, 90)],
    ],
)
def test_every_kernel_of_tiles_compiles_for_a_gpu(
    shape: tuple[int, ...], rows: int, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    from rpqfx.ops.cuda import triton_tiles

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = ("table", "pick_sum", "add_up", "expand")
    kernels = {name: Compiled(getattr(triton_tiles, name), capability) for name in names}
    for name, kernel in kernels.items():
        monkeypatch.setattr(triton_tiles, name, kernel)
    stages, books, entries, d, sub_vectors, vectors = shape
    codebooks = torch.zeros(stages, books, entries, d, dtype=dtype)
    tiles = torch.zeros(tiles_shape(stages, sub_vectors, vectors), dtype=torch.uint8)
    dims, scale = torch.ones(sub_vectors * d, dtype=dtype), torch.ones(vectors, dtype=dtype)
    x = torch.zeros(rows, sub_vectors * d, dtype=dtype)
    for plan in ("lookup", "dequantize"):
        cuda.tiled(x, codebooks, tiles, vectors, scale, plan, dims, scale)
    for name, kernel in kernels.items():
        assert {binary[:4] for binary in kernel.binaries} == {b"\x7fELF"}, name


# ------------------------------------------------------------------------------------------- what is refused


def held(**changes: Any) -> dict[str, Any]:
    spec = CodebookSpec(9, 6, 2, entries=4, stages=2, signs=True)
    codebooks, codes, _, signs = stored(spec, 0, torch.float32)
    return {"codebooks": codebooks, "codes": codes, "signs": signs, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebooks": torch.zeros(2, 3, 4, 2, dtype=torch.float64)}, "x is torch.float32 and the codebooks are"),
        ({"codebooks": torch.zeros(1, 3, 4, 2)}, "do not go with codebooks"),
        ({"codebooks": torch.zeros(2, 2, 4, 2)}, "do not go with codebooks"),
        ({"codebooks": torch.zeros(2, 3, 4, 3)}, "x is 6 wide, the codes and codebooks say 9"),
        ({"codes": torch.zeros(2, 3, 9)}, "codes are integers"),
        ({"signs": torch.zeros(2, 3, 1, dtype=torch.uint8)}, "signs has the shape"),
        ({"signs": torch.zeros(2, 3, 2)}, "signs are uint8"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    """A kernel reads where it is told to, so shapes are checked before."""
    with pytest.raises(InputError, match=message):
        cuda.contract(torch.zeros(2, 6), **held(**changes))


def test_other_dtypes_and_widths_are_refused_everywhere() -> None:
    """float64 has no kernels, and a gradient is as wide as there are vectors."""
    given = held()
    x, y = torch.zeros(2, 6), torch.zeros(2, 9)
    numbers = given["codes"], 3, 4, given["signs"]
    with pytest.raises(InputError, match="the kernels take float32"):
        cuda.expand(given["codebooks"].double(), given["codes"], None, given["signs"])
    with pytest.raises(InputError, match="scale has the shape"):
        cuda.expand(given["codebooks"], given["codes"], torch.ones(8), given["signs"])
    with pytest.raises(InputError, match="the kernels take float32"):
        cuda.contract_t(y.double(), **given)
    with pytest.raises(InputError, match="y is 8 wide"):
        cuda.contract_grads(x, y[:, :8], **given)
    with pytest.raises(InputError, match="y is 8 wide"):
        cuda.accumulate(x, y[:, :8], *numbers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebooks": torch.zeros(2, 1, 16, 3).double()}, "x is torch.float32 and the codebooks are"),
        ({"codebooks": torch.zeros(3, 1, 16, 3)}, "tiles has the shape"),
        ({"codebooks": torch.zeros(2, 1, 17, 3)}, "do not go with codebooks"),
        ({"codebooks": torch.zeros(2, 3, 16, 3)}, "do not go with codebooks"),
        ({"codebooks": torch.zeros(2, 1, 16, 2)}, "x is 12 wide"),
        ({"tiles": torch.zeros(2, 4, 64)}, "do not go with codebooks"),
        ({"vectors": 129}, "tiles has the shape"),
        ({"dims": torch.ones(4)}, "dims has the shape"),
        ({"scale": torch.ones(4)}, "scale has the shape"),
        ({"bias": torch.ones(4)}, "bias has the shape"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {
        "codebooks": torch.zeros(2, 1, 16, 3), "tiles": torch.zeros(2, 4, 64, dtype=torch.uint8), "vectors": 100,
        **changes,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        cuda.tiled(torch.zeros(2, 12), **given)


def test_usable_asks_for_a_gpu_that_triton_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU tensor is not for the kernels, nor is an old GPU, nor any without Triton."""

    class OnGPU:
        dtype, device, is_cuda = torch.float32, torch.device("cuda", 0), True

    x: Any = OnGPU()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cuda, "_installed", lambda: True)
    monkeypatch.setattr(cuda, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "_right", lambda device: False)
    assert not cuda.usable(x)
    monkeypatch.setattr(cuda, "_right", lambda device: True)
    assert cuda.usable(x)
    assert not cuda.usable(torch.zeros(1))
    monkeypatch.setattr(cuda, "_capability", lambda device: (7, 5))
    assert not cuda.usable(x)
    monkeypatch.setattr(cuda, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "_installed", lambda: False)
    assert not cuda.usable(x)


# ---------------------------------------------------------------------------------------------- sizes of layers


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 16, 64, 130])
@pytest.mark.parametrize(("d", "stages"), [(8, 6), (6, 5), (4, 4), (2, 3), (16, 6)])
def test_sizes_of_layers_with_tiles(d: int, stages: int, rows: int, dtype: torch.dtype) -> None:
    """At the sizes of a model's layers every way agrees with float64, and twice the same call gives the same bits."""
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    spec = CodebookSpec(3000, 192 * 16, d, entries=16, stages=stages, num_codebooks=1)
    codebooks, codes = (t.cuda() for t in stored(spec, 0, dtype)[:2])
    matrix, tiles = codebook.expand(codebooks.double(), codes), to_tiles(codes.byte())
    x = randn(1, rows, spec.dim, dtype=dtype).cuda()
    exact = x.double() @ matrix.t()
    for plan in ("auto", "lookup", "dequantize"):
        ours = cuda.tiled(x, codebooks, tiles, spec.num_vectors, None, plan)
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))
        assert cuda.tiled(x, codebooks, tiles, spec.num_vectors, None, plan).equal(ours)


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 130])
@pytest.mark.parametrize(
    "spec",
    [
        CodebookSpec(9216, 9216, 128),
        CodebookSpec(9216, 9216, 128, stages=2, num_codebooks=1, signs=True),
        CodebookSpec(9216, 1024, 128, entries=65_536, signs=True),
        CodebookSpec(9216, 9216, 4),
    ],
    ids=["own", "shared", "65536", "short"],
)
def test_sizes_of_layers(spec: CodebookSpec, rows: int, dtype: torch.dtype) -> None:
    """At the sizes of a large layer all products agree with float64, and twice the same call gives the same bits."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    codebooks, codes, _, signs = (None if t is None else t.cuda() for t in stored(spec, 0, dtype))
    x, y = randn(1, rows, spec.dim, dtype=dtype).cuda(), randn(2, rows, spec.num_vectors, dtype=dtype).cuda()
    matrix = codebook.expand(codebooks.double(), codes, None, signs)
    folded = codebook.collect(y.double().t() @ x.double(), codes, spec.num_codebooks, spec.entries, signs)
    for run, exact in [
        (lambda: cuda.expand(codebooks, codes, None, signs), matrix),
        (lambda: cuda.contract(x, codebooks, codes, signs), x.double() @ matrix.t()),
        (lambda: cuda.contract_t(y, codebooks, codes, signs), y.double() @ matrix),
        (lambda: cuda.contract_grads(x, y, codebooks, codes, signs)[0], y.double() @ matrix),
        (lambda: cuda.contract_grads(x, y, codebooks, codes, signs)[1], folded),
        (lambda: cuda.accumulate(x, y, codes, spec.num_codebooks, spec.entries, signs), folded),
    ]:
        ours = run()
        assert ours.dtype == (torch.float32 if exact is folded else dtype)  # gradients come as they were summed
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))
        assert run().equal(ours)
