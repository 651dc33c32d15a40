"""Attention whose older keys and values are what their codes stand for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.graph.leaves import own
from rpqfx.kv.headcoder import HeadCoder
from rpqfx.kv.policy import KVPolicy
from rpqfx.kv.rotary import Rotary, turn, turn_back
from rpqfx.kv.store import LayerStore
from rpqfx.kv.watch import Watch


@own
class KVAttention(nn.Module):
    """Scaled dot-product attention as it is when the cache holds codes.

    Takes what ``torch.nn.functional.scaled_dot_product_attention`` takes. A query sees the first ``sinks`` tokens, and
    the last ``window`` before it, as they are; those between are coded and decoded. That is what a cache gives that
    was filled token by token, so whole sequences can be evaluated, and trained, as they will be generated: gradients
    go straight through the codes, and ``loss`` holds the quantisers' loss of the last call in training.

    Its coders, ``keys`` and ``values``, come with calibration.

    Args:
        policy: Window, sinks and chunk; ``keys`` says on which side of the rotary embedding keys are coded.
        name: Of the module whose attention it is, for messages.
    """

    keys: HeadCoder
    values: HeadCoder

    def __init__(self, policy: KVPolicy, name: str) -> None:
        super().__init__()
        self.policy, self.name = policy, name
        self.rotary: Rotary | None = None
        self.store: LayerStore | None = None
        self.watch: Watch | None = None
        self.loss: Tensor | None = None
        self.running = False  # inside its own call of attention

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: nothing of a call."""
        return {**self.__dict__, "rotary": None, "store": None, "watch": None, "loss": None}

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"window={self.policy.window}, sinks={self.policy.sinks}, keys={self.policy.keys!r}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """See ``torch.nn.functional.scaled_dot_product_attention``.

        Args:
            query: ``[B, H_q, T_q, D]``.
            key: ``[B, H, T, D]``.
            value: ``[B, H, T, D_v]``.
            attn_mask: Boolean, or added to scores.
            dropout_p: Of attention weights.
            is_causal: Whether a query sees no later keys.
            scale: Of scores.
            enable_gqa: Whether several query heads share one of keys.

        Raises:
            InputError: If heads are not those of the coders.
        """
        options = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
        if self.watch is not None:
            key, value = self.watch.see(key, value, self._angles())
            return self._attend(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options)
        self._check(key, value)
        if self.store is not None:
            empty = self.store.total == 0
            self.append(self.store, key, value)
            if not empty:
                return self.store.attend(query, scale, attn_mask)
        near = self._near(query.shape[-2], key.shape[-2], query.device)
        near_mask, far_mask = _masks(near, attn_mask, is_causal, query)
        old_keys, key_loss = self.recoded_keys(key)
        old_values, value_loss = self.values(value)
        self.loss = key_loss + value_loss if self.training else None
        keys, values = torch.cat([key, old_keys], -2), torch.cat([value, old_values], -2)
        return self._attend(query, keys, values, attn_mask=torch.cat([near_mask, far_mask], -1), **options)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.running = True
        try:
            return F.scaled_dot_product_attention(query, key, value, **options)
        finally:
            self.running = False

    def append(self, store: LayerStore, key: Tensor, value: Tensor) -> None:
        """Puts the next tokens into a cache.

        Args:
            store: Of this layer.
            key: ``[B, H, T, D]``.
            value: ``[B, H, T, D_v]``.
        """
        store.append(key, value, self._angles())

    def recoded_keys(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Keys after coding, and the loss; on the side of the rotary embedding that the policy names."""
        angles = self._angles()
        if angles is None:
            return self.keys(key)
        coded, loss = self.keys(turn_back(key, angles))
        return turn(coded, angles), loss

    def _angles(self) -> Rotary | None:
        if self.policy.keys == "after":
            return None
        if self.rotary is None and self.policy.keys == "before":
            raise InputError(f"{self.name} shows no rotary embedding; hold its keys after it (KVPolicy(keys='after'))")
        return self.rotary

    def _check(self, key: Tensor, value: Tensor) -> None:
        for what, x, coder in (("keys", key, self.keys), ("values", value, self.values)):
            if x.dim() != 4 or x.shape[1] != coder.heads or x.shape[3] != coder.dim:
                raise InputError(
                    f"{self.name}: {what} are [B, {coder.heads}, T, {coder.dim}] as in calibration, "
                    f"got {list(x.shape)}; quantise the model again with batches like these"
                )

    def _near(self, queries: int, tokens: int, device: torch.device) -> Tensor:
        """``[T_q, T]``: which keys a query finds as they are. The queries are the last tokens."""
        policy = self.policy
        seen = torch.arange(tokens - queries + 1, tokens + 1, device=device)[:, None]  # tokens so far
        token = torch.arange(tokens, device=device)
        coded = policy.sinks + (seen - policy.sinks - policy.window).clamp_min(0) // policy.chunk * policy.chunk
        return (token < policy.sinks) | (token >= coded)


def attentions(model: nn.Module) -> dict[str, KVAttention]:
    """The attention on codes of a model, by the name of the module it serves."""
    return {core.name: core for core in model.modules() if isinstance(core, KVAttention)}


def _masks(near: Tensor, mask: Tensor | None, is_causal: bool, query: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of the keys as they are, and of the coded ones."""
    queries, tokens = near.shape
    far = ~near
    if is_causal:  # torch aligns it to the upper left
        seen = torch.ones(queries, tokens, dtype=torch.bool, device=near.device).tril()
        near, far = near & seen, far & seen
    if mask is None:
        return near, far
    if mask.dtype == torch.bool:
        return near & mask, far & mask
    low = torch.full((), float("-inf"), dtype=mask.dtype, device=mask.device)
    return torch.where(near, mask, low), torch.where(far, mask, low)
