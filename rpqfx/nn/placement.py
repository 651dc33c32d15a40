"""Checks where a weight's tensors are: they and their operands must be on one device, with values in them."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.ops import Tensors


def check_placed(tensors: Tensors, x: Tensor | None, owner: nn.Module | None, bias: Tensor | None = None) -> None:
    """Raises where the tensors of a weight are not all on the device of the input.

    Shapes are still worked out on the meta device: with a weight that is there altogether, or for an input that is.

    Args:
        tensors: Tensors of the weight.
        x: The input, or None where the weight is read by itself.
        owner: The module that holds the weight, to name it by; None where there is none.
        bias: A bias that is added to the product, or None.

    Raises:
        InputError: If they are on several devices.
    """
    device = tensors.codebooks.device
    if (x is not None and x.device != device) or tensors.codes.device != device:
        _refuse(tensors, x, owner, bias)
    for tensor in (tensors.scale, tensors.signs, tensors.column_scale, bias):
        if tensor is not None and tensor.device != device:
            _refuse(tensors, x, owner, bias)


def refuse_meta(weight: nn.Module, tensors: Tensors, values: Iterable[Any]) -> None:
    """Raises an error where a weight without values is used with tensors that have some, in a call that torch serves.

    Torch does not notice everywhere: some of its functions then return memory that nothing was written to.

    Args:
        weight: The module that holds the weight.
        tensors: Tensors of the weight, which is on the meta device.
        values: The arguments of the call.

    Raises:
        InputError: If a tensor among them, or in a list among them, is on another device.
    """
    for value in values:
        if isinstance(value, (list, tuple)):
            refuse_meta(weight, tensors, value)
        elif isinstance(value, Tensor) and not value.is_meta and value.dim():  # a number goes with every device
            _refuse(tensors, value, weight, None)


def _refuse(tensors: Tensors, x: Tensor | None, owner: nn.Module | None, bias: Tensor | None) -> None:
    """Raises, unless it is an input on the meta device that asks weights with values for nothing but a shape."""
    held = {name: tensor.device for name, tensor in tensors._asdict().items() if isinstance(tensor, Tensor)}
    held |= {} if bias is None else {"bias": bias.device}
    missing = [name for name, device in held.items() if device.type == "meta"]
    if x is not None and x.is_meta and not missing and len(set(held.values())) == 1:
        return
    seen = held if x is None else {**held, "the input": x.device}
    places = [
        f"{', '.join(name for name, place in seen.items() if place == device)} on {device}"
        for device in dict.fromkeys(seen.values())
    ]
    unnamed = owner is None or torch.compiler.is_compiling()  # a compiler cannot trace how the name is found
    name = "a quantized weight" if unnamed else name_of(owner)  # type: ignore[arg-type]
    advice = "move the model, or the input, with .to(device)"
    if missing:
        advice = (
            "what is on meta has no values: rpqfx.materialize(model) draws them, and rpqfx.load or "
            "load_state_dict(..., assign=True) brings them from a file"
        )
    raise InputError(f"the tensors of {name} are not on one device: {'; '.join(places)}. {advice}")


def name_of(weight: nn.Module) -> str:
    """Returns how a weight is called in the model that it is a part of, for a message.

    Modules do not know what they are a part of, so all that are alive are asked. That takes a moment, and nobody but
    an error should.

    Args:
        weight: A module that holds a weight.

    Returns:
        Its place below the outermost module, with the class of the layer: ``"encoder.0.weight (RPQLinear)"``.
    """
    parents: dict[int, tuple[str, nn.Module]] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module):
            for name, child in thing.__dict__.get("_modules", {}).items():
                parents.setdefault(id(child), (name, thing))
    names: list[str] = []
    layer = parents.get(id(weight), ("", weight))[1]
    inner: nn.Module = weight
    while id(inner) in parents and len(names) < len(parents):
        name, inner = parents[id(inner)]
        names.insert(0, name.removesuffix("_rpq") if not names else name)
    return f"{'.'.join(names) or 'a weight'} ({type(layer).__name__})"
