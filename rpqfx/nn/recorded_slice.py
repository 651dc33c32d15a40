"""Parts that know how they were taken from the whole tensor, so that they can be taken again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rpqfx import ops
from rpqfx.nn.layout import Layout
from rpqfx.nn.weight_slice import Note, Part

if TYPE_CHECKING:
    from rpqfx.nn.weight_products import Products

Step = Callable[[Part], "Part | None"]


class Recorded(Part):
    """A part of a weight that keeps the steps by which it was taken."""

    _steps: tuple[Step, ...] = ()

    def again(self, whole: Part) -> Part | None:
        """Takes the same part of another whole tensor.

        Args:
            whole: A whole tensor of the same layout.

        Returns:
            The part, or None where this whole cannot be cut so.
        """
        part: Part | None = whole
        for step in self._steps:
            part = None if part is None else step(part)
        return part

    def _next(self, part: Any, step: Step) -> Any:
        if isinstance(part, Recorded) and part is not self:
            part._steps = (*self._steps, step)
        return part

    def narrow(self, axis: int, start: int, length: int) -> Part | None:
        """As ``Part.narrow``."""
        return self._next(super().narrow(axis, start, length), lambda part: part.narrow(axis, start, length))

    def seen_as(self, layout: Layout) -> Part:
        """As ``Part.seen_as``."""
        return self._next(super().seen_as(layout), lambda part: part.seen_as(layout))

    def drop(self, axis: int) -> Part | None:
        """As ``Part.drop``."""
        return self._next(super().drop(axis), lambda part: part.drop(axis))

    def take(self, experts: Tensor) -> Part:
        """As ``Part.take``."""
        return self._next(super().take(experts), lambda part: part.take(experts))

    def experts(self) -> list[Part]:
        """As ``Part.experts``."""

        def step(number: int) -> Step:
            return lambda part: part.experts()[number]

        return [self._next(part, step(number)) for number, part in enumerate(super().experts())]


class CalledPart(Recorded):
    """A part of a weight that has hooks: each product runs inside of a call of the weight, so that they fire.

    Hooks may bring the tensors in before a call and take them away after it, as accelerate's do and those of sharding.
    The weight's call takes the operand as its argument and returns the product.

    It takes the weight, and the arguments of ``Part``.
    """

    lasting = False

    def __init__(
        self, weight: Products, tensors: ops.Tensors, layout: Layout, grad_factor: float = 1.0, plan: ops.Plan = "auto",
        path: tuple[tuple[Any, ...], ...] = (), note: Note | None = None,
    ) -> None:  # fmt: skip
        super().__init__(tensors, layout, grad_factor, plan, path, note)
        self._weight = weight

    def _part(self, tensors: Any, layout: Layout, *steps: tuple[Any, ...]) -> Part:
        path = (*self.path, *steps)
        return CalledPart(self._weight, tensors, layout, self.grad_factor, self.plan, path, self.note)

    def dense(self) -> Tensor:
        """As ``Part.dense``, within a call of the weight."""
        return self._weight(use=lambda part: self._same(part).dense())

    def lookup(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """As ``Part.lookup``, within a call of the weight."""
        return self._weight(ids, use=lambda part, ids: self._same(part).lookup(ids, sparse))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As ``Part.linear``, within a call of the weight."""
        if self.note is not None:
            self.note("linear", x, (), self.path)
        return self._weight(x, bias, use=lambda part, x, bias: self._same(part).linear(x, bias))

    def linear_t(self, y: Tensor) -> Tensor:
        """As ``Part.linear_t``, within a call of the weight."""
        if self.note is not None:
            self.note("linear_t", y, (), self.path)
        return self._weight(y, use=lambda part, y: self._same(part).linear_t(y))

    def conv(self, x: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        """As ``Part.conv``, within a call of the weight."""
        if self.note is not None:
            self.note("conv", x, geometry, self.path)
        return self._weight(x, bias, use=lambda part, x, bias: self._same(part).conv(x, bias, *geometry))

    def _same(self, whole: Part) -> Part:
        part = self.again(whole)
        assert part is not None, "what could be cut once can be cut again"
        return part
