"""Tensors of which each process holds a part."""

from __future__ import annotations

import sys

from torch import Tensor


def is_shard(tensor: Tensor) -> bool:
    """Returns whether a tensor is a ``DTensor``, whose values are shared out over processes.

    Where nobody has imported those yet, there are none, and importing them takes long.

    Args:
        tensor: Any tensor.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
