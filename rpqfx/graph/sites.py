"""Step two: find the tensors that could be quantized, and what each is for."""

from __future__ import annotations

import re
from collections import defaultdict

from torch import nn
from torch.nn.utils import parametrize

from rpqfx.graph.hints import Nearest, heads, initial_std
from rpqfx.graph.leaves import is_own
from rpqfx.graph.module_graphs import Captured, ModuleGraph, is_builtin
from rpqfx.graph.obstacles import Obstacles, quantised_sites
from rpqfx.graph.roles import ADDITIVE, Read, Role, reads_of
from rpqfx.nn.hosting.backed import backed_weights
from rpqfx.nn.hosting.reparametrised import computed_from
from rpqfx.nn.layer import zero_row
from rpqfx.policies.site import Kind, Site

_MODULE_KINDS: tuple[tuple[type[nn.Module], Kind], ...] = (
    (nn.Linear, "linear"),
    (nn.Embedding, "embedding"),
    (nn.EmbeddingBag, "embedding_bag"),
    (nn.modules.conv._ConvTransposeNd, "conv_transpose"),
    (nn.modules.conv._ConvNd, "conv"),
    (nn.Bilinear, "bilinear"),
    (nn.MultiheadAttention, "attention"),
    (nn.RNNBase, "recurrent"),
    (nn.RNNCellBase, "recurrent"),
)


def find_sites(captured: Captured) -> list[Site]:
    """Lists every Parameter of two or more axes, with its use, or with why it must stay as it is.

    Those that ``quantize_kv`` and the routers of ``route`` brought along are none of the model's weights.

    Args:
        captured: A model that was read.

    Returns:
        One site a tensor, however many names it has, in the order of the model's Parameters.
    """
    model = captured.model
    owners: dict[int, list[tuple[str, nn.Module, str, nn.Parameter]]] = defaultdict(list)
    own = {each for module in model.modules() if is_own(module) for each in module.modules()}
    for path, module in model.named_modules(remove_duplicate=False):
        if module in own:
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1:
                owners[id(parameter)].append((path, module, attribute, parameter))
    reads = reads_of(captured)
    obstacles = Obstacles(model)
    nearest_heads, nearest_std = Nearest(model, heads), Nearest(model, initial_std)
    sites = []
    for places in owners.values():
        path, module, attribute, parameter = places[0]
        names = tuple(dict.fromkeys(f"{p}.{a}".lstrip(".") for p, _, a, _ in places))
        stands = [computed_from(model, p, a) for p, _, a, _ in places]
        uses = (*names, *(f"{p}.{a}".lstrip(".") for p, a in stands))
        found = [use for name in dict.fromkeys(uses) for use in reads.get(name, ())]
        holders = [(model.get_submodule(p), a) for p, a in stands]
        graph = captured.graphs.get(stands[0][0])
        role, unused = _role(parameter, holders, found, graph)
        table = [m for _, m, _, _ in places if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        rows_only = table or role.kind in ("embedding", "embedding_bag", "conv", "conv_transpose", "parameter")
        sites.append(
            Site(
                name=names[0],
                names=names,
                kind=role.kind,
                module_type=parametrize.type_before_parametrizations(holders[0][0]),
                shape=tuple(parameter.shape),
                dtype=parameter.dtype,
                lead=role.lead,
                flipped=role.flipped,
                experts=role.experts,
                splits=not rows_only or role.experts,
                zero_vector=next((row for t in table if (row := zero_row(t)) is not None), None),
                std=nearest_std.of(path),
                heads=nearest_heads.of(path),
                readers=_readers([m for _, m, _, _ in places], found),
                read_outside=any(use.outside for use in found),
                plain_when_compiled=any(use.left for use in found) or _unknown(module, found, role.kind, graph),
                uses=tuple(dict.fromkeys(use.words for use in found)),
                blocked=obstacles.to(parameter, [(m, a) for _, m, a, _ in places]) or unused,
            )
        )
    return sites + list(quantised_sites(model))


def _readers(owners: list[nn.Module], reads: list[Read]) -> tuple[type[nn.Module], ...]:
    """Classes whose code reads a tensor; the owner of a parametrised one hands it to the parametrizations."""
    lists = [child for owner in owners if isinstance(owner, parametrize.ParametrizationList) for child in owner]
    outside = [read.reader for read in reads if read.outside]
    return tuple(dict.fromkeys([*map(type, owners), *map(type, lists), *outside]))


def _unknown(module: nn.Module, reads: list[Read], kind: Kind, graph: ModuleGraph | None) -> bool:
    """Returns whether the graph could not be traced at a place where this tensor is used, or may be."""
    own = is_builtin(module) or (graph is not None and bool(graph.graphs))
    return not own or (kind == "parameter" and not reads)


def _role(
    parameter: nn.Parameter, stands: list[tuple[nn.Module, str]], reads: list[Read], graph: ModuleGraph | None
) -> tuple[Role, str | None]:
    """The tensor's role, and why that is not one for codebooks (None where it is).

    Args:
        parameter: The tensor.
        stands: For each of its names, the module and the name of the weight that it is or is made into.
        reads: Where graphs read it.
        graph: Of its first module.
    """
    if (kind := _layer_kind(parameter, stands)) is not None:
        return Role(kind, lead=2 if kind == "bilinear" else 1), None
    roles = [read.role for read in reads if read.role is not None]
    dims = parameter.dim()
    if roles:
        return max(roles, key=lambda role: role.experts), None  # the first of those that say most
    generic = Role("parameter", experts=dims == 3 and parameter.shape[-1] > 1)  # of four axes: filters, most likely
    vector = None if _is_matrix(parameter) else "only one axis is longer than 1: a vector, not a weight"
    if graph is None or not graph.graphs:
        return generic, vector
    ops = sorted({read.words.partition(": ")[2] for read in reads})
    if not ops or any(op.strip("_") not in ADDITIVE for op in ops):  # without any, some other module may read it
        return generic, vector
    return generic, f"used by {', '.join(ops)}, not as a weight of a product, a convolution or a lookup"


def _layer_kind(parameter: nn.Parameter, stands: list[tuple[nn.Module, str]]) -> Kind | None:
    """The kind of a torch.nn layer's own weight, also where a Parameter of another name is made into it."""
    for module, attribute in stands:
        own = attribute in module._parameters and module._parameters[attribute] is parameter
        if not own and not _is_matrix(parameter):  # the magnitudes of weight norm
            continue
        for kind_of, kind in _MODULE_KINDS:
            named = _RECURRENT.fullmatch(attribute) if kind == "recurrent" else attribute in _WEIGHTS
            if isinstance(module, kind_of) and named:
                return kind
    return None


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Returns whether at least two axes are longer than 1."""
    return sum(size > 1 for size in parameter.shape) > 1


_QKV = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_WEIGHTS = ("weight", "in_proj_weight", *_QKV)
_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")


def is_rewritten(model: nn.Module) -> bool:
    """Returns whether any module of a model already holds a quantized tensor."""
    return any(backed_weights(module) for module in model.modules())
