"""RPQLinear."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from rpqfx.nn.hosting.backed import held
from rpqfx.nn.hosting.host import register_layer
from rpqfx.nn.layer import Device, LayerOptions, RPQLayer, apply_linear


class RPQLinear(RPQLayer, nn.Linear):
    """``y = x @ W.T + b``, as ``torch.nn.Linear``, with ``W`` quantized.

    ``split="row"`` cuts the rows of ``W`` (one for each output) into sub-vectors, ``split="column"`` its columns
    (one for each input). The smaller of ``in_features`` and ``out_features`` as the vectors' length makes the
    smaller layer. Further arguments are those of ``RPQLayer``.

    Other Args:
        in_features (int): Width of the input.
        out_features (int): Width of the output.
        bias (bool): Whether there is a bias.
        device (torch.device | str | None): Where the tensors go.
        dtype (torch.dtype | None): Of codebooks and bias.

    Raises:
        SpecError: If the codebooks do not fit the weight.
    """

    _dense = nn.Linear
    weight = held("weight")

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Device = None,
        dtype: torch.dtype | None = None, **options: Unpack[LayerOptions],
    ) -> None:  # fmt: skip
        dense = nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype)
        super().__init__(dense, device, options)

    @classmethod
    def _splits(cls) -> bool:
        return True

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return apply_linear(self, "weight", input, self.bias)


register_layer(nn.Linear, RPQLinear)
# The output projection of nn.MultiheadAttention: a Linear that only marks itself for torch's quantisation.
register_layer(nn.modules.linear.NonDynamicallyQuantizableLinear, RPQLinear)
