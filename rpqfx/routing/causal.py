"""RoutedAutoregressiveAttention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from rpqfx.errors import SpecError
from rpqfx.routing.exact import exact_offset
from rpqfx.routing.gather import put, take
from rpqfx.routing.heavy_branch import RoutedBranch
from rpqfx.routing.left_padding import moved, moved_back, padding_in_front, places
from rpqfx.routing.router import Choice, Router
from rpqfx.routing.top_k import straight_through
from rpqfx.routing.windows import LocalAttention


class RoutedAutoregressiveAttention(nn.Module):
    """Routed attention in which nothing depends on what comes later, neither what is computed nor what is chosen.

    The sequence is cut into windows. The light branch is causal local attention. For the heavy branch,

    - keys and values are chosen within each window and seen from later windows only;
    - a query is chosen if its dot product with the routing token reaches the least one among the chosen of the window
      before, while its own window has places left: in order of position, so that no later token can take its place.
      Its score is that which the window before would give it.

    Both choices are final when their window is complete: a sequence that grows only adds to them. The first window has
    the light branch alone.

    Args:
        dim: Width of tokens.
        num_heavy_tokens_q: Queries chosen in each window at most.
        num_heavy_tokens_kv: Keys and values chosen in each window.
        num_routed_kv: Sets of keys and values, each chosen by a routing token of its own for a group of heads.
        light_dim_head: Width of a head of the light branch.
        light_heads: How many.
        light_window_size: Blocks of the light branch; a token sees its own up to itself, and the one before.
        heavy_window_size: Windows of the heavy branch, ``light_window_size`` if left out.
        heavy_dim_head: Width of a head of the heavy branch.
        heavy_heads: How many.
        stand_in: Whether tokens that were not chosen get a trained vector, beside what the light branch gives them.
        rotary: Whether the heavy branch knows positions.
        multiply_keys_by_score: Whether scores scale keys too, not only values.
        multiply_queries_by_score: Whether scores scale queries.
        residual: Whether the input is added to the result.
        router: Arguments of both ``Router``; the method is ``"exact"``.
        device: Where the tensors go.
        dtype: Of the Parameters.

    Raises:
        SpecError: If a number makes no sense, or a heavy window is longer than a light one, so that tokens would see
            neither.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens_q: int,
        num_heavy_tokens_kv: int,
        num_routed_kv: int = 1,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_window_size: int | None = None,
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
        window = light_window_size if heavy_window_size is None else heavy_window_size
        if not 1 <= window <= light_window_size:
            raise SpecError(f"heavy_window_size is from 1 to light_window_size ({light_window_size}), got {window}")
        if dict(router or {}).get("method", "exact") != "exact":
            raise SpecError("only the exact router has the offset by which the next window is scored; leave out method")
        for name, number in (("num_heavy_tokens_q", num_heavy_tokens_q), ("num_heavy_tokens_kv", num_heavy_tokens_kv)):
            if isinstance(number, float) or number < 1:
                raise SpecError(f"{name} counts tokens of each window and must be an int of at least 1, got {number}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.window, self.residual = window, residual
        self.num_heavy_tokens_q, self.num_heavy_tokens_kv = num_heavy_tokens_q, num_heavy_tokens_kv
        size: dict[str, Any] = {"dim_head": light_dim_head, "heads": light_heads, "window_size": light_window_size}
        self.light = LocalAttention(dim, causal=True, **size, **made)
        self.heavy = RoutedBranch(
            dim, num_routed_kv=num_routed_kv, stand_in=stand_in, router=router,
            kv_router={"block_size": window, "per_block": True}, dim_head=heavy_dim_head, heads=heavy_heads,
            rotary=rotary, multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=multiply_queries_by_score, **made,
        )  # fmt: skip

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Both branches.

        Windows begin at a sample's first token that may be seen, wherever padding puts it.

        Args:
            x: ``[B, n, d]``.
            mask: ``[B, n]`` bool, False for tokens that none may see and that are never chosen.

        Returns:
            ``[B, n, d]``; each token's depends on it and those before it.

        Raises:
            InputError: As ``Router.forward``.
        """
        light = self.light(x, mask)
        if mask is None:
            return self._with_heavy(light, x, None)
        at = places(padding_in_front(mask), x.shape[1])
        return moved_back(self._with_heavy(moved(light, at), moved(x, at), moved(mask, at)), at)

    def _with_heavy(self, out: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        plus = x if self.residual else None
        whole = (x.shape[1] - 1) // self.window  # windows that have another after them
        past = whole * self.window if x.shape[0] else 0
        if past <= 0:
            out = out if plus is None else out + plus
            return out if self.heavy.stand_in is None else out + self.heavy.stand_in.to(out.dtype)
        heavy = self.heavy
        queries = choose_by_the_past(heavy.q_router, x, self.num_heavy_tokens_q, self.window, mask)
        before, kept = x[:, :past], None if mask is None else mask[:, :past]
        keys = heavy.kv_router(before, self.num_heavy_tokens_kv, mask=kept)
        at = keys.indices
        if at is None:
            at = repeat(torch.arange(past, device=x.device), "n -> b r n", b=x.shape[0], r=keys.scores.shape[1])
        assert queries.indices is not None
        seen = at[:, :, None] // self.window < queries.indices[..., None] // self.window
        made = heavy.attention(
            take(x, queries)[:, 0],
            take(before, keys),
            scores_q=queries.scores[:, 0],
            scores_kv=keys.scores,
            mask=seen if keys.mask is None else seen & keys.mask[:, :, None],
            positions=(queries.indices[:, 0], at),
        )
        return put(out, queries, made, heavy.stand_in, plus)


def choose_by_the_past(
    router: Router, x: Tensor, num_tokens: int, window: int, mask: Tensor | None = None, *, fill: bool = False
) -> Choice:
    """Chooses tokens of each window, but the first, by what the window before would have chosen.

    Args:
        router: Whose routing token, eps, fetch_ratio and straight_through hold.
        x: ``[B, n, d]``, more than one window.
        num_tokens: At most how many of each window.
        window: Its length.
        mask: ``[B, n]`` bool.
        fill: Whether the last tokens of a window take the places that are left.

    Returns:
        A choice of ``num_tokens`` slots for each window but the first, in the order of tokens.
    """
    batch, n = x.shape[:2]
    kept = torch.ones(batch, n, dtype=torch.bool, device=x.device) if mask is None else mask
    s = F.pad(router.logits(x)[:, 0], (0, -n % window))
    s, kept = (rearrange(t, "b (c w) -> b c w", w=window) for t in (s, F.pad(kept, (0, -n % window))))
    slots = min(num_tokens, window)
    past, seen = s[:, :-1], kept[:, :-1]
    offset = exact_offset(past, min(slots * router.fetch_ratio, window), eps=router.eps, mask=seen)
    s, kept = s[:, 1:], kept[:, 1:]
    if slots < window:
        least = past.detach().masked_fill(~seen, -torch.inf).topk(slots).values[..., -1:]
        kept = _in_turn(kept & (s >= least), slots, fill) & kept
    line = torch.arange(window, device=x.device)
    places = torch.where(kept, line, window).sort(-1).values[..., :slots]
    taken = places < window
    places = places.clamp(max=window - 1)
    scores = ((s + offset[..., None]) / router.eps).clamp(max=0).exp().gather(-1, places)
    scores = straight_through(scores, taken) if router.straight_through else scores.masked_fill(~taken, 0.0)
    start = window * torch.arange(1, s.shape[1] + 1, device=x.device)
    indices = (places + start[:, None]).clamp(max=n - 1)
    flat = (rearrange(t, "b c k -> b 1 (c k)") for t in (indices, scores, taken))
    return Choice(*flat)


def _in_turn(wanted: Tensor, slots: int, fill: bool) -> Tensor:
    """``[..., w]`` bool: the first ``slots`` that are wanted, and at the end whoever is needed to fill them.

    How many are taken up to a token, and so whether it is, follows from what is wanted up to there.
    """
    taken = wanted.cumsum(-1).clamp(max=slots)
    if fill:
        after = torch.arange(wanted.shape[-1], device=wanted.device).flip(-1)
        taken = torch.maximum(taken, slots - after)
    return F.pad(taken, (1, 0)).diff(dim=-1) > 0
