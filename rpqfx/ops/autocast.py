"""The dtype that autocast chooses on a device."""

from __future__ import annotations

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Returns the dtype that products on a device run in under autocast, or None where it is off.

    Args:
        device: Of an input. The meta device has no autocast, and torch refuses to be asked.
    """
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
