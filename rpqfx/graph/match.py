"""Step two: find the tensors that could be held in codebooks, and what each is for."""

from __future__ import annotations

import dataclasses
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from rpqfx.graph.capture import Captured
from rpqfx.graph.hints import Nearest, heads, initial_std
from rpqfx.graph.obstacles import Obstacles, quantised_sites
from rpqfx.nn.backed import backed_weights
from rpqfx.nn.layer import zero_row
from rpqfx.site import Kind, Site

_MODULE_KINDS: tuple[tuple[type[nn.Module], Kind], ...] = (
    (nn.Linear, "linear"),
    (nn.Embedding, "embedding"),
    (nn.EmbeddingBag, "embedding_bag"),
    (nn.modules.conv._ConvTransposeNd, "conv_transpose"),
    (nn.modules.conv._ConvNd, "conv"),
    (nn.Bilinear, "bilinear"),
    (nn.MultiheadAttention, "attention"),
)
_CONVS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED_CONVS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_CASTS = ("to", "type_as", "contiguous", "float", "half", "bfloat16", "double")
# Uses that make no weight of a tensor: what is only added, joined or cut is a position, a token, a bias.
_ADDITIVE = ("add", "iadd", "sub", "isub", "cat", "stack", "expand", "expand_as", "repeat", "getitem", "unsqueeze")


@dataclass(frozen=True)
class _Role:
    """What one use makes of a tensor."""

    kind: Kind
    flipped: bool = False
    lead: int = 1


def find_sites(captured: Captured) -> list[Site]:
    """Lists every Parameter of two or more axes, with its use, or with why it must stay as it is.

    Args:
        captured: A model that was read.

    Returns:
        One site a tensor, however many names it has, in the order of the model's Parameters.
    """
    model = captured.model
    owners: dict[int, list[tuple[str, nn.Module, str, nn.Parameter]]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1:
                owners[id(parameter)].append((path, module, attribute, parameter))
    reads = _reads(captured)
    obstacles = Obstacles(model)
    nearest_heads, nearest_std = Nearest(model, heads), Nearest(model, initial_std)
    sites = []
    for places in owners.values():
        path, module, attribute, parameter = places[0]
        names = tuple(dict.fromkeys(f"{p}.{a}".lstrip(".") for p, _, a, _ in places))
        found = [use for name in names for use in reads.get(name, ())]
        role, unused = _role(places, found, captured)
        table = [m for _, m, _, _ in places if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        rows_only = table or role.kind in ("embedding", "embedding_bag", "conv", "conv_transpose", "parameter")
        sites.append(
            Site(
                name=names[0],
                names=names,
                kind=role.kind,
                module_type=type(module),
                shape=tuple(parameter.shape),
                dtype=parameter.dtype,
                lead=role.lead,
                flipped=role.flipped,
                splits=not rows_only,
                zero_vector=next((row for t in table if (row := zero_row(t)) is not None), None),
                std=nearest_std.of(path),
                heads=nearest_heads.of(path),
                read_outside=any(use.outside for use in found),
                uses=tuple(dict.fromkeys(use.words for use in found)),
                blocked=obstacles.to(parameter, module, names[0]) or unused,
            )
        )
    return sites + list(quantised_sites(model))


# --------------------------------------------------------------------------------------- what a tensor is for


@dataclass(frozen=True)
class _Read:
    """One place where a module's graph reads a tensor."""

    words: str
    role: _Role | None
    outside: bool = False


def _reads(captured: Captured) -> dict[str, list[_Read]]:
    """Every read of a Parameter in any graph, by the Parameter's qualified name."""
    found: dict[str, list[_Read]] = defaultdict(list)
    for path, node in _nodes(captured):
        if node.op == "call_module":
            found[f"{path}.{node.target}.weight".lstrip(".")].append(_Read(f"{path or 'model'} calls it", None))
        elif node.op == "get_attr":
            for user, value, turned in _through_transposes(node):
                where = f"{path or 'model'}: {_function_name(user)}"
                name = f"{path}.{node.target}".lstrip(".")
                found[name].append(_Read(where, _role_in(user, value, turned), "." in str(node.target)))
    return found


def _nodes(captured: Captured) -> Iterator[tuple[str, fx.Node]]:
    for path, found in captured.graphs.items():
        for graph in found.graphs:
            for node in graph.nodes:
                yield path, node


def _through_transposes(node: fx.Node, turned: bool = False) -> Iterable[tuple[fx.Node, fx.Node, bool]]:
    """Users of a value, seen through transposes and casts of it."""
    for user in node.users:
        if _is_transpose(user):
            yield from _through_transposes(user, not turned)
        elif user.op == "call_method" and user.target in _CASTS and user.args[0] is node:
            yield from _through_transposes(user, turned)
        else:
            yield user, node, turned


def _is_transpose(node: fx.Node) -> bool:
    if node.target in (torch.t, "t"):
        return True
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    if node.target in (torch.transpose, "transpose"):
        return {axis % 2 if isinstance(axis, int) else -1 for axis in node.args[1:]} == {0, 1}
    return False


def _function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _role_in(user: fx.Node, value: fx.Node, turned: bool) -> _Role | None:
    """What a call makes of one of its arguments: ``turned`` says that it gets the transpose."""

    def given(position: int, name: str) -> bool:
        return (len(user.args) > position and user.args[position] is value) or user.kwargs.get(name) is value

    target = user.target
    if target is F.linear and given(1, "weight"):
        return _Role("linear", turned)
    if target in (F.embedding, F.embedding_bag) and given(1, "weight") and not turned:
        return _Role("embedding")
    if target in _CONVS and given(1, "weight"):
        return _Role("conv")
    if target in _TRANSPOSED_CONVS and given(1, "weight"):
        return _Role("conv_transpose")
    if target in (torch.addmm, "addmm") and given(2, "mat2"):
        return _Role("linear", not turned)
    if target in (torch.matmul, torch.mm, operator.matmul, "matmul", "mm") and (given(1, "other") or given(1, "mat2")):
        return _Role("linear", not turned)
    if target in (torch.matmul, torch.mm, operator.matmul) and given(0, "input"):
        return _Role("linear", turned)
    if target is torch.einsum:
        return _einsum_role(user, value)
    if target in (torch.bmm, torch.baddbmm, "bmm", "baddbmm"):
        return _Role("parameter", lead=2)
    return None


def _einsum_role(user: fx.Node, value: fx.Node) -> _Role | None:
    equation, operands = user.args[0], user.args[1:]
    if not isinstance(equation, str) or "->" not in equation or value not in operands:
        return None
    terms, out = equation.replace(" ", "").split("->")
    axes = terms.split(",")[operands.index(value)]
    if len(axes) == 2:
        return _Role("linear", flipped=axes[0] not in out)
    return _Role("parameter", lead=max(1, len(axes) - 1))


def _role(
    places: list[tuple[str, nn.Module, str, nn.Parameter]], reads: list[_Read], captured: Captured
) -> tuple[_Role, str | None]:
    """The tensor's role, and why that is not one for codebooks (None where it is)."""
    for _, module, attribute, _ in places:
        for kind_of, kind in _MODULE_KINDS:
            if isinstance(module, kind_of) and attribute in ("weight", "in_proj_weight", *_QKV):
                return _Role(kind, lead=2 if kind == "bilinear" else 1), None
    roles = [read.role for read in reads if read.role is not None]
    dims = places[0][3].dim()
    if roles:
        if roles[0].kind == "linear" and dims > 2:
            return _Role("parameter", lead=dims - 1), None
        return dataclasses.replace(roles[0], lead=min(roles[0].lead, dims - 1)), None
    generic = _Role("parameter", lead=dims - 1)
    graph = captured.graphs.get(places[0][0])
    if graph is None or not graph.graphs:
        return generic, None
    ops = sorted({read.words.partition(": ")[2] for read in reads})
    if any(op.strip("_") not in _ADDITIVE for op in ops):
        return generic, None
    how = f"used by {', '.join(ops)}" if ops else "not used in its module's own forward"
    return generic, f"{how}, not as a weight of a product, a convolution or a lookup"


_QKV = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def is_rewritten(model: nn.Module) -> bool:
    """Whether any module of a model already holds a tensor in codebooks."""
    return any(backed_weights(module) for module in model.modules())
