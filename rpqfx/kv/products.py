r"""Attention that a module multiplies out itself: its two products use codes, and all between them is its own.

The first product gives scores, which the module's code scales, masks, biases, caps and takes the softmax of as it
pleases; the second mixes values by the weights that came of it. Each query finds recent tokens as they are and older
ones as their codes, so of either product there are two, of which each query and token takes part in one:

    scores = where(near, q @ k^T, q @ coded(k)^T),    mix = (w * near) @ v + (w * ~near) @ coded(v)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rpqfx.errors import InputError
from rpqfx.graph.operands import Operand
from rpqfx.graph.products import Product, is_product
from rpqfx.kv.cache.pending import Coming, Pending
from rpqfx.kv.module import KVAttention
from rpqfx.kv.quantizer.ema_steps import recomputed, step_after_backward
from rpqfx.kv.quantizer.moving_averages import Batch

SideName = Literal["keys", "values"]


class _Sides(NamedTuple):
    """The right operand of a product, twice."""

    near: Tensor
    far: Tensor | None
    mask: Tensor | None
    """``[T_q, T]``: which tokens a query finds as they are; None where there is no ``far``."""


class Multiplying(TorchFunctionMode):
    """Sends two products of one call of an attention module through codes.

    Args:
        core: The attention on codes that the module holds; it knows which products they are.

    Raises:
        InputError: From within, if keys are not as in calibration or come from a cache that is used otherwise.
    """

    def __init__(self, core: KVAttention) -> None:
        super().__init__()
        assert core.products is not None
        self._core, self._products = core, core.products
        self._count = 0
        self.refusal: InputError | None = None
        """What was raised from within, in the place of which ``@`` raises an error of its own."""
        self._losses: list[Tensor] = []
        self._batches: list[Batch] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = Product.of(func, args, kwargs) if is_product(func) else None
        if product is None or not self._products.count(product):
            return func(*args, **kwargs)
        number, self._count = self._count, self._count + 1
        if number not in (self._products.scores, self._products.mix):
            return func(*args, **kwargs)
        try:
            return self._scores(product) if number == self._products.scores else self._mix(product)
        except InputError as error:
            self.refusal = error
            raise

    def finish(self) -> None:
        """Checks, once the call is over, that it went the way of calibration.

        Raises:
            InputError: If it did not.
        """
        if self._count != self._products.total:
            raise InputError(
                f"{self._core.name} made {self._count} products in this call, {self._products.total} in calibration, "
                "so that those of its attention cannot be told; calibrate with calls like this one, or skip the module "
                "with a KVRule"
            )

    def _scores(self, product: Product) -> Tensor:
        sides = self._sides(product, "keys", product.score_axes(), self._products.keys)
        if sides.far is None or sides.mask is None:
            return product.again(product.left, sides.near)
        near, far = (product.again(product.left, x) for x in (sides.near, sides.far))
        return torch.where(sides.mask, near, far)

    def _mix(self, product: Product) -> Tensor:
        core = self._core
        sides = self._sides(product, "values", product.value_axes(), self._products.values)
        if sides.far is None or sides.mask is None:
            return product.again(product.left, sides.near)
        near = product.again(product.left.masked_fill(~sides.mask, 0), sides.near)
        out = near + product.again(product.left.masked_fill(sides.mask, 0), sides.far)
        if self._losses and not recomputed():
            core.underway.loss = sum(self._losses[1:], self._losses[0]) if core.training else None
            core.underway.recorded = torch.is_grad_enabled()
        batches = self._batches
        return step_after_backward(out, batches) if batches and torch.is_grad_enabled() else out

    def _sides(self, product: Product, side: SideName, axes: tuple[int, ...] | None, how: Operand) -> _Sides:
        """Returns the right operand with tokens as they are, and as their codes."""
        core, right = self._core, product.right
        if core.underway.store is not None:
            raise InputError(
                f"{core.name} makes its scores and masks them itself, of as many tokens as it is given, so a cache "
                "cannot be attended to from outside; call the model with whole sequences, or hand the cache to a model "
                "whose attention calls its update"
            )
        core.check_angles()
        queries = product.queries() if side == "keys" else product.left.shape[-2]
        if isinstance(right, Pending):
            coming, put = right.coming, right.replayed
            if coming.arrival is None:
                coming.arrival = core.append(coming.store, coming.keys, coming.values)
            if coming.arrival.start:
                return self._resumed(coming, coming.arrival, queries, side, put)
            return self._whole(put(getattr(coming, side)), getattr(coming, side), put, queries, side)
        if axes is None or right.dim() != (4 if how.heads is None else 3):
            raise InputError(
                f"{core.name} multiplies {side} {list(right.shape)} otherwise than in calibration; calibrate with "
                "calls like this one, or skip the module with a KVRule"
            )
        return self._whole(right, how.vectors(right, axes), lambda x: how.operand(x, axes), queries, side)

    def _whole(
        self, right: Tensor, vectors: Tensor, put: Callable[[Tensor], Tensor], queries: int, side: SideName
    ) -> _Sides:
        """Multiplies where all tokens are in this call."""
        core = self._core
        if core.trial is not None:
            setattr(core.trial, side, vectors)
            return _Sides(right, None, None)
        if core.watch is not None:
            seen = core.watch.see_keys(vectors, None) if side == "keys" else core.watch.see_values(vectors)
            return _Sides(put(seen), None, None)
        core.check(side, vectors)
        coded, loss = (core.keys if side == "keys" else core.values)(vectors, None, self._batches)
        self._losses.append(loss)
        return _Sides(right, put(coded), core.near(queries, vectors.shape[2], vectors.device))

    def _resumed(
        self, coming: Coming, arrival: Any, queries: int, side: SideName, put: Callable[[Tensor], Tensor]
    ) -> _Sides:
        """Multiplies where a cache held some of the tokens before."""
        new = coming.keys.shape[2]
        if queries != new:
            raise InputError(
                f"{self._core.name}: {queries} queries came with {new} tokens for the cache; each token brings its own"
            )
        near, far = coming.store.vectors(side, arrival)
        dtype = getattr(coming, side).dtype
        if far is None:
            return _Sides(put(near.to(dtype)), None, None)
        return _Sides(put(near.to(dtype)), put(far.to(dtype)), coming.store.near(queries, arrival, near.device))
