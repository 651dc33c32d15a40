"""Checks that the weights that are to be rewritten have values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from rpqfx.errors import RewriteError
from rpqfx.nn.offloaded import check_not_offloaded, offloaded
from rpqfx.policies.decision import KeepDense, Quantize
from rpqfx.policies.site import Site


def check_loaded(model: nn.Module, sites: Sequence[Site], decisions: Mapping[str, Quantize | KeepDense]) -> None:
    """Raises where a weight is without its values though the model has been loaded.

    A model all of whose Parameters are on the meta device has not been: its codebooks are drawn, whatever the policy.

    Args:
        model: The model.
        sites: All its sites.
        decisions: By site name.

    Raises:
        RewriteError: If accelerate has offloaded a weight that is to be rewritten, or one is on the meta device to
            which codebooks are to be fitted, while others have values.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {
        site.name: names for site in sites if isinstance(decisions.get(site.name), Quantize) for names in [site.names]
    }
    away = set(offloaded(model))
    check_not_offloaded([name for name, names in held.items() if away & set(names)], "rewritten")
    if all(parameter.is_meta for parameter in parameters.values()):
        return
    fitted = [name for name in held if getattr(decisions[name], "init", None) == "fit" and parameters[name].is_meta]
    if fitted:
        raise RewriteError(
            f"{', '.join(fitted[:5])}{' ...' if len(fitted) > 5 else ''} are on the meta device, without values to fit "
            "codebooks to, while other weights have theirs; load all of the model first, or draw codebooks with "
            "Policy.from_scratch and call rpqfx.materialize"
        )
