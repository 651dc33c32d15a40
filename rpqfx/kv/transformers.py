"""Attention on codes where transformers asks for an attention function, and the cache that it takes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from rpqfx.errors import InputError
from rpqfx.kv.attention.score_options import Changes
from rpqfx.kv.cache.layer import LayerStore
from rpqfx.kv.foreign_caches import layer_number
from rpqfx.kv.model_cache import CodebookCache
from rpqfx.kv.module import KVAttention
from rpqfx.kv.transformers_layers import CodebookLayer, HybridLayer
from rpqfx.nn.hosting.host import READ_AS

_NAME = "rpqfx_kv"


def route(config: Any) -> Any:
    """Returns a copy of a configuration, for one attention module, that asks for attention on codes.

    Masks are made by the model, whose own configuration stays.

    Args:
        config: Of the module; left alone.
    """
    own = copy.copy(config)
    own._attn_implementation = _NAME
    return own


_USUAL = ("dropout", "scaling", "is_causal", "sliding_window")
# Arguments that change nothing here: masks say what they say, or they are of other kernels, or not of attention.
_IDLE = frozenset({
    "sliding_window", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "max_seqlen",
    "position_ids", "cache_position", "position_embeddings", "seq_idx", "token_type_ids", "mm_token_type_ids",
    "deterministic", "use_cache", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch",
    "logits_to_keep", "input_ids", "labels", "padding_mask", "is_first_iteration", "next_sequence_length",
})  # fmt: skip


def _attend(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Runs attention on codes; transformers calls it as its ``sdpa_attention_forward``."""
    core: KVAttention = module.kv_codes  # type: ignore[assignment]
    out = _on_codes(core, module, query, key, value, attention_mask, **options).transpose(1, 2).contiguous()
    if core.trial is not None and (theirs := _own_function(module)) is not None:
        more = [name for name, given in options.items() if given is not None and name not in _USUAL]
        core.trial.compare(out, theirs(module, query, key, value, attention_mask, **options)[0], more)
    return out, None


def _on_codes(
    core: KVAttention,
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Returns ``[B, H_q, T_q, D_v]``."""
    _check_options(core, mask, options)
    if s_aux is not None and sinks is not None:
        raise InputError(f"{core.name} hands both s_aux= and sinks= to its attention; skip it with a KVRule")
    changes = Changes(softcap, sinks if s_aux is None else s_aux)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and mask is None and query.shape[2] > 1 and query.shape[2] == core.tokens(key)
    if position_bias is not None:
        mask, causal = _with_bias(position_bias, mask, causal), False
    return core(query, key, value, mask, dropout, causal, scaling, query.shape[1] != key.shape[1], changes or None)


def _own_function(module: nn.Module) -> Callable[..., Any] | None:
    """Returns the attention function of the module's original configuration, where that is known."""
    implementation = module.__dict__["_kv_config"]._attn_implementation
    forward = inspect.unwrap(getattr(type(module), READ_AS, type(module)).forward)
    names = [name for name in forward.__code__.co_names if name.startswith("eager_attention")]
    eager = forward.__globals__.get(names[0]) if names else None
    return ALL_ATTENTION_FUNCTIONS.get(implementation or "eager", eager)


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Returns a bias of scores with a mask added to it."""
    if mask is None and causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def _check_options(core: KVAttention, mask: Any, options: dict[str, Any]) -> None:
    """Refuses what changes attention in a way that is not computed on codes."""
    if options.get("output_attentions"):
        raise InputError(
            f"{core.name}: attention weights are not made where keys are codes; call the model without "
            "output_attentions, or skip the module with a KVRule"
        )
    for name, value in options.items():
        if value is not None and value is not False and name not in _IDLE and name != "output_attentions":
            raise InputError(
                f"{core.name} hands {name}= to its attention, which is not computed on codes; skip it with a KVRule, "
                "or leave the argument out of the call"
            )
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        shown = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"{core.name}: masks are [B, heads or 1, T_q, T], got {shown}; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)


class TransformersCache(CodebookCache, Cache):
    """See [`CodebookCache`][rpqfx.kv.model_cache.CodebookCache]; what a model of transformers takes as its cache.

    Layers that a rule skips keep their keys and values as the model's own cache does.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        CodebookCache.__init__(self, model, dtype)
        coded: dict[int, LayerStore] = {}
        for module in model.modules():  # not by name: the model may be within another one by now
            core = module._modules.get("kv_codes")
            if isinstance(core, KVAttention):
                number = layer_number(module)
                coded[len(coded) if number is None else number] = self.stores[core.name]
        plain: list[Any] = list(DynamicCache(config=model.config).layers)
        number = max(len(plain), max(coded) + 1)
        plain += [DynamicLayer() for _ in range(number - len(plain))]
        layers = [self._layer(coded.get(i), plain[i]) for i in range(number)]
        self._plain = [layer for layer in layers if type(layer) is not CodebookLayer]
        Cache.__init__(self, layers=layers)

    @staticmethod
    def _layer(store: LayerStore | None, plain: Any) -> Any:
        """Returns the layer of a cache of codes that replaces one of the model's own cache."""
        if store is None:
            return plain
        return HybridLayer(store, plain.number_of_states) if HybridLayer.stands_for(plain) else CodebookLayer(store)

    @classmethod
    def fits(cls, model: nn.Module) -> nn.Module | None:
        """Returns the model of transformers in ``model`` that takes caches of this class, None where there is none."""
        return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)

    @property
    def is_initialized(self) -> bool:
        """Whether there are tokens."""
        return self.total > 0

    def reset(self) -> None:
        """Drops all tokens."""
        CodebookCache.reset(self)
        for layer in self._plain:
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts rows into the order of the beams."""
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row so many times."""
        self.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        self.select(indices)

    def select(self, indices: Tensor) -> None:
        """See ``CodebookCache.select``."""
        CodebookCache.select(self, indices)
        for layer in self._plain:
            layer.reorder_cache(indices)

    def repeat(self, times: int) -> None:
        """See ``CodebookCache.repeat``."""
        if self.total:
            rows = next(store.batch for store in self.stores.values() if store.total)
            self.select(torch.arange(rows).repeat_interleave(times))

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest tokens; see ``CodebookCache.crop``."""
        if tokens_to_remove:
            going = self.total - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
            if going > 0 and any(not getattr(layer, "is_croppable", True) for layer in self._plain):
                raise InputError("layers of this model keep states of all their past, which no tokens are taken out of")
            CodebookCache.crop(self, tokens_to_remove)
            for layer in self._plain if going > 0 else ():
                layer.crop(-going)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See ``CodebookCache.state``.

        Raises:
            InputError: If layers are skipped, since what transformers keeps of them has no state.
        """
        self._all_in_codes("state")
        return CodebookCache.state(self)

    def restore(self, state: dict[str, dict[str, Tensor]]) -> None:
        """See ``CodebookCache.restore``.

        Raises:
            InputError: If layers are skipped.
        """
        self._all_in_codes("restore")
        CodebookCache.restore(self, state)

    def _all_in_codes(self, what: str) -> None:
        if self._plain:
            raise InputError(f"{what} takes a cache whose layers are all in codes; {len(self._plain)} of them are not")
