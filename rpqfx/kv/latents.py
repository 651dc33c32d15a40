"""Attention whose cache holds latents, which the module expands to keys and values (DeepSeek-V2, 2405.04434).

What is put into codes is what a cache holds: the latent, and the part of the key that all heads share, after its rotary
embedding. Tokens are expanded twice where queries differ in which of them they find as they are: so, and as codes say.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rpqfx.kv.cache.pending import Pending
from rpqfx.kv.module import KVAttention
from rpqfx.kv.quantizer.ema_steps import recomputed, step_after_backward
from rpqfx.kv.quantizer.moving_averages import Batch

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def expanded(core: KVAttention, expand: Expand, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the keys and values that a module attends to.

    Args:
        core: The attention on codes that the module holds.
        expand: The module's own function, which makes keys and values of latents.
        latent: ``[B, 1, T, r]``.
        shared: ``[B, 1, T, R]``, the part of the keys that is not expanded.

    Returns:
        Keys ``[B, H, T, D]`` and values; of twice as many tokens where ``core.underway.near`` says which of them are as
        they are, and all again as their codes.
    """
    core.underway.near = None
    core.check_angles()
    if isinstance(latent, Pending):
        coming = latent.coming
        if coming.arrival is None:
            coming.arrival = core.append(coming.store, coming.keys, coming.values)
        if coming.arrival.start:
            (latent, far), (shared, far_shared) = (
                coming.store.vectors(side, coming.arrival) for side in ("keys", "values")
            )
            latent, shared = latent.to(coming.keys.dtype), shared.to(coming.values.dtype)
            if far is None or far_shared is None:
                return expand(latent, shared)
            core.underway.near = coming.store.near(coming.keys.shape[2], coming.arrival, latent.device)
            return _both(expand(latent, shared), expand(far.to(latent.dtype), far_shared.to(shared.dtype)))
        latent, shared = coming.keys, coming.values
    if core.trial is not None:
        core.trial.hold(latent, shared)
        return expand(latent, shared)
    if core.watch is not None:
        return expand(*core.watch.see(latent, shared, None))
    core.check("keys", latent)
    core.check("values", shared)
    batches: list[Batch] = []
    coded, loss = core.keys(latent, None, batches)
    coded_shared, shared_loss = core.values(shared, None, batches)
    if not recomputed():
        core.underway.loss = loss + shared_loss if core.training else None
        core.underway.recorded = torch.is_grad_enabled()
    core.underway.near = core.near(latent.shape[2], latent.shape[2], latent.device)
    keys, values = _both(expand(latent, shared), expand(coded, coded_shared))
    return step_after_backward(keys, batches) if batches and torch.is_grad_enabled() else keys, values


def _both(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([near[0], far[0]], 2), torch.cat([near[1], far[1]], 2)
