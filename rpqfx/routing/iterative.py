"""The routers that iterate, and the one that only sums: coordinate descent, Sinkhorn, cumulative softmax.

They take what ``exact_scores`` takes and return what it returns. Autograd differentiates through every step.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rpqfx.errors import SpecError
from rpqfx.routing.exact import enough, prepared


def coordinate_descent(
    s: Tensor,
    k: float | Tensor,
    *,
    eps: float = 0.1,
    mask: Tensor | None = None,
    n_iters: int = 50,
    eps_init: float | None = None,
    eps_decay: float = 0.7,
) -> Tensor:
    """CoLT5's router as published: what ``exact_scores`` computes at once, approached step by step.

    Each step solves for ``a`` given ``b`` and for ``b`` given ``a`` (Wright, 2015, arXiv:1502.04759, as used by Qian
    et al., 2022, arXiv:2211.01267, and in CoLT5, arXiv:2303.09752). With ``eps_init``, eps shrinks to its value from
    there, by a factor each step, and some 20 steps do what 50 did (Lei et al., 2023, arXiv:2304.04947).

    Args:
        s: ``[..., n]``, floating.
        k: How many are chosen: a number or a tensor ``[...]``.
        eps: How soft the choice is.
        mask: ``[..., n]`` bool, False for tokens that cannot be chosen.
        n_iters: Steps.
        eps_init: The first step's eps, 4 in the paper. Left out, ``eps``.
        eps_decay: What eps is multiplied by after each step.

    Returns:
        ``[..., n]``, as ``exact_scores``; the sum is ``k`` only as far as the steps have come.

    Raises:
        InputError: As ``exact_scores``.
        SpecError: As ``exact_scores``, or if there is no step.
    """
    s, k, _ = prepared(s, k, eps, mask)
    _some(n_iters)
    given, s = s, _out(s, mask)
    current = eps if eps_init is None else max(eps, eps_init)
    a, b = s.new_zeros(()), -s
    for step in range(n_iters):
        current = current if step == 0 else max(eps, current * eps_decay)
        # s + b is min(s, -a), but 0 at the start, also of masked tokens
        a = current * (k.log() - _out((s + b) / current, mask).logsumexp(-1, keepdim=True))
        b = -F.relu(s + a)
    return _finished(((s + a + b) / current).exp(), given, k, mask)


def sinkhorn(
    s: Tensor, k: float | Tensor, *, eps: float = 0.1, mask: Tensor | None = None, n_iters: int = 50
) -> Tensor:
    """Transport of ``n`` tokens to two places, one that holds ``k`` and one for the rest.

    The share that goes to the first is ``sigmoid((s + a) / eps)``: soft at both ends, where coordinate descent has a
    corner. Sinkhorn's steps scale both places to what they hold, in turns with the tokens (Xie et al., 2020,
    arXiv:2002.06504).

    Args:
        s: ``[..., n]``, floating.
        k: How many are chosen: a number or a tensor ``[...]``.
        eps: How soft the choice is.
        mask: ``[..., n]`` bool, False for tokens that cannot be chosen.
        n_iters: Steps.

    Returns:
        ``[..., n]``, as ``exact_scores``.

    Raises:
        InputError: As ``exact_scores``.
        SpecError: As ``exact_scores``, or if there is no step.
    """
    s, k, _ = prepared(s, k, eps, mask)
    _some(n_iters)
    count = s.new_full((), s.shape[-1]) if mask is None else mask.sum(-1, keepdim=True).to(s.dtype)
    left = (count - k).clamp_min(1e-3)  # rows with too few tokens are filled in below
    u = s / eps
    u = u - _out(u, mask).amax(-1, keepdim=True).detach()
    offset = u.new_zeros(())
    for _ in range(n_iters):
        chosen = _out(F.logsigmoid(u + offset), mask).logsumexp(-1, keepdim=True)
        others = _out(F.logsigmoid(-u - offset), mask).logsumexp(-1, keepdim=True)
        offset = offset + (k.log() - chosen) - (left.log() - others)
    return _finished((u + offset).sigmoid(), s, k, mask)


def cumulative_softmax(s: Tensor, k: float | Tensor, *, eps: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """The share of each token in the softmax over itself and those below it.

    It knows nothing of ``k``, except that rows with no more than ``k`` tokens are chosen whole. The choice is that of
    the ``k`` largest; 1 means far above all others below.

    Args:
        s: ``[..., n]``, floating.
        k: How many will be chosen: a number or a tensor ``[...]``.
        eps: The temperature.
        mask: ``[..., n]`` bool, False for tokens that cannot be chosen.

    Returns:
        ``[..., n]``, as ``exact_scores``, but that the sum is not ``k``.

    Raises:
        InputError: As ``exact_scores``.
        SpecError: As ``exact_scores``.
    """
    s, k, _ = prepared(s, k, eps, mask)
    u, order = _out(s / eps, mask).sort(-1)
    scores = s.new_zeros(u.shape).scatter(-1, order, (u - u.logcumsumexp(-1)).exp())
    return _finished(scores, s, k, mask)


def _some(n_iters: int) -> None:
    if n_iters < 1:
        raise SpecError(f"n_iters must be at least 1, got {n_iters}")


def _out(s: Tensor, mask: Tensor | None) -> Tensor:
    """Masked tokens far below all others, but finite, so that no difference of two is NaN."""
    return s if mask is None else s.masked_fill(~mask, -1e30)


def _finished(scores: Tensor, s: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores.masked_fill(enough(s, k, mask), 1.0)
    return scores if mask is None else scores.masked_fill(~mask, 0.0)
