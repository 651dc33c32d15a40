"""Training takes less memory at its peak than the dense model does, and not only for what is stored."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpqfx
from rpqfx import codebook
from rpqfx.nn import RPQWeight
from rpqfx.ops import products, reference
from rpqfx.ops.conv_contract import ConvContract
from rpqfx.ops.cpu import build, kernels
from tests.helpers import randn
from tests.models import Block

WIDTH, TOKENS = 256, 64
POLICY = rpqfx.Policy.from_scratch(codebook_dim=64, codebook_bits=4)
# Of the dense model's peak. Measured: 0.14 through tables and bins, 0.19 through weights that are expanded and dropped,
# 0.40 where they are kept.
SHARE = 0.28
backends = [reference, *([kernels] if build.ready() else [])]


def peak(run: Callable[[], Any]) -> int:
    """The largest sum of bytes that torch's CPU allocator handed out while a function ran, as its profiler says."""
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profile:
        run()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    most = total = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def training_peak(make: Callable[[], nn.Module], dtype: torch.dtype) -> int:
    """Of building a model and two steps of forward, backward and AdamW, all state included."""

    def run() -> None:
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.AdamW(model.parameters())
        x = torch.randn(1, TOKENS, WIDTH)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
                y = model(x)
            y.backward(torch.ones_like(y))
            optimizer.step()

    run()  # what is set up once, such as a thread's scratch memory, is none of the model's
    return peak(run)


def rewritten() -> nn.Module:
    with torch.device("meta"):
        model = rpqfx.rpqify(Block(WIDTH, 4), POLICY)
    return rpqfx.materialize(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("table", [True, False, None], ids=["lookup", "dequantize", "plan"])
def test_training_a_block_peaks_below_the_dense_one(
    table: bool | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients, Adam's moments, activations and all buffers, whichever way products run."""
    if table is not None:
        monkeypatch.setattr(products, "cheaper", lambda *args: "lookup" if table else "dequantize")
    ours, dense = training_peak(rewritten, dtype), training_peak(lambda: Block(WIDTH, 4), dtype)
    assert ours < SHARE * dense, f"{ours} bytes, the dense block {dense}"


@pytest.mark.parametrize("backend", backends, ids=lambda backend: backend.__name__.rpartition(".")[2])
@pytest.mark.parametrize("with_signs", [False, True])
def test_the_bins_of_one_block_are_gone_before_the_next(
    backend: Any, with_signs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside its results, a batch of many blocks takes what one of a few takes."""
    monkeypatch.setattr("rpqfx.codebook.steps.TABLE_ELEMENTS", 2**18)
    books = randn(0, 1, 4, 64, 4, dtype=torch.float32)
    codes = torch.arange(4 * 64).remainder(64).to(torch.uint8).view(1, 4, 64)
    signs = codebook.pack_signs(codes % 2 == 0) if with_signs else None
    sizes = (8192, 65536)
    inputs = [[randn(1, rows, width, dtype=torch.float32) for width in (16, 64)] for rows in sizes]
    for results, run in (
        (1, lambda x, y: backend.contract_t(y, books, codes, signs=signs)),
        (0, lambda x, y: backend.accumulate(x, y, codes, 4, 64, signs)),
        (1, lambda x, y: backend.contract_grads(x, y, books, codes, signs)),
    ):
        few, many = (peak(functools.partial(run, x, y)) - results * x.nbytes for x, y in inputs)
        assert many < 1.1 * few, f"{many} bytes for eight times the rows, {few} for them"


@pytest.mark.parametrize("backend", backends, ids=lambda backend: backend.__name__.rpartition(".")[2])
def test_a_convolution_has_one_blocks_gradient_of_filters(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen blocks of one sample take what two take."""
    monkeypatch.setattr("rpqfx.ops.conv_contract.MAP_ELEMENTS", 1)
    monkeypatch.setattr("rpqfx.ops.library.choose", lambda *args: backend)
    layer = rpqfx.nn.RPQConv2d(64, 256, 3, padding=1, codebook_dim=72, codebook_bits=6, plan="lookup")
    held, form = (
        layer.weight_rpq,
        ConvContract(8, 64, (256, 64, 3, 3), (4, 4), (1, 1), (1, 1), (1, 1), False, (0, 0), 1),
    )
    x, y = randn(1, 16, 64, 4, 4, dtype=torch.float32), randn(2, 16, 256, 4, 4, dtype=torch.float32)
    for count in (2, 16):
        run = functools.partial(form.grads, x[:count], y[:count], held.codebooks.data, held.codes, None)
        run()
        found = peak(run) - 2 * count * x[0].nbytes  # results of blocks, and those joined
        assert found < 6 * held.codebooks.nbytes
    assert peak(functools.partial(form.book, x, y, held.codes, None)) < 6 * held.codebooks.nbytes


# ------------------------------------------------------------------------------------------- the check can fail


class Gathering(nn.Linear):
    """What the check is for: autograd keeps the weight that it multiplied with."""

    def __init__(self, dense: nn.Linear) -> None:
        nn.Module.__init__(self)
        small = rpqfx.rpqify(nn.Sequential(dense), POLICY)
        self.held: RPQWeight = small[0].weight_rpq
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.held(), self.bias)


def test_a_block_that_keeps_its_weights_is_caught() -> None:
    def gathering() -> nn.Module:
        block = Block(WIDTH, 4)
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, name, Gathering(child))
        return block

    kept, dense = training_peak(gathering, torch.float32), training_peak(lambda: Block(WIDTH, 4), torch.float32)
    assert kept > SHARE * dense
