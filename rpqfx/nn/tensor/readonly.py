"""Tensors that were made of codebooks, and what shares their memory: changing them in place is refused, not lost.

A Parameter may be changed through any view of it, through ``out=`` and by functions with a flag for it. A tensor that
is made at each read would take such a change along to where nobody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rpqfx.errors import RewriteError

# What is set on a Parameter for good would be gone with the tensor; gradients are those of the codebooks.
_FOR_GOOD = {
    Tensor.register_hook: "register_hook",
    Tensor.register_post_accumulate_grad_hook: "register_post_accumulate_grad_hook",
    Tensor.retain_grad: "retain_grad",
    Tensor.set_: "set_",
}


def refused(what: str) -> RewriteError:
    """Returns the error for a change of a tensor that is computed at each read.

    Args:
        what: Name of the function.
    """
    return RewriteError(
        f"{what} would change a quantized weight, which is computed anew at each read; "
        "change its codebooks, keep the change apart (an adapter: do not merge it, or call rpqfx.dequantize first), "
        "or leave this layer dense with a Rule"
    )


def check_for_good(func: Callable[..., Any], args: Sequence[Any]) -> None:
    """Refuses what would be set on a tensor that is computed at each read.

    Args:
        func: A function of torch, called on such a tensor.
        args: Its arguments.

    Raises:
        RewriteError: If it is one of those.
    """
    name = _FOR_GOOD.get(func)
    if name is None and func == Tensor.grad.__set__ and args[1] is not None:  # type: ignore[union-attr]
        name = "grad"
    if name is not None:
        raise RewriteError(
            f"{name} would be lost on a quantized weight, which is computed anew at each read; "
            "use the Parameter weight_rpq.codebooks, whose gradient it is, or leave this layer dense with a Rule"
        )


def call(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], made: Sequence[Tensor]) -> Any:
    """Calls a function with tensors that were made of codebooks.

    Args:
        func: A function of torch.
        args: Its arguments, with plain tensors.
        kwargs: Those by name.
        made: The tensors among them that were made of codebooks, or share memory with such.

    Returns:
        What the function returns; tensors that share memory with one of ``made`` as ``WeightView``, arrays of NumPy as
        read-only ones.

    Raises:
        RewriteError: If the function changed one of them.
    """
    watched = [tensor for tensor in made if type(tensor) is Tensor and not tensor.is_inference()]
    versions = [tensor._version for tensor in watched]
    result = func(*args, **kwargs)
    if [tensor._version for tensor in watched] != versions:
        raise refused(getattr(func, "__name__", "this"))
    if func is Tensor.numpy:
        result.flags.writeable = False
        return result
    return _marked(result, {_memory(tensor) for tensor in made} - {0})


class WeightView(Tensor):
    """A tensor that shares memory with one that was made of codebooks. Only changing it in place is refused."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made: list[Tensor] = []
        with torch._C.DisableTorchFunctionSubclass():
            plain = [_plain(arg, made) for arg in args]
            named = {key: _plain(value, made) for key, value in (kwargs or {}).items()}
        return call(func, plain, named, made)


def _plain(value: Any, made: list[Tensor]) -> Any:
    if type(value) is WeightView:
        made.append(value.as_subclass(Tensor))
        return made[-1]
    if isinstance(value, (list, tuple)) and any(type(item) is WeightView for item in value):
        return type(value)([_plain(item, made) for item in value])
    return value


def _marked(result: Any, memory: set[int]) -> Any:
    if type(result) is Tensor:
        return result.as_subclass(WeightView) if memory and _memory(result) in memory else result
    if type(result) in (list, tuple):
        return type(result)([_marked(item, memory) for item in result])
    return result


def _memory(tensor: Tensor) -> int:
    """Returns where a tensor lies; 0 where it has no memory, as wrappers of torch.func and of tracers."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return 0
