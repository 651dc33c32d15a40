"""Random numbers of a seed for new modules, drawn without touching the generators that the whole process shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# All that the layers of routes are initialised with; each takes a generator.
_INITIALISERS = (Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)


class Drawing(TorchFunctionMode):
    """While it lasts, this thread's initialisers draw what they would after ``torch.manual_seed(seed)``.

    Args:
        seed: The seed.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALISERS and kwargs.get("generator") is None:
            tensor = args[0] if args else kwargs["tensor"]
            kwargs["generator"] = None if tensor.is_meta else self._of(tensor.device)
        return func(*args, **kwargs)

    def _of(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]
