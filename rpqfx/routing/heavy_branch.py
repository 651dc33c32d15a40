"""The heavy branch with its two routers: what self-attention, cross-attention and images share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from rpqfx.routing.gather import put, take
from rpqfx.routing.heavy_attention import HeavyAttention
from rpqfx.routing.router import Choice, Count, Router


class RoutedBranch(nn.Module):
    """Chooses queries of one sequence, keys and values of the same or another, and adds their attention.

    Args:
        dim: Width of tokens.
        num_routed_kv: Sets of keys and values, each chosen by a routing token of its own for a group of heads.
        stand_in: Whether tokens that were not chosen get a trained vector instead, rather than nothing.
        router: Arguments of both ``Router``.
        kv_router: Arguments of that of keys and values, over those of ``router``.
        device: Where the tensors go.
        dtype: Of the Parameters.
        **heavy: Arguments of ``HeavyAttention``.

    Raises:
        SpecError: As ``Router`` and ``HeavyAttention``.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_routed_kv: int = 1,
        stand_in: bool = True,
        router: Mapping[str, Any] | None = None,
        kv_router: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **heavy: Any,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        both = dict(router or {})
        self.q_router = Router(dim, **both, **made)
        self.kv_router = Router(dim, **{**both, "num_routing_tokens": num_routed_kv, **dict(kv_router or {})}, **made)
        self.attention = HeavyAttention(dim, groups=num_routed_kv, **heavy, **made)
        self.stand_in = nn.Parameter(torch.empty(dim, **made)) if stand_in else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the stand-in, small: it is added to most tokens."""
        if self.stand_in is not None:
            nn.init.normal_(self.stand_in, std=0.02)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        out: Tensor,
        num_q: Count,
        num_kv: Count,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        most: tuple[int | None, int | None] = (None, None),
        routing_tokens: Tensor | None = None,
        plus: Tensor | None = None,
    ) -> Tensor:
        """Adds the heavy branch to ``out``.

        Args:
            x: ``[B, n, d]``, what queries are chosen of.
            context: ``[B, m, d]``, what keys and values are chosen of.
            out: ``[B, n, d]``, what there is already.
            num_q: How many queries, as ``Router`` takes it.
            num_kv: How many keys and values.
            mask: ``[B, n]`` bool.
            context_mask: ``[B, m]`` bool.
            most: Slots for queries and for keys and values where their numbers are tensors.
            routing_tokens: ``[B, R, d]`` for keys and values.
            plus: ``[B, n, d]``, added to the result.

        Returns:
            ``[B, n, d]``.
        """
        queries = self.q_router(x, num_q, mask=mask, most=most[0])
        keys = self.kv_router(context, num_kv, mask=context_mask, most=most[1], routing_tokens=routing_tokens)
        heavy = self.attention(
            take(x, queries)[:, 0],
            take(context, keys),
            scores_q=queries.scores[:, 0],
            scores_kv=keys.scores,
            mask=keys.mask,
            positions=(_positions(queries, x)[:, 0], _positions(keys, context)) if self.attention.rotary else None,
        )
        return put(out, queries, heavy, self.stand_in, plus)


def _positions(choice: Choice, x: Tensor) -> Tensor:
    if choice.indices is not None:
        return choice.indices
    line = torch.arange(x.shape[1], device=x.device)
    return repeat(line, "n -> b r n", b=x.shape[0], r=choice.scores.shape[1])


def count(given: Count | None, own: int | float) -> tuple[Count, int | None]:
    """The number a call gives or else the module's own, and of a tensor the most that it may ask for.

    A tensor's slots have to be there whatever is in it; the module's own number says how many.
    """
    if given is None:
        return own, None
    return given, own if isinstance(given, Tensor) and isinstance(own, int) else None
