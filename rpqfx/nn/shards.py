"""Tensors of which each process holds a part."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_shard(tensor: Tensor) -> bool:
    """Returns whether a tensor is a ``DTensor``, whose values are shared out over processes.

    Where nobody has imported those yet, there are none, and importing them takes long.

    Args:
        tensor: Any tensor.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def part_of(whole: Tensor, like: Any) -> Any:
    """Returns a tensor shared out as another one is; nothing is sent, since every process has all of it.

    Args:
        whole: The same tensor in every process, on any device.
        like: A ``DTensor``.
    """
    from torch.distributed.tensor import distribute_tensor

    whole = whole.detach().to(like.device).contiguous()
    with torch.no_grad():
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def is_part_of(part: Any, whole: Tensor) -> bool:
    """Returns whether this process's part of a tensor is that of another one; nothing is sent.

    Args:
        part: A ``DTensor``.
        whole: The same in every process.
    """
    if part.shape != whole.shape or part.dtype != whole.dtype:
        return False
    return torch.equal(part.to_local(), part_of(whole, part).to_local())
