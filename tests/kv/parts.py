"""Models whose cache of codes is filled by several tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpqfx.kv import CodebookCache


def in_parts(model: Any, x: Tensor, sizes: list[int]) -> Tensor:
    """Returns the logits ``[B, T, V]`` of tokens that come in parts of these sizes, with one cache."""
    cache, found, start = CodebookCache.for_model(model), [], 0
    for size in sizes:
        found.append(model(x[:, start : start + size], past_key_values=cache).logits)
        start += size
    return torch.cat(found, 1)
