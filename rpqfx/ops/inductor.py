"""Products of a compiled graph that do not need each other, as one call of a kernel.

With one row, a product with codes in tiles takes a few microseconds, about as long as it takes to call it. Queries,
keys and values, or the gate and the input of a feed-forward block, need not wait for each other: here they become one
call, whose work the threads share out evenly.
"""

from __future__ import annotations

import hashlib
import operator
from pathlib import Path
from typing import Any

import torch
from torch import fx

_Node = fx.Node


def inductor_options() -> dict[str, Any]:
    """Returns options of torch's Inductor with which compiled models call the CPU kernels less often.

    Example:
        >>> step = torch.compile(torch.nn.Linear(2, 2), options=rpqfx.inductor_options())

    Returns:
        ``{"post_grad_custom_post_pass": ...}``, for ``torch.compile(model, options=...)`` and for
        ``torch._inductor.aoti_compile_and_package(program, inductor_configs=...)``. Graphs without codes in tiles stay
        as they are, and results are the same to the last bit.
    """
    return {"post_grad_custom_post_pass": _make_pass()}


def merge_products(graph: fx.Graph) -> int:
    """Makes one call of products with codes in tiles that do not depend on each other.

    Args:
        graph: A functional graph of operators, as Inductor has it after its own changes; changed in place.

    Returns:
        How many calls there are fewer.
    """
    if not hasattr(torch.ops.rpqfx_cpu, "tiled_many"):
        return 0
    fewer = 0
    while groups := _groups(graph):  # what has moved can let others meet
        for group, later in groups:
            _merge(graph, group, later)
            fewer += len(group) - 1
    return fewer


def _groups(graph: fx.Graph) -> list[tuple[list[_Node], list[_Node]]]:
    """Returns products that can be one call, in order, and the nodes between them that need some of them."""
    found: list[tuple[list[_Node], list[_Node]]] = []
    group: list[_Node] = []
    needing: dict[_Node, None] = {}
    between: list[_Node] = []

    def close() -> None:
        if len(group) > 1:
            last = group[-1]
            found.append((list(group), [node for node in between if node < last]))
        for one in (group, needing, between):
            one.clear()

    for node in graph.nodes:
        needs = any(used in needing for used in node.all_input_nodes)
        if node.op == "call_function" and node.target is torch.ops.rpqfx_cpu.tiled.default and _alone(node):
            if needs or (group and not _alike(group[0], node)):
                close()
            group.append(node)
            needing[node] = None
        elif not _pure(node):
            close()  # what comes after must not move before it, nor the other way round
        elif needs:
            needing[node] = None
            between.append(node)
    close()
    return found


def _alone(node: _Node) -> bool:
    """Returns whether a product has no factors, which in compiled graphs are operations of their own."""
    dims, scale = _arguments(node)[4:6]
    return dims is None and scale is None


def _alike(first: _Node, node: _Node) -> bool:
    """Returns whether two products have inputs of as many rows and of one dtype, and ways of the same choice."""
    one, other = (_arguments(each) for each in (first, node))
    x, y = one[0].meta["val"], other[0].meta["val"]
    return bool(x.dtype == y.dtype and x.shape[:-1] == y.shape[:-1] and one[7] == other[7])


def _arguments(node: _Node) -> list[Any]:
    """Returns ``x``, codebooks, tiles, number of vectors, ``dims``, ``scale``, bias and most rows of a call."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip([argument.name for argument in schema], node.args, strict=False)) | node.kwargs
    return [given[argument.name] for argument in schema]


def _pure(node: _Node) -> bool:
    """Returns whether a node may change its place among others that it does not need."""
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr")
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return getattr(node.target, "__module__", "") == "_operator"  # arithmetic of sizes, an item of a tuple


def _merge(graph: fx.Graph, group: list[_Node], later: list[_Node]) -> None:
    arguments = [_arguments(node) for node in group]
    columns = [[each[i] for each in arguments] for i in (0, 1, 2, 3, 6)]
    with graph.inserting_after(group[-1]):
        call = graph.call_function(torch.ops.rpqfx_cpu.tiled_many.default, (*columns, arguments[0][7]))
    call.meta["val"] = [node.meta["val"] for node in group]
    place = call
    for i, node in enumerate(group):
        with graph.inserting_after(place):
            place = graph.call_function(operator.getitem, (call, i))
        place.meta.update(node.meta)
        node.replace_all_uses_with(place)
        graph.erase_node(node)
    for node in later:
        place.append(node)
        place = node


def _make_pass() -> Any:
    """Returns the pass. Its class is made here: importing Inductor takes seconds, and not every model is compiled."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class MergeProducts(CustomGraphPass):
        """``merge_products``, which Inductor's caches know by this file's text."""

        def __call__(self, graph: fx.Graph) -> None:
            merge_products(graph)

        def uuid(self) -> str:
            return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    return MergeProducts()
