"""Convolutions: one engine, six classes."""

from __future__ import annotations

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx.nn.hosting.backed import held, weight_of
from rpqfx.nn.hosting.host import register_layer
from rpqfx.nn.layer import Device, LayerOptions, RPQLayer
from rpqfx.nn.weight import RPQWeight

Numbers = int | tuple[int, ...]  # one for each axis of space, or one for all


class _Conv(RPQLayer):
    """A convolution whose vectors are its filters, ``[out_channels, in_channels/groups * prod(kernel_size)]``."""

    weight = held("weight")

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Numbers, stride: Numbers = 1,
        padding: Numbers | str = 0, dilation: Numbers = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:  # fmt: skip
        dense = self._dense(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta", dtype
        )
        super().__init__(dense, device, options)

    def forward(self: Any, input: Tensor) -> Tensor:
        """``[B, C, *spatial]`` or ``[C, *spatial]``, as the dense layer."""
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode)
            padding = (0,) * len(self.stride)
        return _held(self).conv(input, self.bias, self.stride, padding, self.dilation, self.groups)


class _ConvTranspose(RPQLayer):
    """A transposed convolution whose vectors are ``[in_channels, out_channels/groups * prod(kernel_size)]``."""

    weight = held("weight")

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Numbers, stride: Numbers = 1, padding: Numbers = 0,
        output_padding: Numbers = 0, groups: int = 1, bias: bool = True, dilation: Numbers = 1,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:  # fmt: skip
        dense = self._dense(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, "meta", dtype,
        )  # fmt: skip
        super().__init__(dense, device, options)

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``[B, C, *spatial]`` or ``[C, *spatial]``, as the dense layer."""
        spatial = len(self.stride)
        rest = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        return _held(self).conv(
            input, self.bias, self.stride, self.padding, self.dilation, self.groups, True, tuple(rest)
        )


def _held(layer: nn.Module) -> RPQWeight:
    held = weight_of(layer, "weight")
    assert held is not None
    return held


class RPQConv1d(_Conv, nn.Conv1d):
    """A convolution over sequences: the arguments of ``torch.nn.Conv1d`` and of ``RPQLayer``."""

    _dense = nn.Conv1d


class RPQConv2d(_Conv, nn.Conv2d):
    """A convolution over images: the arguments of ``torch.nn.Conv2d`` and of ``RPQLayer``."""

    _dense = nn.Conv2d


class RPQConv3d(_Conv, nn.Conv3d):
    """A convolution over volumes: the arguments of ``torch.nn.Conv3d`` and of ``RPQLayer``."""

    _dense = nn.Conv3d


class RPQConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """A transposed convolution over sequences: the arguments of ``torch.nn.ConvTranspose1d`` and of ``RPQLayer``."""

    _dense = nn.ConvTranspose1d


class RPQConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """A transposed convolution over images: the arguments of ``torch.nn.ConvTranspose2d`` and of ``RPQLayer``."""

    _dense = nn.ConvTranspose2d


class RPQConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """A transposed convolution over volumes: the arguments of ``torch.nn.ConvTranspose3d`` and of ``RPQLayer``."""

    _dense = nn.ConvTranspose3d


for _layer in (RPQConv1d, RPQConv2d, RPQConv3d, RPQConvTranspose1d, RPQConvTranspose2d, RPQConvTranspose3d):
    register_layer(_layer._dense, _layer)
