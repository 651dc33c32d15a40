"""Where a model attends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import fx, nn

from rpqfx.graph.module_graphs import Captured
from rpqfx.graph.written_attention import find_written
from rpqfx.graph.written_products import Products
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
            ``"latent"``: likewise, of keys and values that its ``expand_kv`` makes of what a cache holds.
            ``"products"``: its own code multiplies queries by keys, and weights by values.
        products: Which of its products these are, where it is of the last kind.
        obstacle: What it does that is not known here, or None.
    """

    name: str
    module: nn.Module
    kind: Literal["call", "torch", "transformers", "latent", "products"]
    products: Products | None = None
    obstacle: str | None = None


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
            latent = callable(getattr(type(module), "expand_kv", None))
            found.append(AttentionSite(name, module, "latent" if latent else "transformers"))
        elif _calls(captured, name) or _is_opaque_caller(captured, name, module):
            found.append(AttentionSite(name, module, "call"))
    return found


def with_written(
    model: nn.Module, sites: Sequence[AttentionSite], run: Callable[[], Any]
) -> tuple[list[AttentionSite], str | None]:
    """Returns attention modules and those besides whose own code multiplies out what they attend to, causally.

    Args:
        model: The model, in eval mode and without gradients.
        sites: What ``find_attention`` returned.
        run: Runs the model once.

    Returns:
        The modules, in the order of the model's, and the name of the first that is left out since its tokens attend to
        later ones, or None.
    """
    found, ahead = {site.name: site for site in sites}, None
    for name, written in find_written(model, run, [site.module for site in sites]).items():
        if written.causal:
            site = AttentionSite(name, model.get_submodule(name), "products", written.products, written.obstacle)
            found.setdefault(name, site)
        elif ahead is None:
            ahead = name
    return [found[name] for name, _ in model.named_modules() if name in found], ahead


def attends_causally(captured: Captured, site: AttentionSite) -> bool:
    """Returns whether a module says of itself, or its calls say, that no token sees later ones.

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
