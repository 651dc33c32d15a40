"""A module whose codebooks may be moving averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from rpqfx.kv import ema
from rpqfx.kv.groups import Groups
from rpqfx.kv.lookup import Step

_FLOAT32 = ("ema_counts", "ema_sums")


class Averaged(nn.Module):
    """Keeps the averages of a quantiser's codebooks, in float32 whatever the module is cast to."""

    layout: Groups
    codebooks: nn.Parameter
    repeat: int
    decay: float | None
    revive: float
    seed: int
    ema_counts: Tensor
    ema_sums: Tensor
    ema_steps: Tensor

    def _register_averages(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        averaged = self.decay is not None
        for name, size in zip(_FLOAT32, (shape[:-1], shape), strict=True):
            held = torch.empty(size, device=device, dtype=torch.float32) if averaged else None
            self.register_buffer(name, held)
        self.register_buffer("ema_steps", torch.zeros((), device=device, dtype=torch.int64) if averaged else None)

    @torch.no_grad()
    def _average(self, steps: list[Step], counted: Tensor) -> None:
        assert self.decay is not None
        drawn = None
        if self.revive:
            drawn = ema.draw(steps, counted, self.layout, self.ema_steps + self.seed)[:: self.repeat]
        batch = ema.Sums(*(self._each_book(sums) for sums in ema.batch_sums(steps, counted, self.layout)))
        held = ema.Sums(self.ema_counts, self.ema_sums)
        ema.update(self.codebooks, held, batch, decay=self.decay, revive=self.revive, drawn=drawn)
        self.ema_steps += 1

    def _each_book(self, sums: Tensor) -> Tensor:
        """Sums of stages ``[R, ...]``, added up where they have the same codebook."""
        return sums if self.repeat == 1 else sums.unflatten(0, (len(self.codebooks), self.repeat)).sum(1)

    def _average_from(self, counts: Tensor | None) -> None:
        """Averages that give the codebooks as they are, of one point an entry if not said otherwise."""
        if self.decay is not None:
            self.ema_counts.copy_(torch.ones_like(self.ema_counts) if counts is None else counts)
            self.ema_sums.copy_(self.codebooks.float() * self.ema_counts[..., None])
            self.ema_steps.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves tensors, but leaves averages in float32: ``half()`` would round and overflow them."""
        before = {name: self._buffers[name] for name in _FLOAT32}
        super()._apply(fn, recurse)
        for name, held in before.items():
            now = self._buffers[name]
            if held is not None and now is not None and now.dtype != held.dtype:
                self._buffers[name] = now.float() if held.is_meta else held.to(now.device)
        return self
