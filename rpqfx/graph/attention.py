"""Where a model attends."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import fx, nn

from rpqfx.graph.module_graphs import Captured
from rpqfx.nn.hosting.host import READ_AS

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


def attends_causally(captured: Captured, site: AttentionSite) -> bool:
    """Whether a module says of itself, or its calls say, that no token sees later ones.

    False is no proof: a mask may say so when the model runs.

    Args:
        captured: The model as it was read.
        site: The module.
    """
    if any(getattr(site.module, name, False) is True for name in ("is_causal", "causal")):
        return True
    return any(call.kwargs.get("is_causal") is True or True in call.args[5:6] for call in _calls(captured, site.name))


def _calls(captured: Captured, name: str) -> list[fx.Node]:
    graphs = captured.graphs[name].graphs if name in captured.graphs else ()
    return [node for graph in graphs for node in graph.nodes if node.target is F.scaled_dot_product_attention]


def _is_opaque_caller(captured: Captured, name: str, module: nn.Module) -> bool:
    held = captured.graphs.get(name)
    return held is not None and held.opaque is not None and F.scaled_dot_product_attention.__name__ in _names(module)


def _names(module: nn.Module) -> tuple[str, ...]:
    """Names that the code of a module's forward uses."""
    forward = inspect.unwrap(getattr(type(module), READ_AS, type(module)).forward)
    code = getattr(forward, "__code__", None)
    return () if code is None else code.co_names
