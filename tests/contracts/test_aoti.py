"""AOTInductor makes packages of rewritten models that run without this library."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim, export

import rpqfx
from rpqfx import Policy, Rule
from rpqfx.ops.cpu.prepare import load_kernels
from rpqfx.reporting.report import dense_bytes
from tests.deployed import assert_close
from tests.fresh import run_without_rpqfx
from tests.ops.test_in_graphs import Whole
from tests.ops.test_inductor import Heads, in_tiles

# To build, not to run.
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0", "cpp_cache_precompile_headers": False}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(2048, 512), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 256))


@pytest.mark.slow
def test_a_package_runs_where_this_library_is_not(tmp_path: Path):
    """For any batch; it holds codebooks and codes, not the weights."""
    policy = Policy.from_scratch(codebook_dim=128, codebook_bits=4, rules=(Rule("3", codebook_dim=16, signs=True),))
    model = rpqfx.rpqify(build(), policy)
    with torch.no_grad():
        program = export(model, (torch.zeros(3, dtype=torch.int64),), dynamic_shapes=({0: Dim("batch", min=1)},))
    where = str(tmp_path / "model.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=where, inductor_configs=QUICK)
    calls = [(torch.arange(7 * batch, 8 * batch),) for batch in (1, 3, 17)]
    [(names, outputs)] = run_without_rpqfx("aoti", {package: calls}, tmp_path)
    assert set(names) >= {key for key in model.state_dict() if "rpq" in key}
    with torch.no_grad():
        assert_close(outputs, [model(*call) for call in calls])
    assert Path(package).stat().st_size < dense_bytes(build())


@pytest.mark.slow
def test_a_package_of_a_strict_program_calls_the_kernels_and_needs_their_library_alone(tmp_path: Path):
    model = Whole().eval()
    with torch.no_grad():
        program = export(model, (torch.zeros(3, 4, dtype=torch.int64),), strict=True)
    called = {str(node.target) for node in program.graph.nodes}
    assert called >= {f"rpqfx_cpu.{name}.default" for name in ("contract", "conv", "expand", "matmul", "tiled")}
    where = str(tmp_path / "model.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=where, inductor_configs=QUICK)
    calls = [(torch.arange(12).view(3, 4) * step,) for step in (0, 1, 8)]
    [(_, outputs)] = run_without_rpqfx("aoti", {package: calls}, tmp_path, load_kernels())
    with torch.no_grad():
        assert_close(outputs, [model(*call) for call in calls])


@pytest.mark.slow
def test_a_package_calls_products_that_do_not_need_each_other_at_once(tmp_path: Path):
    """And needs the kernels' library alone for that, too."""
    small = rpqfx.rpqify(Heads().eval(), in_tiles)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = export(small, (x,), strict=True)
    where, options = str(tmp_path / "model.pt2"), {**QUICK, **rpqfx.inductor_options()}
    package = torch._inductor.aoti_compile_and_package(program, package_path=where, inductor_configs=options)
    with zipfile.ZipFile(package) as held:
        text = "".join(held.read(name).decode() for name in held.namelist() if name.endswith(".wrapper.json"))
    assert text.count("rpqfx_cpu::tiled_many") == 1 and 'rpqfx_cpu::tiled"' not in text
    [(_, outputs)] = run_without_rpqfx("aoti", {package: [(x,), (2 * x,)]}, tmp_path, load_kernels())
    with torch.no_grad():
        assert_close(outputs, [small(x), small(2 * x)])
