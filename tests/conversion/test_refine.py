"""Blocks are found, heard, run again and refined, and nothing else of a model changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx.conversion.refine import Call, Watch, blocks_of, refinable, refine
from rpqfx.nn import RPQLinear


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, *, memory: list[Tensor] | None = None) -> Tensor:
        if memory is not None:
            memory.append(x)
        return x + self.second(torch.relu(self.first(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, width: int = 32, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        memory: list[Tensor] = []
        for block in self.blocks:
            x = block(x, memory=memory)
        return self.head(x), len(memory)


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


def inputs(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(32, 32, generator=generator)
    return [torch.randn(64, 32, generator=generator) @ mix for _ in range(count)]


POLICY = rpqfx.Policy.pretrained(bits_per_weight=3, min_size=512)


def test_blocks_are_the_outermost_listed_modules_with_weights():
    model = nn.Sequential(nn.ReLU(), Block(8), nn.Sequential(Block(8), nn.ReLU()))
    names = [name for name, p in model.named_parameters() if p.dim() == 2]
    assert set(blocks_of(model, names)) == {"1", "2"}
    assert set(blocks_of(model, names[:1])) == {"1"}
    assert blocks_of(nn.Linear(4, 4), ["weight"]) == {}


def test_refined_blocks_come_nearer_to_the_dense_ones():
    model, batches = stack(), inputs()
    plain = rpqfx.rpqify(model, POLICY, calibration=batches)
    refined = rpqfx.rpqify(model, POLICY, calibration=batches, refine=60)

    def error(small: nn.Module) -> float:
        with torch.no_grad():
            return float(sum((small(x)[0] - model(x)[0]).square().mean() for x in batches))

    assert error(refined) < 0.95 * error(plain)
    assert rpqfx.report(refined).bits_per_weight <= 3  # factors are rounded to what is stored
    for a, b in zip(plain.blocks[0].buffers(), refined.blocks[0].buffers(), strict=True):
        assert torch.equal(a, b)  # codes; those of later blocks are chosen on other inputs


def test_inputs_that_a_run_changes_are_not_changed_by_another():
    model, batches = stack(), inputs()
    small = rpqfx.rpqify(model, POLICY, calibration=batches, refine=4)
    assert small(batches[0])[1] == 3
    seen: list[int] = []

    class Counting(Stack):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            result = super().forward(x)
            seen.append(result[1])
            return result

    counting = Counting().eval()
    counting.load_state_dict(model.state_dict())
    rpqfx.rpqify(counting, POLICY, calibration=batches, refine=4)
    assert set(seen) <= {0, 3}  # none where the model was only traced


def test_a_refinement_that_does_not_help_is_taken_back(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    block = nn.Sequential(RPQLinear(16, 16, codebook_dim=4, bits=4, dim_scale=True))
    watch = Watch({}, lambda *_: None, again=False)
    x = torch.randn(8, 16)
    calls = [Call((x,), {}, None)]
    with torch.no_grad():
        targets = [block(x)]  # perfect already
    before = copy.deepcopy(block.state_dict())
    start, end = refine(block, calls, targets, 5, watch)
    assert start == end == 0
    for key, value in block.state_dict().items():
        assert torch.equal(value, before[key])


def test_flags_and_gradients_are_as_before():
    model = stack()
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    small = rpqfx.rpqify(model, POLICY, calibration=inputs(), refine=4)
    assert not any(p.requires_grad for p in small.blocks[0].norm.parameters())
    assert all(p.requires_grad for p in small.blocks[1].norm.parameters())
    assert all(p.grad is None for p in small.parameters())


def test_shared_codebooks_and_dense_matrices_are_left_alone():
    small = rpqfx.rpqify(stack(), POLICY, calibration=inputs())
    block: Any = small.blocks[0]
    block.first.weight_rpq.shares_codebooks = True
    chosen = {id(p) for p in refinable(block)}
    assert id(block.first.weight_rpq.codebooks) not in chosen
    assert id(block.norm.weight) in chosen
