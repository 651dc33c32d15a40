"""Products of two activations in a module's code, and which axes of theirs are tokens and channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# By the name of a function, where its left and its right operand are: the position, and the name of the argument.
_OPERANDS = {
    "matmul": ((0, "input"), (1, "other")),
    "__rmatmul__": ((1, "other"), (0, "input")),
    "bmm": ((0, "input"), (1, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
    "einsum": ((1, ""), (2, "")),
}


def is_product(func: Any) -> bool:
    """Returns whether a function of torch, as torch-function modes see it, multiplies two tensors.

    Args:
        func: The function.
    """
    return getattr(func, "__name__", "") in _OPERANDS


@dataclass(frozen=True)
class Product:
    """A call that multiplies two tensors, as scores of keys (``q @ k^T``) or as a sum of values (``weights @ v``).

    Args:
        func: What is called.
        args: Its positional arguments; the operands of ``einsum`` one by one.
        kwargs: Its keyword arguments.
        equation: Labels of the left operand, of the right one and of the result, where the function is ``einsum``.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    equation: tuple[str, str, str] | None = None

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
        """Returns the product that a call makes; None where it is none of two tensors.

        Args:
            func: What is called.
            args: Positional arguments.
            kwargs: Keyword arguments.
        """
        if func.__name__ != "einsum":
            return cls(func, args, kwargs)
        operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        if len(operands) != 2 or not isinstance(args[0], str):
            return None
        equation = _labels(args[0], *operands)
        return None if equation is None else cls(func, (args[0], *operands), kwargs, equation)

    @property
    def left(self) -> Any:
        """The left operand."""
        return self._operand(0)

    @property
    def right(self) -> Any:
        """The right operand."""
        return self._operand(1)

    def again(self, left: Any, right: Any) -> Tensor:
        """Returns the product of other operands of the same shapes.

        Args:
            left: The left one.
            right: The right one.
        """
        args, kwargs = list(self.args), dict(self.kwargs)
        for operand, (position, name) in zip((left, right), _OPERANDS[self.func.__name__], strict=True):
            if position < len(args):
                args[position] = operand
            else:
                kwargs[name] = operand
        made: Tensor = self.func(*args, **kwargs)
        return made

    def queries(self) -> int:
        """Returns how many rows the last two axes of the result have, which are of the left operand."""
        if self.equation is None:
            return int(self.left.shape[-2])
        left, _, out = self.equation
        return int(self.left.shape[left.index(out[-2])])

    def score_axes(self) -> tuple[int, ...] | None:
        """Returns the axes of the right operand, if it holds keys, in the order ``[..., T, D]``.

        None where the result is not ``[..., T_q, T]``.
        """
        if self.equation is None:
            axes = list(range(self.right.dim()))
            return None if len(axes) < 2 else (*axes[:-2], axes[-1], axes[-2])
        left, right, out = self.equation
        channels = [x for x in right if x in left and x not in out]
        if len(out) < 2 or out[-1] in left or out[-2] in right or len(channels) != 1 or set(right) - set(out + left):
            return None
        return _order(right, [x for x in out[:-1] if x in right] + [out[-1]] + channels)

    def value_axes(self) -> tuple[int, ...] | None:
        """Returns the axes of the right operand, if it holds values, in the order ``[..., T, D]``.

        None where the left operand is not ``[..., T_q, T]``.
        """
        if self.equation is None:
            return tuple(range(self.right.dim())) if self.right.dim() >= 2 else None
        left, right, out = self.equation
        channels = [x for x in right if x in out and x not in left]
        if len(left) < 2 or left[-1] not in right or left[-1] in out or left[-2] in right or len(channels) != 1:
            return None
        if set(right) - set(left + out) or left[-2] not in out:
            return None
        return _order(right, [x for x in left[:-1] if x in right] + [left[-1]] + channels)

    def _operand(self, number: int) -> Any:
        position, name = _OPERANDS[self.func.__name__][number]
        return self.args[position] if position < len(self.args) else self.kwargs[name]


def _order(labels: str, wanted: list[str]) -> tuple[int, ...] | None:
    return tuple(labels.index(x) for x in wanted) if sorted(labels) == sorted(wanted) else None


def _labels(equation: str, left: Tensor, right: Tensor) -> tuple[str, str, str] | None:
    """Labels of two operands and of their product, those of an ellipsis spelled out."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    parts = given.split(",")
    if not arrow or len(parts) != 2:
        return None
    free = [chr(code) for code in range(ord("A"), ord("Z") + 1) if chr(code) not in equation]
    widths = [x.dim() - len(part.replace("...", "")) for part, x in zip(parts, (left, right), strict=True)]
    spelled = "".join(free[: max(widths)])
    found = [part.replace("...", spelled[len(spelled) - n :]) for part, n in zip(parts, widths, strict=True)]
    found.append(out.replace("...", spelled))
    return None if any(len(set(part)) < len(part) for part in found) else (found[0], found[1], found[2])
