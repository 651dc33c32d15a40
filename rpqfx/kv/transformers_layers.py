"""One layer of a cache of codes, as caches of transformers have layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin

from rpqfx.kv.cache.layer import LayerStore
from rpqfx.kv.cache.pending import Coming, Pending

_LINEAR: Any = getattr(cache_utils, "LinearAttentionLayer", object)  # older versions have none


class CodebookLayer(CacheLayerMixin):
    """One layer, as transformers asks for it.

    Args:
        store: Its tokens.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self, store: LayerStore) -> None:
        super().__init__()
        self._store = store

    @property
    def is_initialized(self) -> bool:
        """Whether there are tokens."""
        return self._store.total > 0

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """Does nothing: the tokens say so."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Returns what stands for all tokens; the attention that gets it puts the next ones into the cache."""
        coming = Coming(self._store, key_states, value_states)
        return Pending.of(coming, key_states), Pending.of(coming, value_states)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Returns tokens that a mask is over, and its first."""
        length = query_length if isinstance(query_length, int) else len(query_length)  # positions, before 5
        return self._store.total + length, 0

    def get_seq_length(self) -> int:
        """Returns tokens."""
        return self._store.total

    def get_max_length(self) -> int:
        """There is none."""
        return -1

    get_max_cache_shape = get_max_length  # as it was called before

    def reset(self) -> None:
        """Drops all tokens."""
        self._store.reset()


class HybridLayer(CodebookLayer, _LINEAR):
    """Attention in codes, and the states of a linear attention beside it as they are (Falcon-H1, Zamba).

    Args:
        store: Tokens of the attention.
        states: How many states the linear attention has.
    """

    is_croppable = False

    def __init__(self, store: LayerStore, states: int) -> None:
        _LINEAR.__init__(self, number_of_states=states)
        self._store = store

    @staticmethod
    def stands_for(layer: Any) -> bool:
        """Returns whether a layer of transformers holds both.

        Args:
            layer: Of a cache that the model would make.
        """
        return _LINEAR is not object and isinstance(layer, _LINEAR) and isinstance(layer, CacheLayerMixin)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Makes room for the states of the linear attention."""
        if not args:
            _LINEAR.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Drops all tokens."""
        CodebookLayer.reset(self)
        _LINEAR.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts rows of the states in another order; the cache does so with those of the attention."""
        _LINEAR.reorder_cache(self, beam_idx)
