"""A module's graph with those of its children in the places where it calls them."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from rpqfx.graph.module_graphs import Captured

_STARS = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}


def inlined(captured: Captured, name: str) -> Iterator[fx.Graph]:
    """Graphs of one module, in which calls of modules name them as the whole model does.

    Calls stay where a module has no graph: torch.nn's own layers, leaves, and what could not be read.

    Args:
        captured: The model as it was read.
        name: Qualified name of the module.

    Yields:
        One graph for each that was read of the module; to be looked at, not run.
    """
    for source in _graphs(captured, name):
        graph = fx.Graph()
        given = {node: graph.placeholder(node.name) for node in source.nodes if node.op == "placeholder"}
        graph.output(_copy(captured, name, source, graph, given))
        yield graph


def _graphs(captured: Captured, name: str) -> tuple[fx.Graph, ...]:
    """Those of a module; ``nn.Sequential`` is torch's own, but has one too."""
    module = captured.model.get_submodule(name)
    if type(module).forward is not nn.Sequential.forward:
        held = captured.graphs.get(name)
        return () if held is None else held.graphs
    graph = fx.Graph()
    value = graph.placeholder("input")
    for child in module._modules:
        value = graph.call_module(child, (value,))
    graph.output(value)
    return (graph,)


def _copy(captured: Captured, name: str, source: fx.Graph, graph: fx.Graph, given: Mapping[fx.Node, Any]) -> Any:
    """Copies a module's graph behind what there is; returns what it returns."""
    values: dict[fx.Node, Any] = dict(given)
    for node in source.nodes:
        if node in values:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            return args[0]
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)) and isinstance(args[1], int):
            values[node] = args[0][args[1]]
            continue
        target = f"{name}.{node.target}".lstrip(".") if node.op in ("call_module", "get_attr") else node.target
        if node.op == "call_module":
            child = captured.model.get_submodule(target)
            inner = next(iter(_graphs(captured, target)), None)
            bound = None if inner is None else _bound(child, inner, args, kwargs)
            if inner is not None and bound is not None:
                values[node] = _copy(captured, target, inner, graph, bound)
                continue
        values[node] = graph.create_node(node.op, target, args, kwargs)
    return None


def _bound(child: nn.Module, graph: fx.Graph, args: Any, kwargs: Any) -> dict[fx.Node, Any] | None:
    """Returns the value of each placeholder in a call; None where the call does not fit."""
    try:
        call = inspect.signature(child.forward).bind(*args, **kwargs)
    except TypeError:
        return None
    call.apply_defaults()
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(child.forward).parameters.items():
        given[_STARS.get(parameter.kind.name, "") + name] = call.arguments[name]
    bound: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
            name = name if name in given else re.sub(r"_\d+$", "", name)  # of arguments at their defaults
            if name not in given:
                return None
            bound[node] = given[name]
    return bound
