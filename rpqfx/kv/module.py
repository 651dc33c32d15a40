"""Attention whose older keys and values are decoded from codes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.graph.leaves import own
from rpqfx.graph.written_products import Products
from rpqfx.kv.attention.masks import masks
from rpqfx.kv.attention.rotary import HALVES, Rotary, RotaryConvention, apply_rotary, undo_rotary
from rpqfx.kv.attention.score_options import Changes, biased_attention
from rpqfx.kv.cache.layer import Arrival, LayerStore
from rpqfx.kv.cache.pending import Pending
from rpqfx.kv.call_state import Underway, angles_of, keep_angles
from rpqfx.kv.coder.head_coder import HeadCoder
from rpqfx.kv.coder.statistics import Watch
from rpqfx.kv.first_run import Trial
from rpqfx.kv.policy import KVPolicy
from rpqfx.kv.quantizer.ema_steps import recomputed, step_after_backward
from rpqfx.kv.quantizer.moving_averages import Batch

# Not F.scaled_dot_product_attention: that may be on its way to another module's attention on codes.
_SDPA = torch.ops.aten.scaled_dot_product_attention.default


@own
class KVAttention(nn.Module):
    """Scaled dot-product attention as it is when the cache holds codes.

    Takes what ``torch.nn.functional.scaled_dot_product_attention`` takes. A query sees the first ``sinks`` tokens, and
    the last ``window`` before it, as they are; those between are coded and decoded. That is what a cache gives that
    was filled token by token, so whole sequences can be evaluated, and trained, as they will be generated: gradients
    go straight through the codes, and ``loss`` is the quantisers' loss of this thread's last call in training.

    Its coders, ``keys`` and ``values``, come with calibration.

    Args:
        policy: Window, sinks and chunk; ``keys`` says on which side of the rotary embedding keys are coded.
        name: Of the module whose attention it is, for messages.
        products: Which of the module's products are those of its attention, where it multiplies them out itself.
    """

    keys: HeadCoder
    values: HeadCoder
    rotary_convention: RotaryConvention | None = HALVES  # of models that were pickled before there were others
    products: Products | None = None
    latent: bool = False  # whether keys and values are expanded from what a cache holds

    def __init__(self, policy: KVPolicy, name: str, products: Products | None = None) -> None:
        super().__init__()
        self.policy, self.name, self.products = policy, name, products
        self.watch: Watch | None = None
        self.trial: Trial | None = None
        self.rotary_convention = None
        self.underway = Underway()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for copies and pickles, without the observers of a calibration under way."""
        return {**self.__dict__, "watch": None, "trial": None}

    @property
    def loss(self) -> Tensor | None:
        """The quantisers' loss of this thread's last call in training, or None."""
        return self.underway.loss

    def extra_repr(self) -> str:
        """Returns the text that ``print`` shows."""
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
        changes: Changes | None = None,
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
            changes: A soft cap or sinks that the scores get besides.

        Raises:
            InputError: If heads are not those of the coders, or keys come from another cache than ours.
        """
        if self.latent:
            return self._expanded(query, key, value, attn_mask, is_causal, changes, dropout_p=dropout_p, scale=scale)
        if isinstance(key, Pending):
            self._check_plain(key, value)
            coming = key.coming
            if coming.arrival is None:
                coming.arrival = self.append(coming.store, coming.keys, coming.values)
            if coming.arrival.start or query.shape[-2] != coming.keys.shape[-2]:
                return self.resume(coming.store, coming.arrival, query, attn_mask, scale, changes)
            key, value = coming.keys, coming.values
        options = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
        if self.trial is not None:
            self.trial.see(query, key, value, attn_mask, is_causal)
        made, (angles, query, key) = key, self._in_halves(query, key, angles_of(key))
        if self.trial is not None:
            return _attend(query, key, value, changes, attn_mask=attn_mask, is_causal=is_causal, **options)
        if self.watch is not None:
            key, value = self.watch.see(key, value, angles)
            return _attend(query, key, value, changes, attn_mask=attn_mask, is_causal=is_causal, **options)
        self.check("keys", key)
        self.check("values", value)
        store = self.underway.store
        if store is not None:
            store.adopt(self.keys, self.values)
            arrival = store.append(key, value, angles)
            if arrival.start:
                return store.attend(query, scale, attn_mask, arrival, changes)
        if angles is not None and angles.cos.shape[-2] != key.shape[-2]:
            raise InputError(
                f"{self.name}: {key.shape[-2]} keys came with the angles of {angles.cos.shape[-2]} tokens, so the "
                "others are from a cache that holds no codes, or a trained prefix; pass CodebookCache.for_model(model) "
                "as the cache, and train prompts rather than prefixes"
            )
        if angles is not None:
            keep_angles(made, angles)
        near = self.near(query.shape[-2], key.shape[-2], query.device)
        near_mask, far_mask = masks(near, attn_mask, is_causal, query)
        batches: list[Batch] = []
        old_keys, key_loss = self._recoded(key, angles, batches)
        old_values, value_loss = self.values(value, None, batches)
        if not recomputed():
            self.underway.loss = key_loss + value_loss if self.training else None
            self.underway.recorded = torch.is_grad_enabled()
        keys, values = torch.cat([key, old_keys], -2), torch.cat([value, old_values], -2)
        out = _attend(query, keys, values, changes, attn_mask=torch.cat([near_mask, far_mask], -1), **options)
        return step_after_backward(out, batches) if batches and torch.is_grad_enabled() else out

    def _expanded(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, changes: Changes | None,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        """Returns attention to keys and values that the module made, twice where codes have others to say."""
        near, self.underway.near = self.underway.near, None
        if self.trial is not None:
            self.trial.see(query, key, value, mask, is_causal)
        if near is None:
            return _attend(query, key, value, changes, attn_mask=mask, is_causal=is_causal, **options)
        return _attend(
            query, key, value, changes, attn_mask=torch.cat(masks(near, mask, is_causal, query), -1), **options
        )

    def tokens(self, key: Tensor) -> int:
        """Returns of how many tokens keys are.

        Args:
            key: As attention gets them.
        """
        return key.shape[2] // (1 if self.underway.near is None else 2)

    def append(self, store: LayerStore, key: Tensor, value: Tensor) -> Arrival:
        """Appends the next tokens to a cache.

        Args:
            store: The part of the cache that belongs to this layer.
            key: ``[B, H, T, D]``.
            value: ``[B, H, T, D_v]``.

        Returns:
            What the tokens' queries need to find their own windows; ``resume`` takes it.

        Raises:
            InputError: If the cache belongs to a model with other codebooks.
        """
        self.check("keys", key)
        self.check("values", value)
        store.adopt(self.keys, self.values)
        angles, key, _ = self._in_halves(key, key)
        return store.append(key, value, angles)

    def resume(
        self,
        store: LayerStore,
        arrival: Arrival,
        query: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        changes: Changes | None = None,
    ) -> Tensor:
        """Returns attention of the tokens that ``append`` put into a cache, which held some before.

        Args:
            store: The part of the cache that belongs to this layer.
            arrival: What ``append`` returned.
            query: ``[B, H_q, n, D]``, of the last of these tokens.
            attn_mask: Over all tokens of the cache: boolean, or added to scores.
            scale: The factor of the scores; ``1 / sqrt(D)`` if left out.
            changes: A soft cap or sinks that the scores get besides.
        """
        return store.attend(self._in_halves(query, query)[1], scale, attn_mask, arrival, changes)

    def recoded_keys(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys after coding, before or after the rotary embedding as the policy says, and the loss."""
        angles, key, _ = self._in_halves(key, key)
        return self._recoded(key, angles, [])

    def _recoded(self, key: Tensor, angles: Rotary | None, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        if angles is None:
            coded, loss = self.keys(key, None, batches)
            return coded, loss
        coded, loss = self.keys(undo_rotary(key, angles), None, batches)
        return apply_rotary(coded, angles), loss

    def _in_halves(
        self, query: Tensor, key: Tensor, known: Rotary | None = None
    ) -> tuple[Rotary | None, Tensor, Tensor]:
        """Returns angles, and queries and keys in the order of channels in which a pair is one of each half."""
        angles = self._angles() if known is None else known
        if angles is None or self.rotary_convention is None:
            return angles, query, key
        width = angles.cos.shape[-1]
        return angles, self.rotary_convention.in_halves(query, width), self.rotary_convention.in_halves(key, width)

    def _angles(self) -> Rotary | None:
        if self.policy.keys == "after":
            return None
        if self.underway.rotary is None and self.policy.keys == "before":
            raise InputError(f"{self.name} shows no rotary embedding; hold its keys after it (KVPolicy(keys='after'))")
        return self.underway.rotary

    def _check_plain(self, *given: Tensor) -> None:
        """Raises where the cache's keys or values were repeated, or moved, before attention gets them."""
        steps = [step for x in given if isinstance(x, Pending) for step in x.steps]
        if steps:
            raise InputError(
                f"{self.name}: {steps[0].func.__name__} works on keys or values themselves before attention gets them, "
                "which a cache of codes never makes for it; skip the module with a KVRule"
            )

    def check_angles(self) -> None:
        """Raises where keys are to be held before a rotary embedding that is not shown.

        Raises:
            InputError: Then.
        """
        self._angles()

    def check(self, side: Literal["keys", "values"], x: Tensor) -> None:
        """Raises unless keys or values are of the shape that was calibrated with.

        Args:
            side: Which of both.
            x: The keys or values.

        Raises:
            InputError: Then.
        """
        coder = self.keys if side == "keys" else self.values
        if x.dim() != 4 or x.shape[1] != coder.heads or x.shape[3] != coder.dim:
            raise InputError(
                f"{self.name}: {side} are [B, {coder.heads}, T, {coder.dim}] as in calibration, got {list(x.shape)}; "
                "quantise the model again with batches like these, or, where heads are split over processes, give "
                f"rpqfx.distributed.HeadParallel() for {self.name}.kv_codes in the plan"
            )

    def near(self, queries: int, tokens: int, device: torch.device) -> Tensor:
        """Returns which keys a query finds as they are, ``[T_q, T]`` boolean.

        Args:
            queries: How many; they are the last tokens.
            tokens: How many.
            device: Of the result.
        """
        policy = self.policy
        seen = torch.arange(tokens - queries + 1, tokens + 1, device=device)[:, None]  # tokens so far
        token = torch.arange(tokens, device=device)
        # Rounding each token up to the end of its chunk, not each query down: inductor cannot simplify the latter.
        end = policy.sinks + ((token - policy.sinks) // policy.chunk + 1) * policy.chunk
        return (token < policy.sinks) | (end > seen - policy.window)


def attentions(model: nn.Module) -> dict[str, KVAttention]:
    """Returns the attention on codes of a model, by the name of the module it serves."""
    return {core.name: core for core in model.modules() if isinstance(core, KVAttention)}


def _attend(query: Tensor, key: Tensor, value: Tensor, changes: Changes | None, **options: Any) -> Tensor:
    if changes:
        return biased_attention(query, key, value, changes, **options)
    return _SDPA(query, key, value, **options)
