"""Where a model attends: modules whose keys and values could be held as codes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import nn

from rpqfx.graph.capture import Captured

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True)
class AttentionSite:
    """A module that attends.

    Args:
        name: Its qualified name.
        module: The module.
        kind: ``"call"``: its forward calls ``scaled_dot_product_attention``. ``"torch"``: it is a
            ``torch.nn.MultiheadAttention``. ``"transformers"``: it asks transformers' table of attention functions.
    """

    name: str
    module: nn.Module
    kind: Literal["call", "torch", "transformers"]


def find_attention(captured: Captured) -> list[AttentionSite]:
    """The attention modules of a model, in the order of its modules.

    Calls are found in the fx graphs of modules; of modules that could not be read, in the code of their forward.

    Args:
        captured: The model as it was read.
    """
    found = []
    for name, module in captured.model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found.append(AttentionSite(name, module, "torch"))
        elif _INTERFACE in _names(module) and hasattr(module, "config"):
            found.append(AttentionSite(name, module, "transformers"))
        elif _calls(captured, name) or _is_opaque_caller(captured, name, module):
            found.append(AttentionSite(name, module, "call"))
    return found


def _calls(captured: Captured, name: str) -> bool:
    graphs = captured.graphs[name].graphs if name in captured.graphs else ()
    return any(node.target is F.scaled_dot_product_attention for graph in graphs for node in graph.nodes)


def _is_opaque_caller(captured: Captured, name: str, module: nn.Module) -> bool:
    held = captured.graphs.get(name)
    return held is not None and held.opaque is not None and F.scaled_dot_product_attention.__name__ in _names(module)


def _names(module: nn.Module) -> tuple[str, ...]:
    """Names that the code of a module's forward uses."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return () if code is None else code.co_names
