"""Random directions in which a model's outputs could change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def probe(output: Any, seed: int) -> Tensor | None:
    """A scalar whose gradient's square says, in the mean over seeds, what a change of the model's inside costs.

    Its gradient is that of a random direction in which the outputs could change: of logits (outputs under that name)
    one drawn so that its mean square is the Fisher information, and so the squared gradient what the Kullback-Leibler
    divergence grows by; of others a Gaussian one, for the squared error.

    Args:
        output: What the model returned.
        seed: Of the direction.

    Returns:
        A scalar, or None where no output has a gradient.
    """
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        chances = logits.detach().float().softmax(-1)
        root = _noise(logits, seed).mul_(chances.sqrt())
        direction = root.sub_(chances.mul_(root.sum(-1, keepdim=True)))
        return torch.dot(logits.float().reshape(-1), direction.reshape(-1))
    total = None
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.requires_grad:
            part = (tensor.float() * _noise(tensor, seed)).sum()
            total = part if total is None else total + part
    return total


def _noise(like: Tensor, seed: int) -> Tensor:
    numbers = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=numbers, device=like.device)
