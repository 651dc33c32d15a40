"""The statistics that calibration collects of one layer's keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from rpqfx.kv.attention.rotary import Rotary, undo_rotary


@dataclass
class Moments:
    """Moments of one layer's keys, or values: each of ``P`` parts has ``n = H * D / P`` channels.

    Args:
        joint: Whether all heads are one part, or each its own.
        heads: ``H``, and
        dim: ``D``, once something was seen, and
        device: where.
        count: Vectors of each part that were seen.
        total: Their sum, ``[P, n]`` float64.
        outer: The sum of their outer products, ``[P, n, n]``.
        grads: The sum of their gradients' outer products, ``[P, n, n]``.
        samples: Some of the vectors, ``[P, N, n]`` each.
    """

    joint: bool
    heads: int = 0
    dim: int = 0
    device: torch.device | None = None
    count: int = 0
    total: Tensor | None = None
    outer: Tensor | None = None
    grads: Tensor | None = None
    samples: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, step: int) -> None:
        """Adds vectors, and keeps every ``step``-th.

        Args:
            x: ``[B, H, T, D]``, detached.
            step: At least 1.
        """
        self.heads, self.dim, self.device = x.shape[1], x.shape[3], x.device
        flat = self._by_part(x)
        self.samples.append(flat[:, ::step].float())
        self.count += flat.shape[1]
        self.total = _plus(self.total, flat.sum(1))
        self.outer = _plus(self.outer, flat.mT @ flat)

    def add_gradient(self, grad: Tensor) -> None:
        """Adds gradients, ``[B, H, T, D]``."""
        flat = self._by_part(grad)
        self.grads = _plus(self.grads, flat.mT @ flat)

    @property
    def parts(self) -> int:
        """``P``."""
        return 1 if self.joint else self.heads

    def all_samples(self) -> Tensor:
        """Returns the samples as the coder takes them, ``[1, H, N, D]``."""
        samples = torch.cat(self.samples, 1)
        return rearrange(samples, "p n (h d) -> 1 (p h) n d", d=self.dim)

    def _by_part(self, x: Tensor) -> Tensor:
        return rearrange(x, "b (p h) t d -> p (b t) (h d)", p=self.parts).double()

    @property
    def mean(self) -> Tensor:
        """``[P, n]``."""
        assert self.total is not None
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """``[P, n, n]``."""
        assert self.outer is not None
        return self.outer / self.count - self.mean[:, :, None] * self.mean[:, None]

    @property
    def fisher(self) -> Tensor:
        """``[P, n, n]``; the identity where no gradient came."""
        assert self.outer is not None
        if self.grads is None or not bool(self.grads.any()):
            return torch.eye(self.outer.shape[1], dtype=torch.float64, device=self.outer.device).expand_as(self.outer)
        return self.grads / self.count


class Watch:
    """Collects the keys and values of one attention layer, and their gradients.

    Args:
        joint: Whether all heads of a layer share codes.
        step: Every so many vectors one is kept.
    """

    def __init__(self, joint: bool, step: int) -> None:
        self.keys, self.values = Moments(joint), Moments(joint)
        self.rotated = False
        self._step = step

    def see(self, key: Tensor, value: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Adds keys and values, and returns those to go on with.

        Args:
            key: ``[B, H, T, D]``.
            value: ``[B, H, T, D]``.
            rotary: Angles that keys are rotated back by, or None.
        """
        return self.see_keys(key, rotary), self.see_values(value)

    def see_keys(self, key: Tensor, rotary: Rotary | None) -> Tensor:
        """Adds keys, and returns those to go on with; as in ``see``."""
        self.rotated = rotary is not None
        return self._hear(self.keys, key, rotary)

    def see_values(self, value: Tensor) -> Tensor:
        """Adds values, and returns those to go on with; as in ``see``."""
        return self._hear(self.values, value, None)

    def _hear(self, moments: Moments, x: Tensor, rotary: Rotary | None) -> Tensor:
        seen = x.detach() if rotary is None else undo_rotary(x.detach(), rotary)
        moments.add(seen, self._step)
        if not torch.is_grad_enabled():
            return x
        if not x.requires_grad:
            x = x.detach().requires_grad_()

        def hook(grad: Tensor) -> None:
            # x = R y, so the gradient in y is that in x times the transpose of R, which is its inverse times its
            # stretch squared; the stretch is one but for embeddings that stretch.
            moments.add_gradient(grad if rotary is None else undo_rotary(grad, rotary))

        x.register_hook(hook)
        return x


def _plus(total: Tensor | None, new: Tensor) -> Tensor:
    return new if total is None else total.add_(new)
