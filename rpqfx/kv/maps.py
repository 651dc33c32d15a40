"""Linear maps in and out of code space, eight bits a number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError

_LARGEST = 127


class Map(nn.Module):
    """Matrices ``[P, a, b]`` whose rows are integers times a number in half precision.

    Rounding costs a map some 45 dB of signal to noise, against the 12 dB of two bits a coordinate.

    Args:
        parts: ``P``.
        inputs: ``a``.
        outputs: ``b``.
        device: Of the tensors.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, parts: int, inputs: int, outputs: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(parts, inputs, outputs, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(parts, inputs, dtype=torch.float16, device=device))

    @torch.no_grad()
    def set(self, matrices: Tensor) -> None:
        """Takes on matrices.

        Args:
            matrices: ``[P, a, b]``, finite.

        Raises:
            InputError: If they have another shape, or half precision does not reach their rows.
        """
        if matrices.shape != self.values.shape:
            raise InputError(f"maps are {list(self.values.shape)}, got {list(matrices.shape)}")
        scale = (matrices.abs().amax(-1) / _LARGEST).to(torch.float16)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        if not bool(torch.isfinite(scale).all()):
            raise InputError("rows of a map are too large for half precision; scale the model's activations down")
        self.scale.copy_(scale)
        self.values.copy_((matrices / scale[..., None].to(matrices.dtype)).round().clamp(-_LARGEST, _LARGEST))

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The matrices in a dtype, ``[P, a, b]``."""
        return self.values.to(dtype) * self.scale[..., None].to(dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return "x".join(str(size) for size in self.values.shape)
