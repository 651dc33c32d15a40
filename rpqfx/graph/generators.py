"""States of torch's global random generators, to be put back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_CPU = "cpu"


def generator_states(devices: Iterable[torch.device] = ()) -> dict[str, Tensor]:
    """Returns the state of the CPU's global generator, and of those of other devices.

    Args:
        devices: Whose generators count besides; the CPU and the meta device need not be left out.

    Returns:
        By device, in words; on the CPU.
    """
    states = {_CPU: torch.get_rng_state()}
    for device in devices:
        if device.type not in (_CPU, "meta") and str(device) not in states:
            states[str(device)] = _module(device).get_rng_state(*_index(device)).cpu()
    return states


def set_generator_states(states: dict[str, Tensor]) -> None:
    """Puts states back.

    Args:
        states: What ``generator_states`` returned.
    """
    for name, state in states.items():
        if name == _CPU:
            torch.set_rng_state(state)
        else:
            device = torch.device(name)
            _module(device).set_rng_state(state, *_index(device))


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """The generator's device, for backends that have several."""
    return () if device.type == "mps" else (device,)
