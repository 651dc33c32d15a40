"""Finds weights whose inputs calibration did not show. All of them are refused, some are noted for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rpqfx.conversion.observe import Seen
from rpqfx.errors import InputError
from rpqfx.nn.weight import RPQWeight

_NAMED = 4


def unseen(weights: Mapping[str, RPQWeight], seen: Mapping[RPQWeight, Seen]) -> list[str]:
    """Returns remarks for the report on weights whose inputs calibration did not show.

    Args:
        weights: The weights by name.
        seen: What batches have shown of each.

    Raises:
        InputError: If inputs of a weight are not finite, or no batch reaches any.
    """
    for name, weight in weights.items():
        mean = seen[weight].moments.mean
        if mean is not None and not bool(torch.isfinite(mean).all()):
            raise InputError(
                f"{name}: its inputs' second moment has infinite or NaN elements; look at the calibration batches, "
                "or skip the weight with a Rule"
            )
    missed = [name for name, weight in weights.items() if not seen[weight].reached]
    if not any(one.reached or one.read for one in seen.values()):
        raise InputError(
            "no calibration batch reaches any weight that is to be quantized, so nothing can be seen of their "
            f"inputs ({', '.join(missed[:3])}); give batches as the model is called with in use"
        )
    unknown = [name for name in missed if seen[weights[name]].read]
    missed = [name for name in missed if name not in unknown]
    why = {"calibration did not reach": missed, "no product shows the inputs of": unknown}
    return [f"{text} {_named(names)}: fitted to the weights alone" for text, names in why.items() if names]


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
