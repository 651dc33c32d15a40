"""Recurrent layers whose weights are quantized.

``LSTM``, ``GRU`` and ``RNN`` keep a second list of their Parameters, in the order in which torch's fused function takes
them. Here that list is made from the names at each read, so that it holds what the codebooks hold, and nothing dense
stays alive in it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.nn.hosting.backed import Backed
from rpqfx.nn.hosting.host import register_adapter
from rpqfx.nn.layer import redraw

_OWN_RESETS = (nn.RNNBase.reset_parameters, nn.RNNCellBase.reset_parameters)


class BackedCell(Backed):
    """A recurrent cell with quantized weights, which draws itself anew in its own way."""

    _rpq_base: Any
    hidden_size: int

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the layer anew, each tensor with the standard deviation that torch.nn gives it."""
        own = self._rpq_base.reset_parameters
        if own not in _OWN_RESETS:  # a subclass has a way of its own
            own(self)
            return
        redraw(self)
        self.reset_rest()

    @torch.no_grad()
    def reset_rest(self) -> None:
        """Draws what is not quantized."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters(recurse=False):
            parameter.uniform_(-bound, bound)


class BackedRecurrent(BackedCell):
    """``LSTM``, ``GRU`` and ``RNN`` with quantized weights."""

    _flat_weights_names: list[str]
    _flat_weight_refs: list[Any]

    def _adopt(self) -> None:
        self.__dict__.pop("_flat_weights", None)
        self._flat_weight_refs = []

    @property
    def _flat_weights(self) -> list[Any]:
        """The weights in the order of torch's fused functions, those in codebooks as ``VirtualWeight``."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        """Nothing is kept: copying, replicating and converting a layer set what is made from the names anyway."""

    def _init_flat_weights(self) -> None:
        """Nothing: there is no list that could be out of date."""

    def _weights_have_changed(self) -> bool:
        return False


register_adapter(nn.RNNCellBase, BackedCell)
register_adapter(nn.RNNBase, BackedRecurrent)
