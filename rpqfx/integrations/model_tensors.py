"""Tensors in a model by their names, those of no state dict among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def tensor_at(modules: Mapping[str, nn.Module], name: str) -> Tensor | None:
    """Returns the Parameter or buffer of a name, or None.

    Args:
        modules: Of the model, by name.
        name: Of the tensor.
    """
    path, _, attribute = name.rpartition(".")
    module = modules[path]
    found = module._parameters.get(attribute)
    return module._buffers.get(attribute) if found is None else found


def put_beside(modules: Mapping[str, nn.Module], entry: Mapping[str, Any], tensor: Tensor) -> None:
    """Puts a tensor that no state dict has, under all its names, to where the one is that was made for it.

    Args:
        modules: Of the model, by name.
        entry: Of the tensor, in a manifest.
        tensor: Goes to the device of the one that is there.
    """
    for name in entry["names"]:
        path, _, attribute = name.rpartition(".")
        module = modules[path]
        group = module._buffers if entry["kind"] == "buffer" else module.__dict__
        before = group.get(attribute)
        if isinstance(before, Tensor) and not before.is_meta:
            tensor = tensor.to(before.device)
        group[attribute] = tensor
