"""Finds the role of each use of a tensor in a graph: the weight of a product or of a convolution, a table, or none."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rpqfx.graph.module_graphs import Captured
from rpqfx.nn.hosting.reparametrised import parametrised_at
from rpqfx.policies.site import Kind

_CONVS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED_CONVS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MATMULS = (torch.matmul, torch.mm, operator.matmul, "matmul", "mm")
_BMMS = (torch.bmm, "bmm")
_GROUPED = (torch._grouped_mm, F.grouped_mm)
_CASTS = ("to", "type_as", "contiguous", "float", "half", "bfloat16", "double")
_PIECES = (torch.chunk, torch.split, torch.unbind, "chunk", "split", "unbind")
# Uses that make no weight of a tensor: what is only added, joined or cut is a position, a token, a bias.
ADDITIVE = ("add", "iadd", "sub", "isub", "cat", "stack", "expand", "expand_as", "repeat", "getitem", "unsqueeze")


@dataclass(frozen=True)
class Role:
    """The role of one use of a tensor.

    Args:
        kind: As of a site.
        flipped: Whether its outputs are the matrix's columns.
        lead: Axes that make the rows.
        experts: Whether it is a matrix for each index of its first axis.
    """

    kind: Kind
    flipped: bool = False
    lead: int = 1
    experts: bool = False


@dataclass(frozen=True)
class Read:
    """One place where a module's graph reads a tensor.

    Args:
        words: Who reads it, and with what function.
        role: What that makes of it; None where that is nothing by which it is a weight.
        reader: Class of the module.
        outside: Whether its owner is another module.
        left: Whether it is the left operand of ``@``: dynamo calls ``matmul(x, w)`` where the code says ``w @ x``.
    """

    words: str
    role: Role | None
    reader: type[nn.Module]
    outside: bool = False
    left: bool = False


@dataclass(frozen=True)
class _Seen:
    """A tensor as a use gets it: how many axes are left, and what views it came through."""

    dims: int
    transposed: bool = False
    picked: bool = False


def reads_of(captured: Captured) -> dict[str, list[Read]]:
    """Every read of a Parameter in any graph, by the Parameter's qualified name.

    Args:
        captured: A model that was read.
    """
    axes = {name: p.dim() for name, p in captured.model.named_parameters(remove_duplicate=False)}
    found: dict[str, list[Read]] = defaultdict(list)
    modules = dict(captured.model.named_modules())
    for path, node in _nodes(captured):
        reader = type(modules[path])
        computed = parametrised_at(str(node.target)) if node.op == "call_module" else None
        if node.op == "call_module" and computed is None:
            found[f"{path}.{node.target}.weight".lstrip(".")].append(Read(f"{path or 'model'} calls it", None, reader))
        elif node.op in ("get_attr", "call_module"):
            name = f"{path}.{computed or node.target}".lstrip(".")
            outside = node.op == "get_attr" and "." in str(node.target)
            for user, value, seen in _uses(node, _Seen(axes.get(name, 2))):
                where = f"{path or 'model'}: {_function_name(user)}"
                left = user.target is operator.matmul and user.args[0] is value
                found[name].append(Read(where, _role(user, value, seen), reader, outside, left))
    return found


def _nodes(captured: Captured) -> Iterator[tuple[str, fx.Node]]:
    for path, found in captured.graphs.items():
        for graph in found.graphs:
            for node in graph.nodes:
                yield path, node


def _function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


# ------------------------------------------------------------------------------------------- seen through views


def _uses(node: fx.Node, seen: _Seen) -> Iterator[tuple[fx.Node, fx.Node, _Seen]]:
    """Users of a value, seen through transposes and casts of it, slices, pieces, and single experts' matrices."""
    for user in node.users:
        first = bool(user.args) and user.args[0] is node
        if first and user.target in _PIECES and user.op != "call_module":
            whole = "unbind" not in _function_name(user)
            piece = seen if whole else _one(seen, user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0))
            for element in user.users:
                if piece is not None and element.target is operator.getitem:
                    yield from _uses(element, piece)
        elif first and (after := _viewed(user, seen)) is not None:
            yield from _uses(user, after)
        else:
            yield user, node, seen


def _viewed(user: fx.Node, seen: _Seen) -> _Seen | None:
    """Returns the tensor after a view or a cast; None where the call is another use."""
    target, args = user.target, user.args[1:]
    if user.op == "call_method" and target in _CASTS:
        return seen
    if target in (torch.t, "t") or (
        target is getattr and args[0] in ("T", "mT") and (seen.dims == 2 or args[0] == "mT")
    ):
        return replace(seen, transposed=not seen.transposed)
    if target in (torch.transpose, "transpose") and len(args) == 2 and all(isinstance(axis, int) for axis in args):
        swapped = {axis % seen.dims for axis in args}  # type: ignore[operator]
        return replace(seen, transposed=not seen.transposed) if swapped == {seen.dims - 2, seen.dims - 1} else None
    if target is operator.getitem:
        return _indexed(args[0], seen)
    if target in (torch.narrow, "narrow"):
        return seen
    return None


def _indexed(index: Any, seen: _Seen) -> _Seen | None:
    items = index if isinstance(index, tuple) else (index,)
    if all(isinstance(item, slice) or item is Ellipsis for item in items):
        return seen
    rest = all(item == slice(None) or item is Ellipsis for item in items[1:])
    return _one(seen, 0) if rest and isinstance(items[0], (int, fx.Node)) else None


def _one(seen: _Seen, axis: Any) -> _Seen | None:
    """One expert's matrix."""
    return replace(seen, dims=2, picked=True) if seen.dims == 3 and axis == 0 else None


# ------------------------------------------------------------------------------------------------- what it is for


def _role(user: fx.Node, value: fx.Node, seen: _Seen) -> Role | None:
    """Returns the role of one argument of a call."""

    def given(position: int, *names: str) -> bool:
        named = any(user.kwargs.get(name) is value for name in names)
        return named or (len(user.args) > position and user.args[position] is value)

    target, transposed = user.target, seen.transposed
    if target is F.linear and given(1, "weight"):
        return _product(seen, transposed)
    if target in (F.embedding, F.embedding_bag) and given(1, "weight") and not transposed and not seen.picked:
        return Role("embedding")
    if target in _CONVS and given(1, "weight") and not seen.picked:
        return Role("conv")
    if target in _TRANSPOSED_CONVS and given(1, "weight") and not seen.picked:
        return Role("conv_transpose")
    if target in (torch.addmm, "addmm") and given(2, "mat2"):
        return _product(seen, not transposed)
    if target in (torch.baddbmm, "baddbmm") and (given(1, "batch1") or given(2, "batch2")):
        return _product(seen, transposed == given(1, "batch1"))
    if target in (*_MATMULS, *_BMMS, *_GROUPED) and given(1, "other", "mat2", "mat_b"):
        return _product(seen, not transposed)
    if target in (*_MATMULS, *_BMMS) and given(0, "input", "self"):
        return _product(seen, transposed)
    return _in_einsum(user, value, seen) if target is torch.einsum else None


def _product(seen: _Seen, flipped: bool) -> Role:
    if seen.picked or seen.dims == 3:
        return Role("experts", flipped, experts=True)
    return Role("linear", flipped) if seen.dims == 2 else Role("parameter", lead=seen.dims - 1)


def _in_einsum(user: fx.Node, value: fx.Node, seen: _Seen) -> Role | None:
    """By which axes are summed over, which are kept, and which one both operands and the result have: the experts'."""
    equation, operands = user.args[0], user.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation or value not in operands:
        return None
    terms, out = equation.replace(" ", "").split("->")
    axes = terms.split(",")[operands.index(value)]
    if len(axes) != seen.dims:
        return None
    axes = axes[:-2] + axes[:-3:-1] if seen.transposed else axes
    summed = [axis for axis in axes if axis not in out]
    others = "".join(term for place, term in enumerate(terms.split(",")) if place != operands.index(value))
    batch = [axis for axis in axes if axis in out and axis in others]
    if seen.picked or (len(axes) == 3 and batch == [axes[0]]):
        return Role("experts", axes[-1] not in summed, experts=True)
    kept = [axis for axis in axes if axis in out and axis not in others]
    for lead, flipped in ((len(summed), True), (len(kept), False)):
        if summed and kept and not batch and list(axes[:lead]) == (summed if flipped else kept):
            return Role("linear", flipped, lead)
    if len(axes) == 3 and len(summed) == 1 and axes[0] in kept:  # heads, each with a matrix
        return Role("experts", axes[-1] not in summed, experts=True)
    return Role("parameter", lead=len(axes) - 1, experts=len(axes) == 3)
