"""A quantized weight that trains as a dense matrix, and computes with the entries nearest to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rpqfx import ops
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.weight_slice import Part

NAME = "latent"


class LatentWeight(RPQWeight):
    """A weight whose products run with its decoded vectors, and whose gradient goes to a dense Parameter ``latent``.

    This is quantization-aware training with the straight-through estimator (Bengio, Leonard and Courville, "Estimating
    or Propagating Gradients Through Stochastic Neurons", 1308.3432). The dense Parameter ``[N, D]`` is in the state
    dict while it is there. A weight becomes one, and itself again, by its class alone.
    """

    latent: nn.Parameter

    @classmethod
    def of(cls, weight: RPQWeight, values: Tensor, trained: bool) -> LatentWeight:
        """Makes a weight one, in place; its codebooks do not train by gradient then.

        Args:
            weight: Any.
            values: The dense matrix to start with, ``[N, D]``.
            trained: Whether it asks for a gradient.
        """
        weight.__class__ = cls
        assert isinstance(weight, LatentWeight)
        weight.latent = nn.Parameter(values, trained)
        weight.codebooks.requires_grad_(False)
        return weight

    def settle(self) -> None:
        """Makes it a plain ``RPQWeight`` again, without the dense matrix; may be called again."""
        latent = self._parameters.pop(NAME, None)
        if latent is not None:
            self.codebooks.requires_grad_(latent.requires_grad)
        self.__class__ = RPQWeight  # type: ignore[assignment]

    @property
    def tensors(self) -> ops.Tensors:
        """The decoded vectors as one entry each, with the gradient of the dense matrix."""
        with torch.no_grad():
            decoded = ops.expand(super().tensors)
        vectors = _StraightThrough.apply(self.latent, decoded)
        ids = torch.arange(self.spec.num_vectors, dtype=torch.int32, device=decoded.device)[None, None]
        return ops.Tensors(vectors[None, None], ids)

    def part(self) -> Part:
        """Returns the whole tensor."""
        return Part(self.tensors, self.layout, plan="dequantize")

    def whole(self) -> Part:
        """Returns the same part; hooks of the weight fire where it is called."""
        return self.part()


class _StraightThrough(torch.autograd.Function):
    """``decoded``, whose gradient is that of ``latent``."""

    @staticmethod
    def forward(latent: Tensor, decoded: Tensor) -> Tensor:
        return decoded.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None
