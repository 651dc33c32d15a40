"""Attention on codes where transformers asks for an attention function."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
    core = module.kv_codes
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    gqa = query.shape[1] != key.shape[1]
    out = core(query, key, value, attention_mask, dropout, causal, scaling, gqa)
    return out.transpose(1, 2).contiguous(), None
