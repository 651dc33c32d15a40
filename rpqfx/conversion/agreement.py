"""A check that all processes of a conversion convert the same model in the same way, before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rpqfx.conversion.checkpoint import fingerprint
from rpqfx.conversion.ranks import Ranks
from rpqfx.errors import DistributedError
from rpqfx.ops.cpu import build


def check_same_conversion(
    ranks: Ranks, model: nn.Module, dense: Iterable[Tensor], calls: Any, settings: Mapping[str, str]
) -> None:
    """Raises in all processes unless each has called for the same conversion and rounds as the others do.

    Args:
        ranks: The processes; of one alone nothing is checked.
        model: The model.
        dense: Tensors of it that stand-ins hold.
        calls: The calibration batches.
        settings: What else the result depends on, by name.

    Raises:
        DistributedError: If processes differ; says in what.
    """
    if ranks.size == 1:
        return
    inputs, shape = tree_flatten(calls)
    values = [tensor for tensor in (*dense, *model.parameters(), *model.buffers()) if not tensor.is_meta]
    tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
    words = [str(shape), *(repr(leaf) for leaf in inputs if not isinstance(leaf, Tensor))]
    mine = {
        "the model": fingerprint([], values),
        "the calibration batches": fingerprint(words, tensors),
        **settings,
        "the kind of device": ", ".join(sorted({tensor.device.type for tensor in values})),
        "torch.get_num_threads()": str(torch.get_num_threads()),
        "torch.__version__": torch.__version__,
        "compiled kernels": "ready" if build.ready() else "missing",
    }
    everyone = ranks.gather("the call", mine)
    for part in mine:
        if others := [rank for rank, said in enumerate(everyone) if said[part] != everyone[0][part]]:
            raise DistributedError(
                f"processes that share a conversion make the same call, each with the whole model and all batches: "
                f"{part} of rank {', '.join(map(str, others))} differs from rank 0's "
                f"({_short(everyone[others[0]][part])}, and {_short(everyone[0][part])})"
            )


def _short(text: str) -> str:
    return text if len(text) < 80 else f"{text[:77]}..."
