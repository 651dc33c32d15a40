"""Reads hints about a model from its attributes and configurations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import nn

_HEADS = ("num_heads", "n_heads", "heads", "n_head", "nhead", "num_attention_heads")

T = TypeVar("T")


def heads(module: nn.Module) -> int | None:
    """Attention heads, by the names that libraries give them."""
    for holder in (module, getattr(module, "config", None)):
        for name in _HEADS:
            value = getattr(holder, name, None)
            if type(value) is int and value > 0:
                return value
    return None


def initial_std(module: nn.Module) -> float | None:
    """Standard deviation of initial weights, as transformers' configurations give it."""
    config = getattr(module, "config", None)
    for name in ("initializer_range", "init_std"):
        value = getattr(config, name, None)
        if isinstance(value, float) and value > 0:
            return value
    return None


class Nearest(Generic[T]):
    """Returns the hint of a module or of its nearest ancestor, or else that of most modules of the model.

    Args:
        model: The model.
        ask: Asks one module; None where it says nothing.
    """

    def __init__(self, model: nn.Module, ask: Callable[[nn.Module], T | None]) -> None:
        self._known = {path: found for path, m in model.named_modules() if (found := ask(m)) is not None}
        common = Counter(self._known.values()).most_common(1)
        self._common = common[0][0] if common else None

    def of(self, path: str) -> T | None:
        """The answer that holds for the module of a qualified name."""
        while True:
            if path in self._known:
                return self._known[path]
            if not path:
                return self._common
            path = path.rpartition(".")[0]
