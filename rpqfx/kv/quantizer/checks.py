"""Checks of the inputs of quantisers."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.errors import InputError


def check_vectors(x: Tensor, dim: int) -> None:
    """Raises unless x is floating and ``[..., dim]``."""
    if not x.is_floating_point():
        raise InputError(f"vectors are real floating tensors, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != dim:
        raise InputError(f"x has the shape {list(x.shape)}, expected {dim} (dim) on the last axis")


def check_points(points: Tensor, weights: Tensor | None, dim: int, groups: int) -> None:
    """Raises unless points are finite and ``[N, dim]``, and weights ``[N]`` or ``[N, groups]``."""
    if points.dim() != 2:
        raise InputError(f"points are [N, dim], got the shape {list(points.shape)}")
    check_vectors(points, dim)
    if not points.isfinite().all():
        bad = int((~points.isfinite()).any(1).sum())
        raise InputError(f"{bad} of {len(points)} points are not finite; leave them out")
    shapes = [len(points)], [len(points), groups]
    if weights is not None and list(weights.shape) not in shapes:
        raise InputError(f"weights are [N] or [N, M], here {shapes[0]} or {shapes[1]}, got {list(weights.shape)}")


def counted_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns which vectors ``[..., dim]`` count, ``[T]`` bool: all, or those of a mask that expands to ``[...]``."""
    tokens = x.shape[:-1]
    if mask is None:
        return torch.ones(tokens.numel(), dtype=torch.bool, device=x.device)
    if mask.dtype != torch.bool:
        raise InputError(f"the mask is bool, True where tokens count, got {mask.dtype}")
    axes = zip(reversed(mask.shape), reversed(tokens), strict=False)
    if mask.dim() > len(tokens) or any(own not in (1, size) for own, size in axes):
        raise InputError(f"the mask has the shape {list(mask.shape)}, expected what expands to {list(tokens)}")
    return mask.expand(tokens).reshape(-1)
