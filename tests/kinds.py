"""Every kind of layer with arguments and inputs, for claims that hold for all of them.

Weights are large and batches small: no input and no activation has as many elements as a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx import nn as rnn
from tests.helpers import generator, randn


@dataclass(frozen=True)
class Kind:
    """One layer with constructor arguments, and the shapes of its inputs (an int for ids below it)."""

    layer: type[nn.Module]
    dense: type[nn.Module]
    args: tuple[Any, ...]
    inputs: tuple[tuple[int, ...], ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    ids: int | None = None
    call: tuple[tuple[str, Any], ...] = ()

    def make(self, **extra: Any) -> nn.Module:
        """The RPQ layer, float64 unless told otherwise."""
        options = {"codebook_dim": 4, "codebook_bits": 3, "dtype": torch.float64, **dict(self.options), **extra}
        return self.layer(*self.args, **dict(self.kwargs), **options)

    def make_dense(self, dtype: torch.dtype = torch.float64, **extra: Any) -> nn.Module:
        """Its torch.nn namesake."""
        return self.dense(*self.args, **dict(self.kwargs), dtype=dtype, **extra)

    def make_inputs(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Tensors for forward."""
        if self.ids is not None:
            return tuple(torch.randint(self.ids, shape, generator=generator(seed)) for shape in self.inputs)
        return tuple(randn(seed + i, *shape, dtype=dtype) for i, shape in enumerate(self.inputs))

    def run(self, layer: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """The first output for the inputs of a seed."""
        out = layer(*self.make_inputs(seed, dtype), **dict(self.call))
        return out[0] if isinstance(out, tuple) else out


def _kind(layer: type[nn.Module], *args: Any, **rest: Any) -> Kind:
    return Kind(layer, layer._dense, args, **rest)


_column = (("split", "column"),)
_padding = (("padding", 1),)
_cross = ((2, 2, 32), (3, 2, 24), (3, 2, 20))

KINDS = {
    "linear row": _kind(rnn.RPQLinear, 48, 40, inputs=((3, 48),)),
    "linear column": _kind(rnn.RPQLinear, 48, 40, inputs=((3, 48),), options=_column),
    "linear signs scale": _kind(
        rnn.RPQLinear, 48, 40, inputs=((2, 2, 48),), options=(("signs", True), ("scale", True), ("stages", 2))
    ),
    "linear column_scale": _kind(rnn.RPQLinear, 48, 40, inputs=((3, 48),), options=(("column_scale", True),)),
    "embedding column_scale": _kind(
        rnn.RPQEmbedding, 64, 32, inputs=((2, 3),), ids=64, options=(("column_scale", True), ("stages", 2))
    ),
    "embedding": _kind(rnn.RPQEmbedding, 64, 32, inputs=((2, 3),), ids=64, kwargs=(("padding_idx", 3),)),
    "embedding bag": _kind(rnn.RPQEmbeddingBag, 64, 32, inputs=((2, 3),), ids=64),
    "embedding bag max": _kind(rnn.RPQEmbeddingBag, 64, 32, inputs=((2, 3),), ids=64, kwargs=(("mode", "max"),)),
    "conv1d": _kind(rnn.RPQConv1d, 12, 24, 5, inputs=((2, 12, 9),), kwargs=_padding),
    "conv2d": _kind(rnn.RPQConv2d, 12, 16, 3, inputs=((1, 12, 5, 4),), kwargs=_padding),
    "conv3d": _kind(rnn.RPQConv3d, 4, 16, 3, inputs=((1, 4, 3, 3, 3),)),
    "conv2d circular": _kind(
        rnn.RPQConv2d, 12, 16, 3, inputs=((1, 12, 5, 4),), kwargs=(("padding", "same"), ("padding_mode", "circular"))
    ),
    "conv1d channels": _kind(
        rnn.RPQConv1d, 24, 24, 5, inputs=((2, 24, 9),), kwargs=_padding, options=(("codebook_dim", 60),)
    ),
    "conv2d channels": _kind(
        rnn.RPQConv2d, 12, 16, 3, inputs=((1, 12, 5, 4),), kwargs=_padding, options=(("codebook_dim", 54),)
    ),
    "conv transpose 2d channels": _kind(
        rnn.RPQConvTranspose2d, 16, 12, 3, inputs=((1, 16, 5, 4),), kwargs=_padding, options=(("codebook_dim", 54),)
    ),
    "conv2d column_scale channels": _kind(
        rnn.RPQConv2d, 12, 16, 3, inputs=((1, 12, 5, 4),), kwargs=_padding,
        options=(("codebook_dim", 54), ("column_scale", True)),
    ),
    "conv transpose 2d column_scale channels": _kind(
        rnn.RPQConvTranspose2d, 16, 12, 3, inputs=((1, 16, 5, 4),), kwargs=_padding,
        options=(("codebook_dim", 54), ("column_scale", True), ("scale", True)),
    ),
    "conv transpose 1d": _kind(rnn.RPQConvTranspose1d, 24, 12, 5, inputs=((2, 24, 7),), kwargs=_padding),
    "conv transpose 2d": _kind(rnn.RPQConvTranspose2d, 16, 12, 3, inputs=((1, 16, 5, 4),), kwargs=_padding),
    "conv transpose 3d": _kind(rnn.RPQConvTranspose3d, 16, 4, 3, inputs=((1, 16, 2, 2, 2),)),
    "bilinear row": _kind(rnn.RPQBilinear, 10, 12, 8, inputs=((2, 10), (2, 12))),
    "bilinear column": _kind(rnn.RPQBilinear, 10, 12, 8, inputs=((2, 10), (2, 12)), options=_column),
    "attention": _kind(rnn.RPQMultiheadAttention, 32, 4, inputs=((2, 2, 32),) * 3),
    "attention column": _kind(rnn.RPQMultiheadAttention, 32, 4, inputs=((2, 2, 32),) * 3, options=_column),
    "attention kdim vdim": _kind(
        rnn.RPQMultiheadAttention, 32, 4, inputs=_cross, kwargs=(("kdim", 24), ("vdim", 20)),
        call=(("need_weights", False),),
    ),
}  # fmt: skip

NAMES = list(KINDS)
# Whose sub-vectors are whole channels, so that they can contract.
CHANNELS = [name for name in NAMES if name.endswith("channels")]
