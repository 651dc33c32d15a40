r"""The fixed point of coordinate descent, read off exactly.

CoLT5 (Ainslie et al., 2023, arXiv:2303.09752) chooses ``k`` of ``n`` tokens by scores that iterations of coordinate
descent approach (``rpqfx.routing.iterative``). Where they stop changing, one number ``a`` for each row is all there is
to know:

    score_i = min(1, exp((s_i + a) / eps)),        sum_i score_i = k

Let ``u = s / eps`` in descending order, counted from 0, and ``L_i`` the log of the sum of ``exp(u_m)`` over all
``m >= i``. Were token ``i`` just at 1, those before it would be at 1 too, and the sum would be ``i + exp(L_i - u_i)``.
That grows with ``i``, so the tokens at 1 are the first ``j``, the number of ``i`` at which it is still below ``k``, and
the others share what is left: ``a / eps = log(k - j) - L_j``. As ``j < k``, only the largest ``k`` have to be in order.

The gradient is that of the equation, not of the way to its solution. With ``w`` the scores below 1 and 0 for the rest,

    d score_i = w_i / eps * (d s_i - sum_m w_m d s_m / sum_m w_m)

so the scores are all that is kept for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rpqfx.errors import InputError, SpecError


def exact_scores(
    s: Tensor, k: float | Tensor, *, eps: float = 0.1, mask: Tensor | None = None, most: int | None = None
) -> Tensor:
    """How much each token is chosen: ``min(1, exp((s + a) / eps))`` with the ``a`` for which they sum to ``k``.

    Args:
        s: ``[..., n]``, floating.
        k: How many are chosen: a number, whole or not, or a tensor ``[...]`` with one for each row. No gradient
            reaches it.
        eps: How soft the choice is, in units of ``s``.
        mask: ``[..., n]`` bool, False for tokens that cannot be chosen.
        most: Where ``k`` is a tensor, what none of it exceeds, if that is known. It spares sorting whole rows.

    Returns:
        ``[..., n]`` in float64 if ``s`` is, else in float32. Masked tokens have 0. In rows with no more than ``k``
        others, those have 1.

    Raises:
        InputError: If ``s`` is not floating, or the mask not bool.
        SpecError: If ``eps`` or a number ``k`` is not above zero.
    """
    s, k, most = prepared(s, k, eps, mask, most)
    if torch.is_grad_enabled() and s.requires_grad:
        return _Scores.apply(s, k, eps, mask, most)
    return _scores(s, k, eps, mask, most)


def exact_offset(
    s: Tensor, k: float | Tensor, *, eps: float = 0.1, mask: Tensor | None = None, most: int | None = None
) -> Tensor:
    """The ``a`` of each row, by which other tokens can be scored as these are.

    Args:
        s: As for ``exact_scores``; so are the others.
        k: See there.
        eps: See there.
        mask: See there.
        most: See there.

    Returns:
        ``[...]``. Rows with no more than ``k`` tokens have infinity.

    Raises:
        InputError: As ``exact_scores``.
        SpecError: As ``exact_scores``.
    """
    s, k, most = prepared(s, k, eps, mask, most)
    if torch.is_grad_enabled() and s.requires_grad:
        return _Offset.apply(s, k, eps, mask, most)[0]
    return _offset(s, k, eps, mask, most)[0]


def prepared(
    s: Tensor, k: float | Tensor, eps: float, mask: Tensor | None, most: int | None = None
) -> tuple[Tensor, Tensor, int]:
    """What routers are given, checked: float32 or float64 logits, ``k`` as ``[..., 1]``, and what it cannot exceed."""
    if not s.is_floating_point():
        raise InputError(f"routing needs floating logits, got {s.dtype}; cast them first")
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"a mask is bool, True for tokens that take part; got {mask.dtype}: try mask.bool()")
    if not eps > 0:
        raise SpecError(f"eps must be above zero, got {eps}; 0.03 is nearly a hard choice, 1.0 a soft one")
    n = s.shape[-1]
    s = s if s.dtype == torch.float64 else s.float()
    if isinstance(k, Tensor):
        return s, k.to(s.dtype)[..., None], n if most is None else min(most, n)
    if not k > 0:
        raise SpecError(f"k is how many tokens are chosen and must be above zero, got {k}")
    return s, torch.full((), float(k), dtype=s.dtype, device=s.device), min(math.ceil(k), n)


def enough(s: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """``[..., 1]`` bool: which rows have no more than ``k`` tokens, so that all are chosen."""
    if mask is None:
        return (s.shape[-1] <= k).expand(*s.shape[:-1], 1)
    return mask.sum(-1, keepdim=True) <= k


def _solve(s: Tensor, k: Tensor, eps: float, mask: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """``u``, minus infinity where masked, and ``a / eps``, which means nothing in rows with too few tokens."""
    u = s / eps
    u = u if mask is None else u.masked_fill(~mask, -math.inf)
    top, at = u.topk(most)
    rest = u.scatter(-1, at, -math.inf).logsumexp(-1, keepdim=True)
    suffixes = torch.cat([top, rest], -1).flip(-1).logcumsumexp(-1).flip(-1)
    ranks = torch.arange(most, device=s.device)
    full = (ranks + (suffixes[..., :-1] - top).exp() < k).sum(-1, keepdim=True)
    return u, (k - full).log() - suffixes.gather(-1, full)


def _scores(s: Tensor, k: Tensor, eps: float, mask: Tensor | None, most: int) -> Tensor:
    u, offset = _solve(s, k, eps, mask, most)
    scores = (u + offset).clamp(max=0).exp().masked_fill(enough(s, k, mask), 1.0)
    return scores if mask is None else scores.masked_fill(~mask, 0.0)


def _offset(s: Tensor, k: Tensor, eps: float, mask: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """``a`` and the scores."""
    u, offset = _solve(s, k, eps, mask, most)
    everyone = enough(s, k, mask)
    scores = (u + offset).clamp(max=0).exp().masked_fill(everyone, 1.0)
    scores = scores if mask is None else scores.masked_fill(~mask, 0.0)
    return (eps * offset).masked_fill(everyone, math.inf)[..., 0], scores


def _below(scores: Tensor) -> tuple[Tensor, Tensor]:
    """``w`` and its sum, which is zero only where all of it is."""
    below = scores.masked_fill(scores >= 1, 0.0)
    return below, below.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(s: Tensor, k: Tensor, eps: float, mask: Tensor | None, most: int) -> Tensor:
        return _scores(s, k, eps, mask, most)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.eps = inputs[2]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (scores,) = ctx.saved_tensors
        below, total = _below(scores)
        mean = (below * grad).sum(-1, keepdim=True) / total
        return below * (grad - mean) / ctx.eps, None, None, None, None


class _Offset(torch.autograd.Function):
    """``a``, and the scores for the backward pass alone."""

    @staticmethod
    def forward(s: Tensor, k: Tensor, eps: float, mask: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
        return _offset(s, k, eps, mask, most)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (scores,) = ctx.saved_tensors
        below, total = _below(scores)
        return -grad[..., None] * below / total, None, None, None, None
