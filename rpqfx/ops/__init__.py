"""Differentiable operations on codebook-held matrices."""

from rpqfx.ops.products import Tensors, conv, expand, linear, linear_t, lookup, scale_grad

__all__ = ["Tensors", "conv", "expand", "linear", "linear_t", "lookup", "scale_grad"]
