"""Checks that the tensors of one operation are on one device."""

from __future__ import annotations

from torch import Tensor

from rpqfx.errors import InputError


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """Raises where a kernel would read memory of another device, or torch compute with what has no values.

    Args:
        x: What is computed with.
        *others: Its operands.

    Raises:
        InputError: If they are not on one device.
    """
    found = [tensor.device for tensor in others if tensor is not None]
    if any(device != x.device for device in found):
        places = ", ".join(dict.fromkeys(map(str, (x.device, *found))))
        raise InputError(
            f"codebooks, codes and their operands are on several devices: {places}; move them to one with "
            ".to(device), or give what is on meta its values (rpqfx.materialize)"
        )
