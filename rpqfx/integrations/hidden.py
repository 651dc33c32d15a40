"""Tensors that a model has already, hidden from transformers while it loads the rest."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


class Hidden:
    """Leaves tensors out of a model's state dict, until ``show``, and marks them as initialized.

    transformers takes from a folder what the state dict has. What it lacks is one more name that is not looked for.

    Args:
        model: A transformers model.
        state: Its state dict, of the tensors themselves.
        names: What is hidden; a state dict may lack some of it anyway.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Any], names: Iterable[str]) -> None:
        there = {id(state[name]) for name in names if name in state}
        self.names = {name for name, tensor in state.items() if id(tensor) in there}  # a tensor under all its names
        for name in self.names:
            if isinstance(state[name], Tensor):
                state[name]._is_hf_initialized = True
        self._hook = model.register_state_dict_post_hook(functools.partial(_leave_out, self.names))

    def show(self) -> None:
        """Has the state dict be whole again."""
        self._hook.remove()


def _leave_out(names: Iterable[str], model: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
    for name in names:
        state.pop(prefix + name, None)
