"""A quantized weight that is decoded once a step, so that the gradient of its dense tensor is there to be read."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx import ops
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.weight_slice import Part


class CutWeight(RPQWeight):
    """A weight whose products run with its decoded vectors, a leaf of the graph.

    Codebooks, codes and factors stay where they are. ``decode`` makes the vectors from them; after any number of
    backward passes ``collect`` carries the vectors' gradient on to the codebooks and factors, which costs as much as
    one product's backward pass would, however many products there were. A weight becomes one, and itself again, by its
    class alone.
    """

    vectors: Tensor
    _made: Tensor
    _ids: Tensor

    @classmethod
    def of(cls, weight: RPQWeight) -> CutWeight:
        """Makes a weight one, in place."""
        weight.__class__ = cls
        assert isinstance(weight, CutWeight)
        weight._ids = torch.arange(weight.spec.num_vectors, dtype=torch.int32, device=weight.codes.device)[None, None]
        weight.decode()
        return weight

    def uncut(self) -> None:
        """Makes it a plain ``RPQWeight`` again; where that was interrupted, it may be called again."""
        for name in ("vectors", "_made", "_ids"):
            self.__dict__.pop(name, None)
        self.__class__ = RPQWeight  # type: ignore[assignment]

    def decode(self) -> None:
        """Makes the vectors ``[N, D]`` anew; their gradient is forgotten."""
        with torch.enable_grad():
            self._made = ops.expand(super().tensors, self.spec.grad_factor)
        self.vectors = self._made.detach().requires_grad_()

    def collect(self) -> None:
        """Adds the vectors' gradient to that of codebooks and factors; once for each ``decode``."""
        if self.vectors.grad is not None and self._made.requires_grad:
            self._made.backward(self.vectors.grad)

    @property
    def tensors(self) -> ops.Tensors:
        """The vectors as one entry each."""
        return ops.Tensors(self.vectors[None, None], self._ids)

    def part(self) -> Part:
        """Returns the whole tensor."""
        return Part(self.tensors, self.layout, plan="dequantize")
