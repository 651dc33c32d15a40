"""Linear maps in and out of code space, eight or sixteen bits a number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError

_LARGEST = 127


class Map(nn.Module):
    """Matrices ``[P, k, n]`` with a row for each coordinate of code space: integers times a number for each row.

    Eight bits cost a row some 40 dB of signal to noise. Rows of strong coordinates, which come first, are coded more
    finely than that, so they have eight bits more.

    Args:
        parts: ``P``.
        rows: ``k``.
        width: ``n``.
        fine: Rows with sixteen bits.
        device: Of the tensors.
    """

    values: Tensor
    rest: Tensor
    scale: Tensor

    def __init__(
        self, parts: int, rows: int, width: int, fine: int, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(parts, rows, width, dtype=torch.int8, device=device))
        self.register_buffer("rest", torch.zeros(parts, fine, width, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(parts, rows, dtype=torch.float32, device=device))

    @property
    def fine(self) -> int:
        """Rows with sixteen bits."""
        return self.rest.shape[1]

    @torch.no_grad()
    def set(self, matrices: Tensor) -> None:
        """Takes on matrices.

        Args:
            matrices: ``[P, k, n]``, finite.

        Raises:
            InputError: If they have another shape, or are not finite.
        """
        if matrices.shape != self.values.shape:
            raise InputError(f"maps are {list(self.values.shape)}, got {list(matrices.shape)}")
        scale = matrices.abs().amax(-1) / _LARGEST
        if not bool(torch.isfinite(scale).all()):
            raise InputError("a map has infinite or NaN elements; look for them in the keys and values of calibration")
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        whole = matrices / scale[..., None]
        self.scale.copy_(scale)
        self.values.copy_(whole.round())
        self.rest.copy_(((whole - whole.round())[:, : self.fine] * (2 * _LARGEST)).round())

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Returns the matrices in a dtype, ``[P, k, n]``."""
        whole = self.values.to(dtype)
        if self.fine:
            whole[:, : self.fine] += self.rest.to(dtype) / (2 * _LARGEST)
        return whole.mul_(self.scale[..., None].to(dtype))

    def extra_repr(self) -> str:
        """Returns the text that ``print`` shows."""
        return "x".join(str(size) for size in self.values.shape)
