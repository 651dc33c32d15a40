"""RPQBilinear."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.nn.hosting.backed import held
from rpqfx.nn.hosting.host import register_layer
from rpqfx.nn.layer import Device, LayerOptions, RPQLayer, Split, apply_linear
from rpqfx.nn.layout import Layout
from rpqfx.ops.autocast import autocast_dtype


class RPQBilinear(RPQLayer, nn.Bilinear):
    """``y = x1 @ A @ x2 + b``, as ``torch.nn.Bilinear``, with ``A`` quantized.

    ``A [out, in1, in2]`` is seen as ``out * in1`` vectors of length ``in2``: one product with the codebooks gives
    ``A @ x2``, and a dot with ``x1`` does the rest. Further arguments are those of ``RPQLayer``.

    Other Args:
        in1_features (int): Width of the first input.
        in2_features (int): Width of the second input.
        out_features (int): Width of the output.
        bias (bool): Whether there is a bias.
        device (torch.device | str | None): Where the tensors go.
        dtype (torch.dtype | None): Of codebooks and bias.

    Raises:
        SpecError: If the codebooks do not fit the weight.
    """

    _dense = nn.Bilinear
    weight = held("weight")

    def __init__(
        self, in1_features: int, in2_features: int, out_features: int, bias: bool = True, device: Device = None,
        dtype: torch.dtype | None = None, **options: Unpack[LayerOptions],
    ) -> None:  # fmt: skip
        dense = nn.Bilinear(in1_features, in2_features, out_features, bias, device="meta", dtype=dtype)
        super().__init__(dense, device, options)

    @classmethod
    def layout(cls, dense: nn.Module, name: str, split: Split = "row") -> Layout:
        """``[out * in1, in2]``, vectors along rows or columns."""
        return Layout(tuple(getattr(dense, name).shape), lead=2, transposed=split == "column")

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """``[..., in1_features]`` and ``[..., in2_features]`` to ``[..., out_features]``.

        Raises:
            InputError: If widths or dtypes of the inputs do not fit.
        """
        if input1.shape[-1] != self.in1_features:
            raise InputError(f"expected {self.in1_features} features in input1, got shape {tuple(input1.shape)}")
        if input1.dtype != input2.dtype and autocast_dtype(input1.device) is None:
            raise InputError(f"the inputs are {input1.dtype} and {input2.dtype}; convert one with .to(dtype)")
        part = apply_linear(self, "weight", input2, None).unflatten(-1, (self.out_features, self.in1_features))
        y = (part * input1[..., None, :]).sum(-1)
        return y if self.bias is None else y + self.bias


register_layer(nn.Bilinear, RPQBilinear)
