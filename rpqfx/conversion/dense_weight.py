"""A dense weight in the place of a quantized one, which reports each of its uses to a listener.

It stands where the codebooks will be, so whatever a rewritten model can do with codebooks, calibration can see: any
architecture that runs rewritten can be calibrated.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from rpqfx import ops
from rpqfx.codebook import CodebookSpec
from rpqfx.nn.layout import Layout
from rpqfx.nn.recorded_slice import Recorded
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.weight_slice import Part


class Listener(Protocol):
    """Receives the uses of dense weights that stand in for codebooks."""

    def asked(self, weight: RPQWeight, product: str, x: Tensor, layout: Layout, geometry: tuple[Any, ...]) -> None:
        """Called before a product (``"linear"``, ``"linear_t"``, ``"conv"``) or a ``"lookup"`` with input ``x``."""

    def made(self, weight: RPQWeight, y: Tensor) -> Tensor:
        """Called after a product or a lookup with its result; returns the result that is passed on."""

    def read(self, weight: RPQWeight) -> None:
        """Called before the whole tensor is handed out, whose further uses are not seen."""


class StandIn(RPQWeight):
    """A weight whose products run with the dense tensor it is made of.

    Args:
        spec: The spec that it will have.
        layout: How the tensor is seen as vectors.
        tensor: The dense tensor, which is shared and not copied where its vectors are rows in memory.
        listener: Called at every use.
    """

    vectors: Tensor
    listener: Listener

    def __init__(self, spec: CodebookSpec, layout: Layout, tensor: Tensor, listener: Listener) -> None:
        super().__init__(spec, layout, device="meta", dtype=tensor.dtype)
        self.listener = listener
        self.trained = tensor.requires_grad
        self.vectors = layout.to_vectors(tensor.detach()).contiguous()
        self._ids = torch.arange(len(self.vectors), dtype=torch.int32, device=tensor.device)[None, None]

    @property
    def tensors(self) -> ops.Tensors:
        """The dense tensor as one entry for each vector."""
        return ops.Tensors(self.vectors[None, None], self._ids)

    def part(self) -> Part:
        """Returns the whole tensor."""
        return _StandInPart(self)

    def become(
        self, codebooks: torch.nn.Parameter, codes: Tensor, factors: dict[str, Tensor], signs: Tensor | None = None
    ) -> None:
        """Makes it a plain ``RPQWeight``, whose dense tensor is forgotten.

        Args:
            codebooks: ``[R, G, K, d]``.
            codes: ``[R, M, N]``.
            factors: ``scale`` and ``column_scale``, where the spec has them.
            signs: ``[R, M, ceil(N/8)]``, where the spec has them; left out, all are plus.
        """
        trained = codebooks.requires_grad
        self.codebooks, self.codes = codebooks, codes.to(self.spec.code_dtype)
        for name in ("scale", "column_scale"):  # the spec may have been settled after this was made
            factor = factors.get(name)
            setattr(self, name, None if factor is None else torch.nn.Parameter(factor, trained))
        if self.signs is not None:  # where none are given, all are plus
            none = torch.zeros(self.spec.signs_shape, dtype=torch.uint8, device=codes.device)
            self.signs = none if signs is None else signs
        self.__class__ = RPQWeight  # type: ignore[assignment]
        for name in ("vectors", "listener", "trained", "_ids"):
            del self.__dict__[name]


class _StandInPart(Recorded):
    """A part of a stand-in. When the weight has become codebooks meanwhile, the same part of those."""

    def __init__(self, weight: RPQWeight, tensors: ops.Tensors | None = None, layout: Layout | None = None) -> None:
        super().__init__(weight.tensors if tensors is None else tensors, weight.layout if layout is None else layout)
        self.plan = "dequantize"
        self._weight = weight

    def _part(self, tensors: ops.Tensors, layout: Layout, *steps: tuple[Any, ...]) -> Part:
        return _StandInPart(self._weight, tensors, layout)

    def _current(self) -> Part | None:
        """Returns the part of the codebooks, or None while the weight is a stand-in, or where they cannot be cut so."""
        return None if isinstance(self._weight, StandIn) else self.again(self._weight.part())

    def dense(self) -> Tensor:
        if isinstance(self._weight, StandIn):
            self._weight.listener.read(self._weight)
        current = self._current()
        return super().dense() if current is None else current.dense()

    def lookup(self, ids: Tensor, sparse: bool = False) -> Tensor:
        self._tell("lookup", ids)
        current = self._current()
        return self._made(super().lookup(ids, sparse)) if current is None else current.lookup(ids, sparse)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self._tell("linear", x)
        current = self._current()
        return self._made(super().linear(x, bias)) if current is None else current.linear(x, bias)

    def linear_t(self, y: Tensor) -> Tensor:
        self._tell("linear_t", y)
        current = self._current()
        return self._made(super().linear_t(y)) if current is None else current.linear_t(y)

    def conv(self, x: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        self._tell("conv", x, geometry)
        current = self._current()
        return self._made(super().conv(x, bias, *geometry)) if current is None else current.conv(x, bias, *geometry)

    def _tell(self, product: str, x: Tensor, geometry: tuple[Any, ...] = ()) -> None:
        if isinstance(self._weight, StandIn):
            self._weight.listener.asked(self._weight, product, x.detach(), self.layout, geometry)

    def _made(self, y: Tensor) -> Tensor:
        return self._weight.listener.made(self._weight, y) if isinstance(self._weight, StandIn) else y
