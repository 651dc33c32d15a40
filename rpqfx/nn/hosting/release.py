"""The way back from codebooks to Parameters: the opposite of ``rpqfx.nn.hosting.host``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize

from rpqfx.nn.hosting.backed import SUFFIX, backed_weights
from rpqfx.nn.hosting.host import layer_for
from rpqfx.nn.hosting.reparametrised import refresh
from rpqfx.nn.layer import RPQLayer
from rpqfx.nn.weight import RPQWeight


def unbacked(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Returns the class that a module had before its Parameters moved into codebooks.

    Args:
        kind: A class of modules.

    Returns:
        ``kind`` itself where it has no quantized weight; None where it is derived from an RPQ layer, so that no
        dense class stands for it.
    """
    base: type[nn.Module] | None = getattr(kind, "_rpq_base", None)
    if kind.__module__ == parametrize.__name__ and base is not None:
        # Parametrising made a class for this one module, and undoing it looks at that class and its first base.
        body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        return type(kind.__name__, (base,), body)
    if base is not None:
        return base
    if not issubclass(kind, RPQLayer):
        return kind
    return kind._dense if layer_for(kind._dense) is kind else None


def release(module: nn.Module, kind: type[nn.Module], dense: Mapping[RPQWeight, nn.Parameter]) -> None:
    """Puts dense Parameters in the place of a module's codebooks.

    Args:
        module: It holds Parameters in codebooks.
        kind: The class that it takes on.
        dense: The Parameter that stands for each weight.
    """
    held = backed_weights(module)
    others = dict(module._parameters)
    for name in held:
        del module._modules[name + SUFFIX]
    object.__setattr__(module, "__class__", kind)
    module._parameters.clear()  # in place, as others may hold the dict; those in codebooks came first as a rule
    module._parameters.update({name: dense[weight] for name, weight in held.items()} | others)
    if isinstance(module, nn.RNNBase):
        names = [name for name in module._flat_weights_names if name in module._parameters]
        module._parameters.update({name: module._parameters.pop(name) for name in names})
        module.__dict__.pop("_flat_weight_refs", None)
        module._init_flat_weights()
    refresh(module)
