"""A call that is interrupted at any line of the library leaves the model, and all around it, as they were."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import KVPolicy, Policy, RoutePolicy
from tests.figures import record
from tests.helpers import generator
from tests.interrupts import Interrupt, around, chosen, contents, ends_of_with, traced

FEW = 3  # points of each call in a default run


class Block(nn.Module):
    """Attention, and two linear layers, around which there is what conversions have to do with."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.calls: list[int] = []
        self.mask = torch.ones(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x))) * self.mask


class Net(nn.Module):
    """A table that the head is tied to, a Parameter of its own, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 16)
        self.scale = nn.Parameter(torch.randn(16, 16))
        self.blocks = nn.ModuleList([Block()])
        self.batch_norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("places", torch.arange(6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) @ self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(self.batch_norm(x.transpose(1, 2)).transpose(1, 2))


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net()
    model.blocks[0].train()
    model.head.eval()
    model.batch_norm.bias.requires_grad_(False)
    model.blocks[0].up.bias.grad = torch.ones(32)
    model.blocks[0].up.register_forward_hook(_hook)
    return model


def _hook(module: nn.Module, args: Any, output: Any) -> None:
    """Does nothing."""


def batches(count: int = 2) -> list[Tensor]:
    g = generator(0)
    return [torch.randint(24, (2, 6), generator=g) for _ in range(count)]


POLICY = Policy(codebook_dim=4, codebook_bits=2, sharing="shape", scale=True, min_size=128)


def rewritten(seed: int = 0, **options: Any) -> nn.Module:
    return rpqfx.rpqify(net(seed), Policy(codebook_dim=4, codebook_bits=2, scale=True, min_size=128), **options)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        model = Net()
    model.blocks[0].norm.bias = nn.Parameter(torch.zeros(16))
    return rpqfx.rpqify(model, dataclasses.replace(POLICY, init="random"), inplace=True)


class Call(NamedTuple):
    """A call that is to change nothing if it is interrupted.

    Args:
        build: Makes its model.
        run: Makes the call.
    """

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, pathlib.Path], Any]


def _rpqify(build: Callable[[], nn.Module] = net, **options: Any) -> Call:
    given = {"policy": POLICY, **options}
    return Call(build, lambda model, folder: rpqfx.rpqify(model, **given))


def _checkpointed(model: nn.Module, folder: pathlib.Path) -> Any:
    return rpqfx.convert(model, POLICY, batches(), checkpoint=folder, inplace=True)


def _load(make: Callable[[], nn.Module]) -> Call:
    """Loads what its first run has saved."""

    def run(model: nn.Module, folder: pathlib.Path) -> Any:
        path = folder.parent / "small.pt"
        if not path.exists():
            rpqfx.save(make(), path)
        return rpqfx.load(path, net, build_device="cpu")

    return Call(net, run)


def _drawn(module: nn.Module) -> None:
    """Draws what a module holds itself, real tensors too."""
    with torch.no_grad():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.copy_(torch.rand(tensor.shape))


KV = KVPolicy(bits_per_value=2, window=2, codebook_dim=4, codebook_size=4)
CALLS = {
    "rpqify": _rpqify(),
    "in place": _rpqify(inplace=True),
    "fitted": _rpqify(policy=Policy(codebook_dim=4, codebook_bits=2, init="fit", min_size=128), inplace=True),
    "check_outputs": Call(rewritten, lambda model, _: rpqfx.check_outputs(model, batches(1))),
    "calibrated": Call(net, lambda model, _: rpqfx.convert(model, POLICY, batches())),
    "calibrated, in place": Call(net, lambda model, _: rpqfx.convert(model, POLICY, batches(), inplace=True)),
    "with a checkpoint": Call(net, _checkpointed),
    "as a graph": Call(rewritten, lambda model, _: rpqfx.graph.whole_graph(model)),
    "dequantize": Call(rewritten, lambda model, _: rpqfx.dequantize(model)),
    "dequantize, in place": Call(rewritten, lambda model, _: rpqfx.dequantize(model, inplace=True)),
    "quantize_kv": Call(net, lambda model, _: rpqfx.quantize_kv(model, KV, calibration=batches())),
    "quantize_kv, in place": Call(
        rewritten, lambda model, _: rpqfx.quantize_kv(model, KV, calibration=batches(), inplace=True)
    ),
    "route": Call(net, lambda model, _: rpqfx.route(model, RoutePolicy(0.5))),
    "route, in place": Call(rewritten, lambda model, _: rpqfx.route(model, RoutePolicy(0.5), inplace=True)),
    "route, fitted, in place": Call(
        rewritten,
        lambda model, _: rpqfx.route(
            model, RoutePolicy(0.5, None, light_init="fit"), calibration=batches(), inplace=True
        ),
    ),
    "materialize": Call(on_meta, lambda model, _: rpqfx.materialize(model, init=_drawn)),
    "load": _load(rewritten),
    "load, with a cache": _load(lambda: rpqfx.quantize_kv(rewritten(), KV, calibration=batches())),
}


def swept(call: Call, folder: pathlib.Path, choose: Callable[[list[tuple[str, int]]], list[int]]) -> int:
    """Interrupts a call at many lines, and fails where anything is not as it was; returns how often it did so."""
    torch.manual_seed(0)
    lines: list[tuple[str, int]] = []
    for name in ("first", "second"):  # of which the first fills caches, of this process and on disk
        model = call.build()  # not traced, as it is not below: the points are those of the call
        lines = traced(lambda model=model, name=name: call.run(model, folder / name))
    points, wrong, interrupted = choose(lines), [], 0
    model = None
    for count, at in enumerate(points):
        model = call.build() if model is None else model
        before, outside = contents(model), around()
        try:
            traced(lambda at=at, model=model, count=count: call.run(model, folder / f"run {count}"), at)
        except Interrupt as interrupt:
            interrupted += 1
            now, after = contents(model), around()
            if now != before or after != outside:
                differs = [key for key in after if after[key] != outside[key]] + ["model"] * (now != before)
                wrong.append((str(interrupt).rpartition("rpqfx/")[2], differs))
                model = None
            torch.set_grad_enabled(True)
        else:
            model = None  # the same call came to fewer lines
    assert not wrong, f"{len(wrong)} of {len(points)} points: {wrong}"
    assert interrupted > 0.9 * len(points)
    return interrupted


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_some_lines_undoes_all(name: str, tmp_path: pathlib.Path) -> None:
    swept(CALLS[name], tmp_path, lambda lines: chosen(lines, FEW))


@pytest.mark.parametrize("name", ["route", "load", "load, with a cache"])
def test_an_interrupt_at_the_end_of_any_with_undoes_all(name: str, tmp_path: pathlib.Path) -> None:
    """Its managers have not been left, and never will be."""
    assert swept(CALLS[name], tmp_path, ends_of_with) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_line_undoes_all(name: str, tmp_path: pathlib.Path) -> None:
    points = swept(CALLS[name], tmp_path, lambda lines: chosen(lines, None))
    record(
        f"reliability/interrupt-{name.replace(', ', '-').replace(' ', '-')}",
        "pytest -m slow tests/contracts/test_undone.py",
        attack=f"KeyboardInterrupt at the first and the last visit of each line: {name}",
        tried=points,
        outcome="model and torch's global state as before each time",
        seeds=[0],
    )
