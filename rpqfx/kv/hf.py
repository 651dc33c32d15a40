"""Attention on codes where transformers asks for an attention function, and the cache that it takes."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rpqfx.errors import InputError
from rpqfx.kv.attention import KVAttention
from rpqfx.kv.cache import CodebookCache
from rpqfx.kv.store import LayerStore

_NAME = "rpqfx_kv"


def route(config: Any) -> Any:
    """A configuration like another, for one attention module, that asks for attention on codes.

    Masks are made by the model, whose own configuration stays.

    Args:
        config: Of the module; left alone.
    """
    if _NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    own = copy.copy(config)
    own._attn_implementation = _NAME
    return own


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; see its ``sdpa_attention_forward``."""
    core: Any = module.kv_codes
    if isinstance(key, Pending):
        if key.first is None:
            return key.store.attend(query, scaling, attention_mask).transpose(1, 2).contiguous(), None
        key, value = key.first, value.first
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    gqa = query.shape[1] != key.shape[1]
    out = core(query, key, value, attention_mask, dropout, causal, scaling, gqa)
    return out.transpose(1, 2).contiguous(), None


class Pending(NamedTuple):
    """What a layer of the cache returns in the place of keys and of values, which are never made.

    Args:
        store: Of the layer.
        shape: That they would have.
        first: They themselves, where they are the first of all.
    """

    store: LayerStore
    shape: torch.Size
    first: Tensor | None


class CodebookLayer(CacheLayerMixin):
    """One layer, as transformers asks for it.

    Args:
        core: Its attention.
        store: Its tokens.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self, core: KVAttention, store: LayerStore) -> None:
        super().__init__()
        self._core, self._store = core, store

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
        """Takes the next tokens."""
        first = self._store.total == 0
        self._core.append(self._store, key_states, value_states)
        keys, values = (
            Pending(self._store, torch.Size((*x.shape[:2], self._store.total, x.shape[3])), x if first else None)
            for x in (key_states, value_states)
        )
        return keys, values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Tokens that a mask is over, and its first."""
        length = query_length if isinstance(query_length, int) else len(query_length)  # positions, before 5
        return self._store.total + length, 0

    def get_seq_length(self) -> int:
        """Tokens."""
        return self._store.total

    def get_max_length(self) -> int:
        """There is none."""
        return -1

    get_max_cache_shape = get_max_length  # as it was called before

    def reset(self) -> None:
        """Forgets all tokens."""
        self._store.reset()


class TransformersCache(CodebookCache, Cache):
    """See [`CodebookCache`][rpqfx.kv.cache.CodebookCache]; ``past_key_values`` of a model of transformers."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        CodebookCache.__init__(self, model, dtype)
        by_index: dict[int, CodebookLayer] = {}
        for name, core in self.cores.items():
            module = model.get_submodule(name)
            by_index[getattr(module, "layer_idx", len(by_index))] = CodebookLayer(core, self.stores[name])
        if sorted(by_index) != list(range(len(by_index))):
            raise InputError(
                f"layers {sorted(by_index)} hold codes and others do not; generate needs all or none: "
                "give those that matter more bits (KVRule(bits=8)) rather than skipping them"
            )
        Cache.__init__(self, layers=[by_index[index] for index in sorted(by_index)])

    def reset(self) -> None:
        """Forgets all tokens."""
        CodebookCache.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of the beams."""
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows."""
        self.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens; see ``CodebookCache.crop``."""
        if tokens_to_remove:
            CodebookCache.crop(self, tokens_to_remove)
