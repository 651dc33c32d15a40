"""Shared parts of the autograd functions: a rule for vmap, and whether they are needed at all."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def differentiated(*tensors: Tensor | None) -> bool:
    """Returns whether anything can ask for a gradient of what is computed from these, or must see how."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class Mapped(Function):
    """A Function whose vmap runs once a sample, unless a subclass knows better."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            # torch asks for it at every call, and finding it out takes longer than a small layer
            cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    @classmethod
    def _each(cls, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Tensor, int | None]:
        if all(dim is None for dim in in_dims):
            return cls.apply(*args), None
        pick = [
            [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)]
            for i in range(size)
        ]
        return torch.stack([cls.apply(*one) for one in pick]), 0


class Slow(Function):
    """Its input, whose gradient is multiplied by a number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad * ctx.factor, None


def like_codebooks(grad: Tensor | None, codebooks: Tensor) -> Tensor | None:
    """Returns a gradient of codebooks, in their dtype."""
    return grad if grad is None else grad.to(codebooks.dtype)


def no_view(y: Tensor) -> Tensor:
    """Returns a result as a tensor of its own: autograd refuses in-place changes of a view that a Function returned."""
    view = y.dim() > 2 if torch.compiler.is_dynamo_compiling() else not torch.compiler.is_compiling() and y._is_view()
    return torch.ops.aten._unsafe_view(y, y.shape) if view else y
