"""Why a tensor must stay as it is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from rpqfx.graph.bytecode import is_torchs, names_of
from rpqfx.graph.functions import functions_of, referred
from rpqfx.nn.hosting.host import obstacle_to
from rpqfx.policies.site import Site


class Obstacles:
    """The obstacles to rewriting the Parameters of a model.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._aliases = _storage_aliases(model)
        self._kept = _kept_elsewhere(model)
        self._asked = _asked_whether_leaves(model)

    def to(self, parameter: nn.Parameter, owners: Sequence[tuple[nn.Module, str]]) -> str | None:
        """Why a Parameter cannot be quantized, or None.

        Args:
            parameter: The Parameter.
            owners: Each module that has it, with its name there.
        """
        found = _own_obstacle(parameter, owners[0][0])
        found = (
            found or self._aliases.get(id(parameter)) or self._kept.get(id(parameter)) or self._asked.get(id(parameter))
        )
        return found or next((why for owner in owners if (why := obstacle_to(*owner)) is not None), None)


def _own_obstacle(parameter: nn.Parameter, module: nn.Module) -> str | None:
    checks: tuple[tuple[Callable[[], Any], str], ...] = (
        (lambda: isinstance(module, torch.jit.ScriptModule), "its module is a ScriptModule"),
        (
            lambda: isinstance(module, fx.GraphModule),
            "it belongs to an fx GraphModule itself, which makes its own class",
        ),
        (
            lambda: isinstance(module, parametrize.ParametrizationList) and _is_householder(module),
            "an orthogonal map of reflections reads signs from its diagonal",
        ),
        (lambda: parameter.layout != torch.strided, f"its layout is {parameter.layout}, not strided"),
        (lambda: parameter.is_quantized or not parameter.dtype.is_floating_point, f"its dtype is {parameter.dtype}"),
        (lambda: parameter.dtype.itemsize < 2, f"its dtype is {parameter.dtype}"),
        (lambda: type(parameter) is not nn.Parameter, f"it is a {type(parameter).__name__}, not a plain Parameter"),
        (lambda: parameter._backward_hooks, "it has a gradient hook, which codebooks would not call"),
        (lambda: parameter.numel() == 0, "it is empty"),
    )
    return next((reason for check, reason in checks if check()), None)


def _is_householder(parametrised: nn.Module) -> bool:
    maps = (getattr(child, "orthogonal_map", None) for child in parametrised.children())
    return any(getattr(found, "name", None) == "householder" for found in maps)


def _storage_aliases(model: nn.Module) -> dict[int, str]:
    """Parameters that are views of one storage: rewriting one would cut it off from the others."""
    by_storage: dict[int, dict[int, str]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        if parameter.layout == torch.strided and not parameter.is_meta and type(parameter) is nn.Parameter:
            by_storage[parameter.untyped_storage().data_ptr()][id(parameter)] = name
    by_storage.pop(0, None)
    # On a GPU recurrent layers keep their weights in one buffer of their own, each in its part of it.
    packed = [{id(p) for p in m.parameters(recurse=False)} for m in model.modules() if isinstance(m, nn.RNNBase)]
    found = {}
    for group in by_storage.values():
        if len(group) < 2 or any(group.keys() <= own for own in packed):
            continue
        for key in group:
            others = ", ".join(other for k, other in group.items() if k != key)
            found[key] = f"shares its storage with {others} through a view"
    return found


def _kept_elsewhere(model: nn.Module) -> dict[int, str]:
    """Parameters that a module also keeps in a plain attribute, where codebooks cannot take their place."""
    found = {}
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_modules", "_buffers") or _is_flat_list(module, key):
                continue
            inside = value.values() if isinstance(value, dict) else value
            items = inside if isinstance(inside, (list, tuple)) or isinstance(value, dict) else (value,)
            for item in items:
                if isinstance(item, nn.Parameter):
                    found[id(item)] = f"is also kept in the plain attribute {key!r} of {path or 'the model'}"
        for key, function in functions_of(module):
            for kept in referred(function):
                if isinstance(kept, nn.Parameter):
                    found[id(kept)] = f"is also kept by a function in the attribute {key!r} of {path or 'the model'}"
    return found


def _asked_whether_leaves(model: nn.Module) -> dict[int, str]:
    """Parameters that a forward above them may ask whether they are leaves of autograd, as only Parameters are."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        kind = type(module)
        if is_torchs(kind.__module__) or "is_leaf" not in names_of(kind.forward):
            continue
        for parameter in module.parameters():
            found[id(parameter)] = (
                f"the forward of {path or 'the model'} asks for is_leaf, which codebooks cannot grant"
            )
    return found


def _is_flat_list(module: nn.Module, key: str) -> bool:
    """Returns whether this is the second list of a recurrent layer's weights, which it rebuilds when they change."""
    return key == "_flat_weights" and isinstance(module, nn.RNNBase)


def quantised_sites(model: nn.Module) -> Iterable[Site]:
    """Quantised modules keep packed weights that are no Parameters; they are named so that nobody misses them."""
    for path, module in model.named_modules():
        if re.match(r"torch\.ao\.nn\.(intrinsic\.)?quantized", type(module).__module__) and not list(module.children()):
            yield Site(
                name=path, names=(path,), kind="parameter", module_type=type(module), shape=(0, 0), dtype=torch.qint8,
                blocked="its module is already quantised and keeps no floating weight",
            )  # fmt: skip
