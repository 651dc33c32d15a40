"""The KV cache in codebooks."""

from rpqfx.kv.attention import KVAttention, attentions
from rpqfx.kv.cache import CodebookCache
from rpqfx.kv.headcoder import HeadCoder
from rpqfx.kv.policy import KVPolicy, KVRule
from rpqfx.kv.quantizer import VectorQuantizer
from rpqfx.kv.rewrite import commitment, quantize_kv
from rpqfx.kv.store import LayerStore

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
