"""Steps of moving averages that are taken once for each backward pass, whatever is run again within it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from rpqfx.kv.quantizer.moving_averages import Batch, take_step


def recomputed() -> bool:
    """Returns whether this runs within a backward pass, as a forward does that activation checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def step_after_backward(out: Tensor, batches: Sequence[Batch]) -> Tensor:
    """Returns a tensor through which a backward pass learns that averages are to take a step.

    Codebooks move when the whole pass is over: what it runs again finds them as they were, and layers that share
    codebooks take one step together.

    Args:
        out: What was computed with the codebooks.
        batches: What they were used for.
    """
    anchor = torch.zeros((), requires_grad=True)  # so that this is passed where nothing before it has a gradient
    return _Noted.apply(out, anchor, tuple(batches), _task() if recomputed() else None)


# What torch.compiler.disable sets; to call it would import the compiler.
step_after_backward._torchdynamo_disable = True  # type: ignore[attr-defined]


class _Task:
    """The batches of a backward pass."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def finish(self) -> None:
        take_step(self.batches)


# By the number of the pass. A pass alone keeps its task, so that one which fails leaves nothing.
_TASKS: weakref.WeakValueDictionary[int, _Task] = weakref.WeakValueDictionary()


def _task() -> _Task:
    """Returns the task of the backward pass in which this is called."""
    number = torch._C._current_graph_task_id()
    task = _TASKS.get(number)
    if task is None:
        task = _TASKS[number] = _Task()
        Variable._execution_engine.queue_callback(task.finish)
    return task


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, batches: tuple[Batch, ...], task: _Task | None) -> Tensor:
        """Returns the tensor as it is."""
        ctx.batches, ctx.task = batches, task  # the pass around a reentrant one has to be known beforehand
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Returns the gradient as it is."""
        (ctx.task or _task()).batches.extend(ctx.batches)
        return grads[0], None, None, None
