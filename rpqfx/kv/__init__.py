"""The quantized KV cache."""

from rpqfx.kv.cache.layer import LayerStore
from rpqfx.kv.coder.head_coder import HeadCoder
from rpqfx.kv.model_cache import CodebookCache
from rpqfx.kv.module import KVAttention, attentions
from rpqfx.kv.policy import KVPolicy, KVRule
from rpqfx.kv.quantizer.quantizer import VectorQuantizer
from rpqfx.kv.rewrite import commitment, quantize_kv

__all__ = [
    "CodebookCache",
    "HeadCoder",
    "KVAttention",
    "KVPolicy",
    "KVRule",
    "LayerStore",
    "VectorQuantizer",
    "attentions",
    "commitment",
    "quantize_kv",
]
