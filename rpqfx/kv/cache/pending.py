"""What a cache of codes gives a model in the place of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

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


class Pending(Tensor):
    """Keys, or values, that are never made: a tensor that has a shape and no elements, for attention alone."""

    coming: Coming
    """The newest of the tokens that it stands for."""

    @classmethod
    def of(cls, coming: Coming, new: Tensor) -> Self:
        """Returns what stands for all tokens of a cache, those to come among them.

        Args:
            coming: Keys and values of these.
            new: One of both.
        """
        shape = (*new.shape[:2], coming.store.total + new.shape[2], new.shape[3])
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)
        made.coming = coming
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """What ``print`` shows."""
        return f"Pending({list(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers what is asked of the shape, and refuses what would need the elements."""
        if getattr(func, "__name__", "") in _OF_THE_SHAPE:
            return super().__torch_function__(func, types, args, kwargs)
        raise InputError(
            f"{getattr(func, '__name__', func)} works on keys or values themselves, which a cache of codes "
            "never makes; a model with an encoder takes EncoderDecoderCache(CodebookCache.for_model(model), "
            "DynamicCache()) of transformers"
        )

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
