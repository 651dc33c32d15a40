"""RoutedTransformerBlock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rpqfx.routing.attention import AttentionOptions, RoutedAttention
from rpqfx.routing.feedforward import RoutedFeedForward
from rpqfx.routing.router import Count
from rpqfx.validation.spelling import defaults_of, show_options


class RoutedTransformerBlock(nn.Module):
    """``RoutedAttention``, then ``RoutedFeedForward``, each added to its input. A stack of these is CoLT5's encoder.

    Args:
        dim: Width of tokens.
        num_heavy_attn_tokens_q: How many queries of each sample are chosen; a float is a share of its length.
        num_heavy_attn_tokens_kv: How many keys and values.
        num_heavy_ff_tokens: How many tokens for the heavy feed-forward block.
        light_ff_mult: Hidden width of the light feed-forward block over ``dim``.
        heavy_ff_mult: Hidden width of the heavy one over ``dim``.
        router: Arguments of each ``Router``.
        device: Where the tensors go.
        dtype: Of the Parameters.
        **attention: Further arguments of ``RoutedAttention``.

    Raises:
        SpecError: If a number makes no sense.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_attn_tokens_q: int | float,
        num_heavy_attn_tokens_kv: int | float,
        num_heavy_ff_tokens: int | float,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
        router: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Unpack[AttentionOptions],
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"residual": True, "router": router, "device": device, "dtype": dtype}
        self.attention = RoutedAttention(
            dim,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            **attention,
            **made,
        )
        self.feed_forward = RoutedFeedForward(
            dim, num_heavy_tokens=num_heavy_ff_tokens, light_ff_mult=light_ff_mult, heavy_ff_mult=heavy_ff_mult, **made
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_heavy_attn_tokens_q: Count | None = None,
        num_heavy_attn_tokens_kv: Count | None = None,
        num_heavy_ff_tokens: Count | None = None,
    ) -> Tensor:
        """The block.

        Args:
            x: ``[B, n, d]``.
            mask: ``[B, n]`` bool, False for tokens that none may see and that are never chosen.
            num_heavy_attn_tokens_q: Instead of the module's own; a tensor ``[B]`` is cut to the module's own if that
                is an int.
            num_heavy_attn_tokens_kv: In the same way.
            num_heavy_ff_tokens: In the same way.

        Returns:
            ``[B, n, d]``.

        Raises:
            InputError: As ``Router.forward``.
        """
        x = self.attention(x, mask, num_heavy_attn_tokens_q, num_heavy_attn_tokens_kv)
        return self.feed_forward(x, mask, num_heavy_ff_tokens)


show_options(RoutedTransformerBlock.__init__, AttentionOptions, defaults_of(RoutedAttention))
