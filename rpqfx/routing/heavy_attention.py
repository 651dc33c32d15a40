"""Attention of chosen queries to chosen keys and values: the heavy branch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from rpqfx.errors import SpecError


class HeavyAttention(nn.Module):
    """Attention whose heads fall into groups, each with keys and values of its own.

    A trained key and value that no mask hides stands before the others, so that a query with nothing to see gets
    something.

    Args:
        dim: Width of tokens.
        dim_head: Width of a head.
        heads: How many.
        groups: Groups of heads; divides ``heads``.
        rotary: Whether queries and keys are turned by their positions (Su et al., 2021, arXiv:2104.09864).
        multiply_keys_by_score: Whether scores scale keys too, not only values.
        multiply_queries_by_score: Whether scores scale queries.
        device: Where the tensors go.
        dtype: Of the Parameters.

    Raises:
        SpecError: If the groups do not divide the heads, or a rotary head's width is odd.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int = 64,
        heads: int = 8,
        groups: int = 1,
        rotary: bool = False,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups < 1 or heads % groups:
            raise SpecError(f"{heads} heads cannot be shared evenly by {groups} routed sets of keys and values")
        if rotary and dim_head % 2:
            raise SpecError(f"rotary positions turn pairs of features; dim_head must be even, got {dim_head}")
        self.heads, self.groups, self.rotary = heads, groups, rotary
        self.multiply_keys_by_score = multiply_keys_by_score
        self.multiply_queries_by_score = multiply_queries_by_score
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = heads * dim_head
        self.norm = nn.LayerNorm(dim, **made)
        self.to_q = nn.Linear(dim, inner, bias=False, **made)
        self.to_kv = nn.ModuleList([nn.Linear(dim, 2 * inner // groups, bias=False, **made) for _ in range(groups)])
        self.null_kv = nn.Parameter(torch.empty(2, heads, dim_head, **made))
        self.to_out = nn.Linear(inner, dim, bias=False, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the trained key and value; the layers have drawn themselves."""
        nn.init.normal_(self.null_kv)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        scores_q: Tensor,
        scores_kv: Tensor,
        mask: Tensor | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: Queries, ``[B, i, d]``.
            context: For each group, ``[B, R, j, d]``.
            scores_q: ``[B, i]``; they scale the result.
            scores_kv: ``[B, R, j]``; they scale the values.
            mask: ``[B, R, j]`` or ``[B, R, i, j]`` bool, False where a query may not look.
            positions: Of queries ``[B, i]`` and keys ``[B, R, j]``, for rotary.

        Returns:
            ``[B, i, d]``.
        """
        q = rearrange(self.to_q(self.norm(x)), "b i (h e) -> b h i e", h=self.heads)
        sets = [to_kv(some) for to_kv, some in zip(self.to_kv, self.norm(context).unbind(1), strict=True)]
        k, v = rearrange(torch.stack(sets, 1), "b r j (two h e) -> two b r h j e", two=2, h=self.heads // self.groups)
        weights = scores_kv.to(v.dtype)[:, :, None, :, None]
        k, v = k * weights if self.multiply_keys_by_score else k, v * weights
        if self.multiply_queries_by_score:
            q = q * scores_q.to(q.dtype)[:, None, :, None]
        if self.rotary and positions is not None:
            q, k = rotate(q, positions[0][:, None]), rotate(k, positions[1][:, :, None])
        k, v = (
            torch.cat(
                [repeat(null, "h e -> b h 1 e", b=x.shape[0]).to(t.dtype), rearrange(t, "b r h j e -> b (r h) j e")], 2
            )
            for null, t in zip(self.null_kv, (k, v), strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v, None if mask is None else self._mask(mask))
        out = self.to_out(rearrange(out, "b h i e -> b i (h e)"))
        return out * scores_q.to(out.dtype)[..., None]

    def _mask(self, mask: Tensor) -> Tensor:
        """``[B, h, 1 or i, 1 + j]``."""
        mask = mask[:, :, None] if mask.dim() == 3 else mask
        return F.pad(mask, (1, 0), value=True).repeat_interleave(self.heads // mask.shape[1], 1)


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Turns pairs of features by angles that grow with the position, each pair at a speed of its own.

    Args:
        x: ``[..., n, e]``, ``e`` even.
        positions: ``[..., n]``.
        base: Of the slowest pair's speed.

    Returns:
        ``[..., n, e]``: dot products of two such depend on the difference of their positions.
    """
    half = x.shape[-1] // 2
    speeds = base ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[..., None] * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
