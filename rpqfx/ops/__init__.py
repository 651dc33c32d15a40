"""Differentiable operations on codebook-held matrices."""

from rpqfx.ops import rules as rules
from rpqfx.ops.plan import PLANS, Plan
from rpqfx.ops.products import Tensors, conv, expand, linear, linear_t, lookup, scale_grad

__all__ = ["PLANS", "Plan", "Tensors", "conv", "expand", "linear", "linear_t", "lookup", "scale_grad"]
