"""RoutedImageAttention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from rpqfx.errors import InputError, SpecError
from rpqfx.routing.heavy_branch import RoutedBranch, count
from rpqfx.routing.router import Count


class WindowAttention(nn.Module):
    """Attention within square windows of a feature map, ``[B, H, W, d]`` to the same.

    Args:
        dim: Width of tokens.
        dim_head: Width of a head.
        heads: How many.
        window_size: Height and width of a window.
        device: Where the tensors go.
        dtype: Of the Parameters.

    Raises:
        SpecError: If the window is empty.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int = 64,
        heads: int = 8,
        window_size: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if window_size < 1:
            raise SpecError(f"window_size must be at least 1, got {window_size}")
        self.heads, self.window_size = heads, window_size
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, device=device, dtype=dtype)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mask ``[B, H, W]`` is False for tokens that none may see."""
        batch, height, width, _ = x.shape
        size = self.window_size
        down, across = -height % size, -width % size
        if (down or across) and mask is None:
            mask = torch.ones(batch, height, width, dtype=torch.bool, device=x.device)
        x = F.pad(x, (0, 0, 0, across, 0, down))
        cut = {"p": size, "q": size}
        windows = rearrange(
            self.to_qkv(self.norm(x)), "b (i p) (j q) (s h e) -> s (b i j) h (p q) e", s=3, h=self.heads, **cut
        )
        bias = None
        if mask is not None:
            seen = rearrange(F.pad(mask, (0, across, 0, down)), "b (i p) (j q) -> (b i j) 1 1 (p q)", **cut)
            hidden = torch.finfo(windows.dtype).min / 2  # finite, as a window may be masked whole
            bias = torch.zeros_like(seen, dtype=windows.dtype).masked_fill(~seen, hidden)
        out = F.scaled_dot_product_attention(windows[0], windows[1], windows[2], bias)
        out = rearrange(out, "(b i j) h (p q) e -> b (i p) (j q) (h e)", b=batch, i=(height + down) // size, **cut)
        return self.to_out(out[:, :height, :width])


class ImageAttentionOptions(TypedDict, total=False):
    """Further arguments of ``RoutedImageAttention``, as models that are made of it take them."""

    num_routed_kv: int
    light_dim_head: int
    light_heads: int
    light_window_size: int
    heavy_dim_head: int
    heavy_heads: int
    stand_in: bool
    multiply_keys_by_score: bool
    multiply_queries_by_score: bool


class RoutedImageAttention(nn.Module):
    """Light attention within windows of a feature map, and heavy attention among chosen places of all of it.

    Args:
        dim: Channels.
        num_heavy_tokens_q: How many queries of each map are chosen; a float is a share of its places.
        num_heavy_tokens_kv: How many keys and values.
        num_routed_kv: Sets of keys and values, each chosen by a routing token of its own for a group of heads.
        light_dim_head: Width of a head of the light branch.
        light_heads: How many.
        light_window_size: Height and width of its windows.
        heavy_dim_head: Width of a head of the heavy branch.
        heavy_heads: How many.
        channel_first: Whether maps are ``[B, d, H, W]`` rather than ``[B, H, W, d]``.
        stand_in: Whether places that were not chosen get a trained vector, beside what the light branch gives them.
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
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 32,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        channel_first: bool = True,
        stand_in: bool = True,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        residual: bool = False,
        router: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channel_first, self.residual = channel_first, residual
        self.num_heavy_tokens_q, self.num_heavy_tokens_kv = num_heavy_tokens_q, num_heavy_tokens_kv
        size: dict[str, Any] = {"dim_head": light_dim_head, "heads": light_heads, "window_size": light_window_size}
        self.light = WindowAttention(dim, **size, **made)
        self.heavy = RoutedBranch(
            dim, num_routed_kv=num_routed_kv, stand_in=stand_in, router=router, dim_head=heavy_dim_head,
            heads=heavy_heads, multiply_keys_by_score=multiply_keys_by_score,
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
            x: ``[B, d, H, W]``, or ``[B, H, W, d]`` with ``channel_first=False``.
            mask: ``[B, H, W]`` bool, False for places that none may see and that are never chosen.
            num_heavy_tokens_q: Instead of the module's own; a tensor ``[B]`` is cut to the module's own if that is an
                int.
            num_heavy_tokens_kv: In the same way.

        Returns:
            Of the shape of ``x``.

        Raises:
            InputError: If ``x`` is no feature map; as ``Router.forward``.
        """
        if x.dim() != 4:
            raise InputError(f"expected a feature map of four axes, got {list(x.shape)}")
        x = rearrange(x, "b d h w -> b h w d") if self.channel_first else x
        (num_q, most_q), (num_kv, most_kv) = (
            count(num_heavy_tokens_q, self.num_heavy_tokens_q),
            count(num_heavy_tokens_kv, self.num_heavy_tokens_kv),
        )
        light = rearrange(self.light(x, mask), "b h w d -> b (h w) d")
        line, kept = rearrange(x, "b h w d -> b (h w) d"), None if mask is None else rearrange(mask, "b h w -> b (h w)")
        out = self.heavy(
            line, line, light, num_q, num_kv,
            mask=kept, context_mask=kept, most=(most_q, most_kv), plus=line if self.residual else None,
        )  # fmt: skip
        return rearrange(out, "b (h w) d -> b d h w" if self.channel_first else "b (h w) d -> b h w d", h=x.shape[1])
