"""Step two: find the tensors that could be held in codebooks, and what each is for."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from rpqfx.graph.capture import Captured
from rpqfx.nn.backed import backed_weights
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
_HEADS = ("num_heads", "n_heads", "heads", "n_head", "nhead", "num_attention_heads")


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
    aliases = _storage_aliases(model)
    kept = _kept_elsewhere(model)
    heads = _Nearest(model, _heads)
    stds = _Nearest(model, _initial_std)
    sites = []
    for places in owners.values():
        path, module, attribute, parameter = places[0]
        names = tuple(dict.fromkeys(f"{p}.{a}".lstrip(".") for p, _, a, _ in places))
        found = [use for name in names for use in reads.get(name, ())]
        role, blocked = _role(places, found, captured)
        blocked = _blocked(parameter, module, names) or aliases.get(id(parameter)) or kept.get(id(parameter)) or blocked
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
                zero_vector=next((t.padding_idx for t in table if t.padding_idx is not None), None),
                std=stds.of(path),
                heads=heads.of(path),
                uses=tuple(dict.fromkeys(use.words for use in found)),
                blocked=blocked,
            )
        )
    return sites + list(_quantised(model))


# --------------------------------------------------------------------------------------- what a tensor is for


@dataclass(frozen=True)
class _Read:
    """One place where a module's graph reads a tensor."""

    words: str
    role: _Role | None


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
                found[name].append(_Read(where, _role_in(user, value, turned)))
    return found


def _nodes(captured: Captured) -> Iterator[tuple[str, fx.Node]]:
    for path, found in captured.graphs.items():
        for graph in found.graphs:
            for node in graph.nodes:
                yield path, node


def _through_transposes(node: fx.Node, turned: bool = False) -> Iterable[tuple[fx.Node, fx.Node, bool]]:
    """Users of a value, seen through transposes of it."""
    for user in node.users:
        if _is_transpose(user):
            yield from _through_transposes(user, not turned)
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
    if target is F.embedding and given(1, "weight") and not turned:
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
    how = f"used by {', '.join(ops)}" if ops else "not used in its module's own forward"
    return generic, f"{how}, not as a weight of a product, a convolution or a lookup"


_QKV = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


# ---------------------------------------------------------------------------------- what must stay as it is


def _blocked(parameter: nn.Parameter, module: nn.Module, names: tuple[str, ...]) -> str | None:
    checks: tuple[tuple[Callable[[], Any], str], ...] = (
        (lambda: isinstance(module, torch.jit.ScriptModule), "its module is a ScriptModule"),
        (
            lambda: isinstance(module, fx.GraphModule),
            "it belongs to an fx GraphModule itself, which makes its own class",
        ),
        (lambda: isinstance(module, parametrize.ParametrizationList), "its module is parametrised"),
        (lambda: parameter.layout != torch.strided, f"its layout is {parameter.layout}, not strided"),
        (lambda: parameter.is_quantized or not parameter.dtype.is_floating_point, f"its dtype is {parameter.dtype}"),
        (lambda: parameter.dtype.itemsize < 2, f"its dtype is {parameter.dtype}"),
        (lambda: type(parameter) is not nn.Parameter, f"it is a {type(parameter).__name__}, not a plain Parameter"),
        (lambda: parameter._backward_hooks, "it has a gradient hook, which codebooks would not call"),
        (lambda: parameter.numel() == 0, "it is empty"),
        (lambda: _is_split_norm(module, names[0]), "a hook computes its module's weight from it (weight norm)"),
    )
    return next((reason for check, reason in checks if check()), None)


def _is_split_norm(module: nn.Module, name: str) -> bool:
    attribute = name.rpartition(".")[2]
    return attribute.endswith(("_g", "_v", "_orig")) and attribute.rpartition("_")[0] in module.__dict__


def _storage_aliases(model: nn.Module) -> dict[int, str]:
    """Parameters that are views of one storage: rewriting one would cut it off from the others."""
    by_storage: dict[int, dict[int, str]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        if parameter.layout == torch.strided and not parameter.is_meta and type(parameter) is nn.Parameter:
            by_storage[parameter.untyped_storage().data_ptr()][id(parameter)] = name
    by_storage.pop(0, None)
    found = {}
    for group in by_storage.values():
        for key in group if len(group) > 1 else ():
            others = ", ".join(other for k, other in group.items() if k != key)
            found[key] = f"shares its storage with {others} through a view"
    return found


def _kept_elsewhere(model: nn.Module) -> dict[int, str]:
    """Parameters that a module also keeps in a plain attribute, as recurrent layers do in a flat list."""
    found = {}
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_modules", "_buffers"):
                continue
            inside = value.values() if isinstance(value, dict) else value
            items = inside if isinstance(inside, (list, tuple)) or isinstance(value, dict) else (value,)
            for item in items:
                if isinstance(item, nn.Parameter):
                    found[id(item)] = f"is also kept in the plain attribute {key!r} of {path or 'the model'}"
    return found


def _quantised(model: nn.Module) -> Iterable[Site]:
    """Quantised modules keep packed weights that are no Parameters; they are named so that nobody misses them."""
    for path, module in model.named_modules():
        if re.match(r"torch\.ao\.nn\.(intrinsic\.)?quantized", type(module).__module__) and not list(module.children()):
            yield Site(
                name=path, names=(path,), kind="parameter", module_type=type(module), shape=(0, 0), dtype=torch.qint8,
                blocked="its module is already quantised and keeps no floating weight",
            )  # fmt: skip


def is_rewritten(model: nn.Module) -> bool:
    """Whether any module of a model already holds a tensor in codebooks."""
    return any(backed_weights(module) for module in model.modules())


# -------------------------------------------------------------------------------------- what a model says itself

T = TypeVar("T")


def _heads(module: nn.Module) -> int | None:
    """Attention heads, by the names that libraries give them."""
    for holder in (module, getattr(module, "config", None)):
        for name in _HEADS:
            value = getattr(holder, name, None)
            if type(value) is int and value > 0:
                return value
    return None


def _initial_std(module: nn.Module) -> float | None:
    """Standard deviation of initial weights, as transformers' configurations give it."""
    config = getattr(module, "config", None)
    for name in ("initializer_range", "init_std"):
        value = getattr(config, name, None)
        if isinstance(value, float) and value > 0:
            return value
    return None


class _Nearest(Generic[T]):
    """What a module or its nearest ancestor says, or else what most modules of the model say."""

    def __init__(self, model: nn.Module, ask: Callable[[nn.Module], T | None]) -> None:
        self._known = {path: found for path, m in model.named_modules() if (found := ask(m)) is not None}
        common = Counter(self._known.values()).most_common(1)
        self._common = common[0][0] if common else None

    def of(self, path: str) -> T | None:
        while True:
            if path in self._known:
                return self._known[path]
            if not path:
                return self._common
            path = path.rpartition(".")[0]
