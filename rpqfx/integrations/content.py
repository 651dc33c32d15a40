"""The tensors of a folder that ``save_pretrained`` writes, and the manifest beside them."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from rpqfx.graph.pretrained_calls import EXTRA, first_matrix
from rpqfx.integrations.folder import GUARD
from rpqfx.storage.container import FORMAT as MARK
from rpqfx.storage.container import SEAL
from rpqfx.storage.sealed_manifest import prepared, seal_of


def content(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a folder and what is said of them, which each of its files carries.

    Args:
        model: A rewritten model.

    Raises:
        RPQError: If it could not be loaded again.
    """
    tensors, text = prepared(model)
    guards = {name for site in json.loads(text)["sites"] for name in site["names"]}
    if not guards and (first := first_matrix(model)) is not None:
        tensors[first[0]] = tensors[first[0]].reshape(-1)
    owned = _apart(tensors)
    owned |= {name: torch.zeros(GUARD, dtype=torch.uint8) for name in guards}
    for name, value in model.state_dict().items():
        if name.endswith(_EXTRA_STATE_KEY_SUFFIX) and isinstance(value, Tensor):
            owned[name.removesuffix(_EXTRA_STATE_KEY_SUFFIX) + EXTRA] = value.clone()
    return owned, {MARK: text, SEAL: seal_of(text)}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory, which safetensors cannot hold."""
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    shared = {place for place in places if place and places.count(place) > 1} if len(set(places)) < len(places) else ()
    return {
        name: tensor.clone() if place in shared else tensor.contiguous()
        for (name, tensor), place in zip(tensors.items(), places, strict=True)
    }
