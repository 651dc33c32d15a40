"""The cache that ``generate`` of transformers makes for a model with attention on codes.

transformers is never imported here: a model of it has imported it.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from torch import nn

from rpqfx.errors import InputError
from rpqfx.graph.transformers_models import is_pretrained
from rpqfx.kv.model_cache import CodebookCache
from rpqfx.kv.module import attentions

_METHOD = "_prepare_cache_for_generation"
_GIVEN = ("cache", "past_key_values")  # the argument's names, in newer and older versions of transformers


def adapt_generation(model: nn.Module) -> None:
    """Has ``generate`` make caches of codes, in every model of transformers that has attention on codes.

    Args:
        model: A model whose keys and values have just been quantized; attributes of instances are set.
    """
    for module in model.modules():
        if is_pretrained(module) and hasattr(type(module), _METHOD) and attentions(module):
            module.__dict__[_METHOD] = PrepareCache(module)


class PrepareCache:
    """Stands for a model's ``_prepare_cache_for_generation``, and puts codes into the cache that it makes.

    Args:
        model: The model; not kept alive, as it keeps this object.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> Any:
        return PrepareCache, (self._model(),)

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Lets the model make its cache, and exchanges it, unless the caller has given one.

        Args:
            generation_config: As for the model's own method.
            model_kwargs: Likewise; it gets the cache.
            *args: Likewise.
            **kwargs: Likewise.

        Raises:
            InputError: If ``cache_implementation`` asks for a cache that holds no codes.
        """
        model: Any = self._model()
        given = any(model_kwargs.get(name) is not None for name in _GIVEN)
        asked = generation_config.cache_implementation
        if asked not in (None, "dynamic") and not given:
            raise InputError(
                f"cache_implementation={asked!r} makes a cache that holds no codes; leave it out, and generate makes "
                "one that does, or pass rpqfx.kv.CodebookCache.for_model(model)"
            )
        result = getattr(type(model), _METHOD)(model, generation_config, model_kwargs, *args, **kwargs)
        if given:
            return result
        utils: Any = sys.modules["transformers.cache_utils"]
        for name in _GIVEN:
            made = model_kwargs.get(name)
            if isinstance(made, utils.EncoderDecoderCache):
                model_kwargs[name] = utils.EncoderDecoderCache(
                    CodebookCache.for_model(model), made.cross_attention_cache
                )
            elif isinstance(made, utils.DynamicCache):
                model_kwargs[name] = CodebookCache.for_model(model)
        return result
