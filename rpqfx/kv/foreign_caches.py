"""Refuses caches of transformers that keep other tokens than came, for models with attention on codes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from rpqfx.errors import InputError


def layer_number(module: nn.Module) -> int | None:
    """Returns which layer of a cache an attention module of transformers uses; None where it does not say.

    Args:
        module: The attention module.
    """
    numbers = (getattr(module, name, None) for name in ("layer_idx", "layer_id"))
    return next((number for number in numbers if isinstance(number, int)), None)


def check_cache(name: str, module: nn.Module, given: Iterable[Any]) -> None:
    """Raises where a call's cache is static, or has dropped tokens past a sliding window.

    Which keys a query finds as codes depends on how many tokens there are. A static cache shows room for tokens that
    have not come, and one of a sliding window no longer shows the first.

    Args:
        name: Of the module, for the message.
        module: The attention module.
        given: Arguments of its call.

    Raises:
        InputError: If there is such a cache.
    """
    for value in given:
        cache = getattr(value, "self_attention_cache", value)
        if not hasattr(cache, "get_seq_length") or not isinstance(getattr(cache, "layers", None), list):
            continue
        number = layer_number(module)
        layer: Any = cache.layers[number] if number is not None and number < len(cache.layers) else None
        static = getattr(layer, "is_compileable", False)
        if static or (getattr(layer, "is_sliding", False) and layer.get_seq_length()):
            what = "is of a fixed size" if static else "keeps the tokens of a sliding window alone"
            raise InputError(
                f"{name}: the {type(layer).__name__} that was passed {what}, and holds no codes; pass "
                "rpqfx.kv.CodebookCache.for_model(model)"
            )
