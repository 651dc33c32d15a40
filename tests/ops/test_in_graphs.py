"""Graphs that are compiled, or traced strictly by torch.export, call the kernels as operators of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

from rpqfx import CodebookSpec, ops
from rpqfx.codebook.tiles import to_tiles
from rpqfx.errors import InputError, RPQError
from rpqfx.nn import RPQConv1d, RPQEmbedding, RPQLinear, RPQWeight
from rpqfx.ops.cpu import build, kernels
from rpqfx.ops.cpu.prepare import load_kernels

usable = pytest.mark.skipif(not build.ready(), reason="needs compiled kernels")


class Whole(nn.Module):
    """Each way to use a weight: rows of a table, products by each plan, and of codes in tiles."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        tiled = CodebookSpec(256, 64, 8, 16, 3, 1, scale=True, tiled=True)
        self.embed = RPQEmbedding(100, 64, codebook_dim=8, codebook_bits=4)
        self.contract = RPQLinear(64, 256, codebook_dim=16, codebook_bits=6, stages=2, plan="lookup")
        self.expand = RPQLinear(256, 64, codebook_dim=16, codebook_bits=6, plan="dequantize")
        self.conv = RPQConv1d(64, 64, 3, padding=1, codebook_dim=2, codebook_bits=4)
        self.tiled = RPQWeight(tiled)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.expand(torch.tanh(self.contract(self.embed(ids))))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.tiled.linear(x) + self.tiled.lookup(ids).sum(-1, keepdim=True)


def libraries(model: nn.Module, strict: bool) -> tuple[set[str], Tensor]:
    """Returns whose operators an exported graph calls, and what it computes."""
    ids = torch.arange(12).view(3, 4)
    with torch.no_grad():
        program = export(model, (ids,), strict=strict)
        called = {str(node.target).partition(".")[0] for node in program.graph.nodes if node.op == "call_function"}
        return called & {"rpqfx", "rpqfx_cpu"}, program.module()(ids)


@pytest.mark.traced
@usable
def test_a_strictly_exported_graph_calls_kernels_and_another_torchs_operators_alone():
    model = Whole()
    with torch.no_grad():
        wanted = model(torch.arange(12).view(3, 4))
    for strict, expected in ((True, {"rpqfx_cpu"}), (False, set())):
        called, result = libraries(model, strict)
        assert called == expected
        assert torch.allclose(result, wanted, atol=1e-3)


@pytest.mark.traced
@usable
def test_what_kernels_do_not_take_stays_an_operator_that_python_runs():
    model = Whole().double()
    called, result = libraries(model, strict=True)
    assert called == {"rpqfx"}
    assert torch.allclose(result, model(torch.arange(12).view(3, 4)))


@usable
@pytest.mark.parametrize("at", range(3))
def test_a_tensor_without_values_is_refused_where_torch_would_run_the_fake(at: int):
    x, books = torch.randn(2, 16), torch.randn(2, 1, 16, 8)
    codes = torch.randint(16, (2, 2, 70)).to(torch.uint8)
    for operator, of_codes in ((kernels.contract, codes), (kernels.matmul, codes), (kernels.tiled, to_tiles(codes))):
        given = [x, books, of_codes]
        given[at] = given[at].to("meta")
        with pytest.raises(InputError, match="several devices"):
            operator(*given, *((70,) if operator is kernels.tiled else ()))
    with pytest.raises(InputError, match="several devices"):
        kernels.expand(books.to("meta"), codes)
    geometry = ((70, 16, 1), (1,), (0,), (1,), False, (0,), 1)
    with pytest.raises(InputError, match="several devices"):
        kernels.conv(x[..., None], books, codes, None, None, torch.ones(70, device="meta"), None, *geometry)


@usable
def test_the_operators_follow_torchs_rules():
    g = torch.Generator().manual_seed(0)
    x, books = torch.randn(2, 16, generator=g), torch.randn(2, 1, 16, 8, generator=g)
    codes = torch.randint(16, (2, 2, 70), generator=g).to(torch.uint8)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rpqfx_cpu.contract.default, (x, books, codes, None, None), test_utils=checks)
    torch.library.opcheck(torch.ops.rpqfx_cpu.matmul.default, (x, books, codes, None, None), test_utils=checks)
    torch.library.opcheck(
        torch.ops.rpqfx_cpu.expand.default, (books, codes, None, None, None, torch.rand(16)), test_utils=checks
    )
    ids = torch.tensor([[3], [69]])
    torch.library.opcheck(torch.ops.rpqfx_cpu.expand.default, (books, codes, None, None, ids, None), test_utils=checks)
    conv = (torch.randn(2, 4, 9), books, codes, None, torch.rand(16), torch.rand(70), torch.rand(70))
    conv += ((70, 4, 4), (2,), (1,), (1,), False, (0,), 1)
    torch.library.opcheck(torch.ops.rpqfx_cpu.conv.default, conv, test_utils=checks)
    tiled = (x, books, to_tiles(codes), 70, None, torch.rand(70), None, -1)
    torch.library.opcheck(torch.ops.rpqfx_cpu.tiled.default, tiled, test_utils=checks)


def test_the_kernels_library_is_found_or_its_absence_explained():
    if build.ready():
        assert load_kernels().suffix == ".so"
    else:
        with pytest.raises(RPQError, match="cannot be used: "):
            load_kernels()


@usable
def test_a_product_as_one_step_is_that_of_its_plan():
    g = torch.Generator().manual_seed(0)
    x, books, bias = (
        torch.randn(3, 5, 16, generator=g),
        torch.randn(2, 2, 16, 8, generator=g),
        torch.randn(70, generator=g),
    )
    codes = torch.randint(16, (2, 2, 70), generator=g).to(torch.uint8)
    wanted = ops.linear(x, ops.Tensors(books, codes), bias, plan="dequantize")
    assert torch.allclose(kernels.matmul(x, books, codes, None, bias), wanted, atol=1e-5)
