"""A fine-tuning that is interrupted at any line leaves a plain model, of a whole number of steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx.nn import RPQWeight
from tests.interrupts import Interrupt, around, chosen, traced
from tests.training.test_resume import FAST, batches, pair

FEW, STEPS = 10, 2


def structure(*models: nn.Module) -> list[Any]:
    """All of a model but the values of its tensors."""
    found: list[Any] = []
    for module in (m for model in models for m in model.modules()):
        found.append((id(module), type(module), module.training, list(module.__dict__), list(module._buffers)))
        found.append(
            [(name, id(p), p.requires_grad, id(p.grad)) for name, p in module._parameters.items() if p is not None]
        )
        found.append([len(value) for name, value in module.__dict__.items() if "hooks" in name])
    return found


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def swept(number: int | None) -> int:
    dense, first = pair()
    first.one.train()
    first.norm.bias.requires_grad_(False)
    first.conv.bias.grad = torch.ones(8)
    data = batches()

    def tuned(small: nn.Module, progress: Any = None) -> None:
        given: dict[str, Any] = {"norms": "update", "accumulate": 2, "recode_every": 2}
        rpqfx.finetune(small, teacher=dense, data=data, steps=STEPS, rates=FAST, progress=progress, **given)

    wanted = [state(first)]
    for stop in range(1, STEPS + 1):
        small = copy.deepcopy(first)

        def raising(done: int, total: int, words: str, stop: int = stop) -> None:
            if done == stop:
                raise Interrupt

        with pytest.raises(Interrupt):
            tuned(small, raising)
        wanted.append(state(small))
    lines = traced(lambda: tuned(copy.deepcopy(first)))
    points, wrong = chosen(lines, number), []
    for at in points:
        small = copy.deepcopy(first)
        small.conv.bias.grad = torch.ones(8)
        before, outside = structure(small, dense), around()
        try:
            traced(lambda small=small, at=at: tuned(small), at)
        except Interrupt as interrupt:
            now = state(small)
            after = around()
            torch.set_grad_enabled(True)
            steps = [all(torch.equal(now[name], other[name]) for name in now) for other in wanted]
            plain = all(type(m) is RPQWeight for m in small.modules() if isinstance(m, RPQWeight))
            if not any(steps) or not plain or structure(small, dense) != before or after != outside:
                changed = [key for key in after if after[key] != outside[key]]
                wrong.append((str(interrupt).rpartition("rpqfx/")[2], steps, plain, changed))
    assert not wrong, f"{len(wrong)} of {len(points)} points: {wrong}"
    return len(points)


def test_an_interrupt_at_some_lines_leaves_whole_steps() -> None:
    swept(FEW)


@pytest.mark.slow
def test_an_interrupt_at_any_line_leaves_whole_steps(record_property: Any) -> None:
    record_property("points", swept(None))
