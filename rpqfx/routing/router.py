"""The router: which tokens of each sample a heavy branch is given, and with what scores.

Axes, here and in the blocks: B samples, R routing tokens, n tokens, k slots for chosen tokens, d features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from rpqfx.errors import InputError, SpecError
from rpqfx.routing.exact import exact_scores
from rpqfx.routing.iterative import coordinate_descent, cumulative_softmax, sinkhorn
from rpqfx.routing.top_k import check_ratio, straight_through

Count = int | float | Tensor

METHODS: Mapping[str, Callable[..., Tensor]] = {
    "exact": exact_scores,
    "coordinate_descent": coordinate_descent,
    "sinkhorn": sinkhorn,
    "cumulative_softmax": cumulative_softmax,
    "random": exact_scores,
}


class Choice(NamedTuple):
    """The tokens that were chosen.

    Attributes:
        indices: ``[B, R, k]``, each row without a token twice but where masked; or None for all tokens in their order.
        scores: ``[B, R, k]``, 0 where masked.
        mask: ``[B, R, k]`` bool, False for slots without a token of their own; or None if every slot has one.
    """

    indices: Tensor | None
    scores: Tensor
    mask: Tensor | None


class Router(nn.Module):
    """Chooses tokens by their dot product with a trained routing token.

    After CoLT5 (Ainslie et al., 2023, arXiv:2303.09752), section 3. The scores multiply what the heavy branch makes of
    a token, which is how the choice is trained.

    Args:
        dim: Width of tokens.
        num_routing_tokens: How many choices are made, each by a routing token of its own.
        method: What makes scores of dot products: ``"exact"``, or ``"coordinate_descent"``, ``"sinkhorn"`` or
            ``"cumulative_softmax"``; or ``"random"``, a control that chooses by lot.
        eps: How soft the choice is.
        fetch_ratio: Scores sum to the number of tokens times this, so that more than are chosen learn.
        straight_through: Whether scores are 1 forward, and themselves only in the backward pass.
        cosine: Whether tokens and routing tokens are brought to length 1 first, and their product times
            ``cosine_scale``.
        cosine_scale: See above.
        block_size: Cut rows into blocks of this many tokens and choose within each: an equal share for each block.
        per_block: Whether the number of tokens is that of each block rather than their sum.
        learned: Whether the routing tokens are Parameters. Otherwise each call is given its own.
        method_kwargs: What else the method takes, ``{"n_iters": 20, "eps_init": 4.0}`` say.
        device: Where the tensors go.
        dtype: Of the routing tokens.

    Raises:
        SpecError: If a number makes no sense or there is no such method.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_routing_tokens: int = 1,
        method: str = "exact",
        eps: float = 0.1,
        fetch_ratio: float = 9 / 8,
        straight_through: bool = True,
        cosine: bool = False,
        cosine_scale: float = 8.0,
        block_size: int | None = None,
        per_block: bool = False,
        learned: bool = True,
        method_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_ratio(fetch_ratio)
        if method not in METHODS:
            raise SpecError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
        if num_routing_tokens < 1 or (block_size is not None and block_size < 1):
            raise SpecError("num_routing_tokens and block_size must be at least 1")
        if per_block and block_size is None:
            raise SpecError("per_block=True counts tokens in each block; give block_size")
        self.dim, self.num_routing_tokens = dim, num_routing_tokens
        self.method, self.eps, self.fetch_ratio = method, eps, fetch_ratio
        self.straight_through = straight_through
        self.cosine, self.cosine_scale = cosine, cosine_scale
        self.block_size, self.per_block = block_size, per_block
        self.method_kwargs = dict(method_kwargs or {})
        self.routing_token: nn.Parameter | None = None
        if learned:
            self.routing_token = nn.Parameter(torch.empty(num_routing_tokens, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the routing tokens so that dot products with tokens of unit variance have unit variance."""
        if self.routing_token is not None:
            nn.init.normal_(self.routing_token, std=self.dim**-0.5)

    def extra_repr(self) -> str:
        """What is not the default."""
        said = [f"{self.dim}, method={self.method!r}, eps={self.eps}"]
        said += [f"num_routing_tokens={self.num_routing_tokens}"] if self.num_routing_tokens > 1 else []
        said += [f"block_size={self.block_size}"] if self.block_size else []
        return ", ".join(said)

    def logits(self, x: Tensor, routing_tokens: Tensor | None = None) -> Tensor:
        """The dot products.

        Args:
            x: ``[B, n, d]``.
            routing_tokens: ``[B, R, d]``, instead of the learned ones.

        Returns:
            ``[B, R, n]``, float32 or float64; autocast has no say in it.

        Raises:
            InputError: If widths differ, or there is no routing token.
        """
        tokens = self.routing_token if routing_tokens is None else routing_tokens
        if tokens is None:
            raise InputError("this router has no learned routing token (learned=False); pass routing_tokens [B, R, d]")
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise InputError(f"expected tokens [B, n, {self.dim}], got {list(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            tokens = tokens.to(x.dtype)
            if self.cosine:
                x, tokens = F.normalize(x, dim=-1), F.normalize(tokens, dim=-1) * self.cosine_scale
            s = x @ tokens.mT
            return rearrange(s if s.dtype == torch.float64 else s.float(), "b n r -> b r n")

    def forward(
        self,
        x: Tensor,
        num_tokens: Count,
        *,
        mask: Tensor | None = None,
        routing_tokens: Tensor | None = None,
        most: int | None = None,
    ) -> Choice:
        """Chooses tokens.

        Args:
            x: ``[B, n, d]``.
            num_tokens: How many of each sample: an int; a float for a share of each sample's unmasked tokens, rounded
                up; or an integer tensor ``[B]``.
            mask: ``[B, n]`` bool, False for tokens that cannot be chosen.
            routing_tokens: ``[B, R, d]``, instead of the learned ones.
            most: How many slots a tensor ``num_tokens`` has; more are not chosen. Left out, as many as there are
                tokens.

        Returns:
            The choice. Where there are as many slots as tokens, it is all tokens, in their order, with scores 1.

        Raises:
            InputError: If a tensor does not fit.
            SpecError: If a number is not above zero, or a share above 1.
        """
        batch, n = x.shape[:2]
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise InputError(f"expected a bool mask {[batch, n]}, got {list(mask.shape)} of {mask.dtype}")
        size = n if self.block_size is None else min(self.block_size, n)
        blocks = -(-n // size)
        k, slots = _slots(num_tokens, n, size, 1 if self.per_block else blocks, most)
        if slots >= size and not isinstance(k, Tensor):
            return _everyone(batch, self.num_routing_tokens, n, mask, x)
        s = self.logits(x, routing_tokens)
        if self.method == "random":
            s = torch.rand_like(s)
        kept = None if mask is None else mask[:, None].expand_as(s)
        if blocks * size != n:
            kept = torch.ones_like(s, dtype=torch.bool) if kept is None else kept
            s, kept = (F.pad(t, (0, blocks * size - n)) for t in (s, kept))
        s = rearrange(s, "b r (c w) -> b r c w", w=size)
        kept = None if kept is None else rearrange(kept, "b r (c w) -> b r c w", w=size)
        if isinstance(num_tokens, float) and kept is not None:
            k = (kept.sum(-1) * num_tokens - 1e-4).ceil().clamp_min(0)
        elif isinstance(k, Tensor):
            k = repeat(k, "b -> b r c", r=s.shape[1], c=blocks)
        return self._choose(s, kept, k, slots, n)

    def _choose(self, s: Tensor, mask: Tensor | None, k: float | Tensor, slots: int, n: int) -> Choice:
        """``s`` and mask ``[B, R, c, w]``, ``k`` a number or ``[B, R, c]``."""
        size = s.shape[-1]
        fetched = (k * self.fetch_ratio).clamp(max=size) if isinstance(k, Tensor) else min(k * self.fetch_ratio, size)
        method = functools.partial(METHODS[self.method], **self.method_kwargs)
        if METHODS[self.method] is exact_scores and isinstance(k, Tensor):
            method = functools.partial(method, most=math.ceil(slots * self.fetch_ratio))
        scores = method(s, fetched, eps=self.eps, mask=mask)
        indices = (s if mask is None else s.masked_fill(~mask, -math.inf)).topk(slots).indices
        scores = scores.gather(-1, indices)
        kept = None if mask is None else mask.gather(-1, indices)
        if isinstance(k, Tensor):
            ranked = torch.arange(slots, device=s.device) < k[..., None]
            kept = ranked if kept is None else kept & ranked
        if self.straight_through:
            scores = straight_through(scores, kept)
        elif kept is not None:
            scores = scores.masked_fill(~kept, 0.0)
        if s.shape[2] > 1:
            start = torch.arange(s.shape[2], device=s.device) * size
            indices = (indices + start[:, None]).clamp(
                max=n - 1
            )  # the last block's masked slots may point past the end
        flat = [None if t is None else rearrange(t, "b r c k -> b r (c k)") for t in (indices, scores, kept)]
        return Choice(*flat)  # type: ignore[arg-type]


def _slots(num_tokens: Count, n: int, size: int, blocks: int, most: int | None) -> tuple[float | Tensor, int]:
    """How many are chosen of each block, and the slots that each has."""
    if isinstance(num_tokens, Tensor):
        if num_tokens.dim() != 1:
            raise InputError(
                f"num_tokens as a tensor has one number for each sample, [B]; got {list(num_tokens.shape)}"
            )
        slots = size if most is None else min(size, math.ceil(most / blocks))
        return (num_tokens / blocks).clamp(0, slots), slots
    if isinstance(num_tokens, float):
        if not 0 < num_tokens <= 1:
            raise SpecError(
                f"a float is a share of the tokens, above 0 and at most 1; got {num_tokens}: an int counts them"
            )
        slots = math.ceil(size * num_tokens - 1e-4)
        return slots, slots
    if num_tokens < 1:
        raise SpecError(f"at least one token must be chosen, got {num_tokens}")
    return min(num_tokens / blocks, size), min(-(-num_tokens // blocks), size)


def _everyone(batch: int, routes: int, n: int, mask: Tensor | None, x: Tensor) -> Choice:
    kept = None if mask is None else repeat(mask, "b n -> b r n", r=routes)
    if kept is not None:
        return Choice(None, kept.to(torch.float64 if x.dtype == torch.float64 else torch.float32), kept)
    return Choice(
        None, x.new_ones(batch, routes, n, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32), None
    )
