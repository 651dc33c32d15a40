"""Random numbers from a seed, for a while, without a trace in torch's global generators."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator

import torch


@contextlib.contextmanager
def drawn_from(seed: int | None, name: str, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Has torch draw from a seed while it lasts; where that is None, as it would anyway.

    Args:
        seed: The seed.
        name: Of what is drawn: each gets numbers of its own.
        devices: On which it is drawn, the CPU apart.
    """
    if seed is None:
        yield
        return
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        torch.default_generator.manual_seed(number)
        for device in {device for device in devices if device.type not in ("cpu", "meta")}:
            module = torch.get_device_module(device)
            stack.enter_context(torch.random.fork_rng([device.index or 0], device_type=device.type))
            with module.device(device):
                module.manual_seed(number)
        yield
