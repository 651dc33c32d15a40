"""Independent products of a compiled graph become one call, and nothing else changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import rpqfx
from rpqfx.codebook.tiles import to_tiles
from rpqfx.ops.cpu import build
from rpqfx.ops.inductor import merge_products
from tests.helpers import generator, seeds

needs_kernels = pytest.mark.skipif(not build.ready(), reason="no compiled kernels on this machine")
PRODUCT = "rpqfx_cpu::tiled"
WIDE = 24


def held(seed: int, vectors: int, d: int = 4, stages: int = 2, wide: int = WIDE) -> tuple[Tensor, Tensor, int]:
    """Codebooks, tiles and the number of vectors."""
    g = generator(seed)
    codes = torch.randint(16, (stages, wide // d, vectors), generator=g).to(torch.uint8)
    return torch.randn(stages, 1, 16, d, generator=g), to_tiles(codes), vectors


class Drawn:
    """A graph of products and of cheap operations, each of what was there before; all are as wide as the input."""

    def __init__(self, seed: int, size: int, rows: int) -> None:
        choose = random.Random(seed)
        self.graph, self.x = fx.Graph(), torch.randn(rows, WIDE, generator=generator(seed))
        self.constants: dict[str, Tensor] = {}
        nodes = [self._with(self.graph.placeholder("x"), self.x)]
        for i in range(size):
            a, b = choose.choice(nodes), choose.choice(nodes)
            kind = choose.choice(["product", "product", "product", "add", "relu", "bias", "change"])
            if kind in ("product", "bias"):
                bias = torch.randn(WIDE) if kind == "bias" else None
                nodes.append(self._product(a, i, WIDE, bias, choose.choice([-1, 0])))
            elif kind == "change":  # of a copy, which those that follow may read
                copy = self._with(self.graph.call_function(torch.ops.aten.clone.default, (a,)), self.x)
                nodes.append(self._with(self.graph.call_function(torch.ops.aten.add_.Tensor, (copy, b)), self.x))
                nodes.append(copy)
            else:
                given = (a, b) if kind == "add" else (a,)
                operator = {"add": torch.ops.aten.add.Tensor, "relu": torch.ops.aten.relu.default}[kind]
                nodes.append(self._with(self.graph.call_function(operator, given), self.x))
        self.graph.output(tuple(nodes[1:]))

    def _with(self, node: fx.Node, value: Tensor) -> fx.Node:
        node.meta["val"] = value.to("meta")
        return node

    def _product(self, x: fx.Node, seed: int, vectors: int, bias: Tensor | None, most: int) -> fx.Node:
        codebooks, tiles, _ = held(seed, vectors)
        tensors = {f"books{seed}": codebooks, f"tiles{seed}": tiles} | ({} if bias is None else {f"bias{seed}": bias})
        self.constants |= tensors
        books, coded, *shift = (self.graph.get_attr(name) for name in tensors)
        given = (x, books, coded, vectors, None, None, shift[0] if shift else None, most)
        return self._with(self.graph.call_function(torch.ops.rpqfx_cpu.tiled.default, given), self.x)

    def run(self) -> tuple[Tensor, ...]:
        root = nn.Module()
        for name, tensor in self.constants.items():
            root.register_buffer(name, tensor)
        self.graph.lint()
        made: tuple[Tensor, ...] = fx.GraphModule(root, self.graph)(self.x)
        return made

    def count(self, name: str) -> int:
        return sum(str(node.target).startswith(f"rpqfx_cpu.{name}.") for node in self.graph.nodes)


@needs_kernels
@settings(max_examples=60)
@given(seed=seeds, size=st.integers(1, 14), rows=st.sampled_from([1, 2, 40]))
def test_results_are_the_same_to_the_last_bit(seed: int, size: int, rows: int) -> None:
    drawn = Drawn(seed, size, rows)
    exact, before = drawn.run(), drawn.count("tiled")
    fewer = merge_products(drawn.graph)
    for ours, expected in zip(drawn.run(), exact, strict=True):
        assert torch.equal(ours, expected)
    assert drawn.count("tiled") + drawn.count("tiled_many") == before - fewer
    assert merge_products(drawn.graph) == 0


def graph_of(*steps: tuple[str, int]) -> Drawn:
    """Products in order: of the input ("x"), of a product by its number, or of the input changed in place first."""
    drawn = Drawn(0, 0, 1)
    drawn.graph = fx.Graph()
    nodes = [drawn._with(drawn.graph.placeholder("x"), drawn.x)]
    for i, (kind, of) in enumerate(steps):
        if kind == "change":
            drawn.graph.call_function(torch.ops.aten.add_.Tensor, (nodes[0], nodes[of]))
        else:
            nodes.append(drawn._product(nodes[of], i, WIDE, None, -1))
    drawn.graph.output(tuple(nodes[1:]))
    return drawn


@needs_kernels
@pytest.mark.parametrize(
    ("steps", "fewer"),
    [
        ([("product", 0)] * 3, 2),
        ([("product", 0), ("product", 1), ("product", 2)], 0),
        ([("product", 0), ("product", 0), ("product", 1), ("product", 2)], 2),
        ([("product", 0), ("change", 1), ("product", 0)], 0),
        ([("product", 0)], 0),
    ],
    ids=["independent", "a chain", "two layers", "across a change", "alone"],
)
def test_products_that_do_not_need_each_other_are_one_call(steps: list[tuple[str, int]], fewer: int) -> None:
    drawn = graph_of(*steps)
    assert merge_products(drawn.graph) == fewer
    assert drawn.count("tiled") + drawn.count("tiled_many") == sum(kind == "product" for kind, _ in steps) - fewer


def test_a_graph_without_products_is_left_alone() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).graph
    before = str(graph)
    assert merge_products(graph) == 0 and str(graph) == before


class Heads(nn.Module):
    """Queries, keys and values of one input, as attention has them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x).relu(), self.k(x), self.v(x)], -1)


def in_tiles(site: rpqfx.Site) -> rpqfx.Quantize:
    """A policy: two stages of 16 entries for four numbers."""
    layout = site.layout("row")
    return rpqfx.Quantize(rpqfx.CodebookSpec(layout.num_vectors, layout.dim, 4, 16, 2, 1, tiled=True), "row")


@needs_kernels
def test_a_compiled_model_calls_a_kernel_once_for_queries_keys_and_values() -> None:
    """With Inductor's options from here."""
    torch.manual_seed(0)
    small, x = rpqfx.rpqify(Heads().eval(), in_tiles), torch.randn(1, 64)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(small, fullgraph=True, options=rpqfx.inductor_options())
        compiled(x)
        with torch.profiler.profile() as profile:
            found = compiled(x)
        exact = small(x)
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith(PRODUCT)}
    assert calls == {f"{PRODUCT}_many": 1}
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3 * float(exact.abs().max()))


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_one_call_is_each_product(rows: int) -> None:
    """For few rows and many, of one width or several."""
    given = [held(0, 100), held(1, 64, d=6, stages=3), held(2, 200, d=8, wide=96, stages=5), held(3, 33, wide=48)]
    inputs = [torch.randn(2, rows, tiles.shape[1] * books.shape[3]) for books, tiles, _ in given]
    biases = [None, torch.randn(64), torch.randn(200), None]
    for most in (-1, 0, 100):
        many = torch.ops.rpqfx_cpu.tiled_many(inputs, *(list(each) for each in zip(*given, strict=True)), biases, most)
        for x, (books, tiles, vectors), bias, ours in zip(inputs, given, biases, many, strict=True):
            assert torch.equal(ours, torch.ops.rpqfx_cpu.tiled(x, books, tiles, vectors, None, None, bias, most))
    empty = torch.ops.rpqfx_cpu.tiled_many([inputs[0][:0]], [given[0][0]], [given[0][1]], [100], [None], -1)
    assert empty[0].shape == (0, rows, 100)


@needs_kernels
def test_one_call_refuses_what_does_not_fit() -> None:
    books, tiles, vectors = held(0, 100)
    x = torch.randn(1, WIDE)
    many = torch.ops.rpqfx_cpu.tiled_many
    wrong: list[tuple[Any, ...]] = [
        ([x], [books], [tiles], [], [None]), ([x], [books], [tiles], [vectors], []),
        ([x[:, :-1]], [books], [tiles], [vectors], [None]), ([x], [books], [tiles], [vectors], [x]),
        ([x, x], [books] * 2, [tiles] * 2, [vectors, vectors + 64], [None] * 2),
        ([x], [books], [tiles[:1]], [vectors], [None]),
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"go with|inputs|bias is"):
            many(*arguments, -1)
    with pytest.raises(TypeError, match="uint8"):
        many([x], [books], [tiles.int()], [vectors], [None], -1)
