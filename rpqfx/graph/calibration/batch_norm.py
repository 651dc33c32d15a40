"""Batch-norm statistics, estimated again for the layers that are there now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def estimate_norms(model: nn.Module, runs: Sequence[Callable[[], Any]]) -> int:
    """Takes the running statistics of batch norms anew, as the plain mean over batches.

    Those that no batch reaches keep theirs, and so do all if a run raises.

    Args:
        model: The model, in eval mode.
        runs: What runs each batch through it.

    Returns:
        How many batch norms there are. Without any, or any batch, nothing is run.
    """
    norms = norms_of(model)
    if not norms or not runs:
        return len(norms)
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    done = False
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for run in runs:
                run()
        done = True
    finally:
        for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            norm.eval()
            if not done or not norm.num_batches_tracked:
                for name, buffer in norm.named_buffers():
                    buffer.copy_(buffers[name])
    return len(norms)


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Returns the batch norms that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
