"""Layers whose weights are quantized."""

from rpqfx.nn.attention import RPQMultiheadAttention
from rpqfx.nn.bilinear import RPQBilinear
from rpqfx.nn.conv import RPQConv1d, RPQConv2d, RPQConv3d, RPQConvTranspose1d, RPQConvTranspose2d, RPQConvTranspose3d
from rpqfx.nn.embedding import RPQEmbedding, RPQEmbeddingBag
from rpqfx.nn.hosting import containers as _containers  # noqa: F401 (registers what containers need to be backed)
from rpqfx.nn.hosting import recurrent as _recurrent  # noqa: F401 (registers what recurrent layers need to be backed)
from rpqfx.nn.layout import Layout
from rpqfx.nn.linear import RPQLinear
from rpqfx.nn.tensor.virtual import VirtualWeight
from rpqfx.nn.weight import RPQWeight

__all__ = [
    "Layout",
    "RPQBilinear",
    "RPQConv1d",
    "RPQConv2d",
    "RPQConv3d",
    "RPQConvTranspose1d",
    "RPQConvTranspose2d",
    "RPQConvTranspose3d",
    "RPQEmbedding",
    "RPQEmbeddingBag",
    "RPQLinear",
    "RPQMultiheadAttention",
    "RPQWeight",
    "VirtualWeight",
]
