"""Weights that torch computes from Parameters of other names: parametrizations, and the hooks that came before."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

LIST = "parametrizations"


def computed_from(model: nn.Module, path: str, attribute: str) -> tuple[str, str]:
    """Returns the weight that a Parameter stands in for, as the path of its module and its name there.

    Args:
        model: The model.
        path: Qualified name of the Parameter's owner.
        attribute: Its name there.

    Returns:
        ``("fc", "weight")`` for ``fc.parametrizations.weight.original`` and for ``fc.weight_v`` of the old weight norm;
        what was given where nothing is computed from the Parameter.
    """
    owner = model.get_submodule(path)
    if isinstance(owner, parametrize.ParametrizationList) and attribute.startswith("original"):
        above, _, name = path.rpartition(".")
        return above.removesuffix(LIST).removesuffix("."), name
    name, _, ending = attribute.rpartition("_")
    if ending in ("v", "orig") and name in hooked(owner):
        return path, name
    return path, attribute


def parametrised_at(target: str) -> str | None:
    """Returns the name of the weight that this submodule computes: ``"fc.weight"`` for ``fc.parametrizations.weight``.

    Args:
        target: Qualified name of a submodule.
    """
    *above, holder, name = ["", *target.split(".")]
    return ".".join([*above, name]).lstrip(".") if holder == LIST else None


def refresh(module: nn.Module) -> None:
    """Computes anew what hooks compute before each call, so that nobody reads a value of before.

    Args:
        module: Any module. The values have no gradient history, so that it can be copied as it is.
    """
    for name, hook in _hooks(module).items():
        if isinstance(hook, SpectralNorm):
            value = hook.compute_weight(module, do_power_iteration=False)
        else:
            value = hook.compute_weight(module) if isinstance(hook, WeightNorm) else hook.apply_mask(module)
        setattr(module, name, value.detach())


def hooked(module: nn.Module) -> set[str]:
    """Names of the tensors that hooks compute before each call, and keep as plain attributes until the next."""
    return set(_hooks(module))


def _hooks(module: nn.Module) -> dict[str, WeightNorm | SpectralNorm | BasePruningMethod]:
    """Hooks of torch.nn.utils that compute a tensor before each call, by its name."""
    found: dict[str, WeightNorm | SpectralNorm | BasePruningMethod] = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            found[hook.name] = hook
        elif isinstance(hook, BasePruningMethod):
            found[hook._tensor_name] = hook
    return found
