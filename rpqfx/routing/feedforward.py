"""RoutedFeedForward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError, SpecError
from rpqfx.routing.causal import choose_by_the_past
from rpqfx.routing.gather import put, take
from rpqfx.routing.heavy_branch import count
from rpqfx.routing.router import Count, Router


class RoutedFeedForward(nn.Module):
    """A light feed-forward block for all tokens, and a heavy one added for those that the router chooses.

    CoLT5 (Ainslie et al., 2023, arXiv:2303.09752), section 3.1:
    ``y_i = light(x_i) + score_i * heavy(x_i)``, the score 0 for tokens not chosen.

    Args:
        dim: Width of tokens.
        num_heavy_tokens: How many tokens of each sample are chosen; a float is a share of its length.
        light_ff_mult: Hidden width of the light block over ``dim``.
        heavy_ff_mult: Hidden width of the heavy block over ``dim``.
        window: Cut the sequence into windows of this many tokens and choose in each by the one before, as
            ``RoutedAutoregressiveAttention`` chooses queries: nothing depends on later tokens. The number of heavy
            tokens is then that of each window, at most, and the first window has none.
        residual: Whether the input is added to the result.
        router: Arguments of ``Router``.
        device: Where the tensors go.
        dtype: Of the Parameters.

    Raises:
        SpecError: As ``Router``, or if a window has no length or a share of tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens: int | float,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
        window: int | None = None,
        residual: bool = False,
        router: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if window is not None and (window < 1 or isinstance(num_heavy_tokens, float)):
            raise SpecError(
                f"a window is at least 1 long and its heavy tokens are an int; got {window}, {num_heavy_tokens}"
            )
        self.num_heavy_tokens, self.window, self.residual = num_heavy_tokens, window, residual
        self.router = Router(dim, **dict(router or {}), **made)
        self.light, self.heavy = feed_forward(dim, light_ff_mult, **made), feed_forward(dim, heavy_ff_mult, **made)

    def forward(self, x: Tensor, mask: Tensor | None = None, num_heavy_tokens: Count | None = None) -> Tensor:
        """Both branches.

        Args:
            x: ``[B, n, d]``.
            mask: ``[B, n]`` bool, False for tokens that are never chosen.
            num_heavy_tokens: Instead of the module's own; a tensor ``[B]`` is cut to the module's own if that is an
                int.

        Returns:
            ``[B, n, d]``.

        Raises:
            InputError: As ``Router.forward``.
        """
        plus = x if self.residual else None
        if self.window is None:
            number, most = count(num_heavy_tokens, self.num_heavy_tokens)
            chosen = self.router(x, number, mask=mask, most=most)
        elif x.shape[1] <= self.window:
            return self.light(x) if plus is None else self.light(x) + plus
        else:
            if num_heavy_tokens is not None:
                raise InputError(
                    "with a window the number of heavy tokens is the module's own; leave it out of the call"
                )
            chosen = choose_by_the_past(self.router, x, int(self.num_heavy_tokens), self.window, mask)
        heavy = self.heavy(take(x, chosen)[:, 0])
        heavy = heavy * chosen.scores[:, 0, :, None].to(heavy.dtype)
        return put(self.light(x), chosen, heavy, plus=plus)


def feed_forward(dim: int, mult: float, **made: Any) -> nn.Sequential:
    """Norm, linear, GELU, linear.

    Args:
        dim: Width of tokens.
        mult: Hidden width over ``dim``.
        **made: Device and dtype.

    Returns:
        The block.
    """
    hidden = int(dim * mult)
    return nn.Sequential(
        nn.LayerNorm(dim, **made), nn.Linear(dim, hidden, **made), nn.GELU(), nn.Linear(hidden, dim, **made)
    )
