"""The placeholders that a cache of codes gives a model in place of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.kv.cache.layer import Arrival, LayerStore


@dataclass
class Coming:
    """Tokens on their way into a cache: the attention that gets them puts them in, since it knows their angles.

    Args:
        store: The part of the cache that belongs to their layer.
        keys: ``[B, H, T, D]``.
        values: ``[B, H, T, D_v]``.
        arrival: What ``store`` said when it took them, None before.
    """

    store: LayerStore
    keys: Tensor
    values: Tensor
    arrival: Arrival | None = None


class Step(NamedTuple):
    """A function that was called with keys or values that are not made yet, its other arguments after them."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Pending(Tensor):
    """Keys, or values, that are made by attention if at all: a tensor that has a shape and no elements.

    Views of it, and casts, are remembered, for attention that makes them.
    """

    coming: Coming
    """The newest of the tokens that it stands for."""

    steps: tuple[Step, ...]
    """What was called with it."""

    @classmethod
    def of(cls, coming: Coming, new: Tensor) -> Self:
        """Returns what stands for all tokens of a cache, those to come among them.

        Args:
            coming: Keys and values of these.
            new: One of both.
        """
        shape = (*new.shape[:2], coming.store.total + new.shape[2], new.shape[3])
        return cls._made(coming, (), torch.Size(shape), new.dtype, new.device)

    @classmethod
    def _made(
        cls, coming: Coming, steps: tuple[Step, ...], shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> Self:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.coming, made.steps = coming, steps
        return made

    def replayed(self, x: Tensor) -> Tensor:
        """Returns what became of the tokens.

        Args:
            x: ``[B, H, T, D]``, what this stood for at first.
        """
        x = x.contiguous()  # as what a cache of transformers puts together
        for func, args, kwargs in self.steps:
            x = func(x, *args, **kwargs)
        return x

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Returns the text that ``print`` shows."""
        return f"Pending({list(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers questions about the shape, records views, and refuses what would need the elements."""
        name = getattr(func, "__name__", "")
        if name in _OF_THE_SHAPE:
            return super().__torch_function__(func, types, args, kwargs)
        if name in _VIEWS and isinstance(args[0], cls):
            step = Step(func, args[1:], kwargs or {})
            return args[0]._after(step, casts=name in _CASTS)
        raise InputError(
            f"{name or func} works on keys or values themselves, which a cache of codes "
            "never makes; a model with an encoder takes EncoderDecoderCache(CodebookCache.for_model(model), "
            "DynamicCache()) of transformers"
        )

    def _after(self, step: Step, casts: bool) -> Pending:
        """Returns a placeholder of the same tokens after one more step."""
        device: Any = self.device if casts else "meta"  # a cast of one without elements cannot name another device
        shape = (0,) if casts else self.shape
        like: Tensor = step.func(torch.empty(shape, dtype=self.dtype, device=device), *step.args, **step.kwargs)
        shape = self.shape if casts else like.shape
        return self._made(self.coming, (*self.steps, step), shape, like.dtype, like.device if casts else self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuses."""
        raise InputError(f"{func} works on keys or values themselves, which a cache of codes never makes")


_OF_THE_SHAPE = (
    "__get__",
    "size",
    "dim",
    "ndimension",
    "is_floating_point",
    "is_complex",
    "stride",
    "numel",
    "element_size",
)

_CASTS = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "contiguous"})
_VIEWS = _CASTS | {
    "transpose", "permute", "view", "reshape", "expand", "unsqueeze", "squeeze", "flatten", "unflatten", "swapaxes",
    "repeat_interleave", "repeat",
}  # fmt: skip
