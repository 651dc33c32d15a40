"""A tensor of a model that could be quantized."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import nn

from rpqfx.errors import SpecError
from rpqfx.nn.layer import Split
from rpqfx.nn.layout import Experts, Layout

Kind = Literal[
    "linear",
    "embedding",
    "embedding_bag",
    "conv",
    "conv_transpose",
    "bilinear",
    "attention",
    "recurrent",
    "experts",
    "parameter",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Site:
    """One tensor of a model that could be quantized, with all that a policy may want to know of it.

    Args:
        name: Qualified name of the Parameter, such as ``"blocks.0.fc.weight"``.
        names: All its names, where it is tied.
        kind: Its use; ``"parameter"`` where the graphs that could be read do not show it.
        module_type: Class of the module that owns it.
        shape: Shape of the Parameter.
        dtype: Dtype of the Parameter.
        lead: Axes that make the rows of its matrix.
        flipped: Whether its outputs are the matrix's columns (``x @ w``) rather than its rows (``x @ w.T``).
        experts: Whether it is a matrix for each index of its first axis.
        splits: Whether vectors may also lie along inputs.
        zero_vector: A row that is zero and stays zero.
        std: Standard deviation that the model's configuration gives its initial weights, where it says one.
        heads: Attention heads of its module, or of the model where the module has none.
        read_outside: Whether the forward of another module reads it from its owner.
        readers: Classes of the modules whose code is known to read it: its owners, and those others.
        plain_when_compiled: Whether compiled code has to read it as a plain tensor (see ``RPQWeight``).
        uses: Where the model's graphs use it, in words.
        blocked: Why it cannot be rewritten, or None.
    """

    name: str
    names: tuple[str, ...]
    kind: Kind
    module_type: type[nn.Module]
    shape: tuple[int, ...]
    dtype: torch.dtype
    lead: int = 1
    flipped: bool = False
    experts: bool = False
    splits: bool = False
    zero_vector: int | None = None
    std: float | None = None
    heads: int | None = None
    read_outside: bool = False
    readers: tuple[type[nn.Module], ...] = field(default=(), compare=False)
    plain_when_compiled: bool = False
    uses: tuple[str, ...] = field(default=(), compare=False)
    blocked: str | None = None

    @property
    def module_names(self) -> tuple[str, ...]:
        """Qualified names of its owners."""
        return tuple(name.rpartition(".")[0] for name in self.names)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def taps(self) -> int:
        """Positions of a filter, where it is of a convolution; else 1."""
        return math.prod(self.shape[2:]) if self.kind in ("conv", "conv_transpose") else 1

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.numel * self.dtype.itemsize

    def layout(self, split: Split = "row", experts: Experts = "shared") -> Layout:
        """Returns how the tensor is seen as vectors.

        Args:
            split: ``"row"`` for one vector an output, ``"column"`` for one vector an input.
            experts: Whether experts share codebooks, where it is a tensor of experts.

        Raises:
            SpecError: If this site's vectors can only lie along outputs.
        """
        if split == "column" and not self.splits:
            raise SpecError(f"{self.name}: vectors of a {self.kind} lie along its outputs; use split='row'")
        transposed = self.flipped != (split == "column")
        if self.experts:
            return Layout(self.shape, 1, transposed, None, experts)
        return Layout(self.shape, self.lead, transposed, self.zero_vector)
