"""``check_outputs`` compares a rewritten model with the dense model that it stands for, on example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rpqfx.conversion.dequantize import dequantize
from rpqfx.errors import InputError, RewriteError
from rpqfx.graph.copying import copy_model
from rpqfx.graph.generators import generator_states, set_generator_states
from rpqfx.graph.module_graphs import evaluating
from rpqfx.nn.wrappers import unwrapped
from rpqfx.policies.arguments import check_model, example_call


def check_outputs(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Raises an error unless a rewritten model computes what the dense model with the same weights does.

    Copies of both run in eval mode, the dense one as [`dequantize`][rpqfx.conversion.dequantize.dequantize] makes it;
    ``model`` is left untouched.

    Args:
        model: A model that ``rpqify`` or ``convert`` returned.
        example_inputs: Positional inputs of one call, or the one tensor that the model takes.
        example_kwargs: Keyword inputs of that call.

    Raises:
        InputError: If ``model`` is no module or on the meta device, or the inputs are not those of one call of it.
        RPQError: If no weight of it is quantized, or ``dequantize`` cannot make the dense model.
        RewriteError: If floating outputs differ by more than rounding, or others in shape or dtype.
    """
    check_model(model, "check_outputs")
    inner = unwrapped(model)
    args, kwargs = example_call(inner, example_inputs, example_kwargs)
    if any(tensor.is_meta for tensor in inner.parameters()):
        raise InputError("this model is on the meta device and has no values to compare; call rpqfx.materialize first")
    dense = dequantize(inner)
    found, wanted = (_outputs(one, args, kwargs) for one in (copy_model(inner), dense))
    if found[1] != wanted[1] or not all(_near(a, b) for a, b in zip(found[0], wanted[0], strict=True)):
        raise RewriteError(
            "on the example inputs the rewritten model does not compute what the dense model with the expanded "
            "weights does; please report the model, and skip the layers that cause it with a Rule"
        )


def _outputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
    states = generator_states(tensor.device for tensor in model.parameters())
    try:
        with evaluating(model):
            return tree_flatten(model(*args, **kwargs))
    finally:
        set_generator_states(states)


def _near(found: Any, wanted: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return True
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return False
    if not (found.is_floating_point() or found.is_complex()):  # such as tokens, which rounding may exchange
        return True
    tolerance = 5e-2 if found.dtype in (torch.float16, torch.bfloat16) else 1e-4
    finite = wanted[wanted.isfinite()].abs()  # a mask of minus infinity is no scale
    largest = max(1.0, float(finite.max())) if finite.numel() else 1.0
    return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
