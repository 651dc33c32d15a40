"""Torch's encoders, and the nested tensors that they make of padded batches."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def without_nested_tensors(model: nn.Module, changed: Iterable[nn.Module]) -> None:
    """Has torch's encoders hand padded batches as they are to layers that do not go by the fused kernels.

    Args:
        model: The model.
        changed: Modules of it that hooks or other classes keep from the fused kernels.
    """
    marked = set(changed)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(module in marked for module in encoder.modules()):
            encoder.use_nested_tensor = False
