"""Conditional routing (CoLT5): a heavy branch for the few tokens that need it, a light one for all."""

from rpqfx.routing.attention import RoutedAttention, RoutedCrossAttention
from rpqfx.routing.block import RoutedTransformerBlock
from rpqfx.routing.causal import RoutedAutoregressiveAttention
from rpqfx.routing.exact import exact_offset, exact_scores
from rpqfx.routing.feedforward import RoutedFeedForward
from rpqfx.routing.image import RoutedImageAttention
from rpqfx.routing.iterative import coordinate_descent, cumulative_softmax, sinkhorn
from rpqfx.routing.router import Choice, Router
from rpqfx.routing.top_k import TopK, topk
from rpqfx.routing.vit import RoutedViT
from rpqfx.routing.windows import LocalAttention, local_attention

__all__ = [
    "Choice",
    "LocalAttention",
    "RoutedAttention",
    "RoutedAutoregressiveAttention",
    "RoutedCrossAttention",
    "RoutedFeedForward",
    "RoutedImageAttention",
    "RoutedTransformerBlock",
    "RoutedViT",
    "Router",
    "TopK",
    "coordinate_descent",
    "cumulative_softmax",
    "exact_offset",
    "exact_scores",
    "local_attention",
    "sinkhorn",
    "topk",
]
