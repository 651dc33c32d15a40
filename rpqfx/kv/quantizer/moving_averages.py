"""A module whose codebooks may be moving averages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from rpqfx.kv.quantizer import ema
from rpqfx.kv.quantizer.encode import Step
from rpqfx.kv.quantizer.groups import Groups

_FLOAT32 = ("ema_counts", "ema_sums")


class Batch(NamedTuple):
    """The uses of a quantiser's codebooks in one call.

    Args:
        quantizer: Whose they are.
        sums: Of the points that chose each entry.
        drawn: Points that entries may be revived by, or None.
    """

    quantizer: Averaged
    sums: ema.Sums
    drawn: Tensor | None


class Averaged(nn.Module):
    """Keeps the averages of a quantiser's codebooks, in float32 whatever the module is cast to."""

    layout: Groups
    codebooks: nn.Parameter
    shared_stages: int
    decay: float | None
    threshold_ema_dead_code: float
    seed: int
    copies: int = 1  # processes that see each token, where heads are split over them
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
    def _batch(self, steps: list[Step], counted: Tensor) -> Batch:
        """Returns the uses of the codebooks in a call."""
        drawn = None
        if self.threshold_ema_dead_code:
            drawn = ema.draw(steps, counted, self.layout, self.ema_steps + self.seed)[:: self.shared_stages]
        found = ema.batch_sums(steps, counted, self.layout, self.copies)
        sums = ema.Sums(*(self._each_book(sums) for sums in found))
        return Batch(self, sums, drawn)

    def _each_book(self, sums: Tensor) -> Tensor:
        """Adds up sums of stages ``[R, ...]`` that have the same codebook; codebooks without any get zero."""
        own = self.layout.codebooks_shape[0] // self.shared_stages
        sums = sums if self.shared_stages == 1 else sums.unflatten(0, (own, self.shared_stages)).sum(1)
        return sums if len(self.codebooks) == own else torch.cat([sums, sums.new_zeros(self._more(own, sums))])

    def _more(self, own: int, sums: Tensor) -> tuple[int, ...]:
        return len(self.codebooks) - own, *sums.shape[1:]

    def adopt(self, codebooks: nn.Parameter, counts: Tensor | None = None) -> None:
        """Takes codebooks that others may hold as well, with averages from which these come out.

        Args:
            codebooks: ``[R, G, K, d]``, at least as many stages as it has itself.
            counts: ``[R, G, K]``, points that chose each entry so far; one for each if left out.
        """
        self.codebooks = codebooks
        if self.decay is None:
            return
        for name, size in zip(_FLOAT32, (codebooks.shape[:-1], codebooks.shape), strict=True):
            self._buffers[name] = torch.empty(size, device=codebooks.device, dtype=torch.float32)
        self._average_from(counts)

    @torch.no_grad()
    def _average_from(self, counts: Tensor | None) -> None:
        """Sets averages that give the codebooks as they are, of one point an entry if not said otherwise."""
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


@torch.no_grad()
def take_step(batches: Sequence[Batch]) -> None:
    """Updates averages with the batches of a training step, and codebooks with them; shared ones once.

    Args:
        batches: Of all calls of the step.
    """
    by_books: dict[int, list[Batch]] = defaultdict(list)
    for batch in batches:
        by_books[id(batch.quantizer.codebooks)].append(batch)
    for shared in by_books.values():
        quantizers = list({id(batch.quantizer): batch.quantizer for batch in shared}.values())
        # One whose layer was left out of a step before has averages that are behind.
        steps = torch.stack([quantizer.ema_steps for quantizer in quantizers])
        first = quantizers[int(steps.argmax())] if len(quantizers) > 1 else quantizers[0]
        assert first.decay is not None
        total = ema.Sums(*(torch.stack(parts).sum(0) for parts in zip(*(batch.sums for batch in shared), strict=True)))
        held = ema.Sums(first.ema_counts, first.ema_sums)
        ema.update(
            first.codebooks,
            held,
            total,
            decay=first.decay,
            threshold_ema_dead_code=first.threshold_ema_dead_code,
            drawn=shared[0].drawn,
        )
        first.ema_steps += 1
        for other in quantizers:
            for name in (*_FLOAT32, "ema_steps"):
                other.get_buffer(name).copy_(first.get_buffer(name))
