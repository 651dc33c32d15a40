"""RoutedAttention, RoutedCrossAttention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from rpqfx.routing.heavy_branch import RoutedBranch, count
from rpqfx.routing.router import Count
from rpqfx.routing.windows import LocalAttention


class AttentionOptions(TypedDict, total=False):
    """Further arguments of ``RoutedAttention``, as blocks that are made of it take them."""

    num_routed_kv: int
    has_light_attn: bool
    light_dim_head: int
    light_heads: int
    light_window_size: int
    heavy_dim_head: int
    heavy_heads: int
    stand_in: bool
    rotary: bool
    multiply_keys_by_score: bool
    multiply_queries_by_score: bool


class RoutedAttention(nn.Module):
    """Light local attention of all tokens, and heavy attention of chosen queries to chosen keys and values added to it.

    CoLT5 (Ainslie et al., 2023, arXiv:2303.09752), section 3.2.

    Args:
        dim: Width of tokens.
        num_heavy_tokens_q: How many queries of each sample are chosen; a float is a share of its length.
        num_heavy_tokens_kv: How many keys and values.
        num_routed_kv: Sets of keys and values, each chosen by a routing token of its own for a group of heads.
        has_light_attn: Whether there is a light branch.
        light_dim_head: Width of a head of the light branch.
        light_heads: How many.
        light_window_size: Tokens in its sight, half on either side.
        heavy_dim_head: Width of a head of the heavy branch.
        heavy_heads: How many.
        stand_in: Whether tokens that were not chosen get a trained vector, beside what the light branch gives them.
        rotary: Whether the heavy branch knows positions.
        multiply_keys_by_score: Whether scores scale keys too, not only values.
        multiply_queries_by_score: Whether scores scale queries.
        residual: Whether the input is added to the result.
        router: Arguments of both ``Router``.
        device: Where the tensors go.
        dtype: Of the Parameters.

    Raises:
        SpecError: If a number makes no sense.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens_q: int | float,
        num_heavy_tokens_kv: int | float,
        num_routed_kv: int = 1,
        has_light_attn: bool = True,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        stand_in: bool = True,
        rotary: bool = False,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        residual: bool = False,
        router: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heavy_tokens_q, self.num_heavy_tokens_kv = num_heavy_tokens_q, num_heavy_tokens_kv
        self.residual = residual
        self.light = None
        if has_light_attn:
            size: dict[str, Any] = {"dim_head": light_dim_head, "heads": light_heads, "window_size": light_window_size}
            self.light = LocalAttention(dim, **size, **made)
        self.heavy = RoutedBranch(
            dim, num_routed_kv=num_routed_kv, stand_in=stand_in, router=router, dim_head=heavy_dim_head,
            heads=heavy_heads, rotary=rotary, multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=multiply_queries_by_score, **made,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_heavy_tokens_q: Count | None = None,
        num_heavy_tokens_kv: Count | None = None,
    ) -> Tensor:
        """Both branches.

        Args:
            x: ``[B, n, d]``.
            mask: ``[B, n]`` bool, False for tokens that none may see and that are never chosen.
            num_heavy_tokens_q: Instead of the module's own; a tensor ``[B]`` is cut to the module's own if that is an
                int.
            num_heavy_tokens_kv: In the same way.

        Returns:
            ``[B, n, d]``.

        Raises:
            InputError: As ``Router.forward``.
        """
        (num_q, most_q), (num_kv, most_kv) = (
            count(num_heavy_tokens_q, self.num_heavy_tokens_q),
            count(num_heavy_tokens_kv, self.num_heavy_tokens_kv),
        )
        out = torch.zeros_like(x) if self.light is None else self.light(x, mask)
        return self.heavy(
            x, x, out, num_q, num_kv,
            mask=mask, context_mask=mask, most=(most_q, most_kv), plus=x if self.residual else None,
        )  # fmt: skip


class RoutedCrossAttention(nn.Module):
    """Attention of chosen queries of a sequence to chosen tokens of a context, which may be very long.

    Args:
        dim: Width of tokens.
        num_tokens_q: How many queries of each sample are chosen; a float is a share of its length.
        num_tokens_kv: How many tokens of the context.
        kv_routing_tokens: Sets of keys and values, each chosen by a routing token of its own for a group of heads.
        dim_head: Width of a head.
        heads: How many.
        stand_in: Whether queries that were not chosen get a trained vector rather than 0.
        query_source: Whether the routing tokens of the context first attend to the sequence, so that what is chosen
            depends on what asks.
        route_block_size: Choose an equal share within each block of this many tokens of the context.
        multiply_keys_by_score: Whether scores scale keys too, not only values.
        multiply_queries_by_score: Whether scores scale queries.
        residual: Whether the input is added to the result.
        router: Arguments of both ``Router``.
        device: Where the tensors go.
        dtype: Of the Parameters.

    Raises:
        SpecError: If a number makes no sense.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_tokens_q: int | float,
        num_tokens_kv: int | float,
        kv_routing_tokens: int = 1,
        dim_head: int = 64,
        heads: int = 8,
        stand_in: bool = True,
        query_source: bool = False,
        route_block_size: int | None = None,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        residual: bool = False,
        router: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_tokens_q, self.num_tokens_kv, self.residual = num_tokens_q, num_tokens_kv, residual
        self.source = AskingTokens(dim, **made) if query_source else None
        self.heavy = RoutedBranch(
            dim, num_routed_kv=kv_routing_tokens, stand_in=stand_in, router=router,
            kv_router={"block_size": route_block_size}, dim_head=dim_head, heads=heads,
            multiply_keys_by_score=multiply_keys_by_score, multiply_queries_by_score=multiply_queries_by_score, **made,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        num_tokens_q: Count | None = None,
        num_tokens_kv: Count | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: ``[B, n, d]``.
            context: ``[B, m, d]``.
            mask: ``[B, n]`` bool, False for queries that are never chosen.
            context_mask: ``[B, m]`` bool, False for tokens that are never chosen.
            num_tokens_q: Instead of the module's own; a tensor ``[B]`` is cut to the module's own if that is an int.
            num_tokens_kv: In the same way.

        Returns:
            ``[B, n, d]``.

        Raises:
            InputError: As ``Router.forward``.
        """
        (num_q, most_q), (num_kv, most_kv) = (
            count(num_tokens_q, self.num_tokens_q),
            count(num_tokens_kv, self.num_tokens_kv),
        )
        tokens = None
        if self.source is not None:
            tokens = self.source(self.heavy.kv_router.routing_token, x, mask)
        return self.heavy(
            x, context, x if self.residual else torch.zeros_like(x), num_q, num_kv,
            mask=mask, context_mask=context_mask, most=(most_q, most_kv), routing_tokens=tokens,
        )  # fmt: skip


class AskingTokens(nn.Module):
    """Routing tokens that look at a sequence before they route another, by one head of attention."""

    def __init__(self, dim: int, **made: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **made)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False, **made)
        self.to_out = nn.Linear(dim, dim, bias=False, **made)

    def forward(self, tokens: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[R, d]`` and ``[B, n, d]`` to ``[B, R, d]``."""
        k, v = self.to_kv(self.norm(x)).chunk(2, -1)
        q = repeat(tokens, "r d -> b r d", b=x.shape[0])
        bias = None
        if mask is not None:  # finite, as a sample may be masked whole
            bias = torch.zeros_like(mask, dtype=k.dtype).masked_fill(~mask, torch.finfo(k.dtype).min / 2)[:, None]
        seen = F.scaled_dot_product_attention(q.to(k.dtype), k, v, bias)
        return q + self.to_out(seen) * q.shape[-1] ** -0.5
